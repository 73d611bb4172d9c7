"""From a config to a run: open its folder, connect to Ray, start the actors, play, and leave nothing behind."""

import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ray

from tpaw_ray.config import Config, dump_config
from tpaw_ray.errors import ResourceError
from tpaw_ray.forecast import Start, check_folders, check_start
from tpaw_ray.learner.group import Learner
from tpaw_ray.loop import SelfPlay
from tpaw_ray.nodes import NodeWatch, wait_for_nodes
from tpaw_ray.opponents.messages import EngineSettings
from tpaw_ray.opponents.roster import Roster
from tpaw_ray.placement import demands, engines_of
from tpaw_ray.policy.directory import own_code
from tpaw_ray.runs.claim import Claim
from tpaw_ray.runs.continuation import check_same_run
from tpaw_ray.runs.environment import environment
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import COLUMNS, Summary, cells_of
from tpaw_ray.scoring.pool import ScorerPool
from tpaw_ray.tracking.follow import Trackers, check_installed
from tpaw_ray.tracking.to_ray import stage_gauges


def launch(config: Config, reporter: Reporter, *, verbose: bool = False) -> None:
    """Run or continue the run of a config. A finished run is left as it is.

    Raises:
        TpawError: for everything a user can mend.
    """
    store = RunStore.open(config.run.root, config.run.name)
    check_same_run(config, store)
    if is_finished(config, store):
        check_installed(config)
        with Trackers(config, store, reporter.say):  # those that lack rows get them
            show(config, store, reporter)
        reporter.say(f"{store.root}: all {config.iterations} iterations are done; nothing to do")
        return
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(interrupt) != signal.SIG_IGN:
            signal.signal(interrupt, signal.default_int_handler)
    claim = Claim(store, reporter.say)
    claim.wait_until_free()
    model = check_folders(config, store)
    if config.model.trust_remote_code:
        reporter.say(own_code(model))
    try:
        with ThreadPoolExecutor(1) as beside:  # its imports take as long as Ray's start
            checked = beside.submit(check_start, config, store, model)
            try:
                connect(verbose=verbose, structured=reporter.structured)
            except ResourceError:
                checked.result()  # what is wrong with the model can be mended first
                raise
            start = checked.result()
        wait_for_nodes(demands(config), config.run.wait_minutes, reporter.say)
        with claim:
            check_same_run(config, store)  # another driver may have begun the run meanwhile
            write_down(config, store)
            play(config, store, start, reporter)
    finally:
        ray.shutdown()
    show(config, store, reporter)
    reporter.say(f"the run lies in {store.root}; the last checkpoint is {store.checkpoint(config.iterations)}")


def write_down(config: Config, store: RunStore) -> None:
    """What the run is made from and on; the first that is written to its folder."""
    store.write_bytes(store.path("config.yaml"), dump_config(config).encode())
    store.write_json(store.path("environment.json"), environment(config, ray.cluster_resources()))


def play(config: Config, store: RunStore, start: Start, reporter: Reporter) -> None:
    """The run itself, on a Ray that is there."""
    settings = EngineSettings.from_config(config, start.ends)
    roster = Roster(settings, engines_of(config))
    scorers, learner = ScorerPool(config, store), partial(Learner, config, store)
    scorers.start()
    reporter.observers.append(stage_gauges(config.run.name))
    try:
        # Engines come and go: those of checkpoints that are hosted count.
        with NodeWatch(lambda: demands(config, len(roster.hosted)), config.run.wait_minutes, reporter.say), reporter:
            SelfPlay(config, store, start.tokenizer, roster, scorers, learner, reporter).run()
    finally:
        roster.retire_all()


def is_finished(config: Config, store: RunStore) -> bool:
    """Whether the last checkpoint is made and evaluated."""
    return store.is_committed(store.iteration(config.iterations - 1))


def show(config: Config, store: RunStore, reporter: Reporter) -> None:
    """The table of all checkpoints, and under it the warnings of their iterations."""
    rows = Summary(config, store).rows()
    reporter.table(config.run.name, list(COLUMNS), [cells_of(row) for row in rows])
    for row in rows:
        for warning in row.warnings:
            reporter.say(f"warning: iteration {row.checkpoint - 1}: {warning}")


def connect(*, verbose: bool = False, structured: bool = False) -> None:
    """Connect to the cluster of `RAY_ADDRESS` (as in a Ray job) or of `ray start` on this machine; otherwise start Ray here.

    With `structured`, what its processes log is JSON.

    Raises:
        ResourceError: with Ray's reason, when that fails.
    """
    if not verbose:
        # Ray's native code writes to the terminal whatever its Python code is told.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Ray warns of a coming change in what tasks without a GPU see; this is how it will be.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray ends a process that idles for a second when there are more than cores, and the next stage starts another: 4 s of a core.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    level = logging.INFO if verbose else logging.ERROR
    # Ray names job, node, task and actor in every line that Python code of its processes logs.
    lines = ray.LoggingConfig(encoding="JSON", log_level=logging.getLevelName(level)) if structured else None
    try:
        ray.init(
            log_to_driver=verbose, logging_level=level, logging_config=lines, ignore_reinit_error=True, include_dashboard=False
        )
    except Exception as error:  # Ray raises bare exceptions for a cluster it cannot reach or a node that does not come up
        raise ResourceError(f"Ray cannot be started or reached: {error}") from error
    # In place of Ray's own handler, which ends the process on the spot: what was started is ended first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = verbose
    if not verbose:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
