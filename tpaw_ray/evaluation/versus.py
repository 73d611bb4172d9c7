"""Head to head: the answers of two models to the same questions, compared by a judge in both orders.

Every verdict is appended to `verdicts.jsonl` as it comes, under a digest of all that it hangs on, and is not asked for again.
A reply without a verdict is kept as well, counted and named: the judge draws greedily, so that it would say the same again.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tpaw_ray.errors import RunError
from tpaw_ray.evaluation.judge import Contest, Judge, Verdict, ask_judge, client_of, key_of, verdict_in
from tpaw_ray.evaluation.preference import Judged
from tpaw_ray.runs.store import RunStore

if TYPE_CHECKING:
    from openai import AsyncOpenAI

ORDERS = ("first", "second")
"""Where the first model's answer stands: as A, then as B."""
_SCORES: Mapping[tuple[str, Verdict], float] = {
    ("first", "A"): 1.0,
    ("first", "B"): 0.0,
    ("first", "C"): 0.5,
    ("second", "A"): 0.0,
    ("second", "B"): 1.0,
    ("second", "C"): 0.5,
}


@dataclass(frozen=True, kw_only=True)
class Match:
    """A question with the answers of both models."""

    question_id: str
    question: str
    answer: str
    other: str

    def contest(self, order: str) -> Contest:
        first, second = (self.answer, self.other) if order == "first" else (self.other, self.answer)
        return Contest(question=self.question, answer_a=first, answer_b=second)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the judge said of a match in one order; a line of `verdicts.jsonl`. `verdict` is null where the reply holds none."""

    key: str
    question_id: str
    order: str
    verdict: Verdict | None
    reply: str


class Verdicts:
    """The verdicts kept in a folder of a store, by key."""

    def __init__(self, store: RunStore, directory: str) -> None:
        """Read what is there. A last line that a killed process has not finished is dropped from the file.

        Raises:
            RunError: naming the line that is damaged.
        """
        self._store, self._path = store, f"{directory}/verdicts.jsonl"
        self._known: dict[str, Said] = {}
        content = store.read_bytes(self._path) if store.exists(self._path) else b""
        whole, end, rest = content.rpartition(b"\n")
        if rest:
            store.write_bytes(self._path, whole + end)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                said = Said(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise RunError(f"{self._path}, line {number}: not a verdict ({error}); remove the line") from error
            self._known[said.key] = said

    def get(self, key: str) -> Said | None:
        return self._known.get(key)

    def put(self, said: Said) -> None:
        line = json.dumps(asdict(said)) + "\n"
        if not self._store.exists(self._path):
            self._store.write_bytes(self._path, line.encode())
        else:
            self._store.append_bytes(self._path, line.encode())
        self._known[said.key] = said


def judge_all(
    matches: Sequence[Match], judge: Judge, verdicts: Verdicts, advance: Callable[[int], None], *, at_once: int = 8
) -> list[Said]:
    """Have every match judged in both orders, but for what `verdicts` has; in the order of the matches.

    Raises:
        GenerationError: when the judge does not answer; what it said before is kept.
        KeyboardInterrupt: at once, whatever the judge is busy with.
    """
    both = [(match, order) for match in matches for order in ORDERS]
    asked = [(match, order, key_of(judge, match.contest(order), match.question_id, order)) for match, order in both]
    advance(sum(verdicts.get(key) is not None for _, _, key in asked))
    missing = iter([one for one in asked if verdicts.get(one[2]) is None])
    asyncio.run(_judge_each(missing, judge, verdicts, advance, at_once))
    found = [verdicts.get(key) for _, _, key in asked]
    return [said for said in found if said is not None]


async def _judge_each(
    waiting: Iterator[tuple[Match, str, str]], judge: Judge, verdicts: Verdicts, advance: Callable[[int], None], at_once: int
) -> None:
    """Keep what is said as it comes, `at_once` requests at a time. After an error none is begun; what is under way is kept."""
    failed: Exception | None = None

    async def ask_in_turn(client: "AsyncOpenAI") -> None:
        nonlocal failed
        for match, order, key in waiting:
            if failed:
                break
            try:
                reply = await ask_judge(client, judge, match.contest(order), match.question_id)
                verdicts.put(Said(key=key, question_id=match.question_id, order=order, verdict=verdict_in(reply), reply=reply))
                advance(1)
            except Exception as error:
                failed = failed or error

    async with client_of(judge) as client:
        await asyncio.gather(*(ask_in_turn(client) for _ in range(at_once)))
    if failed:
        raise failed


def judged_of(matches: Sequence[Match], said: Sequence[Said]) -> tuple[list[Judged], list[str]]:
    """The questions with a verdict in both orders, and those with an order in which the reply held none (`question_id (order)`).

    One order alone would tell where the judge looks first as well as what it prefers.
    """
    scores: dict[str, list[float]] = {}
    unreadable = []
    for one in said:
        if one.verdict is None:
            unreadable.append(f"{one.question_id} ({one.order})")
        else:
            scores.setdefault(one.question_id, []).append(_SCORES[one.order, one.verdict])
    judged = [
        Judged(
            question_id=match.question_id,
            scores=tuple(scores[match.question_id]),
            length=len(match.answer),
            other_length=len(match.other),
        )
        for match in matches
        if len(scores.get(match.question_id, ())) == len(ORDERS)
    ]
    return judged, unreadable
