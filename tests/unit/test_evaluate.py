"""What `tpaw evaluate` opens, refuses, keeps and does not ask for again; a fake stands in for the engines."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from tests.scripted_judge import scripted_judge
from tests.tiny import tiny_tokenizer
from tests.unit.test_versus import BAD, GOOD, prefers_good
from tpaw_ray.cli import main
from tpaw_ray.config import dump_config, resolve_config
from tpaw_ray.data.prompts import prepare_prompts
from tpaw_ray.data.rows import Conversation, Message
from tpaw_ray.data.template import render, render_prompt
from tpaw_ray.errors import CheckpointError, ConfigError, DataError, GenerationError, RunError
from tpaw_ray.evaluate import _config_for
from tpaw_ray.evaluation import asking, exact, head_to_head
from tpaw_ray.evaluation.asking import Reply, answer_questions, room_for_answers
from tpaw_ray.evaluation.exact import ExactMatch, evaluate_exact, exact_folder
from tpaw_ray.evaluation.harness import HarnessRun, HarnessTask, as_the_run_asks
from tpaw_ray.evaluation.head_to_head import Side, compare_models, versus_folder
from tpaw_ray.evaluation.judge import Judge
from tpaw_ray.evaluation.questions import Question, heldout_questions
from tpaw_ray.evaluation.subject import open_subject
from tpaw_ray.evaluation.words import show_versus
from tpaw_ray.experiment import testing
from tpaw_ray.opponents.messages import Response, Sampling
from tpaw_ray.policy.directory import own_code
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8)


def write_model(folder, weights=b"0"):
    """A folder that passes for a model where nobody loads its weights."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run whose checkpoints 0 and 1 are evaluated and whose checkpoint 2 is not yet."""
    rows = [{"question": f"{number}+1=", "answer": f"#### {number + 1}"} for number in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = resolve_config(
        {
            "run": {"name": "demo", "root": str(tmp_path / "runs")},
            "model": {"path": str(write_model(tmp_path / "model"))},
            "data": {
                "path": str(tmp_path / "d.jsonl"),
                "prompt_length": 40,
                "max_length": 80,
                "validation_fraction": 0.4,
                "test_fraction": 0.0,
                "shard_size": 5,
            },
        }
    )
    store = RunStore.open(config.run.root, config.run.name)
    prepare_prompts(config, store, tiny_tokenizer())
    store.write_bytes(store.path("config.yaml"), dump_config(config).encode())
    for number in range(3):
        write_model(tmp_path / f"runs/demo/checkpoints/{number:03d}", weights=bytes([number]))
        store.commit(store.checkpoint(number))
    for number in range(2):
        store.commit(store.evaluation(number))
    return store


class Engines:
    """A fake in place of opponents: every other prompt is answered rightly, by its number, in every sample anew."""

    def __init__(self, monkeypatch):
        self.started = []
        self.asked = 0
        self.adapters = []
        monkeypatch.setattr(exact, "engines", self.engines)
        monkeypatch.setattr(exact, "generate", self.generate)

    @contextmanager
    def engines(self, subject, number, asked, say):
        self.started.append(number)
        yield ["handle"]

    def generate(self, store, questions, handles, advance, *, at_once):
        tokenizer, left = tiny_tokenizer(), questions.limit
        self.adapters.append(questions.adapter)
        for index, path in enumerate(store.files(store.prompts(questions.split))):
            rows = store.read_rows(path, Prompt)[:left]
            left = None if left is None else left - len(rows)
            said = []
            for row in rows:
                right = (row.row + questions.iteration) % 2 == 0
                text = f"#### {row.row + 1 if right else 999}"
                tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
                said.append(
                    Generation(
                        prompt_id=row.prompt_id,
                        iteration=questions.iteration,
                        opponent=questions.opponent,
                        generated_tokens=tokens,
                        finish_reason="stop",
                    )
                )
            self.asked += len(said)
            if said:
                store.write_rows(store.shard(questions.output, index), said, Generation)
            advance(len(said))


@pytest.fixture
def fake_engines(monkeypatch):
    return Engines(monkeypatch)


def wanted(**changes):
    return ExactMatch(**({"split": "validation", "limit": None, "samples": 1, "sampling": GREEDY, "seed": 42} | changes))


# What is opened.


def test_a_run_opens_with_all_its_checkpoints_one_or_the_last(run):
    assert list(open_subject(run.root).checkpoints) == [0, 1, 2]
    assert list(open_subject(run.root, checkpoint="1").checkpoints) == [1]
    assert list(open_subject(f"{run.root}/", checkpoint="last").checkpoints) == [2]


def test_a_checkpoints_folder_in_a_run_is_that_checkpoint_of_the_run(run):
    opened = open_subject(f"{run.root}/checkpoints/001")
    assert (opened.is_run, list(opened.checkpoints), opened.called(1)) == (True, [1], "demo-001")


def test_a_run_takes_settings_of_its_engines_and_nothing_that_would_change_what_it_is(run):
    assert open_subject(run.root, overrides=["opponents.threads=1"]).config.opponents.threads == 1
    with pytest.raises(ConfigError, match=r"data\.limit, team\.size: cannot be set for the evaluation of"):
        open_subject(run.root, overrides=["team.size=1", "data.limit=3"])
    with pytest.raises(ConfigError, match="is a run, which has a config of its own"):
        open_subject(run.root, config=run.path("config.yaml"))


def test_a_checkpoint_that_is_not_there_is_told(run):
    for given in ("7", "-1", "first", "１"):
        with pytest.raises(RunError, match="expected all, last or one of 0, 1, 2 of"):
            open_subject(run.root, checkpoint=given)


@pytest.mark.parametrize("named", ["9" * 5000, "-1", "١", "x"], ids=["without end", "negative", "another script", "no number"])
def test_a_checkpoint_that_is_no_number_of_ours_is_told(run, named):
    with pytest.raises(RunError, match=r"--checkpoint: found '.{1,60}, expected all, last or one of 0, 1, 2 of"):
        open_subject(run.root, checkpoint=named)


def test_links_that_lead_in_a_circle_are_told(run, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(CheckpointError, match="circle: neither a run's folder"):
        open_subject(str(tmp_path / "circle"))
    opened = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"), to=str(tmp_path / "circle"))
    with pytest.raises(RunError, match=r"circle/config\.yaml: cannot be written"):
        exact.prepare(opened)


def test_a_model_needs_a_config_and_results_of_another_are_not_mixed_with_its_own(run, tmp_path):
    with pytest.raises(CheckpointError, match="neither a run's folder"):
        open_subject(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is a model: name with --config"):
        open_subject(str(tmp_path / "model"))
    opened = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"), to=str(tmp_path / "out"))
    assert (opened.is_run, opened.called(0), opened.config.model.path) == (False, "model", str(tmp_path / "model"))
    exact.prepare(opened)
    again = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"), to=str(tmp_path / "out"))
    assert again.store == opened.store
    other = write_model(tmp_path / "other")
    with pytest.raises(RunError, match="was started with another config; choose --to with another folder or undo"):
        open_subject(str(other), config=run.path("config.yaml"), to=str(tmp_path / "out"))


# Exact match.


def test_greedy_answers_are_judged_and_kept_in_a_folder_of_their_own(run, fake_engines, capsys):
    before = run.checksums(run.evaluation(1)), run.files(run.evaluation(1))
    subject = open_subject(run.root, checkpoint="1")
    result = evaluate_exact(subject, 1, wanted(), Reporter())
    rows = [row for path in run.files(run.prompts("validation")) for row in run.read_rows(path, Prompt)]
    right = sum(row.row % 2 == 0 for row in rows)
    assert result["judged"] == len(rows) > 5
    assert result["accuracy"]["value"] == pytest.approx(right / len(rows))
    output = exact_folder(subject, 1, wanted())
    assert output.startswith(f"{run.evaluation(1)}/exact-validation-greedy-")
    run.verify(output)
    assert run.read_json(f"{output}/result.json") == result
    run.verify(run.evaluation(1))
    assert (run.checksums(run.evaluation(1)), before[1]) == before


def test_what_is_there_is_not_asked_for_again_and_other_settings_or_weights_are(run, fake_engines):
    subject = open_subject(run.root)
    first = evaluate_exact(subject, 0, wanted(), Reporter())
    assert evaluate_exact(subject, 0, wanted(), Reporter()) == first
    assert fake_engines.started == [0]
    evaluate_exact(subject, 0, wanted(limit=3), Reporter())
    evaluate_exact(subject, 1, wanted(), Reporter())
    assert fake_engines.started == [0, 0, 1]
    longer = open_subject(run.root, overrides=["data.max_length=100"])
    assert exact_folder(longer, 0, wanted()) != exact_folder(subject, 0, wanted())


def test_a_checkpoint_that_is_an_adapter_answers_and_not_the_model_it_stands_on(run, fake_engines):
    config = open_subject(run.root).config
    adapted = config.model.model_copy(update={"lora": config.model.lora.model_copy(update={"rank": 4})})
    run.write_bytes(run.path("config.yaml"), dump_config(config.model_copy(update={"model": adapted})).encode())
    for number in (0, 1):
        evaluate_exact(open_subject(run.root), number, wanted(), Reporter())
    assert fake_engines.adapters == ["", run.checkpoint(1)]


def test_a_model_is_evaluated_anew_when_the_data_changed(run, fake_engines, tmp_path):
    def evaluated():
        opened = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"), to=str(tmp_path / "out"))
        exact.prepare(opened)
        return evaluate_exact(opened, 0, wanted(), Reporter())

    first = evaluated()
    assert (evaluated(), fake_engines.started) == (first, [0])
    rows = (tmp_path / "d.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(rows[:20]))
    assert evaluated()["judged"] < first["judged"]
    assert fake_engines.started == [0, 0]


def test_answers_to_prompts_that_vanish_are_not_committed(run, fake_engines):
    whole = fake_engines.generate

    def while_prompts_change(store, questions, *rest, **more):
        whole(store, replace(questions, limit=2), *rest, **more)

    exact.generate = while_prompts_change  # undone by the fixture
    subject = open_subject(run.root)
    with pytest.raises(RunError, match=r"found 2 answers, expected \d+; what was asked changed meanwhile"):
        evaluate_exact(subject, 0, wanted(), Reporter())
    assert not run.is_committed(exact_folder(subject, 0, wanted()))


def test_samples_are_drawn_one_by_one_and_make_pass_at_k_and_a_majority(run, fake_engines):
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8)
    result = evaluate_exact(open_subject(run.root), 0, wanted(samples=2, sampling=sampling, limit=7), Reporter())
    assert (result["judged"], fake_engines.asked) == (7, 14)  # across a shard of 5
    assert result["accuracy"]["value"] == 0.5  # each prompt is right in one of its two samples
    assert (result["pass_at"]["1"]["value"], result["pass_at"]["2"]["value"]) == (0.5, 1.0)
    assert result["majority"]["value"] == 0.5


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"name": 3}', b"[" * 100_000], ids=["empty", "list", "number", "deep"])
def test_a_damaged_result_is_named(run, fake_engines, content):
    subject = open_subject(run.root)
    evaluate_exact(subject, 1, wanted(), Reporter())
    path = f"{exact_folder(subject, 1, wanted())}/result.json"
    run.write_bytes(path, content)
    with pytest.raises(RunError, match=rf"^{path}: .*the run is damaged there"):
        evaluate_exact(subject, 1, wanted(), Reporter())


def test_a_checkpoint_that_its_run_has_yet_to_evaluate_is_left_alone(run, fake_engines):
    with pytest.raises(RunError, match="the run has not evaluated checkpoint 2 yet"):
        evaluate_exact(open_subject(run.root), 2, wanted(), Reporter())
    assert not run.exists(run.evaluation(2))


def test_a_split_without_rows_is_told(run, fake_engines):
    with pytest.raises(
        DataError, match=r"no rows are held out for test; data\.heldout_path or data\.test_fraction holds some out"
    ):
        evaluate_exact(open_subject(run.root), 0, wanted(split="test"), Reporter())


# Questions.


def test_held_out_rows_come_back_as_questions_with_the_texts_of_the_data(run):
    config = open_subject(run.root).config
    found = heldout_questions(config, run, "validation", 4)
    ids = [row.prompt_id for path in run.files(run.prompts("validation")) for row in run.read_rows(path, Prompt)]
    assert [question.question_id for question in found] == ids[:4]
    assert all(question.turns[0].endswith("+1=") for question in found)
    (path,) = [config.data.path]
    with open(path, "w") as file:
        file.write(json.dumps({"question": "other", "answer": "1"}))
    with pytest.raises(DataError, match="the data has changed since"):
        heldout_questions(config, run, "validation", 4)


def test_a_prompt_alone_is_rendered_as_with_its_response():
    tokenizer = tiny_tokenizer()
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="1+1?"))
    prompt, _ = render(tokenizer, Conversation(row=0, prompt=turns, target="2"), [tokenizer.eos_token_id])
    assert render_prompt(tokenizer, turns, "question 1") == prompt


def test_a_second_turn_is_asked_with_the_answer_to_the_first(run, monkeypatch):
    tokenizer, asked = tiny_tokenizer(), []

    def ask(handles, index, requests, sampling):
        asked.append((sampling.temperature, [tokenizer.decode(request.prompt_tokens) for request in requests]))
        return [
            Response(
                prompt_id=request.prompt_id,
                generated_tokens=tokenizer("yes")["input_ids"],
                finish_reason="length" if len(asked) > 1 else "stop",
            )
            for request in requests
        ]

    monkeypatch.setattr(asking, "ask", ask)
    questions = [Question(question_id="1", turns=("a?", "b?")), Question(question_id="2", turns=("c?",))]
    samplings = [GREEDY, Sampling(temperature=0.7, top_p=1.0, max_new_tokens=8)]
    said = answer_questions([], open_subject(run.root), 0, questions, samplings, lambda _: None)
    assert said == [[Reply("yes", cut_off=False), Reply("yes", cut_off=True)], [Reply("yes", cut_off=True)]]
    assert asked == [
        (0.0, ["<|user|>a?<|end|><|assistant|>"]),
        (0.7, ["<|user|>c?<|end|><|assistant|>"]),
        (0.0, ["<|user|>a?<|end|><|assistant|>yes<|end|><|user|>b?<|end|><|assistant|>"]),
    ]


def test_a_test_prompt_that_ends_every_engine_is_not_judged_and_named(run, fake_engines, monkeypatch, capsys):
    def generate(store, questions, *rest, **more):
        fake_engines.generate(store, questions, *rest, **more)
        path = store.files(questions.output)[0]
        first, *others = store.read_rows(path, Generation)
        set_aside.append(first.prompt_id)
        rows = [replace(first, generated_tokens=[], finish_reason="set_aside"), *others]
        store.write_rows(path, rows, Generation)

    set_aside = []
    monkeypatch.setattr(testing, "generate", generate)
    monkeypatch.setattr(testing, "SPLIT", "validation")  # the run holds out nothing else
    asked = testing.Asked(config=open_subject(run.root).config, store=run, checkpoint=0)
    roster = SimpleNamespace(expect=lambda *_: None, opponents=lambda _: [])
    testing._answer(testing._Guest(asked=asked, tokenizer=tiny_tokenizer(), roster=roster), 0, Reporter())
    found = run.counts(run.path("tested", "000"))
    assert found["judged"] == run.counts(run.path("prompts"))["validation"] - 1
    told = f"warning: test prompts that end every engine are not judged: {set_aside[0]}"
    assert told in " ".join(capsys.readouterr().out.split())


# The command.


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["tpaw", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr()


def test_a_finished_evaluation_is_shown_without_ray(run, fake_engines, monkeypatch, capsys):
    subject = open_subject(run.root)
    for number in (0, 1):
        evaluate_exact(subject, number, wanted(sampling=Sampling(temperature=0.0, top_p=1.0, max_new_tokens=256)), Reporter())
    monkeypatch.setattr("tpaw_ray.launch.connect", lambda **_: pytest.fail("Ray was started"))
    store_evaluation = run.evaluation(2)
    run.remove(run.checkpoint(2))
    code, said = command(monkeypatch, capsys, "exact", run.root)
    assert code in (0, None)
    assert "demo-000" in said.out
    assert "demo-001" in said.out
    assert not run.exists(store_evaluation)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["exact", "RUN", "--samples", "4", "--temperature", "0"], 2, "gives one prompt the same answer every time"),
        (["exact", "RUN", "--checkpoint", "9"], 5, "expected all, last or one of 0, 1, 2"),
        (["exact", "nowhere"], 4, "neither a run's folder"),
        (["tasks", "RUN"], 2, "expected either --suite (leaderboard-v1, leaderboard-v2, gsm8k-local) or --task"),
        (["tasks", "RUN", "--suite", "v3"], 2, "--suite: found v3, expected one of leaderboard-v1"),
        (["versus", "RUN", "RUN", "--judge-model", "m"], 2, "OPENAI_API_KEY is not set in the environment"),
        (
            ["versus", "RUN", "RUN", "--judge-model", "m", "--judge-url", "host:80/v1"],
            2,
            "--judge-url: found 'host:80/v1', expected",
        ),
        (["versus", "RUN", "RUN", "--judge-model", "m", "--judge-extra", "{"], 2, "--judge-extra: not valid JSON"),
        (["answers", "RUN", "--questions", "none.jsonl", "--output", "o"], 3, "none.jsonl: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_message(run, monkeypatch, capsys, arguments, code, told):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("tpaw_ray.launch.connect", lambda **_: pytest.fail("Ray was started"))
    given = [
        f"{run.root}/checkpoints/001" if argument == "RUN" and arguments[0] == "versus" else argument for argument in arguments
    ]
    found, said = command(monkeypatch, capsys, *(run.root if argument == "RUN" else argument for argument in given))
    assert found == code
    assert told in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["exact", "RUN", "--split", "test"], 3, "no rows are held out for test"),
        (["tasks", "RUN", "--suite", "gsm8k-local"], 3, "task gsm8k_local: no data set was named"),
        (["tasks", "RUN", "--task", "nosuch"], 2, "task nosuch: lm-evaluation-harness has no such task"),
        (["answers", "RUN", "--output", "FOLDER"], 2, "is a folder; expected the file to write"),
        (["answers", "RUN", "--output", "FOLDER/new/"], 2, "is a folder; expected the file to write"),
        (["answers", "RUN", "--output", "FOLDER/d.jsonl/o"], 5, "d.jsonl/o.writable: cannot be written"),
        (["answers", "RUN", "--output", "/proc/x/o"], 5, "/proc/x/o.writable: cannot be written"),
        (["answers", "RUN", "--output", "ftp://x/y"], 5, "found an address of 'ftp'"),
    ],
)
def test_what_can_be_known_before_ray_starts_is_told_before_it(run, monkeypatch, capsys, tmp_path, arguments, code, told):
    monkeypatch.setattr("tpaw_ray.launch.connect", lambda **_: pytest.fail("Ray was started"))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: SimpleNamespace(task_index=["gsm8k_local"]))
    more = ["--questions", tmp_path / "d.jsonl"] if arguments[0] == "answers" else []
    given = [argument.replace("RUN", run.root).replace("FOLDER", str(tmp_path)) for argument in arguments]
    found, said = command(monkeypatch, capsys, *given, "--checkpoint", "1", *more)
    assert (found, "Traceback" in said.err) == (code, False)
    assert told in said.err


def test_the_file_for_answers_is_tried_and_left_alone_until_they_are_there(run, monkeypatch, capsys, tmp_path):
    def without_ray(**_):
        raise RunError("Ray would start")

    (tmp_path / "o.json").write_text("earlier")
    monkeypatch.setattr("tpaw_ray.launch.connect", without_ray)
    arguments = ["answers", run.root, "--checkpoint", "1", "--questions", tmp_path / "d.jsonl", "--output", tmp_path / "o.json"]
    assert command(monkeypatch, capsys, *arguments)[0] == 5
    assert (tmp_path / "o.json").read_text() == "earlier"
    assert not list(tmp_path.glob("*.writable"))


@pytest.mark.parametrize("trusted", [True, False])
def test_that_a_models_own_code_runs_is_said_at_the_opening(run, monkeypatch, capsys, trusted):
    config = open_subject(run.root).config
    model = config.model.model_copy(update={"trust_remote_code": trusted})
    run.write_bytes(run.path("config.yaml"), dump_config(config.model_copy(update={"model": model})).encode())
    _, said = command(monkeypatch, capsys, "exact", run.root, "--split", "test")
    assert (own_code(f"{run.root}/checkpoints") in said.out) == trusted


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--judge-url", "http://me:swordfish@host"], "--judge-url: the address holds a password or token"),
        (["--judge-url", "http://host/v1?api_key=swordfish"], "--judge-url: the address holds a password or token"),
        (["--judge-extra", '{"api_key": "swordfish"}'], "--judge-extra.api_key: looks like a credential"),
        (["--judge-extra", "[" * 100_000], "--judge-extra: not valid JSON"),
    ],
)
def test_a_judges_credentials_are_refused_without_repeating_them(run, monkeypatch, capsys, option, told):
    code, said = command(monkeypatch, capsys, "versus", run.root, run.root, "--judge-model", "m", *option)
    assert code == 2 and told in said.err
    assert "swordfish" not in said.out + said.err


def test_the_config_of_a_models_evaluation_is_kept_beside_its_results(run, tmp_path):
    opened = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"), to=str(tmp_path / "out"))
    exact.prepare(opened)
    kept = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (kept["run"]["name"], kept["model"]["path"]) == ("out", str(tmp_path / "model"))
    assert opened.store.is_committed(opened.store.path("prompts"))


def test_all_turns_of_a_question_fit(run):
    subject = open_subject(run.root)  # data.max_length is 80
    one, two = Question(question_id="1", turns=("a?",)), Question(question_id="2", turns=("a?", "b?"))
    # <|user|> a ? <|end|> <|assistant|> are 5 tokens; an empty answer and its end, and the second question, 1 + 5 more
    assert (room_for_answers(subject, one), room_for_answers(subject, two)) == (75, (80 - 11) // 2)
    assert room_for_answers(subject, Question(question_id="3", turns=("a" * 76,))) == 1
    with pytest.raises(DataError, match=r"question '4': found 80 tokens without an answer, expected fewer than .* \(80\)"):
        room_for_answers(subject, Question(question_id="4", turns=("a" * 77,)))


@pytest.fixture
def sides(run, tmp_path, monkeypatch):
    """A checkpoint that always says GOOD, cut off, and a model that says BAD; fakes stand in for their engines."""

    @contextmanager
    def engines(*_):
        yield []

    def answer(handles, subject, number, questions, samplings, advance):
        return [[Reply(GOOD if subject.is_run else BAD, cut_off=subject.is_run)] for _ in questions]

    monkeypatch.setattr(head_to_head, "engines", engines)
    monkeypatch.setattr(head_to_head, "answer_questions", answer)
    model = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"), to=str(tmp_path / "out"), keeps=False)
    return Side(open_subject(run.root, checkpoint="1"), 1), Side(model, 0)


ASKED = [Question(question_id=name, turns=(f"{name}?",)) for name in ("a", "b")]


def test_the_side_that_answers_better_wins_and_nothing_is_asked_twice(sides, capsys):
    connected = []
    with scripted_judge(prefers_good) as server:
        judge = Judge(model="tiny", base_url=server.url)
        result, path = compare_models(sides, ASKED, GREEDY, judge, Reporter(), lambda: connected.append(1), at_once=2)
        assert (result["first"], result["second"]) == ("demo-001", "model")
        assert (result["wins"], result["ties"], result["losses"], result["consistent"]) == (2, 0, 0, 2)
        assert (result["win_rate"]["value"], result["cut_off"], result["unreadable"]) == (1.0, [2, 0], [])
        assert (len(connected), len(server.requests)) == (2, 1 + 4)  # the first, to see that the judge answers
        again = compare_models(sides, ASKED, GREEDY, judge, Reporter(), lambda: pytest.fail("Ray was started"), at_once=2)
        assert again == (result, path) and len(server.requests) == 5
        other = (sides[1], sides[0])
        lost, _ = compare_models(other, ASKED, GREEDY, judge, Reporter(), lambda: None, at_once=2)
        assert (lost["wins"], lost["losses"], lost["win_rate"]["value"], lost["cut_off"]) == (0, 2, 0.0, [0, 2])
    show_versus(result, path, Reporter())
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 answers of demo-001 were cut off" in shown and "answers of model" not in shown


@pytest.mark.parametrize(
    ("question", "error", "told"),
    [("a?", GenerationError, "judge tiny at .* does not answer .*an example"), ("a" * 99, DataError, "question 'q': found 102 ")],
)
def test_a_judge_who_is_not_there_and_a_question_without_room_are_told_before_any_answer(sides, question, error, told):
    judge = Judge(model="tiny", base_url="http://127.0.0.1:9/v1", retries=0)
    asked = [Question(question_id="q", turns=(question,))]
    with pytest.raises(error, match=told):
        compare_models(sides, asked, GREEDY, judge, Reporter(), lambda: pytest.fail("Ray was started"), at_once=1)


def versus_folder_of(run, tmp_path, *overrides, first="run/checkpoints/001"):
    """The folder of a comparison with a model, as `tpaw evaluate versus` opens both sides."""
    sides = [
        open_subject(path, config=_config_for(path, run.path("config.yaml")), checkpoint="last", overrides=overrides, keeps=keeps)
        for path, keeps in ((first.replace("run", run.root, 1), True), (str(tmp_path / "model"), False))
    ]
    questions = [Question(question_id="1", turns=("a?",))]
    return versus_folder(*(Side(side, next(iter(side.checkpoints))) for side in sides), questions, GREEDY)


def test_one_checkpoint_of_a_run_is_compared_with_a_model(run, tmp_path):
    assert versus_folder_of(run, tmp_path).startswith(f"{run.evaluation(1)}/versus-model-")
    assert versus_folder_of(run, tmp_path, first="run").startswith(f"{run.evaluation(2)}/versus-model-")


@pytest.mark.parametrize("override", ["data.max_length=100", "opponents.engine_args={max_num_batched_tokens: 512}"])
def test_answers_given_under_other_settings_are_not_compared_again(run, tmp_path, override):
    assert versus_folder_of(run, tmp_path, override) != versus_folder_of(run, tmp_path) == versus_folder_of(run, tmp_path)


def test_the_second_side_keeps_nothing_and_minds_nobodys_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = open_subject(str(tmp_path / "model"), config=run.path("config.yaml"))  # evaluations/model
    exact.prepare(opened)
    given = {"config": run.path("config.yaml"), "overrides": ["data.prompt_length=39"]}
    with pytest.raises(RunError, match="was started with another config"):
        open_subject(str(tmp_path / "model"), **given)
    assert open_subject(str(tmp_path / "model"), **given, keeps=False).config.data.prompt_length == 39


def test_the_harness_asks_our_own_task_as_the_run_does_and_others_as_they_are(run):
    subject = open_subject(run.root)
    ours, other = (HarnessRun(title="t", tasks=(HarnessTask(name=name),), chat=False) for name in ("gsm8k_local", "arc"))
    asked = as_the_run_asks(ours, subject)
    assert (asked.max_new_tokens, asked.answer_pattern) == (256, subject.config.evaluation.answer_pattern)
    assert as_the_run_asks(other, subject) == other


def test_a_template_that_the_harness_would_not_see_is_told(run, tmp_path):
    wanted = HarnessRun(title="t", tasks=(HarnessTask(name="arc"),), chat=True)
    given = {"config": run.path("config.yaml"), "keeps": False}
    assert as_the_run_asks(wanted, open_subject(str(tmp_path / "model"), **given)) == wanted
    plain = open_subject(str(tmp_path / "model"), overrides=["model.chat_template=plain"], **given)
    with pytest.raises(ConfigError, match=r"model\.chat_template: .*/model has none or another"):
        as_the_run_asks(wanted, plain)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (tmp_path / "model/chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="has none or another"):
        as_the_run_asks(wanted, plain)
    assert as_the_run_asks(replace(wanted, chat=False), plain).chat is False
