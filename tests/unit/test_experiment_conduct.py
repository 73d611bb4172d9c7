"""An experiment walked from its first run to its table; hand-made run folders stand for runs, made-up answers for engines."""

import json
import shutil

import pytest

from tests.unit.test_experiment_design import design_of
from tpaw_ray import cli
from tpaw_ray.config import dump_config
from tpaw_ray.errors import ConfigError, DataError, RunError
from tpaw_ray.experiment import conduct as conducting
from tpaw_ray.experiment.commands import Ended
from tpaw_ray.experiment.conduct import check, show_work, walk
from tpaw_ray.experiment.phases import Answered
from tpaw_ray.experiment.record import Record, store_of
from tpaw_ray.experiment.testing import answered
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt

RATES = [1e-4, 1e-3]
BASE = {
    "model": {"path": "models/study-{seed}"},
    "data": {"path": "d.jsonl", "validation_fraction": 0.2, "test_fraction": 0.2},
    "iterations": 2,
}


class House:
    """An experiment of two methods, two settings and two seeds in a folder; its runs and answers are fakes that count."""

    def __init__(self, folder):
        self.folder = folder
        self.failing = {}
        self.came = 0  # evaluations that failing runs leave behind
        self.played = []
        self.asked = []
        self.validation = lambda run: [0.5, 0.8, 0.6 + run.config.learner.learning_rate]
        self.references = lambda run: ["72", None]  # of the held-out prompts

    def design(self, **changes):
        file = {
            "root": str(self.folder / "experiments"),
            "base": BASE,
            "seeds": [0, 1],
            "methods": {"tpaw": {"preset": "tpaw"}, "spin": {"preset": "spin"}},
            "tuning": {"seeds": [9], "grid": {"learner.learning_rate": RATES}},
        }
        return design_of(self.folder, **{**file, **changes})

    @property
    def store(self):
        return RunStore.open(str(self.folder / "experiments"), "small")

    def walk(self, **changes):
        """Conduct as far as it goes; returns the exit code."""
        design = self.design(**changes)
        return walk(design, Record(design, self.store), self.play, self.answer, Reporter())

    def play(self, runs, on_end):
        for run in runs:
            self.played.append(run.key)
            if codes := self.failing.get(run.key):
                finish(run, self.validation(run)[: self.came], self.references(run), finished=False)
                on_end(run, Ended(exit_code=codes.pop(0), said="it broke", seconds=1.0))
                continue
            finish(run, self.validation(run), self.references(run))
            on_end(run, Ended(exit_code=0, said="", seconds=1.0))

    def answer(self, asked):
        for one in asked:
            self.asked.append((one.config.run.name, one.checkpoint))
            accuracy = 0.4 if one.checkpoint == 0 else 0.5 + 0.01 * one.config.run.seed + 0.1 * one.config.team.size
            one.store.commit(one.store.path("tested", f"{one.checkpoint:03d}"), accuracy=accuracy, judged=10)

    def json(self, name):
        return json.loads((self.folder / "experiments/small" / name).read_text())

    def events(self):
        return [event["event"] for event in self.json("experiment.json")["protocol"]]


def finish(run, accuracies, references, *, finished=True):
    """What a run leaves behind, as far as an experiment reads it."""
    store = store_of(run)
    store.write_bytes(store.path("config.yaml"), dump_config(run.config).encode())
    prompts = [
        Prompt(prompt_id=str(row), row=row, prompt_tokens=[1], target_tokens=[2], reference_answer=reference)
        for row, reference in enumerate(references)
    ]
    for split in ("train", "validation", "test"):
        store.write_rows(store.shard(store.prompts(split), 0), prompts, Prompt)
    store.commit(store.path("prompts"), test=len(prompts), validation=len(prompts), train=len(prompts))
    for number, accuracy in enumerate(accuracies):
        store.commit(store.evaluation(number), accuracy=accuracy, target_logp=-1.0)
    if finished:
        store.commit(store.iteration(len(accuracies) - 2))


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


TUNING = [f"tuning/{method}_learning_rate-{rate}_seed-9" for method in ("tpaw", "spin") for rate in RATES]
FINAL = [f"final/{method}_seed-{seed}" for method in ("tpaw", "spin") for seed in (0, 1)]
TESTED = [
    ("tpaw_seed-0", 0),
    ("tpaw_seed-0", 1),
    ("tpaw_seed-0", 2),
    ("tpaw_seed-1", 0),
    ("tpaw_seed-1", 1),
    ("tpaw_seed-1", 2),
    ("spin_seed-0", 1),
    ("spin_seed-0", 2),
    ("spin_seed-1", 1),
    ("spin_seed-1", 2),
]


def test_every_run_is_played_once_then_the_test_split_is_answered_once(house):
    assert house.walk() == 0
    assert house.played == [*TUNING, *FINAL]
    assert sorted(house.asked) == sorted(TESTED)
    assert house.events() == ["tuned", "chosen", "trained", "testing", "tested"]


def test_an_experiment_without_tuning_does_not_say_that_it_was_tuned(house):
    house.validation = lambda run: [0.5, 0.8, 0.6]
    assert house.walk(tuning=None) == 0
    assert house.played == FINAL
    assert house.events() == ["chosen", "trained", "testing", "tested"]


def test_the_record_holds_choices_runs_and_the_table_of_the_test_split(house):
    house.walk()
    found = house.json("experiment.json")
    assert (found["name"], found["failures"]) == ("small", [])
    assert {method: choice["settings"] for method, choice in found["choices"].items()} == {
        "tpaw": {"learner.learning_rate": 1e-3},
        "spin": {"learner.learning_rate": 1e-3},
    }
    assert found["choices"] == house.json("choices.json")["methods"]
    assert [(run["phase"], run["method"], run["seed"]) for run in found["runs"]][3:6] == [
        ("tuning", "spin", 9),
        ("final", "tpaw", 0),
        ("final", "tpaw", 1),
    ]
    assert found["runs"][4]["root"] == str(house.folder / "experiments/small/final/tpaw_seed-0")
    assert found["runs"][4]["settings"] == {"learner.learning_rate": 1e-3}
    rows = {row["method"]: row for row in found["table"]}
    assert rows["start"]["best"]["values"] == rows["start"]["last"]["values"] == [0.4, 0.4]
    assert rows["tpaw"]["best"]["values"] == pytest.approx([0.8, 0.81])
    assert (rows["tpaw"]["best"]["checkpoints"], rows["tpaw"]["last"]["checkpoints"]) == ([1, 1], [2, 2])
    assert rows["spin"]["best"]["mean"] == pytest.approx(0.605)
    assert [(one["to"], one["on"]) for one in rows["tpaw"]["comparisons"]] == [
        ("start", "best"),
        ("spin", "best"),
        ("start", "last"),
        ("spin", "last"),
    ]
    assert rows["tpaw"]["comparisons"][1]["difference"] == pytest.approx(0.2)
    table = (house.folder / "experiments/small/table.md").read_text()
    assert "| tpaw | 2 | 0.8050 ± 0.0071 |" in table and "| spin | start | best | +0.2050 |" in table and "tested 20" in table
    assert found["remarks"] == ["Accuracies are of 10 judged answers each."] and f"\n{found['remarks'][0]}\n" in table


def test_choices_are_written_before_the_first_final_run(house):
    seen = []
    play = house.play

    def watch(runs, on_end):
        seen.append((runs[0].phase, (house.folder / "experiments/small/choices.json").exists()))
        play(runs, on_end)

    house.play = watch
    house.walk()
    assert seen == [("tuning", False), ("final", True)]


def test_the_same_again_plays_nothing_and_touches_the_test_split_no_more(house):
    house.walk()
    house.played, house.asked = [], []
    assert house.walk() == 0
    assert (house.played, house.asked) == ([], [])
    folder = house.folder / "experiments/small/final/tpaw_seed-0/tested/001"
    (folder / "committed.json").unlink()  # even so
    assert house.walk() == 0
    assert house.asked == []


def test_answers_that_were_given_before_an_interruption_are_kept(house):
    answer = house.answer

    def break_off(asked):
        answer(asked[:3])
        raise KeyboardInterrupt

    house.answer = break_off
    with pytest.raises(KeyboardInterrupt):
        house.walk()
    assert house.events() == ["tuned", "chosen", "trained", "testing"]
    given, house.answer, house.played = list(house.asked), answer, []
    assert house.walk() == 0
    assert house.played == [] and len(house.asked) == len(set(house.asked)) == len(TESTED) and house.asked[:3] == given


def test_a_failing_run_keeps_the_others_is_named_and_tried_again(house, capsys):
    house.failing = {TUNING[1]: [7]}
    assert house.walk() == 7
    assert house.played == TUNING
    said = capsys.readouterr().out
    assert f"failed: {TUNING[1]}: exit code 7: it broke" in said and "1 runs failed; the others are kept" in said
    (failure,) = house.json("experiment.json")["failures"]
    assert (failure["run"], failure["exit_code"], failure["said"]) == (TUNING[1], 7, "it broke")
    assert house.events() == [] and not (house.folder / "experiments/small/choices.json").exists()
    house.played = []
    assert house.walk() == 0
    assert house.played == [TUNING[1], *FINAL]


def test_no_answer_is_asked_for_when_a_final_run_failed(house):
    house.failing = {FINAL[2]: [8]}
    assert house.walk() == 8
    assert house.asked == [] and house.events() == ["tuned", "chosen"]
    assert house.walk() == 0
    assert house.played[-1] == FINAL[2]


def test_settings_in_which_a_run_diverges_twice_are_left_out_of_the_choice(house):
    house.failing = {TUNING[1]: [9, 9]}
    assert house.walk() == 0
    assert house.played == [*TUNING, TUNING[1], *FINAL]
    choices = house.json("choices.json")["methods"]
    assert choices["tpaw"]["settings"] == {"learner.learning_rate": 1e-4}
    assert [point["accuracy"] for point in choices["tpaw"]["points"]] == [pytest.approx(0.6001), None]
    assert choices["spin"]["settings"] == {"learner.learning_rate": 1e-3}


def test_a_run_that_diverged_once_is_tried_again_at_once(house):
    house.failing = {TUNING[1]: [9]}
    assert house.walk() == 0
    assert house.json("choices.json")["methods"]["tpaw"]["settings"] == {"learner.learning_rate": 1e-3}


def test_settings_whose_diverged_run_was_removed_are_tried_again(house):
    house.failing = {TUNING[1]: [9, 9], TUNING[3]: [7, 7]}
    assert [house.walk(), house.walk()] == [7, 7]
    shutil.rmtree(house.folder / "experiments/small" / TUNING[1])
    assert house.walk() == 0
    assert house.json("choices.json")["methods"]["tpaw"]["settings"] == {"learner.learning_rate": 1e-3}


def test_a_learner_that_fails_otherwise_says_nothing_of_its_settings(house):
    house.failing = {TUNING[1]: [8, 8, 8]}
    assert [house.walk() for _ in range(3)] == [8, 8, 8]
    assert house.walk() == 0
    assert house.json("choices.json")["methods"]["tpaw"]["settings"] == {"learner.learning_rate": 1e-3}


@pytest.mark.parametrize(("came", "checkpoint"), [(1, 0), (2, 1)])
def test_a_final_run_that_diverges_twice_counts_as_far_as_it_came(house, capsys, came, checkpoint):
    house.failing, house.came = {FINAL[3]: [9, 9]}, came
    assert house.walk() == 0
    assert house.played == [*TUNING, *FINAL, FINAL[3]]
    row = next(row for row in house.json("experiment.json")["table"] if row["method"] == "spin")
    assert (row["last"]["checkpoints"], row["best"]["checkpoints"]) == ([2, checkpoint], [1, checkpoint])
    told = "spin, seed 1: the run diverged; the last checkpoint that it had made counts as its last."
    assert told in capsys.readouterr().out.replace("\n", " ")
    assert told in (house.folder / "experiments/small/table.md").read_text()
    assert house.walk() == 0 and house.played[-1] == FINAL[3]


def test_a_final_run_that_diverges_before_its_start_was_evaluated_is_no_result(house):
    house.failing = {FINAL[3]: [9, 9]}
    assert [house.walk() for _ in range(3)] == [9, 9, 0]
    assert "diverged" not in (house.folder / "experiments/small/table.md").read_text()


def test_a_run_that_says_it_is_done_and_is_not_counts_as_failed(house):
    def play(runs, on_end):
        for run in runs:
            on_end(run, Ended(exit_code=0, said="", seconds=1.0))

    house.play = play
    assert house.walk() == RunError.exit_code
    assert {failure["said"] for failure in house.json("experiment.json")["failures"]} == {"ended without its last checkpoint"}


def test_the_design_is_fixed_once_settings_are_chosen(house):
    house.failing = {TUNING[1]: [7]}
    house.walk()
    house.failing = {FINAL[0]: [7]}
    assert house.walk(seeds=[0, 1, 2]) == 7  # nothing was chosen yet
    with pytest.raises(RunError, match="settings were chosen for another design, and seeds changed since"):
        house.walk()
    assert house.walk(seeds=[0, 1, 2], parallel=4) == 0


DAMAGES = {
    "no object": ("experiment.json", b"[]", "experiment.json: the run is damaged there (found [], expected dict)"),
    "no protocol": ("experiment.json", b"{}", "experiment.json: the run is damaged there (protocol: missing)"),
    "a table without scores": (
        "experiment.json",
        b'{"protocol": [], "failures": [], "table": [{"method": "a", "seeds": []}], "runs": []}',
        "experiment.json: the run is damaged there (table.0.best: missing)",
    ),
    "choices without settings": (
        "choices.json",
        b'{"at": "now", "methods": {"tpaw": {}}}',
        "choices.json: the run is damaged there (methods.tpaw.settings: missing)",
    ),
    "a design that is a list": (
        "experiment.yaml",
        b"- 1",
        "experiment.yaml: the experiment is damaged there (found [1], expected dict)",
    ),
}


@pytest.mark.parametrize(("name", "content", "told"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_of_the_experiment_is_named(house, name, content, told):
    house.failing = {FINAL[0]: [7]}
    house.walk()
    house.store.write_bytes(house.store.path(name), content)
    with pytest.raises(RunError) as raised:
        Record(house.design(), house.store)
    assert str(raised.value) == house.store.path(told)


def test_methods_whose_held_out_prompts_differ_are_not_compared(house):
    house.references = lambda run: [run.method]
    with pytest.raises(RunError, match=r"spin_learning_rate-0.0001_seed-9: its held-out prompts are not those of .*tpaw"):
        house.walk()


def test_data_without_final_answers_is_told_at_the_first_run(house):
    house.validation = lambda run: [None, None, None]
    with pytest.raises(DataError, match="no validation prompt has a final answer"):
        house.walk()
    assert house.played == TUNING[:1]


@pytest.mark.parametrize(("references", "limit", "rows"), [([], None, 0), ([None, None], None, 2), ([None, "72"], 1, 1)])
def test_a_test_split_that_cannot_be_judged_is_told_at_the_first_run(house, references, limit, rows):
    house.references = lambda run: references
    with pytest.raises(DataError, match=f"prompts/test: none of the {rows} test prompts .* has a final answer"):
        house.walk(base={**BASE, "evaluation": {"limit": limit}})
    assert house.played == TUNING[:1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"evaluation": {"split": "test"}}, "base: evaluation.split: found test, expected validation"),
        ({"data": {"path": "d", "validation_fraction": 0.0}}, "base: data.validation_fraction: found 0"),
        ({"data": {"path": "d", "test_fraction": 0.0}}, "base: data.heldout_path or data.test_fraction: set one"),
    ],
    ids=["test", "no validation", "no test"],
)
def test_a_base_that_cannot_be_tuned_or_tested_is_refused(house, changes, told):
    design = house.design(base={**BASE, **changes})
    with pytest.raises(ConfigError, match=told):
        check(design, Record(design, house.store))


def test_the_plan_counts_runs_and_what_is_finished_and_writes_nothing(house, capsys, monkeypatch):
    monkeypatch.setattr(conducting, "check", lambda *_: None)  # there are no models here
    show_work(house.design(), Reporter())
    assert "8 runs: 4 tuning, 4 final, 1 at once; 0 are finished" in capsys.readouterr().out
    assert not (house.folder / "experiments").exists()
    house.failing = {FINAL[3]: [7]}
    house.walk()
    capsys.readouterr()
    show_work(house.design(), Reporter())
    assert "8 runs: 4 tuning, 4 final, 1 at once; 7 are finished" in capsys.readouterr().out


def test_what_a_checkpoint_answered_is_read_from_its_run(tmp_path):
    store = RunStore.open(str(tmp_path), "run")
    assert answered(store, 1) is None
    store.commit(store.path("tested", "001"), accuracy=0.25, judged=4)
    assert answered(store, 1) == Answered(accuracy=0.25, judged=4)


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"methods": {"a": {"preset": "spni"}}, "baselines": []}, 2, "method a: preset: found 'spni'"),
        ({"methods": {"a": {"objective": {"eta": 0}}}, "baselines": []}, 2, "method a: objective.eta"),
        ({}, 3, "d.jsonl: no such file or folder"),
    ],
)
def test_the_command_says_what_is_wrong_before_any_run_starts(house, monkeypatch, capsys, changes, code, told):
    house.design(**changes)
    for options in ([], ["--plan"]):
        monkeypatch.setattr("sys.argv", ["tpaw", "experiment", str(house.folder / "experiment.yaml"), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert ended.value.code == code and told in said.err and "Traceback" not in said.err
    assert not (house.folder / "experiments").exists()


def test_an_experiment_may_lie_in_an_object_store(house, bucket):
    design = house.design(root=f"{bucket}/experiments", seeds=[0])
    store = RunStore.open(design.root, design.name)
    assert walk(design, Record(design, store), house.play, house.answer, Reporter()) == 0
    found = store.read_json(store.path("experiment.json"))
    assert [event["event"] for event in found["protocol"]][-1] == "tested"
    assert found["runs"][-1]["root"] == f"{bucket}/experiments/small/final/spin_seed-0"
    assert store.read_bytes(store.path("table.md")).startswith(b"# small")


def test_answers_of_different_lengths_are_not_compared(house, monkeypatch):
    monkeypatch.setattr("tpaw_ray.forecast.check_folders", lambda *_: None)  # there are no models here
    methods = {"tpaw": {"preset": "tpaw"}, "short": {"preset": "spin", "sampling": {"max_new_tokens": 8}}}
    design = house.design(methods=methods, baselines=[])
    with pytest.raises(ConfigError, match=r"expected one of each .*\(256 new tokens within 1024 of tpaw, 8 .* of short\)"):
        check(design, Record(design, house.store))
    set_ = house.design(methods=methods, baselines=[], base={**BASE, "evaluation": {"max_new_tokens": 8}})
    check(set_, Record(set_, house.store))
    longer = {"tpaw": {"preset": "tpaw"}, "long": {"preset": "spin", "data": {"max_length": 2048}}}
    design = house.design(methods=longer, baselines=[])
    with pytest.raises(ConfigError, match=r"256 new tokens within 2048 of long"):
        check(design, Record(design, house.store))
