"""Head to head as a stage: both models answer, the judge decides, the outcome is kept.

RUN/evaluations/003/versus-demo-000-1f0c…/
  answers-first.json  answers-second.json     what both said
  verdicts.jsonl                              what the judge said, appended as it comes
  result-7d21….json                           the outcome, for each judge of its own
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpaw_ray.errors import DataError
from tpaw_ray.evaluation.asking import answer_questions, engines, room_for_answers
from tpaw_ray.evaluation.exact import check_settled
from tpaw_ray.evaluation.judge import Judge, try_judge
from tpaw_ray.evaluation.preference import preference
from tpaw_ray.evaluation.questions import Question
from tpaw_ray.evaluation.subject import Subject
from tpaw_ray.evaluation.versus import Match, Verdicts, judge_all, judged_of
from tpaw_ray.opponents.messages import Sampling
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.wording import shorten


@dataclass(frozen=True)
class Side:
    """One checkpoint of a subject."""

    subject: Subject
    number: int

    @property
    def name(self) -> str:
        return self.subject.called(self.number)


def versus_folder(one: Side, other: Side, questions: Sequence[Question], sampling: Sampling) -> str:
    """Where answers and verdicts lie, beside the first model's results; the digest is one of all that the answers hang on."""
    parts = [[_hangs_on(side) for side in (one, other)], [asdict(question) for question in questions], asdict(sampling)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{one.subject.store.evaluation(one.number)}/versus-{other.name}-{digest}"


def _hangs_on(side: Side) -> list[Any]:
    """What the answers of a side hang on, beside the questions and how they are drawn."""
    subject, config = side.subject, side.subject.config
    model = [subject.weights(side.number), subject.ends, subject.tokenizer.chat_template, config.learner.precision]
    return [*model, config.data.max_length, config.opponents.engine_args, config.run.seed]


def compare_models(
    sides: tuple[Side, Side],
    questions: Sequence[Question],
    sampling: Sampling,
    judge: Judge,
    reporter: Reporter,
    connect: Callable[[], object],
    *,
    at_once: int,
) -> tuple[dict[str, Any], str]:
    """The outcome, and its file. Answers and verdicts that are there are not asked for again; Ray is connected when it is needed.

    Raises:
        DataError: for a question of several turns, which this judge's prompt has no place for, and for one that leaves no room
            for an answer.
        TpawError: what engines and the judge raise.
    """
    for question in questions:
        if len(question.turns) > 1:
            raise DataError(f"question {shorten(question.question_id)}: has {len(question.turns)} turns, expected one")
    one, other = sides
    check_settled(one.subject, one.number)
    store, folder = one.subject.store, versus_folder(one, other, questions, sampling)
    paths = [f"{folder}/answers-{place}.json" for place in ("first", "second")]
    if not all(map(store.exists, paths)):  # what would end it is told before the engines start
        for side in sides:
            for question in questions:
                room_for_answers(side.subject, question)
        try_judge(judge)
    said = [
        _answers(side, questions, sampling, path, one.subject, reporter, connect) for side, path in zip(sides, paths, strict=True)
    ]
    matches = [
        Match(question_id=question.question_id, question=_text(question), answer=answer["output"], other=others["output"])
        for question, answer, others in zip(questions, *said, strict=True)
    ]
    with reporter.stage(f"judge {one.name} : {other.name}", 2 * len(matches)) as advance:
        verdicts = judge_all(matches, judge, Verdicts(store, folder), advance, at_once=at_once)
    judged, unreadable = judged_of(matches, verdicts)
    outcome = asdict(preference(judged))
    settings = {"model": judge.model, "base_url": judge.base_url, "max_tokens": judge.max_tokens, "extra": dict(judge.extra)}
    settings["template"] = hashlib.sha256(judge.template.encode()).hexdigest()
    result = {
        "first": one.name,
        "second": other.name,
        "asked": len(matches),
        "judge": settings,
        **outcome,
        "unreadable": unreadable,
        "cut_off": [sum(row["cut_off"] for row in rows) for rows in said],
        "sampling": asdict(sampling),
    }
    path = f"{folder}/result-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}.json"
    store.write_json(path, result)
    return result, path


def _answers(
    side: Side,
    questions: Sequence[Question],
    sampling: Sampling,
    path: str,
    keeper: Subject,
    reporter: Reporter,
    connect: Callable[[], object],
) -> list[dict[str, Any]]:
    store = keeper.store
    if not store.exists(path):
        connect()
        with (
            engines(side.subject, side.number, len(questions), reporter.say) as handles,
            reporter.stage(f"answer {side.name}", len(questions)) as advance,
        ):
            said = answer_questions(handles, side.subject, side.number, questions, [sampling] * len(questions), advance)
        rows = [
            {"question_id": question.question_id, "output": turns[0].text, "cut_off": turns[0].cut_off}
            for question, turns in zip(questions, said, strict=True)
        ]
        store.write_json(path, rows)
    found: list[dict[str, Any]] = store.read_json(path, [{"output": str, "cut_off": bool}])
    return found


def _text(question: Question) -> str:
    """A question as the judge reads it; with what was said before, each turn after its speaker."""
    if not question.context:
        return question.turns[0]
    turns = [*((turn.role, turn.content) for turn in question.context), ("user", question.turns[0])]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)
