"""What engines held when they died: a Ray actor that outlives them, and finds prompts that kill an engine.

An engine's process says what it takes in and what it has answered. When Ray starts it anew after a death, all that it held
has one death more. Prompts with two deaths are suspects: the engine then has half of the worst of them at a time, alone, until
one prompt alone is there when it dies. That one is set aside, and never given to an engine of the checkpoint again.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tpaw_ray.errors import GenerationError

SUSPECT = 2
"""Deaths after which a prompt is given to an engine only apart from others."""
IN_VAIN = 4
"""Deaths in a row without an answer, and without fewer suspects, after which an engine is given up."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a new process of an engine must know."""

    set_aside: frozenset[str]
    deaths: dict[str, int]
    """Of suspects only."""


@dataclass(kw_only=True)
class _Checkpoint:
    deaths: Counter[str] = field(default_factory=Counter)
    set_aside: list[str] = field(default_factory=list)
    most: int | None = None


@dataclass(kw_only=True)
class _Engine:
    held: set[str] = field(default_factory=set)
    processes: int = 0
    in_vain: int = 0
    set_aside_in_a_row: int = 0
    waits: bool = False
    reason: str = ""


class Ledger:
    """The deaths of a run's engines. Plain Python, called in order: `Roster` makes an actor of it.

    >>> ledger = Ledger()
    >>> for _ in range(3):
    ...     record = ledger.start(0, 0)
    ...     ledger.hold(0, 0, ["poison"] if record.deaths else ["good", "poison"])
    >>> ledger.start(0, 0).set_aside
    frozenset({'poison'})
    """

    def __init__(self) -> None:
        self._checkpoints: defaultdict[int, _Checkpoint] = defaultdict(_Checkpoint)
        self._engines: defaultdict[tuple[int, int], _Engine] = defaultdict(_Engine)

    def expect(self, checkpoint: int, most: int) -> None:
        """Say how many prompts of a checkpoint may be set aside."""
        self._checkpoints[checkpoint].most = most

    def start(self, checkpoint: int, replica: int) -> Record:
        """Note that an engine's process begins; if it is not the first, the one before has died.

        Raises:
            GenerationError: when the engine died too often in vain, with what is known of the reason; when more prompts are set
                aside than may be, naming them.
        """
        engine, of = self._engines[checkpoint, replica], self._checkpoints[checkpoint]
        engine.processes += 1
        if engine.processes > 1:
            self._count_death(engine, of)
        engine.waits = False
        in_vain = max(engine.in_vain, engine.set_aside_in_a_row)
        if in_vain >= IN_VAIN:
            raise GenerationError(
                f"checkpoint {checkpoint}: an engine ended {in_vain} times in a row before it answered anything: "
                f"{engine.reason or 'it was killed, perhaps for want of memory'}"
            )
        if of.most is not None and len(of.set_aside) > of.most:
            raise GenerationError(
                f"checkpoint {checkpoint}: {len(of.set_aside)} prompts end the engine whenever they are in it, more than the "
                f"{of.most} that opponents.max_set_aside lets be left out: {', '.join(of.set_aside[:10])}"
            )
        suspects = {prompt: deaths for prompt, deaths in of.deaths.items() if deaths >= SUSPECT}
        return Record(set_aside=frozenset(of.set_aside), deaths=suspects)

    def wait(self, checkpoint: int, replica: int, waits: bool) -> None:
        """Note whether an engine's process has nothing to do until its checkpoint is there: to die then is not its fault."""
        self._engines[checkpoint, replica].waits = waits

    def hold(self, checkpoint: int, replica: int, prompts: Iterable[str]) -> None:
        """Note what an engine is about to take in."""
        self._engines[checkpoint, replica].held |= set(prompts)

    def release(self, checkpoint: int, replica: int, prompts: Iterable[str]) -> None:
        """Note what an engine has answered: it is not what kills it."""
        engine = self._engines[checkpoint, replica]
        engine.in_vain = engine.set_aside_in_a_row = 0
        for prompt in prompts:
            engine.held.discard(prompt)
            self._checkpoints[checkpoint].deaths.pop(prompt, None)

    def explain(self, checkpoint: int, replica: int, reason: str) -> None:
        """Note why an engine is about to die."""
        self._engines[checkpoint, replica].reason = reason

    def _count_death(self, engine: _Engine, of: _Checkpoint) -> None:
        apart = bool(engine.held) and all(of.deaths[prompt] >= SUSPECT for prompt in engine.held)
        of.deaths.update(engine.held)
        if apart and len(engine.held) == 1:
            (prompt,) = engine.held
            of.set_aside.append(prompt)
            del of.deaths[prompt]
            engine.set_aside_in_a_row += 1
        if apart:  # there are fewer suspects than before
            engine.in_vain = 0
        elif not engine.waits:
            engine.in_vain += 1
        engine.held.clear()


def next_suspects(present: Iterable[str], deaths: dict[str, int]) -> list[str]:
    """Which suspects an engine takes in next: half of those with the most deaths, one at least.

    >>> next_suspects(["a", "b", "c", "d"], {"a": 2, "b": 3, "c": 3, "d": 3})
    ['b', 'c']
    """
    waiting = list(present)
    most = max(deaths[prompt] for prompt in waiting)
    worst = [prompt for prompt in waiting if deaths[prompt] == most]
    return worst[: (len(worst) + 1) // 2]
