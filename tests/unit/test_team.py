import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpaw_ray.algorithm.team import GIVEN, Rollout, fresh_rollouts, replayed_rollouts, rollouts_of, team_at


def test_team_grows_to_its_size_and_then_drops_the_oldest():
    assert [team_at(iteration, 3) for iteration in range(6)] == [(0,), (1, 0), (2, 1, 0), (3, 2, 1), (4, 3, 2), (5, 4, 3)]


def test_team_of_one_is_the_newest_checkpoint():
    assert [team_at(iteration, 1) for iteration in range(3)] == [(0,), (1,), (2,)]


def test_team_larger_than_the_run_holds_every_checkpoint():
    assert team_at(3, 100) == (3, 2, 1, 0)


@given(st.integers(0, 50), st.integers(1, 10))
def test_team_is_the_last_checkpoints_newest_first(iteration, size):
    expected = [checkpoint for checkpoint in range(iteration + 1) if checkpoint > iteration - size]
    assert list(team_at(iteration, size)) == expected[::-1]


def test_negative_iteration_raises_with_what_was_found():
    with pytest.raises(ValueError, match="iteration must be 0 or more, found -1"):
        team_at(-1, 3)


@pytest.mark.parametrize("size", [0, -2])
def test_team_without_players_raises_with_what_was_found(size):
    with pytest.raises(ValueError, match=f"team size must be 1 or more, found {size}"):
        team_at(0, size)


def test_replayed_rollouts_keep_the_iteration_in_which_their_opponent_spoke():
    assert replayed_rollouts(team_at(0, 3)) == (Rollout(0, 0),)
    assert replayed_rollouts(team_at(4, 3)) == (Rollout(4, 4), Rollout(3, 3), Rollout(2, 2))


def test_fresh_rollouts_are_all_made_in_the_iteration_that_uses_them():
    assert fresh_rollouts(0, team_at(0, 3)) == (Rollout(0, 0),)
    assert fresh_rollouts(4, team_at(4, 3)) == (Rollout(4, 4), Rollout(4, 3), Rollout(4, 2))


def test_a_replayed_rollout_is_generated_in_exactly_one_iteration():
    made = [
        rollout
        for iteration in range(8)
        for rollout in replayed_rollouts(team_at(iteration, 3))
        if rollout.iteration == iteration
    ]
    assert made == [Rollout(iteration, iteration) for iteration in range(8)]


def test_a_fresh_rollout_never_comes_back():
    used = [rollout for iteration in range(8) for rollout in fresh_rollouts(iteration, team_at(iteration, 3))]
    assert len(used) == 1 + 2 + 6 * 3
    assert len(set(used)) == len(used)


def test_spaced_teams_take_every_second_checkpoint():
    assert [team_at(iteration, 3, "spaced") for iteration in (0, 1, 2, 5, 6)] == [(0,), (1,), (2, 0), (5, 3, 1), (6, 4, 2)]


def test_a_team_of_all_grows_whatever_its_size():
    assert team_at(4, 1, "all") == (4, 3, 2, 1, 0)


def test_the_best_play_beside_the_newest():
    assert team_at(0, 3, "best") == (0,)
    assert team_at(4, 3, "best", ranking=[1, 0, 3, 2]) == (4, 1, 0)
    assert team_at(4, 1, "best", ranking=[1, 0, 3, 2]) == (4,)
    with pytest.raises(ValueError, match=r"iteration 4: expected a ranking of all earlier checkpoints, found \[1\]"):
        team_at(4, 3, "best", ranking=[1])


def test_given_preferences_serve_every_iteration_and_fine_tuning_needs_none():
    assert [rollouts_of("given", iteration, (iteration,)) for iteration in range(2)] == [(GIVEN,), (GIVEN,)]
    assert rollouts_of("none", 3, (3, 2)) == ()
    assert rollouts_of("replay", 3, (3, 1)) == (Rollout(3, 3), Rollout(1, 1))
    assert rollouts_of("fresh", 3, (3, 1)) == (Rollout(3, 3), Rollout(3, 1))
