"""How files, presets and overrides become one config, and what a user is told when they do not."""

import subprocess
import sys

import pytest
import yaml

from tpaw_ray.config import (
    LOADED,
    PRESETS,
    at_iteration,
    config_fields,
    dump_config,
    load_config,
    load_fine_tuning,
    resolve_config,
)
from tpaw_ray.errors import ConfigError, RunError
from tpaw_ray.runs.continuation import check_same_run
from tpaw_ray.runs.store import RunStore

MINIMAL = "run: {name: demo}\nmodel: {path: m}\ndata: {path: d.jsonl}\n"
REQUIRED = {"run": {"name": "demo"}, "model": {"path": "m"}, "data": {"path": "d.jsonl"}}


@pytest.fixture
def load(tmp_path):
    """`load("objective: {eta: 2}", "preset=spin")`: a file with the required fields and this text, under overrides."""

    def loaded(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(MINIMAL + text)
        return load_config(path, overrides)

    return loaded


@pytest.fixture
def refused(load):
    def message(text="", *overrides):
        with pytest.raises(ConfigError) as raised:
            load(text, *overrides)
        return str(raised.value)

    return message


def method_of(config):
    return config.team.size, config.window, config.objective.eta, config.objective.gamma


def test_defaults_are_the_papers_practical_settings_and_spins_recipe(load):
    config = load()
    assert method_of(config) == (3, 3, 6.0, 0.5)
    assert (config.objective.weights, config.objective.detach_weights) == ("live", True)
    assert [at_iteration(config.learner.learning_rate, iteration) for iteration in range(5)] == [5e-7, 5e-7, 1e-7, 1e-7, 1e-7]
    assert at_iteration(config.objective.reward_scale, 3) == 0.1
    assert (config.learner.optimizer, config.learner.schedule, config.learner.warmup_fraction) == ("rmsprop", "linear", 0.1)
    assert (config.learner.global_batch, config.learner.epochs, config.learner.weight_decay) == (64, 2, 0.0)
    assert (config.data.prompt_length, config.data.max_length, config.run.seed) == (512, 1024, 42)
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.max_new_tokens) == (1.0, 1.0, 256)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("tpaw", (3, 3, 6.0, 0.5)),
        ("spin", (1, 2, 1.0, 0.0)),
        ("without-target-weights", (3, 3, 1.0, 0.5)),
        ("without-player-weights", (3, 3, 6.0, 0.0)),
        ("without-team", (1, 1, 6.0, 0.5)),
    ],
)
def test_a_preset_sets_the_numbers_of_its_method(load, preset, expected):
    assert method_of(load(f"preset: {preset}\n")) == expected
    assert method_of(load("", f"preset={preset}")) == expected


def test_every_preset_sets_the_same_fields_so_that_one_replaces_another_wholly():
    fields = [{(section, key) for section, values in preset.items() for key in values} for preset in PRESETS.values()]
    assert all(preset == fields[0] for preset in fields)


def test_the_file_wins_over_its_preset(load):
    assert method_of(load("preset: spin\nobjective: {gamma: 0.25}\n")) == (1, 2, 1.0, 0.25)


def test_the_command_lines_preset_wins_over_the_file(load):
    text = "preset: tpaw\nteam: {size: 5, window: 4}\nobjective: {eta: 3}\n"
    assert method_of(load(text)) == (5, 4, 3.0, 0.5)
    assert method_of(load(text, "preset=spin")) == (1, 2, 1.0, 0.0)


def test_overrides_win_over_the_command_lines_preset_in_any_order(load):
    assert method_of(load("objective: {eta: 3}\n", "objective.eta=2", "preset=spin")) == (1, 2, 2.0, 0.0)
    assert method_of(load("objective: {eta: 3}\n", "preset=spin", "objective.eta=2")) == (1, 2, 2.0, 0.0)


def test_the_last_of_two_overrides_wins(load):
    assert load("", "iterations=2", "iterations=3").iterations == 3


def test_an_override_leaves_the_rest_of_its_section(load):
    config = load("learner: {epochs: 5, workers: 2}\n", "learner.workers=4")
    assert (config.learner.epochs, config.learner.workers, config.learner.global_batch) == (5, 4, 64)


def test_an_override_may_hold_a_list_or_a_mapping(load):
    config = load("", "objective.reward_scale=[0.1, 5]", "opponents.engine_args={block_size: 16}")
    assert config.objective.reward_scale == [0.1, 5.0]
    assert config.opponents.engine_args == {"block_size": 16}


def test_presets_are_not_changed_by_resolving(load):
    load("preset: spin\nobjective: {eta: 9}\n", "team.size=7")
    assert PRESETS["spin"] == {"team": {"data": "replay", "size": 1, "window": 2}, "objective": {"eta": 1.0, "gamma": 0.0}}


def test_the_window_is_the_team_size_unless_given(load):
    assert load("team: {size: 4}\n").window == 4
    assert load("team: {size: 4, window: 2}\n").window == 2


@pytest.mark.parametrize("text", ["5e-7", "'5e-7'", "5.0e-7", "0.0000005"])
def test_floats_in_every_notation_are_numbers(load, text):
    # YAML 1.1 reads 5e-7, which has no dot, as a string.
    assert load(f"learner: {{learning_rate: {text}}}\n").learner.learning_rate == 5e-7
    assert load(f"learner: {{learning_rate: [{text}, 1e-7]}}\n").learner.learning_rate == [5e-7, 1e-7]
    assert load("", f"learner.learning_rate={text}").learner.learning_rate == 5e-7
    assert load(f"learner: {{weight_decay: {text}}}\n").learner.weight_decay == 5e-7


def test_the_last_of_a_per_iteration_list_serves_all_later_iterations():
    assert [at_iteration([3.0, 2.0, 1.0], iteration) for iteration in (0, 1, 2, 3, 99)] == [3.0, 2.0, 1.0, 1.0, 1.0]
    assert [at_iteration(7, iteration) for iteration in (0, 5)] == [7.0, 7.0]


def test_an_unknown_key_is_named_with_its_file(refused):
    assert "run.yaml: objective.etta: unknown key" in refused("objective: {etta: 6}\n")
    assert "run.yaml: lerner: unknown key" in refused("lerner: {epochs: 1}\n")
    assert "objective.etta: unknown key" in refused("", "objective.etta=6")


def test_every_problem_is_told_at_once(refused):
    lines = refused("objective: {eta: 0.5, gamma: -1}\niterations: 0\n").splitlines()
    assert [line.split("run.yaml: ")[1].split(":")[0] for line in lines] == ["iterations", "objective.eta", "objective.gamma"]


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run: {name: demo}\nmodel: {}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).splitlines() == [
        f"{path}: model.path: required, but missing",
        f"{path}: data: required, but missing",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run.name", "'a/b'"),
        ("run.name", "''"),
        ("run.name", "'..'"),
        ("run.seed", "-1"),
        ("run.seed", "2147483648"),
        ("iterations", "0"),
        ("iterations", "1.5"),
        ("team.size", "0"),
        ("team.window", "0"),
        ("team.data", "old"),
        ("objective.eta", "0.99"),
        ("objective.eta", ".inf"),
        ("objective.gamma", "-0.1"),
        ("objective.gamma", ".nan"),
        ("objective.reward_scale", "0"),
        ("objective.reward_scale", "[]"),
        ("objective.weights", "dead"),
        ("sampling.top_p", "0"),
        ("sampling.top_p", "1.01"),
        ("sampling.temperature", "0"),
        ("opponents.memory_share", "1.5"),
        ("data.test_fraction", "1"),
        ("data.test_fraction", ".nan"),
        ("learner.zero_stage", "4"),
        ("learner.offload", "disk"),
        ("model.lora.rank", "-1"),
        ("model.lora.rank", "513"),
        ("model.lora.target_modules", "[]"),
        ("learner.warmup_fraction", "1"),
        ("learner.learning_rate", "fast"),
        ("learner.precision", "fp16"),
        ("learner.max_restarts", "-1"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_file_field_and_found_value(refused, field, value):
    message = refused("", f"{field}={value}")
    assert f"run.yaml: {field}: " in message
    assert f"found {yaml.safe_load(value)!r}" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective.eta", 1.0),
        ("objective.gamma", 0.0),
        ("sampling.top_p", 1.0),
        ("opponents.memory_share", 1.0),
        ("learner.zero_stage", 0),
        ("learner.zero_stage", 3),
        ("learner.warmup_fraction", 0.0),
        ("run.seed", 2**31 - 1),
        ("run.name", "0.a_b-C"),
    ],
)
def test_a_value_on_its_bound_is_taken(load, field, value):
    section, key = field.split(".")
    assert getattr(getattr(load("", f"{field}={value}"), section), key) == value


def test_a_bad_value_in_a_per_iteration_list_is_named_by_its_place(refused):
    message = refused("learner: {learning_rate: [1e-7, -2]}\n")
    assert "learner.learning_rate.1: Input should be greater than 0, found -2" in message


def test_a_section_that_is_no_mapping_is_named(refused):
    assert "run.yaml: objective: " in refused("objective: 6\n")
    assert "run.yaml: objective: " in refused("objective:\n")


def test_lengths_that_leave_no_room_for_a_response_are_refused_with_both_numbers(refused):
    message = refused("", "data.prompt_length=1024")
    assert "data.prompt_length (1024) must be below data.max_length (1024)" in message


def test_fractions_that_leave_nothing_to_train_on_are_refused(refused):
    assert "leave nothing to train on" in refused("", "data.validation_fraction=0.5", "data.test_fraction=0.5")


@pytest.mark.parametrize(("pattern", "reason"), [("####", "needs a group"), ("(", "not a regular expression")])
def test_an_answer_pattern_without_a_group_or_sense_is_refused(refused, pattern, reason):
    message = refused(f"evaluation: {{answer_pattern: '{pattern}'}}\n")
    assert "run.yaml: evaluation" in message
    assert reason in message


def test_an_unknown_preset_is_refused_with_the_known_ones(refused):
    assert "run.yaml: preset: found 'grpo', expected one of tpaw, spin," in refused("preset: grpo\n")
    assert "command line: preset: found 'grpo'" in refused("", "preset=grpo")
    assert "preset: found ['spin']" in refused("preset: [spin]\n")


@pytest.mark.parametrize("override", ["iterations", "=3", "objective.=3", ".eta=3", "objective..eta=3"])
def test_an_override_that_is_no_assignment_is_quoted(refused, override):
    assert f"override {override!r}: expected key=value" in refused("", override)


def test_an_override_that_is_not_yaml_is_quoted(refused):
    assert "override 'objective.eta': the value is not valid YAML" in refused("", "objective.eta=[1")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot read the config"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(("text", "reason"), [("a: [", "not valid YAML"), ("- 1", r"found \[1\]"), ("", "found nothing")])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, reason):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_a_resolved_config_does_not_change(load):
    with pytest.raises(ValueError, match="frozen"):
        load().objective.eta = 1.0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_dumped_config_reads_back_as_the_same(load, tmp_path, preset):
    text = "learner: {learning_rate: [5e-7, 1e-7]}\nopponents: {engine_args: {block_size: 16, nested: {a: [1, x]}}}\n"
    config = load(text, f"preset={preset}")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


def test_every_field_is_described():
    fields = config_fields()
    assert [key for key, _, _, description in fields if not description.strip()] == []
    assert {"run.name", "iterations", "objective.eta", "data.columns.messages"} <= {key for key, *_ in fields}


def test_the_fields_are_the_leaves_of_a_dumped_config():
    def leaves(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    assert [key for key, *_ in config_fields()] == list(leaves(resolve_config(REQUIRED).model_dump()))


def test_a_required_field_says_so_instead_of_a_default():
    defaults = {key: default for key, _, default, _ in config_fields()}
    assert (defaults["model.path"], defaults["objective.eta"], defaults["team.window"]) == ("required", "6.0", "null")


def test_config_and_errors_import_without_torch_ray_or_vllm():
    heavy = ("torch", "ray", "vllm", "transformers", "deepspeed", "pyarrow", "numpy", "datasets")
    program = f"import sys, tpaw_ray.config, tpaw_ray.errors; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_per_iteration_values_are_finite(refused):
    assert "objective.reward_scale" in refused("", "objective.reward_scale=[0.1, .inf]")


def test_a_list_in_a_list_of_numbers_is_told():
    with pytest.raises(ConfigError, match=r"learner.learning_rate.0: Input should be a valid number, found \[\]"):
        resolve_config({**REQUIRED, "learner": {"learning_rate": [[], 1e-7]}})


def test_presets_say_where_negatives_come_from(load):
    found = {preset: load(f"preset: {preset}\n").team.data for preset in PRESETS}
    assert (found.pop("dpo"), found.pop("sft"), set(found.values())) == ("given", "none", {"replay"})


def test_fine_tuning_has_its_own_recipe_and_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{MINIMAL}iterations: 4\nlearner: {{learning_rate: 5.0e-7, global_batch: 16}}\n")
    found = load_fine_tuning(path)
    assert found.run.name == f"{load_config(path).run.name}-sft"
    assert (found.team.data, found.iterations, found.learner.optimizer, found.learner.learning_rate) == ("none", 1, "adamw", 2e-5)
    assert found.learner.global_batch == 16  # resources and sizes are the file's
    named = load_fine_tuning(path, ["run.name=other", "learner.learning_rate=1e-4"])
    assert (named.run.name, named.learner.learning_rate) == ("other", 1e-4)


def test_a_team_of_all_learns_from_every_round(load):
    assert load("team: {select: all}\niterations: 7\n").window == 7
    assert load("team: {select: all, window: 2}\niterations: 7\n").window == 2


def test_the_best_are_chosen_on_validation_only(refused):
    message = refused("team: {select: best}\nevaluation: {split: test}\n")
    assert "team.select: best is chosen on validation" in message
    assert "found test" in message
    assert "found 0" in refused("team: {select: best}\n", "data.validation_fraction=0.0")


@pytest.mark.parametrize("name", LOADED)
def test_engine_arguments_that_say_what_is_loaded_are_refused(refused, name):
    message = refused("", f"opponents.engine_args={{block_size: 16, {name}: x}}")
    assert f"opponents.engine_args: {name} has no place here: engines load the run's checkpoints" in message
    assert "block_size" not in message


def test_opponents_may_change_on_a_run_but_for_what_vllm_is_told_beside(load, tmp_path):
    store = RunStore.open(str(tmp_path), "demo")
    store.write_bytes(store.path("config.yaml"), dump_config(load("opponents: {engine_args: {block_size: 16}}\n")).encode())
    store.commit(store.path("prompts"))
    check_same_run(load("opponents: {engine_args: {block_size: 16}, batch: 7, node_labels: {a: b}}\n"), store)
    for text in ("", "opponents: {engine_args: {block_size: 16, quantization: fp8}}\n"):
        with pytest.raises(RunError, match=r"another config.*\n  opponents\.engine_args\.[a-z_]+: started with"):
            check_same_run(load(text), store)


def test_a_run_goes_on_with_another_group_of_workers_and_no_other_recipe(load, tmp_path):
    store = RunStore.open(str(tmp_path), "demo")
    store.write_bytes(store.path("config.yaml"), dump_config(load("learner: {workers: 2, zero_stage: 3}\n")).encode())
    store.commit(store.path("prompts"))
    check_same_run(load("learner: {workers: 1, zero_stage: 2, offload: optimizer}\n"), store)
    with pytest.raises(RunError, match=r"learner\.optimizer: started with 'rmsprop', now 'adamw'"):
        check_same_run(load("learner: {workers: 2, zero_stage: 3, optimizer: adamw}\n"), store)


@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 0), ("parameters", 2)])
def test_an_offload_that_the_zero_stage_does_not_know_is_refused(refused, offload, stage):
    message = refused("", f"learner.offload={offload}", f"learner.zero_stage={stage}")
    assert f"offload: {offload} needs a zero_stage of" in message and f"found {stage}" in message
