"""How sure a figure is: intervals, effect sizes and tests, on scipy.

Values of two methods are paired by seed: the i-th of both comes from the same seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, isnan, sqrt
from statistics import fmean, stdev

from scipy import stats

ROUNDING = 1e-12
"""Share of the greatest value below which a spread is one of rounding: 0.3 − 0.2 and 0.2 − 0.1 differ by 3e-17."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float

    def within(self, least: float, most: float) -> "Interval":
        """Cut to the values that the figure can have: Student's interval knows of none.

        >>> Interval(low=0.75, high=1.25).within(0.0, 1.0)
        Interval(low=0.75, high=1.0)
        """
        return Interval(low=max(least, self.low), high=min(most, self.high))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """How a method's values differ from those of another on the same seeds. What one pair cannot tell is null."""

    pairs: int
    difference: float
    """Mean of the differences."""
    interval: Interval | None
    """Of the mean of the differences, by Student's t."""
    cohens_d: float | None
    """Mean of the differences over their standard deviation (`d_z`, Cohen 1988); null, as the interval, where all differences
    are equal: Student's distribution then knows nothing of how far they might spread."""
    p: float | None
    """Two-sided, of the paired t-test; null where all differences are equal."""


def proportion_interval(successes: int, trials: int, level: float = 0.95) -> Interval | None:
    """Wilson's interval of a share (Wilson 1927); null without trials.

    >>> proportion_interval(0, 0) is None, round(proportion_interval(8, 10).low, 3), round(proportion_interval(8, 10).high, 3)
    (True, 0.49, 0.943)
    """
    if not trials:
        return None
    found = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(low=float(found.low), high=float(found.high))


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's interval of a mean; null for fewer than two values, and where all are equal: it would have no width.

    >>> mean_interval([1.0, 3.0]).high > 14.7, mean_interval([1.0, 1.0, 1.0])
    (True, None)
    """
    return _student(values, _deviation(values, values), level)


def compare(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> Paired:
    """The paired difference `values - others`.

    Raises:
        ValueError: when they are not as many, or none.

    >>> compare([3.0, 5.0], [1.0, 2.0]).difference
    2.5
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"expected as many values as others, at least one; found {len(values)} and {len(others)}")
    differences = [value - other for value, other in zip(values, others, strict=True)]
    spread = _deviation(differences, [*values, *others])
    p = float(stats.ttest_rel(values, others).pvalue) if spread > 0 else None
    return Paired(
        pairs=len(differences),
        difference=fmean(differences),
        interval=_student(differences, spread, level),
        cohens_d=fmean(differences) / spread if spread > 0 else None,
        p=None if p is None or isnan(p) else p,
    )


def _deviation(values: Sequence[float], measured: Sequence[float]) -> float:
    """Standard deviation with n − 1; 0 for one value, and where values made of what was `measured` differ by rounding alone."""
    found = stdev(values) if len(values) > 1 else 0.0
    return found if found > ROUNDING * max(map(abs, measured), default=0.0) else 0.0


def _student(values: Sequence[float], deviation: float, level: float) -> Interval | None:
    if not deviation:
        return None
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * deviation / sqrt(len(values))
    return Interval(low=fmean(values) - half, high=fmean(values) + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for as many comparisons (Holm 1979), in the given order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of `k` samples, drawn from those at hand, is correct (Chen et al. 2021, equation 1; unbiased).

    >>> pass_at_k(4, 2, 1), round(pass_at_k(4, 2, 2), 4)
    (0.5, 0.8333)
    """
    return 1.0 - comb(samples - correct, k) / comb(samples, k)
