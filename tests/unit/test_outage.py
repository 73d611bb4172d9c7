"""A store whose port is really closed, objects that are damaged, and a node's copies of them."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tpaw_ray.errors import RunError
from tpaw_ray.runs import address, copies
from tpaw_ray.runs.copies import copy_of
from tpaw_ray.runs.store import RunStore

BIG = os.urandom(1 << 20) * 24


@pytest.fixture
def store(bucket):
    return RunStore.open(bucket, "demo")


@pytest.fixture
def impatient(monkeypatch, bucket):
    """A store that is tried once."""
    monkeypatch.setattr(address, "ATTEMPTS", 1)
    return RunStore.open(bucket, "demo")


@pytest.fixture
def shut_after(s3, monkeypatch):
    """Shuts the door once so many bytes have gone through it; opens it after so many seconds, or at the test's end."""
    timers = []

    def plan(size, seconds=None):
        left = [size]

        def on_traffic(received):
            left[0] -= received
            if left[0] < 0:
                monkeypatch.setattr(s3, "on_traffic", lambda _: None)
                s3.shut_door()
                if seconds:
                    timers.append(threading.Timer(seconds, s3.open_door))
                    timers[-1].start()

        monkeypatch.setattr(s3, "on_traffic", on_traffic)

    yield plan
    for timer in timers:
        timer.join()
    if s3.listener.fileno() < 0:
        s3.open_door()


def test_a_write_goes_on_after_the_store_was_away_for_two_seconds(store, shut_after):
    shut_after(len(BIG) // 2, seconds=2)
    began = time.monotonic()
    store.write_bytes(store.path("big"), BIG)
    assert time.monotonic() - began > 2
    assert store.read_bytes(store.path("big")) == BIG


def test_a_read_goes_on_after_the_store_was_away_for_two_seconds(store, shut_after):
    store.write_bytes(store.path("big"), BIG)
    shut_after(len(BIG) // 2, seconds=2)
    began = time.monotonic()
    assert store.read_bytes(store.path("big")) == BIG
    assert time.monotonic() - began > 2


def test_a_write_into_a_store_that_stays_away_is_told_leaves_nothing_and_succeeds_later(s3, impatient, shut_after):
    store, path = impatient, impatient.path("d", "big")
    shut_after(len(BIG) // 2)
    with pytest.raises(RunError, match=r"cannot be written: .*the same command continues the run") as raised:
        store.write_bytes(path, BIG)
    assert str(raised.value).startswith(f"{path}: ")
    s3.open_door()
    assert not store.exists(path) and store.files(store.path("d")) == []
    store.write_bytes(path, BIG)
    assert store.read_bytes(path) == BIG


@pytest.mark.parametrize("size", [0, len(BIG) // 2])
def test_a_folder_whose_upload_breaks_off_is_not_committed(s3, impatient, shut_after, size):
    store, directory = impatient, impatient.checkpoint(1)

    def make():
        with store.making(directory) as folder:
            (folder / "weights").write_bytes(BIG)
            (folder / "config.json").write_text("{}")
            shut_after(size)

    with pytest.raises(RunError, match="checkpoints/001"):
        make()
    s3.open_door()
    assert not store.is_committed(directory)
    s3.on_traffic = lambda _: None
    with store.making(directory) as folder:
        (folder / "weights").write_bytes(b"again")
    store.commit(directory)
    assert store.files(directory) == [f"{directory}/weights"]
    store.verify(directory)


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.exists(store.path("a")),
        lambda store: store.read_bytes(store.path("a")),
        lambda store: store.num_rows(store.path("a")),
        lambda store: store.key_of(store.path("a")),
        lambda store: store.files(store.path("a")),
        lambda store: store.check_writable(),
        lambda store: store.on_disk(store.path("a")),
    ],
    ids=["exists", "read_bytes", "num_rows", "key_of", "files", "check_writable", "on_disk"],
)
def test_whatever_is_asked_of_a_store_that_is_away_is_told_and_nothing_is_called_damaged(s3, impatient, shut_after, act):
    s3.shut_door()
    with pytest.raises(RunError, match=f"^{impatient.root}.*the same command continues the run") as raised:
        act(impatient)
    assert "remove" not in str(raised.value)


def test_a_bucket_that_is_not_there_is_named(s3):
    store = RunStore.open("s3://no-such-bucket/runs", "demo")
    with pytest.raises(RunError, match=r"^s3://no-such-bucket/runs/demo\.writable: cannot be written: .*bucket"):
        store.check_writable()


def test_a_check_of_the_place_leaves_nothing_there(store):
    store.check_writable()
    assert store.files(store.root) == [] and not store.exists(store.root)


@pytest.fixture
def checkpoint(store):
    """A committed checkpoint of two files."""
    directory = store.checkpoint(3)
    with store.making(directory) as folder:
        (folder / "weights").write_bytes(BIG)
        (folder / "config.json").write_text("{}")
    store.commit(directory)
    return directory


def test_a_copy_holds_the_files_and_is_fetched_once(store, checkpoint):
    copy = store.on_disk(checkpoint)
    assert sorted(os.listdir(copy)) == ["committed.json", "config.json", "weights"]
    with open(f"{copy}/weights", "rb") as file:
        assert file.read() == BIG
    store.filesystem.delete_file(store.at(f"{checkpoint}/weights"))
    assert store.on_disk(checkpoint) == copy


def test_a_checkpoint_that_was_made_again_is_fetched_again(store, checkpoint):
    copy = store.on_disk(checkpoint)
    store.write_bytes(f"{checkpoint}/config.json", b"[]")
    store.commit(checkpoint)
    assert store.on_disk(checkpoint) != copy


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: content[:7] + bytes([content[7] ^ 1]) + content[8:]],
    ids=["cut", "bit"],
)
def test_a_damaged_file_is_refused_by_name_and_no_copy_is_kept(store, checkpoint, damage):
    whole = store.read_bytes(f"{checkpoint}/weights")
    store.write_bytes(f"{checkpoint}/weights", damage(whole))
    with pytest.raises(RunError, match=f"^{checkpoint}/weights: differs from what was committed; remove {checkpoint} "):
        store.on_disk(checkpoint)
    assert [path for path in copies.cache_folder().iterdir() if path.is_dir()] == []
    store.write_bytes(f"{checkpoint}/weights", whole)
    assert sorted(os.listdir(store.on_disk(checkpoint))) == ["committed.json", "config.json", "weights"]


def test_a_folder_on_a_disk_is_its_own_copy(tmp_path):
    store = RunStore.open(str(tmp_path), "demo")
    assert store.on_disk(store.checkpoint(0)) == store.checkpoint(0)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TPAW_CACHE", str(tmp_path / "cache"))
    return copies.cache_folder()


def test_of_many_who_ask_at_once_one_fills_the_copy_and_the_others_wait(cache):
    filled = []

    def fill(folder):
        time.sleep(0.2)
        (folder / "a").write_text("whole")
        filled.append(folder)

    with ThreadPoolExecutor(8) as threads:
        found = {threads.submit(copy_of, "key", fill) for _ in range(8)}
        assert {copy.result() for copy in found} == {str(cache / "key")}
    assert len(filled) == 1


def test_what_a_killed_process_left_half_filled_is_not_taken_for_a_copy(cache):
    (cache / "key.writing").mkdir()
    (cache / "key.writing" / "half").write_text("")
    copy = copy_of("key", lambda folder: (folder / "whole").touch())
    assert os.listdir(copy) == ["whole"]


def test_old_copies_make_room_but_for_the_last_few_and_those_asked_for_of_late(cache):
    def asked_s_ago(name, seconds):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - seconds,) * 2)

    for age in range(copies.KEPT + 2):
        asked_s_ago(f"old{age}", 7200 + age)
    copy_of("new", lambda folder: None)
    # the oldest two are beyond the last few
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"new", *(f"old{age}" for age in range(copies.KEPT))}
    for age in range(copies.KEPT + 2):
        asked_s_ago(f"fresh{age}", age)
    copy_of("newer", lambda folder: None)
    left = {path.name for path in cache.iterdir() if path.is_dir()}
    assert left == {"new", "newer", *(f"fresh{age}" for age in range(copies.KEPT + 2))}
