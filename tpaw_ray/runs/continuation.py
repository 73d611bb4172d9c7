"""Whether a config may go on with a run that another command started."""

from typing import Any

from tpaw_ray.config import Config, resolve_config
from tpaw_ray.errors import RunError
from tpaw_ray.plain_yaml import parse_plain_yaml
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import shorten

MAY_CHANGE = (
    "iterations",
    "opponents",
    "scoring",
    "learner.workers",
    "learner.gpus",
    "learner.cpus",
    "learner.node_labels",
    "run.wait_minutes",
    "run.overlap",
    "learner.threads",
    "learner.save_steps",
    "learner.save_minutes",
    "learner.max_restarts",
    "learner.zero_stage",
    "learner.offload",
    "warnings",
    "tracking",
)
"""What a continued run may be given anew: how far it goes, what it runs on, when it warns, and who watches."""
STAYS = "opponents.engine_args"
"""What of these may not: vLLM's own arguments can make other responses."""


def check_same_run(config: Config, store: RunStore, *, instead: str = "another run.name") -> None:
    """Refuse a config that differs from the one the run was started with, but for what of `MAY_CHANGE` is not `STAYS`; the user
    may choose `instead`.

    Raises:
        RunError: with the differing fields, or when the run's `config.yaml` is damaged or gone.
    """
    path, places = store.path("config.yaml"), (store.path("prompts"), store.path("iterations"), store.checkpoint(0))
    made = [place for place in places if store.exists(place)]
    if not made:  # of the config; it may still become another one
        return
    if not store.exists(path):
        raise RunError(
            f"{path}: missing, although {store.inside(made[0])} was made of it; put the config back as it was, or choose "
            f"{instead}"
        )
    # Resolved anew, so that a field which a later version brought counts with its default.
    started = started_config(store)
    differing = [
        f"  {key}: started with {was}, now {now}"
        for key, was, now in differences(started, config)
        if not key.startswith(MAY_CHANGE) or key.startswith(STAYS)
    ]
    if differing:
        raise RunError("\n".join([f"{store.root} was started with another config; choose {instead} or undo:", *differing]))


def started_config(store: RunStore) -> Config:
    """The config that a run was started with.

    Raises:
        RunError: when its `config.yaml` is damaged.
    """
    path = store.path("config.yaml")
    return resolve_config(_content(store, path), source=path)


def differences(one: Config, other: Config) -> list[tuple[str, str, str]]:
    """The dotted keys in which two configs differ, with the values of both, cut."""
    values, others = leaves(one.model_dump(mode="json")), leaves(other.model_dump(mode="json"))
    return [
        (key, shorten(values.get(key)), shorten(others.get(key)))
        for key in sorted(values.keys() | others.keys())
        if values.get(key) != others.get(key)
    ]


def _content(store: RunStore, path: str) -> dict[str, Any]:
    try:
        content = parse_plain_yaml(store.read_bytes(path))
    except ValueError as error:
        raise RunError(f"{path}: not valid YAML ({error}); the run is damaged there") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected the config that the run was started with; the run is damaged there")
    return content


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by their dotted keys.

    >>> leaves({"run": {"name": "demo"}, "iterations": 3})
    {'run.name': 'demo', 'iterations': 3}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
