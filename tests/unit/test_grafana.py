"""The Grafana dashboard shows metrics that there are."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

from tests.unit.test_trackers import rows_at
from tpaw_ray.runs.summary import Row
from tpaw_ray.tracking.entries import of_step

DASHBOARD = Path(__file__).parents[2] / "cluster/grafana/tpaw.json"
OF_STAGES_AND_ENGINES = {"tpaw_stage_done", "tpaw_stage_total", "tpaw_engine_sequences"}


def gauge_of(name):
    return f"tpaw_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"


def test_every_panel_asks_for_metrics_that_a_run_exports():
    board = json.loads(DASHBOARD.read_text())
    known = {gauge_of(name) for name in of_step(asdict(replace(rows_at(0, 0)[0], grad_norm=1.0)), 0).values}
    known |= {gauge_of(f"train/player_weight/{place}") for place in range(3)}
    known |= {gauge_of(f"checkpoint/{name}") for name in Row.__dataclass_fields__}
    known |= OF_STAGES_AND_ENGINES
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    names = {name for text in asked for name in re.findall(r"ray_(\w+)", text)}
    assert names and names <= known
    for name in OF_STAGES_AND_ENGINES:
        sources = "".join(path.read_text() for path in (DASHBOARD.parents[2] / "tpaw_ray").rglob("*.py"))
        assert name in sources or name.rsplit("_", 1)[0] + "_{name}" in sources, name


def test_panels_do_not_lie_over_each_other():
    places = [tuple(panel["gridPos"].values()) for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(places) == len(set(places))
