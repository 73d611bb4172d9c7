"""An opponent: a Ray actor that hosts one checkpoint in a vLLM engine and answers any number of calls at once.

    calls (event loop) ──inbox──► engine thread: take what came in, step, hand back what ended ──► futures of the calls

The engine steps as long as any call waits, and what comes in meanwhile joins the running batch: no call waits for another's
batch to end.
"""

import asyncio
import gc
import itertools
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError
from ray.util.metrics import Gauge

from tpaw_ray.errors import CheckpointError, GenerationError, TpawError
from tpaw_ray.faults import Place, reached
from tpaw_ray.opponents.ledger import Record, next_suspects
from tpaw_ray.opponents.messages import (
    SET_ASIDE,
    EngineFailure,
    EngineSettings,
    EngineStats,
    Request,
    Response,
    Sampling,
    Seat,
)
from tpaw_ray.policy.directory import check_adapter_files
from tpaw_ray.runs.store import RunStore

if TYPE_CHECKING:
    from tpaw_ray.opponents.engine import Engine

FAREWELL_S = 1.0
"""How long a process with a broken engine lives on, for its last replies to leave."""


class Opponent:
    """Answers prompts as one checkpoint. Wrapped by `Roster` with `ray.remote`; its methods are the actor's.

    The process imports vLLM at once, then waits for `ready_file`, then starts the engine: an opponent can be under way while
    its checkpoint is still in the making. An engine that breaks down takes its process with it, for Ray to start another.
    """

    def __init__(self, settings: EngineSettings, seat: Seat, ledger: Any) -> None:
        self._settings = settings
        self._seat = seat
        self._checkpoint = seat.path
        self._ready_file = seat.ready_file
        self._ledger = ledger
        self._key = (seat.checkpoint, seat.replica)
        self._store = RunStore.around(seat.path)
        self._inbox: SimpleQueue[_Call] = SimpleQueue()
        self._started: Future[float] = Future()
        self._broken = False
        self._folders = {"": ""}
        """Of adapters, on this node, by their paths."""
        self._waiting: dict[str, tuple[_Call, int]] = {}
        self._suspects: list[tuple[_Call, int]] = []
        self._record = Record(set_aside=frozenset(), deaths={})
        self._import_s = 0.0
        self._sequences = self._generated_tokens = self._most_in_flight = 0
        self._queue = Gauge("tpaw_engine_sequences", "Sequences that an engine has", ("run", "checkpoint", "replica"))
        run = seat.path.split("/checkpoints/")[0].rsplit("/", 1)[-1]
        self._queue.set_default_tags({"run": run, "checkpoint": str(seat.checkpoint), "replica": str(seat.replica)})
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def ready(self) -> float:
        """Wait for the engine; returns the seconds it took to start, counted from the checkpoint being there.

        Raises:
            CheckpointError: when the checkpoint's folder is missing or incomplete.
            GenerationError: when the engine could not start, with vLLM's reason.
        """
        return await asyncio.shield(asyncio.wrap_future(self._started))

    @ray.method(retry_exceptions=[EngineFailure])
    async def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        """Answer requests, in their order.

        Raises:
            GenerationError: for a prompt that leaves no room for a response or holds ids outside the vocabulary, naming it.
            EngineFailure: when the engine broke down; Ray then asks the next process, as often as the actor's options allow.
        """
        await self.ready()
        if self._broken:
            # This process is about to end, and what waits here is then asked again in the next one.
            await asyncio.Event().wait()
        for request in requests:
            self._check(request)
        if not requests:
            return []
        call = _Call(requests, sampling, asyncio.get_running_loop())
        self._inbox.put(call)
        return await call.answer

    async def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return EngineStats(
            pid=os.getpid(),
            import_s=self._import_s,
            start_s=await self.ready(),
            sequences=self._sequences,
            generated_tokens=self._generated_tokens,
            in_flight=len(self._waiting),
            most_in_flight=self._most_in_flight,
        )

    def _check(self, request: Request) -> None:
        length, longest = len(request.prompt_tokens), self._settings.max_length
        if not 0 < length < longest:
            raise GenerationError(
                f"prompt {request.prompt_id}: {length} tokens; expected 1 to {longest - 1}, so that a response fits in {longest}"
            )
        # An id beyond the embedding would not fail alone: it breaks the whole batch.
        strange = [token for token in request.prompt_tokens if not 0 <= token < self._vocabulary]
        if strange:
            raise GenerationError(f"prompt {request.prompt_id}: token id {strange[0]}; the vocabulary has {self._vocabulary}")

    # The engine's thread.

    def _run(self) -> None:
        try:
            self._record = _begin(self._ledger, self._key)
            self._await_checkpoint()
            began = time.monotonic()
            engine = self._load_engine()
            self._vocabulary = engine.vocabulary
            self._started.set_result(time.monotonic() - began)
        except BaseException as error:
            self._started.set_exception(_start_error(error, self._checkpoint))
            return
        try:
            while True:
                self._step(engine)
        except BaseException as error:
            self._break_down(error)

    def _await_checkpoint(self) -> None:
        if self._store.exists(self._ready_file):
            check_checkpoint(self._store.on_disk(self._checkpoint))  # a damaged one is found before the long import
        prepare_process(self._settings)
        began = time.monotonic()
        self._import_engine()
        self._import_s = time.monotonic() - began
        ray.get(self._ledger.wait.remote(*self._key, True))
        while not self._store.exists(self._ready_file):
            time.sleep(self._store.poll_s)
        ray.get(self._ledger.wait.remote(*self._key, False))

    def _import_engine(self) -> None:
        # Looking for garbage among the million objects of this import takes a tenth of its 13 s.
        gc.disable()
        try:
            import tpaw_ray.opponents.engine  # noqa: F401
        finally:
            gc.enable()

    def _load_engine(self) -> "Engine":
        from tpaw_ray.opponents.engine import Engine

        folder = self._store.on_disk(self._checkpoint)
        check_checkpoint(folder)
        return Engine(self._settings, folder)

    def _step(self, engine: "Engine") -> None:
        self._fill(engine)
        self._most_in_flight = max(self._most_in_flight, len(self._waiting))
        self._queue.set(len(self._waiting))
        answered = []
        for finished in engine.step():
            call, index = self._waiting.pop(finished.key)
            self._sequences += 1
            self._generated_tokens += len(finished.tokens)
            answered.append(call.requests[index].prompt_id)
            call.put(index, finished.tokens, finished.finish_reason)
        self._queue.set(len(self._waiting))
        if answered:
            self._ledger.release.remote(*self._key, answered)

    def _fill(self, engine: "Engine") -> None:
        # Sleeps in the inbox when there is nothing to generate, and only then. Suspects are alone in the engine, and so is a
        # call where that is what makes its responses repeatable.
        while True:
            apart = self._suspects or self._settings.repeatable
            if self._waiting and (apart or self._inbox.empty()):
                return
            if self._suspects:
                self._take_suspects(engine)
            else:
                self._take(engine, self._inbox.get())

    def _take(self, engine: "Engine", call: "_Call") -> None:
        known = self._record
        for index, request in enumerate(call.requests):
            if request.prompt_id in known.set_aside:
                call.put(index, [], SET_ASIDE)
        suspects = [index for index, request in enumerate(call.requests) if request.prompt_id in known.deaths]
        self._suspects += [(call, index) for index in suspects]
        apart = known.set_aside | known.deaths.keys()
        self._add(engine, [(call, index) for index, request in enumerate(call.requests) if request.prompt_id not in apart])

    def _take_suspects(self, engine: "Engine") -> None:
        chosen = next_suspects([call.requests[index].prompt_id for call, index in self._suspects], self._record.deaths)
        group = [(call, index) for call, index in self._suspects if call.requests[index].prompt_id in chosen]
        self._suspects = [one for one in self._suspects if one not in group]
        self._add(engine, group)

    def _add(self, engine: "Engine", held: "list[tuple[_Call, int]]") -> None:
        if not held:
            return
        held = [one for one in held if self._has_adapter(*one)]
        prompts = [call.requests[index].prompt_id for call, index in held]
        ray.get(self._ledger.hold.remote(*self._key, prompts))
        for call, index in held:
            request = call.requests[index]
            reached(Place.ANSWER, f"checkpoints/{self._seat.checkpoint:03d}/{request.prompt_id}")
            key = f"{call.number}-{index}"
            try:
                engine.add(key, request, call.sampling, self._folders[request.adapter])
            except ValueError as error:
                # vLLM refuses a request before it changes anything, so only this call is in vain.
                call.fail(GenerationError(f"prompt {request.prompt_id}: refused by the engine: {error}"))
                continue
            self._waiting[key] = (call, index)

    def _has_adapter(self, call: "_Call", index: int) -> bool:
        # Whether a request's adapter is on this node, fetched if need be; else its call fails: in vLLM it would end the engine.
        path = call.requests[index].adapter
        if path and not (path in self._folders and Path(self._folders[path]).is_dir()):  # copies are not kept for ever
            try:
                folder = self._store.on_disk(path)
                check_adapter_files(Path(folder))
            except TpawError as error:
                call.fail(error)
                return False
            self._folders[path] = folder
        return True

    def _break_down(self, error: BaseException) -> None:
        self._broken = True
        failure = EngineFailure(f"the engine of {self._checkpoint} broke down: {type(error).__name__}: {error}")
        self._ledger.explain.remote(*self._key, f"{type(error).__name__}: {error}")
        calls = {call.number: call for call, _ in [*self._waiting.values(), *self._suspects]}
        while not self._inbox.empty():
            call = self._inbox.get()
            calls[call.number] = call
        for call in calls.values():
            call.fail(failure)
        time.sleep(FAREWELL_S)
        # An engine's state cannot be trusted after an error. A process that ends unasked is one that Ray replaces.
        os._exit(1)


def prepare_process(settings: EngineSettings) -> None:
    """Set what torch and vLLM read from the environment while they are imported, and quieten them to errors."""
    fixed = {
        # The engine lives in this process; otherwise another one would import everything again.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if settings.gpus == 0:
        fixed |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Ray sets this to the CPUs it set aside for the actor, which is a scheduling figure.
            "OMP_NUM_THREADS": str(settings.threads or len(os.sched_getaffinity(0))),
        }
    os.environ.update(fixed)
    preferred = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in preferred.items():
        os.environ.setdefault(name, value)
    # vLLM walks through torch's modules and touches every deprecated name on its way.
    warnings.filterwarnings("ignore", category=FutureWarning)


def check_checkpoint(checkpoint: str) -> None:
    """Look into a checkpoint's folder before vLLM does, whose own messages speak of hubs and formats.

    A relative name that is no folder is left to vLLM: it may be a hub's.

    Raises:
        CheckpointError: when the folder is missing, or lacks a readable `config.json` or safetensors files.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        if folder.is_absolute():
            raise CheckpointError(f"{checkpoint}: there is no such folder")
        return
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: config.json cannot be read: {error}") from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{checkpoint}: there are no *.safetensors files")


@dataclass(eq=False)
class _Call:
    """One `generate` call under way: filled by the engine's thread, awaited on the event loop."""

    requests: Sequence[Request]
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[list[Response]]" = field(init=False)
    responses: dict[int, Response] = field(default_factory=dict)
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        self.answer = self.loop.create_future()

    def put(self, index: int, tokens: list[int], finish_reason: str) -> None:
        prompt_id = self.requests[index].prompt_id
        if finish_reason not in ("stop", "length", SET_ASIDE):
            self.fail(GenerationError(f"prompt {prompt_id}: the engine gave up on it ({finish_reason})"))
        self.responses[index] = Response(prompt_id=prompt_id, generated_tokens=tokens, finish_reason=finish_reason)
        if len(self.responses) == len(self.requests):
            self._settle(lambda: self.answer.set_result([self.responses[i] for i in range(len(self.requests))]))

    def fail(self, error: Exception) -> None:
        self._settle(lambda: self.answer.set_exception(error))

    def _settle(self, act: Callable[[], None]) -> None:
        # A call can have been cancelled or have failed meanwhile.
        self.loop.call_soon_threadsafe(lambda: None if self.answer.done() else act())


def _begin(ledger: Any, key: tuple[int, int]) -> Record:
    try:
        return ray.get(ledger.start.remote(*key))
    except RayTaskError as error:
        raise error.cause from error


def _start_error(error: BaseException, checkpoint: str) -> Exception:
    if isinstance(error, TpawError):
        return error
    return GenerationError(f"{checkpoint}: the engine could not start: {type(error).__name__}: {error}")
