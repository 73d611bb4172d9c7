"""20 000 and 200 000 prompts through the real stages, with paced opponents (a fake) in place of vLLM: memory stays flat.

Takes some 15 minutes on two cores.
"""

import importlib
from pathlib import Path

import pytest

from tests.tiny import write_tiny_model

SMALL, LARGE = 20_000, 200_000
STAGES = ("prompts", "generate", "pair", "learner")
LIMIT_MIB = 768
"""What a process may take, whatever the number of prompts; most of it are Python, Arrow, Ray and torch themselves."""
BYTES_A_PROMPT = {"prompts": 128, "generate": 256, "pair": 256, "learner": 512}
"""What a stage may grow by for each prompt more.

Seen digests take up to 36 bytes; the learner's lengths and order some 130 for each of three triplets. The rest is Ray's record of
its tasks, one a shard, and what an allocator keeps.
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Figures by size and stage."""
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        load = importlib.import_module("load")
    return {count: load.measure(tmp_path_factory.mktemp("load"), str(model), count) for count in (SMALL, LARGE)}


@pytest.mark.parametrize("count", [SMALL, LARGE])
def test_every_prompt_goes_through_every_stage(found, count):
    figures = found[count]
    assert figures["prompts"]["prompts"] == figures["generate"]["responses"] == count
    assert figures["pair"]["pairs"] == figures["learner"]["triplets"] == 3 * count


@pytest.mark.parametrize("process", ["own_mib", "worker_mib"])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_stays_within_a_fixed_limit_and_hardly_grows(found, stage, process):
    small, large = (found[count][stage][process] for count in (SMALL, LARGE))
    assert large <= LIMIT_MIB
    assert (large - small) * 2**20 / (LARGE - SMALL) <= BYTES_A_PROMPT[stage]
