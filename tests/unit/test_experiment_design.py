"""The experiment's file: what becomes of it, and what it may not say."""

import pytest
import yaml

from tpaw_ray.errors import ConfigError
from tpaw_ray.experiment.design import dump_design, load_design

FILE = {
    "name": "small",
    "base": {
        "model": {"path": "models/study-{seed}"},
        "data": {"path": "d-{seed}.jsonl", "columns": {"prompt": "q", "target": "a"}},
        "iterations": 3,
    },
    "seeds": [0, 1, 2],
    "tuning": {
        "seeds": [100, 101],
        "grid": {"learner.learning_rate": [1e-5, 1e-4, 1e-3], "objective.reward_scale": [0.1, 1.0]},
    },
    "methods": {
        "tpaw": {"preset": "tpaw"},
        "spin": {"preset": "spin", "learner": {"epochs": 6}},
        "plain": {"preset": "spin", "untuned": ["objective.reward_scale"], "objective": {"reward_scale": 5.0}},
    },
    "baselines": ["start", "spin"],
}


def design_of(folder, quick=False, **changes):
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**FILE, **changes}, sort_keys=False))
    return load_design(path, quick=quick)


def config_of(design, method, settings, seed=0):
    return design.config(method, settings, seed=seed, phase="final", name="x")


def test_a_runs_config_has_base_then_method_then_settings_and_its_own_name_root_and_seed(tmp_path):
    config = config_of(design_of(tmp_path), "spin", {"learner.learning_rate": 2e-5, "objective.reward_scale": 0.3}, seed=7)
    assert (config.run.name, config.run.root, config.run.seed) == ("x", "runs/experiments/small/final", 7)
    assert (config.model.path, config.data.path, config.data.columns.prompt) == ("models/study-7", "d-7.jsonl", "q")
    assert (config.team.size, config.team.window, config.objective.eta) == (1, 2, 1.0)  # SPIN's
    assert (config.learner.epochs, config.learner.learning_rate, config.objective.reward_scale) == (6, 2e-5, 0.3)
    assert config.iterations == 3


def test_every_method_has_the_same_grid_but_for_the_axes_it_does_not_have(tmp_path):
    design = design_of(tmp_path)
    assert design.points("tpaw") == design.points("spin")
    assert [tuple(point.values()) for point in design.points("tpaw")] == [
        (1e-5, 0.1),
        (1e-5, 1.0),
        (1e-4, 0.1),
        (1e-4, 1.0),
        (1e-3, 0.1),
        (1e-3, 1.0),
    ]
    assert design.points("plain") == [{"learner.learning_rate": rate} for rate in (1e-5, 1e-4, 1e-3)]
    assert config_of(design, "plain", design.points("plain")[0]).objective.reward_scale == 5.0


def test_a_method_cannot_set_what_is_tuned(tmp_path):
    design = design_of(tmp_path, methods={"spin": {"learner": {"learning_rate": 1e-3}}}, baselines=["start"])
    with pytest.raises(ConfigError, match=r"small, method spin: sets learner.learning_rate, which tuning.grid chooses"):
        config_of(design, "spin", design.points("spin")[0])
    grid = {"objective.eta": [1, 2]}
    # Presets set η, so the grid would undo them.
    design = design_of(tmp_path, tuning={"seeds": [9], "grid": grid}, methods={"tpaw": {"preset": "tpaw"}}, baselines=["start"])
    with pytest.raises(ConfigError, match=r"method tpaw: sets objective.eta"):
        config_of(design, "tpaw", {"objective.eta": 2})


def test_a_wrong_value_of_the_grid_or_a_method_is_named(tmp_path):
    design = design_of(tmp_path)
    with pytest.raises(ConfigError, match=r"small, method spin: learner.learning_rate: .*found -1"):
        config_of(design, "spin", {"learner.learning_rate": -1})
    with pytest.raises(ConfigError, match=r"learner.learning_rat: unknown key; did you mean learner.learning_rate"):
        config_of(design, "spin", {"learner.learning_rat": 1})
    design = design_of(tmp_path, methods={"x": {"preset": "spni"}}, baselines=["start"])
    with pytest.raises(ConfigError, match=r"small, method x: preset: found 'spni', expected one of tpaw, spin"):
        config_of(design, "x", {})


def test_a_base_may_be_a_runs_config_beside_the_file_whose_own_run_is_left_out(tmp_path):
    run = {"preset": "spin", "run": {"name": "alone", "seed": 3}, "model": {"path": "m"}, "data": {"path": "d"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = config_of(design_of(tmp_path, base="run.yaml", methods={"a": {}}, baselines=["start"], tuning=None), "a", {})
    assert (config.run.name, config.run.seed, config.team.window) == ("x", 0, 2)


def test_the_file_written_down_is_one_that_gives_the_same_design(tmp_path):
    design = design_of(tmp_path)
    (tmp_path / "again.yaml").write_text(dump_design(design))
    assert load_design(tmp_path / "again.yaml") == design


def test_quick_keeps_every_method_and_cuts_the_rest_under_another_name(tmp_path):
    design = design_of(tmp_path, quick=True)
    assert (design.name, design.seeds, design.tuning.seeds) == ("small-quick", [0, 1], [100])
    assert design.tuning.grid == {"learner.learning_rate": [1e-5, 1e-4], "objective.reward_scale": [0.1]}
    assert list(design.methods) == ["tpaw", "spin", "plain"]
    config = config_of(design, "tpaw", design.points("tpaw")[0])
    assert (config.iterations, config.data.limit, config.evaluation.limit) == (1, 256, 64)
    assert config.data.columns.prompt == "q"
    smaller = design_of(tmp_path, quick=True, base=FILE["base"] | {"data": {"path": "d", "limit": 100}})
    assert config_of(smaller, "tpaw", {}).data.limit == 100


def test_quick_cuts_what_a_method_sets_itself(tmp_path):
    long = {"preset": "sft", "iterations": 9, "data": {"limit": 5000}}
    design = design_of(tmp_path, quick=True, methods={**FILE["methods"], "long": long})
    config = design.config("long", {}, seed=0, phase="final", name="x")
    assert (config.iterations, config.data.limit) == (1, 256)


@pytest.mark.parametrize("section", ["data", "evaluation"])
@pytest.mark.parametrize("limit", ["many", [1], True, 0, -1.5])
def test_quick_leaves_a_limit_that_is_none_for_the_config_to_refuse(tmp_path, section, limit):
    base = FILE["base"] | {section: FILE["base"].get(section, {}) | {"limit": limit}}
    design = design_of(tmp_path, quick=True, base=base)
    with pytest.raises(ConfigError, match=rf"method tpaw: {section}\.limit: "):
        config_of(design, "tpaw", {})


BAD = {
    "no such key": ({"metods": {}}, "metods: unknown key; did you mean methods?"),
    "nothing to compare": ({"methods": {}}, "methods: Dictionary should have at least 1 item"),
    "a method that is no layer": (
        {"methods": {"a": 3}},
        "methods.a: expected a layer over the base, as in {preset: spin}, found 3",
    ),
    "another start for a method": ({"methods": {"a": {"model": {"path": "m"}}}}, "methods.a: model belongs in base"),
    "another test for a method": ({"methods": {"a": {"evaluation": {"limit": 3}}}}, "methods.a: evaluation belongs in base"),
    "a method called start": ({"methods": {"start": {}}}, "methods: 'start' is the name of what all methods start from"),
    "a name that is no folder": ({"methods": {"a/b": {}}}, "methods.a/b.[key]: String should match pattern"),
    "a run's name": ({"base": {"run": {"name": "x"}}}, "base: run has no place in base"),
    "no seeds": ({"seeds": []}, "seeds: List should have at least 1 item"),
    "seeds that are none": ({"seeds": "five"}, "seeds: Input should be a valid list, found 'five'"),
    "a seed twice": ({"seeds": [1, 1]}, "seeds: a seed stands twice in [1, 1]"),
    "a tuning seed twice": (
        {"tuning": {"seeds": [9, 9], "grid": {"learner.epochs": [1]}}},
        "tuning.seeds: a seed stands twice in [9, 9]",
    ),
    "a tuning seed among the final ones": (
        {"tuning": {"seeds": [1], "grid": {"learner.epochs": [1]}}},
        "tuning.seeds: 1 are among seeds too; settings would be chosen for them",
    ),
    "an empty axis": ({"tuning": {"seeds": [9], "grid": {"learner.epochs": []}}}, "tuning.grid.learner.epochs: List should have"),
    "a value twice": (
        {"tuning": {"seeds": [9], "grid": {"learner.epochs": [1, 1]}}},
        "tuning.grid: learner.epochs: a value stands twice in [1, 1]",
    ),
    "an axis that would change the test": (
        {"tuning": {"seeds": [9], "grid": {"evaluation.limit": [1, 2]}}},
        "tuning.grid: evaluation.limit cannot be an axis",
    ),
    "an axis without end": (
        {"tuning": {"seeds": [9], "grid": {"a." * 2000 + "a": [1]}}},
        f"tuning.grid: '{'a.' * 29}a…: expected a dotted key of the config, as in learner.learning_rate",
    ),
    "an axis without a name": (
        {"tuning": {"seeds": [9], "grid": {"learner..epochs": [1]}}},
        "tuning.grid: 'learner..epochs': expected a dotted key of the config",
    ),
    "an axis that is not there": (
        {"methods": {"a": {"untuned": ["learner.epochs"]}}, "baselines": []},
        "methods.a.untuned: learner.epochs: no such axis in tuning.grid (learner.learning_rate, objective.reward_scale)",
    ),
    "a baseline that is not there": (
        {"baselines": ["dpo"]},
        "baselines: found dpo, expected start or methods: tpaw, spin, plain",
    ),
    "none at once": ({"parallel": 0}, "parallel: expected a number of runs, at least 1, or resources, found 0"),
    "tuning that is none": ({"tuning": 3}, "tuning: found 3, expected a section with the keys seeds, grid, choose_by"),
    "no name": ({"name": None}, "name: Input should be a valid string"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_with_file_and_field(tmp_path, case):
    changes, told = BAD[case]
    with pytest.raises(ConfigError) as error:
        design_of(tmp_path, **changes)
    assert f"{tmp_path}/experiment.yaml: {told}" in str(error.value)


def test_what_is_missing_is_told(tmp_path):
    (tmp_path / "e.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError) as error:
        load_design(tmp_path / "e.yaml")
    assert [line.split("e.yaml: ")[1] for line in str(error.value).splitlines()] == [
        f"{field}: required, but missing" for field in ("base", "seeds", "methods")
    ]
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_design(tmp_path / "none.yaml")
