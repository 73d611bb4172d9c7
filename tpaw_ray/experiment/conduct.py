"""`tpaw experiment`: do what `phases.next_step` says until nothing is left, or something failed."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from tpaw_ray.config import Config
from tpaw_ray.errors import ConfigError, DataError, DivergedError, RunError
from tpaw_ray.experiment.commands import Commands, Ended
from tpaw_ray.experiment.design import START, Design
from tpaw_ray.experiment.phases import (
    Answered,
    Ask,
    Choose,
    Conclude,
    Known,
    Outcome,
    Planned,
    Play,
    Question,
    choose,
    final_runs,
    next_step,
    questions_of,
    start_of,
    tuning_runs,
)
from tpaw_ray.experiment.record import Record, store_of
from tpaw_ray.experiment.table import ON, Scores, as_json, make_table
from tpaw_ray.experiment.testing import Asked, answer_test, answered
from tpaw_ray.experiment.words import show, show_plan, write_table
from tpaw_ray.nodes import cluster_nodes
from tpaw_ray.runs.claim import Claim
from tpaw_ray.runs.continuation import check_same_run
from tpaw_ray.runs.progress import Reporter
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Prompt

PlayAll = Callable[[Sequence[Planned], Callable[[Planned, Ended], None]], None]
AnswerAll = Callable[[Sequence[Asked]], None]


def conduct(design: Design, reporter: Reporter, *, verbose: bool = False) -> int:
    """Conduct or continue an experiment; returns the exit code of the first run that failed, or 0.

    Raises:
        TpawError: for everything a user can mend, before the first run starts.
    """
    store = RunStore.open(design.root, design.name)
    record = Record(design, store)
    if record.tested:
        write_table(record)  # should its writer have died before
        show(record, reporter)
        reporter.say(f"{store.root}: all runs are done and tested; nothing to do")
        return 0
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(interrupt) != signal.SIG_IGN:
            signal.signal(interrupt, signal.default_int_handler)
    claim = Claim(store, reporter.say)
    claim.wait_until_free()
    check(design, record)

    import ray

    from tpaw_ray.launch import connect

    try:
        connect(verbose=verbose)
        most = None if design.parallel == "resources" else design.parallel
        commands = Commands(store, ray.get_runtime_context().gcs_address, cluster_nodes, most)
        with claim, reporter:
            record = Record(design, store)  # another one may have gone on with it meanwhile
            return walk(design, record, commands.play, lambda asked: answer_test(asked, reporter), reporter)
    finally:
        ray.shutdown()


def check(design: Design, record: Record) -> None:
    """Resolve every run's config, and check what can be checked before the first one starts.

    Raises:
        TpawError: naming the method, and the field, file or folder at fault.
    """
    from tpaw_ray.forecast import check_folders

    looked_at = set()
    runs = every_run(design, record)
    for run in runs:
        config = run.config
        if config.evaluation.split != "validation":
            raise ConfigError("base: evaluation.split: found test, expected validation; test is for the end of an experiment")
        if not config.data.validation_fraction:
            raise ConfigError("base: data.validation_fraction: found 0; settings and iterations are chosen on validation")
        if not (config.data.heldout_path or config.data.test_fraction):
            raise ConfigError("base: data.heldout_path or data.test_fraction: set one; methods are compared on test")
        check_same_run(config, store_of(run))
        sources = (config.model.model_dump_json(), config.data.model_dump_json())
        if sources not in looked_at:
            looked_at.add(sources)
            check_folders(config, store_of(run))
    lengths = {_answer_length(run.config): run.method for run in runs}
    if len(lengths) > 1:
        told = ", ".join(f"{new} new tokens within {all_} of {method}" for (new, all_), method in lengths.items())
        raise ConfigError(
            "base: evaluation.max_new_tokens, data.max_length: found different ones, expected one of each for all, since answers "
            f"are compared ({told})"
        )


def _answer_length(config: Config) -> tuple[int, int]:
    """The most new tokens of an answer, and of prompt and answer together."""
    return config.evaluation.max_new_tokens or config.sampling.max_new_tokens, config.data.max_length


def show_work(design: Design, reporter: Reporter) -> None:
    """Print how many runs there are and which, then check them; nothing is started or written.

    Raises:
        TpawError: as `check` does.
    """
    record = Record(design, RunStore.open(design.root, design.name))
    runs = every_run(design, record)
    show_plan(design, runs, {run.key: is_finished(run) for run in runs}, reporter)
    check(design, record)


def is_finished(run: Planned) -> bool:
    """Whether a run's last checkpoint is made and evaluated."""
    store = store_of(run)
    return store.is_committed(store.iteration(run.config.iterations - 1))


def has_begun(run: Planned) -> bool:
    """Whether there is anything of a run: one whose folder was removed is begun anew, whatever became of it before."""
    store = store_of(run)
    return store.exists(store.path("config.yaml"))


def every_run(design: Design, record: Record) -> list[Planned]:
    """All runs of the experiment; before the choice, final runs stand there with the first settings of the grid."""
    settings = record.choices or {method: (design.points(method) or [{}])[0] for method in design.methods}
    return [*tuning_runs(design), *final_runs(design, settings)]


@dataclass
class _Round:
    """What became of the runs of one round."""

    failed: dict[str, Ended]
    done: int = 0


def walk(design: Design, record: Record, play: PlayAll, answer: AnswerAll, reporter: Reporter) -> int:
    """Take step after step; returns the exit code of the first run that failed, or 0 when all is done.

    Raises:
        LearnerError: when none of a method's settings could be trained.
        TpawError: what `answer` raises.
    """
    while True:
        known = look(design, record)
        step = next_step(design, known)
        if isinstance(step, Play):
            record.begin([*tuning_runs(design), *(final_runs(design, record.choices) if record.choices else [])])
            failed = _play(step, record, play, reporter)
            lasting = {run.key: failed[run.key] for run in step.runs if run.key in failed and not _counts(run, failed[run.key])}
            if lasting:
                _tell(lasting, record, reporter)
                return next(iter(lasting.values())).exit_code
        elif isinstance(step, Choose):
            choices = choose(design, known)
            if design.tuning:
                record.note("tuned")
            record.choose(choices)
        elif isinstance(step, Ask):
            record.note("trained")
            record.note("testing")
            answer([_asked(design, record, question) for question in step.questions])
        elif isinstance(step, Conclude):
            record.table = _table(design, record, known)
            record.note("tested")
        else:
            write_table(record)
            show(record, reporter)
            reporter.say(f"the experiment lies in {record.store.root}")
            return 0


def look(design: Design, record: Record) -> Known:
    """What is known of the experiment, from its folder and those of its runs.

    Raises:
        DataError: when a run's checkpoints have no accuracy.
        RunError: when runs of one seed did not have the same held-out prompts.
    """
    runs = [*tuning_runs(design), *(final_runs(design, record.choices) if record.choices else [])]
    diverged = record.given_up()
    given_up = {run.key for run in runs if run.key in diverged and has_begun(run)}
    found = {run.key: outcome_of(run, given_up=run.phase == "final" and run.key in given_up) for run in runs}
    outcomes = {key: outcome for key, outcome in found.items() if outcome}
    finished = [run for run in runs if run.key in outcomes]
    check_same_heldout(finished)
    finals = [run for run in runs if run.phase == "final"]
    answers = {}
    if finals and all(run.key in outcomes for run in finals):
        stores = {run.key: store_of(run) for run in finals}
        for question in questions_of(finals, outcomes):
            if answer := answered(stores[question.run], question.checkpoint):
                answers[question] = answer
    return Known(
        outcomes=outcomes,
        given_up=given_up - outcomes.keys(),
        choices=record.choices,
        answers=answers,
        tested=record.tested,
    )


def outcome_of(run: Planned, *, given_up: bool = False) -> Outcome | None:
    """What a run's checkpoints scored on validation, from what its evaluations committed; null while it is not finished.

    Of one that was `given_up` counts what was evaluated before: the start at least.

    Raises:
        DataError: when no validation prompt has a final answer, so that there is no accuracy.
    """
    store = store_of(run)
    made = [store.evaluation(number) for number in range(run.config.iterations + 1)]
    if not is_finished(run):
        made = list(takewhile(store.is_committed, made)) if given_up else []
    if not made:
        return None
    counts = [store.counts(evaluation) for evaluation in made]
    if any(count["accuracy"] is None for count in counts):
        raise DataError(
            f"{store.root}: no validation prompt has a final answer that evaluation.answer_pattern finds; an experiment compares "
            "accuracies"
        )
    return Outcome(accuracy=[count["accuracy"] for count in counts], target_logp=[count["target_logp"] for count in counts])


def check_same_heldout(finished: Sequence[Planned]) -> None:
    """Compare the held-out prompts of runs of one seed, by the checksums of their files.

    Raises:
        RunError: naming two runs whose prompts differ.
    """
    first: dict[int, tuple[Planned, dict[str, str]]] = {}
    for run in finished:
        store = store_of(run)
        sums = store.checksums(store.path("prompts"))
        heldout = {name: digest for name, digest in sums.items() if name.startswith(("validation/", "test/"))}
        other, expected = first.setdefault(run.seed, (run, heldout))
        if heldout != expected:
            raise RunError(
                f"{store.root}: its held-out prompts are not those of {store_of(other).root}; expected the same for every method"
            )


def check_test_rows(run: Planned) -> None:
    """See that the test split can be judged, long before it is asked: by its reference answers alone.

    Raises:
        DataError: when the split is empty, or none of its rows has a final answer.
    """
    store, left = store_of(run), run.config.evaluation.limit or 2**31
    rows = 0
    for path in store.files(store.prompts("test")):
        references = store.read_columns(path, Prompt, "reference_answer").column(0)[: left - rows]
        if references.null_count < len(references):
            return
        rows += len(references)
    raise DataError(
        f"{store.prompts('test')}: none of the {rows} test prompts that checkpoints would answer has a final answer that "
        "evaluation.answer_pattern finds; an experiment ends on this split"
    )


def _play(step: Play, record: Record, play: PlayAll, reporter: Reporter) -> dict[str, Ended]:
    this = _Round(failed={})
    with reporter.stage(f"{step.phase} runs", len(step.runs)) as advance:

        def on_end(run: Planned, ended: Ended) -> None:
            """Note how a run ended; one that ended well without its last checkpoint has failed."""
            this.done += 1
            outcome = outcome_of(run) if ended.exit_code == 0 else None
            if outcome is None:
                if ended.exit_code == 0:
                    ended = replace(ended, exit_code=RunError.exit_code, said="ended without its last checkpoint")
                this.failed[run.key] = ended
                record.fail(run, ended)
                result = f"failed with exit code {ended.exit_code}: {ended.said}"
            else:
                check_test_rows(run)  # what only the end would tell is told by the first run
                result = f"validation accuracy {', '.join(f'{value:.3f}' for value in outcome.accuracy)}"
            reporter.say(f"  {this.done}/{len(step.runs)} {run.key} ({ended.seconds:.0f} s): {result}")
            advance(1)

        play(step.runs, on_end)
    return this.failed


def _counts(run: Planned, ended: Ended) -> bool:
    """Whether a failure says something of the method: the run is tried once more, then its settings count as unusable, or, of a
    final run, it counts as far as it came."""
    store = store_of(run)
    came = run.phase == "tuning" or store.is_committed(store.evaluation(0))
    return came and ended.exit_code == DivergedError.exit_code


def _tell(failed: dict[str, Ended], record: Record, reporter: Reporter) -> None:
    for key, ended in failed.items():
        log = record.store.path("logs", *key.split("/"), "output.txt")
        reporter.say(f"failed: {key}: exit code {ended.exit_code}: {ended.said} ({log})")
    reporter.say(f"{len(failed)} runs failed; the others are kept, and the same command tries these again")


def _asked(design: Design, record: Record, question: Question) -> Asked:
    run = next(run for run in final_runs(design, record.choices or {}) if run.key == question.run)
    return Asked(config=run.config, store=store_of(run), checkpoint=question.checkpoint)


def _table(design: Design, record: Record, known: Known) -> list[dict[str, object]]:
    finals = final_runs(design, record.choices or {})
    starts = [known.answers[Question(run=start_of(finals, seed), checkpoint=0)] for seed in design.seeds]
    start = _scores(starts, [0] * len(starts))
    scores, given_up = {START: dict.fromkeys(ON, start)}, {}
    for method in design.methods:
        own = [run for run in finals if run.method == method]
        scores[method] = {}
        for on in ON:
            outcomes = [known.outcomes[run.key] for run in own]
            numbers = [outcome.best() if on == "best" else outcome.last for outcome in outcomes]
            asked = [Question(run=run.key, checkpoint=number) for run, number in zip(own, numbers, strict=True)]
            scores[method][on] = _scores([known.answers[question] for question in asked], numbers)
        given_up[method] = [run.seed for run in own if known.outcomes[run.key].last < run.config.iterations]
    return as_json(make_table(design.seeds, scores, design.baselines, given_up))


def _scores(answers: Sequence[Answered], checkpoints: Sequence[int]) -> Scores:
    return Scores.of([one.accuracy for one in answers], checkpoints, [one.judged for one in answers])
