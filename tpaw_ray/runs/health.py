"""Whether learning goes wrong: sentences for a person, made of what an iteration committed, so a continued run says the same."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tpaw_ray.config import WarningsConfig

QUARTER = 4
"""Steps that a quarter of an update must have for its mean to be judged."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the opponents of an iteration said, counted; `tokens` are those generated, end tokens included."""

    sequences: int
    empty: int
    """Responses of nothing but an end token."""
    cut_off: int
    """Responses that reached the longest length allowed."""
    tokens: int
    set_aside: tuple[str, ...] = ()
    """Prompts without a response, because they ended every engine; they are in none of the counts."""

    def __add__(self, other: "Said") -> "Said":
        return Said(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def mean_length(self) -> float:
        return self.tokens / self.sequences


NOTHING = Said(sequences=0, empty=0, cut_off=0, tokens=0)


def count_said(tables: Iterable[pa.Table]) -> Said:
    """Count tables of generations: columns `prompt_id`, `generated_tokens` and `finish_reason`."""
    total = NOTHING
    for table in tables:
        left_out = pc.equal(table["finish_reason"], "set_aside")
        without, table = table.filter(left_out), table.filter(pc.invert(left_out))
        lengths = pc.list_value_length(table["generated_tokens"])
        cut_off = pc.equal(table["finish_reason"], "length")
        total += Said(
            sequences=len(table),
            empty=_num_true(pc.and_not(pc.less_equal(lengths, 1), cut_off)),
            cut_off=_num_true(cut_off),
            tokens=int(pc.sum(lengths).as_py() or 0),
            set_aside=tuple(without["prompt_id"].to_pylist()),
        )
    return total


def warnings_of(steps: Sequence[dict[str, Any]], said: Said, before: Said, limits: WarningsConfig) -> list[str]:
    """What is wrong with an iteration, a sentence each with numbers and what to do; nothing when all is well.

    Args:
        steps: the update's rows of `metrics.jsonl`.
        said: what the iteration's own opponents said; `NOTHING` where they are not known.
        before: the same of the iteration before.
    """
    rewards = [row["target_reward"] for row in steps if row["target_reward"] is not None]
    found = [falling_reward(rewards, limits.reward_fall)]
    if said.set_aside:
        found.append(
            f"{len(said.set_aside)} prompts are left out, because they ended every engine they were given to: "
            f"{', '.join(said.set_aside[:10])}; --verbose shows the engine's own messages"
        )
    if said.sequences:
        triplets = sum(row["triplets"] for row in steps)
        targets = sum(row["target_length"] * row["triplets"] for row in steps) / triplets
        found += [
            long_responses(said.mean_length, targets, "the targets'", limits.length_over_targets),
            empty_responses(said, limits.empty_share),
            cut_off_responses(said, limits.cut_off_share),
        ]
        if before.sequences:
            found.append(long_responses(said.mean_length, before.mean_length, "the last iteration's", limits.length_growth))
    return [sentence for sentence in found if sentence]


def falling_reward(rewards: Sequence[float], limit: float | None) -> str:
    """Whether the target reward falls for long: over the last quarter of the update's steps.

    It does when that quarter's mean is below 0, where the policy has moved away from the targets, and below the mean of the
    quarter before by more than `limit` standard errors of the difference. Steps differ as their triplets do, hence means; the
    standard error keeps a reward that only wavers around a constant from counting as one that falls. The first half does not
    count: there the learning rate warms up, and the newest player's reward begins at 0.
    """
    size = len(rewards) // 4
    if limit is None or size < QUARTER:
        return ""
    earlier, last = rewards[-2 * size : -size], rewards[-size:]
    fall = fmean(earlier) - fmean(last)
    if fmean(last) >= 0 or fall <= limit * ((variance(earlier) + variance(last)) / size) ** 0.5:
        return ""
    return (
        f"the target reward falls, from {fmean(earlier):+.4f} to {fmean(last):+.4f} over the last quarters of {size} steps: the "
        "model drifts from its data; lower learner.learning_rate or raise objective.eta"
    )


def long_responses(length: float, other: float, whose: str, limit: float | None) -> str:
    """Whether responses are longer than others by more than a factor."""
    if limit is None or length <= limit * other:
        return ""
    return (
        f"responses are {length:.1f} tokens long on average, {length / other:.1f} times {whose} {other:.1f} (limit {limit:g}); "
        "read some under iterations/…/rollouts: where they repeat themselves, lower learner.learning_rate or sampling.temperature"
    )


def empty_responses(said: Said, limit: float | None) -> str:
    """Whether too many responses hold nothing."""
    share = said.empty / said.sequences
    if limit is None or share <= limit:
        return ""
    return (
        f"{share:.1%} of the responses are empty (limit {limit:.1%}); check that model.chat_template is the one of the "
        "fine-tuning, or lower learner.learning_rate if they came with an update"
    )


def cut_off_responses(said: Said, limit: float | None) -> str:
    """Whether too many responses have no end."""
    share = said.cut_off / said.sequences
    if limit is None or share <= limit:
        return ""
    return (
        f"{share:.1%} of the responses were cut off by their length (limit {limit:.1%}); raise sampling.max_new_tokens or "
        "data.max_length, or check that the model was taught to end"
    )


def _num_true(values: pa.ChunkedArray) -> int:
    return int(pc.sum(values).as_py() or 0)
