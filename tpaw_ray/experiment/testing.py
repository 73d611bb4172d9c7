"""The test split, answered once by the checkpoints that an experiment chose.

All checkpoints share one Ray, and the next one's engine imports vLLM while the one before it answers. What a checkpoint answered
is committed in its run's folder, `tested/NNN`, and never asked again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tpaw_ray.config import Config
from tpaw_ray.data.template import end_tokens, load_tokenizer
from tpaw_ray.errors import DataError
from tpaw_ray.evaluation.asking import asking_demands
from tpaw_ray.evaluation.exact_match import judge, verdict
from tpaw_ray.experiment.phases import Answered
from tpaw_ray.nodes import NodeWatch, cluster_nodes, wait_for_nodes
from tpaw_ray.opponents.messages import SET_ASIDE, EngineSettings, Sampling
from tpaw_ray.opponents.rollouts import Questions, adapter_of, generate
from tpaw_ray.opponents.roster import Roster
from tpaw_ray.placement import engines_of, unmet
from tpaw_ray.plan import shards_asked
from tpaw_ray.policy.directory import own_code
from tpaw_ray.policy.start import locate
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer, Generation, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "test"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A checkpoint of a finished run that is to answer the test split."""

    config: Config
    store: RunStore
    checkpoint: int


@dataclass(frozen=True, kw_only=True)
class _Guest:
    """A checkpoint with what its engine needs."""

    asked: Asked
    tokenizer: "PreTrainedTokenizerBase"
    roster: Roster


def answered(store: RunStore, checkpoint: int) -> Answered | None:
    """What a checkpoint scored on the test split; null before it answered."""
    folder = _folder(store, checkpoint)
    if not store.is_committed(folder):
        return None
    counts = store.counts(folder)
    return Answered(accuracy=float(counts["accuracy"]), judged=int(counts["judged"]))


def answer_test(asked: Sequence[Asked], reporter: Reporter) -> None:
    """Have every checkpoint answer its run's test split greedily, on a Ray that is there.

    Raises:
        DataError: when there is no test prompt with a final answer.
        ResourceError: when the cluster lacks what an engine takes for longer than `run.wait_minutes`.
        TpawError: as a run's evaluation does.
    """
    demands = [asking_demands(one.config) for one in asked]
    minutes = max(one.config.run.wait_minutes for one in asked)
    for needed in demands:
        wait_for_nodes(needed, minutes, reporter.say)
    largest = max(demands, key=lambda needed: needed[0].number * (needed[0].gpus + needed[0].cpus))
    with NodeWatch(lambda: largest, minutes, reporter.say):
        _answer_all(asked, reporter)


def _answer_all(asked: Sequence[Asked], reporter: Reporter) -> None:
    guests: list[_Guest] = []
    rosters: dict[str, Roster] = {}
    for path in dict.fromkeys(one.config.model.path for one in asked if one.config.model.trust_remote_code):
        reporter.say(own_code(path))
    try:
        for one in asked:
            guests.append(_guest(one, rosters))
        ahead = 1 if _has_room_for_two(asked) else 0
        for index, guest in enumerate(guests):
            for number in range(index, min(index + 1 + ahead, len(guests))):
                _host(guests[number], number)
            guest.roster.wait_ready(index)
            _answer(guest, index, reporter)
            guest.roster.retire(index)
    finally:
        for roster in rosters.values():
            roster.retire_all()


def _guest(asked: Asked, rosters: dict[str, Roster]) -> _Guest:
    """Checkpoints whose engines are set up alike share a roster, and with it the ledger of what engines held."""
    tokenizer = load_tokenizer(asked.config.model)
    engines = engines_of(asked.config)
    settings = EngineSettings.from_config(asked.config, end_tokens(tokenizer, str(locate(asked.config.model.path))))
    key = f"{settings} {engines}"
    if key not in rosters:
        rosters[key] = Roster(settings, engines)
    return _Guest(asked=asked, tokenizer=tokenizer, roster=rosters[key])


def _host(guest: _Guest, number: int) -> None:
    """Start the engines of the guest of that number; in a roster guests are counted, since their checkpoints' numbers repeat."""
    path = guest.asked.store.checkpoint(guest.asked.config.base_of(guest.asked.checkpoint))
    guest.roster.host(number, path, f"{path}/committed.json")


def _answer(guest: _Guest, number: int, reporter: Reporter) -> None:
    config, store, checkpoint = guest.asked.config, guest.asked.store, guest.asked.checkpoint
    folder, limit = _folder(store, checkpoint), config.evaluation.limit
    started = time.perf_counter()
    total = min(int(store.counts(store.path("prompts"))[SPLIT]), limit or 2**31)
    guest.roster.expect(number, int(config.opponents.max_set_aside * total))
    with reporter.stage(f"{config.run.name} {checkpoint:03d}", total) as advance:
        generate(
            store,
            Questions(
                split=SPLIT,
                limit=limit,
                iteration=checkpoint,
                opponent=checkpoint,
                sampling=Sampling(
                    temperature=0.0,
                    top_p=1.0,
                    max_new_tokens=config.evaluation.max_new_tokens or config.sampling.max_new_tokens,
                ),
                run_seed=config.run.seed,
                output=f"{folder}/generations",
                adapter=adapter_of(store, config, checkpoint),
            ),
            guest.roster.opponents(number),
            advance,
            at_once=shards_asked(config),
        )
    prompts = [row for path in store.files(store.prompts(SPLIT)) for row in store.read_rows(path, Prompt)][:total]
    said = [row for path in store.files(f"{folder}/generations") for row in store.read_rows(path, Generation)]
    answers = judge(prompts, said, guest.tokenizer, config.evaluation.answer_pattern)
    found = verdict(answers)
    if unanswered := [row.prompt_id for row in said if row.finish_reason == SET_ASIDE]:
        reporter.say(f"warning: test prompts that end every engine are not judged: {', '.join(unanswered)}")
    if found.accuracy is None:
        raise DataError(f"{store.prompts(SPLIT)}: no test prompt has a final answer that evaluation.answer_pattern finds")
    store.write_rows(store.shard(f"{folder}/answers", 0), answers, Answer)
    store.commit(
        folder,
        sequences=found.answers,
        seconds=time.perf_counter() - started,
        accuracy=found.accuracy,
        judged=found.judged,
    )


def _folder(store: RunStore, checkpoint: int) -> str:
    return store.path("tested", f"{checkpoint:03d}")


def _has_room_for_two(asked: Sequence[Asked]) -> bool:
    most = max((engines_of(one.config) for one in asked), key=lambda one: one.number * (one.gpus + one.cpus))
    return not unmet([most, most], cluster_nodes())
