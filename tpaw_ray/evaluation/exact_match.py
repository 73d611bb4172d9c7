"""Judging greedy answers by their final answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tpaw_ray.data.answers import final_answer
from tpaw_ray.errors import ConfigError
from tpaw_ray.schema import Answer, Generation, Prompt


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`accuracy` is the share of judged answers that are correct; null where no prompt has a reference answer."""

    answers: int
    judged: int
    accuracy: float | None


def judge(
    prompts: Sequence[Prompt], generations: Sequence[Generation], tokenizer: PreTrainedTokenizerBase, pattern: str
) -> list[Answer]:
    """Compare the final answer of every generation with the prompt's reference answer. Decoding happens here only."""
    references = {prompt.prompt_id: prompt.reference_answer for prompt in prompts}
    texts = tokenizer.batch_decode([list(row.generated_tokens) for row in generations], skip_special_tokens=True)
    answers = []
    for row, text in zip(generations, texts, strict=True):
        reference, found = references[row.prompt_id], answer_of(text, pattern)
        unanswered = reference is None or row.finish_reason == "set_aside"
        answers.append(
            Answer(
                prompt_id=row.prompt_id,
                generated_tokens=row.generated_tokens,
                text=text,
                answer=found,
                reference_answer=reference,
                correct=None if unanswered else found == reference,
            )
        )
    return answers


def answer_of(text: str, pattern: str) -> str | None:
    """The final answer in a generated text; None also where looking for it takes too long."""
    try:
        return final_answer(text, pattern)
    except ConfigError:  # the pattern did with the user's data; that a model wrote what it hangs on must not end the run
        return None


def verdict(answers: Sequence[Answer]) -> Verdict:
    """Count judged answers.

    An answer without a final answer counts as wrong where there is a reference.
    """
    judged = [answer.correct for answer in answers if answer.correct is not None]
    return Verdict(answers=len(answers), judged=len(judged), accuracy=sum(judged) / len(judged) if judged else None)
