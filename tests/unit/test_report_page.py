"""The report in a real browser: it opens without errors and requests, fits its window, filters, and hostile text stays text."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
from playwright.sync_api import expect

from tests.browser import browser
from tests.made_run import HELDOUT, TRAIN, MadeRun, finished_run, right
from tpaw_ray.report.experiment import gather_experiment, is_experiment
from tpaw_ray.report.figures import gather_run
from tpaw_ray.report.page import experiment_page, run_page
from tpaw_ray.report.samples import Said, Sample, Samples, SampleSet, gather_samples
from tpaw_ray.runs.metrics import MetricsLog

HOSTILE = (
    "<script>window.attacked = 1</script>",
    "</script><script>window.attacked = 1</script>",
    "<img src=x onerror=window.attacked=1>",
    "\u202edesrever\u202c \u2066isolated\u2069",
    "\x00\x07\x1b[31mred\x7f\x85",
    "{{ 7 * 7 }} {% raw %} ${attacked} <!-- -->",
    "\u2028line\u2029 \ud800 lone \U000e0041 tag \xa0space\ttab",
)

PATIENCE_MS = 120_000  # a machine that does other things too
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The page of a finished run."""
    run = finished_run(tmp_path_factory.mktemp("finished"))
    return run_page(gather_run(run.store), gather_samples(run.store))


@contextmanager
def opened(chromium, tmp_path, html, width=1440, scheme="light"):
    """The page in a window of its own; fails where it logs an error, or asks for anything but itself."""
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    errors, requests = [], []
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector("html[data-drawn]", state="attached")
    if page.locator("#samples").count():
        page.wait_for_selector("html[data-browsable]", state="attached")
    yield page
    assert errors == []
    assert requests == [address]
    context.close()


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def background(page):
    return sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"))) / 3


def axis_colour(page):
    return page.locator("[data-chart=rewards] .xtick text").first.evaluate("tick => getComputedStyle(tick).fill")


@pytest.mark.parametrize("width", [390, 1440])
def test_a_page_draws_every_chart_and_fits_its_window_in_both_themes(chromium, finished, tmp_path, width):
    with opened(chromium, tmp_path, finished, width, "dark") as page:
        assert background(page) < 60 and overflow(page) <= 0
        charts = page.locator("[data-chart]").count()
        assert charts == 11 and page.locator("[data-chart]:has(.trace)").count() == charts
        dark = axis_colour(page)
        page.locator("#theme").click()
        assert background(page) > 200 and overflow(page) <= 0
        assert axis_colour(page) != dark
        page.emulate_media(color_scheme="light")
        page.locator("#theme").press("Enter")
        assert background(page) < 60 and axis_colour(page) == dark


LEGIBLE = ("ink", "quiet", "accent", "target", "good", "bad")
CONTRAST = """([text, ground]) => {
  const luminance = (name) => {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(--${name})`;
    const channels = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255);
    probe.remove();
    const [r, g, b] = channels.map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [dim, bright] = [luminance(text), luminance(ground)].sort((a, b) => a - b);
  return (bright + 0.05) / (dim + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(chromium, finished, tmp_path, scheme):
    pairs = [(text, ground) for text in LEGIBLE for ground in ("paper", "sheet")] + [("warn-ink", "warn"), ("warn-ink", "paper")]
    with opened(chromium, tmp_path, finished, scheme=scheme) as page:
        ratios = {pair: page.evaluate(CONTRAST, list(pair)) for pair in pairs}
    assert {pair: ratio for pair, ratio in ratios.items() if not 4.5 <= ratio <= 21} == {}


def found(page):
    return page.locator(".sample .ask").all_inner_texts()


def prompts(*texts):
    return [f"<|user|>{text}<|end|><|assistant|>" for text in texts]


def test_filters_choose_by_verdict_checkpoint_and_text(chromium, finished, tmp_path):
    with opened(chromium, tmp_path, finished) as page:
        assert found(page) == prompts("5+1=", "5+2=", "5+3=", "5+4=")
        page.select_option("#verdict", "incorrect")
        assert found(page) == prompts("5+1=", "5+2=", "5+3=")
        page.select_option("#voice", label="checkpoint 001")
        assert found(page) == prompts("5+2=", "5+3=")
        page.select_option("#verdict", "gained")
        assert found(page) == prompts("5+1=")
        page.select_option("#verdict", "lost")
        assert found(page) == [] and page.inner_text("#count") == "None of 4 samples fits."
        page.select_option("#verdict", "all")
        page.fill("#query", "5+4")
        expect(page.locator(".sample")).to_have_count(1)
        assert found(page) == prompts("5+4=") and page.inner_text("#count") == "1–1 of 1 that fit, of 4 samples"
        assert page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["5+4"]
        page.fill("#query", "")
        page.locator("[data-set='1']").click()
        expect(page.locator(".sample")).to_have_count(3)
        page.select_option("#voice", label="checkpoint 001, iteration 1")
        page.select_option("#verdict", "incorrect")
        assert found(page) == prompts("3+3=")
        assert page.locator(".said.chosen .text").inner_text() == "nothing<|end|>"
        page.locator("body").press("/")
        assert page.evaluate("document.activeElement.id") == "query"


def test_log_probabilities_stand_beside_what_was_said(chromium, finished, tmp_path):
    with opened(chromium, tmp_path, finished) as page:
        page.locator("[data-set='1']").click()
        said = page.locator(".sample").nth(1).locator(".said").all_inner_texts()
        assert [" ".join(one.split()) for one in said] == [
            "target #### 4<|end|> answer 4 log p 000 −1.01 log p 001 −1.01",
            "checkpoint 000, iteration 0 #### 5<|end|> incorrect answer 5 log p 000 −1.01 log p 001 −1.01",
            "checkpoint 001, iteration 1 #### 4<|end|> correct log p 000 −1.11 log p 001 −1.11",
        ]


def test_hostile_text_stays_text(chromium, finished, tmp_path):
    run = finished_run(tmp_path / "run")
    figures = gather_run(run.store)
    row = replace(figures.checkpoints[-1].row, warnings=list(HOSTILE))
    figures = replace(
        figures,
        name=HOSTILE[1],
        config="\n".join(HOSTILE),
        environment={HOSTILE[0]: ((HOSTILE[2], HOSTILE[3]),)},
        checkpoints=(*figures.checkpoints[:-1], replace(figures.checkpoints[-1], row=row)),
    )
    said = tuple(Said(text=text, answer=text, correct=False, finish="stop", logps=(-1.0,)) for text in HOSTILE)
    sample = Sample(
        prompt_id=HOSTILE[0], row=0, prompt=HOSTILE[1], target=HOSTILE[2], reference=HOSTILE[0], logps=(-1.0,), said=said
    )
    shown = SampleSet(title=HOSTILE[0], voices=HOSTILE, players=(0,), total=1, samples=(sample,))
    page_text = run_page(figures, Samples(sets=(shown,), special=("<|end|>", "(", "</script>")))
    with opened(chromium, tmp_path, page_text) as page:
        page.fill("#query", "onerror")
        expect(page.locator("#count")).to_have_text("1–1 of 1 samples")
        assert page.evaluate("window.attacked") is None
        assert page.locator("img, #list script, main script, iframe").count() == 0
        texts = page.locator(".said .text").all_inner_texts()
        assert texts[1:3] == list(HOSTILE[:2])
        assert texts[4] == r"\u202edesrever\u202c \u2066isolated\u2069"
        assert texts[5] == r"\x00\x07\x1b[31mred\x7f\x85".replace(r"\x00", r"\0")
        assert texts[7] == r"\u2028line\u2029 \ud800 lone \U000e0041 tag \xa0space\ttab"
        shown_text = page.inner_text("body") + page.title()
        assert not set(shown_text) & set("\x00\x07\x1b\x7f\x85\u202e\u202c\u2066\u2028\U000e0041")


def test_a_script_that_got_into_the_page_would_not_run(chromium, finished, tmp_path):
    attacked = finished.replace("<h1>", "<script>window.attacked = 1</script><h1>", 1)
    (tmp_path / "report.html").write_text(attacked, encoding="utf-8")
    page = chromium.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached")
    assert page.evaluate("window.attacked") is None
    page.close()


def test_ten_thousand_samples_are_data_and_only_a_page_of_them_elements(chromium, tmp_path):
    run = finished_run(tmp_path / "run")
    samples = tuple(
        Sample(
            prompt_id=f"p{row}",
            row=row,
            prompt=f"Question {row}: " + "why is it so? " * 20,
            target="because of " + "reasons " * 30,
            reference=str(row),
            logps=(-row / 10, -row / 20),
            said=tuple(
                Said(
                    text=f"voice {voice} says {row} " + "x y " * 50,
                    answer="1",
                    correct=row % 3 == 0,
                    finish="stop",
                    logps=(-1.0, -2.0),
                )
                for voice in range(3)
            ),
        )
        for row in range(10_000)
    )
    shown = SampleSet(title="Many", voices=("a", "b", "c"), players=(0, 1), total=10_000, samples=samples)
    with opened(chromium, tmp_path, run_page(gather_run(run.store), Samples(sets=(shown,), special=("<|end|>",)))) as page:
        assert page.inner_text("#count") == "1–10 of 10,000 samples" and page.inner_text("#page") == "page 1 of 1,000"
        assert page.locator("#list *").count() < 1000
        page.select_option("#verdict", "correct")
        assert page.inner_text("#page") == "page 1 of 334"
        page.fill("#query", "question 9999:")
        expect(page.locator(".sample")).to_have_count(1)
        assert page.inner_text("#count") == "1–1 of 1 that fit, of 10,000 samples"
        page.fill("#query", "")
        expect(page.locator(".sample")).to_have_count(10)
        page.select_option("#order", "unlikely")
        assert page.locator(".sample header").first.inner_text().split() == ["row", "9999", "prompt", "p9999"]
        page.locator("#next").click()
        page.locator("body").press("ArrowRight")
        assert page.inner_text("#page") == "page 3 of 334"
        assert page.locator("#list *").count() < 1000


def test_an_unfinished_run_without_a_judge_says_so(chromium, tmp_path):
    run = MadeRun(tmp_path / "run").start(TRAIN, HELDOUT)
    unjudged = [("so", None, None)] * 4
    run.evaluate(0, unjudged).iterate(0, ["so"] * 3).evaluate(1, unjudged)
    page_text = run_page(gather_run(run.store), gather_samples(run.store))
    with opened(chromium, tmp_path, page_text, 390) as page:
        assert page.inner_text(".state") == "unfinished: 1 of 2 iterations evaluated"
        assert "no accuracy" in page.inner_text(".headline")
        assert page.inner_text("[data-chart=accuracy]") == "Nothing of this kind was measured."
        assert page.locator("#verdict").is_disabled() and overflow(page) <= 0


def test_a_run_on_targets_alone_leaves_out_what_it_does_not_measure(chromium, tmp_path):
    run = MadeRun(tmp_path / "run", planned=1, team={"data": "none"}).start(TRAIN, HELDOUT).evaluate(0, right(1))
    unmeasured = dict.fromkeys(
        ("target_reward", "generated_reward", "margin", "target_weight_share", "generated_logp", "generated_length")
    )
    MetricsLog(run.store).append([replace(step, players=[], player_weights=[], **unmeasured) for step in run.steps(0)])
    with opened(chromium, tmp_path, run_page(gather_run(run.store), gather_samples(run.store))) as page:
        assert page.inner_text(".lead .facts div >> nth=0").split("\n") == ["method", "fine-tuning on the targets"]
        assert page.inner_text(".lead .facts div >> nth=1").split("\n") == ["learns from", "targets alone"]
        assert "team size K" not in page.inner_text(".lead .facts")
        empty = page.locator(".chart.empty").evaluate_all("charts => charts.map((chart) => chart.dataset.chart)")
        assert empty == ["rewards", "margin", "alpha", "beta"]
        assert page.locator("[data-chart=logps]:has(.trace)").count() == 1


def test_a_run_of_which_nothing_is_made_yet_has_a_page(chromium, tmp_path):
    run = MadeRun(tmp_path / "run").start(TRAIN, HELDOUT)
    with opened(chromium, tmp_path, run_page(gather_run(run.store), gather_samples(run.store))) as page:
        assert page.inner_text("#accuracy .empty") == "No checkpoint has been evaluated yet."
        assert page.inner_text("#learning .empty") == "No step has been taken yet."
        assert page.inner_text(".ask >> nth=0") == "<|user|>1+1=<|end|><|assistant|>"


@pytest.mark.parametrize("width", [390, 1440])
def test_an_experiments_page_draws_its_methods(chromium, tmp_path, width):
    runs = [{"method": HOSTILE[2], "seed": seed, "root": finished_run(tmp_path, name=f"r{seed}").store.root} for seed in range(2)]
    store = finished_run(tmp_path, name="study").store
    content = {"name": HOSTILE[1], "protocol": list(HOSTILE[:4]), "table": [{"method": HOSTILE[0]}], "runs": runs}
    content["choices"] = {"without-player-weights": {"settings": {"learner.learning_rate": 1.0000001e-4}}}
    store.write_json(store.path("experiment.json"), content)
    assert is_experiment(store)
    with opened(chromium, tmp_path, experiment_page(gather_experiment(store)), width) as page:
        assert page.locator("[data-chart]:has(.trace)").count() == 8 and overflow(page) <= 0
        assert page.evaluate("window.attacked") is None and page.locator("img, main script").count() == 0
        assert page.inner_text("#table tbody th") == HOSTILE[0]
        page.locator("#theme").click()
