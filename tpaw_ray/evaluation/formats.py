"""Answers in the file formats of the judges that others run: AlpacaEval's outputs, and MT-Bench's as FastChat writes them."""

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tpaw_ray.errors import DataError
from tpaw_ray.evaluation.questions import Question
from tpaw_ray.wording import shorten

Format = Literal["alpaca-eval", "mt-bench"]

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""By category of the question, as in FastChat's `fastchat/llm_judge/common.py`."""
OTHER_TEMPERATURE = 0.7
"""FastChat's, for a category it does not list."""


LONGEST: Mapping[Format, int] = {"alpaca-eval": 2048, "mt-bench": 1024}
"""New tokens of an answer: those of AlpacaEval's own model configs, and FastChat's `--max-new-token`."""


def check_format(form: Format, questions: Sequence[Question]) -> None:
    """Refuse questions that a format cannot hold.

    Raises:
        DataError: naming the first.
    """
    for question in questions:
        if form == "alpaca-eval" and len(question.turns) > 1:
            raise DataError(
                f"question {shorten(question.question_id)}: has {len(question.turns)} turns; AlpacaEval's format holds one, "
                "so use --format mt-bench"
            )
        if question.context:
            raise DataError(
                f"question {shorten(question.question_id)}: has messages before the user's; the format has no place for them"
            )


def temperature_of(form: Format, question: Question) -> float:
    """What a question is answered with where nothing else is said: greedy for AlpacaEval, FastChat's by category for MT-Bench."""
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE) if form == "mt-bench" else 0.0


def written(form: Format, questions: Sequence[Question], answers: Sequence[Sequence[str]], model: str, now: float) -> bytes:
    """The file: `answers[i]` are those to the turns of question `i`; `model` is the generator's name, `now` in Unix seconds."""
    check_format(form, questions)
    if form == "alpaca-eval":
        rows = [
            {"instruction": question.turns[0], "output": said[0], "generator": model, "dataset": question.dataset}
            for question, said in zip(questions, answers, strict=True)
        ]
        return (json.dumps(rows, indent=2) + "\n").encode()
    lines = [
        _fastchat_row(question, said, model, now)
        for question, said in sorted(zip(questions, answers, strict=True), key=lambda pair: _order(pair[0]))
    ]
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def _fastchat_row(question: Question, said: Sequence[str], model: str, now: float) -> dict[str, Any]:
    name = question.question_id
    # Made of what it answers, so that the same answers make the same file but for the time.
    answer_id = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([name, model, list(said)])).hex
    return {
        "question_id": int(name) if name.isascii() and name.isdigit() else name,
        "answer_id": answer_id,
        "model_id": model,
        "choices": [{"index": 0, "turns": list(said)}],
        "tstamp": now,
    }


def _order(question: Question) -> tuple[int, int, str]:
    name = question.question_id
    return (0, int(name), "") if name.isascii() and name.isdigit() else (1, 0, name)
