"""The pairs of an iteration as the learner reads them, and a micro-batch of them as tensors.

Axes: `S` sequence, `B` triplet, `K` player.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from tpaw_ray.learner.batches import TripletLengths, Unit
from tpaw_ray.policy.batch import TokenBatch, token_batch
from tpaw_ray.runs.address import told
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Pair, arrow_schema

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class TripletBatch:
    """Triplets of one micro-batch: each target once in `tokens`, and where to find a triplet's two sequences.

    In an update on targets alone `generated_B` is empty, and `K` is 0.
    """

    tokens: TokenBatch
    response_lengths_S: Tensor
    target_B: Tensor
    generated_B: Tensor
    reference_target_logps_BK: Tensor
    reference_generated_logps_BK: Tensor
    start_alpha_BK: Tensor
    start_beta_BK: Tensor

    def to(self, device: torch.device) -> "TripletBatch":
        return TripletBatch(**{name: value.to(device) for name, value in vars(self).items()})


class Pairs(Sequence[Pair]):
    """An iteration's triplets, on this node's disk until one is asked for.

    They are copied once into a file of the system's temporary folder (`TMPDIR`), without compression, in pieces of a few rows of
    which one is read at a time. Where that folder is memory itself, they take 4 bytes a token there.

    Example: `Pairs([table_of([pair], Pair)])[0] == pair`.
    """

    PIECE = 32
    """Rows read for one: some 80 KB of real data, and few enough pieces that their directory is small."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        starts = [0]
        with told(tempfile.gettempdir(), "written"), tempfile.NamedTemporaryFile(prefix="tpaw-pairs-") as file:
            with pa.ipc.new_file(file.name, arrow_schema(Pair)) as writer:
                for table in tables:
                    for piece in table.to_batches(self.PIECE):
                        writer.write_batch(piece)
                        starts.append(starts[-1] + len(piece))
            # Open, it outlives its name: it is gone with this process, however that ends.
            self._file = pa.ipc.open_file(pa.OSFile(file.name))
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """The triplet at an index from 0 on; no slices."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = int(np.searchsorted(self._starts, index, side="right")) - 1
        (row,) = self._file.get_batch(piece).slice(index - int(self._starts[piece]), 1).to_pylist()
        return Pair(**row)

    def pieces(self) -> Iterator[pa.RecordBatch]:
        """All rows in their order, a piece at a time."""
        return map(self._file.get_batch, range(self._file.num_record_batches))


class Lengths(Sequence[TripletLengths]):
    """Lengths of all triplets as columns: 16 bytes a triplet, and the ids of the prompts."""

    def __init__(self, prompt_ids: pa.DictionaryArray, columns: Sequence[IntArray]) -> None:
        """`columns` are what `TripletLengths` says besides the id, in its order."""
        self._prompt_ids = prompt_ids.dictionary
        self._columns = columns
        self.prompts: IntArray = prompt_ids.indices.to_numpy()
        """The prompt of each triplet, numbered as they first appear."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        """The lengths of the triplet at an index from 0 on; no slices."""
        prompt, target, generated = (int(column[index]) for column in self._columns)
        return TripletLengths(
            prompt_id=self._prompt_ids[int(self.prompts[index])].as_py(),
            prompt_length=prompt,
            target_length=target,
            generated_length=generated,
        )


def read_pairs(store: RunStore, iteration: int) -> Pairs:
    """All triplets of an iteration, in the order of their files.

    Raises:
        RunError: when a file cannot be read or lacks a column.
    """
    return Pairs(store.read_columns(path, Pair) for path in store.files(store.pairs(iteration)))


def lengths_of(pairs: Pairs) -> Lengths:
    """Lengths in tokens, prompt included."""
    ids: list[pa.Array] = []
    lengths = np.empty((3, len(pairs)), np.int32)
    done = 0
    for piece in pairs.pieces():
        here = slice(done, done := done + len(piece))
        for row, name in enumerate(("prompt_tokens", "target_tokens", "generated_tokens")):
            lengths[row, here] = pc.list_value_length(piece[name]).to_numpy()
        ids.append(piece["prompt_id"].dictionary_encode())  # a copy: the column itself would hold all of its piece
    lengths[1:] += lengths[0]
    encoded = pa.chunked_array(ids, pa.dictionary(pa.int32(), pa.string())).unify_dictionaries().combine_chunks()
    return Lengths(encoded, list(lengths))


def triplet_batch(pairs: Sequence[Pair], units: Sequence[Unit], *, share_prompts: bool = False) -> TripletBatch:
    """The tensors of a micro-batch. A unit's target stands once, before its generations; so does its prompt where shared."""
    prompts: list[Sequence[int]] = []
    responses: list[Sequence[int]] = []
    targets, generated, rows = [], [], []
    for unit in units:
        target = len(responses)
        first = pairs[unit.triplets[0]]
        prompts.append(first.prompt_tokens)
        responses.append(first.target_tokens)
        for index in unit.triplets:
            pair = pairs[index]
            targets.append(target)
            rows.append(pair)
            if pair.generated_tokens:
                generated.append(len(responses))
                prompts.append(pair.prompt_tokens)
                responses.append(pair.generated_tokens)

    def per_player(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return TripletBatch(
        tokens=token_batch(prompts, responses, share_prompts=share_prompts),
        response_lengths_S=torch.tensor([len(response) for response in responses]),
        target_B=torch.tensor(targets),
        generated_B=torch.tensor(generated, dtype=torch.int64),
        reference_target_logps_BK=per_player([pair.reference_target_logps for pair in rows]),
        reference_generated_logps_BK=per_player([pair.reference_generated_logps for pair in rows]),
        start_alpha_BK=per_player([pair.start_alpha for pair in rows]),
        start_beta_BK=per_player([pair.start_beta for pair in rows]),
    )
