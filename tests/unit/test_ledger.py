"""Which prompts the ledger finds guilty, played through without engines: an engine dies while it holds a poison prompt."""

import math

import pytest

from tpaw_ray.errors import GenerationError
from tpaw_ray.opponents.ledger import IN_VAIN, Ledger, next_suspects


def play(prompts, poison, most=1000, ledger=None):
    """Give an engine all prompts as an opponent would, until all are answered or set aside; returns these and the deaths."""
    ledger = ledger or Ledger()
    ledger.expect(0, most)
    left, deaths = list(prompts), -1
    while True:
        deaths += 1
        record = ledger.start(0, 0)
        left = [prompt for prompt in left if prompt not in record.set_aside]
        dead = False
        while left and not dead:
            clear = [prompt for prompt in left if prompt not in record.deaths]
            group = clear or next_suspects(left, record.deaths)
            ledger.hold(0, 0, group)
            dead = bool(poison & set(group))
            if not dead:
                ledger.release(0, 0, group)
                left = [prompt for prompt in left if prompt not in group]
        if not left:
            return sorted(record.set_aside), deaths


@pytest.mark.parametrize("count", [1, 2, 3, 64, 500])
def test_one_poison_prompt_is_found_in_a_logarithm_of_deaths(count):
    prompts = [f"p{number}" for number in range(count)]
    found, deaths = play(prompts, {"p0"})
    assert found == ["p0"]
    assert deaths <= 3 + math.ceil(math.log2(count))


def test_several_are_found_and_no_other():
    prompts = [f"p{number}" for number in range(200)]
    guilty = {"p3", "p77", "p199"}
    assert play(prompts, guilty)[0] == sorted(guilty)


def test_deaths_that_no_prompt_is_to_blame_for_set_none_aside():
    ledger = Ledger()
    for _ in range(3):
        ledger.start(0, 0)
        ledger.hold(0, 0, ["a", "b"])  # killed from outside
    assert play(["a", "b"], set(), ledger=ledger) == ([], 0)


def test_what_was_answered_is_no_longer_suspect():
    ledger = Ledger()
    ledger.start(0, 0)
    ledger.hold(0, 0, ["a"])
    ledger.release(0, 0, ["a"])
    assert ledger.start(0, 0).deaths == {}


def test_an_engine_that_dies_in_vain_is_given_up_and_one_that_answers_in_between_is_not():
    ledger = Ledger()
    for _ in range(3 * IN_VAIN):
        ledger.start(0, 1)
        ledger.release(0, 1, ["x"])
    ledger.explain(0, 0, "no memory")
    for _ in range(IN_VAIN):
        ledger.start(0, 0)
    with pytest.raises(GenerationError, match=f"ended {IN_VAIN} times in a row before it answered anything: no memory"):
        ledger.start(0, 0)


def test_more_than_may_be_set_aside_is_an_error_that_names_them():
    with pytest.raises(GenerationError, match=r"2 prompts end the engine .* more than the 1 .*: p\d, p\d"):
        play([f"p{number}" for number in range(8)], {"p1", "p2"}, most=1)


def test_checkpoints_are_told_apart():
    ledger = Ledger()
    play(["a"], {"a"}, ledger=ledger)
    assert ledger.start(1, 0).set_aside == frozenset()


def test_an_engine_that_every_prompt_ends_is_given_up_before_many_are_set_aside():
    prompts = [f"p{number}" for number in range(64)]
    with pytest.raises(GenerationError, match=f"ended {IN_VAIN} times in a row before it answered anything"):
        play(prompts, set(prompts))


def test_a_process_that_is_killed_while_it_waits_for_its_checkpoint_is_not_to_blame():
    ledger = Ledger()
    for _ in range(3 * IN_VAIN):
        ledger.start(0, 0)
        ledger.wait(0, 0, True)
    assert ledger.start(0, 0).set_aside == frozenset()  # neither given up nor anything to blame
