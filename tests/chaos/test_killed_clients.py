"""Clients that are killed amid their answers: what they held is free, and nobody computes for them any more."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.chaos.processes import descriptors_of, wait_for
from tests.chaos.sites import Site, import_path, running_site
from tests.e2e.running import RunningServer

NUM_TOKENS = 1300


def test_clients_killed_amid_their_answers(site: Site, tmp_path: Path) -> None:
    with running_site(site, tmp_path / "store") as server:
        before = descriptors_of(server)
        clients = [
            _client("http", server.http, site.models[0]),
            _client("grpc", server.grpc, site.adapters[0]),
        ]
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()  # its answer has begun
        assert server.metric("perseid_num_requests_running") == len(clients)
        assert server.metric("perseid_kv_cache_usage_perc") > 0
        for client in clients:
            client.kill()
            client.wait()

        scrapes: list[dict[str, float]] = []

        def nothing_runs() -> bool:
            scrapes.append(_held(server))
            return scrapes[-1]["num_requests_running"] == 0

        wait_for(nothing_runs, "the end of what nobody reads")
        assert not any(scrapes[-1].values()), "blocks are free in the step that ends them"
        wait_for(lambda: descriptors_of(server) <= before, "the connections' end")
        assert _num_rows(server) < len(clients) * NUM_TOKENS, "they were computed to the end"
        assert server.metric("perseid_engine_restarts_total") == 0


def _client(transport: str, address: str, model: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.chaos.client_process", transport, address, model, str(NUM_TOKENS)]
    path = os.environ | {"PYTHONPATH": os.pathsep.join(import_path())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path)


def _held(server: RunningServer) -> dict[str, float]:
    """What one scrape tells of running requests and of what they hold."""
    told = server.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.search(rf"^perseid_{name} (.*)$", told, re.MULTILINE)[1]) for name in names}


def _num_rows(server: RunningServer) -> float:
    """Tokens that the engine has computed, whoever got them."""
    return server.metric("perseid_iteration_tokens_sum")
