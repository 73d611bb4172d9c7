"""Make what the demo starts from: arithmetic SFT data and a tiny Llama fitted to it, stopped while there is still much to learn.

    python jobs/demo_model.py            # writes models/demo and models/demo.jsonl

The model is a normal Hugging Face directory with a small tokenizer of its own (one token a character) and a chat template.
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>")
WORDS = ("####", " ", "+", "=", *"0123456789")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ANSWER_TOKENS = 7


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for the `####` before the final answer."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """About 0.8 million parameters, random; the head size is one that vLLM's attention supports."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=64,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Distinct sums of two three-digit numbers, as question and answer."""
    numbers = random.Random(seed)
    terms: dict[tuple[int, int], None] = {}
    while len(terms) < count:
        terms[numbers.randint(100, 999), numbers.randint(100, 999)] = None
    return [{"question": f"{a}+{b}=", "answer": f"#### {a + b}"} for a, b in terms]


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `[N, P]`, all of one length, and answers `[N, A]` that end with the end token, padded with -100."""
    prompts, answers = [], []
    for row in rows:
        turn = [{"role": "user", "content": row["question"]}]
        prompts.append(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False))
        ids = tokenizer(f"{row['answer']}<|end|>", add_special_tokens=False).input_ids
        answers.append(ids + [-100] * (ANSWER_TOKENS - len(ids)))
    return torch.tensor(prompts), torch.tensor(answers)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, prompts: torch.Tensor, answers: torch.Tensor) -> float:
    """Share of greedy answers that equal the target, token by token."""
    said = prompts
    for _ in range(answers.shape[1]):
        said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], dim=1)
    return float(((said[:, prompts.shape[1] :] == answers) | (answers == -100)).all(1).float().mean())


def fit(
    model: LlamaForCausalLM,
    train: tuple[torch.Tensor, torch.Tensor],
    heldout: tuple[torch.Tensor, torch.Tensor],
    *,
    goal: float,
    looks: int = 2,
    max_epochs: int = 40,
    batch: int = 64,
    learning_rate: float = 1e-3,
    say=print,
) -> float:
    """Supervised fine-tuning with AdamW until held-out accuracy, looked at `looks` times an epoch, reaches `goal`; returns it."""
    prompts, answers = train
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    look = max(1, len(prompts) // batch // looks)
    found, step = 0.0, 0
    for _ in range(max_epochs):
        for rows in torch.randperm(len(prompts)).split(batch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 100)
            labels = torch.cat([torch.full_like(prompts[rows], -100), answers[rows]], dim=1)
            ids = torch.cat([prompts[rows], answers[rows].clamp(min=0)], dim=1)
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % look == 0:
                found = accuracy(model, *heldout)
                say(f"  epoch {step / (looks * look):5.2f}  loss {loss.item():.3f}  held-out accuracy {found:.3f}")
                if found >= goal:
                    return found
    return found


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(
    to: Annotated[Path, typer.Option(help="Folder of the model; the data goes beside it.")] = Path("models/demo"),
    rows: Annotated[int, typer.Option(help="SFT rows.")] = 8000,
    goal: Annotated[float, typer.Option(help="Held-out accuracy at which fitting stops.")] = 0.6,
    looks: Annotated[int, typer.Option(help="Times an epoch that the accuracy is looked at.", min=1)] = 2,
    seed: int = 0,
    test_rows: Annotated[int, typer.Option(help="Rows that are not fitted, written beside the data as NAME-test.jsonl.")] = 0,
) -> None:
    """Write the demo's model and data, unless they are there."""
    if to.exists():
        print(f"{to} is there already")
        return
    started = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    data = make_rows(rows + 512 + test_rows, seed)
    looked_at = data[rows : rows + 512]  # they decide when fitting stops
    print(f"fitting a Llama of {model.num_parameters():,} parameters to {rows} sums, until held-out accuracy is {goal}")
    found = fit(model, encode(tokenizer, data[:rows]), encode(tokenizer, looked_at), goal=goal, looks=looks)
    beside = to.with_name(f"{to.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    write_rows(to.with_suffix(".jsonl"), data[:rows])
    if test_rows:
        write_rows(to.with_name(f"{to.name}-test.jsonl"), data[rows + 512 :])
    beside.rename(to)
    print(f"{to}: held-out accuracy {found:.3f} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
