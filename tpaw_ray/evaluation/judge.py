"""A judge behind an OpenAI-compatible interface: what it is asked, and how its reply is read.

Answers are foreign text, and may try to talk to the judge. They stand between markers that hold a digest of what they enclose,
which no text can contain, and only the last line of the judge's own reply is read for the verdict. That keeps an answer from
closing its frame, and a verdict quoted on the way from counting. It does not keep a judge from being persuaded by what it reads.
"""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tpaw_ray.errors import ConfigError, GenerationError
from tpaw_ray.wording import one_line, shorten

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Verdict = Literal["A", "B", "C"]
TEMPLATE = Path(__file__).parent / "pairwise.jinja"
KEY = "OPENAI_API_KEY"
_MARKER = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Whom to ask, and how. `base_url` None is OpenAI's own; the key is that of the environment (`OPENAI_API_KEY`)."""

    model: str
    base_url: str | None = None
    template: str = field(default_factory=lambda: TEMPLATE.read_text(encoding="utf-8"))
    max_tokens: int = 1024
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, as the server knows them."""
    retries: int = 5
    """The client's own, with growing waits, for connections that fail, time-outs, 429 and 5xx."""
    timeout_s: float = 120.0
    """Longest wait for a reply, each time."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One question in one order, as the judge sees it."""

    question: str
    answer_a: str
    answer_b: str


def read_template(path: str) -> str:
    """A template from a file, tried on an example.

    Raises:
        ConfigError: when it cannot be read, is not a Jinja template, or leaves out the question or an answer.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the judge's prompt: {error}") from error
    parts = {"question": "6f1c", "answer_a": "8d02", "answer_b": "b7e5"}
    example = prompt_of(text, Contest(**parts), path)
    if absent := [name for name, part in parts.items() if part not in example]:
        raise ConfigError(f"{path}: the judge's prompt leaves out {', '.join(absent)}; expected {{{{ {absent[0]} }}}} in it")
    return text


def prompt_of(template: str, contest: Contest, called: str = "the judge's prompt") -> str:
    """What the judge is told. Texts are put in as they are: nothing in them is a template.

    Raises:
        ConfigError: when the template cannot be rendered.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    parts = {"question": contest.question, "answer_a": contest.answer_a, "answer_b": contest.answer_b}
    mark = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    try:
        return ImmutableSandboxedEnvironment(undefined=StrictUndefined).from_string(template).render(**parts, mark=mark)
    except TemplateError as error:
        raise ConfigError(
            f"{called}: {one_line(error)}; expected a Jinja template of question, answer_a, answer_b and mark"
        ) from error


def key_of(judge: Judge, contest: Contest, *names: str) -> str:
    """A digest of all that a verdict hangs on, judge, settings and the whole prompt; and of `names`, which say whose it is."""
    prompt = prompt_of(judge.template, contest)
    parts = [judge.model, judge.base_url, judge.max_tokens, dict(judge.extra), prompt, *names]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def verdict_in(reply: str) -> Verdict | None:
    """The verdict on a reply's last line that is not blank; None where that holds none, or several that differ.

    >>> verdict_in("It says [[B]], but is wrong.\\n[[A]]\\n"), verdict_in("[[A]]\\nor not"), verdict_in("[[A]] [[B]]")
    ('A', None, None)
    """
    lines = reply.strip().splitlines()
    found: set[Any] = set(_MARKER.findall(lines[-1])) if lines else set()
    return found.pop() if len(found) == 1 else None


def client_of(judge: Judge) -> "AsyncOpenAI":
    """The client, with the key of the environment. A server of one's own may need none.

    Raises:
        ConfigError: when the `openai` package is missing, when the address or the key cannot be one, and when there is no key for
            OpenAI's own.
    """
    if judge.base_url is not None and not judge.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"--judge-url: found {shorten(judge.base_url)}, expected an address as http://127.0.0.1:8000/v1")
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ConfigError("the judge needs the openai package: pip install 'tpaw-ray[evaluation]'") from error
    key = os.environ.get(KEY)
    if not key and judge.base_url is None:
        raise ConfigError(f"{KEY} is not set in the environment; set it, or name a server of your own with --judge-url")
    if key and not (key.isascii() and key.isprintable()):  # which no header can carry
        raise ConfigError(f"{KEY}: holds characters that no key has; expected printable ASCII")
    try:
        return AsyncOpenAI(base_url=judge.base_url, api_key=key or "none", max_retries=judge.retries, timeout=judge.timeout_s)
    except Exception as error:  # of the HTTP client's own types
        raise ConfigError(f"--judge-url: {shorten(judge.base_url)}: {one_line(error)}; expected a URL") from error


def try_judge(judge: Judge) -> None:
    """Ask for a verdict on an example, so that a judge who is not there is told before two models answer for hours.

    Raises:
        ConfigError: as `client_of` does.
        GenerationError: as `ask_judge` does.
    """

    async def ask() -> None:
        async with client_of(judge) as client:
            await ask_judge(client, judge, Contest(question="1 + 1?", answer_a="2", answer_b="3"), "1 + 1?, an example")

    asyncio.run(ask())


async def ask_judge(client: "AsyncOpenAI", judge: Judge, contest: Contest, question_id: str) -> str:
    """The judge's reply to a question's contest, drawn greedily.

    Raises:
        GenerationError: with the client's reason, when its retries are used up or the server refuses; and when what the server
            sends is no chat completion.
    """
    from openai import OpenAIError

    place = judge.base_url or "OpenAI"
    try:
        said = await client.chat.completions.create(
            model=judge.model,
            messages=[{"role": "user", "content": prompt_of(judge.template, contest)}],
            temperature=0.0,
            max_tokens=judge.max_tokens,
            extra_body=dict(judge.extra) or None,
        )
    except (OpenAIError, ValueError, RecursionError) as error:  # the latter two of a body that is not JSON
        raise GenerationError(
            f"the judge {judge.model} at {place} does not answer (question {shorten(question_id)}): {one_line(error)}"
        ) from error
    match said:  # of any type: the client does not check what it is sent
        case object(choices=[object(message=object(content=(str() | None) as content)), *_]):
            return content or ""
    raise GenerationError(f"the judge {judge.model} at {place}: found {shorten(said)}, expected a chat completion")
