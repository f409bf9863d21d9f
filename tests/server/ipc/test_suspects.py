"""Who is refused after crashes, for how long, and who is cleared."""

import pytest

from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.messages import Submit
from perseid_server.errors import Unavailable
from perseid_server.ipc.suspects import FIRST_REFUSAL_S, FORGOTTEN_AFTER_S, MOST_CRASHES, Suspects
from perseid_server.model.sampling_params import SamplingParams


def request(prompt: int, adapter: str | None = None, name: str = "r") -> Submit:
    return Submit(name, (prompt,), SamplingParams(max_tokens=1), Adaptation.of(adapter))


def crashed(*requests: Submit, times: int = MOST_CRASHES) -> Suspects:
    suspects = Suspects()
    for _ in range(times):
        suspects.crashed(requests, 0.0)
    return suspects


def is_refused(suspects: Suspects, one: Submit, now: float = 1.0) -> bool:
    try:
        suspects.check(one, now)
    except Unavailable:
        return True
    return False


def test_the_same_content_under_another_id_is_refused_for_a_while() -> None:
    suspects = crashed(request(1))
    with pytest.raises(Unavailable, match="this request was running each of the 3 times") as caught:
        suspects.check(request(1, name="another"), 1.0)
    assert caught.value.retry_after_s == FIRST_REFUSAL_S - 1.0
    assert not is_refused(suspects, request(2))
    assert not is_refused(suspects, request(1), now=FIRST_REFUSAL_S)


def test_less_than_three_crashes_prove_nothing() -> None:
    assert not is_refused(crashed(request(1), times=MOST_CRASHES - 1), request(1))


def test_an_adapter_is_refused_with_whatever_prompt() -> None:
    suspects = Suspects()
    for prompt in range(MOST_CRASHES):
        suspects.crashed([request(prompt, "bad")], 0.0)
    assert is_refused(suspects, request(99, "bad"))
    assert not is_refused(suspects, request(99, "good"))
    assert not is_refused(suspects, request(0))


def test_whoever_is_answered_was_only_beside_it() -> None:
    suspects = crashed(request(1, "bad"), request(2, "good"), times=MOST_CRASHES - 1)
    suspects.answered(request(2, "good"))
    suspects.crashed([request(1, "bad"), request(2, "good")], 0.0)
    assert is_refused(suspects, request(1, "bad"))
    assert not is_refused(suspects, request(2, "good"))


def test_a_client_that_leaves_clears_the_adapter_and_not_the_request() -> None:
    suspects = crashed(request(1, "beside"))
    suspects.left(request(1, "beside"))
    assert is_refused(suspects, request(1, "beside"))
    assert not is_refused(suspects, request(2, "beside"))


def test_crashes_that_are_long_ago_count_no_more() -> None:
    suspects, now = Suspects(), 100.0
    for _ in range(5 * MOST_CRASHES):
        now += FORGOTTEN_AFTER_S + 1.0
        suspects.crashed([request(1)], now)
    assert not is_refused(suspects, request(1), now)
    for _ in range(MOST_CRASHES - 1):
        now += FORGOTTEN_AFTER_S - 1.0
        suspects.crashed([request(1)], now)
    assert is_refused(suspects, request(1), now)


def test_each_further_crash_doubles_the_time_up_to_a_bound() -> None:
    suspects = crashed(request(1), times=MOST_CRASHES + 1)
    assert is_refused(suspects, request(1), now=2 * FIRST_REFUSAL_S - 1)
    assert not is_refused(crashed(request(1), times=3000), request(1), now=64 * FIRST_REFUSAL_S)


def test_what_is_remembered_is_bounded() -> None:
    suspects = Suspects()
    for prompt in range(10_000):
        suspects.crashed([request(prompt)], 0.0)
    assert len(suspects._records) <= 4096
