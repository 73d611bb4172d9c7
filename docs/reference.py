"""Write `docs/config.md` from the config tree's own types and docstrings: `python docs/reference.py`."""

from pathlib import Path

import yaml

from tpaw_ray.config import PRESETS, config_fields

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Config reference

Written by `python docs/reference.py` from `tpaw_ray/config.py`; a test keeps the two alike.

A config is a YAML file; `tpaw run CONFIG.yaml key.subkey=value …` overrides it, values are YAML. Later layers win:
defaults, the file's `preset`, the file, the command line's `preset`, the command line's overrides. A mapping is merged, a list is
replaced. Unknown keys are refused. The resolved config is `config.yaml` in the run's folder; a run goes on only with the same
config, but for `iterations`, `warnings.*`, `tracking.*` and what says where and how widely it runs (`opponents.*`, `scoring.*`,
and the learner's `workers`, `zero_stage`, `offload`, `gpus`, `cpus`, `threads` and `max_restarts`).
"""


def render() -> str:
    """The page's text."""
    sections: dict[str, list[str]] = {}
    for key, values, default, description in config_fields():
        section = key.split(".")[0] if "." in key else "top level"
        sections.setdefault(section, []).append(f"| `{key}` | {_cell(values)} | `{_cell(default)}` | {_cell(description)} |")
    tables = [
        "\n".join([f"## {section}", "", "| key | values | default | meaning |", "| --- | --- | --- | --- |", *rows])
        for section, rows in sections.items()
    ]
    presets = "\n".join(
        f"| `{name}` | `{yaml.safe_dump(dict(values), default_flow_style=True, width=1000).strip()}` |"
        for name, values in PRESETS.items()
    )
    return "\n\n".join([HEAD.strip(), *tables, f"## Presets\n\n| preset | sets |\n| --- | --- |\n{presets}"]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")  # a line break would end the table


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(PAGE)
