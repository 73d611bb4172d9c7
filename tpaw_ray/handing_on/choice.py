"""Which checkpoint of a run is handed on, and why that one."""

from dataclasses import dataclass
from math import isfinite

from tpaw_ray.config import Config
from tpaw_ray.errors import ConfigError, RunError
from tpaw_ray.runs.continuation import started_config
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import Row
from tpaw_ray.wording import listed, shorten


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A checkpoint, and the sentence that says how it was chosen."""

    checkpoint: int
    reason: str


def open_run(address: str) -> tuple[RunStore, Config]:
    """The run in a folder or at an address, and the config that it was made with.

    Raises:
        RunError: when there is none, or its `config.yaml` is damaged.
    """
    store = RunStore.named(address)
    if not store.exists(store.path("config.yaml")):
        raise RunError(f"{store.root}: no run is there; expected a folder that tpaw run made, with config.yaml in it")
    return store, started_config(store)


def choose(wanted: str, rows: list[Row], made: list[int], split: str) -> Choice:
    """The checkpoint of a number, or with `best` the one of the highest accuracy on validation.

    `rows` are those of evaluated checkpoints, `made` all checkpoints that are committed, `split` the rows that were answered.

    Raises:
        ConfigError: when `wanted` is neither, or `best` would be chosen on the test split.
        RunError: when there is no such checkpoint, or nothing to choose by.
    """
    if wanted != "best":
        number = int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 else None
        if number is None:
            raise ConfigError(f"--checkpoint: found {shorten(wanted)}, expected a number or best")
        if number not in made:
            raise RunError(f"--checkpoint: the run has no checkpoint {number}; found {listed(made)}")
        return Choice(checkpoint=number, reason="It was named by hand.")
    if split == "test":
        raise ConfigError(
            "--checkpoint best: this run evaluated its checkpoints on the test split, and one chosen there has no figure left "
            "that it was not chosen by; name one, as in --checkpoint 3"
        )
    return _best(rows)


def _best(rows: list[Row]) -> Choice:
    """Ties go to the earliest. Where the data has no final answers, the log-probability of held-out targets decides."""
    for name, words in (
        ("accuracy", "the highest accuracy on validation"),
        ("target_logp", "the highest mean log-probability of the validation targets, since there is no accuracy"),
    ):
        values = {row.checkpoint: value for row in rows if (value := getattr(row, name)) is not None and isfinite(value)}
        if values:
            highest = max(values.values())
            best = min(number for number, value in values.items() if value == highest)
            return Choice(
                checkpoint=best,
                reason=f"Of checkpoints {listed(sorted(values))} it has {words}; of equal ones the earliest was taken.",
            )
    raise RunError("--checkpoint best: no checkpoint of the run was evaluated on held-out rows; name one, as in --checkpoint 3")
