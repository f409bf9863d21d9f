"""A real Prometheus scrapes a running server, also while its engine is down."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.server.stack import LiveStack
from tests.tools import require_tool

BODY = {"model": "tiny", "prompt": "say", "max_tokens": 4}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@asynccontextmanager
async def prometheus(target: LiveStack, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A Prometheus that scrapes this server five times a second."""
    command, port = require_tool("prometheus", "Debian package prometheus"), free_port()
    where = f"127.0.0.1:{target.addresses.http_port}"
    job = {"job_name": "perseid", "static_configs": [{"targets": [where]}]}
    config = folder / "prometheus.yml"
    interval = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    config.write_text(json.dumps({"global": interval, "scrape_configs": [job]}))
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            command,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                yield client
        finally:
            process.terminate()
            await process.wait()


async def becomes(client: httpx.AsyncClient, query: str, wanted: float) -> None:
    """Return when a query's one sample has this value; TimeoutError tells what it had last."""
    told: object = None
    try:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(httpx.TransportError):  # it starts still
                    answer = await client.get("/api/v1/query", params={"query": query})
                    told = answer.json()["data"]["result"] if answer.status_code == 200 else answer.text
                    if answer.status_code == 200 and [float(one["value"][1]) for one in told] == [wanted]:
                        return
                await asyncio.sleep(0.1)
    except TimeoutError as error:
        raise TimeoutError(f"{query} is {told}, not {wanted}") from error


async def test_prometheus_scrapes_values_that_are_true_and_goes_on_without_an_engine(
    live: LiveStack, tmp_path: Path
) -> None:
    await live.stack.load("mine")
    async with prometheus(live, tmp_path) as asked, live.http() as client:
        await becomes(asked, 'up{job="perseid"}', 1)
        for model in ("tiny", "mine", "mine"):
            assert (await client.post("/v1/completions", json=BODY | {"model": model})).status_code == 200
        await becomes(asked, 'perseid_adapter_requests_total{adapter="mine"}', 2)
        await becomes(asked, "sum(perseid_request_success_total)", 3)
        await becomes(asked, "perseid_generation_tokens_total", 12)
        await becomes(asked, "perseid_ready", 1)

        live.stack.engine.die()
        assert (await client.post("/v1/completions", json=BODY)).status_code == 503
        await becomes(asked, "perseid_ready", 0)
        await becomes(asked, 'perseid_request_failure_total{kind="unavailable"}', 1)
        await becomes(asked, 'min_over_time(up{job="perseid"}[1m])', 1)  # no scrape has failed
