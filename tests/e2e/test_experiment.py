"""`tpaw experiment --quick` as a user types it, on as little as goes all the way; `tests/long` has the whole of it."""

import json

import yaml

from tests.e2e.test_run import tpaw
from tests.tiny import merging_tokenizer, write_tiny_model
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Answer

SEEDS, TUNED = (0, 1), 7
RATES = (1e-4, 1e-2)


def write_experiment(folder, **changes):
    """A start model a seed, their data, and the experiment's file: two methods, two settings, two seeds."""
    for seed in (*SEEDS, TUNED):
        write_tiny_model(folder / f"model-{seed}", seed=seed, tokenizer=merging_tokenizer())
    rows = [{"question": f"{1000 + 37 * i}+{i}=", "answer": f"{1000 + 37 * i} + {i}\n#### {1000 + 38 * i}"} for i in range(96)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[32:]))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:32]))
    base = {
        "model": {"path": str(folder / "model-{seed}")},
        "data": {
            "path": str(folder / "train.jsonl"),
            "heldout_path": str(folder / "heldout.jsonl"),
            "validation_fraction": 0.3,
            "prompt_length": 32,
            "max_length": 64,
            "shard_size": 16,
        },
        "iterations": 1,
        "sampling": {"max_new_tokens": 16},
        "evaluation": {"answer_pattern": "([0-9])"},  # the last digit, which a model that knows nothing hits now and then
        "learner": {"precision": "fp32", "gradient_checkpointing": False, "global_batch": 16, "epochs": 1},
    }
    experiment = {
        "name": "both",
        "root": str(folder / "experiments"),
        "base": base,
        "seeds": list(SEEDS),
        "tuning": {"seeds": [TUNED], "grid": {"learner.learning_rate": list(RATES)}},
        "methods": {"tpaw": {"preset": "tpaw"}, "spin": {"preset": "spin"}},
        "baselines": ["start", "spin"],
        "parallel": 2,
        **changes,
    }
    path = folder / "both.yaml"
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def test_a_quick_experiment_is_tuned_trained_tested_once_and_ends_with_a_table(tmp_path):
    path = write_experiment(tmp_path, seeds=[0], methods={"tpaw": {"preset": "tpaw"}}, baselines=["start"])
    done = tpaw("experiment", path, "--quick", timeout=1500)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    folder = tmp_path / "experiments/both-quick"
    found = json.loads((folder / "experiment.json").read_text())
    assert [event["event"] for event in found["protocol"]] == ["tuned", "chosen", "trained", "testing", "tested"]
    assert sorted(run.name for run in (folder / "tuning").iterdir()) == [
        f"tpaw_learning_rate-{rate}_seed-{TUNED}" for rate in RATES
    ]
    points = {point["settings"]["learner.learning_rate"]: point for point in found["choices"]["tpaw"]["points"]}
    best = max(RATES, key=lambda rate: (points[rate]["accuracy"], points[rate]["target_logp"]))
    final = folder / "final/tpaw_seed-0"
    assert yaml.safe_load((final / "config.yaml").read_text())["learner"]["learning_rate"] == best
    # The start and the one iteration answered the test split, nobody else did, and the table says what they got right.
    assert sorted(str(one.relative_to(folder)) for one in folder.glob("*/*/tested/*")) == [
        f"final/tpaw_seed-0/tested/{number:03d}" for number in (0, 1)
    ]
    run, shares = RunStore.open(str(final.parent), final.name), []
    for number in (0, 1):
        answers = run.read_rows(run.path("tested", f"{number:03d}", "answers", "00000.parquet"), Answer)
        right = [[char for char in one.text if char in "0123456789"][-1:] == [one.reference_answer] for one in answers]
        shares.append(sum(right) / len(right))
    assert [row["last"]["values"] for row in found["table"]] == [[shares[0]], [shares[1]]]
    assert f"| tpaw | 1 | {shares[1]:.4f} |" in (folder / "table.md").read_text()
    assert "paired by seed" in done.stdout
