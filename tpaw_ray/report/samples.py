"""What a reader may browse: prompts with their targets, what every checkpoint said, and how likely every player finds it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from tpaw_ray.algorithm.team import Rollout
from tpaw_ray.config import Config
from tpaw_ray.data.answers import final_answer
from tpaw_ray.errors import ConfigError
from tpaw_ray.report.texts import Tokenizer, tokenizer_of
from tpaw_ray.runs.continuation import started_config
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer, Generation, Prompt, Score, table_of

SAMPLES = 1000
"""Training prompts, and as many held-out ones, that a report has unless it is asked for another number."""
_ROLLOUT = re.compile(r"iterations/(\d+)/rollouts/opponent-(\d+)/")
_SCORES = re.compile(r"iterations/(\d+)/scores/player-(\d+)/")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one voice said to a prompt."""

    text: str
    answer: str | None
    correct: bool | None
    """Null where there is no reference answer."""
    finish: str
    """`stop`, `length` or `set_aside`; empty where it is not known."""
    logps: tuple[float | None, ...]
    """Log-probability in nats under each player; null where the run did not need it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, its target, and what each of the set's voices said; null where a voice said nothing to it."""

    prompt_id: str
    row: int
    prompt: str
    target: str
    reference: str | None
    logps: tuple[float | None, ...]
    """Of the target, in nats, under each player."""
    said: tuple[Said | None, ...]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples that the same voices answered."""

    title: str
    voices: tuple[str, ...]
    players: tuple[int, ...]
    """Checkpoints whose log-probabilities the samples have, oldest first."""
    total: int
    """Prompts of the run, of which the samples are evenly spaced ones."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Held-out and training samples, and the texts of special tokens."""

    sets: tuple[SampleSet, ...]
    special: tuple[str, ...]


def gather_samples(store: RunStore, limit: int = SAMPLES) -> Samples:
    """Evenly spaced prompts of a run, at most `limit` of the training set and as many of the held-out one.

    Texts are decoded with the tokenizer of checkpoint 000, special tokens included.

    Raises:
        RunError: when a file of the run is damaged, or its tokenizer cannot be loaded.
    """
    if limit < 1 or not (store.is_committed(store.path("prompts")) and store.is_committed(store.checkpoint(0))):
        return Samples(sets=(), special=())
    config = started_config(store)
    tokenizer = tokenizer_of(store)
    sets = (_held_out(store, config, tokenizer, limit), _training(store, config, tokenizer, limit))
    return Samples(sets=tuple(one for one in sets if one.samples), special=tokenizer.special)


# Held-out prompts.


def _held_out(store: RunStore, config: Config, tokenizer: Tokenizer, limit: int) -> SampleSet:
    checkpoints = [number for number in range(config.iterations + 1) if store.is_committed(store.evaluation(number))]
    tables = {number: _answers(store, number) for number in checkpoints}
    answered = min((len(table) for table in tables.values()), default=0)
    samples: list[Sample] = []
    for path, rows in _choose(store, config.evaluation.split, limit, answered):
        prompts = _prompts(store, path, rows)
        said = [_said_held_out(tables[number], prompts["prompt_id"], tokenizer) for number in checkpoints]
        logps = [
            _logps(store, f"{store.evaluation(number)}/target_scores/{_name(path)}", prompts["prompt_id"])
            for number in checkpoints
        ]
        samples += _join(prompts, tokenizer, logps, said)
    voices = tuple(f"checkpoint {number:03d}" for number in checkpoints)
    players = tuple(checkpoints)
    return SampleSet(title="Held-out answers", voices=voices, players=players, total=answered, samples=tuple(samples))


def _answers(store: RunStore, checkpoint: int) -> pa.Table:
    files = store.files(f"{store.evaluation(checkpoint)}/answers")
    tables = [store.read_columns(path, Answer, "prompt_id", "generated_tokens", "answer", "correct") for path in files]
    return pa.concat_tables(tables) if tables else table_of([], Answer)  # nothing was held out


def _said_held_out(table: pa.Table, prompt_ids: Sequence[str], tokenizer: Tokenizer) -> list[Said | None]:
    rows = table.filter(pc.is_in(table["prompt_id"], pa.array(prompt_ids, pa.string()))).to_pylist()
    texts = tokenizer.texts([row["generated_tokens"] for row in rows])
    found = {
        row["prompt_id"]: Said(text=text, answer=row["answer"], correct=row["correct"], finish="", logps=())
        for row, text in zip(rows, texts, strict=True)
    }
    return [found.get(one) for one in prompt_ids]


# Training prompts.


def _training(store: RunStore, config: Config, tokenizer: Tokenizer, limit: int) -> SampleSet:
    files = store.files(store.path("iterations"))
    rollouts = sorted({Rollout(int(found[1]), int(found[2])) for path in files if (found := _ROLLOUT.search(path))})
    rollouts = [rollout for rollout in rollouts if store.is_committed(store.rollout(rollout))]
    scored = {path: (int(found[1]), int(found[2])) for path in files if (found := _SCORES.search(path))}
    committed = {number for number, _ in scored.values() if store.is_committed(f"{store.iteration(number)}/scores")}
    there = {path for path, (number, _) in scored.items() if number in committed}
    players = tuple(sorted({scored[path][1] for path in there}))
    samples: list[Sample] = []
    total = sum(store.num_rows(path) for path in store.files(store.prompts("train")))
    for path, rows in _choose(store, "train", limit, total):
        prompts = _prompts(store, path, rows)
        ids, name = prompts["prompt_id"], _name(path)

        def logps(place: Callable[[int], str], ids: Sequence[str] = ids, name: str = name) -> list[list[float | None]]:
            paths = [f"{place(player)}/{name}" for player in players]
            return [_logps(store, one if one in there else "", ids) for one in paths]

        said = [
            _said_in_training(store, f"{store.rollout(one)}/{name}", prompts, logps(_scores_of(store, one)), config, tokenizer)
            for one in rollouts
        ]
        samples += _join(prompts, tokenizer, logps(store.target_scores), said)
    own = config.team.data != "given"
    voices = tuple(
        f"checkpoint {one.opponent:03d}, iteration {one.iteration}" if own else "rejected response" for one in rollouts
    )
    return SampleSet(title="Training prompts", voices=voices, players=players, total=total, samples=tuple(samples))


def _scores_of(store: RunStore, rollout: Rollout) -> Callable[[int], str]:
    return lambda player: store.rollout_scores(player, rollout)


def _said_in_training(
    store: RunStore, path: str, prompts: dict[str, list], logps: list[list[float | None]], config: Config, tokenizer: Tokenizer
) -> list[Said | None]:
    table = store.read_columns(path, Generation, "prompt_id", "generated_tokens", "finish_reason")
    rows = {row["prompt_id"]: row for row in table.to_pylist()}
    found = [rows.get(one) for one in prompts["prompt_id"]]
    tokens = [row["generated_tokens"] if row else [] for row in found]
    texts = zip(tokenizer.texts(tokens), tokenizer.texts(tokens, bare=True), strict=True)
    references = prompts["reference_answer"]
    under_players = zip(*logps, strict=True) if logps else ((),) * len(found)
    said: list[Said | None] = []
    for row, (text, bare), reference, its_logps in zip(found, texts, references, under_players, strict=True):
        answer = _answer(bare, config.evaluation.answer_pattern) if reference is not None else None
        correct = None if reference is None or (row and row["finish_reason"] == "set_aside") else answer == reference
        finish = row["finish_reason"] if row else ""
        said.append(Said(text=text, answer=answer, correct=correct, finish=finish, logps=tuple(its_logps)) if row else None)
    return said


def _answer(text: str, pattern: str) -> str | None:
    try:
        return final_answer(text, pattern)
    except ConfigError:  # the pattern did with the user's data; what a model wrote must not end the report
        return None


# What both share.


def _choose(store: RunStore, split: str, limit: int, total: int) -> list[tuple[str, list[int]]]:
    """Of the first `total` prompts of a split, evenly spaced ones: each file and the rows of it to take."""
    wanted = [index * total // min(limit, total) for index in range(min(limit, total))]
    chosen, first = [], 0
    for path in store.files(store.prompts(split)):
        size = store.num_rows(path)
        rows = [index - first for index in wanted if first <= index < first + size]
        first += size
        if rows:
            chosen.append((path, rows))
    return chosen


def _prompts(store: RunStore, path: str, rows: Sequence[int]) -> dict[str, list]:
    found: dict[str, list] = store.read_columns(path, Prompt).take(rows).to_pydict()
    return found


def _logps(store: RunStore, path: str, ids: Sequence[str]) -> list[float | None]:
    """Scores by prompt, rounded to a thousandth of a nat; null where they were not made."""
    if not path or not store.exists(path):
        return [None] * len(ids)
    table = store.read_columns(path, Score, "response_id", "logp")
    found = dict(zip(table["response_id"].to_pylist(), table["logp"].to_pylist(), strict=True))
    return [None if found.get(one) is None else round(found[one], 3) for one in ids]


def _join(
    prompts: dict[str, list], tokenizer: Tokenizer, logps: list[list[float | None]], said: list[list[Said | None]]
) -> list[Sample]:
    texts = tokenizer.texts(prompts["prompt_tokens"]), tokenizer.texts(prompts["target_tokens"])
    return [
        Sample(
            prompt_id=prompts["prompt_id"][index],
            row=prompts["row"][index],
            prompt=texts[0][index],
            target=texts[1][index],
            reference=prompts["reference_answer"][index],
            logps=tuple(of_player[index] for of_player in logps),
            said=tuple(of_voice[index] for of_voice in said),
        )
        for index in range(len(texts[0]))
    ]


def _name(path: str) -> str:
    return path.rsplit("/", 1)[1]
