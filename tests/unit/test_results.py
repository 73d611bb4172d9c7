"""The page of results, from numbers that are made up."""

import copy
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tpaw_ray.experiment.design import START
from tpaw_ray.experiment.table import Scores, as_json, make_table

PAGE = runpy.run_path(str(Path(__file__).parents[2] / "docs/results.py"))
WRITTEN = PAGE["PAGE"].read_text(encoding="utf-8")
METHODS = ("tpaw", "spin", "without-target-weights", "without-player-weights", "without-team", "more-sft")


@pytest.fixture(scope="module")
def result():
    scores = {
        name: dict.fromkeys(("best", "last"), Scores.of([0.5 + 0.01 * place, 0.6, 0.7], [1, 2, 3], [1000] * 3))
        for place, name in enumerate((START, *METHODS))
    }
    band = {"x": [0, 1, 2], "mean": [0.5, 0.6, 0.7], "deviation": [0.1, None, 0.1]}
    point = {"settings": {"learner.learning_rate": 1e-4}, "accuracy": 0.625}
    worse = {"settings": {"learner.learning_rate": 3e-4}, "accuracy": None}
    return {
        "table": as_json(make_table([0, 1, 2], scores, [START, "spin"], {"spin": [1]})),
        "choices": {name: {"settings": point["settings"], "points": [point, worse], "at_edge": []} for name in METHODS},
        "protocol": [{"event": "tuned", "at": "2026-01-31T12:00:00+00:00"}],
        "curves": [
            {"method": name, "bands": {"accuracy": band} | ({} if name == "more-sft" else dict.fromkeys(PAGE["PANELS"], band))}
            for name in METHODS
        ],
    }


def test_tables_stand_in_their_places_and_what_is_written_between_them_stays(result):
    spin, tpaw, earlier = (copy.deepcopy(result) for _ in range(3))
    spin["table"][2]["last"]["values"] = [0.1234, 0.2, 0.3]
    spin["choices"]["spin"]["points"][0]["accuracy"] = 0.135
    tpaw["table"][1]["last"]["values"] = [0.9, 0.91, 0.95]
    tpaw["choices"]["tpaw"]["points"][0]["accuracy"] = 0.136
    earlier["table"][1]["best"]["mean"] = 0.4321
    tables = PAGE["blocks"](result, spin, tpaw, earlier)
    once = PAGE["render"](WRITTEN, tables)
    assert "| tpaw | 3 | 0.6033 ± 0.0950 |" in once  # (0.51 + 0.6 + 0.7) / 3
    assert "| more-sft | 0.560 | 0.600 | 0.700 |" in once
    assert "| spin | learning_rate 0.0003 | given up |" in once
    assert "\nAccuracies are of 1000 judged answers each.\n" in once
    assert "\nspin, seed 1: the run diverged;" in once
    assert "tuned 2026-01-31T12:00:00+00:00." in once
    finer = ("| spin | 0.123 | 0.200 | 0.300 |", "| tpaw | 0.900 | 0.910 | 0.950 |", "| tpaw | spin | last | +0.7122 |")
    finer += ("| spin | learning_rate 0.0001 | 0.135 |", "| tpaw | learning_rate 0.0001 | 0.136 |")
    assert {line: once.count(line) for line in finer} == dict.fromkeys(finer, 1)
    assert once.count("| tpaw | 3 | 0.4321 ± 0.0950 |") == 1  # in the earlier study
    written = once.replace("The order:", "The order, by hand:")
    assert PAGE["render"](written, tables) == written


def test_a_page_that_lacks_a_place_is_refused(result):
    with pytest.raises(ValueError, match="found 0 places <!-- grid -->, expected 1"):
        PAGE["render"](WRITTEN.replace("<!-- grid -->", ""), PAGE["blocks"](result, result, result, result))


@pytest.mark.parametrize(("name", "table"), [("small-study-quick", [{}]), ("small-study", [])])
def test_what_is_not_the_finished_study_is_not_taken(tmp_path, name, table):
    (tmp_path / "experiment.json").write_text(json.dumps({"name": name, "table": table, "protocol": []}))
    with pytest.raises(SystemExit, match=f"expected {' or '.join(PAGE['COMMANDS'])} with its table; found {name}"):
        PAGE["take"](str(tmp_path))


def test_each_study_is_taken_to_the_file_that_the_page_reads(tmp_path, monkeypatch, result):
    monkeypatch.setitem(PAGE["take"].__globals__, "RESULTS", tmp_path)
    monkeypatch.setitem(PAGE["take"].__globals__, "gather_experiment", lambda store: SimpleNamespace(environment={}, curves=[]))
    for number, name in enumerate(PAGE["COMMANDS"]):
        folder = tmp_path / name
        folder.mkdir()
        table = copy.deepcopy(result["table"])
        table[1]["last"] |= {"values": [0.7, 0.99, 0.99 - 0.001 * number], "high": 1.31}
        (folder / "experiment.json").write_text(json.dumps({**result, "name": name, "table": table, "failures": []}))
        PAGE["take"](str(folder))
        found = PAGE["read"](PAGE["_file_of"](name))["table"]
        assert found[1]["last"]["values"] == table[1]["last"]["values"]
        assert found[1]["last"]["high"] == 1.0  # as an earlier version had written it, beyond what an accuracy can be
        assert [row["method"] for row in found] == [START, *METHODS] and found[2]["given_up"] == [1]
        assert {one["to"] for row in found for one in row["comparisons"]} == {START, "spin"}
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "small_study.json",
        "small_study_finer.json",
        "small_study_finer_tpaw.json",
    }


def test_pictures_name_every_method_and_are_the_same_again(result, tmp_path):
    pytest.importorskip("matplotlib")
    PAGE["draw"](result, tmp_path)
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert pictures.keys() == {"small-study.svg", "small-study-learning.svg"}
    for name in (START, *METHODS):
        assert re.search(rf">{name}<", pictures["small-study.svg"].decode())
    PAGE["draw"](result, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == pictures
