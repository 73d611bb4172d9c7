"""The outcome: what every method scores on the test split over the seeds, and how sure the differences are. Pure.

Values stand in the order of the seeds, so that the i-th of two methods comes from the same seed: same start, same data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any, Literal

from tpaw_ray.evaluation.statistics import compare, holm, mean_interval
from tpaw_ray.experiment.design import START

On = Literal["best", "last"]
"""Which checkpoint of a run: the best on validation, or the last."""
ON: tuple[On, ...] = ("best", "last")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Accuracies on the test split, seed by seed."""

    values: Sequence[float]
    checkpoints: Sequence[int]
    """Which checkpoint answered, seed by seed."""
    judged: Sequence[int]
    """How many of its answers the accuracy is a share of, seed by seed."""
    mean: float
    std: float | None
    """Over the seeds, with n − 1; null for one seed. Below, Student's 95 % interval of the mean, cut to 0 … 1."""
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float], checkpoints: Sequence[int], judged: Sequence[int]) -> "Scores":
        """
        >>> found = Scores.of([0.5, 0.7], [1, 2], [10, 10])
        >>> round(found.mean, 6), round(found.std, 6)
        (0.6, 0.141421)
        """
        interval = mean_interval(values)
        cut = interval.within(0.0, 1.0) if interval else None
        return cls(
            values=list(values),
            checkpoints=list(checkpoints),
            judged=list(judged),
            mean=fmean(values),
            std=stdev(values) if len(values) > 1 else None,
            low=cut.low if cut else None,
            high=cut.high if cut else None,
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method minus a baseline, paired by seed; fields as in `statistics.Paired`."""

    to: str
    on: On
    difference: float
    low: float | None
    high: float | None
    cohens_d: float | None
    p: float | None
    p_holm: float | None
    """Corrected for all comparisons of the table on the same checkpoint, best or last."""


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """A method's row. The start's best and last are one."""

    method: str
    seeds: Sequence[int]
    best: Scores
    last: Scores
    comparisons: Sequence[Comparison]
    given_up: Sequence[int] = ()
    """Seeds whose run diverged, and counts as far as it came."""


def make_table(
    seeds: Sequence[int],
    scores: Mapping[str, Mapping[On, Scores]],
    baselines: Sequence[str],
    given_up: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> list[MethodRow]:
    """A row a method, in the order given; each is compared to every baseline but itself, the start to none."""
    pairs = [(method, baseline) for method in scores for baseline in baselines if baseline != method and method != START]
    found: dict[str, list[Comparison]] = {method: [] for method in scores}
    for on in ON:
        compared = [compare(scores[method][on].values, scores[baseline][on].values) for method, baseline in pairs]
        # Of two baselines each is compared to the other: one test, told from both sides.
        tested = {frozenset(pair): one.p for pair, one in zip(pairs, compared, strict=True) if one.p is not None}
        corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
        for (method, baseline), one in zip(pairs, compared, strict=True):
            found[method].append(
                Comparison(
                    to=baseline,
                    on=on,
                    difference=one.difference,
                    low=one.interval.low if one.interval else None,
                    high=one.interval.high if one.interval else None,
                    cohens_d=one.cohens_d,
                    p=one.p,
                    p_holm=corrected.get(frozenset((method, baseline))),
                )
            )
    return [
        MethodRow(
            method=method,
            seeds=list(seeds),
            best=by["best"],
            last=by["last"],
            comparisons=found[method],
            given_up=list(given_up.get(method, ())),
        )
        for method, by in scores.items()
    ]


def as_json(table: Sequence[MethodRow]) -> list[dict[str, Any]]:
    """The rows as `experiment.json` holds them."""
    return [asdict(row) for row in table]


SCORE_COLUMNS = ("method", "seeds", "best", "95 %", "last", "95 %")
COMPARISON_COLUMNS = ("method", "minus", "on", "difference", "95 %", "Cohen's d", "p", "p (Holm)")


def score_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Means and standard deviations as a person reads them, in the order of `SCORE_COLUMNS`."""
    return [
        [row["method"], str(len(row["seeds"])), *(cell for on in ON for cell in (_spread(row[on]), _between(row[on])))]
        for row in rows
    ]


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many answers the accuracies rest on (tables of earlier versions do not know), and a sentence for every run given up."""
    judged = [number for row in rows for on in ON for number in row[on].get("judged", ())]
    least, most = (min(judged), max(judged)) if judged else (0, 0)
    return [
        *([f"Accuracies are of {least if least == most else f'{least} to {most}'} judged answers each."] if judged else []),
        *(
            f"{row['method']}, seed {seed}: the run diverged; the last checkpoint that it had made counts as its last."
            for row in rows
            for seed in row.get("given_up", ())
        ),
    ]


def comparison_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Comparisons as a person reads them, in the order of `COMPARISON_COLUMNS`."""
    return [
        [
            row["method"],
            one["to"],
            one["on"],
            f"{one['difference']:+.4f}",
            _between(one, "+.4f"),
            _number(one["cohens_d"], "+.2f"),
            _chance(one["p"]),
            _chance(one["p_holm"]),
        ]
        for on in ON
        for row in rows
        for one in row["comparisons"]
        if one["on"] == on
    ]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(markdown(["a", "b"], [["1", "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\\\\|y |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _spread(scores: Mapping[str, Any]) -> str:
    return f"{scores['mean']:.4f}" + ("" if scores["std"] is None else f" ± {scores['std']:.4f}")


def _between(held: Mapping[str, Any], form: str = ".4f") -> str:
    return "–" if held["low"] is None else f"{held['low']:{form}} … {held['high']:{form}}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _chance(p: float | None) -> str:
    return "< 0.0001" if p is not None and p < 1e-4 else _number(p, ".4f")
