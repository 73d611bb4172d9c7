"""Rows of `summary.json` from stages committed by hand."""

from dataclasses import replace

import pytest

from tests.unit.test_schema_and_store import STEP
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import resolve_config
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import COLUMNS, Row, Summary, cells_of


def summary_of(store, **sections):
    base = {"run": {"name": "demo"}, "model": {"path": "m"}, "data": {"path": "d"}, "iterations": 2}
    return Summary(resolve_config({**base, **sections}), store)


@pytest.fixture
def store(tmp_path):
    """Two iterations of a team that replays; checkpoint 2 is made but not evaluated."""
    store = RunStore.open(str(tmp_path), "demo")
    store.commit(store.evaluation(0), sequences=8, tokens=80, seconds=1.0, accuracy=0.25, judged=4, target_logp=-30.5)
    store.commit(store.evaluation(1), sequences=8, tokens=80, seconds=2.0, accuracy=None, judged=0, target_logp=-28.0)
    for iteration in range(2):
        store.commit(store.rollout(Rollout(iteration, iteration)), sequences=100, tokens=1000, seconds=10.0 + iteration)
        store.commit(
            f"{store.iteration(iteration)}/scores",
            sequences=200 + 200 * iteration,
            tokens=10 * (200 + 200 * iteration),
            seconds=20.0,
        )
        store.commit(store.learner(iteration), sequences=400, tokens=4000, seconds=30.12345)
    MetricsLog(store).write_update(
        0,
        [
            replace(STEP, epoch=0, step=0, triplets=64, target_reward=100.0, margin=100.0),
            replace(STEP, epoch=0, step=1, triplets=36, target_reward=100.0, margin=100.0),
            replace(STEP, epoch=1, step=2, triplets=3, target_reward=0.5, margin=1.0),
            replace(STEP, epoch=1, step=3, triplets=1, target_reward=-0.5, margin=3.0),
        ],
    )
    MetricsLog(store).write_update(1, [replace(STEP, iteration=1, triplets=5, target_reward=0.75, margin=0.25)])
    return store


NONE = {"generate": 0, "score": 0, "update": 0}


def test_the_start_has_no_update_and_so_no_rewards(store):
    assert summary_of(store).row(0) == Row(
        checkpoint=0,
        accuracy=0.25,
        target_logp=-30.5,
        target_reward=None,
        margin=None,
        warnings=[],
        seconds={**NONE, "evaluate": 1.0},
        sequences={**NONE, "evaluate": 8},
        tokens={**NONE, "evaluate": 80},
    )


def test_rewards_are_means_over_the_last_epochs_triplets(store):
    # (3·0.5 − 1·0.5) / 4 = 0.25; (3·1 + 1·3) / 4 = 1.5; the first epoch's 100s do not count
    assert summary_of(store).row(1) == Row(
        checkpoint=1,
        accuracy=None,
        target_logp=-28.0,
        target_reward=0.25,
        margin=1.5,
        warnings=[],
        seconds={"generate": 10.0, "score": 20.0, "update": 30.123, "evaluate": 2.0},
        sequences={"generate": 100, "score": 200, "update": 400, "evaluate": 8},
        tokens={"generate": 1000, "score": 2000, "update": 4000, "evaluate": 80},
    )


def test_a_row_warns_of_what_was_said_in_its_iteration_and_in_the_one_before(store):
    for iteration, generated in enumerate((300, 420)):  # of targets of 3 tokens; both are within the limit of 1.5 and 2
        counts = {"generated": generated, "empty": 5 + iteration, "cut_off": 0}
        store.commit(store.rollout(Rollout(iteration, iteration)), sequences=100, tokens=1000, seconds=1.0, **counts)
    summary = summary_of(store)
    assert summary.warnings(0) == []
    (empty,) = summary.warnings(1)
    assert empty.startswith("6.0% of the responses are empty")
    growth = summary_of(store, warnings={"empty_share": None, "length_growth": 1.3}).warnings(1)
    assert [warning.split(";")[0] for warning in growth] == [
        "responses are 4.2 tokens long on average, 1.4 times the last iteration's 3.0 (limit 1.3)"
    ]


def test_a_replayed_rollout_counts_in_the_iteration_that_made_it(store):
    store.commit(store.evaluation(2), sequences=8, tokens=80, seconds=2.0, accuracy=0.5, judged=4, target_logp=-27.0)
    row = summary_of(store).row(2)
    assert (row.sequences["generate"], row.seconds["generate"]) == (100, 11.0)
    assert (row.sequences["score"], row.target_reward, row.margin) == (400, 0.75, 0.25)


def test_all_fresh_rollouts_of_an_iteration_count(store):
    store.commit(store.evaluation(2), sequences=8, tokens=80, seconds=2.0, accuracy=0.5, judged=4, target_logp=-27.0)
    store.commit(store.rollout(Rollout(1, 0)), sequences=100, tokens=1000, seconds=5.0)
    row = summary_of(store, team={"data": "fresh"}).row(2)
    assert (row.sequences["generate"], row.seconds["generate"]) == (200, 16.0)


def test_only_evaluated_checkpoints_of_the_configured_iterations_have_rows(store):
    assert [row.checkpoint for row in summary_of(store).rows()] == [0, 1]
    store.commit(store.evaluation(2), sequences=8, tokens=80, seconds=2.0, accuracy=0.5, judged=4, target_logp=-27.0)
    assert [row.checkpoint for row in summary_of(store).rows()] == [0, 1, 2]
    assert [row.checkpoint for row in summary_of(store, iterations=1).rows()] == [0, 1]


def test_the_file_holds_the_rows(store):
    summary_of(store).write()
    rows = store.read_json(store.path("summary.json"))["iterations"]
    assert [(row["checkpoint"], row["target_reward"], row["accuracy"]) for row in rows] == [(0, None, 0.25), (1, 0.25, None)]


def test_a_person_reads_a_dash_where_there_is_nothing(store):
    summary = summary_of(store)
    assert cells_of(summary.row(0)) == ["000", "0.250", "-30.500", "–", "–", "1"]
    assert cells_of(summary.row(1)) == ["001", "–", "-28.000", "+0.2500", "+1.5000", "62"]
    assert summary.line(0) == "checkpoint 000  accuracy 0.250  target logp -30.500  target reward –  margin –  seconds 1"
    assert len(COLUMNS) == 6
