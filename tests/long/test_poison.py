"""A prompt that kills every engine it is given to, with a real engine that is killed."""

import os
import signal
import time
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
    place = (Place.ANSWER, "checkpoints/001/p3")
    deaths = 0
    holding.arm(*place)
    try:
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(ask, roster.opponents(1), 0, requests, DRAWN)
            while not answers.done():
                if caught := holding.caught():
                    os.kill(caught["0"], signal.SIGKILL)
                    holding.let_go()
                    holding.arm(*place)
                    deaths += 1
                time.sleep(0.05)
    finally:
        roster.retire_all()
        holding.disarm()
    found = answers.result()
    assert found[3] == Response(prompt_id="p3", generated_tokens=[], finish_reason="set_aside")
    assert found[:3] + found[4:] == undisturbed[:3] + undisturbed[4:]
    # With all eight until they are suspects, then with half of them, and alone after p0 and p1, and p2, were found to be good.
    assert deaths == SUSPECT + 2
