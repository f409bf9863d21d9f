"""The `perseid` command inside this process."""

from dataclasses import dataclass

import pytest

from perseid_server import cli


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


class Perseid:
    """Runs the command as the shell would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Done:
        """Exit status and output. An exception that reaches the user as a traceback reaches the test as itself."""
        cli.app.config = ()  # as a new process begins
        self._monkeypatch.setattr("sys.argv", ["perseid", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self._capsys.readouterr()
        return Done(ended.value.code, out, err)
