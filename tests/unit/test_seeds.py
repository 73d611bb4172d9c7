"""Seeds depend on what is asked, and stay within what vLLM takes."""

import hashlib
import subprocess
import sys

from tpaw_ray.opponents.seeds import request_seed


def test_the_seed_is_the_upper_63_bits_of_the_keys_hash():
    digest = hashlib.blake2b(b"42/1/0/3f", digest_size=8).hexdigest()
    assert request_seed(42, 1, 0, "3f") == int(digest, 16) // 2


def test_the_seed_is_the_same_in_another_python_with_another_hash_seed():
    code = "from tpaw_ray.opponents.seeds import request_seed; print(request_seed(42, 3, 2, 'prompt'))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {f"{request_seed(42, 3, 2, 'prompt')}\n".encode()}


def test_each_part_of_the_key_changes_the_seed():
    seeds = [request_seed(42, 1, 0, "a"), request_seed(43, 1, 0, "a"), request_seed(42, 0, 0, "a"), request_seed(42, 1, 1, "a")]
    assert len({*seeds, request_seed(42, 1, 0, "b")}) == 5


def test_parts_do_not_run_into_each_other():
    assert request_seed(4, 21, 0, "a") != request_seed(42, 1, 0, "a")
    assert request_seed(42, 1, 1, "0/a") != request_seed(42, 1, 10, "a")


def test_ten_thousand_seeds_differ_and_fit_in_63_bits_and_in_their_lower_32():
    seeds = [request_seed(42, 0, 0, str(index)) for index in range(10_000)]
    assert len(set(seeds)) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Torch's CPU generator keeps 32 bits; 10 000 draws of 2**32 are expected to collide 0.01 times.
    assert len({seed % 2**32 for seed in seeds}) >= 9_999
