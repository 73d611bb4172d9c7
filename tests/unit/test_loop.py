"""What the loop decides without any actor."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.made_run import MadeRun
from tests.unit.test_schema_and_store import STEP
from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import DivergedError, RunError
from tpaw_ray.learner.mailbox import News
from tpaw_ray.loop import SelfPlay
from tpaw_ray.runs.metrics import MetricsLog
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.teams import Teams
from tpaw_ray.schema import Score
from tpaw_ray.scoring.shards import ScoreShard


@pytest.fixture
def play(tmp_path):
    """A run of three iterations that has no actors: none of these tests may need one."""
    config = resolve_config(
        {"run": {"name": "t", "root": str(tmp_path)}, "model": {"path": "m"}, "data": {"path": "d"}, "iterations": 3}
    )
    store = RunStore.open(str(tmp_path), "t")
    return SelfPlay(config, store, None, None, None, None, Reporter())


def commit_rollouts(store, *empty):
    """Rollouts of so many empty responses of 100."""
    for iteration, count in enumerate(empty):
        said = {"sequences": 100, "generated": 300, "empty": count, "cut_off": 0}
        store.commit(store.rollout(Rollout(iteration, iteration)), **said)


def test_an_update_that_was_finished_by_a_killed_driver_still_gets_its_metrics_and_warnings(play, capsys):
    commit_rollouts(play.store, 0, 12)
    rows = [replace(STEP, iteration=1, step=step) for step in range(3)]
    MetricsLog(play.store).write_update(0, [replace(STEP, iteration=0)])
    MetricsLog(play.store).write_update(1, rows)
    play.store.commit(play.store.checkpoint(2))
    play.metrics.append([replace(STEP, iteration=0), rows[0]])  # as far as the driver came
    play.update(1)
    found = [json.loads(line) for line in play.store.read_bytes(play.store.path("metrics.jsonl")).decode().splitlines()]
    assert [(row["iteration"], row["step"]) for row in found] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert capsys.readouterr().out.startswith("warning: iteration 1: 12.0% of the responses are empty (limit 5.0%)")


def test_the_first_open_iteration_is_the_first_without_a_marker(play):
    assert play.first_open_iteration() == 0
    for checkpoint in range(4):
        play.store.commit(play.store.checkpoint(checkpoint))
    play.store.commit(play.store.iteration(0))
    assert play.first_open_iteration() == 1
    play.store.commit(play.store.iteration(1))
    play.store.commit(play.store.iteration(2))
    assert play.first_open_iteration() == 3


def commit_checkpoints(store, count):
    for checkpoint in range(count):
        store.write_bytes(f"{store.checkpoint(checkpoint)}/model.safetensors", bytes(1000))
        store.commit(store.checkpoint(checkpoint))
    for iteration in range(count - 1):
        store.commit(store.iteration(iteration))


def test_a_flipped_bit_in_a_checkpoint_of_the_team_is_found_before_anything_is_read(play):
    commit_checkpoints(play.store, 3)
    play.verify(2)
    path = Path(play.store.checkpoint(1)) / "model.safetensors"
    path.write_bytes(bytes(500) + b"\x01" + bytes(499))
    with pytest.raises(RunError, match=r"checkpoints/001/model\.safetensors: differs from what was committed; remove .*/001 to"):
        play.verify(2)


def test_prompts_that_were_removed_from_a_committed_stage_are_missed(play):
    shard = play.store.shard(play.store.prompts("train"), 0)
    play.store.write_bytes(shard, b"prompts")
    play.store.commit(play.store.path("prompts"))
    play.verify(0)
    Path(shard).unlink()
    with pytest.raises(
        RunError, match=r"train/00000\.parquet: differs from what was committed; remove .*prompts to have it made"
    ):
        play.verify(0)


def test_a_driver_that_is_killed_before_the_marker_of_its_iteration_leaves_a_whole_summary(tmp_path, monkeypatch):
    heldout = [("2+2=", "4", "4")]
    made = MadeRun(tmp_path).start([("1+1=", "2", "2")] * 4, heldout).evaluate(0, [("4", "4", True)])
    made.iterate(0, ["2"] * 4).evaluate(1, [("4", "4", True)])
    play = SelfPlay(made.config, made.store, None, None, None, None, Reporter())
    write, written = RunStore.write_json, []
    monkeypatch.setattr(
        RunStore, "write_json", lambda store, path, value: (written.append(Path(path).name), write(store, path, value))
    )
    play.commit(0)
    assert written == ["summary.json", "row.json", "committed.json"]  # after the last one nothing is looked at any more
    assert len(made.store.read_json(made.store.path("summary.json"))["iterations"]) == 2


def test_the_start_of_an_update_on_targets_alone_is_compared_too(play):
    play.config = play.config.model_copy(update={"team": play.config.team.model_copy(update={"data": "none"})})
    play.teams = Teams(play.config, play.store)
    commit_checkpoints(play.store, 3)
    (Path(play.store.checkpoint(2)) / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RunError, match="checkpoints/002/model"):
        play.verify(2)


def test_a_checkpoint_that_was_removed_is_made_again_where_the_team_needs_it(play):
    commit_checkpoints(play.store, 3)
    assert play.first_open_iteration() == 2
    play.store.remove(play.store.checkpoint(1))
    assert play.first_open_iteration() == 0
    play.config = play.config.model_copy(update={"team": play.config.team.model_copy(update={"size": 1})})
    play.teams = Teams(play.config, play.store)
    assert play.first_open_iteration() == 2


def test_stages_that_are_committed_need_no_actor(play):
    for directory in (play.store.path("iterations/000/rollouts/opponent-000"), play.store.path("iterations/000/scores")):
        play.store.commit(directory)
    play.store.commit(play.store.pairs(0), pairs=0)
    play.store.commit(play.store.evaluation(0))
    assert play.generate_ahead(1) is None  # with replay, nobody speaks twice
    play.score(0)
    play.pair(0)
    play.evaluate(0)


class Rescorer:
    """Stands in for the pool of scorers: writes the numbers of every shard anew."""

    def __init__(self, store):
        self.store = store

    def score(self, shards, advance):
        for shard in shards:
            self.store.write_rows(shard.output, [Score(player=shard.player, response_id="0", logp=-7.0)], Score)
        return 1.5


def test_scores_of_an_earlier_iteration_that_were_made_again_are_committed_again(play, monkeypatch):
    earlier = play.store.target_scores(0)
    play.store.write_rows(f"{earlier}/00000.parquet", [Score(player=0, response_id="0", logp=-1.0)], Score)
    scores = earlier.split("/player-")[0]
    play.store.commit(scores, sequences=8)
    stale = ScoreShard(player=0, prompts="-", generations="", take=1, output=f"{earlier}/00000.parquet")
    monkeypatch.setattr("tpaw_ray.loop.shards_to_score", lambda *_: [stale])
    monkeypatch.setattr("tpaw_ray.loop.num_tokens", lambda *_: 3)
    play.scorers = Rescorer(play.store)
    play.score(1)
    play.store.verify(scores)
    assert play.store.counts(scores) == {"sequences": 8}
    assert play.store.counts(f"{play.store.iteration(1)}/scores")["tokens"] == 3
    counts = play.store.counts(f"{play.store.iteration(1)}/scores")
    assert counts["seconds"] - counts["waited"] == pytest.approx(1.5)


def test_scores_that_a_killed_driver_had_made_again_are_committed_by_the_next(play, monkeypatch):
    earlier = play.store.target_scores(0)
    path, scores = f"{earlier}/00000.parquet", earlier.split("/player-")[0]
    play.store.write_rows(path, [Score(player=0, response_id="0", logp=-1.0)], Score)
    play.store.commit(scores, sequences=8)
    stale = ScoreShard(player=0, prompts="-", generations="", take=1, output=path)
    monkeypatch.setattr("tpaw_ray.loop.shards_to_score", lambda *_: [stale])
    monkeypatch.setattr("tpaw_ray.loop.num_tokens", lambda *_: 3)
    play.scorers = Rescorer(play.store)
    monkeypatch.setattr(play, "commit_rescored", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        play.score(1)
    monkeypatch.undo()
    monkeypatch.setattr("tpaw_ray.loop.shards_to_score", lambda *_: [])  # all scores fit now
    play.scorers = Rescorer(play.store)
    play.score(1)
    assert play.store.counts(scores) == {"sequences": 8}
    assert play.store.checksums(scores)
    play.store.verify(scores)


def test_scores_whose_marker_is_gone_are_committed_with_what_was_made(tmp_path, monkeypatch):
    config = resolve_config(
        {"run": {"name": "player-1", "root": str(tmp_path)}, "model": {"path": "m"}, "data": {"path": "d"}, "iterations": 3}
    )
    store = RunStore.open(str(tmp_path), "player-1")  # a name that looks like a folder of scores
    play = SelfPlay(config, store, None, None, Rescorer(store), None, Reporter())
    again = ScoreShard(player=0, prompts="-", generations="", take=1, output=f"{store.target_scores(0)}/00000.parquet")
    monkeypatch.setattr("tpaw_ray.loop.shards_to_score", lambda *_: [again])
    monkeypatch.setattr("tpaw_ray.loop.num_tokens", lambda *_: 3)
    play.score(1)
    assert store.counts(f"{store.iteration(0)}/scores") == {"sequences": 1, "tokens": 3, "seconds": 0.0, "waited": 0.0}
    store.verify(f"{store.iteration(0)}/scores")


def test_a_checkpoint_has_something_to_say_until_it_has_answered(play):
    play.store.commit(play.store.path("prompts"), train=8, validation=2, test=0)
    assert [play.has_to_generate(checkpoint) for checkpoint in range(5)] == [True, True, True, False, False]  # 3 iterations
    assert play.has_to_be_evaluated(3)
    play.store.commit(play.store.path("iterations/001/rollouts/opponent-001"))
    play.store.commit(play.store.evaluation(3))
    assert not play.has_to_generate(1)
    assert not play.has_to_be_evaluated(3)


def test_without_held_out_prompts_the_last_checkpoint_has_nothing_to_say(play):
    play.store.commit(play.store.path("prompts"), train=8, validation=0, test=0)
    assert not play.has_to_be_evaluated(3)
    assert not play.has_to_generate(3)


class NotedRoster:
    """Stands in for the roster: notes who is hosted and who is retired."""

    def __init__(self, *hosted):
        self.hosted, self.retired = hosted, []

    def host(self, checkpoint, path, ready_file):
        self.hosted += () if checkpoint in self.hosted else (checkpoint,)

    def retire(self, checkpoint):
        self.hosted = tuple(other for other in self.hosted if other != checkpoint)
        self.retired.append(checkpoint)


def test_who_has_spoken_is_retired_and_the_coming_checkpoint_is_warmed_up(play):
    play.store.commit(play.store.path("prompts"), train=8, validation=0, test=0)
    play.roster = NotedRoster(0)
    play.release(0)
    assert (play.roster.hosted, play.roster.retired) == ((1,), [0])
    play.roster = NotedRoster(2)
    play.release(2)  # the last iteration; without held-out prompts nobody asks the last checkpoint
    assert (play.roster.hosted, play.roster.retired) == ((), [2])


def test_with_fresh_data_the_team_stays_to_speak_again(tmp_path):
    config = resolve_config(
        {
            "run": {"name": "t", "root": str(tmp_path)},
            "model": {"path": "m"},
            "data": {"path": "d"},
            "iterations": 4,
            "team": {"data": "fresh", "size": 2},
        }
    )
    store = RunStore.open(str(tmp_path), "t")
    store.commit(store.path("prompts"), train=8, validation=2, test=0)
    roster = NotedRoster(0, 1)
    play = SelfPlay(config, store, None, roster, None, None, Reporter())
    play.release(1)
    assert (roster.hosted, roster.retired) == ((1, 2), [0])
    play.release(3)
    assert roster.hosted == (4,)  # nobody speaks after the last iteration, but its checkpoint is evaluated


def test_without_overlap_nobody_is_hosted_while_the_learner_works(tmp_path):
    for team in ({"data": "fresh", "size": 2}, {}):
        config = resolve_config(
            {
                "run": {"name": "t", "root": str(tmp_path), "overlap": False},
                "model": {"path": "m"},
                "data": {"path": "d"},
                "team": team,
            }
        )
        roster = NotedRoster(0, 1)
        play = SelfPlay(config, RunStore.open(str(tmp_path), "t"), None, roster, None, None, Reporter())
        play.release(1)
        play.generate_ahead(2)
        assert (roster.hosted, roster.retired) == ((), [0, 1])


class Reporting:
    """Stands in for the learner: reports its steps in two parts, a death of its workers in between, and commits the update."""

    def __init__(self, store):
        self.store = store

    def update(self, iteration, on_news):
        rows = [replace(STEP, iteration=iteration, step=step, loss=step / 4) for step in range(3)]
        on_news(News(rows=rows[:2]))
        on_news(News(rows=rows))
        MetricsLog(self.store).write_update(iteration, rows)
        self.store.commit(self.store.learner(iteration), attention="sdpa")
        self.store.commit(self.store.checkpoint(iteration + 1))


def test_trackers_get_the_steps_of_an_update_and_the_evaluation_of_its_checkpoint(play):
    sent = []

    class Line:
        """Stands in for a tracker's thread."""

        def send(self, entries):
            sent.extend((entry.step, entry.checkpoint) for entry in entries)

    play.trackers._lines = [Line()]
    commit_rollouts(play.store, 0)
    counts = {"sequences": 1, "tokens": 1, "seconds": 1.0}
    play.store.commit(play.store.rollout(Rollout(0, 0)), **counts, generated=1, empty=0, cut_off=0)
    play.store.commit(f"{play.store.iteration(0)}/scores", **counts)
    play.store.commit(play.store.pairs(0), pairs=6)
    play.learner = Reporting(play.store)
    play.update(0)
    assert sent == [(1, None), (2, None), (3, None)] * 2  # as they came, then as they were committed; a tracker takes each once
    play.store.commit(play.store.learner(0), attention="sdpa", **counts)
    play.store.commit(play.store.evaluation(1), **counts, accuracy=None, target_logp=None)
    play.store.commit(play.store.evaluation(0), **counts, accuracy=None, target_logp=None)
    play.commit(0)
    assert sent[6:] == [(0, 0), (3, 1)]


@pytest.mark.parametrize("logp", [math.nan, -math.inf])
def test_a_checkpoint_whose_log_probabilities_are_not_finite_ends_the_run_as_diverged(play, monkeypatch, logp):
    monkeypatch.setattr(play, "num_heldout", lambda: 2)
    monkeypatch.setattr(play, "answer", lambda _: ([], 0, 0.0))
    monkeypatch.setattr(play, "score_heldout", lambda _: ([-1.0, logp], 0))
    with pytest.raises(DivergedError, match=rf"checkpoint 1: the log-probability of held-out targets is {logp}"):
        play.evaluate(1)
    assert not play.store.is_committed(play.store.evaluation(1))
