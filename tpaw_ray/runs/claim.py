"""One driver a run: whoever plays a run holds its claim, a file that is renewed while the driver lives.

On the same machine a dead driver is known at once, by its process. On another one it is dead when its claim was not renewed
for `LEASE_S` seconds; a second driver watches for as long, by its own clock, before it takes over.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from tpaw_ray.errors import RunError
from tpaw_ray.plain_json import misfit
from tpaw_ray.processes import interrupt
from tpaw_ray.runs.store import RunStore

RENEW_S = 10.0
LEASE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a claim. `machine` tells boots and containers apart, `born` a process from a later one of the same number."""

    token: str
    host: str
    machine: str
    pid: int
    born: str

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(
            token=uuid.uuid4().hex, host=socket.gethostname(), machine=_machine(), pid=os.getpid(), born=_born(os.getpid())
        )

    def is_dead(self) -> bool | None:
        """Whether its process has ended; None where that cannot be seen from here."""
        return None if self.machine != _machine() else self.born != _born(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


CLAIM = {"holder": {field.name: field.type for field in fields(Holder)}, "renewed": int}
"""The shape of `driver.json` (`plain_json.misfit`)."""


class Claim:
    """The claim of this process on a run, held in a `with` block and given back at its end.

    Raises:
        RunError: at the beginning when another driver plays this run; at the end when another one took the claim over because
            this process did not renew it, on which its thread is interrupted.
    """

    def __init__(
        self, store: RunStore, say: Callable[[str], object], *, renew_s: float = RENEW_S, lease_s: float = LEASE_S
    ) -> None:
        self._store = store
        self._say = say
        self._dead: tuple[Holder, int] | None = None
        self._path = _path(store)
        self._renew_s, self._lease_s = renew_s, lease_s
        self._me = Holder.this_process()
        self._over = threading.Event()
        self._taken_by: Holder | None = None
        self._renewing = threading.Thread(target=self._renew, name="claim", daemon=True)

    def __enter__(self) -> "Claim":
        self.wait_until_free()
        self._write(0)
        self._check_it_is_ours()
        self._holding_thread = threading.get_ident()
        self._renewing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._renewing.join(timeout=self._renew_s)  # a store that does not answer is not waited for
        if self._taken_by:
            raise RunError(f"{self._store.root}: {self._taken_by} took this run over, because this one did not renew its claim")
        with suppress(RunError):  # left behind, it is the claim of a dead driver
            found = self._read()
            if found and found[0] == self._me:
                self._store.remove(self._path)

    def wait_until_free(self) -> None:
        """Return when nobody holds the claim: at once, or when a driver on another machine has not renewed it for a lease.

        Raises:
            RunError: when another driver plays this run.
        """
        found = self._read()
        if found is None or found[0].is_dead() or found == self._dead:
            return
        if found[0].is_dead() is None:
            self._say(f"{found[0]} played this run; waiting up to {self._lease_s:g} s to see whether it still does")
        deadline = time.monotonic() + self._lease_s
        while found[0].is_dead() is None and time.monotonic() < deadline:
            time.sleep(min(1.0, self._renew_s))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise self._refusal(now[0])
        if found[0].is_dead() is False:
            raise self._refusal(found[0])
        self._dead = found

    def _check_it_is_ours(self) -> None:
        found = self._read()
        if found is None or found[0] != self._me:  # two began at the same moment: it is the later one's
            raise self._refusal(found[0] if found else None)

    def _refusal(self, holder: Holder | None) -> RunError:
        who = holder or "another process"
        return RunError(
            f"{self._store.root}: {who} plays this run; stop it first, or choose another run.name ({self._path} is its claim)"
        )

    def _read(self) -> tuple[Holder, int] | None:
        return _claim_on(self._store)

    def _write(self, renewed: int) -> None:
        self._store.write_json(self._path, {"holder": asdict(self._me), "renewed": renewed})

    def _renew(self) -> None:
        renewed = 0
        while not self._over.wait(self._renew_s):
            with suppress(RunError):  # a store that does not answer now may do so in time
                found = self._read()
                if found and found[0] != self._me:
                    self._taken_by = found[0]
                    interrupt(self._holding_thread)
                    return
                renewed += 1
                self._write(renewed)


def holder_of(store: RunStore) -> Holder | None:
    """Who holds the claim on a run, dead or alive (`Holder.is_dead`); None where nobody does.

    Raises:
        RunError: when `driver.json` is damaged.
    """
    found = _claim_on(store)
    return found[0] if found else None


def _claim_on(store: RunStore) -> tuple[Holder, int] | None:
    """Who holds the claim, and how often it was renewed; None where nobody does."""
    path = _path(store)
    if not store.exists(path):
        return None
    content: dict[str, Any] = store.read_json(path)
    if wrong := misfit(content, CLAIM):
        raise RunError(f"{path}: not a driver's claim ({wrong}); remove it if no driver plays this run")
    return Holder(**{field.name: content["holder"][field.name] for field in fields(Holder)}), content["renewed"]


def _path(store: RunStore) -> str:
    return store.path("driver.json")


def _machine() -> str:
    """The boot of this machine, and the container on it whose process ids count here."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


def _born(pid: int) -> str:
    """When a process began, in ticks since the boot (proc(5)); empty where none of that number lives."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if state in "ZX" else fields[18]
    except (FileNotFoundError, ProcessLookupError):
        return ""
