"""Copying folders between a disk and an object store, and the copies a node keeps for what loads from a disk only."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from pyarrow import fs

from tpaw_ray.errors import RunError
from tpaw_ray.wording import shorten

BLOCK = 1 << 23
"""Bytes that are read at once of a file of any size."""
KEPT = 6
"""Copies that are kept however old they are."""
FRESH_S = 3600.0
"""Copies that were asked for so recently are kept however many they are: somebody may still be loading one."""


def cache_folder() -> Path:
    """`TPAW_CACHE`, or a folder of the user's own among the temporary ones. It may be removed while nothing runs."""
    folder = Path(os.environ.get("TPAW_CACHE") or Path(tempfile.gettempdir(), f"tpaw-{os.getuid()}"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def copy_of(key: str, fill: Callable[[Path], None]) -> str:
    """The folder of a key, which `fill` fills at the first call; other processes of the node wait for it.

    A folder that was filled in part is not taken for a copy.
    """
    copy = cache_folder() / key
    with _lock(copy):
        if not copy.is_dir():
            _make_room()
            beside = copy.with_suffix(".writing")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            try:
                fill(beside)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise
            beside.rename(copy)
        os.utime(copy)
    return str(copy)


def _make_room() -> None:
    for begun in cache_folder().glob("*.writing"):  # by processes that were killed
        if time.time() - _asked_s(begun) > FRESH_S:
            shutil.rmtree(begun, ignore_errors=True)
    copies = sorted((path for path in cache_folder().iterdir() if path.is_dir() and not path.suffix), key=_asked_s)
    for copy in copies[:-KEPT]:
        with _lock(copy):
            if time.time() - _asked_s(copy) > FRESH_S:
                shutil.rmtree(copy, ignore_errors=True)


def _asked_s(copy: Path) -> float:
    """When a copy was last asked for, in Unix time; 0 for one that is gone."""
    return copy.stat().st_mtime if copy.exists() else 0.0


def _lock(copy: Path) -> FileLock:
    return FileLock(copy.with_suffix(".lock"))


def copy_all(source: fs.FileSystem, folder: str, destination: fs.FileSystem, directory: str) -> None:
    """Copy the files of a folder, several at once. (`pyarrow.fs.copy_files` keeps silent when the end of an upload fails.)

    Raises:
        RunError: for a name that would lead out of `directory`; an object store takes any.
    """

    def copy(name: str) -> None:
        path = f"{directory}/{name}"
        if isinstance(destination, fs.LocalFileSystem):
            destination.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with source.open_input_stream(f"{folder}/{name}") as whole, destination.open_output_stream(path) as copied:
            shutil.copyfileobj(whole, copied, BLOCK)

    found = source.get_file_info(fs.FileSelector(folder, recursive=True))
    names = [info.path.removeprefix(f"{folder}/") for info in found if info.type == fs.FileType.File]
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise RunError(f"{folder}: holds {shorten(name)}, which would lead out of the folder it is copied to; remove it")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(copy, names))
