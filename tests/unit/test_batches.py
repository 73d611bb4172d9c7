"""Every triplet once, in steps and micro-batches that do not depend on how many workers share them."""

import itertools
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import write_tiny_model
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import RunError
from tpaw_ray.learner.batches import TripletLengths, Unit, epoch_steps, lengths_in, micro_batches, num_steps, unit_of
from tpaw_ray.learner.triplets import Pairs, lengths_of, read_pairs, triplet_batch
from tpaw_ray.learner.worker import batch_loss, threads_of
from tpaw_ray.policy.batch import cost
from tpaw_ray.policy.logprobs import Policy
from tpaw_ray.policy.model import load_model
from tpaw_ray.runs.store import RunStore
from tpaw_ray.schema import Pair, Score, table_of

PROMPT_IDS = st.lists(st.sampled_from("abcdefghijkl"), max_size=40)
GLOBAL_BATCH = st.integers(1, 12)


@st.composite
def laid_out(draw):
    """Triplets of a few prompts, a step over all of them, workers and a budget."""
    target_lengths = {prompt_id: draw(st.integers(4, 60)) for prompt_id in "abcdefgh"}
    triplets = [
        TripletLengths(
            prompt_id=prompt_id,
            prompt_length=3,
            target_length=target_lengths[prompt_id],
            generated_length=draw(st.integers(4, 60)),
        )
        for prompt_id in draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=24))
    ]
    step = draw(st.permutations(range(len(triplets))))
    workers, budget = draw(st.integers(1, 5)), draw(st.integers(1, 400))
    packed, shared = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    shares = micro_batches(triplets, step, workers=workers, budget=budget, packed=packed, share_prompts=shared)
    return triplets, step, shares, workers, (budget, packed, shared)


def tokens(units, packed):
    return cost(lengths_in(units), packed=packed)


def units_of(shares):
    return [unit for share in shares for units in share for unit in units]


@given(PROMPT_IDS, GLOBAL_BATCH, st.text(max_size=3))
def test_an_epoch_holds_every_triplet_exactly_once(prompt_ids, global_batch, seed):
    steps = epoch_steps(prompt_ids, global_batch, seed)
    assert sorted(index for step in steps for index in step) == list(range(len(prompt_ids)))


@given(PROMPT_IDS, GLOBAL_BATCH)
def test_the_order_is_that_of_a_shuffled_list_of_groups(prompt_ids, global_batch):
    groups = {}
    for index, prompt_id in enumerate(prompt_ids):
        groups.setdefault(prompt_id, []).append(index)
    shuffled = list(groups.values())
    random.Random("s").shuffle(shuffled)
    assert [index for step in epoch_steps(prompt_ids, global_batch, "s") for index in step] == list(itertools.chain(*shuffled))


def test_prompts_may_be_named_by_text_or_numbered():
    lengths = lengths_of(on_disk(PAIRS))
    assert lengths.prompts.tolist() == [0, 1, 0, 0, 1]
    assert epoch_steps(lengths.prompts, 2, "s") == epoch_steps([pair.prompt_id for pair in PAIRS], 2, "s")


@given(PROMPT_IDS, GLOBAL_BATCH)
def test_every_step_but_the_last_has_exactly_the_global_batch(prompt_ids, global_batch):
    sizes = [len(step) for step in epoch_steps(prompt_ids, global_batch, "s")]
    assert all(size == global_batch for size in sizes[:-1])
    assert all(1 <= size <= global_batch for size in sizes[-1:])


@given(PROMPT_IDS, GLOBAL_BATCH, st.integers(1, 4))
def test_num_steps_counts_the_steps_of_all_epochs(prompt_ids, global_batch, epochs):
    made = sum(len(epoch_steps(prompt_ids, global_batch, str(epoch))) for epoch in range(epochs))
    assert num_steps(len(prompt_ids), global_batch, epochs) == made


@given(PROMPT_IDS, GLOBAL_BATCH)
def test_triplets_of_a_prompt_are_adjacent_and_in_their_order(prompt_ids, global_batch):
    flat = [index for step in epoch_steps(prompt_ids, global_batch, "s") for index in step]
    expected = [
        index
        for prompt_id in dict.fromkeys(prompt_ids[index] for index in flat)
        for index in range(len(prompt_ids))
        if prompt_ids[index] == prompt_id
    ]
    assert flat == expected


def test_the_order_is_given_by_the_seed():
    prompt_ids = [str(index) for index in range(50)]
    orders = [epoch_steps(prompt_ids, 50, seed)[0] for seed in ("42/0/0", "42/0/0", "42/0/1")]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != list(range(50))


def test_num_steps_by_hand():
    # 65 triplets in steps of 64 are 2 steps an epoch; 2 epochs
    assert num_steps(65, 64, 2) == 4
    assert num_steps(64, 64, 2) == 2


@given(laid_out())
def test_micro_batches_hold_every_triplet_of_a_step_exactly_once(case):
    triplets, _, shares, _, _ = case
    assert sorted(index for unit in units_of(shares) for index in unit.triplets) == list(range(len(triplets)))


@given(laid_out(), st.integers(1, 5))
def test_all_worker_counts_run_the_same_triplets(case, other_workers):
    triplets, step, shares, _, (budget, packed, shared) = case
    other = micro_batches(triplets, step, workers=other_workers, budget=budget, packed=packed, share_prompts=shared)
    assert Counter(unit.triplets for unit in units_of(shares)) == Counter(unit.triplets for unit in units_of(other))


@given(laid_out())
def test_every_worker_has_equally_many_micro_batches_and_at_least_one(case):
    _, _, shares, workers, _ = case
    assert len(shares) == workers
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1


@given(laid_out())
def test_a_micro_batch_keeps_the_budget_unless_it_is_a_single_unit(case):
    *_, shares, _, (budget, packed, _) = case
    for share in shares:
        for units in share:
            assert tokens(units, packed) <= budget or len(units) == 1


@given(laid_out())
def test_a_unit_over_the_budget_holds_a_single_triplet(case):
    *_, shares, _, (budget, packed, _) = case
    for unit in units_of(shares):
        assert tokens([unit], packed) <= budget or len(unit.triplets) == 1


@given(laid_out())
def test_a_target_runs_once_in_a_step_unless_its_triplets_exceed_the_budget_together(case):
    triplets, step, shares, _, (budget, packed, shared) = case
    by_prompt: dict[str, list] = {}
    for unit in units_of(shares):
        by_prompt.setdefault(triplets[unit.triplets[0]].prompt_id, []).append(unit)
    place = {index: number for number, index in enumerate(step)}
    for units in by_prompt.values():
        units.sort(key=lambda unit: place[unit.triplets[0]])
        for one, following in itertools.pairwise(units):
            longer = unit_of(triplets, [*one.triplets, following.triplets[0]], share_prompts=shared)
            assert tokens([longer], packed) > budget


@given(laid_out())
def test_units_know_their_lengths_and_hold_one_prompt(case):
    triplets, _, shares, _, (*_, shared) = case
    for unit in units_of(shares):
        members = [triplets[index] for index in unit.triplets]
        expected = (members[0].target_length, *(member.generated_length for member in members))
        assert unit.lengths == ((3, *(length - 3 for length in expected)) if shared else expected)
        assert len({member.prompt_id for member in members}) == 1


LENGTHS = [("a", 10, 8), ("a", 10, 9), ("b", 25, 5), ("b", 25, 5)]
TRIPLETS = [TripletLengths(prompt_id=i, prompt_length=4, target_length=t, generated_length=g) for i, t, g in LENGTHS]


def test_padded_micro_batches_by_hand():
    # Budget 60. Prompt a: 3 sequences of at most 10 tokens, 30. Prompt b: 3 of at most 25, 75 > 60, so two units of 2 × 25 = 50.
    # One worker: the two units of b alone (25 × 4 = 100 > 60), then a.
    a = Unit(triplets=(0, 1), lengths=(10, 8, 9))
    b2, b3 = Unit(triplets=(2,), lengths=(25, 5)), Unit(triplets=(3,), lengths=(25, 5))
    assert micro_batches(TRIPLETS, [0, 1, 2, 3], workers=1, budget=60, packed=False) == [[[b2], [b3], [a]]]
    # Two workers: the heaviest first, each to the worker with the least work: 50 | 50, then a to the first; the second idles.
    assert micro_batches(TRIPLETS, [0, 1, 2, 3], workers=2, budget=60, packed=False) == [[[b2], [a]], [[b3], []]]


def test_packed_micro_batches_by_hand():
    # Budget 60. Prompt a: 10 + 8 + 9 = 27 tokens, prompt b: 25 + 5 + 5 = 35; together 62 > 60. The heavier comes first.
    a, b = Unit(triplets=(0, 1), lengths=(10, 8, 9)), Unit(triplets=(2, 3), lengths=(25, 5, 5))
    assert micro_batches(TRIPLETS, [0, 1, 2, 3], workers=1, budget=60, packed=True) == [[[b], [a]]]
    assert micro_batches(TRIPLETS, [0, 1, 2, 3], workers=1, budget=62, packed=True) == [[[b, a]]]
    # Budget 30: b is split into 25 + 5 twice.
    b2, b3 = Unit(triplets=(2,), lengths=(25, 5)), Unit(triplets=(3,), lengths=(25, 5))
    assert micro_batches(TRIPLETS, [0, 1, 2, 3], workers=1, budget=30, packed=True) == [[[b2], [b3], [a]]]


def test_micro_batches_with_shared_prompts_by_hand():
    # Prompts of 4 tokens. Prompt a: 4 + 6 + 4 + 5 = 19 tokens, prompt b: 4 + 21 + 1 + 1 = 27; 46 together.
    a, b = Unit(triplets=(0, 1), lengths=(4, 6, 4, 5)), Unit(triplets=(2, 3), lengths=(4, 21, 1, 1))
    whole = micro_batches(TRIPLETS, [0, 1, 2, 3], workers=1, budget=46, packed=True, share_prompts=True)
    assert whole == [[[b, a]]]
    # Budget 26: b is split into 4 + 21 + 1 twice.
    b2, b3 = Unit(triplets=(2,), lengths=(4, 21, 1)), Unit(triplets=(3,), lengths=(4, 21, 1))
    split = micro_batches(TRIPLETS, [0, 1, 2, 3], workers=1, budget=26, packed=True, share_prompts=True)
    assert split == [[[b2], [b3], [a]]]


def test_a_step_that_fits_one_micro_batch_is_spread_over_all_workers():
    triplets = [
        TripletLengths(prompt_id=str(index), prompt_length=4, target_length=10, generated_length=10) for index in range(4)
    ]
    shares = micro_batches(triplets, range(4), workers=4, budget=1000, packed=True)
    assert [[unit.triplets for unit in share[0]] for share in shares] == [[(0,)], [(1,)], [(2,)], [(3,)]]


def test_the_cost_of_a_micro_batch_by_hand():
    units = [Unit(triplets=(0, 1), lengths=(4, 3, 2)), Unit(triplets=(2,), lengths=(9, 1))]
    # 5 sequences, the longest of 9 tokens; 4 + 3 + 2 + 9 + 1 tokens
    assert (tokens(units, packed=False), tokens(units, packed=True)) == (45, 19)
    assert (tokens([], packed=False), tokens([], packed=True)) == (0, 0)


def pair_of(prompt_id, prompt, target, generated, number, iteration=2):
    return Pair(
        prompt_id=prompt_id,
        iteration=iteration,
        opponent=iteration,
        prompt_tokens=prompt,
        target_tokens=target,
        generated_tokens=generated,
        players=[2, 1],
        reference_target_logps=[-10.0 - number, -11.0 - number],
        reference_generated_logps=[-20.0 - number, -21.5 - number],
        start_alpha=[6.0, 1.0],
        start_beta=[0.25 + number / 100, 0.75 - number / 100],
    )


PAIRS = [
    pair_of("a", [4, 9], [20, 21, 5], [30, 31, 32, 5], 0),
    pair_of("b", [4, 10, 11, 12], [22, 5], [33, 5], 1),
    pair_of("a", [4, 9], [20, 21, 5], [34, 5], 2),
    pair_of("a", [4, 9], [20, 21, 5], [35, 36, 37], 3),
    pair_of("b", [4, 10, 11, 12], [22, 5], [38, 39, 40, 41, 5], 4),
]


def on_disk(pairs):
    return Pairs([table_of(pairs, Pair)])


def unit(*indices):
    return unit_of(lengths_of(on_disk(PAIRS)), indices)


GROUPED = [unit(1, 4), unit(0, 2, 3)]
UNGROUPED = [unit(index) for index in (1, 4, 0, 2, 3)]


def sequence_at(batch, index):
    """(prompt, response) of a sequence, as attention and head see it."""
    tokens = batch.tokens
    mine = tokens.response_R[tokens.sequence_R == index]
    assert len(mine) == batch.response_lengths_S[index]
    seen = next(keys for keys in seen_by_segments(tokens) if int(mine[-1]) in keys)
    prompt = seen[: seen.index(int(mine[0]))]
    assert tokens.predictor_R[tokens.sequence_R == index].tolist() == [prompt[-1], *mine[:-1].tolist()]
    assert tokens.positions_N[seen].tolist() == list(range(len(seen)))
    assert len(seen) == tokens.lengths[index]
    return tokens.input_ids_N[prompt].tolist(), tokens.input_ids_N[mine].tolist()


def seen_by_segments(tokens):
    keys = torch.arange(len(tokens.input_ids_N)) if tokens.keys_M is None else tokens.keys_M
    return [part.tolist() for part in keys.split(tokens.contexts)]


@pytest.mark.parametrize("shared", [False, True], ids=["prompts apart", "prompts shared"])
@pytest.mark.parametrize(("units", "num_sequences"), [(GROUPED, 7), (UNGROUPED, 10)], ids=["grouped", "ungrouped"])
def test_indices_of_a_triplet_batch_point_to_the_right_sequences_and_scores(units, num_sequences, shared):
    batch = triplet_batch(PAIRS, units, share_prompts=shared)
    assert len(batch.tokens.lengths) == num_sequences
    for row, index in enumerate((1, 4, 0, 2, 3)):
        expected = PAIRS[index]
        assert sequence_at(batch, batch.target_B[row]) == (expected.prompt_tokens, expected.target_tokens)
        assert sequence_at(batch, batch.generated_B[row]) == (expected.prompt_tokens, expected.generated_tokens)
        assert batch.reference_target_logps_BK[row].tolist() == expected.reference_target_logps
        assert batch.reference_generated_logps_BK[row].tolist() == expected.reference_generated_logps
        assert batch.start_alpha_BK[row].tolist() == expected.start_alpha
        assert batch.start_beta_BK[row].tolist() == pytest.approx(expected.start_beta)


def test_a_targets_sequence_stands_once_before_its_generations():
    batch = triplet_batch(PAIRS, GROUPED)
    assert batch.target_B.tolist() == [0, 0, 3, 3, 3]
    assert batch.generated_B.tolist() == [1, 2, 4, 5, 6]


def test_a_shared_prompt_stands_once():
    # b: 4 tokens of prompt, 2 + 2 + 5 of responses; a: 2 tokens of prompt, 3 + 4 + 2 + 3 of responses
    assert len(triplet_batch(PAIRS, GROUPED, share_prompts=True).tokens.input_ids_N) == 13 + 14
    assert len(triplet_batch(PAIRS, GROUPED).tokens.input_ids_N) == 13 + 2 * 4 + 14 + 3 * 2


def test_lengths_count_the_prompt():
    found = [(row.prompt_id, row.prompt_length, row.target_length, row.generated_length) for row in lengths_of(on_disk(PAIRS))]
    assert found == [("a", 2, 5, 6), ("b", 4, 6, 6), ("a", 2, 5, 4), ("a", 2, 5, 5), ("b", 4, 6, 9)]


def test_pairs_are_read_in_the_order_of_their_files(tmp_path):
    store = RunStore.open(str(tmp_path), "demo")
    store.write_rows(store.shard(store.pairs(2), 1), PAIRS[3:], Pair)
    store.write_rows(store.shard(store.pairs(2), 0), PAIRS[:3], Pair)
    assert list(read_pairs(store, 2)) == PAIRS


def test_a_triplet_is_found_by_its_index_whatever_the_sizes_of_files():
    many = [pair_of(f"p{number // 3}", [4] * (1 + number % 5), [20, 5], [number, 5], number) for number in range(3 * Pairs.PIECE)]
    cuts = [0, 1, Pairs.PIECE + 4, Pairs.PIECE + 4, len(many)]  # one file is empty
    pairs = Pairs(table_of(many[begin:end], Pair) for begin, end in itertools.pairwise(cuts))
    assert len(pairs) == len(many)
    assert all(pairs[index] == many[index] for index in (*reversed(range(len(many))), 5, 60))
    for outside in (-1, len(many)):
        with pytest.raises(IndexError):
            pairs[outside]


def test_triplets_leave_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pairs = on_disk(PAIRS)
    assert list(tmp_path.iterdir()) == []
    assert pairs[4] == PAIRS[4]


def test_a_file_of_pairs_without_a_column_is_named(tmp_path):
    store = RunStore.open(str(tmp_path), "demo")
    path = store.shard(store.pairs(2), 0)
    store.write_rows(path, [Score(player=0, response_id="0", logp=0.0)], Score)
    with pytest.raises(RunError, match=rf"{path}: .*prompt_id.*found columns player, response_id, logp"):
        read_pairs(store, 2)


@pytest.fixture(scope="module", params=["varlen", "sdpa"])
def model(request, tmp_path_factory):
    return load_model(str(write_tiny_model(tmp_path_factory.mktemp("model"))), precision="fp32", attention=request.param)


def config_with(**objective):
    return resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}, "objective": objective})


def gradients_of(model, config, micro, num_triplets):
    """What the step's mean loss and gradient are when micro-batches add up as in the learner."""
    model.zero_grad()
    policy, total = Policy(model), 0.0
    for units in micro:
        batch = triplet_batch(PAIRS, units, share_prompts=policy.shares_prompts)
        loss = batch_loss(config, batch, policy(batch.tokens), iteration=2).losses_B.sum() / num_triplets
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weights", ["live", "frozen"])
@pytest.mark.parametrize(
    "micro",
    [[GROUPED], [[GROUPED[1]], [GROUPED[0]]], [UNGROUPED], [[one] for one in UNGROUPED]],
    ids=["grouped", "grouped, two micro-batches", "one unit a triplet", "one micro-batch a triplet"],
)
def test_every_layout_of_a_step_gives_the_loss_and_gradient_of_its_triplets_one_by_one(model, micro, weights):
    config = config_with(weights=weights)
    model.zero_grad()
    policy, losses = Policy(model), []
    for pair in PAIRS:
        alone = triplet_batch([pair], [unit_of(lengths_of(on_disk([pair])), [0])])
        losses.append(batch_loss(config, alone, policy(alone.tokens), iteration=2).loss)
    torch.stack(losses).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found_loss, found = gradients_of(model, config, micro, len(PAIRS))
    assert found_loss == pytest.approx(sum(loss.item() for loss in losses) / len(PAIRS), rel=1e-5)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_batch_loss_takes_the_settings_of_its_iteration():
    batch = triplet_batch(PAIRS[:1], [unit(0)])
    logps_S = torch.tensor([-9.0, -25.0])
    config = config_with(reward_scale=[0.1, 0.1, 2.0], eta=1.0, gamma=0.0)
    # target: −9 + 10, −9 + 11 = 1, 2; generated: −25 + 20, −25 + 21.5 = −5, −3.5; the last value serves later iterations
    for iteration, scale in [(0, 0.1), (2, 2.0), (9, 2.0)]:
        found = batch_loss(config, batch, logps_S, iteration)
        torch.testing.assert_close(found.target_rewards_BK, scale * torch.tensor([[1.0, 2.0]]))
        torch.testing.assert_close(found.generated_rewards_BK, scale * torch.tensor([[-5.0, -3.5]]))


def test_frozen_weights_are_those_of_the_pair_whatever_the_policy_became():
    batch = triplet_batch(PAIRS[:1], [unit(0)])
    logps_S = torch.tensor([-1.0, -90.0])
    frozen = batch_loss(config_with(weights="frozen"), batch, logps_S, 0)
    live = batch_loss(config_with(weights="live"), batch, logps_S, 0)
    assert frozen.target_weights_BK.tolist() == [[6.0, 1.0]]
    assert frozen.player_weights_BK.tolist() == [[0.25, 0.75]]
    assert live.target_weights_BK.tolist() == [[1.0, 1.0]]


def test_threads_of_a_worker_are_those_of_the_config():
    config = resolve_config({"run": {"name": "t"}, "model": {"path": "m"}, "data": {"path": "d"}, "learner": {"threads": 3}})
    assert threads_of(config) == 3
