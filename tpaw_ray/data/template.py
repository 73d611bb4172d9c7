"""The chat template and the tokenizer: conversations as token ids, rendered the same way for every stage.

Special tokens in the user's own text. Templates are text, so a row that says `<|im_end|>` would speak with the template's voice.
In a target this is refused for end tokens, since the response would stop there. Elsewhere, as in a question about
such tokens, the row is taken as it is: the tokenizer reads the special token, and every later stage sees the same ids.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw_ray.config import ModelConfig
from tpaw_ray.data.rows import Conversation, Message
from tpaw_ray.data.sources import looks_like_path
from tpaw_ray.errors import CheckpointError, ConfigError, DataError
from tpaw_ray.wording import one_line, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""`plain`, for base models: one turn a line without roles, in their order; the end token after the response."""


# The tokenizer.


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with the config's chat template where one is given.

    Raises:
        CheckpointError: when there is no tokenizer to load, or it has no end token.
        ConfigError: when there is no chat template, or `model.chat_template` is not one.
    """
    from transformers import AutoTokenizer

    if looks_like_path(model.path) and not os.path.exists(os.path.expanduser(model.path)):
        raise CheckpointError(f"model.path: {model.path}: no such folder; expected a Hugging Face model directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(_local(model.path), trust_remote_code=model.trust_remote_code)
    except Exception as error:  # OSError, ValueError, ImportError, what a model's own code raises …: the reason is passed on
        raise CheckpointError(f"model.path: {model.path}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"model.path: {model.path}: its tokenizer has no end token (eos_token), so no response could end")
    if model.chat_template is not None:
        tokenizer.chat_template = _chat_template(model.chat_template, tokenizer)
    _check_template(tokenizer, model)
    return tokenizer


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model_path: str) -> tuple[int, ...]:
    """The ids that end a response, sorted: the tokenizer's, `generation_config.json`'s and `config.json`'s.

    vLLM stops at all of them, so all of them count as the end of a target.

    Raises:
        CheckpointError: when one of the files is there but does not hold what it should.
    """
    ends = {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        found = _model_json(model_path, name).get("eos_token_id")
        if found is None:
            continue
        listed = found if isinstance(found, list) else [found]
        if not all(type(end) is int for end in listed):
            raise CheckpointError(
                f"{model_path}/{name}: eos_token_id: found {shorten(found)}, expected a token id or a list of them"
            )
        ends.update(listed)
    return tuple(sorted(ends))


def vocabulary_size(model_path: str) -> int | None:
    """How many token ids the model knows by its `config.json`; None where that says nothing."""
    config = _model_json(model_path, "config.json")
    text = config.get("text_config")
    found = text.get("vocab_size") if isinstance(text, dict) else config.get("vocab_size")
    return found if type(found) is int else None


def _chat_template(given: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    if given == "plain":
        # Base models that were trained with BOS expect it; whether a tokenizer adds one shows only by asking it.
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    if "{{" in given or "{%" in given:
        return given
    try:
        return Path(os.path.expanduser(given)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        expected = "expected `plain`, a Jinja template or a readable file that holds one"
        raise ConfigError(f"model.chat_template: found {shorten(given)}, {expected}: {one_line(error)}") from error


def _check_template(tokenizer: "PreTrainedTokenizerBase", model: ModelConfig) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        hint = "set model.chat_template to a Jinja template or a file, or to `plain` for a base model"
        raise ConfigError(f"{model.path}: its tokenizer has no chat template; {hint}") from error
    try:
        _apply(tokenizer, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigError(f"model.chat_template: not a valid Jinja template: {error} (line {error.lineno})") from error
    except Exception:  # a template may refuse this conversation and take the user's; `render` names the row that it refuses
        return


def _local(path: str) -> str:
    local = os.path.expanduser(path)
    return local if os.path.exists(local) else path


def _model_json(model_path: str, name: str) -> Mapping[str, Any]:
    path = Path(_local(model_path)) / name
    if not Path(_local(model_path)).exists():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(model_path, name))
        except EntryNotFoundError:
            return {}
        except Exception as error:  # network, authentication …: the reason is passed on
            raise CheckpointError(f"{model_path}/{name}: cannot be fetched from the hub: {one_line(error)}") from error
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: found {shorten(content)}, expected a JSON object")
    return content


# Rendering.


def render(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, ends: Sequence[int], source: str = "data"
) -> tuple[list[int], list[int]]:
    """Prompt ids and target ids of a conversation. The prompt ends with the template's opening of the assistant's turn; the
    target ends with its first end token: what a template puts behind it (a newline, say) is cut, a missing one is added.

    No special tokens are added to the template's own: a BOS is there once if the template writes it, else not at all.
    Example, in ChatML: `1+1?` and `2` become the ids of `<|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n` and
    of `2<|im_end|>`.

    Raises:
        DataError: naming `source` and row, when the template refuses the turns, leaves out the target or does not keep the
            prompt as the beginning of the whole, or when the target holds the text of an end token.
    """
    return render_all(tokenizer, [conversation], ends, source)[0]


def render_all(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Conversation], ends: Sequence[int], source: str = "data"
) -> list[tuple[list[int], list[int]]]:
    """`render` of many conversations with one call of the tokenizer."""
    end_texts = [text for end in ends if (text := str(tokenizer.decode([end], skip_special_tokens=False)))]
    texts = [_texts(tokenizer, conversation, end_texts, f"{source}, row {conversation.row}") for conversation in conversations]
    prompts = _tokenise(tokenizer, [prompt for prompt, _ in texts])
    wholes = _tokenise(tokenizer, [prompt + response for prompt, response in texts])
    rendered = []
    for conversation, prompt, whole, (_, response) in zip(conversations, prompts, wholes, texts, strict=True):
        # A tokenizer may merge at the border; a generated response starts behind the prompt's last token, and so must a target.
        whole_keeps_prompt = whole[: len(prompt)] == prompt
        target = whole[len(prompt) :] if whole_keeps_prompt else _tokenise(tokenizer, [response])[0]
        end = next((index for index, token in enumerate(target) if token in ends), None)
        target = [*target, tokenizer.eos_token_id] if end is None else target[: end + 1]
        if not prompt:
            raise DataError(f"{source}, row {conversation.row}: nothing of the prompt is left in the chat template's text")
        if len(target) < 2:
            raise DataError(
                f"{source}, row {conversation.row}: nothing of the target response is left in the chat template's text"
            )
        rendered.append((prompt, target))
    return rendered


def render_prompt(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Message], place: str) -> list[int]:
    """Prompt ids of turns that have no response yet: those `render` gives for a conversation with this prompt.

    Raises:
        DataError: naming `place`, when the template refuses the turns or nothing of them is left in its text.
    """
    try:
        text = _apply(tokenizer, [{"role": turn.role, "content": turn.content} for turn in turns], add_generation_prompt=True)
    except Exception as error:  # a template is a program: besides its own refusals it may fail in any way on a row
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(f"{place}: the chat template refuses the turns {roles}: {one_line(error)}") from error
    prompt = _tokenise(tokenizer, [text])[0]
    if not prompt:
        raise DataError(f"{place}: nothing of the prompt is left in the chat template's text")
    return prompt


def _texts(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, end_texts: list[str], place: str) -> tuple[str, str]:
    for text in end_texts:
        if text in conversation.target:
            raise DataError(
                f"{place}: the target response holds {text!r}, which the model reads as the end of the response; "
                "take it out of the text or remove the row"
            )
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.prompt]
    try:
        prompt = _apply(tokenizer, turns, add_generation_prompt=True)
        whole = _apply(tokenizer, [*turns, {"role": "assistant", "content": conversation.target}], add_generation_prompt=False)
    except Exception as error:  # a template is a program: besides its own refusals it may fail in any way on a row
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{place}: the chat template refuses the turns {roles}, assistant: {one_line(error)}") from error
    if not whole.startswith(prompt):
        raise DataError(
            f"{place}: the chat template does not keep the prompt as the beginning of the whole conversation "
            f"(the prompt ends in {shorten(prompt[-40:])}); templates that add or drop thinking do this: set model.chat_template "
            "to one that writes the assistant's turn alike with and without its response"
        )
    return prompt, whole[len(prompt) :]


def _apply(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False))


def _tokenise(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    # `verbose` would warn of texts beyond the model's length, which are left out later.
    if not texts:
        return []
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids
