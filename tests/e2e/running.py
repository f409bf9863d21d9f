"""A real `perseid serve` in a subprocess, and what the tests ask of it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT_S = 120
SERVE = (sys.executable, "-m", "perseid_server", "serve", "--http-port", "0", "--grpc-port", "0")


@dataclass
class RunningServer:
    """Addresses and process of a server that answers /ready."""

    process: subprocess.Popen[str]
    store: Path
    http: str = ""
    grpc: str = ""
    lines: list[str] = field(default_factory=list)

    def metrics(self) -> str:
        """What GET /metrics says now."""
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=5) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """Sum of all samples of a metric on /metrics; KeyError when there is none."""
        lines = self.metrics().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[ {{]", line)]
        if not values:
            raise KeyError(name)
        return sum(values)

    def readiness(self) -> str:
        """The word of GET /ready now, "ready" or why not; "" when nothing answers."""
        try:
            with urllib.request.urlopen(f"{self.http}/ready", timeout=2) as response:
                return str(json.load(response)["status"])
        except urllib.error.HTTPError as refused:
            return str(json.load(refused)["status"])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return ""

    def is_ready(self) -> bool:
        """Whether it can serve now."""
        return self.readiness() == "ready"

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when /ready says yes; TimeoutError with the server's output when it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not (self.http and self.is_ready()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError("the server is not ready; it printed:\n" + "".join(self.lines[-40:]))
            time.sleep(0.05)

    def engine_pid(self) -> int:
        """The engine process: the server's child that runs the engine."""
        for entry in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if "engine_process" in Path(f"/proc/{entry}/cmdline").read_text():
                return int(entry)
        raise ProcessLookupError("the server has no engine process")


def start_server(*arguments: str, store: Path, command: Sequence[str] = SERVE, **environment: str) -> RunningServer:
    """Start `perseid serve` on free ports and read its output in the background."""
    process = subprocess.Popen(
        [*command, "--store", str(store), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    server = RunningServer(process, store)
    threading.Thread(target=_read_output, args=(server,), daemon=True).start()
    return server


def _read_output(server: RunningServer) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line)
        if match := re.match(r"\s*HTTP\s+(http://\S+)", line):
            server.http = match[1]
        if match := re.match(r"\s*gRPC\s+(\S+)", line):
            server.grpc = match[1]


def stop_server(server: RunningServer) -> int:
    """SIGTERM, then wait for the exit status; kill what does not end."""
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
    return server.process.returncode


@contextmanager
def running_server(*arguments: str, store: Path, **environment: str) -> Iterator[RunningServer]:
    """A ready server for the length of a `with` block."""
    server = start_server(*arguments, store=store, **environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        stop_server(server)
