"""What `test_saves.py` runs in a process of its own, which is a whole group of workers: DeepSpeed without Ray Train."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path


def main(root: Path, model: Path, cases: dict[str, dict[str, object]]) -> None:
    os.environ |= {"LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    import torch
    from safetensors.torch import load_file
    from torch import distributed
    from transformers import AutoModelForCausalLM

    from tests.ray.test_learner import config_of, make_pairs, make_run
    from tpaw_ray.errors import LearnerError
    from tpaw_ray.learner.engine import PolicyEngine
    from tpaw_ray.learner.worker import update

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    pairs = make_pairs(AutoModelForCausalLM.from_pretrained(model), rounds=2, players=[1, 0])

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

    def play(store, config, last=None):
        listener = Listener(last)
        with suppress(InterruptedError):  # as the test wants it
            update(config, store, 0, listener)
        return listener

    def weights(store):
        (file,) = Path(store.checkpoint(1)).glob("*.safetensors")
        return load_file(file)

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
    file = next(path for path in store.files(store.steps(0)) if path.endswith("optim_states.pt"))
    content = bytearray(Path(file).read_bytes())
    content[len(content) // 2] ^= 1
    Path(file).write_bytes(content)
    outcomes["damaged"] = {"file": file, "remarks": play(store, config).remarks, "weights_equal": same(weights(store), expected)}

    store = make_run(root / "other", model, pairs)
    play(store, config_of(root / "other", save_steps=2, zero_stage=1), last=3)
    went_on = play(store, config_of(root / "other", save_steps=2, zero_stage=2))
    outcomes["other group"] = {"remarks": went_on.remarks, "weights_equal": same(weights(store), expected)}

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
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
