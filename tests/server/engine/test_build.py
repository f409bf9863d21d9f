"""What is told while a base is loaded."""

import logging

import pytest

from perseid_server.engine import build


def test_a_slow_load_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = iter([0.0, 1.0, 5.5, 5.5, 6.0])
    monkeypatch.setattr(build.time, "monotonic", lambda: next(now))
    tell = build._slow_progress()
    with caplog.at_level(logging.INFO, logger=build.__name__):
        for layer in range(1, 4):
            tell(layer, 32)
    assert caplog.messages == ["loading the base: 2 of 32 layers"]
