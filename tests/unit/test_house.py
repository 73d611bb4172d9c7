"""The rules of the house: who may import whom. Read from the sources, and from what really gets loaded."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tpaw_ray"
PURE = ("algorithm", "schema", "errors", "side_by_side", "wording", "plain_yaml", "plain_json", "credentials")
FLOORS = {
    "errors": 1,
    "side_by_side": 1,
    "wording": 1,
    "plain_yaml": 1,
    "plain_json": 1,
    "credentials": 1,
    "processes": 1,
    "faults": 1,
    "schema": 1,
    "algorithm": 1,
    "config": 2,
    "runs": 2,
    "tracking": 3,
    "methods": 3,
    "plan": 3,
    "cost": 3,
    "placement": 3,
    "nodes": 4,
    "data": 3,
    "policy": 3,
    "opponents": 4,
    "scoring": 5,
    "learner": 5,
    "evaluation": 5,
    "report": 6,
    "handing_on": 6,
    "loop": 6,
    "cli": 7,
    "launch": 7,
    "submit": 7,
    "__main__": 8,
    "evaluate": 7,
    "forecast": 7,
    "experiment": 7,
}


def name_of(path):
    """`tpaw_ray/runs/store.py` is `tpaw_ray.runs.store`, a room's `__init__.py` the room itself."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def module_level(tree):
    """Nodes that run when the module is imported: not the bodies of functions, nor what only type checkers read."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_type_checkers(node)):
            waiting += ast.iter_child_nodes(node)


@cache
def imports(module, everywhere=True):
    """Modules that a module imports, by full name; `everywhere` counts imports inside functions too."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else module_level(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def ours(module):
    return {name for name in imports(module) if name in MODULES and name != "tpaw_ray"}


def packages(module, everywhere=True):
    return {name.split(".")[0] for name in imports(module, everywhere)}


def packages_on_import(module):
    """Packages that the module and all of ours that it imports name at module level."""
    seen, waiting = set(), [module]
    while waiting:
        following = waiting.pop()
        if following not in seen:
            seen.add(following)
            waiting += [name for name in imports(following, False) if name in MODULES]
    return set().union(*(packages(name, everywhere=False) for name in seen))


def loaded_after_importing(modules):
    program = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint(' '.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def in_rooms(*rooms):
    return [module for module in MODULES if room_of(module) in rooms]


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} - {""} <= set(FLOORS)


@pytest.mark.parametrize("module", in_rooms(*PURE, "policy"))
def test_pure_modules_and_the_policy_name_no_framework(module):
    assert packages(module) & {"ray", "vllm", "deepspeed"} == set()


def test_pure_modules_and_the_policy_load_neither_ray_nor_vllm():
    assert loaded_after_importing(in_rooms(*PURE, "policy")) & {"ray", "vllm"} == set()


def test_pure_modules_use_only_pure_modules():
    for module in in_rooms(*PURE):
        assert {room_of(name) for name in ours(module)} <= set(PURE), module


def test_errors_and_schema_load_no_torch():
    assert "torch" not in loaded_after_importing(["tpaw_ray.errors", "tpaw_ray.schema"])


def test_an_opponents_module_names_neither_torch_nor_vllm_before_its_actor_starts():
    for path in PACKAGE.glob("opponents/opponent.py"):
        assert packages_on_import(name_of(path)) & {"torch", "vllm"} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if module != "tpaw_ray.opponents.engine"])
def test_only_the_engines_module_names_vllm_when_imported(module):
    assert "vllm" not in packages_on_import(module)


def test_a_report_needs_neither_torch_nor_ray():
    assert loaded_after_importing(in_rooms("report")) & {"torch", "ray", "vllm", "transformers"} == set()


@pytest.mark.parametrize("module", in_rooms("data"))
def test_the_data_room_names_no_torch(module):
    assert "torch" not in packages(module)


def test_only_the_command_and_its_launcher_import_the_loop():
    users = {module for module in MODULES if "tpaw_ray.loop" in imports(module)}
    assert users <= {"tpaw_ray.cli", "tpaw_ray.launch"}


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module)])
def test_a_room_uses_only_rooms_on_its_own_floor_or_below(module):
    floor = FLOORS[room_of(module)]
    above = {name for name in ours(module) if room_of(name) and FLOORS[room_of(name)] > floor}
    assert above == set()


def circle(graph):
    """A circle in a graph as the list of its members, or an empty list."""
    finished, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in finished:
            return []
        path.append(node)
        for following in sorted(graph.get(node, ())):
            if found := visit(following):
                return found
        path.pop()
        finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node))), [])


def test_a_circle_is_found_where_there_is_one():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_import_each_other_in_no_circle():
    assert circle({module: ours(module) for module in MODULES}) == []


def test_rooms_import_each_other_in_no_circle():
    rooms = {}
    for module in MODULES:
        rooms.setdefault(room_of(module), set()).update(room_of(name) for name in ours(module))
    assert circle({room: used - {room} for room, used in rooms.items() if room}) == []


def test_every_module_says_what_it_is_for():
    silent = [module for module, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []
