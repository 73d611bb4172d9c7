"""Text that would command a terminal, names that would lead elsewhere, and credentials: shown, refused, never kept."""

import io
import json

import pytest
import yaml
from pyarrow import fs
from rich.console import Console

from tests.unit.test_bad_input import House
from tpaw_ray import cli
from tpaw_ray.config import dump_config, load_config, resolve_config
from tpaw_ray.credentials import find_credentials
from tpaw_ray.errors import ConfigError, RunError
from tpaw_ray.evaluation.exact_match import judge
from tpaw_ray.runs.copies import copy_all
from tpaw_ray.runs.environment import environment
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.schema import Generation, Prompt
from tpaw_ray.wording import listed, one_line, shorten, visible

REQUIRED = {"run": {"name": "demo"}, "model": {"path": "m"}, "data": {"path": "d"}}
CLEAR = "\x1b[2J\x1b]0;owned\x07"
"""Clears a terminal and renames its window."""


@pytest.fixture
def house(tmp_path, tiny_model):
    return House(tmp_path, tiny_model)


# The terminal.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\rb\tc\x00\x7f", r"a\rb\tc\x00\x7f"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202eexe.txt\u2066\u200b", r"\u202eexe.txt\u2066\u200b"),
        ("\ud800\udc80", r"\ud800\udc80"),
        ("two\nlines, ärger, 漢字, 🙂", "two\nlines, ärger, 漢字, 🙂"),
    ],
    ids=["escape", "C0 and DEL", "C1", "direction", "surrogates", "ordinary"],
)
def test_control_characters_become_visible_and_text_stays(text, shown):
    assert visible(text) == shown


def test_values_names_and_errors_are_told_on_one_line_and_cut():
    assert shorten("\x1b\n" * 100) == "'" + r"\x1b\n" * 9 + r"\x1b\…"
    assert listed([f"\x1b\n{i}" for i in range(11)]).startswith(r"\x1b\n0, \x1b\n1, ")
    assert listed(["a" * 100]) == "a" * 60 + "…"
    assert one_line(ValueError("a\n\x1b b")) == r"a \x1b b"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("login", ["me:sword/fish", "swordfish", ":swordfish", "swordfish:"])
def test_a_login_in_an_address_is_left_out_of_what_is_told(login):
    error = OSError(f"GET http://{login}@host:9/a@b failed\nwith {'x' * 300} s3://bucket/a:b@c")
    assert one_line(error).startswith("GET http://…@host:9/a@b failed with xxx") and "fish" not in one_line(error)
    assert one_line(OSError("s3://bucket/a:b@c")) == "s3://bucket/a:b@c"


def test_a_value_without_end_is_told_by_its_type():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert (shorten(nested), shorten(10**5000)) == ("<list>", "<int>")


def test_a_reporter_shows_escapes_and_markup_as_they_stand():
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=True, color_system="standard", highlight=False, width=200))
    reporter.say(f"{CLEAR}[bold]x[/bold] [/] :smile:")
    reporter.table(f"[red]{CLEAR}", ["[b]\x1b[5m"], [["[/b]\x1b[6m :smile:"]])
    with reporter, reporter.stage("[red]\x1b[7m", 1) as advance:
        advance(1)
    text = out.getvalue()
    for part in (CLEAR, "\x1b[5m", "\x1b[6m", "\x07", "☺", "😄"):
        assert part not in text
    for part in (r"\x1b[2J\x1b]0;owned\x07[bold]x[/bold] [/] :smile:", r"[b]\x1b[5m", r"[/b]\x1b[6m :smile:", r"[red]\x1b[7m"):
        assert part in text


@pytest.mark.parametrize(
    "row",
    [{CLEAR: 1}, {"question": "a", CLEAR: 1}, {"question": [{CLEAR: 1}], "answer": "b"}, {"question": "a", "answer": {CLEAR: 1}}],
    ids=["columns", "missing column", "message", "value"],
)
def test_an_escape_in_a_row_is_shown(house, monkeypatch, capsys, row):
    house.data.write_text(json.dumps(row))
    code, out, err = house.tell(monkeypatch, capsys, "plan")
    assert code == 3 and "\x1b" not in err + out and r"\x1b[2J" in err


def test_an_escape_in_a_line_that_is_no_json_is_shown(house, monkeypatch, capsys):
    house.data.write_text(CLEAR)
    code, _, err = house.tell(monkeypatch, capsys, "plan")
    assert code == 3 and "\x1b" not in err and r"\x1b[2J" in err


def test_an_escape_in_a_file_name_is_shown(house, monkeypatch, capsys):
    folder = house.folder / f"{CLEAR} [red]"
    folder.mkdir()
    (folder / "d.jsonl").write_text("{}")
    code, _, err = house.tell(monkeypatch, capsys, "plan", f"data.path='{house.folder}'")
    assert code == 3 and "\x1b" not in err and r"\x1b[2J\x1b]0;owned\x07 [red]/d.jsonl, row 0" in err


def test_an_escape_in_a_model_folder_is_shown(house, monkeypatch, capsys):
    template = "{{ raise_exception('" + CLEAR + "') }}"
    (house.model() / "chat_template.jinja").write_text(template)
    code, _, err = house.tell(monkeypatch, capsys, "plan")
    assert code == 3 and "\x1b" not in err and r"\x1b[2J" in err
    house.model_json("config.json", model_type=CLEAR)
    code, _, err = house.tell(monkeypatch, capsys, "plan")
    assert code == 4 and "\x1b" not in err and r"\x1b[2J" in err


def test_an_escape_in_a_token_of_the_model_is_shown_in_the_plan(house, monkeypatch, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = house.model() / name
        path.write_text(path.read_text().replace("<|end|>", "<|\\u001b[2J|>"))
    code, out, err = house.tell(monkeypatch, capsys, "plan")
    assert (code, err) == (0, "") and "\x1b" not in out and r"<|\x1b[2J|>" in out


def test_a_traceback_shows_escapes_too(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tpaw", "plan", "c.yaml"])
    monkeypatch.setattr(cli, "load_config", lambda *_: {}[CLEAR])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" in err and "\x1b" not in err


def test_generated_text_is_data_and_a_pattern_that_hangs_on_it_finds_nothing(monkeypatch):
    monkeypatch.setattr("tpaw_ray.data.answers.PATIENCE_S", 0.2)

    class Says:
        def batch_decode(self, ids, **_):
            return [f"{CLEAR}#### 2{CLEAR}", "a" * 60, "{{ 1 }} #### [red]3"]

    prompts = [
        Prompt(prompt_id=str(i), row=i, prompt_tokens=[1], target_tokens=[1, 2], reference_answer=answer)
        for i, answer in enumerate("223")
    ]
    said = [Generation(prompt_id=str(i), iteration=0, opponent=0, generated_tokens=[1], finish_reason="stop") for i in range(3)]
    answers = judge(prompts, said, Says(), r"#### (\d)|((?:a|aa)+)[^a]")
    assert [answer.answer for answer in answers] == ["2", None, None]
    assert answers[0].text == f"{CLEAR}#### 2{CLEAR}"


# Credentials.


SECRETS = {"HF_TOKEN": "hf_pw1", "AWS_SECRET_ACCESS_KEY": "aws_pw2", "WANDB_API_KEY": "wandb_pw3"}


def test_tokens_of_the_environment_are_neither_kept_nor_printed(house, monkeypatch, capsys):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    code, out, err = house.tell(monkeypatch, capsys, "plan", "--show-config")
    config = load_config(house.file)
    kept = dump_config(config) + json.dumps(environment(config, {"CPU": 1.0})) + out + err
    assert code == 0 and "run:" in out
    for name, secret in SECRETS.items():
        assert secret not in kept and name not in kept


@pytest.mark.parametrize(
    "key",
    ["opponents.engine_args.hf_token", "opponents.engine_args.a.api_key", "model.token", "aws.AWS_SECRET_ACCESS_KEY", "password"],
)
def test_a_credential_in_a_config_is_refused_without_repeating_it(tmp_path, key):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    with pytest.raises(
        ConfigError, match=rf"c.yaml: {key}: looks like a credential; give it in the environment \(HF_TOKEN"
    ) as caught:
        load_config(path, [f"{key}=swordfish", "iterations=0"])
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize("key", ["model.path", "data.path", "data.heldout_path", "run.root", "opponents.engine_args.x"])
@pytest.mark.parametrize(
    "address",
    [
        "https://me:sword/fish@host/x",
        "https://swordfish@host/x",
        "s3://AKIA:swordfish@bucket",
        "https://host/x?a=1&X-Amz-Signature=swordfish",
    ],
)
def test_an_address_with_a_password_is_refused_without_repeating_it(tmp_path, key, address):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    with pytest.raises(ConfigError, match=rf"{key}: the address holds a password or token; give it in the environment") as caught:
        load_config(path, [f"{key}={address}"])
    assert "fish" not in str(caught.value)


def test_a_password_in_a_broken_override_is_not_repeated(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    with pytest.raises(ConfigError, match=r"override 'model\.token': the value is not valid YAML") as caught:
        load_config(path, ["model.token=[swordfish"])
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"max_new_tokens": 1, "batch_tokens": 2, "tokenizer": "x", "hf_token": True, "api_key": None},
        {"path": "s3://bucket/a:b@c", "root": "https://host:80/x?part=1", "template": "a://b c:d@e"},
    ],
)
def test_what_only_sounds_like_a_credential_is_taken(tree):
    assert find_credentials(tree) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_token", ["swordfish"]),
        ("hf_token", {"v": "swordfish"}),
        ("hfToken", "swordfish"),
        ("x-api-key", "swordfish"),
        ("authorization", "Bearer swordfish"),
        ("Proxy-Authorization", "swordfish"),
    ],
)
def test_a_credential_is_found_however_its_key_is_written_and_whatever_holds_it(key, value):
    assert find_credentials({"a": {key: value}}) == f"a.{key}: looks like a credential"


# Names.


@pytest.mark.parametrize("name", ["..", "../x", "/tmp/x", "a/b", "a\\b", "t\n", "\nt", "t\x00", "~", ".t", "-t", "", "t\u2028"])
def test_a_name_that_could_lead_elsewhere_is_refused(name):
    with pytest.raises(ConfigError, match=r"run\.name: "):
        resolve_config(REQUIRED | {"run": {"name": name}})


@pytest.mark.parametrize("name", ["../../../escaped.txt", "a/../../b", "..", "/tmp/x"])
def test_an_object_of_a_store_whose_name_leads_out_of_the_folder_is_not_copied(tmp_path, name):
    class Store:
        """A fake file system, which lists what an object store may hold."""

        def get_file_info(self, _):
            return [fs.FileInfo(f"bucket/ck/{path}", fs.FileType.File) for path in ("config.json", name)]

        def open_input_stream(self, _):
            return io.BytesIO(b"x")

    folder = tmp_path / "one/two/copy"
    folder.mkdir(parents=True)
    with pytest.raises(RunError, match=f"bucket/ck: holds '{name}', which would lead out of the folder"):
        copy_all(Store(), "bucket/ck", fs.LocalFileSystem(), str(folder))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
