"""Answers from our own opponents, one checkpoint at a time: the engines of a run, without the run. Ray must be connected."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ray.actor import ActorHandle

from tpaw_ray.config import Config
from tpaw_ray.data.rows import Message
from tpaw_ray.data.template import render_prompt
from tpaw_ray.errors import DataError, GenerationError
from tpaw_ray.evaluation.questions import Question
from tpaw_ray.evaluation.subject import Subject
from tpaw_ray.nodes import NodeWatch, wait_for_nodes
from tpaw_ray.opponents.messages import SET_ASIDE, EngineSettings, Request, Response, Sampling
from tpaw_ray.opponents.opponent import Opponent
from tpaw_ray.opponents.roster import Roster, ask
from tpaw_ray.opponents.seeds import request_seed
from tpaw_ray.placement import ANYWHERE, Demand, engines_of
from tpaw_ray.plan import ASKING_CPUS, num_askers, shards_asked
from tpaw_ray.runs.store import MARKER
from tpaw_ray.wording import shorten

AT_ONCE = 1024
"""Questions given to the engines in one call."""


@dataclass(frozen=True)
class Reply:
    """What a checkpoint said in a turn. `cut_off` says that it was not at its end when it had as many tokens as it may."""

    text: str
    cut_off: bool


@contextmanager
def engines(subject: Subject, number: int, asked: int, say: Callable[[str], object]) -> Iterator[list[ActorHandle[Opponent]]]:
    """A checkpoint's opponents, ready; ended when the block ends. `asked` answers are to come, of which few may be set aside.

    Raises:
        ResourceError: when the cluster lacks what they take for longer than `run.wait_minutes`.
        CheckpointError: when the checkpoint's folder is missing or incomplete.
        GenerationError: when an engine cannot start.
    """
    config = subject.config
    needed = asking_demands(config)
    wait_for_nodes(needed, config.run.wait_minutes, say)
    settings = EngineSettings.from_config(config, subject.ends)
    roster = Roster(settings, engines_of(config))
    folder = subject.base(number)
    try:
        with NodeWatch(lambda: needed, config.run.wait_minutes, say):
            roster.host(number, folder, f"{folder}/{MARKER if subject.is_run else 'config.json'}")
            roster.expect(number, int(config.opponents.max_set_aside * asked))
            roster.wait_ready(number)
            yield roster.opponents(number)
    finally:
        roster.retire_all()


def asking_demands(config: Config) -> tuple[Demand, ...]:
    """One checkpoint's engines and those who ask them."""
    asking = ASKING_CPUS * num_askers(shards_asked(config))
    return engines_of(config), Demand(role="Ray Data task", number=1, cpus=asking, labels=ANYWHERE)


def answer_questions(
    handles: Sequence[ActorHandle[Opponent]],
    subject: Subject,
    number: int,
    questions: Sequence[Question],
    samplings: Sequence[Sampling],
    advance: Callable[[int], None],
) -> list[list[Reply]]:
    """The answers to every turn of every question, a question's sampling its own. Calls `advance(turns)` as they come.

    A turn is asked with the answers to those before it. The seed of an answer hangs on question and turn alone.

    Raises:
        DataError: when the chat template refuses a question.
        GenerationError: when an answer cannot be given: a question that is too long, or ends every engine.
    """
    said: list[list[Reply]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        open_ = [index for index, question in enumerate(questions) if turn < len(question.turns)]
        for sampling in dict.fromkeys(samplings[index] for index in open_):
            own = [index for index in open_ if samplings[index] == sampling]
            for first in range(0, len(own), AT_ONCE):
                chosen = own[first : first + AT_ONCE]
                requests = [_request(subject, number, questions[index], said[index]) for index in chosen]
                for index, response in zip(chosen, ask(handles, first, requests, sampling), strict=True):
                    said[index].append(_reply(subject, response))
                advance(len(chosen))
    return said


def room_for_answers(subject: Subject, question: Question) -> int:
    """New tokens that each answer to a question may have, so that all its turns fit in `data.max_length`.

    Raises:
        DataError: when the chat template refuses the question, or it leaves no room.
    """
    asked = [*question.context]
    for turn in question.turns:
        asked += [Message(role="user", content=turn), Message(role="assistant", content="")]
    given = len(render_prompt(subject.tokenizer, asked[:-1], f"question {question.question_id}"))
    longest = subject.config.data.max_length
    if given + len(question.turns) > longest:
        raise DataError(
            f"question {shorten(question.question_id)}: found {given} tokens without an answer, expected fewer than "
            f"data.max_length ({longest}); leave it out or raise that"
        )
    return (longest - given) // len(question.turns)


def _request(subject: Subject, number: int, question: Question, said: Sequence[Reply]) -> Request:
    turns = list(question.context)
    for asked, answered in zip(question.turns, said, strict=False):  # one turn more was asked than answered
        turns += [Message(role="user", content=asked), Message(role="assistant", content=answered.text)]
    turns.append(Message(role="user", content=question.turns[len(said)]))
    name = f"{question.question_id} (turn {len(said) + 1})"
    return Request(
        prompt_id=name,
        prompt_tokens=render_prompt(subject.tokenizer, turns, f"question {name}"),
        seed=request_seed(subject.config.run.seed, 0, number, name),
        adapter=subject.adapter(number),
    )


def _reply(subject: Subject, response: Response) -> Reply:
    if response.finish_reason == SET_ASIDE:
        raise GenerationError(f"question {response.prompt_id}: has no answer, since it ends every engine; leave it out")
    text = str(subject.tokenizer.decode(response.generated_tokens, skip_special_tokens=True))
    return Reply(text, cut_off=response.finish_reason == "length")
