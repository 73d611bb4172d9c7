"""Token ids as text, by the tokenizer that the run itself keeps."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tpaw_ray.errors import RunError
from tpaw_ray.runs.store import RunStore
from tpaw_ray.wording import one_line

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class Tokenizer:
    """How the run's tokenizer reads ids: `decode` takes lists of ids and whether special tokens are left out."""

    def __init__(self, decode: Callable[[list[list[int]], bool], list[str]], special: Iterable[str]) -> None:
        self._decode = decode
        self.special = tuple(special)

    def texts(self, ids: Sequence[Sequence[int]], *, bare: bool = False) -> list[str]:
        """A text for each list of ids; `bare` leaves special tokens out, as answers are judged."""
        return self._decode([list(one) for one in ids], bare)


def tokenizer_of(store: RunStore) -> Tokenizer:
    """The tokenizer of checkpoint 000. Neither weights nor code are loaded from the run's folder.

    Raises:
        RunError: when it cannot be loaded.
    """
    checkpoint = store.checkpoint(0)
    try:
        if store.exists(f"{checkpoint}/tokenizer.json"):
            return _from_json(store.read_bytes(f"{checkpoint}/tokenizer.json"))
        return _from_other_files(store, checkpoint)
    except RunError:
        raise
    except Exception as error:  # OSError, ValueError, what a parser raises …: the reason is passed on
        reason = f"{checkpoint}: its tokenizer cannot be loaded: {one_line(error)}"
        raise RunError(f"{reason}; --samples 0 makes a report without texts") from error


def _from_json(content: bytes) -> Tokenizer:
    import tokenizers  # without transformers, which takes torch along

    found = tokenizers.Tokenizer.from_buffer(content)
    special = [token.content for token in found.get_added_tokens_decoder().values() if token.special]
    return Tokenizer(lambda ids, bare: found.decode_batch(ids, skip_special_tokens=bare), special)


def _from_other_files(store: RunStore, checkpoint: str) -> Tokenizer:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for path in store.files(checkpoint):
            if not path.endswith((*_WEIGHTS, ".py")):
                Path(folder, path.rsplit("/", 1)[1]).write_bytes(store.read_bytes(path))
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Tokenizer(lambda ids, bare: found.batch_decode(ids, skip_special_tokens=bare), map(str, found.all_special_tokens))
