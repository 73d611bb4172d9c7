"""Exact match on held-out rows as a stage: a checkpoint answers, its answers are judged, the figures are kept.

    RUN/evaluations/003/exact-test-8-samples-1f0c…/     a folder of its own, committed with checksums like every stage
      generations/000/00000.parquet …                  what the engine said, a folder a sample
      answers/00000.parquet                            the same, judged
      result.json

The digest in the folder's name is one of all that the figures hang on: other settings or weights have another folder.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpaw_ray.config import dump_config
from tpaw_ray.data.prompts import prepare_prompts
from tpaw_ray.errors import DataError, RunError
from tpaw_ray.evaluation.asking import engines
from tpaw_ray.evaluation.exact_match import judge
from tpaw_ray.evaluation.sampled import figures_of
from tpaw_ray.evaluation.subject import Subject
from tpaw_ray.opponents.messages import Sampling
from tpaw_ray.opponents.rollouts import Questions, generate
from tpaw_ray.plain_json import NUMBER
from tpaw_ray.plan import shards_asked
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.schema import Answer, Generation, Prompt

_FIGURE = {"value": NUMBER, "low": NUMBER | None, "high": NUMBER | None, "method": str}
RESULT = {
    "name": str,
    "split": str,
    "settings": {"samples": int},
    "judged": int,
    "set_aside": int,
    "accuracy": dict | None,
    "pass_at": {str: _FIGURE},
    "majority": dict | None,
}
"""What is read of a `result.json` (`plain_json.misfit`)."""


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """What is asked, and how the answers are drawn."""

    split: str
    limit: int | None
    samples: int
    sampling: Sampling
    seed: int

    @property
    def title(self) -> str:
        """`validation-greedy`, `test-8-samples`."""
        return f"{self.split}-{'greedy' if self.samples == 1 and not self.sampling.temperature else f'{self.samples}-samples'}"


def prepare(subject: Subject) -> None:
    """The prompts of a model's evaluation, made anew where data or model changed; a run has its own.

    Raises:
        RunError: when the run has not made its prompts yet.
        DataError: at a row that cannot be used.
    """
    store = subject.store
    if not subject.is_run:
        store.write_bytes(store.path("config.yaml"), dump_config(subject.config).encode())
        sources, kept = _sources(subject), store.path("sources.json")
        if not store.exists(kept) or store.read_json(kept) != sources:
            store.remove(store.path("prompts"))
        prepare_prompts(subject.config, store, subject.tokenizer)
        store.write_json(kept, sources)
    elif not store.is_committed(store.path("prompts")):
        raise RunError(f"{store.root}: the run has not made its prompts yet; run `tpaw run` first")


def _sources(subject: Subject) -> dict[str, list[Any]]:
    """Size and time of every local file that prompts are made from, by path; what comes from a hub is not looked at."""
    data = subject.config.data
    found: dict[str, list[Any]] = {}
    for path in filter(None, (data.path, data.heldout_path, subject.config.model.path)):
        place = Path(os.path.expanduser(path))
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found |= {str(file): [file.stat().st_size, file.stat().st_mtime] for file in files if file.is_file()}
    return found


def exact_folder(subject: Subject, number: int, wanted: ExactMatch) -> str:
    """Where the result of a checkpoint lies."""
    config = subject.config
    parts: list[Any] = [asdict(wanted), subject.weights(number), config.evaluation.answer_pattern, config.learner.precision]
    parts += [config.data.max_length, subject.ends, config.opponents.engine_args]
    parts.append(subject.store.checksums(subject.store.path("prompts")))
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{subject.store.evaluation(number)}/exact-{wanted.title}-{digest}"


def evaluate_exact(subject: Subject, number: int, wanted: ExactMatch, reporter: Reporter) -> dict[str, Any]:
    """The figures of a checkpoint, as `result.json` holds them; what is committed already is only read.

    Raises:
        DataError: when the split holds no rows.
        RunError: when the run's own evaluation of the checkpoint is still to come; when answers are missing.
        TpawError: what engines raise.
    """
    store, output = subject.store, exact_folder(subject, number, wanted)
    if store.is_committed(output):
        found: dict[str, Any] = store.read_json(f"{output}/result.json", RESULT)
        return found
    prompts = prompts_of(subject, number, wanted)
    began = time.perf_counter()
    total = len(prompts) * wanted.samples
    with (
        engines(subject, number, total, reporter.say) as handles,
        reporter.stage(f"answer {subject.called(number)}", total) as advance,
    ):
        for sample in range(wanted.samples):
            questions = Questions(
                split=wanted.split,
                limit=wanted.limit,
                iteration=sample,  # what makes the seed of each sample its own
                opponent=number,
                sampling=wanted.sampling,
                run_seed=wanted.seed,
                output=f"{output}/generations/{sample:03d}",
                adapter=subject.adapter(number),
            )
            generate(store, questions, handles, advance, at_once=shards_asked(subject.config))
    said = [row for path in store.files(f"{output}/generations") for row in store.read_rows(path, Generation)]
    if len(said) != total:
        raise RunError(f"{output}: found {len(said)} answers, expected {total}; what was asked changed meanwhile. Ask again")
    answers = judge(prompts, said, subject.tokenizer, subject.config.evaluation.answer_pattern)
    store.write_rows(store.shard(f"{output}/answers", 0), answers, Answer)
    result = _result(subject, number, wanted, answers, time.perf_counter() - began)
    store.write_json(f"{output}/result.json", result)
    store.commit(output, sequences=len(said), accuracy=result["accuracy"] and result["accuracy"]["value"])
    return result


def check_settled(subject: Subject, number: int) -> None:
    """Nothing is written beside an evaluation that the run's driver has yet to commit: it would count as part of it.

    Raises:
        RunError: saying so.
    """
    store = subject.store
    if subject.is_run and not store.is_committed(store.evaluation(number)):
        raise RunError(f"{store.root}: the run has not evaluated checkpoint {number} yet; let `tpaw run` go on first")


def prompts_of(subject: Subject, number: int, wanted: ExactMatch) -> list[Prompt]:
    """The held-out rows that a checkpoint is asked.

    Raises:
        DataError, RunError: as `evaluate_exact` does.
    """
    check_settled(subject, number)
    store, config = subject.store, subject.config
    found = [row for path in store.files(store.prompts(wanted.split)) for row in store.read_rows(path, Prompt)][: wanted.limit]
    if not found:
        hint = "data.heldout_path or data.test_fraction" if wanted.split == "test" else "data.validation_fraction"
        raise DataError(f"{config.data.path}: no rows are held out for {wanted.split}; {hint} holds some out")
    return found


def _result(subject: Subject, number: int, wanted: ExactMatch, answers: list[Answer], seconds: float) -> dict[str, Any]:
    figures = asdict(figures_of(answers, wanted.samples))
    return {
        "name": subject.called(number),
        "checkpoint": number,
        "split": wanted.split,
        "settings": {"limit": wanted.limit, "samples": wanted.samples, "seed": wanted.seed, **asdict(wanted.sampling)},
        "weights": subject.weights(number),
        "seconds": round(seconds, 3),
        **figures,
        "pass_at": {str(k): found for k, found in figures["pass_at"].items()},
    }
