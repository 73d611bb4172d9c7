"""Head to head in numbers: win rate, and win rate at equal length. Pure arithmetic.

A question's score is 1 where the first model's answer is preferred, 0 where the other's is, 1/2 for a tie, averaged over the two
orders in which the judge saw the answers.

The length-controlled win rate follows AlpacaEval 2 (Dubois et al. 2024): a logistic regression of the score on the model and on a
bounded term of the difference in length, read off where the lengths are equal,

    P(first preferred | question) = σ( θ + φ · tanh( (l − l') / s ) ),    s = standard deviation of l − l' over the questions,
    length-controlled win rate    = σ( θ ).

It differs from AlpacaEval 2 in these: AlpacaEval's third term, the difficulty of a question, is fitted over all models of its
leaderboard and has no value for one pair of models, so it is left out; scores of both orders are averaged, where AlpacaEval asks
once in a random order; a fixed weak penalty (`RIDGE`) stands in place of one chosen by cross-validation; the interval is a
bootstrap over questions. Lengths are characters, as there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from tpaw_ray.evaluation.sampled import Figure, figure

RIDGE = 0.01
"""Penalty `RIDGE/2 · (θ² + φ²)` beside the summed cross-entropy: it bounds the fit where one model wins everything."""
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A question that the judge decided in both orders. Lengths in characters."""

    question_id: str
    scores: tuple[float, ...]
    """By order: 1 the first model's answer is preferred, 0 the other's, 1/2 a tie."""
    length: int
    other_length: int

    @property
    def score(self) -> float:
        """The mean over orders."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The outcome. Win rates are null where nothing was judged."""

    questions: int
    wins: int
    """Questions with a score above 1/2."""
    ties: int
    losses: int
    consistent: int
    """Questions with the same outcome in both orders: what a judge that looks at the position only cannot reach."""
    win_rate: Figure | None
    length_controlled: Figure | None
    """Null also where all questions have the same difference in length but 0: the two effects cannot be told apart."""
    length: float
    """Mean characters of the first model's answers, and of the other's."""
    other_length: float


def preference(judged: Sequence[Judged], seed: int = 0) -> Preference:
    """The outcome of the judged questions; `seed` is the bootstrap's."""
    scores = [one.score for one in judged]
    return Preference(
        questions=len(judged),
        wins=sum(score > 0.5 for score in scores),
        ties=sum(score == 0.5 for score in scores),
        losses=sum(score < 0.5 for score in scores),
        consistent=sum(len(set(one.scores)) == 1 for one in judged),
        win_rate=figure(scores),
        length_controlled=length_controlled(judged, seed),
        length=float(np.mean([one.length for one in judged])) if judged else 0.0,
        other_length=float(np.mean([one.other_length for one in judged])) if judged else 0.0,
    )


def length_controlled(judged: Sequence[Judged], seed: int = 0) -> Figure | None:
    """The win rate at equal lengths, with a percentile bootstrap over questions; no interval where all scores are equal, since
    what is drawn from them does not vary."""
    scores = np.array([one.score for one in judged])
    differences = np.array([one.length - one.other_length for one in judged], dtype=float)
    if not len(judged) or (np.ptp(differences) == 0 and differences[0] != 0):
        return None
    value = _at_equal_length(scores, differences)
    if np.ptp(scores) == 0:
        return Figure(value=value, low=None, high=None, method="bootstrap")
    drawn = np.random.default_rng(seed).integers(0, len(judged), size=(RESAMPLES, len(judged)))
    low, high = np.quantile([_at_equal_length(scores[rows], differences[rows]) for rows in drawn], (0.025, 0.975))
    return Figure(value=value, low=float(low), high=float(high), method="bootstrap")


def _at_equal_length(scores: NDArray[np.float64], differences: NDArray[np.float64]) -> float:
    """`σ(θ)` of the penalised maximum-likelihood fit. Where lengths never differ, φ has no part in it."""
    spread = float(np.std(differences))
    lengths = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = weights[0] + weights[1] * lengths
        cross_entropy = np.sum(np.logaddexp(0.0, logits) - scores * logits)
        slope = special.expit(logits) - scores
        gradient = np.array([slope.sum(), (slope * lengths).sum()]) + RIDGE * weights
        return float(cross_entropy + RIDGE / 2 * weights @ weights), gradient

    fitted = optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(special.expit(fitted.x[0]))
