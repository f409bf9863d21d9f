"""The `perseid` command, without the caller's settings."""

import os

import pytest

from tests.server.cli.running import Perseid


@pytest.fixture
def perseid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Perseid:
    monkeypatch.setenv("COLUMNS", "1000")
    for name in list(os.environ):
        if name.startswith("PERSEID_"):
            monkeypatch.delenv(name)
    return Perseid(monkeypatch, capsys)
