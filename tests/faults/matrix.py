"""Where a run is killed, and who is: the rows and columns of the kill matrix."""

from tpaw_ray.faults import Place

VICTIMS = ("driver", "opponent", "scorer", "learner worker")

PLACES = {
    "prompts: inside": (Place.WRITE, "prompts/train/00001.parquet"),
    "prompts: before the marker": (Place.MARK, "prompts"),
    "start model: before it is in place": (Place.WRITE, "checkpoints/000"),
    "start model: before the marker": (Place.MARK, "checkpoints/000"),
    "evaluate: inside": (Place.ANSWER, "checkpoints/000/*"),
    "evaluate: before the marker": (Place.MARK, "evaluations/000"),
    "between iterations": (Place.WRITTEN, "iterations/000/committed.json"),
    "generate: inside": (Place.ANSWER, "checkpoints/001/*"),
    "generate: between shards": (Place.WRITTEN, "iterations/001/rollouts/opponent-001/00000.parquet"),
    "generate: before the marker": (Place.MARK, "iterations/001/rollouts/opponent-001"),
    "score: inside": (Place.SCORE, "iterations/001/scores/player-000/*/00001.parquet"),
    "score: between shards": (Place.WRITTEN, "iterations/001/scores/player-000/*/00001.parquet"),
    "score: before the marker": (Place.MARK, "iterations/001/scores"),
    "pair: inside": (Place.WRITE, "iterations/001/pairs/00001.parquet"),
    "pair: before the marker": (Place.MARK, "iterations/001/pairs"),
    "update: inside": (Place.STEP, "iterations/001/steps/000003/rank-0"),
    "update: a step checkpoint before its marker": (Place.MARK, "iterations/001/steps/000004"),
    "update: the checkpoint before it is in place": (Place.WRITE, "checkpoints/002"),
    "update: before the marker": (Place.MARK, "checkpoints/002"),
    "last evaluation: before the marker": (Place.MARK, "evaluations/002"),
    "commit: before the marker": (Place.WRITE, "iterations/001/committed.json"),
    "commit: after the marker": (Place.WRITTEN, "iterations/001/committed.json"),
}
"""Roughly in the order in which a run of two iterations comes to them; stages that run side by side come as they come."""

SAVED = ("learner.save_steps=2", "learner.max_restarts=1000")
"""Overrides that a run needs to come to all of them, and to go on as often as it is killed."""
