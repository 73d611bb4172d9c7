"""From a config to a run: open its folder, connect to Ray, start the actors, play, and leave nothing behind."""

import logging
import os
from functools import partial
from typing import Any

import ray

from tpaw_ray.config import Config, dump_config
from tpaw_ray.data.template import end_tokens, load_tokenizer
from tpaw_ray.errors import ResourceError, RunError
from tpaw_ray.learner.group import Learner
from tpaw_ray.loop import SelfPlay
from tpaw_ray.opponents.messages import EngineSettings
from tpaw_ray.opponents.roster import Roster
from tpaw_ray.plan import demand, unmet
from tpaw_ray.policy.start import locate
from tpaw_ray.runs.environment import environment
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import COLUMNS, Summary, cells_of

MAY_CHANGE = (
    "iterations",
    "opponents",
    "scoring",
    "learner.workers",
    "learner.gpus",
    "learner.cpus",
    "learner.threads",
    "learner.max_restarts",
)
"""What a continued run may be given anew: how far it goes and what it runs on."""

WORKER_ENVIRONMENT = {
    # Threads that spin while they wait starve the other processes of a machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def launch(config: Config, reporter: Reporter, *, verbose: bool = False) -> None:
    """Run or continue the run of a config. A finished run is left as it is.

    Raises:
        TpawError: for everything a user can mend.
    """
    store = RunStore.open(config.run.root, config.run.name)
    check_same_run(config, store)
    if is_finished(config, store):
        show(config, store, reporter)
        reporter.say(f"{store.root}: all {config.iterations} iterations are done; nothing to do")
        return
    tokenizer = load_tokenizer(config.model)
    ends = end_tokens(tokenizer, str(locate(config.model.path)))
    connect(verbose=verbose)
    roster = Roster(
        EngineSettings.from_config(config, ends),
        replicas=config.opponents.replicas,
        cpus=config.opponents.cpus,
        gpus=config.opponents.gpus,
    )
    try:
        if missing := unmet(demand(config), ray.cluster_resources()):
            raise ResourceError(missing)
        store.write_bytes(store.path("config.yaml"), dump_config(config).encode())
        store.write_json(store.path("environment.json"), environment(config, ray.cluster_resources()))
        with reporter:
            SelfPlay(config, store, tokenizer, roster, partial(Learner, config, store), reporter).run()
    finally:
        roster.retire_all()
        ray.shutdown()
    show(config, store, reporter)
    reporter.say(f"the run lies in {store.root}; the last checkpoint is {store.checkpoint(config.iterations)}")


def is_finished(config: Config, store: RunStore) -> bool:
    """Whether the last checkpoint is made and evaluated."""
    return store.is_committed(store.iteration(config.iterations - 1))


def show(config: Config, store: RunStore, reporter: Reporter) -> None:
    """The table of all checkpoints."""
    rows = [cells_of(row) for row in Summary(config, store).rows()]
    reporter.table(config.run.name, list(COLUMNS), rows)


def check_same_run(config: Config, store: RunStore) -> None:
    """Refuse a config that differs from the one the run was started with, but for `MAY_CHANGE`.

    Raises:
        RunError: with the differing fields.
    """
    path = store.path("config.yaml")
    if not store.exists(path):
        return
    import yaml

    started = _flat(yaml.safe_load(store.read_bytes(path)))
    now = _flat(config.model_dump(mode="json"))
    differing = [
        f"  {key}: started with {started.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(started.keys() | now.keys())
        if started.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if differing:
        raise RunError("\n".join([f"{store.root} was started with another config; choose another run.name or undo:", *differing]))


def connect(*, verbose: bool = False) -> None:
    """Connect to the cluster of `RAY_ADDRESS` (as in a Ray job), or start Ray on this machine."""
    if not verbose:
        # Ray's native code writes to the terminal whatever its Python code is told.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if os.environ.get("RAY_ADDRESS"):
        where: dict[str, Any] = {"runtime_env": {"env_vars": WORKER_ENVIRONMENT}}
    else:
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)  # inherited by every process that Ray starts here
        where = {"include_dashboard": False}
    ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR, ignore_reinit_error=True, **where)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
