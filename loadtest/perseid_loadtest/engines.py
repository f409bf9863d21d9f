"""Everything that can be put side by side: Perseid over either transport, and any OpenAI-compatible server."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perseid_loadtest import grpc_client, sse
from perseid_loadtest.drive import decode_rate, prefill_rate
from perseid_loadtest.workload import Case, Job, Workload
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs


class Engine(Protocol):
    """What a round needs of an engine."""

    @property
    def name(self) -> str: ...

    def can(self, case: Case) -> bool: ...

    def rate(self, case: Case, turn: int) -> float: ...


# --- Perseid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A running server and how long it took to be ready."""

    pid: int
    http_url: str
    grpc_address: str
    ready_s: float


@contextmanager
def perseid(adapters: Sequence[str], arguments: Sequence[str]) -> Iterator[Server]:
    """Serve the embedded base with NAME=FOLDER adapters for the length of a `with` block."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "perseid_server", "serve", "--http-port", "0", "--grpc-port", "0"]
        named = [part for adapter in adapters for part in ("--adapter", adapter)]
        started = time.perf_counter()
        environment = {"PERSEID_LOG_LEVEL": "warning", **os.environ}  # a line for each call is of no use here
        process = subprocess.Popen(
            [*command, "--store", store, *named, *arguments], stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            http_url, grpc_address = _addresses(process)
            yield Server(process.pid, http_url, grpc_address, time.perf_counter() - started)
        finally:
            process.terminate()
            process.wait(timeout=60)


def end_with_servers() -> None:
    """SIGTERM leaves `with` blocks in order, so that the servers they started end too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _addresses(process: "subprocess.Popen[str]") -> tuple[str, str]:
    assert process.stdout is not None
    http_url = ""
    for line in process.stdout:
        if match := re.match(r"\s*HTTP\s+(\S+)", line):
            http_url = match[1]
        if match := re.match(r"\s*gRPC\s+(\S+)", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # keep the pipe from filling
            return http_url, match[1]
    raise RuntimeError("the server ended before it was ready")


def peak_memory_mib(pid: int) -> float:
    """Largest resident memory so far, summed over the server's processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(_peak_kib(process) for process in [str(pid), *children]) / 1024


def _peak_kib(pid: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) if match else 0


@dataclass(frozen=True)
class GrpcEngine:
    """Perseid over gRPC."""

    name: str
    stub: stubs.GenerationStub
    workload: Workload
    cases: frozenset[Case]

    def can(self, case: Case) -> bool:
        """Whether it is to measure this case."""
        return case in self.cases

    def rate(self, case: Case, turn: int) -> float:
        """Tokens a second that a client sees."""
        return decode_rate(grpc_client.generate(self.stub, self.workload.jobs(case, turn)))


# --- OpenAI-compatible servers --------------------------------------------------------------------------------------


class Dialect(Protocol):
    """How a server is told which adapter a request wants."""

    def fields(self, adapter: str) -> Mapping[str, Any]: ...

    def serves(self, adapter: str) -> bool: ...


@dataclass(frozen=True)
class ByModel:
    """vLLM, SGLang, Perseid: an adapter is a model's name."""

    base: str
    names: frozenset[str]

    def fields(self, adapter: str) -> Mapping[str, Any]:
        """What a body says for this adapter."""
        return {"model": adapter or self.base}

    def serves(self, adapter: str) -> bool:
        """Whether the server knows it."""
        return not adapter or adapter in self.names


@dataclass(frozen=True)
class ByLoraField:
    """llama-server: adapters have numbers, and a body gives each a scale.

    Every number is named, with scale 0 where it is not wanted: an empty list means all adapters as they were loaded,
    which is all of them at once.
    """

    base: str
    numbers: Mapping[str, int]  # by adapter
    loaded: tuple[int, ...]  # all that the server has

    def fields(self, adapter: str) -> Mapping[str, Any]:
        """What a body says for this adapter. `timings_per_token` makes every chunk tell the tokens so far."""
        wanted = self.numbers[adapter] if adapter else None
        lora = [{"id": number, "scale": float(number == wanted)} for number in self.loaded]
        return {"model": self.base, "timings_per_token": True, **({"lora": lora} if lora else {})}

    def serves(self, adapter: str) -> bool:
        """Whether the server knows it."""
        return not adapter or adapter in self.numbers


@dataclass(frozen=True)
class OpenAIEngine:
    """A server that answers POST /v1/completions with server-sent events and takes prompts of token ids."""

    name: str
    url: str
    dialect: Dialect
    workload: Workload

    def can(self, case: Case) -> bool:
        """Whether the server has the adapters that the case names."""
        return all(self.dialect.serves(self.workload.adapter(case.kind, row)) for row in range(case.batch))

    def rate(self, case: Case, turn: int) -> float:
        """Tokens a second that a client sees. ServerError when the server refuses."""
        jobs = self.workload.jobs(case, turn)
        streams = sse.complete(self.url, [self.body(job) for job in jobs])
        return prefill_rate(streams[0], len(jobs[0].prompt)) if case.phase == "prefill" else decode_rate(streams)

    def body(self, job: Job) -> dict[str, Any]:
        """The request, greedy, without an end before its length."""
        return {
            "prompt": list(job.prompt),
            "max_tokens": job.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **self.dialect.fields(job.adapter),
        }


def discover(url: str, adapters: Sequence[str], base: str | None = None) -> Dialect:
    """Ask a server how it names adapters. `base` is the base's name, if not the first that /v1/models lists.

    RuntimeError when nothing answers there.
    """
    cards = get_json(url, "/v1/models")["data"]
    models = [str(card["id"]) for card in cards]
    try:
        listed = lora_list(get_json(url, "/lora-adapters"))
    except (urllib.error.HTTPError, ValueError):
        listed = None
    if not listed and not is_llama_server(cards):
        return ByModel(base or models[0], frozenset(models))
    listed = listed or []
    loaded = tuple(int(entry["id"]) for entry in listed)
    return ByLoraField(base or models[0], lora_numbers(listed, adapters), loaded)


def is_llama_server(cards: Sequence[Mapping[str, Any]]) -> bool:
    """By what it says of its models on /v1/models."""
    return any(card.get("owned_by") == "llamacpp" for card in cards)


def lora_list(told: Any) -> list[Mapping[str, Any]] | None:
    """What llama-server answers on /lora-adapters: objects with a number and a file. None for any other answer."""
    if not isinstance(told, list):
        return None
    fits = all(
        isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("path"), str)
        for entry in told
    )
    return told if fits else None


def lora_numbers(listed: Sequence[Mapping[str, Any]], adapters: Sequence[str]) -> dict[str, int]:
    """Which of llama-server's files is which adapter: the shortest name that holds the adapter's."""
    stems = sorted(((Path(str(entry["path"])).stem, int(entry["id"])) for entry in listed), key=lambda one: len(one[0]))
    found = {adapter: [number for stem, number in stems if adapter in stem] for adapter in adapters}
    return {adapter: numbers[0] for adapter, numbers in found.items() if numbers}


def get_json(url: str, path: str) -> Any:
    """What a server answers there. RuntimeError when none does."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + path, timeout=10) as answer:  # noqa: S310  the operator's own URL
            return json.load(answer)
    except urllib.error.HTTPError:
        raise
    except urllib.error.URLError as error:
        raise RuntimeError(f"{url}: no server answers there ({error.reason})") from error
