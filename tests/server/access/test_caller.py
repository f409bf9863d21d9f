"""What a caller may see and do."""

from contextvars import copy_context

import pytest

from perseid_server.access.caller import ANYONE, Caller, call_as, calling, current_caller
from perseid_server.errors import Forbidden


def test_without_keys_all_may_be_done() -> None:
    assert ANYONE.sees("anything")
    ANYONE.require("admin")


def test_only_names_that_match_exist() -> None:
    caller = Caller("acme", "acme-1", frozenset({"generate"}), ("acme-*", "shared"))
    assert [caller.sees(name) for name in ("acme-support", "shared", "other", "Acme-x")] == [True, True, False, False]


def test_a_role_that_is_missing_is_named() -> None:
    with pytest.raises(Forbidden, match="'admin'"):
        Caller("acme", "acme-1", frozenset({"generate"})).require("admin")


def test_a_call_has_its_caller_to_its_end() -> None:
    caller = Caller("acme")
    with calling(caller):
        assert current_caller() is caller
    with pytest.raises(ZeroDivisionError), calling(caller):
        1 / 0  # noqa: B018
    assert current_caller() is ANYONE


def test_the_rest_of_a_task_runs_for_its_caller_and_no_other_task_does() -> None:
    def call() -> Caller:
        call_as(Caller("acme"))
        return current_caller()

    assert copy_context().run(call) == Caller("acme")
    assert current_caller() is ANYONE
