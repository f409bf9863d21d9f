"""How fast this machine decodes: base, one adapter and mixed adapters at 1, 4 and 16 requests, PEFT beside it.

    make bench                       # everything, a few minutes
    make bench ARGS="--skip-peft"    # Perseid alone

Starts a server of its own on free ports, drives it over gRPC with token-id prompts, and reads each request's tokens
as they come. The decode rate counts the tokens that arrive while all requests of the batch are decoding.
Prints a table with ratios and writes JSON beside it when asked.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from rich.console import Console
from rich.table import Table

from perseid_protos.perseid.v1 import generation_pb2 as messages
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs

KINDS = ("base", "one", "mixed")
TOKEN_RANGE = (1000, 20000)
"""Prompts are random tokens of this range: ordinary words of the embedded base's vocabulary."""


@dataclass(frozen=True)
class Measurement:
    """Decode rate of one batch, over the rounds."""

    engine: str
    kind: str
    batch: int
    tokens_per_s: float  # median
    spread: float  # (largest − smallest) / median

    @staticmethod
    def of(engine: str, kind: str, batch: int, rates: Sequence[float]) -> "Measurement":
        """Median and spread of several rounds."""
        median = statistics.median(rates)
        return Measurement(engine, kind, batch, median, (max(rates) - min(rates)) / median)


@dataclass(frozen=True)
class Server:
    """A running server and how long it took to be ready."""

    pid: int
    grpc_address: str
    ready_s: float


@contextmanager
def perseid(adapters: Sequence[str], arguments: Sequence[str]) -> Iterator[Server]:
    """Serve the embedded base with NAME=FOLDER adapters for the length of a `with` block."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "perseid_server", "serve", "--http-port", "0", "--grpc-port", "0"]
        named = [part for adapter in adapters for part in ("--adapter", adapter)]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--store", store, *named, *arguments], stdout=subprocess.PIPE, text=True)
        try:
            address = _grpc_address(process)
            yield Server(process.pid, address, time.perf_counter() - started)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _grpc_address(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.match(r"\s*gRPC\s+(\S+)", line):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # keep the pipe from filling
            return match[1]
    raise RuntimeError("the server ended before it was ready")


def adapter_of(kind: str, names: Sequence[str], row: int) -> str:
    """Which adapter a row of the batch names; "" is the base."""
    if kind == "base" or not names:
        return ""
    return names[0] if kind == "one" else names[row % len(names)]


def request(adapter: str, prompt: int, tokens: int, seed: int) -> messages.GenerateRequest:
    """A greedy request for exactly `tokens` tokens after a random prompt."""
    ids = [random.Random(seed).randrange(*TOKEN_RANGE) for _ in range(prompt)]  # noqa: S311
    return messages.GenerateRequest(
        token_ids=messages.TokenIds(ids=ids),
        adapter=adapter,
        sampling=messages.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )


def arrivals(stub: stubs.GenerationStub, message: messages.GenerateRequest) -> list[float]:
    """When each token of a stream arrived, seconds on the process clock."""
    times: list[float] = []
    for chunk in stub.GenerateStream(message):
        times.extend([time.perf_counter()] * len(chunk.token_ids))
    return times


def decode_rate(stub: stubs.GenerationStub, requests: Sequence[messages.GenerateRequest]) -> float:
    """Tokens a second while every request of the batch is decoding."""
    with ThreadPoolExecutor(len(requests)) as pool:
        streams = list(pool.map(lambda message: arrivals(stub, message), requests))
    first = max(times[0] for times in streams)
    last = min(times[-1] for times in streams)
    return sum(first < moment <= last for times in streams for moment in times) / (last - first)


def prefill_rate(stub: stubs.GenerationStub, adapter: str, prompt: int, seed: int) -> float:
    """Prompt tokens a second of one request, first token included."""
    started = time.perf_counter()
    stub.Generate(request(adapter, prompt, 1, seed))
    return prompt / (time.perf_counter() - started)


def peak_memory_mib(pid: int) -> float:
    """Largest resident memory so far, summed over the server's processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(_peak_kib(process) for process in [str(pid), *children]) / 1024


def _peak_kib(pid: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(match[1]) if match else 0


def measure_perseid(options: argparse.Namespace, names: Sequence[str]) -> tuple[list[Measurement], dict[str, float]]:
    """Every kind and batch size against one server, rounds interleaved."""
    rates: dict[tuple[str, int], list[float]] = {}
    prefill: dict[str, list[float]] = {}
    with perseid(options.adapter, options.server_args) as server, grpc.insecure_channel(server.grpc_address) as channel:
        stub = stubs.GenerationStub(channel)
        for turn in range(options.rounds + 1):  # the first round warms caches and adapters
            for kind in KINDS if names else KINDS[:1]:
                for batch in options.batches:
                    seed = 1000 * turn + batch
                    jobs = [
                        request(adapter_of(kind, names, row), options.prompt, options.tokens, seed + 31 * row)
                        for row in range(batch)
                    ]
                    rate = decode_rate(stub, jobs)
                    if turn:
                        rates.setdefault((kind, batch), []).append(rate)
                if kind != "mixed":
                    rate = prefill_rate(stub, adapter_of(kind, names, 0), 512, seed=turn)
                    if turn:
                        prefill.setdefault(f"prefill_512_{kind}_tokens_per_s", []).append(rate)
        extra = {name: statistics.median(values) for name, values in prefill.items()}
        extra |= {"time_to_ready_s": server.ready_s, "peak_memory_mib": peak_memory_mib(server.pid)}
    return [Measurement.of("perseid", *key, values) for key, values in rates.items()], extra


def measure_peft(options: argparse.Namespace) -> list[Measurement]:
    """The same kinds and batch sizes through transformers + PEFT, in a process of their own."""
    adapters = [part for adapter in options.adapter for part in ("--adapter", adapter)]
    command = [sys.executable, "-m", "perseid_loadtest.peft_peer", str(options.gguf), *adapters]
    command += ["--prompt", str(options.prompt), "--batches", *map(str, options.batches)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [Measurement.of("peft", row["kind"], row["batch"], [row["tokens_per_s"]]) for row in rows]


def machine() -> str:
    """The processor and how many cores of it are ours."""
    names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) or [platform.machine()]
    return f"{names[0]}, {len(os.sched_getaffinity(0))} cores"


def show(measurements: Sequence[Measurement], extra: dict[str, float], console: Console) -> None:
    """The table: a row per kind and batch, the ratio to PEFT where it was measured."""
    rates = {(m.engine, m.kind, m.batch): m for m in measurements}
    table = Table(title=f"decode tokens/s · {machine()}")
    for column in ("adapters", "requests", "Perseid", "spread", "PEFT", "ratio"):
        table.add_column(column, justify="right")
    for (engine, kind, batch), ours in rates.items():
        if engine != "perseid":
            continue
        peer = rates.get(("peft", kind, batch))
        theirs = (f"{peer.tokens_per_s:.0f}", f"{ours.tokens_per_s / peer.tokens_per_s:.1f}×") if peer else ("–", "–")
        table.add_row(kind, str(batch), f"{ours.tokens_per_s:.0f}", f"{100 * ours.spread:.0f} %", *theirs)
    console.print(table)
    for name, value in extra.items():
        console.print(f"{name}: {value:.1f}")


def example_adapters() -> list[str]:
    """NAME=FOLDER of the example adapters of a source checkout, if this runs in one."""
    return [f"{folder.name}={folder}" for folder in sorted(Path("examples/adapters").glob("*")) if folder.is_dir()]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", metavar="NAME=FOLDER", help="default: examples/adapters/*")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="concurrent requests")
    parser.add_argument("--prompt", type=int, default=64, help="prompt length, tokens")
    parser.add_argument("--tokens", type=int, default=64, help="completion length, tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--skip-peft", action="store_true", help="measure Perseid alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("server_args", nargs="*", help="options for perseid serve, after --")
    options = parser.parse_args()
    options.adapter = options.adapter or example_adapters()
    return options


def embedded_gguf() -> Path:
    """Where the embedded base lies; asked of the command so that this package needs no server code."""
    command = [sys.executable, "-m", "perseid_server.model.embedded"]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    options.gguf = embedded_gguf()
    names = [adapter.partition("=")[0] for adapter in options.adapter]
    measurements, extra = measure_perseid(options, names)
    if not options.skip_peft:
        measurements += measure_peft(options)
    show(measurements, extra, Console())
    if options.json:
        figures = {"machine": machine(), **extra, "decode": [asdict(m) for m in measurements]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
