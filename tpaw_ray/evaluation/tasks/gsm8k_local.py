"""Functions of `gsm8k_local.yaml`: rows from local JSONL, and final answers as our own exact match finds and spells them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpaw_ray.config import DataConfig, EvaluationConfig
from tpaw_ray.data.answers import final_answer
from tpaw_ray.data.sources import read_conversations
from tpaw_ray.evaluation.exact_match import answer_of

INVALID = "[invalid]"
"""What lm-evaluation-harness's own filters put where there is no answer; no reference is spelt so."""
PATTERN = EvaluationConfig().answer_pattern


def load(*, test: str, train: str | None = None, pattern: str = PATTERN, **_: Any) -> Any:
    """The splits, from JSONL files with `question` and `answer`; without `train` there are no examples to show (few-shot).

    `pattern` is `evaluation.answer_pattern` of the config, and stands in every row, where the functions below find it.
    """
    import datasets

    # Read by hand: the loader for JSON would copy the files into its cache.
    splits = {"test": _rows(test, pattern), "train": _rows(train, pattern) if train else []}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


def target(row: Mapping[str, str]) -> str:
    """The reference: the final answer of a row's `answer`."""
    return final_answer(row["answer"], row["pattern"]) or INVALID


def final_answers(responses: Iterable[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The final answer in every response, by row."""
    return [[answer_of(text, row["pattern"]) or INVALID for text in said] for said, row in zip(responses, rows, strict=True)]


def _rows(path: str, pattern: str) -> list[dict[str, Any]]:
    return [
        {"question": row.prompt[-1].content, "answer": row.target, "pattern": pattern}
        for row in read_conversations(DataConfig(path=path))
    ]
