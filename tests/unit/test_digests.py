"""A compact set of digests does what a set does."""

from hypothesis import given
from hypothesis import strategies as st

from tpaw_ray.data.digests import DigestSet

# Equal low bits, and 0 next to 1: places that collide.
CLOSE = st.builds(lambda low, high: low + 1024 * high, st.integers(0, 3), st.integers(0, 2**54 - 1))


@given(st.lists(CLOSE | st.integers(2, 2**64 - 1), max_size=60))
def test_a_digest_is_new_once(digests):
    compact, plain = DigestSet(), set()
    for digest in digests:
        digest = digest or 1  # 0 counts as 1: one chance in 2^64
        assert (digest in compact) == (digest in plain)
        assert compact.add(digest) == (digest not in plain)
        plain.add(digest)
    assert len(compact) == len(plain)


def test_it_grows_and_keeps_what_it_holds():
    compact = DigestSet()
    spread = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(20_000)]
    assert all(map(compact.add, spread))
    assert not any(map(compact.add, spread))
    assert all(digest in compact for digest in spread)
    assert 12 * len(compact) <= len(compact._table) * 8 <= 24 * len(compact)
