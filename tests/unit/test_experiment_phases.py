"""What comes next in an experiment, and what is chosen, as pure functions."""

import pytest

from tests.unit.test_experiment_design import design_of
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import LearnerError, RunError
from tpaw_ray.experiment.phases import (
    Answered,
    Ask,
    Choose,
    Conclude,
    Known,
    Nothing,
    Outcome,
    Play,
    Question,
    choose,
    final_runs,
    may_start,
    next_step,
    questions_of,
    tuning_runs,
)
from tpaw_ray.placement import Node

METHODS = {"tpaw": {"preset": "tpaw"}, "spin": {"preset": "spin"}}
RATES = (1e-4, 1e-3)
ANSWERED = Answered(accuracy=0.5, judged=10)


@pytest.fixture
def design(tmp_path):
    """Two methods, two learning rates, one tuning seed, two final seeds."""
    return design_of(
        tmp_path, seeds=[0, 1], methods=METHODS, tuning={"seeds": [9], "grid": {"learner.learning_rate": list(RATES)}}
    )


def known_of(outcomes=(), given_up=(), choices=None, answers=(), tested=False):
    return Known(outcomes=dict(outcomes), given_up=set(given_up), choices=choices, answers=dict(answers), tested=tested)


def outcome(*accuracies, logp=-1.0):
    """A run's start, then its iterations."""
    return Outcome(accuracy=list(accuracies), target_logp=[logp] * len(accuracies))


TUNING = {
    "tuning/tpaw_learning_rate-0.0001_seed-9": outcome(0.1, 0.9, 0.5),
    "tuning/tpaw_learning_rate-0.001_seed-9": outcome(0.1, 0.2, 0.6),
    "tuning/spin_learning_rate-0.0001_seed-9": outcome(0.1, 0.3, 0.4),
    "tuning/spin_learning_rate-0.001_seed-9": outcome(0.1, 0.3, 0.2),
}
FINAL = {
    "final/tpaw_seed-0": outcome(0.1, 0.7, 0.6),
    "final/tpaw_seed-1": outcome(0.1, 0.5, 0.6),
    "final/spin_seed-0": outcome(0.9, 0.3, 0.3),
    "final/spin_seed-1": outcome(0.1, 0.3, 0.4),
}
CHOSEN = {"tpaw": {"learner.learning_rate": 1e-3}, "spin": {"learner.learning_rate": 1e-4}}


def test_first_all_tuning_runs_are_played_and_those_that_are_done_are_not_played_again(design):
    step = next_step(design, known_of())
    assert isinstance(step, Play) and [run.key for run in step.runs] == list(TUNING)
    done = dict(list(TUNING.items())[:3])
    step = next_step(design, known_of(done))
    assert [(step.phase, run.key) for run in step.runs] == [("tuning", "tuning/spin_learning_rate-0.001_seed-9")]


def test_settings_are_chosen_when_every_tuning_run_is_done_and_before_any_final_one(design):
    assert next_step(design, known_of(TUNING)) == Choose()
    assert next_step(design, known_of(list(TUNING.items())[1:], given_up=[next(iter(TUNING))])) == Choose()


def test_final_runs_have_the_chosen_settings(design):
    step = next_step(design, known_of(TUNING, choices=CHOSEN))
    assert (step.phase, [run.key for run in step.runs]) == ("final", list(FINAL))
    assert [(run.seed, run.config.learner.learning_rate) for run in step.runs] == [(0, 1e-3), (1, 1e-3), (0, 1e-4), (1, 1e-4)]


def test_nothing_answers_the_test_split_while_a_final_run_is_to_come(design):
    for missing in FINAL:
        done = {key: one for key, one in FINAL.items() if key != missing}
        step = next_step(design, known_of(TUNING | done, choices=CHOSEN))
        assert isinstance(step, Play) and [run.key for run in step.runs] == [missing]


ASKED = [
    Question(run="final/tpaw_seed-0", checkpoint=0),
    Question(run="final/tpaw_seed-0", checkpoint=1),
    Question(run="final/tpaw_seed-0", checkpoint=2),
    Question(run="final/tpaw_seed-1", checkpoint=0),
    Question(run="final/tpaw_seed-1", checkpoint=2),
    Question(run="final/spin_seed-0", checkpoint=1),
    Question(run="final/spin_seed-0", checkpoint=2),
    Question(run="final/spin_seed-1", checkpoint=2),
]


def test_the_start_answers_once_a_seed_and_of_a_run_the_best_on_validation_and_the_last(design):
    finals = final_runs(design, CHOSEN)
    assert sorted(questions_of(finals, FINAL)) == sorted(ASKED)


def test_a_checkpoint_that_has_answered_is_not_asked_again_and_after_the_test_nothing_is(design):
    half = known_of(TUNING | FINAL, choices=CHOSEN, answers=dict.fromkeys(ASKED[:5], ANSWERED))
    step = next_step(design, half)
    assert isinstance(step, Ask) and sorted(step.questions) == sorted(ASKED[5:])
    full = known_of(TUNING | FINAL, choices=CHOSEN, answers=dict.fromkeys(ASKED, ANSWERED))
    assert next_step(design, full) == Conclude()
    # Whatever has been removed since: the test split is not touched a second time.
    assert next_step(design, known_of(choices=CHOSEN, tested=True)) == Nothing()


def test_without_tuning_there_are_final_runs_only(tmp_path):
    design = design_of(tmp_path, methods=METHODS, tuning=None, seeds=[0])
    assert tuning_runs(design) == [] and next_step(design, known_of()) == Choose()
    chosen = choose(design, known_of())
    assert {method: choice.settings for method, choice in chosen.items()} == {"tpaw": {}, "spin": {}}
    assert len(final_runs(design, {"tpaw": {}, "spin": {}})) == 2


def test_the_last_iterations_validation_accuracy_decides_and_the_whole_grid_is_kept(design):
    chosen = choose(design, known_of(TUNING))
    assert {method: choice.settings for method, choice in chosen.items()} == CHOSEN
    assert [(point.settings["learner.learning_rate"], point.accuracy) for point in chosen["tpaw"].points] == [
        (1e-4, 0.5),
        (1e-3, 0.6),
    ]
    assert chosen["tpaw"].points[1].runs == [{"seed": 9, "checkpoint": 2, "accuracy": 0.6, "target_logp": -1.0}]


def test_the_best_iteration_decides_where_the_file_says_so(tmp_path):
    tuning = {"seeds": [9], "grid": {"learner.learning_rate": list(RATES)}, "choose_by": "best"}
    chosen = choose(design_of(tmp_path, methods=METHODS, tuning=tuning), known_of(TUNING))
    assert chosen["tpaw"].settings == {"learner.learning_rate": 1e-4}  # 0.9 at its first iteration


def test_of_equal_accuracies_the_higher_target_logp_decides_then_the_order_of_the_grid(design):
    keys = list(TUNING)
    equal = TUNING | {keys[0]: outcome(0, 0.6, logp=-2.0), keys[1]: outcome(0, 0.6, logp=-1.5)}
    assert choose(design, known_of(equal))["tpaw"].settings == {"learner.learning_rate": 1e-3}
    equal = TUNING | {keys[0]: outcome(0, 0.6), keys[1]: outcome(0, 0.6)}
    assert choose(design, known_of(equal))["tpaw"].settings == {"learner.learning_rate": 1e-4}


def test_accuracies_are_means_over_the_tuning_seeds(tmp_path):
    design = design_of(
        tmp_path, methods={"spin": METHODS["spin"]}, tuning={"seeds": [8, 9], "grid": {"learner.learning_rate": list(RATES)}}
    )
    key = "tuning/spin_learning_rate-{}_seed-{}".format
    found = {
        key(1e-4, 8): outcome(0, 0.9),
        key(1e-4, 9): outcome(0, 0.1),
        key(1e-3, 8): outcome(0, 0.6),
        key(1e-3, 9): outcome(0, 0.5),
    }
    chosen = choose(design, known_of(found))["spin"]
    assert chosen.settings == {"learner.learning_rate": 1e-3}
    assert [point.accuracy for point in chosen.points] == [pytest.approx(0.5), pytest.approx(0.55)]


def test_settings_that_the_learner_gave_up_are_not_chosen_and_stay_in_the_record(design):
    keys = list(TUNING)
    chosen = choose(design, known_of({key: TUNING[key] for key in keys if key != keys[1]}, given_up=[keys[1]]))
    assert chosen["tpaw"].settings == {"learner.learning_rate": 1e-4}
    assert [point.accuracy for point in chosen["tpaw"].points] == [0.5, None]
    with pytest.raises(LearnerError, match="method tpaw: the learner gave up every setting of the grid"):
        choose(design, known_of({key: TUNING[key] for key in keys[2:]}, given_up=keys[:2]))


def test_what_was_chosen_at_an_axis_end_is_named(tmp_path):
    grid = {"learner.learning_rate": [1e-4, 1e-3, 1e-2], "objective.reward_scale": [0.1, 1.0], "learner.schedule": ["linear"]}
    design = design_of(tmp_path, methods={"spin": METHODS["spin"]}, tuning={"seeds": [9], "grid": grid})
    outcomes = {run.key: outcome(0, run.settings["learner.learning_rate"]) for run in tuning_runs(design)}
    assert choose(design, known_of(outcomes))["spin"].at_edge == ["learner.learning_rate"]


def test_names_of_runs_tell_them_apart_whatever_the_values_are(tmp_path):
    grid = {"learner.learning_rate": [[1e-5, 1e-6], [1e-5, 1e-7], 1e-5], "objective.reward_scale": [[0.123456789] * 9, 1]}
    design = design_of(tmp_path, methods={"m" * 90: {}}, baselines=[], tuning={"seeds": [9], "grid": grid})
    keys = [run.key for run in tuning_runs(design)]
    assert len(set(keys)) == 6
    grid = {"model.a": ["x/y", "x y"]}
    design = design_of(tmp_path, methods={"a": {}}, tuning=None, baselines=[])
    same = design.model_copy(update={"tuning": tuning_of({"data.subset": ["x/y", "x y"]})})
    with pytest.raises(RunError, match="tuning/a_subset-x-y_seed-9: two runs would lie there"):
        tuning_runs(same)
    long = design_of(tmp_path, methods={"m" * 60 + "a": {}, "m" * 60 + "b": {}}, tuning=None, baselines=[])
    with pytest.raises(RunError, match=r"final/m{60}_seed-0: two runs would lie there; give methods shorter names"):
        final_runs(long, {method: {} for method in long.methods})


def test_a_number_that_yaml_takes_for_a_text_is_one_in_the_grid():
    assert tuning_of({"learner.learning_rate": ["1e-4", "-2.5E+3", "fast", 1]}).grid == {
        "learner.learning_rate": [1e-4, -2500.0, "fast", 1]
    }
    with pytest.raises(ValueError, match="a value stands twice"):
        tuning_of({"learner.learning_rate": ["1e-4", 0.0001]})


def tuning_of(grid):
    from tpaw_ray.experiment.design import Tuning

    return Tuning(seeds=[9], grid=grid)


def test_a_run_starts_beside_others_when_neither_number_nor_resources_are_exceeded():
    nodes = [Node(labels={}, resources={"CPU": 4.0, "GPU": 1.0})]
    one, large = (
        resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}, "learner": learner})
        for learner in ({"gpus": 0.5}, {"cpus": 100})
    )
    assert may_start([one], one, nodes, most=None)
    assert not may_start([one, one], one, nodes, most=None)  # 1.5 GPUs
    assert not may_start([one], one, nodes, most=1)
    assert may_start([], large, nodes, most=1)  # its own command says that the cluster is too small
