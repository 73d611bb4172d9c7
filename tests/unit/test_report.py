"""A run's figures and samples from files written by hand, and the file that shows them."""

import json
import math
import re
import shutil
from dataclasses import asdict, replace

import pytest
from typer.testing import CliRunner

from tests.made_run import HELDOUT, TRAIN, MadeRun, finished_run, right
from tests.unit.test_schema_and_store import STEP
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.cli import app
from tpaw_ray.errors import RunError
from tpaw_ray.evaluation.statistics import proportion_interval
from tpaw_ray.report.experiment import Band, band, gather_experiment
from tpaw_ray.report.figures import curves_of, gather_run
from tpaw_ray.report.page import duration, experiment_page, headline, percent, run_page, signed
from tpaw_ray.report.samples import gather_samples
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import RunStore


@pytest.fixture
def made(tmp_path):
    return finished_run(tmp_path)


# Figures.


def test_a_checkpoint_has_its_interval_and_its_gain_over_the_start(made):
    figures = gather_run(made.store)
    assert figures.finished and figures.done == 2
    start, _, last = figures.checkpoints
    assert (start.row.accuracy, start.gain, start.judged) == (0.25, None, 4)
    assert start.interval == proportion_interval(1, 4)
    # paired by prompt: three of four went from wrong to right, one was right before
    assert (last.row.accuracy, last.gain.difference, last.gain.pairs) == (1.0, 0.75, 4)
    assert last.gain_interval.high == 1.0 < last.gain.interval.high
    assert last.gain_interval.low == pytest.approx(0.75 - 3.182446 * 0.5 / math.sqrt(4), abs=1e-4)


def test_seconds_of_a_stage_tell_how_long_it_waited(made):
    last = gather_run(made.store).checkpoints[2]
    assert last.row.seconds == {"generate": 3.0, "score": 4.0, "update": 6.0, "evaluate": 5.0}
    assert last.waited == {"generate": 0.0, "score": 1.0, "update": 0.0, "evaluate": 2.0}


def test_the_environment_is_sorted_by_topic_and_reads_well(made):
    assert gather_run(made.store).environment == {
        "packages": (("torch", "9.9"),),
        "source": (("python", "3.11.1"), ("commit", "unknown"), ("seed", "42")),
        "cluster": (("memory, GiB", "2.0"),),
    }


def test_a_run_that_has_only_begun_is_unfinished(tmp_path):
    run = MadeRun(tmp_path).start(TRAIN, HELDOUT)
    figures = gather_run(run.store)
    assert (figures.finished, figures.done, figures.planned, figures.checkpoints, figures.curves.steps) == (False, 0, 2, (), ())
    run.evaluate(0, right(1))
    assert (gather_run(run.store).finished, gather_run(run.store).done) == (False, 0)


def test_steps_of_an_update_under_way_are_drawn(tmp_path):
    run = MadeRun(tmp_path).start(TRAIN, HELDOUT).evaluate(0, right(1))
    MetricsLog(run.store).append(run.steps(0)[:3])
    curves = gather_run(run.store).curves
    assert (curves.steps, curves.iterations, curves.last) == ((0, 1, 2), ((0, 0),), 3)
    assert curves.values["target_reward"] == pytest.approx((0.1, 0.2, 0.3))


def test_points_of_many_steps_are_means_over_their_triplets_and_mix_no_iterations():
    rows = [
        asdict(
            replace(
                STEP,
                iteration=iteration,
                triplets=triplets,
                margin=margin,
                grad_norm=norm,
                players=[iteration],
                player_weights=[1.0],
            )
        )
        for iteration, triplets, margin, norm in [(0, 1, 1.0, 2.0), (0, 3, 5.0, math.inf), (0, 2, 7.0, None), (1, 2, 9.0, 4.0)]
    ]
    curves = curves_of(rows, points=2)
    assert (curves.steps, curves.per_point, curves.iterations, curves.last) == ((0, 2, 3), 2, ((0, 0), (1, 3)), 4)
    assert curves.values["margin"] == (4.0, 7.0, 9.0)  # (1·1 + 3·5) / 4
    assert curves.values["grad_norm"] == (2.0, None, 4.0)
    assert curves.player_weights == {0: (1.0, 1.0, None), 1: (None, None, 1.0)}


# Samples.


def test_a_training_prompt_has_what_every_checkpoint_said_under_every_player(made):
    held, training = gather_samples(made.store).sets
    assert (held.voices, held.players) == (("checkpoint 000", "checkpoint 001", "checkpoint 002"), (0, 1, 2))
    assert training.voices == ("checkpoint 000, iteration 0", "checkpoint 001, iteration 1")
    sample = training.samples[1]
    assert (sample.prompt, sample.target) == ("<|user|>2+2=<|end|><|assistant|>", "#### 4<|end|>")
    assert sample.logps == (-1.01, -1.01)
    first, second = sample.said
    assert (first.text, first.answer, first.correct, first.logps) == ("#### 5<|end|>", "5", False, (-1.01, -1.01))
    assert (second.text, second.answer, second.correct, second.logps) == ("#### 4<|end|>", "4", True, (-1.11, -1.11))
    assert training.samples[2].said[1].answer is None and training.samples[2].said[1].correct is False


def test_a_held_out_prompt_has_the_judged_answers_and_the_targets_log_probabilities(made):
    held, _ = gather_samples(made.store).sets
    sample = held.samples[1]
    assert [said.correct for said in sample.said] == [False, False, True]
    assert sample.logps == (-1.01, -2.01, -3.01)


def test_samples_are_evenly_spaced_over_all_files(made):
    held, training = gather_samples(made.store, 2).sets
    assert ([one.row for one in held.samples], held.total) == ([0, 2], 4)
    assert ([one.row for one in training.samples], training.total) == ([0, 1], 3)
    assert gather_samples(made.store, 0).sets == ()


def test_a_run_that_holds_nothing_out_has_a_report(tmp_path):
    run = MadeRun(tmp_path, planned=1).start(TRAIN, []).iterate(0, ["#### 2", "#### 4", "#### 6"])
    for number in (0, 1):  # as the loop commits them
        counts = {"sequences": 0, "tokens": 0, "seconds": 0.0, "waited": 0.0, "accuracy": None, "target_logp": None}
        run.store.commit(run.store.evaluation(number), **counts)
    assert [one.title for one in gather_samples(run.store).sets] == ["Training prompts"]
    assert gather_run(run.store).finished and invoke(run.store.root).exit_code == 0


DAMAGES = {
    "a marker without counts": ("evaluations/001/committed.json", b"{}", "counts: missing"),
    "a marker that counts too little": (
        "evaluations/001/committed.json",
        b'{"counts": {"seconds": 1}, "files": {}}',
        "counts.accuracy: missing",
    ),
    "a marker without its time": (
        "evaluations/001/committed.json",
        json.dumps(
            {"counts": {"seconds": 1, "sequences": 1, "tokens": 1, "accuracy": 1, "target_logp": 1}, "files": {}}
        ).encode(),
        "ended: missing",
    ),
    "prompts' marker": ("prompts/committed.json", b"[]", "found [], expected dict"),
    "the sheet of the machine": ("environment.json", b"[1]", "found [1], expected dict"),
    "a learner's rows": ("iterations/000/learner/metrics.jsonl", b"\xff\n", "line 1: not a step's row"),
    "a learner's empty file": ("iterations/000/learner/metrics.jsonl", b"", "no rows"),
}


@pytest.mark.parametrize(("name", "content", "told"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_of_a_run_is_named_and_its_experiment_still_has_a_report(experiment, name, content, told):
    run = RunStore.named(experiment.path("runs", "tpaw-0"))
    run.write_bytes(run.path(*name.split("/")), content)
    error = invoke(run.root).exception
    assert isinstance(error, RunError) and str(error).startswith(run.path(name)) and told in str(error)
    figures = gather_experiment(experiment)
    assert [run.state for run in figures.runs[1:3]] == ["finished"] * 2 and told in figures.runs[0].state
    assert invoke(experiment.root).exit_code == 0


def test_a_damaged_line_of_the_steps_is_left_out_of_the_curves(made):
    path = made.store.path("metrics.jsonl")
    made.store.write_bytes(path, bytes(50) + b"\n{}\n" + made.store.read_bytes(path))
    assert gather_run(made.store).curves.last == 8


def test_what_is_not_committed_is_not_shown(tmp_path):
    run = MadeRun(tmp_path).start(TRAIN, HELDOUT).evaluate(0, right(1)).iterate(0, ["#### 2"] * 3)
    run.say(1, ["#### 3"] * 3)
    run.store.remove(f"{run.store.rollout(Rollout(1, 1))}/committed.json")
    run.store.remove(f"{run.store.iteration(0)}/scores/committed.json")
    _, training = gather_samples(run.store).sets
    assert (training.voices, training.players) == (("checkpoint 000, iteration 0",), ())


def test_a_prompt_that_was_set_aside_is_not_judged(tmp_path):
    run = MadeRun(tmp_path).start(TRAIN, HELDOUT)
    run.say(0, ["", "", ""], finish="set_aside")
    (training,) = gather_samples(run.store).sets
    assert (training.samples[0].said[0].finish, training.samples[0].said[0].correct) == ("set_aside", None)


def test_given_preferences_are_not_taken_for_what_a_checkpoint_said(tmp_path):
    run = MadeRun(tmp_path, team={"data": "given"}).start(TRAIN, HELDOUT)
    run.say(0, ["#### 3"] * 3)
    (training,) = gather_samples(run.store).sets
    assert training.voices == ("rejected response",) and training.samples[0].said[0].correct is False


def test_a_damaged_tokenizer_is_named(made):
    made.store.write_bytes(f"{made.store.checkpoint(0)}/tokenizer.json", b"{")
    with pytest.raises(RunError, match=r"checkpoints/000: its tokenizer cannot be loaded.*--samples 0"):
        gather_samples(made.store)


# The file.


def test_the_headline_says_what_came_out(made, tmp_path):
    text = headline(gather_run(made.store))
    assert text.startswith("Held-out accuracy went from 25.0 % to 100.0 % in 2 iterations: +75.0 points, with 95 % confidence")
    unjudged = [("so", None, None)] * 4
    other = MadeRun(tmp_path, "other", planned=1).start(TRAIN, HELDOUT).evaluate(0, unjudged)
    assert headline(gather_run(other.store)) == "Nothing has been evaluated to compare yet."
    other.iterate(0, ["so"] * 3).evaluate(1, unjudged)
    assert headline(gather_run(other.store)).startswith(
        "The mean log-probability of held-out targets went from −3.00 to −2.00 nats."
    )


def test_numbers_as_a_person_reads_them():
    assert (percent(0.1234), percent(None), signed(-0.5, 1), signed(None)) == ("12.3 %", "–", "−0.5", "–")
    assert (duration(59.4), duration(61), duration(3660)) == ("59 s", "1 min 1 s", "1 h 1 min")


def test_the_same_run_makes_the_same_file_and_it_names_no_address(made):
    page = run_page(gather_run(made.store), gather_samples(made.store))
    assert page == run_page(gather_run(made.store), gather_samples(made.store))
    assert not re.search(r"(?:src|href)\s*=\s*\"(?!#)", page)
    assert "@import" not in page and "url(" not in page


def test_hostile_names_and_warnings_are_escaped(made):
    figures = gather_run(made.store)
    last = figures.checkpoints[-1]
    row = replace(last.row, warnings=["</li><script>alert(1)</script>\x1b[31m\u202e"])
    figures = replace(figures, checkpoints=(*figures.checkpoints[:-1], replace(last, row=row)), config="a: '</pre><img src=x>'")
    page = run_page(figures, gather_samples(made.store))
    assert "<script>alert" not in page and "<img" not in page and "\x1b" not in page and "\u202e" not in page
    assert "&lt;/li&gt;&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m\\u202e" in page


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_into_the_runs_folder_or_where_it_is_told(made, tmp_path):
    result = invoke(f"{made.store.root}/")
    assert result.output == f"{made.store.root}/report.html\n"
    assert (tmp_path / "made/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert invoke(made.store.root, "--to", tmp_path / "other.html", "--samples", 0).exit_code == 0
    page = (tmp_path / "other.html").read_text(encoding="utf-8")
    assert 'id="samples"' not in page and 'id="accuracy"' in page


def test_a_report_is_written_whole_or_not_at_all_and_in_place_of_nothing_but_a_file(made, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("the one before")
    (tmp_path / "link.html").symlink_to(tmp_path / "report.html")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: 1 / 0)
        invoke(made.store.root, "--to", tmp_path / "link.html")
    assert (tmp_path / "report.html").read_text() == "the one before"
    assert invoke(made.store.root, "--to", tmp_path / "link.html").exit_code == 0
    assert (tmp_path / "link.html").is_symlink() and "<!doctype html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for place in (tmp_path, "/dev/null"):
        error = invoke(made.store.root, "--to", place).exception
        assert isinstance(error, RunError) and "is there already and not a file" in str(error)


def test_where_there_is_no_run_the_command_says_what_it_expects(tmp_path):
    error = invoke(tmp_path).exception
    assert isinstance(error, RunError) and "neither config.yaml nor experiment.json" in str(error)
    (tmp_path / "file").touch()
    error = invoke(finished_run(tmp_path).store.root, "--to", tmp_path / "file/report.html").exception
    assert isinstance(error, RunError) and "cannot be written" in str(error)
    with pytest.raises(RunError, match="expected the address of a run's folder"):
        RunStore.named("s3://bucket")


def test_a_run_in_an_object_store_is_read_and_its_report_lies_beside_it(bucket):
    run = finished_run(f"{bucket}/runs")
    assert invoke(run.store.root).output == f"{run.store.root}/report.html\n"
    assert b"75.0 points" in run.store.read_bytes(run.store.path("report.html"))


# Experiments.


def test_a_band_is_the_mean_and_deviation_over_seeds():
    assert band([{0: 1.0, 1: 2.0, 2: 5.0}, {0: 3.0, 1: 2.0, 2: None}, {}]) == Band(
        x=(0, 1), mean=(2.0, 2.0), deviation=(math.sqrt(2), 0.0)
    )
    assert band([{}]) == Band(x=(), mean=(), deviation=())
    assert band([{0: 1.0, 1: 3.0, 2: 5.0}], points=2) == Band(x=(0, 2), mean=(2.0, 5.0), deviation=(None, None))


@pytest.fixture
def experiment(tmp_path):
    """Two runs of a method, and one that is not there."""
    runs = [finished_run(tmp_path / "study/runs", name=f"tpaw-{seed}").store.root for seed in range(2)]
    content = {
        "name": "study <b>",
        "protocol": [{"event": "tuned", "at": "noon"}, "touch test once"],
        "table": [
            {
                "method": "tpaw",
                "seeds": [0, 1],
                "best": {"mean": 0.875, "std": 0.0125},
                "comparisons": [{"to": "start", "on": "best", "difference": 0.5, "low": 0.25, "high": 0.75, "p_holm": 0.01}],
            }
        ],
        "runs": [
            {"method": "tpaw", "seed": 0, "root": runs[0], "phase": "final"},
            {"method": "tpaw", "seed": 7, "root": runs[1], "phase": "tuning"},
            {"method": "tpaw", "seed": 1, "root": "runs/tpaw-1"},
            {"method": "</script>", "seed": 1, "root": "runs/gone"},
        ],
        "choices": {"tpaw": {"settings": {"learner.learning_rate": 1e-4}, "points": [{"accuracy": 0.5}]}},
        "failures": [{"run": "tuning/tpaw", "exit_code": 8, "said": "loss: nan"}],
    }
    (tmp_path / "study/experiment.json").write_text(json.dumps(content))
    return RunStore.named(str(tmp_path / "study"))


def test_an_experiment_has_its_table_and_its_methods_curves(experiment):
    figures = gather_experiment(experiment)
    (row,) = figures.table
    assert (row.method, row.seeds, row.best, row.last) == ("tpaw", "0, 1", "87.5 ± 1.2 %", "–")
    (comparison,) = row.comparisons
    assert (comparison.baseline, comparison.on, comparison.difference) == ("start", "best", "+50.0")
    assert (comparison.interval, comparison.p, comparison.holm) == ("+25.0 to +75.0", "–", "0.01")
    (curves,) = figures.curves
    assert (curves.method, curves.runs) == ("tpaw", 2)
    assert curves.bands["accuracy"] == Band(x=(0, 1, 2), mean=(0.25, 0.5, 1.0), deviation=(0.0, 0.0, 0.0))
    assert [run.state for run in figures.runs[:3]] == ["finished"] * 3
    assert "neither config.yaml" in figures.runs[3].state
    assert figures.protocol == ("tuned, noon", "touch test once")
    choices = (("tpaw · learner.learning_rate", "0.0001"),)
    assert figures.more == {"choices": choices, "failures": (("tuning/tpaw", "loss: nan"),)}


def test_a_run_that_diverged_is_over_and_the_page_says_so(experiment):
    path = experiment.path("experiment.json")
    content = experiment.read_json(path)
    content["runs"] = content["runs"][:2]
    experiment.write_json(path, content)
    page = experiment_page(gather_experiment(experiment))
    assert "all 2 runs finished" in page and "seed 1: the run" not in page
    experiment.write_json(path, content | {"given_up": ["runs/tpaw-1"], "remarks": ["tpaw, seed 1: the run <b>diverged."]})
    shutil.rmtree(experiment.path("runs/tpaw-1/evaluations/002"))
    figures = gather_experiment(experiment)
    assert [(run.state, run.ended) for run in figures.runs] == [
        ("finished", True),
        ("diverged, 1 of 2 iterations evaluated", True),
    ]
    page = experiment_page(figures)
    waiting = {"method": "tpaw", "seed": 2, "root": "runs/gone"}
    experiment.write_json(path, experiment.read_json(path) | {"runs": [*content["runs"], waiting]})
    assert "1 of 3 runs finished" in experiment_page(gather_experiment(experiment))
    assert "all 2 runs ended" in page and "tpaw, seed 1: the run &lt;b&gt;diverged." in page


def test_an_experiment_is_tolerant_of_what_is_absent(tmp_path):
    (tmp_path / "experiment.json").write_text('{"table": [{}, {"method": null, "best": 3}], "runs": [{}, 7]}')
    page = experiment_page(gather_experiment(RunStore.named(str(tmp_path))))
    assert "no root is given" in page


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"table": [{"best": {"mean": 1%s}}]}' % ("0" * 400), "an integer of 401 digits"),
        ('{"more": ' + '[{"a":' * 330 + "1" + "}]" * 330 + "}", "more than 50 deep"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["a number without end", "deep", "deeper than Python reads"],
)
def test_an_experiments_file_that_cannot_be_meant_is_named(tmp_path, content, told):
    (tmp_path / "experiment.json").write_text(content)
    with pytest.raises(RunError, match=rf"^{tmp_path}/experiment\.json: not valid JSON \(.*{told}"):
        gather_experiment(RunStore.named(str(tmp_path)))


def test_the_command_shows_an_experiment(experiment, tmp_path):
    assert invoke(experiment.root).exit_code == 0
    page = (tmp_path / "study/report.html").read_text(encoding="utf-8")
    assert "study &lt;b&gt;" in page and "study <b>" not in page
