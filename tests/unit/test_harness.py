"""lm-evaluation-harness: the local GSM8K task against our own exact match, suites, and what is told when data is missing."""

import json
import random
from dataclasses import replace

import pytest

from tpaw_ray.config import EvaluationConfig
from tpaw_ray.errors import ConfigError, DataError, GenerationError
from tpaw_ray.evaluation import harness
from tpaw_ray.evaluation.exact_match import judge, verdict
from tpaw_ray.evaluation.harness import (
    SUITES,
    HarnessRun,
    HarnessTask,
    _check,
    data_sets,
    evaluate_task,
    harness_result,
    load_tasks,
    local_files,
    run_harness,
)
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Generation, Prompt

FORMS = (
    # An answer, and whether it is right where the reference is {n} (a whole number above 999).
    ("So it is {n}.\n#### {n}", True),
    ("#### {comma}", True),
    ("#### {n}.0", True),
    ("#### {n}.00 dollars", True),
    ("####{n}", True),
    ("####    {n}\n", True),
    ("#### 0{n}", True),
    ("#### {n}.", True),
    ("#### {n} apples and 3 pears", True),
    ("#### 12\nNo, wait.\n#### {n}", True),
    ("#### {n}\nThe next problem is easy.", True),
    ("#### {n}\n#### {n}", True),
    ("#### {n}\nOr rather\n#### {other}", False),
    ("#### {n}.5", False),
    ("#### -{n}", False),
    ("#### {other}", False),
    ("The answer is {n}.", False),
    ("### {n}", False),
    ("", False),
    ("####", False),
    ("#### none", False),
    ("#### ${n}", False),  # the default pattern wants the number right after the marks
    ("#### {n}%", True),
    ("#### {n}e3", True),
    ("#### {spaced}", False),
    ("#### {n},5", False),  # commas are thousands here, wherever they stand
    ("\\boxed{{{n}}}", False),
    ("#### ٣٤", False),
    ("#### {n}/2", True),
    ("#### .{n}", False),
)


def stored():
    """200 answers with their references, and whether each is right: every form above, and negative and decimal references."""
    chance = random.Random(5)
    rows = []
    while len(rows) < 200:
        form, right = FORMS[len(rows) % len(FORMS)]
        number = chance.randrange(1000, 1_000_000)
        text = form.format(n=number, comma=f"{number:,}", other=number + 1, spaced=f"{number:,}".replace(",", " "))
        reference = f"Work.\n#### {number:,}" if len(rows) % 2 else f"#### {number}"
        if len(rows) % 7 == 3:  # a negative one
            reference, right = reference.replace("#### ", "#### -"), text.endswith(f"#### -{number}")
        rows.append((f"Question {len(rows)}?", reference, text, right))
    return rows


class CharacterTokenizer:
    """Stands in for a tokenizer: a token a character."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(map(chr, row)) for row in rows]


def stored_model(texts):
    """A fake model of the harness that says what is stored for the question at the end of a prompt."""
    from lm_eval.api.model import LM

    class StoredAnswers(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [texts[request.args[0].strip().splitlines()[-1]] for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    return StoredAnswers()


@pytest.fixture(scope="module")
def judged_by_both(tmp_path_factory):
    """Correctness of the stored answers by question: by the harness's own pipeline, and by our exact match."""
    rows = stored()
    path = tmp_path_factory.mktemp("gsm8k") / "test.jsonl"
    path.write_text("".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer, *_ in rows))
    task = SUITES["gsm8k-local"].tasks[0]
    wanted = HarnessRun(title="gsm8k-local", tasks=(task,), chat=False, data=str(path))
    loaded = load_tasks([task], wanted)[task.name]
    found = evaluate_task(stored_model({question: text for question, _, text, _ in rows}), loaded, task, wanted)
    theirs = {sample["doc"]["question"]: sample["exact_match"] == 1.0 for sample in found["samples"][task.name]}
    pattern = EvaluationConfig().answer_pattern
    from tpaw_ray.data.answers import final_answer

    prompts = [
        Prompt(prompt_id=question, row=0, prompt_tokens=[], target_tokens=[], reference_answer=final_answer(answer, pattern))
        for question, answer, *_ in rows
    ]
    said = [
        Generation(prompt_id=question, iteration=0, opponent=0, generated_tokens=list(map(ord, text)), finish_reason="stop")
        for question, _, text, _ in rows
    ]
    answers = judge(prompts, said, CharacterTokenizer(), pattern)
    return rows, theirs, {answer.prompt_id: answer.correct for answer in answers}, found, verdict(answers)


def test_the_local_gsm8k_task_and_our_exact_match_agree_on_200_stored_answers(judged_by_both):
    _, theirs, ours, *_ = judged_by_both
    assert len(ours) == 200
    assert theirs == ours


def test_and_both_are_right_about_every_one_of_them(judged_by_both):
    rows, theirs, *_ = judged_by_both
    assert [text for question, _, text, right in rows if theirs[question] != right] == []
    assert 60 < sum(theirs.values()) < 140  # both outcomes are there in numbers


def test_the_harness_reports_the_accuracy_that_we_do(judged_by_both):
    *_, found, ours = judged_by_both
    assert found["results"]["gsm8k_local"]["exact_match,final-answer"] == pytest.approx(ours.accuracy)
    assert found["n-samples"]["gsm8k_local"] == {"original": 200, "effective": 200}


def test_the_prompt_is_the_bare_question_so_that_the_chat_template_makes_of_it_what_a_run_does(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}))
    task = SUITES["gsm8k-local"].tasks[0]
    (loaded,) = load_tasks([task], HarnessRun(title="t", tasks=(task,), chat=True, data=str(tmp_path)))[task.name]
    row = loaded.test_docs()[0]
    assert (loaded.doc_to_text(row), loaded.doc_to_target(row)) == ("1+1?", "2")
    assert loaded.config.generation_kwargs["until"] == []  # the model's own end token, as in a run


def test_local_data_that_is_missing_is_told(tmp_path):
    task = SUITES["gsm8k-local"].tasks[0]
    with pytest.raises(DataError, match=r"no data set was named; expected --data with GSM8K's test\.jsonl"):
        load_tasks([task], HarnessRun(title="t", tasks=(task,), chat=True))
    with pytest.raises(DataError, match=r"holds no test\.jsonl"):
        local_files(str(tmp_path))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for none in (str(tmp_path / "none"), "a" * 5000, "~nobody-here/x", str(tmp_path / "loop")):
        with pytest.raises(DataError, match="no such file or folder"):
            local_files(none)
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}))
    shots = replace(task, num_fewshot=2)
    with pytest.raises(DataError, match=r"holds no train\.jsonl, which --num-fewshot 2 takes its examples from"):
        load_tasks([shots], HarnessRun(title="t", tasks=(shots,), chat=True, data=str(tmp_path)))


class Entry:
    """Stands in for an entry of the harness's index."""

    def __init__(self, cfg, tags=()):
        self.cfg, self.tags = cfg, set(tags)


def test_the_data_sets_of_a_group_are_those_of_its_tasks():
    index = {
        "group": Entry({"group": "group", "task": ["one", {"group": "inner"}]}),
        "inner": Entry({"group": "inner", "task": ["two"]}),
        "tag": Entry(None, ["one"]),
        "one": Entry({"task": "one", "dataset_path": "owner/one", "dataset_name": "main"}),
        "two": Entry({"task": "two", "dataset_path": "owner/two"}),
    }
    assert data_sets(index, "group") == {"owner/one (main)", "owner/two"}
    assert data_sets(index, "tag") == {"owner/one (main)"}
    assert data_sets(index, "none") == set()


class Manager:
    """Stands in for the harness's TaskManager where no hub can be reached."""

    def __init__(self, error):
        self.error = error
        self.task_index = {"arc": Entry({"task": "arc", "dataset_path": "owner/arc", "dataset_name": "hard"})}

    def load(self, names):
        raise self.error


def test_data_that_cannot_be_reached_is_named_with_the_reason(monkeypatch):
    from tpaw_ray.evaluation.harness import _load

    wanted = HarnessRun(title="t", tasks=(), chat=False)
    with pytest.raises(DataError) as error:
        _load(Manager(ConnectionError("Couldn't reach 'owner/arc' on the Hub")), HarnessTask(name="arc"), wanted)
    assert str(error.value).startswith(
        "task arc: the data set owner/arc (hard) cannot be loaded, neither from this machine's cache"
    )
    with pytest.raises(ConfigError, match="task arc: No module named 'langdetect'; install"):
        _load(Manager(ImportError("No module named 'langdetect'")), HarnessTask(name="arc"), wanted)
    with pytest.raises(ConfigError, match="task nothing: lm-evaluation-harness has no such task"):
        _load(Manager(ValueError()), HarnessTask(name="nothing"), wanted)


def test_the_first_leaderboards_suite_has_its_shots():
    shots = {task.name: task.num_fewshot for task in SUITES["leaderboard-v1"].tasks}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}


def test_the_local_task_takes_the_configs_answer_pattern_and_length(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "So <2>"}))
    task, asked = SUITES["gsm8k-local"].tasks[0], []
    wanted = HarnessRun(title="t", tasks=(task,), chat=False, data=str(tmp_path), max_new_tokens=700, answer_pattern="<([0-9]+)>")
    model = stored_model({"1+1?": "#### 3, no: <2>"})
    say = model.generate_until
    model.generate_until = lambda requests, **_: asked.extend(requests) or say(requests)
    found = evaluate_task(model, load_tasks([task], wanted)[task.name], task, wanted)
    assert found["results"][task.name]["exact_match,final-answer"] == 1.0
    assert asked[0].args[1]["max_gen_toks"] == 700


def test_what_a_suite_needs_is_told_before_anything_starts():
    (task,) = SUITES["leaderboard-v2"].tasks
    assert set(task.needs) >= {"langdetect", "math_verify"}  # what the tasks of the harness import
    lacking = HarnessTask(name="arc", needs=("json", "no_such_package"))
    with pytest.raises(ConfigError, match="task arc: needs no_such_package: pip install"):
        _check(Manager(None), lacking, HarnessRun(title="t", tasks=(lacking,), chat=False))


def test_the_first_leaderboards_mmlu_is_the_plain_mean_of_its_tasks(tmp_path):
    store = RunStore.open(str(tmp_path), "run")
    task = next(task for task in SUITES["leaderboard-v1"].tasks if task.name == "mmlu")
    found = {
        "results": {
            name: {"acc,none": accuracy} for name, accuracy in {"mmlu": 0.4, "stem": 0.4, "large": 0.3, "small": 0.7}.items()
        },
        "groups": {name: {"acc,none": 0.4} for name in ("mmlu", "stem")},
    }
    store.write_json(f"{store.root}/mmlu.json", found)
    result = harness_result(store, store.root, "demo", HarnessRun(title="t", tasks=(task,), chat=False))
    assert result["headlines"] == {"mmlu": pytest.approx(0.5)}


def test_a_task_that_breaks_down_is_named(tmp_path, monkeypatch):
    def break_down(*_):
        raise ValueError("images are not supported")

    store, task = RunStore.open(str(tmp_path), "run"), HarnessTask(name="pictures")
    for name, fake in {
        "load_tasks": lambda *_: {"pictures": []},
        "vllm_model": lambda *_, **__: None,
        "evaluate_task": break_down,
    }.items():
        monkeypatch.setattr(harness, name, fake)
    monkeypatch.setattr(harness, "prepare_process", lambda _: None)
    with pytest.raises(GenerationError, match="task pictures: ValueError: images are not supported"):
        run_harness(store, store.root, "model", None, HarnessRun(title="t", tasks=(task,), chat=False))
