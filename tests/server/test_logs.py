"""Log lines: a traceback tells where, and nothing of what clients sent."""

import logging
from typing import Literal

import pytest

from perseid_server.logs import configure_logging


@pytest.mark.parametrize("style", ["human", "json"])
def test_a_traceback_shows_no_local_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, style: Literal["human", "json"]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)
    monkeypatch.setattr(root, "level", root.level)
    configure_logging("info", style)
    prompt = "a client's " + "secret"  # noqa: F841  a local variable of a frame in the traceback
    try:
        raise RuntimeError("it broke")  # noqa: TRY301
    except RuntimeError:
        logging.getLogger("perseid_server.test").exception("a call failed")
    told = capsys.readouterr().err
    assert "a call failed" in told
    assert "RuntimeError: it broke" in told
    assert "a client's secret" not in told
