"""The kill matrix: one run a victim, killed at every place in turn, ends as one that was never disturbed."""

import time

import pytest
from rich.console import Console
from rich.table import Table

from tests.e2e.test_run import write_config
from tests.faults.matrix import PLACES, SAVED, VICTIMS
from tests.faults.runs import Victim, contents
from tests.tiny import merging_tokenizer, write_tiny_model

IDENTICAL, ABSENT = "identical", "–"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    write_tiny_model(folder / "model", tokenizer=merging_tokenizer())
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    config = write_config(folder, "undisturbed")
    Victim(["run", str(config), *SAVED], folder / "faults-undisturbed").finish()
    return contents(folder / "runs/undisturbed")


@pytest.fixture(scope="module")
def table():
    cells = {}
    yield cells
    shown = Table(title="killed there, and went on; files compared with those of an undisturbed run")
    for column in ("stage: where", *VICTIMS):
        shown.add_column(column)
    for place in PLACES:
        shown.add_row(place, *(cells.get((place, victim), "") for victim in VICTIMS))
    Console(width=140).print("\n", shown)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_that_is_killed_everywhere_ends_like_one_that_was_not(folder, undisturbed, table, victim):
    name = f"killed-{victim.split()[0]}"
    config, root = write_config(folder, name), folder / "runs" / name
    run = Victim(["run", str(config), *SAVED], folder / f"faults-{name}")
    expected = undisturbed | {"config.yaml": None}
    began = time.monotonic()
    for place, was_there in run.killed_at(PLACES, victim):
        table[place, victim] = IDENTICAL if was_there else ABSENT
        differing = [file for file, digest in contents(root, committed_only=True).items() if digest != expected.get(file)]
        assert not differing, f"{place}: {differing}"
        print(f"{victim}, {place}: {table[place, victim]} ({time.monotonic() - began:.0f} s)", flush=True)
    run.finish()
    found = contents(root) | {"config.yaml": None}
    assert {file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file)} == set()
    print(f"{victim}: {time.monotonic() - began:.0f} s")
