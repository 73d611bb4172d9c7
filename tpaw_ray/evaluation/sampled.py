"""Figures of judged answers: accuracy, pass@k and majority vote, each with its interval. Pure arithmetic.

The prompt is the unit: k answers to one prompt are not k independent trials, so every figure is a mean over prompts of one value
in 0 … 1, and its interval that of this mean.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tpaw_ray.evaluation.statistics import mean_interval, pass_at_k, proportion_interval
from tpaw_ray.schema import Answer


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A mean over prompts with its 95 % interval; `low` and `high` are null where one prompt, or equal values, tell of none."""

    value: float
    low: float | None
    high: float | None
    method: str
    """How the interval was made: `wilson` (every value 0 or 1) or `student` (of the mean, cut to 0 … 1)."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the judged answers to a split say. All figures are null where no prompt could be judged."""

    prompts: int
    judged: int
    """Prompts with a reference answer and at least one answer that was not set aside."""
    set_aside: int
    """Prompts without a response, because they end every engine."""
    samples: int
    accuracy: Figure | None
    """Share of correct answers; with several samples, the mean of each prompt's share: pass@1."""
    pass_at: dict[int, Figure]
    """Chance that one of k samples is correct, by k (1, 2, 4 … and all)."""
    majority: Figure | None
    """The final answer most samples agree on is correct; a tie counts the share of tied answers that are. Null for one sample."""


def figures_of(answers: Sequence[Answer], samples: int) -> Figures:
    """Figures of the answers to a split, `samples` for each prompt. Those that were set aside are left out of their prompt's."""
    by_prompt: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_prompt[answer.prompt_id].append(answer)
    judged = [found for own in by_prompt.values() if (found := [one for one in own if one.correct is not None])]
    referenced = [own for own in by_prompt.values() if own[0].reference_answer is not None]
    counts = [(len(own), sum(bool(one.correct) for one in own)) for own in judged]
    fewest = min((size for size, _ in counts), default=0)
    ks = sorted({2**power for power in range(20) if 2**power < samples} | {samples})
    chances = {k: figure([pass_at_k(size, right, k) for size, right in counts]) for k in ks if k <= fewest}
    return Figures(
        prompts=len(by_prompt),
        judged=len(judged),
        set_aside=len(referenced) - len(judged),
        samples=samples,
        accuracy=figure([correct / size for size, correct in counts]),
        pass_at={k: chance for k, chance in chances.items() if chance is not None},
        majority=figure([majority(own) for own in judged]) if samples > 1 else None,
    )


def majority(answers: Sequence[Answer]) -> float:
    """Whether the most frequent final answer to a prompt is correct; of those tied for it, the share that are.

    An answer without a final answer has no vote.
    """
    votes = Counter(answer.answer for answer in answers if answer.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    tied = [answer for answer, count in votes.items() if count == most]
    return sum(answer == answers[0].reference_answer for answer in tied) / len(tied)


def figure(values: Sequence[float]) -> Figure | None:
    """The mean of a value in 0 … 1 for each prompt, with Wilson's interval where all are 0 or 1, otherwise Student's.

    >>> figure([1.0, 0.0]).method, figure([0.5, 0.25]).value, figure([])
    ('wilson', 0.375, None)
    """
    if not values:
        return None
    value = fmean(values)
    if all(one in (0.0, 1.0) for one in values):
        found, method = proportion_interval(int(sum(values)), len(values)), "wilson"
    else:
        found, method = mean_interval(values), "student"
    cut = found.within(0.0, 1.0) if found else None
    return Figure(value=value, low=cut.low if cut else None, high=cut.high if cut else None, method=method)


def shown(found: Figure | None) -> str:
    """A figure as a person reads it.

    >>> shown(Figure(value=0.5, low=0.25, high=0.75, method="wilson")), shown(None)
    ('0.500 [0.250, 0.750]', '–')
    """
    if found is None:
        return "–"
    return f"{found.value:.3f}" + ("" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]")
