"""`tpaw evaluate`: the commands, from their arguments to Ray and back. What is heavy is imported when it is needed."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tpaw_ray.credentials import find_credentials
from tpaw_ray.errors import ConfigError

if TYPE_CHECKING:
    from tpaw_ray.evaluation.harness import HarnessRun
    from tpaw_ray.evaluation.judge import Judge
    from tpaw_ray.evaluation.subject import Subject
    from tpaw_ray.runs.progress import Reporter
    from tpaw_ray.runs.store import RunStore

app = typer.Typer(no_args_is_help=True, help="Evaluate checkpoints of a run, or a model: exact match, tasks, head to head.")

SubjectPath = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, RUN/checkpoints/NNN, or a model's folder (with --config).")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings of the engines, as opponents.gpus=1; of a model, any of its config's."),
]
Checkpoint = Annotated[str, typer.Option(help="Of a run: a number, `all` or `last`.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="Of a model: the config of a run, for data and settings.")]
Folder = Annotated[str | None, typer.Option("--to", help="Of a model: the folder for results; default evaluations/NAME.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="Of sampling; 0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=1e-6, max=1.0, help="Nucleus of sampling.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens; default that of the config.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of Ray and vLLM.")]


@app.command()
def exact(
    subject: SubjectPath,
    settings: Settings = None,
    checkpoint: Checkpoint = "all",
    split: Annotated[
        Literal["validation", "test"] | None, typer.Option(help="Held-out rows; default evaluation.split of the config.")
    ] = None,
    limit: Limit = None,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Answers to each prompt, for pass@k and majority vote.")] = 1,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    config: ConfigOption = None,
    to: Folder = None,
    verbose: Verbose = False,
) -> None:
    """Exact match on held-out rows: greedy, or several samples a prompt for pass@k and majority vote, with intervals."""
    from tpaw_ray.evaluation.exact import ExactMatch, evaluate_exact, exact_folder, prepare, prompts_of
    from tpaw_ray.evaluation.words import show_exact
    from tpaw_ray.opponents.messages import Sampling
    from tpaw_ray.runs.progress import Reporter

    opened = _open(subject, checkpoint, config, settings, to)
    if temperature is None:
        temperature = opened.config.sampling.temperature if samples > 1 else 0.0
    if samples > 1 and temperature == 0.0:
        raise typer.BadParameter("--temperature 0 gives one prompt the same answer every time; expected more with --samples")
    wanted = ExactMatch(
        split=split or opened.config.evaluation.split,
        limit=limit or opened.config.evaluation.limit,
        samples=samples,
        sampling=Sampling(temperature=temperature, top_p=top_p, max_new_tokens=_longest(opened, max_new_tokens)),
        seed=opened.config.run.seed,
    )
    prepare(opened)
    with Reporter() as reporter, _ray(verbose) as connect:
        results = []
        for number in opened.checkpoints:  # before Ray starts
            if not opened.store.is_committed(exact_folder(opened, number, wanted)):
                prompts_of(opened, number, wanted)
        for number in opened.checkpoints:
            if not opened.store.is_committed(exact_folder(opened, number, wanted)):
                connect()
            results.append(evaluate_exact(opened, number, wanted, reporter))
    show_exact(results, reporter)
    reporter.say(f"results lie in {opened.store.path('evaluations')}/NNN/exact-{wanted.title}-…/result.json")


@app.command()
def tasks(
    subject: SubjectPath,
    settings: Settings = None,
    suite: Annotated[str | None, typer.Option(help="leaderboard-v1, leaderboard-v2 or gsm8k-local.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task or group of lm-evaluation-harness; may be given again.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question; default the task's.")] = None,
    data: Annotated[str | None, typer.Option(help="Of gsm8k-local: a JSONL file, or a folder with test.jsonl.")] = None,
    checkpoint: Checkpoint = "all",
    limit: Limit = None,
    chat: Annotated[bool | None, typer.Option(help="Put prompts through the chat template; default as the suite does.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest prompt with answer; default the model's own.")] = None,
    config: ConfigOption = None,
    to: Folder = None,
    verbose: Verbose = False,
) -> None:
    """Tasks of lm-evaluation-harness through vLLM: a named suite, or any of its tasks."""
    from tpaw_ray.evaluation.harness import as_the_run_asks
    from tpaw_ray.evaluation.words import show_tasks
    from tpaw_ray.runs.progress import Reporter

    wanted = _harness_run(suite, task or [], num_fewshot, data, limit, chat, max_length)
    opened = _open(subject, checkpoint, config, settings, to)
    wanted = as_the_run_asks(wanted, opened)
    with Reporter() as reporter, _ray(verbose) as connect:
        results = [_run_tasks(opened, number, wanted, reporter, connect) for number in opened.checkpoints]
    show_tasks(results, wanted, reporter)


@app.command()
def versus(
    subject: SubjectPath,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="What it is compared with: a run, RUN/checkpoints/NNN or a model.")
    ],
    judge_model: Annotated[str, typer.Option(help="The judge's name, as its server knows it.")],
    settings: Settings = None,
    judge_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, as http://127.0.0.1:8000/v1; default OpenAI's own.")
    ] = None,
    judge_prompt: Annotated[str | None, typer.Option(help="A Jinja file in place of the prompt that comes with tpaw.")] = None,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Longest reply of the judge, in tokens.")] = 1024,
    judge_extra: Annotated[str, typer.Option(help="Further fields of the judge's request, as JSON.")] = "{}",
    judge_timeout: Annotated[float, typer.Option(min=1, help="Longest wait for a reply of the judge, in seconds.")] = 120.0,
    judge_at_once: Annotated[int, typer.Option(min=1, max=256, help="Requests under way at once.")] = 8,
    questions: Annotated[str | None, typer.Option(help="A file of questions; default the run's held-out rows.")] = None,
    split: Annotated[Literal["validation", "test"] | None, typer.Option(help="Held-out rows, where no file is given.")] = None,
    limit: Limit = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    config: ConfigOption = None,
    to: Folder = None,
    verbose: Verbose = False,
) -> None:
    """Head to head: both answer the same questions, a judge decides in both orders. Its key is OPENAI_API_KEY's."""
    from tpaw_ray.evaluation.head_to_head import Side, compare_models
    from tpaw_ray.evaluation.questions import heldout_questions, read_questions
    from tpaw_ray.evaluation.words import show_versus
    from tpaw_ray.opponents.messages import Sampling
    from tpaw_ray.runs.progress import Reporter

    judge = _judge(judge_model, judge_url, judge_prompt, judge_tokens, judge_timeout, judge_extra)
    first = _open(subject, "last", _config_for(subject, config), settings, to)
    second = _open(other, "last", _config_for(other, config), settings, None, keeps=False)
    sides = Side(first, next(iter(first.checkpoints))), Side(second, next(iter(second.checkpoints)))
    if questions:
        asked = read_questions(questions, limit)
    elif first.is_run:
        asked = heldout_questions(first.config, first.store, split or first.config.evaluation.split, limit)
    else:
        raise ConfigError(f"{subject} is a model; name a file of questions with --questions")
    sampling = Sampling(temperature=temperature or 0.0, top_p=top_p, max_new_tokens=_longest(first, max_new_tokens))
    with Reporter() as reporter, _ray(verbose) as connect:
        result, path = compare_models(sides, asked, sampling, judge, reporter, connect, at_once=judge_at_once)
    show_versus(result, path, reporter)


@app.command()
def answers(
    subject: SubjectPath,
    questions: Annotated[str, typer.Option(help="AlpacaEval's instructions, MT-Bench's questions, or rows with a prompt.")],
    output: Annotated[str, typer.Option(help="The file to write.")],
    settings: Settings = None,
    form: Annotated[Literal["alpaca-eval", "mt-bench"], typer.Option("--format", help="Of the file.")] = "alpaca-eval",
    name: Annotated[str | None, typer.Option(help="The generator's name; default the run's with the checkpoint.")] = None,
    checkpoint: Checkpoint = "last",
    limit: Limit = None,
    temperature: Temperature = None,
    top_p: TopP = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default 2048 for alpaca-eval, 1024 for mt-bench.")
    ] = None,
    config: ConfigOption = None,
    verbose: Verbose = False,
) -> None:
    """Answers to a file of questions, in the file formats of AlpacaEval and MT-Bench."""
    from tpaw_ray.evaluation.asking import answer_questions, engines, room_for_answers
    from tpaw_ray.evaluation.formats import LONGEST, check_format, temperature_of, written
    from tpaw_ray.evaluation.questions import read_questions
    from tpaw_ray.evaluation.words import warn_of_cut_off
    from tpaw_ray.opponents.messages import Sampling
    from tpaw_ray.runs.progress import Reporter

    asked = read_questions(questions, limit)
    check_format(form, asked)
    opened = _open(subject, checkpoint, config, settings, None, keeps=False)
    if len(opened.checkpoints) > 1:
        raise typer.BadParameter("--checkpoint all: a file holds the answers of one checkpoint; expected a number or `last`")
    number = next(iter(opened.checkpoints))
    store = _writable(output)
    longest = max_new_tokens or LONGEST[form]
    samplings = [
        Sampling(
            temperature=temperature_of(form, question) if temperature is None else temperature,
            top_p=top_p,
            max_new_tokens=min(longest, room_for_answers(opened, question)),
        )
        for question in asked
    ]
    turns = sum(len(question.turns) for question in asked)
    with Reporter() as reporter, _ray(verbose) as connect:
        connect()
        with (
            engines(opened, number, turns, reporter.say) as handles,
            reporter.stage(f"answer {opened.called(number)}", turns) as advance,
        ):
            said = answer_questions(handles, opened, number, asked, samplings, advance)
    texts = [[reply.text for reply in turns] for turns in said]
    store.write_bytes(store.root, written(form, asked, texts, name or opened.called(number), time.time()))
    reporter.say(f"{len(asked)} answers of {opened.called(number)} are in {store.root}")
    warn_of_cut_off(opened.called(number), sum(reply.cut_off for replies in said for reply in replies), reporter)


# What the commands share.


def _open(
    path: str, checkpoint: str, config: Path | None, settings: list[str] | None, to: str | None, *, keeps: bool = True
) -> "Subject":
    from tpaw_ray.evaluation.subject import open_subject
    from tpaw_ray.policy.directory import own_code
    from tpaw_ray.runs.progress import Reporter

    opened = open_subject(path, checkpoint=checkpoint, config=config, overrides=settings or [], to=to, keeps=keeps)
    if opened.config.model.trust_remote_code:
        Reporter().say(own_code(opened.store.path("checkpoints") if opened.is_run else opened.config.model.path))
    return opened


@contextmanager
def _ray(verbose: bool) -> Iterator[Any]:
    """Yields what connects to Ray when it is first called; what was connected is let go at the end."""
    connected = False

    def connect() -> None:
        nonlocal connected
        if not connected:
            from tpaw_ray.launch import connect as connect_to_ray

            connected = True
            connect_to_ray(verbose=verbose)

    try:
        yield connect
    finally:
        if connected:
            import ray

            ray.shutdown()


def _writable(output: str) -> "RunStore":
    """The store whose root is the file to write, looked at before answers are made that it should hold."""
    from tpaw_ray.runs.store import RunStore

    store = RunStore.around(output)
    if os.path.isdir(store.root) or output.endswith("/"):
        raise ConfigError(f"--output: {output} is a folder; expected the file to write")
    store.check_writable()
    return store


def _longest(subject: "Subject", given: int | None) -> int:
    config = subject.config
    return given or config.evaluation.max_new_tokens or config.sampling.max_new_tokens


def _config_for(path: str, config: Path | None) -> Path | None:
    """The config is for models: one side may be a run."""
    from tpaw_ray.evaluation.subject import run_of

    return None if run_of(path) else config


def _judge(model: str, url: str | None, prompt: str | None, max_tokens: int, timeout_s: float, extra: str) -> "Judge":
    from tpaw_ray.evaluation.judge import TEMPLATE, Judge, read_template

    try:
        fields = json.loads(extra)
        found = find_credentials({"--judge-url": url, "--judge-extra": fields})
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--judge-extra: not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError("--judge-extra: expected a JSON object of further fields")
    if found:  # both are written into the result
        raise ConfigError(f"{found}; the judge's key is given in the environment, as OPENAI_API_KEY")
    return Judge(
        model=model,
        base_url=url,
        template=read_template(prompt or str(TEMPLATE)),
        max_tokens=max_tokens,
        extra=fields,
        timeout_s=timeout_s,
    )


def _harness_run(
    suite: str | None,
    names: list[str],
    num_fewshot: int | None,
    data: str | None,
    limit: int | None,
    chat: bool | None,
    max_length: int | None,
) -> "HarnessRun":
    from dataclasses import replace

    from tpaw_ray.evaluation.harness import SUITES, HarnessRun, HarnessTask

    if bool(suite) == bool(names):
        raise ConfigError(f"expected either --suite ({', '.join(SUITES)}) or --task, once or more often")
    if suite and suite not in SUITES:
        raise ConfigError(f"--suite: found {suite}, expected one of {', '.join(SUITES)}")
    chosen = SUITES[suite].tasks if suite else tuple(HarnessTask(name=name) for name in names)
    if num_fewshot is not None:
        chosen = tuple(replace(task, num_fewshot=num_fewshot) for task in chosen)
    return HarnessRun(
        title=suite or "+".join(names)[:60].replace("/", "-"),
        tasks=chosen,
        chat=chat if chat is not None else bool(suite) and SUITES[str(suite)].chat,
        limit=limit,
        max_length=max_length,
        data=data,
    )


def _run_tasks(subject: "Subject", number: int, wanted: "HarnessRun", reporter: "Reporter", connect: Any) -> dict[str, Any]:
    from tpaw_ray.evaluation.exact import check_settled
    from tpaw_ray.evaluation.harness import check_tasks, harness_folder, harness_result, run_remotely

    store, output = subject.store, harness_folder(subject, number, wanted)
    if not store.is_committed(output):
        check_settled(subject, number)
        check_tasks(wanted)
        connect()
        with reporter.stage(f"{wanted.title} {subject.called(number)}", len(wanted.tasks)) as advance:
            run_remotely(subject, number, output, wanted)
            advance(len(wanted.tasks))
        store.write_json(f"{output}/result.json", harness_result(store, output, subject.called(number), wanted))
        store.commit(output, tasks=len(wanted.tasks))
    found: dict[str, Any] = store.read_json(f"{output}/result.json", {"name": str, "metrics": {str: dict}, "average": object})
    reporter.say(f"{subject.called(number)}: {output}/result.json")
    return found
