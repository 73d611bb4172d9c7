"""What is evaluated: a run with its checkpoints, or a model's folder with the config of some run."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from tpaw_ray.config import Config, ModelConfig, load_config, override
from tpaw_ray.data.template import end_tokens, load_tokenizer
from tpaw_ray.errors import CheckpointError, ConfigError, RunError
from tpaw_ray.policy.directory import check_directory
from tpaw_ray.runs.continuation import check_same_run, differences, started_config
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import listed, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_THE_EVALUATION = ("opponents.", "data.max_length", "learner.precision")
"""What may be set anew where a run is evaluated: what engines run on, how long texts may get, and in which precision."""
_CHECKPOINT = re.compile(r"(.+)/checkpoints/(\d{3})")


@dataclass(frozen=True)
class Subject:
    """A run or a model, opened."""

    name: str
    config: Config
    """The run's, with the command's overrides."""
    store: RunStore
    """Where prompts lie and results go: the run's folder, or one for the evaluation of a model."""
    checkpoints: dict[int, str]
    """Folders of what is evaluated, by number; a model is its own checkpoint 0."""
    is_run: bool

    def weights(self, number: int) -> str:
        """A digest of a checkpoint's files, so that what came of other weights does not stand for its own."""
        folder, base = self.checkpoints[number], self.base(number)
        if not self.is_run:
            return _digest(_checksums(Path(folder)))
        own = self.store.checksums(folder)
        return _digest(own if base == folder else [own, self.store.checksums(base)])

    def base(self, number: int) -> str:
        """The folder whose weights a checkpoint stands on: its own, or the start model's where it is an adapter."""
        adapter = self.is_run and self.config.base_of(number) != number
        return self.store.checkpoint(0) if adapter else self.checkpoints[number]

    def adapter(self, number: int) -> str:
        """The folder of a checkpoint that is an adapter; empty for one that holds all weights."""
        return "" if self.base(number) == self.checkpoints[number] else self.checkpoints[number]

    def called(self, number: int) -> str:
        """A checkpoint's name for people and files: `demo-003`, or the model's."""
        return f"{self.name}-{number:03d}" if self.is_run else self.name

    @cached_property
    def model(self) -> ModelConfig:
        """The folder that tokenizer, template and end tokens are read from: a run's checkpoint 0, which it renders with."""
        if not self.is_run:
            return self.config.model
        folder = self.store.on_disk(self.store.checkpoint(0))
        return ModelConfig(path=folder, trust_remote_code=self.config.model.trust_remote_code)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.model)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return end_tokens(self.tokenizer, self.model.path)


def open_subject(
    path: str,
    *,
    checkpoint: str = "all",
    config: Path | None = None,
    overrides: Sequence[str] = (),
    to: str | None = None,
    keeps: bool = True,
) -> Subject:
    """Open a run's folder (`runs/demo`, `s3://…`), one checkpoint of it (`runs/demo/checkpoints/003`), or a model's folder.

    `checkpoint` is a number, `all` or `last`. A model needs the `config` of a run, which says with which data and settings it is
    evaluated, and its results go `to` a folder, by default `evaluations/NAME-OF-THE-MODEL`; `keeps` says whether any come.

    Raises:
        RunError: when there is no such checkpoint, or the folder for a model's results belongs to something else.
        ConfigError: when a model comes without a config, or an override is none of `OF_THE_EVALUATION`.
        CheckpointError: when there is neither a run nor a model.
    """
    if (found := run_of(path)) is None:
        return _open_model(path.rstrip("/"), config, overrides, to, keeps)
    run, inside = found
    if config is not None:
        raise ConfigError(f"--config: {run} is a run, which has a config of its own; leave --config out")
    return _open_run(RunStore.around(run), checkpoint if inside is None else str(inside), overrides)


def run_of(path: str) -> tuple[str, int | None] | None:
    """The run that a path names, with the checkpoint where it is one's folder (`runs/demo/checkpoints/003`); null for others."""
    path = path.rstrip("/")
    if (inside := _CHECKPOINT.fullmatch(path)) and _is_run(RunStore.around(inside[1])):
        return inside[1], int(inside[2])
    return (path, None) if _is_run(RunStore.around(path)) else None


def _is_run(store: RunStore) -> bool:
    """A model's folder may have a `config.yaml` of somebody else's, and the folder of a model's evaluation has one of ours."""
    return store.exists(store.path("config.yaml")) and store.exists(store.path("checkpoints"))


def _open_run(store: RunStore, checkpoint: str, overrides: Sequence[str]) -> Subject:
    started = started_config(store)
    config = override(started, overrides) if overrides else started
    other = [key for key, *_ in differences(started, config) if not key.startswith(OF_THE_EVALUATION)]
    if other:
        raise ConfigError(
            f"{listed(other)}: cannot be set for the evaluation of {store.root}, which is evaluated as it was trained; expected "
            f"one of {', '.join(name.rstrip('.') for name in OF_THE_EVALUATION)}"
        )
    there = list(takewhile(lambda number: store.is_committed(store.checkpoint(number)), range(1000)))  # made one after another
    if not there:
        raise RunError(f"{store.root}: the run has no checkpoint yet; run `tpaw run` first")
    chosen = _chosen(checkpoint, there, store)
    return Subject(config.run.name, config, store, {number: store.checkpoint(number) for number in chosen}, True)


def _chosen(checkpoint: str, there: list[int], store: RunStore) -> list[int]:
    if checkpoint == "all":
        return there
    if checkpoint == "last":
        return there[-1:]
    if not checkpoint.isascii() or not checkpoint.isdigit() or len(checkpoint) > 9 or int(checkpoint) not in there:
        raise RunError(f"--checkpoint: found {shorten(checkpoint)}, expected all, last or one of {listed(there)} of {store.root}")
    return [int(checkpoint)]


def _open_model(path: str, config: Path | None, overrides: Sequence[str], to: str | None, keeps: bool) -> Subject:
    folder = _absolute(path)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: neither a run's folder (it has no config.yaml) nor a model's (it has no config.json)")
    if config is None:
        raise ConfigError(
            f"{path} is a model: name with --config the config of a run, which says with which data, template and engine "
            "settings it is evaluated"
        )
    target = _absolute(to or f"evaluations/{folder.name}")
    place = {"run.name": target.name, "run.root": str(target.parent), "model.path": str(folder), "model.lora.rank": 0}
    # JSON is YAML, whatever the names hold.
    resolved = load_config(config, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in place.items())])
    check_directory(folder, trust_remote_code=resolved.model.trust_remote_code)
    store = RunStore.around(str(target))
    if keeps:
        check_same_run(resolved, store, instead="--to with another folder")
    return Subject(folder.name, resolved, store, {0: str(folder)}, False)


def _absolute(path: str) -> Path:
    return Path(os.path.realpath(os.path.expanduser(path)))  # Path.resolve raises for links that lead in a circle


def _checksums(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors"):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
