"""Who comes in: by key, role and rate, as things are at that moment."""

import logging
from datetime import UTC, datetime

import pytest

from perseid_server.access.caller import ANYONE
from perseid_server.access.gate import Gate, secret_of
from perseid_server.access.keys import MAX_SECRET, Allowance, Key, KeyRing, digest_of
from perseid_server.errors import Forbidden, PerseidError, RateLimited, Unauthenticated
from tests.server.access.rings import Keys, gate_of, key

USER, ROOT, PART = key("user"), key("root", "admin"), key("part", "admin", adapters=("p-*",))


@pytest.mark.parametrize("need", ["open", "any", "generate", "admin", "operator"])
def test_without_keys_everybody_comes_in(need) -> None:
    assert Gate().enter(None, need) is ANYONE
    assert Gate().headers(ANYONE) == {}


@pytest.mark.parametrize(
    ("need", "let_in"),
    [
        ("open", {None, "", "nobody", "user", "root", "part"}),
        ("any", {"user", "root", "part"}),
        ("generate", {"user"}),
        ("admin", {"root", "part"}),
        ("operator", {"root"}),
    ],
)
def test_each_need_lets_in_whom_it_may(need, let_in: set) -> None:
    gate = gate_of(USER, ROOT, PART)
    for secret in (None, "", "nobody", "user", "root", "part"):
        if secret in let_in:
            caller = gate.enter(secret, need)
            assert caller.key == ("" if need == "open" else secret)
        else:
            with pytest.raises(Forbidden if secret in {"user", "root", "part"} else Unauthenticated):
                gate.enter(secret, need)


def refusal(gate: Gate, secret: str | None) -> str:
    with pytest.raises(PerseidError) as caught:
        gate.enter(secret, "any")
    return caught.value.message


def test_a_key_is_good_until_the_moment_it_expires() -> None:
    now = [datetime(2027, 2, 1, tzinfo=UTC).timestamp() - 0.001]
    gate = gate_of(key("a", expires=datetime(2027, 2, 1, tzinfo=UTC)), wall=lambda: now[0])
    assert gate.enter("a", "any").key == "a"
    now[0] += 0.001
    assert refusal(gate, "a") == "the API key 'a' has expired"


def test_a_key_that_is_revoked_or_turned_off_is_good_no_longer() -> None:
    keys = Keys(KeyRing({"user": USER}))
    gate = Gate(keys)
    assert gate.enter("user", "any").key == "user"
    keys.ring = KeyRing({"user": key("user", enabled=False)})
    assert refusal(gate, "user") == "the API key 'user' has been disabled"
    keys.ring = KeyRing({})
    assert refusal(gate, "user") == "the API key is not known here"


@pytest.mark.parametrize("secret", ["psd_topsecret", "psd_tops\u00e9cret", "psd_topsecret" * 100_000, "\udcff", "a b"])
def test_no_refusal_repeats_what_was_shown(secret: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert secret not in refusal(gate_of(USER), secret)
    assert not caplog.records


def test_what_is_refused_counts_for_no_rate() -> None:
    gate = gate_of(key("few", allowance=Allowance(requests_per_minute=1)))
    for _ in range(3):
        with pytest.raises(Forbidden):
            gate.enter("few", "admin")
    gate.enter("few", "generate")
    with pytest.raises(RateLimited):
        gate.enter("few", "generate")


def test_a_key_is_found_without_a_look_at_the_others() -> None:
    class Keys(dict):
        def values(self):
            nonlocal looks
            looks += 1
            return super().values()

    looks, known = 0, (USER, ROOT, PART)
    ring = KeyRing(Keys({each.name: each for each in known}))
    assert looks == 1
    assert [ring.find(secret) for secret in ("user", "root", "part", "nobody")] == [*known, None]
    assert looks == 1


def test_a_key_as_long_as_may_be_is_found_and_a_longer_one_is_not_hashed() -> None:
    longest = "x" * MAX_SECRET
    ring = KeyRing(
        {"a": Key("a", digest_of(longest), USER.caller), "b": Key("b", digest_of(longest + "x"), USER.caller)}
    )
    assert ring.find(longest) == ring.keys["a"]
    assert ring.find(longest + "x") is None


def test_neither_key_nor_hash_is_shown_by_what_holds_them() -> None:
    assert USER.digest.hex()[:8] not in repr(USER)
    assert str(USER.digest) not in repr(USER)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "secret"),
    [
        ([], [], None),
        (["Bearer k"], [], "k"),
        (["bearer  k "], [], "k"),
        ([" BEARER k"], [], "k"),
        (["Bearer k"], ["other"], "k"),
        (["Basic k"], [], None),
        (["Basic k"], ["other"], "other"),
        (["Bearer "], ["other"], "other"),
        (["Bearer"], [], None),
        (["k"], [], None),
        (["Bearerk"], [], None),
        ([""], [" other "], "other"),
        (["Bearer a b"], [], "a b"),
        (["Bearer k", "Bearer k"], [], None),
        (["Bearer k", "Basic x"], [], None),
        (["Bearer k"], ["one", "two"], None),
        ([], ["one", "two"], None),
        ([], [""], ""),
    ],
)
def test_where_the_key_stands(authorization: list[str], x_api_key: list[str], secret: str | None) -> None:
    assert secret_of(authorization, x_api_key) == secret


def test_metrics_are_the_operators_unless_they_are_opened() -> None:
    assert Gate().metrics_need == gate_of(USER).metrics_need == "operator"
    assert gate_of(USER, open_metrics=True).metrics_need == "open"


def test_answers_tell_a_key_what_is_left_to_it() -> None:
    gate = gate_of(USER, key("few", allowance=Allowance(requests_per_minute=2)))
    assert gate.headers(gate.enter("few", "any"))["x-ratelimit-remaining-requests"] == "1"
    assert gate.headers(gate.enter("user", "any")) == {}
