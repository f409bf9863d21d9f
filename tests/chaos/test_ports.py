"""A port that somebody else has: one line says so, and nothing is left running or lying about."""

import socket
from pathlib import Path

import pytest

from tests.chaos.processes import engine_of, has_ended, wait_for
from tests.chaos.sites import Site, running_site

WHEN_TOLD = "tests.chaos.engines:build_when_told"


@pytest.mark.chaos  # its short form is in tests/server/cli/test_serve.py
@pytest.mark.parametrize("transport", ["HTTP", "gRPC"])
def test_a_port_that_is_taken_before(fake: Site, tmp_path: Path, transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        option = (f"--{transport.lower()}-port", str(port))
        with running_site(fake, tmp_path / "store", *option, wait=False) as server:
            assert has_ended(server) == 1
    wait_for(lambda: server.lines)
    assert server.lines == [f"perseid: {transport} cannot listen on 127.0.0.1:{port}: Address already in use\n"]
    assert not (tmp_path / "store").exists(), "found before anything is touched"


def test_a_port_that_is_taken_while_it_starts(fake: Site, tmp_path: Path) -> None:
    """gRPC takes its port when all is loaded, and may find that another was quicker."""
    gate = tmp_path / "gate"
    told = {"PERSEID_TEST_ENGINE": WHEN_TOLD, "PERSEID_TEST_GATE": str(gate)}
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
    with running_site(fake, tmp_path / "store", "--grpc-port", str(port), wait=False, **told) as server:
        wait_for((tmp_path / "gate.waiting").exists, "a start")
        engine = engine_of(server)
        with socket.create_server(("127.0.0.1", port)):
            gate.touch()
            assert has_ended(server, engine) == 1
    assert f"perseid: gRPC cannot listen on 127.0.0.1:{port}: is the port taken?\n" in server.lines
    assert not [line for line in server.lines if "Traceback" in line]
    assert list((tmp_path / "store" / "tmp").iterdir()) == []
