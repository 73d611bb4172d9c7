"""Documents say what the code says."""

import re
import runpy
from pathlib import Path

import pytest

from tpaw_ray import errors
from tpaw_ray.cli import app

HOUSE = Path(__file__).parents[2]


def test_the_config_reference_is_current():
    render = runpy.run_path(str(HOUSE / "docs/reference.py"))["render"]
    assert (HOUSE / "docs/config.md").read_text(encoding="utf-8") == render(), "run `python docs/reference.py`"


@pytest.mark.parametrize("page", ["README.md", *(str(page.relative_to(HOUSE)) for page in (HOUSE / "docs").glob("*.md"))])
def test_links_to_files_lead_somewhere(page):
    text = (HOUSE / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (HOUSE / page).parent.joinpath(link).exists(), link


def test_every_exit_code_is_in_the_help_and_in_the_page_on_the_command():
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TpawError)}
    assert codes == set(range(1, 10))
    page = (HOUSE / "docs/cli.md").read_text(encoding="utf-8")
    for code in (*codes, 0, 130):
        assert re.search(rf"\b{code} \w", app.info.epilog)
        assert f"| {code} |" in page


def test_every_room_is_drawn_in_the_architecture():
    page = (HOUSE / "docs/architecture.md").read_text(encoding="utf-8")
    package = HOUSE / "tpaw_ray"
    rooms = [path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    modules = [path.name for path in package.rglob("*.py")]
    for name in {*rooms, *modules} - {"__init__.py"}:
        assert name in page, name
