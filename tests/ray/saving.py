"""What `test_saves.py` runs in processes of their own, which are a whole group of workers: DeepSpeed without Ray Train.

python -m tests.ray.saving ROOT MODEL CASES        # one worker: updates that break off and go on
python -m tests.ray.saving PARTS RANK SIZE         # one of a group: its parts in updates that another group goes on with
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path


class Listener:
    """Stands for the mailbox; breaks the update off when it hears of a step."""

    def __init__(self, last=None):
        self.last, self.rows, self.remarks = last, [], []

    def row(self, row):
        self.rows.append({key: value for key, value in vars(row).items() if key not in ("seconds", "tokens_per_s")})
        if row.step == self.last:
            raise InterruptedError

    def remark(self, text):
        self.remarks.append(text)


def join_group(rank, size, meeting):
    """Be a worker of a group that meets in a file."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= {"LOCAL_SIZE": str(size), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu", **port}
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=size, store=distributed.FileStore(str(meeting), size))


def play(store, config, last=None):
    """An update, broken off after a step if one is named."""
    from tpaw_ray.learner.worker import update

    listener = Listener(last)
    with suppress(InterruptedError):  # as the test wants it
        update(config, store, 0, listener)
    return listener


def weights(store):
    from safetensors.torch import load_file

    (file,) = Path(store.checkpoint(1)).glob("*.safetensors")
    return load_file(file)


def take_parts(parts: list[dict[str, object]], rank: int, size: int) -> None:
    """One worker's part in some updates, each of a run of its own."""
    join_group(rank, size, Path(parts[0]["root"]) / f"meeting-{parts[0]['name']}")
    from tests.ray.test_learner import config_of
    from tpaw_ray.learner import engine
    from tpaw_ray.runs.store import RunStore

    settings = engine.deepspeed_settings

    def settings_for_small_parameters(learner):
        """ZeRO 3 would keep those of a tiny model whole on every worker."""
        found = settings(learner)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    engine.deepspeed_settings = settings_for_small_parameters
    for part in parts:
        root = Path(part["root"])
        listener = play(RunStore.open(str(root), "run"), config_of(root, save_steps=2, **part["learner"]), last=part["last"])
        if rank == 0:
            (root / f"{part['name']}.json").write_text(json.dumps({"remarks": listener.remarks, "rows": listener.rows}))


def main(root: Path, model: Path, cases: dict[str, dict[str, object]]) -> None:
    join_group(0, 1, root / "meeting")
    import torch
    from transformers import AutoModelForCausalLM

    from tests.ray.test_learner import config_of, make_pairs, make_run
    from tpaw_ray.errors import LearnerError
    from tpaw_ray.learner.engine import PolicyEngine

    pairs = make_pairs(AutoModelForCausalLM.from_pretrained(model), rounds=2, players=[1, 0])

    def same(one, other):
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    def steps_of(store):
        return sorted(path.name for path in Path(store.steps(0)).iterdir() if path.is_dir())

    outcomes = {}
    for name, learner in cases.items():
        undisturbed = make_run(root / name / "a", model, pairs)
        whole = play(undisturbed, config_of(root / name / "a", **learner))
        store = make_run(root / name / "b", model, pairs)
        config = config_of(root / name / "b", save_steps=2, **learner)
        play(store, config, last=3)  # before it is saved a second time
        went_on = play(store, config)
        outcomes[name] = {
            "remarks": went_on.remarks,
            "taken_again": [row["step"] for row in went_on.rows[2:]],
            "metrics_equal": went_on.rows == whole.rows,
            "weights_equal": same(weights(store), weights(undisturbed)),
            "kept": steps_of(store),
        }
        if name == "zero-2-rmsprop":
            expected = weights(undisturbed)

    store = make_run(root / "damaged", model, pairs)
    config = config_of(root / "damaged", save_steps=2, zero_stage=2)
    play(store, config, last=3)
    file = next(path for path in store.files(store.steps(0)) if path.endswith(".safetensors"))
    content = bytearray(Path(file).read_bytes())
    content[len(content) // 2] ^= 1
    Path(file).write_bytes(content)
    outcomes["damaged"] = {"file": file, "remarks": play(store, config).remarks, "weights_equal": same(weights(store), expected)}

    store = make_run(root / "earlier", model, pairs)
    play(store, config_of(root / "earlier", save_steps=2, zero_stage=2), last=3)
    (file,) = (path for path in Path(store.steps(0)).rglob("*.safetensors"))
    file.rename(file.with_suffix(".pt"))
    store.commit(f"{store.steps(0)}/000002")
    outcomes["earlier version"] = {
        "remarks": play(store, config_of(root / "earlier", save_steps=2, zero_stage=2)).remarks,
        "weights_equal": same(weights(store), expected),
    }

    take_step = PolicyEngine.step

    def take_spoiled_step(policy):
        for parameter in policy.model.parameters():
            parameter.grad.fill_(torch.nan)
        return take_step(policy)

    PolicyEngine.step = take_spoiled_step  # of ZeRO 0 in fp32, where DeepSpeed gives no norm
    store = make_run(root / "spoiled", model, pairs)
    try:
        play(store, config_of(root / "spoiled", save_steps=1, zero_stage=0))
    except LearnerError as error:
        outcomes["spoiled"] = {"told": str(error), "left": [store.exists(store.checkpoint(1)), store.exists(store.steps(0))]}
    (root / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    if Path(sys.argv[1]).is_dir():
        main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        take_parts(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
