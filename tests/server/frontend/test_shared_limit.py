"""A limit is never passed, and a tenant that wants much leaves something for the next."""

from perseid_server.access.caller import ANYONE, Caller
from perseid_server.frontend.shared_limit import SharedLimit

FLOOD, OTHER = Caller("flood"), Caller("other")


def fill(limit: SharedLimit, caller: Caller, amount: int = 1) -> int:
    """Take until it is refused; what was taken."""
    taken = 0
    while limit.fits(amount) and limit.is_fair(caller, amount):
        limit.take(caller, amount)
        taken += amount
    return taken


def test_without_tenants_all_of_it_is_had() -> None:
    assert fill(SharedLimit(10), ANYONE) == 10


def test_a_flood_leaves_a_fifth_and_the_others_get_of_it() -> None:
    limit = SharedLimit(1000)
    assert fill(limit, FLOOD) == 800
    assert fill(limit, OTHER) == 160
    assert fill(limit, Caller("third")) > 0
    assert limit.total <= 1000


def test_tenants_that_come_together_get_the_same() -> None:
    limit = SharedLimit(1000)
    callers = [Caller(str(i)) for i in range(4)]
    for _ in range(1000):
        for caller in callers:
            if limit.fits(1) and limit.is_fair(caller, 1):
                limit.take(caller, 1)
    assert [limit._by_tenant[caller.tenant] for caller in callers] == [236, 235, 235, 235]


def test_a_tenant_that_holds_nothing_gets_the_last_place() -> None:
    limit = SharedLimit(2)
    assert fill(limit, FLOOD) == 1
    assert fill(limit, OTHER) == 1
    assert not limit.fits(1)


def test_weights_change_the_share() -> None:
    assert fill(SharedLimit(1000), Caller("heavy", weight=2.0)) > 800
    assert fill(SharedLimit(1000), Caller("light", weight=0.25)) == 500


def test_what_is_larger_than_the_limit_gets_through_alone() -> None:
    limit = SharedLimit(10)
    assert limit.fits(50)
    limit.take(FLOOD, 1)
    assert not limit.fits(50)


def test_what_is_given_back_is_there_again() -> None:
    limit = SharedLimit(10)
    limit.take(FLOOD, 7)
    limit.give_back(FLOOD, 7)
    assert (limit.total, limit._by_tenant) == (0, {})
