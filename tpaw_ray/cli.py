"""The `tpaw` command: parse, resolve, call. Errors go to standard error; exit codes are those of `tpaw_ray.errors`."""

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tpaw_ray.config import dump_config, load_config, load_fine_tuning
from tpaw_ray.errors import INTERRUPTED, TpawError
from tpaw_ray.evaluate import app as evaluate
from tpaw_ray.wording import visible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Align a language model further from its own SFT data by team-based self-play (TPAW).",
    epilog="Exit codes: 0 done · 1 unforeseen · 2 config or usage · 3 data · 4 model · 5 run folder · 6 resources · "
    "7 generation · 8 learner · 9 no finite loss · 130 interrupted.",
)
app.add_typer(evaluate, name="evaluate")
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's config; see docs/config.md.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Dotted overrides, as in objective.eta=1 or preset=spin."),
]

JsonLines = Annotated[bool, typer.Option("--json", help="One JSON object a line, for collectors of logs; actors' logs too.")]


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of Ray, vLLM and DeepSpeed.")] = False,
    json_lines: JsonLines = False,
) -> None:
    """Run a config, or continue its run: the same command again does what is missing, and nothing when all is done."""
    resolved = load_config(config, overrides or [])
    from tpaw_ray.launch import launch
    from tpaw_ray.runs.progress import JsonReporter, Reporter

    launch(resolved, JsonReporter(resolved.run.name) if json_lines else Reporter(), verbose=verbose)


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of Ray and DeepSpeed.")] = False,
    json_lines: JsonLines = False,
) -> None:
    """Fine-tune a config's model on its data: makes the model that `run` starts from, as the run NAME-sft."""
    resolved = load_fine_tuning(config, overrides or [])
    from tpaw_ray.launch import launch
    from tpaw_ray.runs.progress import JsonReporter, Reporter

    launch(resolved, JsonReporter(resolved.run.name) if json_lines else Reporter(), verbose=verbose)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the resolved config as well.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, help="With --bandwidth: estimate hours, for a device that achieves this many TFLOP/s."),
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(min=1e-6, help="Memory bandwidth a device achieves, in GB/s.")] = None,
) -> None:
    """Check everything that can be checked without starting, and print the work ahead."""
    if (tflops is None) != (bandwidth is None):
        raise typer.BadParameter("--tflops and --bandwidth go together")
    resolved = load_config(config, overrides or [])
    if show_config:
        print(visible(dump_config(resolved)))
    from tpaw_ray.cost import Device
    from tpaw_ray.forecast import forecast, show

    device = Device(flops_per_s=tflops * 1e12, bytes_per_s=bandwidth * 1e9) if tflops and bandwidth else None
    show(forecast(resolved), resolved, Console(highlight=False), device)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The cluster's job server, as http://HEAD:8265; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS."
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The folder to upload, which holds the config.")
    ] = Path("."),
    secret: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An environment variable to pass on, as HF_TOKEN; may be repeated.")
    ] = None,
    job_id: Annotated[str | None, typer.Option(help="The job's id; by default tpaw-NAME-RANDOM.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is submitted.")] = False,
) -> None:
    """Run a config as a job on a Ray cluster, and follow it; the same command again continues its run."""
    from tpaw_ray.runs.progress import Reporter
    from tpaw_ray.submit import job_of
    from tpaw_ray.submit import submit as submit_job

    job = job_of(config, overrides or [], working_dir, secret or [], job_id)
    sys.exit(submit_job(job, address, Reporter().say, lambda text: print(text, end="", flush=True), follow=not detach))


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its address in an object store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Say where a run is, what it waits for and about how long it has to go, from its folder alone."""
    from tpaw_ray.runs.status import lines_of, status_of
    from tpaw_ray.runs.store import RunStore

    found = status_of(RunStore.named(run))
    print(visible(json.dumps(asdict(found)) if as_json else "\n".join(lines_of(found))))


@app.command()
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN|EXPERIMENT", help="The folder of a run or an experiment, or its s3:// address.")
    ],
    to: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where to write; report.html in the folder itself.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=100_000, help="Training prompts to browse, and as many held-out ones, evenly spaced.")
    ] = 1000,
) -> None:
    """Write one HTML file that shows a run or an experiment, and needs no network."""
    from tpaw_ray.report.page import write_report

    print(visible(write_report(run, to, samples)))


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its address in an object store.")],
    to: Annotated[str, typer.Option("--to", help="A folder to make; with --push a model's name on the Hub.")],
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="A number, or best: of the highest accuracy on validation.")
    ] = "best",
    push: Annotated[bool, typer.Option("--push", help="Upload to the Hub, with the token of HF_TOKEN.")] = False,
) -> None:
    """Hand a checkpoint on: a Hugging Face directory with a model card written from the run."""
    from tpaw_ray.handing_on.folder import hand_on

    choice, place = hand_on(run, checkpoint, to, push=push)
    print(visible(f"checkpoint {choice.checkpoint} is in {place}\n{choice.reason}"))


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Methods, seeds and grid; see docs/experiments.md.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Check all runs' configs and print how many there are; start none.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Cut seeds, grid, iterations and data, to see that all works.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the logs of Ray.")] = False,
) -> None:
    """Conduct an experiment, or continue it: tune every method on validation, run all seeds, test once, make the table."""
    from tpaw_ray.experiment.design import load_design

    design = load_design(file, quick=quick)
    from tpaw_ray.experiment.conduct import conduct, show_work
    from tpaw_ray.runs.progress import Reporter

    if plan:
        show_work(design, Reporter())
    elif failed := conduct(design, Reporter(), verbose=verbose):
        raise typer.Exit(failed)


def main() -> None:
    """The entry point: one clear message for what a user can mend, a traceback for what only we can."""
    try:
        ended = app(standalone_mode=False)  # a number where a command exits early; typer makes 130 of an interrupt
    except (KeyboardInterrupt, typer.Abort):
        ended = INTERRUPTED
    except Exception as error:
        cause = told(error)
        if cause is not None:
            _say(f"error: {cause}")
            sys.exit(cause.exit_code)
        if hasattr(error, "format_message"):  # a usage error of the command line
            _say(f"error: {error.format_message()}")
            sys.exit(2)
        _say("".join(traceback.format_exception(error)))
        sys.exit(1)
    if ended == INTERRUPTED:
        _say("interrupted; the same command continues the run")
    sys.exit(ended)


def told(error: BaseException | None) -> TpawError | None:
    """The error meant for the user that an exception carries, through Ray's wrappers."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "cause", None)
        if isinstance(error, TpawError) and not isinstance(inner, BaseException):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return None


def _say(message: str) -> None:
    print(visible(message), file=sys.stderr)
