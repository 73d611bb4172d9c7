"""One driver a run: who is refused, who takes over, and what becomes of the one that lost its claim."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tpaw_ray.errors import RunError
from tpaw_ray.runs.claim import Claim, Holder, holder_of
from tpaw_ray.runs.store import RunStore

HOLD = """
import sys, time
from tpaw_ray.runs.claim import Claim
from tpaw_ray.runs.store import RunStore
with Claim(RunStore.open(sys.argv[1], "run"), print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path):
    return RunStore.open(str(tmp_path), "run")


@pytest.fixture
def driver(tmp_path):
    """Another process that holds the run's claim."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write(store, holder, renewed=0):
    store.write_json(store.path("driver.json"), {"holder": asdict(holder), "renewed": renewed})


def elsewhere():
    return replace(Holder.this_process(), host="far", machine="another boot", pid=7)


def quick(store):
    return Claim(store, print, renew_s=0.05, lease_s=0.5)


def test_a_claim_is_given_back(store):
    with Claim(store, print):
        assert json.loads(Path(store.path("driver.json")).read_text())["holder"]["pid"] == os.getpid()
    assert not store.exists(store.path("driver.json"))
    with Claim(store, print):
        pass


def test_a_second_driver_is_refused_at_once_and_the_first_goes_on(store, driver):
    began = time.monotonic()
    with pytest.raises(RunError, match=rf"process {driver.pid} on .* plays this run; stop it first"), Claim(store, print):
        pass
    assert time.monotonic() - began < 30  # it did not wait for a lease
    assert driver.poll() is None and store.exists(store.path("driver.json"))


def test_the_claim_of_a_killed_driver_is_taken_over(store, driver):
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert store.exists(store.path("driver.json"))
    with Claim(store, print):
        pass


def test_a_driver_that_was_killed_and_not_reaped_is_dead(store, driver):
    driver.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # a zombie now, since nobody has waited for it
    with Claim(store, print):
        pass


def test_a_driver_found_dead_is_waited_for_once(store, capsys):
    write(store, elsewhere())
    claim = quick(store)
    claim.wait_until_free()
    began = time.monotonic()
    with claim:
        assert time.monotonic() - began < 0.4
    assert capsys.readouterr().out.count("process 7 on far played this run; waiting up to 0.5 s") == 1


def test_giving_a_claim_back_leaves_that_of_another_driver_and_hides_no_error(store):
    with pytest.raises(ZeroDivisionError), Claim(store, print):
        write(store, elsewhere())
        raise ZeroDivisionError
    assert store.exists(store.path("driver.json"))


def test_a_later_process_of_the_same_number_is_not_the_driver(store):
    write(store, replace(Holder.this_process(), born="1"))
    with Claim(store, print):
        pass


def test_a_driver_on_another_machine_is_believed_as_long_as_it_renews(store):
    write(store, elsewhere())
    with ThreadPoolExecutor(1) as thread:
        refused = thread.submit(quick(store).__enter__)
        time.sleep(0.15)
        write(store, elsewhere(), renewed=1)
        with pytest.raises(RunError, match="process 7 on far plays this run"):
            refused.result(timeout=30)


def test_a_driver_on_another_machine_that_renews_no_more_is_dead(store):
    write(store, elsewhere())
    with quick(store):
        assert json.loads(Path(store.path("driver.json")).read_text())["holder"]["pid"] == os.getpid()


def test_a_driver_that_lost_its_claim_stops_and_says_so(store):
    with pytest.raises(RunError, match="process 7 on far took this run over"), quick(store):
        write(store, elsewhere())
        time.sleep(30)  # interrupted
    assert json.loads(Path(store.path("driver.json")).read_text())["holder"]["host"] == "far"


def test_of_two_that_begin_together_one_goes_on(store):
    claims = [Claim(store, print, renew_s=0.05) for _ in range(2)]
    claims[0].wait_until_free()
    claims[1].wait_until_free()
    claims[1]._write(0)
    claims[0]._write(0)
    assert claims[0]._read()[0] == claims[0]._me
    with pytest.raises(RunError, match="plays this run"):
        claims[1]._check_it_is_ours()


CLAIM = {"holder": asdict(elsewhere()), "renewed": 0}
DAMAGED = {
    "no object": ([], r"not a driver's claim \(found \[\]"),
    "no holder": ({"holder": 3, "renewed": 0}, r"not a driver's claim \(holder: found 3"),
    "a holder without a machine": ({"holder": {"token": "a"}, "renewed": 0}, r"not a driver's claim \(holder.host: missing"),
    "a process of no number": (CLAIM | {"holder": CLAIM["holder"] | {"pid": "\0"}}, r"not a driver's claim \(holder.pid: found"),
    "never renewed": ({"holder": CLAIM["holder"]}, r"not a driver's claim \(renewed: missing"),
}


@pytest.mark.parametrize(("content", "told"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_claim_is_named(store, content, told):
    store.write_json(store.path("driver.json"), content)
    for ask in (Claim(store, print).__enter__, lambda: holder_of(store)):
        with pytest.raises(RunError, match=rf"driver.json: {told}.*; remove it if no driver plays this run"):
            ask()


def test_a_claim_without_end_is_named(store):
    store.write_bytes(store.path("driver.json"), b"[" * 100_000)
    with pytest.raises(RunError, match=r"driver.json: not valid JSON"):
        holder_of(store)


def test_the_holder_of_a_claim_is_known_to_whoever_asks(store):
    assert holder_of(store) is None
    with Claim(store, print):
        assert (holder_of(store).pid, holder_of(store).is_dead()) == (os.getpid(), False)
    assert holder_of(store) is None
    store.write_json(store.path("driver.json"), {"holder": CLAIM["holder"] | {"later": 1}, "renewed": 3})
    assert holder_of(store) == Holder(**CLAIM["holder"])
