"""Opponents on a real local Ray with real vLLM engines; a stand-in engine only where an engine has to break down."""

import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayActorError

from tests.tiny import engines, tiny_tokenizer
from tpaw_ray.config import resolve_config
from tpaw_ray.errors import CheckpointError, GenerationError, RunError
from tpaw_ray.opponents.opponent import EngineSettings, Opponent, Request, Response, Sampling
from tpaw_ray.opponents.roster import Roster, ask
from tpaw_ray.opponents.seeds import request_seed
from tpaw_ray.processes import model_process

END = tiny_tokenizer().eos_token_id
VOCABULARY = len(tiny_tokenizer())
SETTINGS = EngineSettings(precision="fp32", max_length=256, end_tokens=(END,), batch=64, threads=1)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=24)
DRAWN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=64)


@contextmanager
def at_work(roster):
    """A roster that ends with the block, its ledger too, whatever still holds it (a caught error's traceback does)."""
    try:
        yield roster
    finally:
        roster.retire_all()


@pytest.fixture(scope="module")
def roster(ray_session, tiny_model):
    """Two engines of the tiny model as checkpoint 0."""
    with at_work(Roster(SETTINGS, engines(2))) as roster:
        roster.host(0, str(tiny_model), str(tiny_model / "committed.json"))
        roster.wait_ready(0)
        yield roster


@pytest.fixture
def a_roster(ray_session):
    """A roster of one engine a checkpoint, that nobody is on yet."""
    with at_work(Roster(SETTINGS, engines(1))) as roster:
        yield roster


@pytest.fixture(scope="module")
def pair(roster):
    return roster.opponents(0)


def questions(count, longest=40):
    """Random prompts of 1 to `longest` tokens, special ones included."""
    draw = random.Random(count)
    return [
        Request(
            prompt_id=f"p{index}",
            prompt_tokens=[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))],
            seed=request_seed(42, 0, 0, f"p{index}"),
        )
        for index in range(count)
    ]


def stats(opponent):
    return ray.get(opponent.stats.remote())


def test_greedy_answers_are_those_of_a_naive_decode_with_transformers(pair, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def naive(prompt):
        tokens = []
        while len(tokens) < GREEDY.max_new_tokens and END not in tokens:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
        return tokens

    requests = questions(48)
    responses = ask(pair, 0, requests, GREEDY)
    assert [response.prompt_id for response in responses] == [request.prompt_id for request in requests]
    for request, response in zip(requests, responses, strict=True):
        assert response.generated_tokens == naive(request.prompt_tokens), request.prompt_id
        assert response.finish_reason == ("stop" if response.generated_tokens[-1] == END else "length")
    assert {response.finish_reason for response in responses} == {"stop", "length"}


def test_responses_are_ids_as_sampled_even_where_text_would_not_bring_them_back(pair):
    tokenizer = tiny_tokenizer()
    responses = ask(pair, 0, questions(32), DRAWN)
    texts = [tokenizer.decode(response.generated_tokens, skip_special_tokens=True) for response in responses]
    again = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert sum(ids != response.generated_tokens[:-1] for ids, response in zip(again, responses, strict=True)) > 16
    assert any(tokenizer.unk_token_id in response.generated_tokens for response in responses)
    for response in responses:
        assert END not in response.generated_tokens[:-1]
        assert (response.generated_tokens[-1] == END) == (response.finish_reason == "stop")


def test_seeds_decide_the_responses_whatever_the_replicas_batches_and_order(pair):
    requests = questions(64)
    together = ask(pair[:1], 0, requests, DRAWN)
    assert len({tuple(response.generated_tokens) for response in together}) == 64
    assert ask(pair, 1, requests, DRAWN) == together
    assert ask(pair, 0, requests[::-1], DRAWN) == together[::-1]
    eight_by_eight = [response for first in range(0, 64, 8) for response in ask(pair, first, requests[first : first + 8], DRAWN)]
    assert eight_by_eight == together


def test_another_seed_gives_another_response(pair):
    requests = questions(8)
    others = [Request(prompt_id=r.prompt_id, prompt_tokens=r.prompt_tokens, seed=r.seed + 1) for r in requests]
    assert ask(pair, 0, requests, DRAWN) != ask(pair, 0, others, DRAWN)


def test_a_call_joins_the_batch_of_a_call_that_is_under_way(pair):
    opponent = pair[0]
    long = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=200)
    many = questions(80)
    expected = [ask([opponent], 0, part, long) for part in (many[:40], many[40:])]
    most_alone = stats(opponent).most_in_flight
    first = opponent.generate.remote(many, long)
    while not stats(opponent).in_flight:
        time.sleep(0.001)
    second = opponent.generate.remote(many, long)
    assert ray.get([first, second]) == [expected[0] + expected[1]] * 2
    assert stats(opponent).most_in_flight > max(len(many), most_alone)
    assert stats(opponent).in_flight == 0


def test_a_response_is_cut_to_fit_the_longest_sequence(pair):
    request = Request(prompt_id="long", prompt_tokens=[9] * 250, seed=1)
    (response,) = ask(pair, 0, [request], Sampling(temperature=0.0, top_p=1.0, max_new_tokens=64))
    assert len(response.generated_tokens) == 6 or response.finish_reason == "stop"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([9] * 256, "256 tokens"), ([], "0 tokens"), ([9, VOCABULARY], f"token id {VOCABULARY}"), ([-1], "token id -1")],
)
def test_a_prompt_that_cannot_be_answered_is_named_and_the_engine_goes_on(pair, tokens, message):
    good = questions(4)
    with pytest.raises(GenerationError, match=rf"prompt odd-one: .*{message}") as caught:
        ask(pair, 0, [*good, Request(prompt_id="odd-one", prompt_tokens=tokens, seed=1)], GREEDY)
    assert type(caught.value) is GenerationError
    assert len(ask(pair, 0, good, GREEDY)) == 4


def test_no_requests_have_no_responses(pair):
    assert ask(pair, 0, [], GREEDY) == []


def test_hosting_a_checkpoint_twice_starts_it_once(roster, pair, tiny_model):
    pids = [stats(opponent).pid for opponent in pair]
    roster.host(0, str(tiny_model), str(tiny_model / "committed.json"))
    assert roster.hosted == (0,)
    assert [stats(opponent).pid for opponent in roster.opponents(0)] == pids


def test_a_killed_process_is_replaced_and_its_calls_are_answered_all_the_same(pair):
    requests = questions(80)
    long = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=200)
    expected = ask(pair[1:], 0, requests, long)
    victim = stats(pair[0]).pid
    call = pair[0].generate.remote(requests, long)
    while not stats(pair[0]).in_flight:
        time.sleep(0.001)
    os.kill(victim, signal.SIGKILL)
    assert ray.get(call) == expected
    assert stats(pair[0]).pid != victim


def test_a_damaged_checkpoint_is_reported_and_leaves_no_actor(a_roster, tiny_model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "committed.json").write_text("{}")
    before = free()
    for number, (files, error, message) in enumerate(
        [
            ({}, CheckpointError, "config.json cannot be read"),
            ({"config.json": (tiny_model / "config.json").read_bytes()}, CheckpointError, r"no \*\.safetensors files"),
            ({"model.safetensors": b"no tensors"}, GenerationError, "the engine could not start"),
        ]
    ):
        for name, content in files.items():
            (broken / name).write_bytes(content)
        a_roster.host(number, str(broken), str(broken / "committed.json"))
        (opponent,) = a_roster.opponents(number)
        with pytest.raises(error, match=f"{broken}: .*{message}") as caught:
            a_roster.wait_ready(number)
        assert type(caught.value) is error
        assert a_roster.hosted == ()
        assert_gone(opponent, before)


def test_a_checkpoint_that_is_not_hosted_is_an_error_and_retiring_it_is_not(a_roster):
    a_roster.retire(7)
    with pytest.raises(RunError, match="checkpoint 7 has no opponent; hosted: none"):
        a_roster.opponents(7)


def test_an_opponent_that_waits_for_its_checkpoint_can_be_retired(a_roster, tmp_path):
    before = free()
    a_roster.host(3, str(tmp_path), str(tmp_path / "never.json"))
    waiting = a_roster.opponents(3)
    a_roster.retire(3)
    a_roster.retire(3)
    assert a_roster.hosted == ()
    for opponent in waiting:
        assert_gone(opponent, before)


class EchoEngine:
    """Answers a prompt with itself; breaks down at every prompt that holds a 13 while `fuse` has files left."""

    vocabulary = 100

    def __init__(self, fuse):
        self.fuse, self.held = fuse, []

    def add(self, key, request, sampling, adapter):
        self.held.append((key, request.prompt_tokens))

    def step(self):
        left = sorted(self.fuse.iterdir())
        if left and any(13 in tokens for _, tokens in self.held):
            left[0].unlink()
            raise RuntimeError("out of luck")
        held, self.held = self.held, []
        return [SimpleNamespace(key=key, tokens=tokens, finish_reason="stop") for key, tokens in held]


class EchoOpponent(Opponent):
    """An opponent in all but its engine. The checkpoint's folder holds one file for every breakdown to come."""

    def _await_checkpoint(self):
        pass  # it is there

    def _load_engine(self):
        return EchoEngine(Path(self._checkpoint))


class UnevenOpponent(EchoOpponent):
    """An echoing opponent whose second replica takes long over everything."""

    def _load_engine(self):
        engine = super()._load_engine()
        if self._seat.replica:
            answer = engine.step
            engine.step = lambda: (time.sleep(3), answer())[1]
        return engine


class EchoRoster(Roster):
    """A roster of echoing opponents."""

    kind = EchoOpponent


@pytest.fixture
def echo(ray_session, tmp_path):
    """Hosts an echoing opponent whose engine breaks down so many times."""
    with at_work(EchoRoster(SETTINGS, engines(1))) as roster:

        def host(breakdowns):
            folder = tmp_path / "fuse"
            folder.mkdir()
            for number in range(breakdowns):
                (folder / str(number)).touch()
            roster.host(0, str(folder), str(folder))
            return roster

        yield host


def test_a_slow_replica_holds_up_no_more_than_it_has_begun(ray_session, tmp_path):
    roster = EchoRoster(SETTINGS, engines(2))
    roster.kind = UnevenOpponent
    with at_work(roster):
        roster.host(0, str(tmp_path), str(tmp_path))
        roster.wait_ready(0)
        asked = numbers(*range(14, 78))
        assert ask(roster.opponents(0), 0, asked, GREEDY) == said(*range(14, 78))
        # Of eight portions of 8 both began with two; the other four were ready while the slow one was still at its first.
        assert [stats(opponent).sequences for opponent in roster.opponents(0)] == [48, 16]


def numbers(*tokens):
    return [Request(prompt_id=str(token), prompt_tokens=[token], seed=0) for token in tokens]


def said(*tokens):
    return [Response(prompt_id=str(token), generated_tokens=[token], finish_reason="stop") for token in tokens]


SET_ASIDE_13 = Response(prompt_id="13", generated_tokens=[], finish_reason="set_aside")


def test_an_engine_that_breaks_down_costs_the_calls_in_flight_only_a_retry(echo):
    (opponent,) = echo(breakdowns=1).opponents(0)
    before = stats(opponent).pid
    answers = ray.get([opponent.generate.remote(numbers(number), GREEDY) for number in range(10, 16)])
    assert answers == [said(number) for number in range(10, 16)]
    assert stats(opponent).pid != before


def test_a_prompt_that_ends_every_engine_is_set_aside_and_the_others_are_answered(echo):
    """Deaths: two with all 16, then with 8, 4, 2 and 1 of the suspects."""
    roster = echo(breakdowns=100)
    roster.expect(0, 1)
    (opponent,) = roster.opponents(0)
    assert ask([opponent], 0, numbers(*range(16)), GREEDY) == [*said(*range(13)), SET_ASIDE_13, *said(14, 15)]
    left = len(list(Path(ray.get(opponent.__ray_call__.remote(lambda self: self._checkpoint))).iterdir()))
    assert 100 - left <= 7
    assert ask([opponent], 0, numbers(13, 5), GREEDY) == [SET_ASIDE_13, *said(5)]  # and it is not tried again


def test_more_such_prompts_than_may_be_left_out_end_it_with_their_names(echo):
    roster = echo(breakdowns=100)
    roster.expect(0, 0)
    with pytest.raises(GenerationError, match=r"checkpoint 0: 1 prompts end the engine .* more than the 0 .*max_set_aside.*: 13"):
        ask(roster.opponents(0), 0, numbers(12, 13), GREEDY)


def test_an_engine_that_dies_whatever_it_holds_is_given_up_with_its_reason(ray_session, tmp_path):
    with at_work(EchoRoster(SETTINGS, engines(1))) as roster:
        roster.host(0, str(tmp_path / "absent"), str(tmp_path))  # so that every step raises
        with pytest.raises(GenerationError, match=r"ended 4 times in a row before it answered anything: FileNotFoundError"):
            ask(roster.opponents(0), 0, numbers(*range(8)), GREEDY)


def test_a_repeatable_engine_has_one_call_at_a_time(ray_session, tiny_model):
    with at_work(Roster(replace(SETTINGS, repeatable=True), engines(1))) as roster:
        roster.host(0, str(tiny_model), str(tiny_model / "committed.json"))
        (opponent,) = roster.opponents(0)
        calls = [questions(20)[:10], questions(20)[10:]]
        first, second = ray.get([opponent.generate.remote(call, DRAWN) for call in calls])
        assert stats(opponent).most_in_flight == 10
        assert [*first, *second] == ask([opponent], 0, questions(20), DRAWN)


def test_settings_come_from_the_config():
    config = resolve_config(
        {
            "run": {"name": "r"},
            "model": {"path": "m", "trust_remote_code": True},
            "data": {"path": "d", "prompt_length": 10, "max_length": 30},
            "learner": {"precision": "fp32"},
            "opponents": {"gpus": 1, "batch": 7, "threads": 3, "engine_args": {"block_size": 32}},
        }
    )
    settings = EngineSettings.from_config(config, (5, 6))
    assert (settings.precision, settings.max_length, settings.end_tokens) == ("fp32", 30, (5, 6))
    assert settings.trust_remote_code
    assert (settings.gpus, settings.batch, settings.threads, settings.engine_args) == (1, 7, 3, {"block_size": 32})


def assert_gone(opponent, free_cpus):
    """The actor is dead for good and, within seconds, Ray has its CPUs back."""
    with pytest.raises(RayActorError):
        ray.get(opponent.ready.remote())
    deadline = time.monotonic() + 30
    while free() != pytest.approx(free_cpus):
        assert time.monotonic() < deadline, free()
        time.sleep(0.1)


def free():
    return ray.available_resources()["CPU"]


def test_an_opponents_process_has_the_environment_of_one_that_runs_a_model(pair):
    for opponent in pair:
        found = ray.get(opponent.__ray_call__.remote(lambda _: dict(os.environ)))
        assert found.items() >= model_process(0)["env_vars"].items()
