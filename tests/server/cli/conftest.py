"""The command, wide enough that each option is one line of its help, and none of the caller's settings."""

import os

import pytest

from tests.server.cli.running import Perseid


@pytest.fixture
def perseid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Perseid:
    monkeypatch.setenv("COLUMNS", "1000")
    for name in list(os.environ):
        if name.startswith("PERSEID_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("perseid_server.cli.serve.configure_logging", lambda *_: None)  # the tests' logging stays
    return Perseid(monkeypatch, capsys)
