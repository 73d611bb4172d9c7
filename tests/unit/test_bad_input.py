"""What a user can get wrong, and what the command says: exit code, one message with place and remedy, nothing written."""

# ruff: noqa: E501  (a case is read as a line)

import json
import os
import pickle
import re
import shutil
import struct
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from tests.tiny import tiny_tokenizer
from tpaw_ray import cli

ROWS = [{"question": f"{i}+1=", "answer": f"#### {i + 1}"} for i in range(20)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class House:
    """A folder with a config that could run: model, data and config file, to be broken by a case."""

    def __init__(self, folder, tiny_model):
        self.folder = folder
        self.tiny_model = tiny_model
        self.file = folder / "config.yaml"
        self.data = folder / "train.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.runs = folder / "runs"
        self.file.write_text(
            yaml.safe_dump(
                {
                    "run": {"name": "t", "root": str(self.runs)},
                    "model": {"path": str(tiny_model)},
                    "data": {"path": str(self.data), "test_fraction": 0.2, "prompt_length": 40, "max_length": 80},
                    "iterations": 2,
                    "evaluation": {"split": "test"},
                    "learner": {"precision": "fp32", "global_batch": 8},
                }
            )
        )

    def model(self):
        """A copy of the model to be broken, which the config then names."""
        copy = self.folder / "model"
        if not copy.exists():
            shutil.copytree(self.tiny_model, copy)
            self.replace_config(str(self.tiny_model), str(copy))
        return copy

    def replace_config(self, old, new):
        self.file.write_text(self.file.read_text().replace(old, new))

    def model_json(self, name, **changes):
        path = self.model() / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def rows(self, *lines):
        """Lines of bytes behind a first good row."""
        self.data.write_bytes(b"\n".join([json.dumps(ROWS[0]).encode(), *lines]) + b"\n")

    def parquet(self, table):
        pq.write_table(table, self.folder / "d.parquet")
        return (self.folder / "d.parquet",)

    def tell(self, monkeypatch, capsys, command, *overrides):
        """Run `tpaw` in this process; returns exit code, standard output and standard error."""
        monkeypatch.chdir(self.folder)
        monkeypatch.setattr("sys.argv", ["tpaw", command, str(self.file), *map(str, overrides)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err


@pytest.fixture
def house(tmp_path, tiny_model):
    return House(tmp_path, tiny_model)


def overrides(*given):
    return lambda house: given


def config_text(text):
    def write(house):
        house.file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ()

    return write


def config_tail(text):
    def write(house):
        house.file.write_text(house.file.read_text() + text)
        return ()

    return write


def line(text):
    def write(house):
        house.rows(text if isinstance(text, bytes) else json.dumps(text).encode())
        return ()

    return write


def data_file(name, content=b""):
    def write(house):
        path = house.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return (f"data.path={house.folder / name.split('/')[0]}",)

    return write


def parquet(columns, damage=lambda content: content):
    def write(house):
        path = house.folder / "d.parquet"
        pq.write_table(pa.table(columns), path)
        path.write_bytes(damage(path.read_bytes()))
        return (f"data.path={path}",)

    return write


def said(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def endless_pattern(house):
    """One that tries every way to cut sixty letters into ones and twos."""
    house.rows(json.dumps({"question": "a", "answer": "a" * 60}).encode())
    return ("evaluation.answer_pattern='((?:a|aa)+)[^a]'",)


BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

# Name: how the house is broken (returns overrides), exit code, what the message holds.
CONFIGS = {
    "no config file": (lambda h: h.file.unlink() or (), 2, ["config.yaml: cannot read the config", "No such file"]),
    "config is a folder": (lambda h: h.file.unlink() or h.file.mkdir() or (), 2, ["config.yaml: cannot read", "directory"]),
    "empty config": (config_text(""), 2, ["config.yaml: expected a mapping of sections, found nothing"]),
    "config is a list": (config_text("- run\n"), 2, ["config.yaml: expected a mapping of sections, found ['run']"]),
    "config is not UTF-8": (config_text(b"run: {name: \xff}\n"), 2, ["config.yaml: cannot read the config", "0xff"]),
    "config too large": (config_text("#" * 2_000_000), 2, ["config.yaml: ", "more than 262,144 bytes"]),
    "bad YAML": (config_text("run: {name: t\n"), 2, ["config.yaml: not valid YAML: line 2", "expected ',' or '}'"]),
    "tab": (config_text("run:\n\tname: t\n"), 2, ["not valid YAML: line 2, column 1", r"found character '\t'"]),
    "two documents": (config_text("a: 1\n---\nb: 1\n"), 2, ["line 2", "expected a single document"]),
    "key twice": (config_text("iterations: 1\niterations: 2\n"), 2, ["line 2", "'iterations' stands twice, first in line 1"]),
    "key twice in a section": (config_tail("team: {size: 1, size: 2}\n"), 2, ["'size' stands twice", "only one value"]),
    "anchor": (config_tail("team: &t {size: 2}\n"), 2, ["found an anchor or alias", "write the value out"]),
    "billion laughs": (config_text(BILLION_LAUGHS), 2, ["line 1, column 4: found an anchor or alias"]),
    "merge key": (config_text("<<: {iterations: 3}\n"), 2, ["line 1", "merge", "expected text, a number"]),
    "Python object": (config_text("run: !!python/object/apply:os.system [id]\n"), 2, ["line 1", "python/object", "expected text"]),
    "key is a number": (config_tail("3: x\n"), 2, ["found 3 as a key; expected text"]),
    "nested without end": (config_text("run: " + "[" * 100_000), 2, ["line 1", "more than 20 deep"]),
    "number without end": (config_tail("team: {size: " + "9" * 5000 + "}\n"), 2, ["Exceeds the limit (4300 digits)"]),
    "NUL in a text": (config_tail('opponents: {engine_args: {a: "\\0"}}\n'), 2, [r"the character '\x00'", "can be printed"]),
    "lone surrogate in a text": (config_tail('opponents: {engine_args: {a: "\\ud800"}}\n'), 2, [r"the character '\ud800'"]),
    "unknown key": (overrides("objective.etta=1"), 2, ["objective.etta: unknown key; did you mean objective.eta?"]),
    "unknown section": (config_tail("lerner: {epochs: 1}\n"), 2, ["lerner: unknown key; did you mean learner?"]),
    "key like no other": (overrides("zzzzzz.qqqqqqqqqqqqqqqqqqqqqq=1"), 2, ["zzzzzz: unknown key; see the config reference"]),
    "many unknown keys": (config_tail("".join(f"k{i}: 1\n" for i in range(20_000))), 2, ["k0: unknown key", "and 19980 more problems"]),
    "text for a number": (overrides("iterations=many"), 2, ["iterations: ", "valid integer", "found 'many'"]),
    "fraction for a count": (overrides("iterations=1.5"), 2, ["iterations: ", "valid integer", "found 1.5"]),
    "true for a count": (overrides("iterations=true"), 2, ["iterations: Input should be a number, not true or false"]),
    "null for a number": (overrides("objective.eta=null"), 2, ["objective.eta: ", "valid number", "found None"]),
    "list for a text": (overrides("data.path=[a]"), 2, ["data.path: ", "valid string", "found ['a']"]),
    "number for a name": (overrides("run.name=7"), 2, ["run.name: ", "valid string", "found 7"]),
    "no section": (overrides("learner=5"), 2, ["learner: found 5, expected a section with the keys workers, gpus"]),
    "section of a text": (overrides("iterations.x=5"), 2, ["iterations: ", "valid integer"]),
    "global batch of 0": (overrides("learner.global_batch=0"), 2, ["learner.global_batch: ", "greater than or equal to 1"]),
    "too many iterations": (overrides("iterations=1000000000"), 2, ["iterations: ", "less than or equal to 998"]),
    "huge count": (overrides("data.shard_size=99999999999999999999"), 2, ["data.shard_size: ", "less than or equal to"]),
    "infinite": (overrides("objective.gamma=.inf"), 2, ["objective.gamma: ", "finite", "found inf"]),
    "not a number": (overrides("learner.weight_decay=.nan"), 2, ["learner.weight_decay: ", "found nan"]),
    "no rate for any iteration": (overrides("learner.learning_rate=[]"), 2, ["learner.learning_rate: ", "at least 1 item"]),
    "bad rate of an iteration": (overrides("learner.learning_rate=[1e-7,0]"), 2, ["learning_rate.1: ", "greater than 0"]),
    "unknown choice": (overrides("team.data=old"), 2, ["team.data: ", "'replay', 'fresh', 'given' or 'none'", "found 'old'"]),
    "run name leaves the root": (overrides("run.name=../x"), 2, ["run.name: ", "match pattern", "found '../x'"]),
    "run name is ..": (overrides("run.name=.."), 2, ["run.name: ", "match pattern"]),
    "run name is absolute": (overrides("run.name=/tmp/x"), 2, ["run.name: ", "match pattern"]),
    "run name with a newline": (overrides('run.name="t\\n"'), 2, ["run.name: ", "match pattern", r"found 't\n'"]),
    "run name too long": (overrides(f"run.name={'a' * 101}"), 2, ["run.name: ", "match pattern"]),
    "empty data path": (overrides("data.path=''"), 2, ["data.path: ", "at least 1 character", "found ''"]),
    "empty column": (overrides("data.columns.prompt=''"), 2, ["data.columns.prompt: ", "at least 1 character"]),
    "half a mapping of columns": (overrides("data.columns.prompt=q"), 2, ["data.columns: found prompt; expected either"]),
    "lengths": (overrides("data.prompt_length=80"), 2, ["data.prompt_length (80) must be below data.max_length (80)"]),
    "no parentheses": (overrides("evaluation.answer_pattern=x"), 2, ["answer_pattern needs a group"]),
    "broken pattern": (overrides("evaluation.answer_pattern='('"), 2, ["answer_pattern is not a regular expression"]),
    "endless pattern": (endless_pattern, 2, ["evaluation.answer_pattern: found '((?:a|aa)+)[^a]'", "takes more than 0.2 s"]),
    "override without =": (overrides("iterations"), 2, ["override 'iterations': expected key=value, as in"]),
    "override without key": (overrides("=3"), 2, ["override '=3': expected key=value"]),
    "override with dots alone": (overrides("." * 5000 + "=3"), 2, ["expected key=value"]),
    "override nested without end": (overrides("a." * 5000 + "a=3"), 2, ["expected key=value"]),
    "override is bad YAML": (overrides("team.size=[1"), 2, ["override 'team.size': the value is not valid YAML"]),
    "unknown preset": (overrides("preset=tpav"), 2, ["command line: preset: found 'tpav', expected one of tpaw"]),
    "engine argument runs code": (overrides("opponents.engine_args.trust_remote_code=true"), 2, ["set model.trust_remote_code"]),
    "engine argument is nan": (overrides("opponents.engine_args.a=[.nan]"), 2, ["opponents.engine_args: ", "finite numbers"]),
    "token in the config": (overrides("opponents.engine_args.hf_token=hf_pw"), 2, ["hf_token: looks like a credential", "HF_TOKEN"]),
    "chat template is no file": (overrides("model.chat_template=nowhere.jinja"), 2, ["model.chat_template: found 'nowhere.jinja'", "expected `plain`"]),
    "chat template breaks off": (overrides("model.chat_template='{% if %}'"), 2, ["not a valid Jinja template", "line 1"]),
}  # fmt: skip

DATA = {
    "no such file": (overrides("data.path=/nowhere.jsonl"), 3, ["/nowhere.jsonl: no such file or folder; expected SFT data"]),
    "name too long": (overrides(f"data.path={'a' * 5000}.jsonl"), 3, ["no such file or folder; expected SFT data"]),
    "home of nobody": (overrides("data.path=~nobody-here/d.jsonl"), 3, ["~nobody-here/d.jsonl: no such file or folder"]),
    "no such held-out file": (overrides("data.heldout_path=/no.jsonl"), 3, ["/no.jsonl: no such file or folder"]),
    "unknown file type": (data_file("d.csv"), 3, ["d.csv: unknown file type '.csv'; expected .jsonl, .json, .parquet"]),
    "empty file": (data_file("d.jsonl"), 3, ["d.jsonl: holds no rows; expected at least one conversation"]),
    "empty list": (data_file("d.json", b"[]"), 3, ["d.json: holds no rows"]),
    "list breaks off": (data_file("d.json", b'[{"question": '), 3, ["d.json: not valid JSON", "expected a list of objects"]),
    "empty folder": (lambda h: (h.folder / "e").mkdir() or (f"data.path={h.folder / 'e'}",), 3, ["the folder holds no data"]),
    "folder of several splits": (
        lambda h: data_file("s/train.jsonl", b"{}")(h) and data_file("s/test.jsonl", b"{}")(h),
        3,
        ["files of several splits", "data.heldout_path"],
    ),
    "not JSON": (line(b"{'question': 1}"), 3, ["train.jsonl, row 1 (line 2): not valid JSON", "expected one object a line"]),
    "a list for a row": (line([1]), 3, ["row 1 (line 2): found a list [1], expected an object"]),
    "NaN": (line(b'{"question": NaN, "answer": "1"}'), 3, ["row 1 (line 2): question: found a number nan, expected a string"]),
    "Infinity": (line(b'{"question": "a", "answer": -Infinity}'), 3, ["answer: found a number -inf, expected a string"]),
    "huge integer": (line(b'{"question": ' + b"9" * 5000 + b"}"), 3, ["row 1 (line 2): not valid JSON", "4300 digits"]),
    "nested without end": (line(b"[" * 100_000), 3, ["row 1 (line 2): not valid JSON", "recursion"]),
    "nested answer": (line(b'{"question": "a", "answer": ' + b"[" * 900 + b"]" * 900 + b"}"), 3, ["answer[0]: found a list"]),
    "number for a text": (line({"question": 1, "answer": "2"}), 3, ["row 1 (line 2): question: found a number 1", "a string"]),
    "null for a text": (line({"question": "a", "answer": None}), 3, ["answer: found null, expected a string"]),
    "no answer": (line({"question": "a"}), 3, ["row 1 (line 2): answer: missing; expected beside question"]),
    "empty answer": (line({"question": "a", "answer": ""}), 3, ["answer: found the target response '', expected text"]),
    "blank answer": (line({"question": "a", "answer": " \n"}), 3, [r"the target response ' \n', expected text"]),
    "blank question": (line({"question": " ", "answer": "b"}), 3, ["question: found an empty prompt, expected text"]),
    "lone surrogate": (line(b'{"question": "\\ud800", "answer": "1"}'), 3, [r"the lone surrogate '\ud800'", "as UTF-8"]),
    "broken UTF-8": (line(b'{"question": "\xff", "answer": "1"}'), 3, ["row 1 (line 2): not valid UTF-8: found byte 0xff"]),
    "UTF-16": (data_file("d.jsonl", '{"question": "a"}'.encode("utf-16")), 3, ["row 0 (line 1): not valid UTF-8"]),
    "unknown shape": (data_file("d.jsonl", b'{"a": 1}\n'), 3, ["row 0 (line 1): unknown shape: found the columns a", "data.columns"]),
    "many columns": (data_file("d.jsonl", json.dumps({f"c{i}": 1 for i in range(5000)}).encode()), 3, ["and 4990 more"]),
    "no assistant turn": (data_file("d.jsonl", json.dumps(said(("user", "a"))).encode()), 3, ["messages: found no assistant turn"]),
    "no user turn": (data_file("d.jsonl", json.dumps(said(("assistant", "a"))).encode()), 3, ["no turn before the target response"]),
    "unknown role": (data_file("d.jsonl", json.dumps(said(("tool", "a"))).encode()), 3, ["messages[0].role: found 'tool', expected"]),
    "content in parts": (data_file("d.jsonl", json.dumps(said(("user", [1]))).encode()), 3, ["messages[0].content: found a list [1]"]),
    "end token in an answer": (line({"question": "a", "answer": "b<|end|>c"}), 3, ["row 1: the target response holds '<|end|>'"]),
    "all rows too long": (overrides("data.prompt_length=2"), 3, ["no training prompts are left of 20 rows", "data.prompt_length"]),
    "all rows held out": (overrides("data.test_fraction=0.99", "data.validation_fraction=0"), 3, ["no training prompts are left"]),
    "template refuses a row": (
        overrides(r"""model.chat_template="{{ raise_exception('no \\x1b[31m') }}" """),
        3,
        ["row 0: the chat template refuses the turns user, assistant", r"no \x1b[31m"],
    ),
    "template leaves nothing": (overrides("model.chat_template='{{ \"\" }}'"), 3, ["row 0: nothing of the prompt is left"]),
    "Parquet breaks off": (parquet({"question": ["a"]}, lambda c: c[: len(c) // 2]), 3, ["d.parquet: cannot be read as Parquet"]),
    "Parquet is damaged": (
        parquet({"question": ["a" * 500], "answer": ["b"]}, lambda c: c[:4] + bytes(30) + c[34:]),
        3,
        ["d.parquet: cannot be read as Parquet", "write or copy the file again"],
    ),
    "Parquet of bytes": (parquet({"question": [b"\xff"], "answer": ["b"]}), 3, [r"row 0: question: found bytes b'\xff'"]),
    "Parquet without rows": (parquet({"question": pa.array([], pa.string())}), 3, ["d.parquet: holds no rows"]),
}  # fmt: skip


def without_tensor(house):
    from safetensors.numpy import load_file, save_file

    path = house.model() / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return ()


def damaged_weights(damage):
    def write(house):
        path = house.model() / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        return ()

    return write


def pickled_weights(house):
    """A pickle that would leave a file behind, in place of the safetensors."""

    class Trap:
        def __reduce__(self):
            return (open, (str(house.folder / "unpickled"), "w"))

    (house.model() / "model.safetensors").unlink()
    (house.model() / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    return ()


def sharded_index(content):
    def write(house):
        (house.model() / "model.safetensors.index.json").write_text(content)
        return ()

    return write


def model_json(name, **changes):
    return lambda house: house.model_json(name, **changes) or ()


def model_file(name, content):
    return lambda house: (house.model() / name).write_text(content) and ()


def own_code(house):
    house.model_json("config.json", auto_map={"AutoConfig": "code.Trap"})
    (house.model() / "code.py").write_text(f"open({str(house.folder / 'ran')!r}, 'w')\nclass Trap: pass\n")
    return ()


def without_template(house):
    (house.model() / "chat_template.jinja").unlink()
    return ()


def without_end_token(house):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(house.model())
    return ()


def smaller_vocabulary(house):
    """Config and weights know 70 tokens, the tokenizer 79."""
    from safetensors.numpy import load_file, save_file

    path = house.model() / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:8].copy()
    save_file(tensors, path, metadata={"format": "pt"})
    house.model_json("config.json", vocab_size=8)
    return ()


MODELS = {
    "no such model": (overrides("model.path=/nowhere"), 4, ["model.path: no directory /nowhere; expected"]),
    "model of nobody": (overrides("model.path=~nobody-here/m"), 4, ["model.path: no directory ~nobody-here/m"]),
    "model is a file": (lambda h: (f"model.path={h.data}",), 4, ["model.path: no directory", "train.jsonl"]),
    "no config.json": (lambda h: (h.model() / "config.json").unlink() or (), 4, ["holds no config.json; expected"]),
    "config.json is not JSON": (model_file("config.json", "{"), 4, ["config.json: cannot be read as JSON", "line 1"]),
    "config.json is a list": (model_file("config.json", "[]"), 4, ["config.json: found [], expected a JSON object"]),
    "unknown architecture": (model_json("config.json", model_type="zebra"), 4, ["describes no causal language model", "zebra"]),
    "not a causal model": (model_json("config.json", model_type="t5"), 4, ["describes no causal language model"]),
    "impossible size": (model_json("config.json", num_attention_heads=0), 4, ["describes no causal language model"]),
    "size is a text": (model_json("config.json", hidden_size="big"), 4, ["describes no causal language model", "hidden_size"]),
    "no weights": (lambda h: (h.model() / "model.safetensors").unlink() or (), 4, ["holds no *.safetensors; convert"]),
    "pickled weights": (pickled_weights, 4, ["holds no *.safetensors; pickled weights", "never read", "save_pretrained"]),
    "weights break off": (damaged_weights(lambda c: c[:1000]), 4, ["model.safetensors: not readable as safetensors"]),
    "weights lack their end": (damaged_weights(lambda c: c[:-10]), 4, ["model.safetensors: not readable as safetensors"]),
    "header without end": (damaged_weights(lambda c: struct.pack("<Q", 2**60) + c[8:]), 4, ["not readable as safetensors"]),
    "empty weights": (damaged_weights(lambda c: b""), 4, ["model.safetensors: not readable as safetensors"]),
    "a tensor is missing": (without_tensor, 4, ["the weights lack model.layers.1.mlp.up_proj.weight; expected every"]),
    "another vocabulary": (model_json("config.json", vocab_size=80), 4, ["shape [79, 64]", "would be [80, 64]"]),
    "index names a missing file": (sharded_index('{"weight_map": {"a": "x.safetensors"}}'), 4, ["index.json names x.safetensors"]),
    "index is not JSON": (sharded_index("{"), 4, ["model.safetensors.index.json: cannot be read as JSON"]),
    "index without files": (sharded_index("{}"), 4, ["weight_map: found None, expected the file of every tensor"]),
    "own code": (own_code, 4, ["names Python code of its own", "'code.Trap'", "set model.trust_remote_code=true"]),
    "end token beyond the vocabulary": (model_json("generation_config.json", eos_token_id=500), 4, ["the end token 500", "of 79"]),
    "end token is a text": (model_json("generation_config.json", eos_token_id="x"), 4, ["eos_token_id: found 'x', expected a token id"]),
    "tokenizer beyond the vocabulary": (smaller_vocabulary, 4, ["row 0: ", "gives the token id", "vocabulary has 8"]),
    "no tokenizer": (lambda h: [(h.model() / f"tokenizer{s}.json").unlink() for s in ("", "_config")] and (), 4, ["its tokenizer cannot be loaded"]),
    "tokenizer is not JSON": (model_file("tokenizer.json", "{"), 4, ["its tokenizer cannot be loaded"]),
    "no end token": (without_end_token, 4, ["its tokenizer has no end token (eos_token)"]),
    "no chat template": (without_template, 2, ["its tokenizer has no chat template; set model.chat_template"]),
    "window of the model": (overrides("data.max_length=257"), 4, ["data.max_length: found 257", "at most 256 tokens"]),
}  # fmt: skip


def earlier_config(text):
    def write(house):
        (house.runs / "t/prompts").mkdir(parents=True)  # something was made of it
        (house.runs / "t/config.yaml").write_text(text)
        return ()

    return write


def without_earlier_config(house):
    (house.runs / "t/iterations").mkdir(parents=True)
    return ()


FOLDERS = {
    "root is a file": (lambda h: (f"run.root={h.data}",), 5, ["run.root: ", "train.jsonl is not a folder"]),
    "root below a file": (lambda h: (f"run.root={h.data}/x",), 5, ["run.root: ", "is not a folder that can be written to"]),
    "root is a remote address": (overrides("run.root=ftp://host/x"), 5, ["run.root: found an address of 'ftp'; expected a folder"]),
    "root too long": (overrides(f"run.root={'a' * 5000}"), 5, ["cannot be looked at", "too long"]),
    "another config before": (earlier_config("run: {name: t}\nmodel: {path: x}\ndata: {path: y}\n"), 5, ["model.path: started with 'x'"]),
    "config of the run is damaged": (earlier_config("{"), 5, ["runs/t/config.yaml: not valid YAML", "the run is damaged there"]),
    "config of the run is no mapping": (earlier_config("3"), 5, ["runs/t/config.yaml: expected the config"]),
    "config of the run is gone": (without_earlier_config, 5, ["runs/t/config.yaml: missing, although iterations was made of it; put"]),
    "a name of the root is empty": (overrides("run.root=s3://b/a//b"), 5, ["run.root: found an empty name in the prefix"]),
    "root read-only": (lambda h: h.runs.mkdir(mode=0o500) or (), 5, ["run.root: ", "can be written to"]),
}  # fmt: skip

RESOURCES = {
    "GPUs that are not there": (overrides("opponents.gpus=1", "learner.gpus=999"), 6, ["the config needs", "the cluster has"]),
    "CPUs that are not there": (overrides("learner.workers=99999"), 6, ["CPU at the same time, the cluster has"]),
}

CASES = [
    pytest.param(*case, id=f"{kind}: {name}", marks=[AS_ROOT] if name == "root read-only" else [])
    for kind, cases in (("config", CONFIGS), ("data", DATA), ("model", MODELS), ("run", FOLDERS), ("resources", RESOURCES))
    for name, case in cases.items()
    for AS_ROOT in (pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere"),)
]
BEFORE_RAY = [
    pytest.param(*case, id=f"{kind}: {name}")
    for kind, cases, names in (
        ("config", CONFIGS, list(CONFIGS.keys() - {"chat template is no file", "chat template breaks off", "endless pattern"})),
        ("data", DATA, ["no such file", "no such held-out file", "empty file", "unknown shape", "Parquet breaks off"]),
        ("model", MODELS, ["no such model", "no config.json", "config.json is not JSON", "pickled weights", "own code"]),
        ("run", FOLDERS, ["root is a file", "root too long", "another config before", "config of the run is gone"]),
    )
    for name, case in ((name, cases[name]) for name in sorted(names))
]


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_told(house, before, code, parts, found, out, err):
    assert found == code, err
    assert err.startswith("error: ") and err.endswith("\n")
    assert "Traceback" not in err + out and "the work ahead" not in out
    assert len(err) < 10_000
    for part in parts:
        assert part in err
    assert err.replace("\n", "").isprintable()
    assert files_of(house.folder) == before
    assert not ray.is_initialized()


@pytest.mark.parametrize(("broken", "code", "parts"), CASES)
def test_bad_input_is_one_message_with_its_exit_code_and_nothing_is_written(house, monkeypatch, capsys, broken, code, parts):
    monkeypatch.setattr("tpaw_ray.data.answers.PATIENCE_S", 0.2)
    given = broken(house)
    before = files_of(house.folder)
    began = time.monotonic()
    check_told(house, before, code, parts, *house.tell(monkeypatch, capsys, "plan", *given))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("broken", "code", "parts"), BEFORE_RAY)
def test_a_run_finds_it_before_ray_starts(house, monkeypatch, capsys, broken, code, parts):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    given = broken(house)
    before = files_of(house.folder)
    check_told(house, before, code, parts, *house.tell(monkeypatch, capsys, "run", *given))


def test_there_are_more_than_sixty_cases_and_the_house_itself_is_sound(house, monkeypatch, capsys):
    assert len(CASES) >= 60
    code, out, err = house.tell(monkeypatch, capsys, "plan")
    assert (code, err) == (0, "") and "the work ahead" in out


@pytest.mark.parametrize(
    "lines", [b"\xef\xbb\xbf%s\r\n\r\n", b"\n\n%s\n  \n", b"%s"], ids=["BOM and CRLF", "blank lines", "no newline"]
)
def test_what_only_looks_strange_is_taken(house, monkeypatch, capsys, lines):
    house.data.write_bytes(lines % b"\n".join(json.dumps(row).encode() for row in ROWS))
    assert house.tell(monkeypatch, capsys, "plan")[0] == 0


def test_ids_in_rows_are_never_paths(house, monkeypatch, capsys):
    house.data.write_text("".join(json.dumps(row | {"prompt_id": "../../x", "id": "/etc/x"}) + "\n" for row in ROWS))
    assert house.tell(monkeypatch, capsys, "plan")[0] == 0
    from tpaw_ray.config import load_config
    from tpaw_ray.data.prompts import prepare_prompts
    from tpaw_ray.runs.store import RunStore

    prepare_prompts(load_config(house.file), RunStore.open(str(house.runs), "t"), tiny_tokenizer())
    written = files_of(house.folder) - {"runs", "runs/t", "config.yaml", "train.jsonl"}
    assert all(
        re.fullmatch(r"runs/t/prompts(/(train|validation|test)(/\d{5}.parquet)?|/committed.json)?", name) for name in written
    )


def test_a_pickle_is_never_opened(house, monkeypatch, capsys):
    pickled_weights(house)
    house.tell(monkeypatch, capsys, "plan")
    shutil.copy(house.tiny_model / "model.safetensors", house.model())
    assert house.tell(monkeypatch, capsys, "plan")[0] == 0
    from tpaw_ray.config import ModelConfig
    from tpaw_ray.policy.model import load_model
    from tpaw_ray.policy.start import import_start
    from tpaw_ray.runs.store import RunStore

    store = RunStore.open(str(house.runs), "t")
    import_start(ModelConfig(path=str(house.model())), store, tiny_tokenizer())
    load_model(store.checkpoint(0), precision="fp32")
    assert not list(Path(store.checkpoint(0)).glob("*.bin"))
    assert not (house.folder / "unpickled").exists()


def test_a_models_own_code_runs_only_where_the_config_says_so_and_then_it_is_said(house, monkeypatch, capsys):
    own_code(house)
    assert house.tell(monkeypatch, capsys, "plan")[0] == 4
    assert not (house.folder / "ran").exists()
    shutil.copy(house.tiny_model / "config.json", house.model())  # one that names no code, so that it loads
    code, out, err = house.tell(monkeypatch, capsys, "plan", "model.trust_remote_code=true")
    assert (code, err) == (0, "") and "warning: model.trust_remote_code is true" in out
