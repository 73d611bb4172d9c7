"""`tpaw export`: on a run made by hand, whose checkpoints are tiny models."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.unit.test_trackers import evaluate, finish
from tpaw_ray.config import PRESETS, ModelConfig, dump_config, resolve_config
from tpaw_ray.errors import ConfigError, RunError
from tpaw_ray.handing_on.choice import choose
from tpaw_ray.handing_on.folder import hand_on
from tpaw_ray.methods import method_of
from tpaw_ray.policy.directory import COMPANIONS, copy_files
from tpaw_ray.policy.start import import_start
from tpaw_ray.runs.store import RunStore
from tpaw_ray.runs.summary import Row

HOSTILE = "</code><script>alert(1)</script>`|\x1b[31m\n---\n![x](http://a.b/c).jsonl"


def make_run(root, data="path/to/sums.jsonl", **sections):
    """A run of two iterations; exact match 1, 3 and 3 of 4, so that checkpoint 1 is the best."""
    base = {"run": {"name": "sums", "root": str(root)}, "model": {"path": "/home/somebody/start"}, "data": {"path": data}}
    config = resolve_config({**base, "iterations": 2, **sections})
    store = RunStore.open(str(root), "sums")
    store.write_bytes(store.path("config.yaml"), dump_config(config).encode())
    store.write_json(store.path("environment.json"), {"packages": {"torch": "9.8.7"}, "cluster": {}, "cpu": HOSTILE, "cores": 2})
    counts = {"rows": 110, "train": 100, "validation": 4, "test": 5, "too_long": 1, "duplicates": 0, "leaked": 0}
    store.commit(store.path("prompts"), **counts)
    for number in range(3):
        write_tiny_model(Path(store.checkpoint(number)), seed=number)
    store.commit(store.checkpoint(0))
    evaluate(store, 0, 0.25)
    finish(store, 0, steps=3, accuracy=0.75)
    finish(store, 1, steps=3, accuracy=0.75)
    return store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"))


def row(checkpoint, accuracy, target_logp=None):
    nothing = {"target_reward": None, "margin": None, "warnings": [], "seconds": {}, "sequences": {}, "tokens": {}}
    return Row(checkpoint=checkpoint, accuracy=accuracy, target_logp=target_logp, **nothing)


def test_the_best_has_the_highest_accuracy_and_the_earliest_of_equals_is_taken():
    rows = [row(0, 0.5, -1.0), row(1, 0.75, -9.0), row(2, 0.75, -2.0)]
    choice = choose("best", rows, [0, 1, 2], "validation")
    assert choice.checkpoint == 1
    assert "Of checkpoints 0, 1, 2 it has the highest accuracy on validation" in choice.reason


def test_without_accuracies_the_log_probability_decides_and_the_reason_says_so():
    rows = [row(0, None, -3.0), row(1, None, -2.0), row(2, None, -2.5)]
    choice = choose("best", rows, [0, 1, 2], "validation")
    assert choice.checkpoint == 1
    assert "log-probability" in choice.reason and "there is no accuracy" in choice.reason


def test_the_best_is_not_chosen_on_test():
    with pytest.raises(ConfigError, match="evaluated its checkpoints on the test split"):
        choose("best", [row(0, 0.5)], [0], "test")
    assert choose("0", [row(0, 0.5)], [0], "test").checkpoint == 0


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        ("3", RunError, "has no checkpoint 3; found 0, 1, 2"),
        ("last", ConfigError, "found 'last', expected a number or best"),
        ("-1", ConfigError, "expected a number or best"),
        ("²", ConfigError, "expected a number or best"),
        ("best", RunError, "no checkpoint of the run was evaluated"),
    ],
)
def test_a_checkpoint_that_cannot_be_meant_is_refused(wanted, error, words):
    with pytest.raises(error, match=words):
        choose(wanted, [row(0, None), row(1, None)], [0, 1, 2], "validation")


def test_the_exported_folder_is_the_checkpoint_and_transformers_loads_it(run, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    choice, place = hand_on(run.root, "best", str(tmp_path / "out" / "model"), push=False)
    assert (choice.checkpoint, place) == (1, str(tmp_path / "out" / "model"))
    assert sorted(path.name for path in Path(place).iterdir()) == sorted(["README.md", *run.checksums(run.checkpoint(1))])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    exported, made, other = (
        AutoModelForCausalLM.from_pretrained(path).model.embed_tokens.weight
        for path in (place, run.checkpoint(1), run.checkpoint(2))
    )
    assert torch.equal(exported, made) and not torch.equal(exported, other)
    ids = AutoTokenizer.from_pretrained(place).apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True
    )
    assert len(ids["input_ids"]) > 3


def test_the_card_holds_the_settings_the_evaluation_with_intervals_and_the_versions(run, tmp_path):
    from huggingface_hub import ModelCard

    _, place = hand_on(run.root, "2", str(tmp_path / "model"), push=False)
    card = ModelCard.load(Path(place) / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("exact_match", 0.75, "validation")
    assert result.dataset_name == "sums.jsonl, validation rows held out by the run"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    # Wilson's interval of 3 of 4: (0.75 + z²/8 ± z √(0.75·0.25/4 + z²/64)) / (1 + z²/4), z = 1.95996
    assert "| **2, this one** | 0.7500 | 0.3006 – 0.9544 | 4 | -28.500 |" in card.text
    assert "| 0 | 0.2500 | 0.0456 – 0.6994 | 4 | -30.500 | – | – |" in card.text
    assert "| `η`, target weight | `6.0` |" in card.text and "after 2 iterations of TPAW" in card.text
    assert "It was named by hand." in card.text and "on the high side" not in card.text
    assert "110 rows, of which 100 were trained on, 4 held out for validation" in card.text
    assert "| `torch` | `9.8.7` |" in card.text
    assert 'name = "model"' in card.text and "vllm serve model" in card.text
    assert "somebody" not in card.text  # folders of whoever ran it are nobody's business


def test_hostile_text_in_the_card_stays_text(tmp_path):
    from huggingface_hub import ModelCard
    from markdown_it import MarkdownIt

    store = make_run(tmp_path, data="d/" + HOSTILE.replace("\x1b", ""), evaluation={"answer_pattern": "(`|<img src=x>)"})
    _, place = hand_on(store.root, "1", str(tmp_path / "out"), push=False)
    card = ModelCard.load(Path(place) / "README.md")
    assert card.data.library_name == "transformers"  # the header ended where it should
    assert "\x1b" not in card.content
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert "<script" not in html and "<img" not in html and "a.b/c)" in html
    assert "<td><code>&lt;/code&gt;&lt;script&gt;" in html  # the processor's name, in one cell of a table
    assert "<code>(`|&lt;img src=x&gt;)</code>" in html


@pytest.mark.parametrize(
    ("preset", "says", "never"),
    [
        ("sft", "after 1 iteration of fine-tuning on the targets.", ("preference", "P_j", "`η`", "y_gen", "temperature")),
        ("dpo", "DPO on given preferences: the model learns to prefer the chosen", ("No preference labels", "temperature")),
        ("spin", "after 1 iteration of SPIN: the model", ("TPAW:", "rejected")),
    ],
)
def test_the_card_says_what_was_done_and_not_what_was_not(preset, says, never, tmp_path):
    config = load_preset(preset)
    store = make_run(tmp_path, team=config["team"], objective=config["objective"])
    _, place = hand_on(store.root, "1", str(tmp_path / "out"), push=False)
    text = Path(place, "README.md").read_text(encoding="utf-8")
    assert says in text
    assert [word for word in never if word in text] == []


def load_preset(name):
    return {key: dict(values) for key, values in PRESETS[name].items()}


def test_the_method_is_named_by_its_numbers():
    base = {"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}}
    config = resolve_config(base)
    assert method_of(config) == "TPAW"
    objective = config.objective.model_copy(update={"eta": 1.0})
    assert method_of(config.model_copy(update={"objective": objective})) == "TPAW without target weights"
    objective = config.objective.model_copy(update={"eta": 2.0})
    assert method_of(config.model_copy(update={"objective": objective})) == "team-based self-play with settings of its own"
    for own in ({"team": {"select": "spaced"}}, {"objective": {"weights": "frozen"}}, {"objective": {"detach_weights": False}}):
        assert method_of(resolve_config(base, own)) == "team-based self-play with settings of its own"
    dpo = resolve_config(base, load_preset("dpo"))
    assert method_of(dpo) == "iterated DPO on given preferences"
    assert method_of(dpo.model_copy(update={"iterations": 1})) == "DPO on given preferences"


def test_a_folder_that_holds_something_is_left_alone_and_an_empty_one_is_taken(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(RunError, match="is there already and not an empty folder"):
            hand_on(run.root, "1", str(tmp_path / name), push=False)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    hand_on(run.root, "1", str(tmp_path / "empty"), push=False)
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("environment.json", b"[1]", r"environment\.json: the run is damaged there \(found \[1\]"),
        ("environment.json", b'{"packages": {}, "cluster": [1]}', r"environment\.json: .*cluster: found \[1\]"),
        ("prompts/committed.json", b'{"counts": {"rows": 1}, "files": {}}', r"prompts/committed\.json: .*counts\.train: missing"),
        (
            "checkpoints/001/committed.json",
            b'{"counts": {}, "files": {"a": {}}}',
            r"001/committed\.json: .*files\.a\.bytes: missing",
        ),
    ],
)
def test_a_damaged_file_of_the_run_is_named_and_nothing_is_exported(run, tmp_path, name, content, told):
    whole = run.read_bytes(run.path(name))
    run.write_bytes(run.path(name), content)
    try:
        with pytest.raises(RunError, match=rf"^{run.root}/.*{told}"):
            hand_on(run.root, "1", str(tmp_path / "model"), push=False)
    finally:
        run.write_bytes(run.path(name), whole)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_no_disk_takes_is_told_and_an_unknown_users_is_one_by_that_name(run, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="cannot be written: File name too long"):
        hand_on(run.root, "1", str(tmp_path / ("a" * 300)), push=False)
    monkeypatch.chdir(tmp_path)  # as a shell takes it
    assert hand_on(run.root, "1", "~nobody-here/x", push=False)[1] == str(tmp_path / "~nobody-here/x")


def test_a_damaged_checkpoint_is_named_and_nothing_is_left_behind(tmp_path):
    store = make_run(tmp_path)
    weights = Path(store.checkpoint(1), "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "to").mkdir()
    with pytest.raises(RunError, match=r"checkpoints/001/model.safetensors: differs from what was committed"):
        hand_on(store.root, "1", str(tmp_path / "to" / "model"), push=False)
    assert list((tmp_path / "to").iterdir()) == []


def test_where_no_run_is_that_is_said(tmp_path):
    with pytest.raises(RunError, match="no run is there"):
        hand_on(str(tmp_path / "none"), "1", str(tmp_path / "out"), push=False)


def test_a_run_in_an_object_store_is_exported(bucket, tmp_path):
    from pyarrow import fs

    from tpaw_ray.runs.copies import copy_all

    local = make_run(tmp_path)
    store = RunStore.open(bucket, "sums")
    copy_all(fs.LocalFileSystem(), local.root, store.filesystem, store.at(store.root))
    choice, place = hand_on(store.root, "best", str(tmp_path / "out"), push=False)
    assert choice.checkpoint == 1
    assert Path(place, "model.safetensors").read_bytes() == Path(local.checkpoint(1), "model.safetensors").read_bytes()


def test_a_push_without_a_token_or_to_what_is_no_name_is_refused_before_anything_is_done(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="--push: found no token; set HF_TOKEN"):
        hand_on(run.root, "1", "me/sums", push=True)
    for name in ("sums", "a/b/c", "./sums", "me/su ms"):
        with pytest.raises(ConfigError, match="expected with --push the name of a model on the Hub"):
            hand_on(run.root, "1", name, push=True)


class Hub(BaseHTTPRequestHandler):
    """A server that speaks as much of the Hub's interface as a commit of small files needs, and keeps what it was sent."""

    requests: ClassVar[list] = []
    refuses = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"], body))
        address = f"http://{self.headers['Host']}/me/sums"
        if self.refuses:
            return self.answer(403, {"error": "you may not"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            return self.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}", "success": True})
        return self.answer(200, {"url": address, "errors": [], "warnings": []})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Tests are quiet."""


@pytest.fixture
def hub(monkeypatch):
    """The server's class, and a command that exports to it."""
    monkeypatch.setattr(Hub, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def export(*arguments):
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_for_a_test"}
        command = [sys.executable, "-c", "from tpaw_ray.cli import main; main()", "export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**environment, "HF_HUB_OFFLINE": "0"})

    yield Hub, export
    server.shutdown()


def test_a_push_makes_a_private_model_and_sends_the_checkpoint_with_its_card_as_one_commit(run, hub):
    server, export = hub
    ended = export(run.root, "--to", "me/sums", "--push")
    assert ended.returncode == 0, ended.stderr
    assert "checkpoint 1 is in http://127.0.0.1" in ended.stdout
    assert {token for _, token, _ in server.requests} == {"Bearer hf_for_a_test"}
    sent = {path: body for path, _, body in server.requests}
    created = json.loads(sent["/api/repos/create"])
    assert (created["name"], created["organization"], created["visibility"]) == ("sums", "me", "private")
    lines = [json.loads(line) for line in sent["/api/models/me/sums/commit/main"].splitlines()]
    assert lines[0]["value"]["summary"] == "sums, checkpoint 1"
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
    assert files["model.safetensors"] == Path(run.checkpoint(1), "model.safetensors").read_bytes()
    assert b'name = "me/sums"' in files["README.md"]
    assert set(files) == {"README.md", *run.checksums(run.checkpoint(1))}


def test_a_hub_that_refuses_is_one_clear_error(run, hub, monkeypatch):
    server, export = hub
    monkeypatch.setattr(server, "refuses", True)
    ended = export(run.root, "--to", "me/sums", "--push")
    assert ended.returncode == 5
    assert ended.stderr.startswith("error: --push: me/sums cannot be pushed: ") and "403" in ended.stderr
    assert "Traceback" not in ended.stderr and "hf_for_a_test" not in ended.stderr


def test_nothing_is_sent_unless_told_to(run, hub, tmp_path, monkeypatch):
    server, export = hub
    ended = export(run.root, "--to", str(tmp_path / "me" / "sums"))
    assert ended.returncode == 0, ended.stderr
    assert server.requests == []


def test_of_a_start_models_folder_only_what_belongs_to_a_model_travels(tmp_path):
    write_tiny_model(tmp_path / "m")
    belongs = ["vocab.json", "merges.txt", "qwen.tiktoken", "tokenizer.model.v3", "spiece.model", "added_tokens.json"]
    belongs += ["special_tokens_map.json", "rwkv_vocab_v20230424.txt", "chat_template.json", "preprocessor_config.json"]
    belongs += ["tokenization_own.py", "extra.jinja", "LICENSE.txt", "generation_config.json", "tekken.json"]
    strays = [
        "hf_token.txt",
        "token",
        "credentials.json",
        "token.json",
        "committed.json",
        "notes.txt",
        "pytorch_model.bin",
        ".env",
    ]
    for name in (*belongs, *strays):
        if not (tmp_path / "m" / name).exists():
            (tmp_path / "m" / name).write_text("{}")
    store = RunStore.open(str(tmp_path), "t")
    import_start(ModelConfig(path=str(tmp_path / "m")), store, tiny_tokenizer())
    start, other = Path(store.checkpoint(0)), tmp_path / "other"
    other.mkdir()
    copy_files(tmp_path / "m", other, COMPANIONS)
    for place in (start, other):
        there = {path.name for path in place.iterdir()} - {"committed.json"}
        assert there >= {*belongs, "tokenizer.json", "tokenizer_config.json"}
        assert there & set(strays) == set()
    assert {"config.json", "model.safetensors"} <= {path.name for path in start.iterdir()}
    assert store.counts(str(start)) == {}  # the run's own marker
