"""Conversations as token ids: templated and tokenised once, sorted into splits, written to the run's folder.

The ids written here serve the opponents, the scorers and the learner; nothing is rendered or tokenised a second time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal, get_args

from tpaw_ray.algorithm.team import GIVEN
from tpaw_ray.config import Config
from tpaw_ray.data.answers import final_answer
from tpaw_ray.data.digests import DigestSet
from tpaw_ray.data.rows import Conversation
from tpaw_ray.data.sources import read_conversations
from tpaw_ray.data.template import end_tokens, render_all, vocabulary_size
from tpaw_ray.errors import CheckpointError, DataError
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
Fate = Literal["train", "validation", "test", "too_long", "duplicates", "leaked"]
"""What becomes of a row: its split, or why it is left out. The names are fields of `PromptCounts`."""

BATCH = 512
"""Conversations in one call of the tokenizer, which works on them in parallel."""


@dataclass(frozen=True, kw_only=True)
class PromptCounts:
    """Rows by what became of them: `rows` is the sum of all others, over `data.path` and `data.heldout_path`.

    `duplicates` repeat an earlier row (prompt and target), `leaked` are rows of `data.path` whose prompt stands in
    `data.heldout_path` as well, `too_long` exceed `data.prompt_length` or `data.max_length`.
    """

    rows: int
    train: int
    validation: int
    test: int
    too_long: int
    duplicates: int
    leaked: int


@dataclass(frozen=True, kw_only=True)
class PromptSurvey:
    """What `prepare_prompts` would write, with lengths in tokens of the training prompts and targets."""

    counts: PromptCounts
    mean_prompt_tokens: float
    max_prompt_tokens: int
    mean_target_tokens: float
    max_target_tokens: int
    judged: int
    """Prompts of `evaluation.split` that have a final answer to compare with."""


# Splitting.


def prompt_text(conversation: Conversation) -> str:
    """The prompt as one text, the same for every model: ids and splits hang on it, not on a template (some write the date)."""
    return json.dumps([[turn.role, turn.content] for turn in conversation.prompt], ensure_ascii=False)


def prompt_id(conversation: Conversation) -> str:
    """16 hex digits of the SHA-256 of prompt, target and rejected response, if any; the same everywhere, whatever the model."""
    responses = [conversation.target] + ([] if conversation.rejected is None else [conversation.rejected])
    return _digest(json.dumps([prompt_text(conversation), *responses])).hex()[:16]


def as_in(split: Fate, conversation: Conversation) -> Conversation:
    """A row as its split has it: only training rows have a rejected response, so that all methods hold out the same prompts."""
    return conversation if split == "train" else replace(conversation, rejected=None)


def split_of(prompt: str, validation_fraction: float, test_fraction: float) -> Split:
    """The split of a prompt text, by its hash alone: the same in every run, whatever other rows there are.

    >>> split_of("1+1?", 0.0, 0.0), split_of("1+1?", 0.0, 0.999999)
    ('train', 'test')
    """
    position = _number(prompt) / 2**64
    if position < test_fraction:
        return "test"
    return "validation" if position < test_fraction + validation_fraction else "train"


def iter_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[Fate, Prompt | None, list[int]]]:
    """Stream all rows, each with what becomes of it; the prompt is None where the row is left out. Held-out data comes first.
    Beside a prompt stand the tokens of its rejected response, none where preferences are not given.

    Raises:
        DataError: at the first row that cannot be read or rendered.
        CheckpointError: at the first row in which the tokenizer finds a token that the model does not have.
    """
    data = config.data
    heldout, seen = DigestSet(), DigestSet()  # all that grows with the data

    def unless_seen(conversation: Conversation, split: Split) -> Fate:
        return split if seen.add(int(prompt_id(as_in(split, conversation)), 16)) else "duplicates"

    def fate_of_heldout(conversation: Conversation) -> Fate:
        heldout.add(_number(prompt_text(conversation)))
        return unless_seen(conversation, "test")

    def fate_of(conversation: Conversation) -> Fate:
        text = prompt_text(conversation)
        if heldout and _number(text) in heldout:
            return "leaked"
        test_fraction = data.test_fraction if data.heldout_path is None else 0.0
        return unless_seen(conversation, split_of(text, data.validation_fraction, test_fraction))

    if data.heldout_path is not None:
        conversations = read_conversations(data, heldout=True)
        yield from _iter_source(config, tokenizer, data.heldout_path, conversations, fate_of_heldout)
    given = read_conversations(data, preferences=config.team.data == "given")
    yield from _iter_source(config, tokenizer, data.path, given, fate_of)


def _iter_source(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    source: str,
    conversations: Iterator[Conversation],
    fate_of: Callable[[Conversation], Fate],
) -> Iterator[tuple[Fate, Prompt | None, list[int]]]:
    ends, vocabulary = end_tokens(tokenizer, config.model.path), vocabulary_size(config.model.path)
    while batch := list(islice(conversations, BATCH)):
        kept: list[tuple[Fate, Conversation]] = []
        for conversation in batch:
            fate = fate_of(conversation)
            if fate in ("duplicates", "leaked"):
                yield fate, None, []
            else:
                kept.append((fate, as_in(fate, conversation)))
        rendered = render_all(tokenizer, [conversation for _, conversation in kept], ends, source)
        against = _render_rejected(tokenizer, [conversation for _, conversation in kept], ends, source)
        for (fate, conversation), (prompt, target), rejected in zip(kept, rendered, against, strict=True):
            if vocabulary and (strange := max(*prompt, *target, *rejected)) >= vocabulary:
                raise CheckpointError(
                    f"{source}, row {conversation.row}: the tokenizer of {config.model.path} gives the token id {strange} "
                    f"({tokenizer.convert_ids_to_tokens(strange)!r}), the model's vocabulary has {vocabulary}; expected model "
                    "and tokenizer of one kind"
                )
            length = len(prompt) + max(len(target), len(rejected))
            if len(prompt) > config.data.prompt_length or length > config.data.max_length:
                yield "too_long", None, []
                continue
            yield (
                fate,
                Prompt(
                    prompt_id=prompt_id(conversation),
                    row=conversation.row,
                    prompt_tokens=prompt,
                    target_tokens=target,
                    reference_answer=final_answer(conversation.target, config.evaluation.answer_pattern),
                ),
                rejected,
            )


def _render_rejected(
    tokenizer: "PreTrainedTokenizerBase", conversations: list[Conversation], ends: Sequence[int], source: str
) -> list[list[int]]:
    """The ids of rejected responses behind their prompts; empty where there is none."""
    swapped = [replace(one, target=one.rejected) for one in conversations if one.rejected is not None]
    rendered = iter(render_all(tokenizer, swapped, ends, f"{source} (rejected responses)"))
    return [[] if one.rejected is None else next(rendered)[1] for one in conversations]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _number(text: str) -> int:
    return int.from_bytes(_digest(text)[:8], "big")


# The stage.


def prepare_prompts(config: Config, store: RunStore, tokenizer: "PreTrainedTokenizerBase") -> PromptCounts:
    """Write every prompt to its split's shards and commit. Where that is done already, only the counts are read.

    Raises:
        DataError: at a row that cannot be used, or when no training prompt is left.
    """
    folder = store.path("prompts")
    if store.is_committed(folder):
        found = store.counts(folder)
        return PromptCounts(**{field.name: found[field.name] for field in fields(PromptCounts)})
    store.remove(folder)  # a killed run's shards: its last ones may be beyond those that are written now
    given = config.team.data == "given"
    if given:
        store.remove(store.rollout(GIVEN))
    fates: Counter[Fate] = Counter()
    waiting: dict[Fate, list[Prompt]] = {"train": [], "validation": [], "test": []}
    against: list[Generation] = []
    shards: Counter[Fate] = Counter()

    def write(split: Fate) -> None:
        store.write_rows(store.shard(store.prompts(split), shards[split]), waiting[split], Prompt)
        if given and split == "train":
            store.write_rows(store.shard(store.rollout(GIVEN), shards[split]), against, Generation)
            against.clear()
        shards[split] += 1
        waiting[split] = []

    for fate, prompt, rejected in iter_prompts(config, tokenizer):
        fates[fate] += 1
        if prompt is not None:
            waiting[fate].append(prompt)
            if given and fate == "train":
                against.append(_given(prompt, rejected))
            if len(waiting[fate]) == config.data.shard_size:
                write(fate)
    counts = _counted(fates, config)
    for split, prompts in waiting.items():
        if prompts:
            write(split)
    if given:
        store.commit(store.rollout(GIVEN), sequences=0, tokens=0, seconds=0.0)  # no model said them
    store.commit(folder, **asdict(counts))
    return counts


def _given(prompt: Prompt, rejected: list[int]) -> Generation:
    """A rejected response of the data, in the place of what an opponent said."""
    return Generation(
        prompt_id=prompt.prompt_id,
        iteration=GIVEN.iteration,
        opponent=GIVEN.opponent,
        generated_tokens=rejected,
        finish_reason="stop",
    )


def survey_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> PromptSurvey:
    """What `prepare_prompts` would write, without writing. Raises what it raises."""
    fates: Counter[Fate] = Counter()
    judged = prompt_tokens = target_tokens = longest_prompt = longest_target = 0
    for fate, prompt, _ in iter_prompts(config, tokenizer):
        fates[fate] += 1
        judged += fate == config.evaluation.split and prompt is not None and prompt.reference_answer is not None
        if prompt is not None and fate == "train":
            prompt_tokens += len(prompt.prompt_tokens)
            target_tokens += len(prompt.target_tokens)
            longest_prompt = max(longest_prompt, len(prompt.prompt_tokens))
            longest_target = max(longest_target, len(prompt.target_tokens))
    counts = _counted(fates, config)
    return PromptSurvey(
        counts=counts,
        mean_prompt_tokens=prompt_tokens / counts.train,
        max_prompt_tokens=longest_prompt,
        mean_target_tokens=target_tokens / counts.train,
        max_target_tokens=longest_target,
        judged=judged,
    )


def _counted(fates: Mapping[Fate, int], config: Config) -> PromptCounts:
    counts = PromptCounts(rows=sum(fates.values()), **{fate: fates.get(fate, 0) for fate in get_args(Fate)})
    if counts.train == 0:
        data = config.data
        raise DataError(
            f"{data.path}: no training prompts are left of {counts.rows} rows: {counts.validation} are for validation, "
            f"{counts.test} for test, {counts.too_long} longer than data.prompt_length ({data.prompt_length} tokens) or "
            f"data.max_length ({data.max_length} tokens), {counts.duplicates} duplicates, "
            f"{counts.leaked} with a prompt that data.heldout_path holds out"
        )
    return counts
