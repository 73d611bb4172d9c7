"""The seed of every sampled response: a pure function of what is asked, not of who answers or when."""

import hashlib


def request_seed(run_seed: int, iteration: int, opponent: int, prompt_id: str) -> int:
    """A seed in `0 … 2**63 - 1` for one response; the same on every machine and in every Python.

    Batching, sharding, replicas and restarts therefore leave the sampled tokens as they are. A new iteration or opponent
    draws anew. vLLM keeps seeds as signed 64-bit numbers and reads -1 as "no seed", hence 63 bits. Torch's CPU generator uses
    the lower 32 of them, which a hash fills as evenly as the rest.

    >>> request_seed(42, 0, 0, "3f") == request_seed(42, 0, 0, "3f"), request_seed(42, 0, 0, "3f") == request_seed(42, 1, 0, "3f")
    (True, False)
    """
    key = f"{run_seed}/{iteration}/{opponent}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
