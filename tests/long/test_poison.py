"""A prompt that kills every engine it is given to, with a real engine that is killed."""

from concurrent.futures import ThreadPoolExecutor

from tests.ray.test_opponents import DRAWN, SETTINGS, questions
from tests.tiny import engines
from tpaw_ray.faults import Place
from tpaw_ray.opponents.ledger import SUSPECT
from tpaw_ray.opponents.messages import Response
from tpaw_ray.opponents.roster import Roster, ask


def test_a_prompt_that_kills_the_engine_is_set_aside_and_the_others_have_the_responses_they_would_have_had(
    ray_session, holding, tiny_model
):
    requests = questions(8)
    roster = Roster(SETTINGS, engines(1))
    roster.host(0, str(tiny_model), str(tiny_model / "committed.json"))
    roster.expect(0, 1)
    undisturbed = ask(roster.opponents(0), 0, requests, DRAWN)
    roster.retire(0)
    roster.host(1, str(tiny_model), str(tiny_model / "committed.json"))
    roster.expect(1, 1)
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(ask, roster.opponents(1), 0, requests, DRAWN)
        for _ in range(SUSPECT + 4):  # with all eight twice, then with 8, 4, 2 and 1 of the suspects at most
            holding.kill_at(Place.ANSWER, "checkpoints/001/p3")
            if answers.done():
                break
        found = answers.result(timeout=300)
    roster.retire_all()
    assert found[3] == Response(prompt_id="p3", generated_tokens=[], finish_reason="set_aside")
    assert found[:3] + found[4:] == undisturbed[:3] + undisturbed[4:]
