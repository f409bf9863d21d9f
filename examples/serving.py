"""A running Perseid, asked over HTTP as any OpenAI-compatible server is; one can be started for the occasion."""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from tasks import Item, Task

CONCURRENT = 16
READY_SECONDS = 300
STOP_SECONDS = 30


@dataclass(frozen=True)
class Reply:
    """An answer, and what Perseid tells beside it (`perseid` in the body; empty with other servers)."""

    text: str
    told: Mapping[str, Any] = field(default_factory=dict)


class Server:
    """An OpenAI-compatible server: the adapter's name is the model's name."""

    def __init__(self, url: str) -> None:
        """Ask for the base's id: the first of /v1/models."""
        self._url = f"{url.rstrip('/')}/v1"
        self._key = os.environ.get("PERSEID_API_KEY", "none")
        headers = {"Authorization": f"Bearer {self._key}"}
        models = httpx.get(f"{self._url}/models", headers=headers, timeout=30).raise_for_status().json()
        self.base = str(models["data"][0]["id"])

    def answers(self, task: Task, items: Sequence[Item], adapter: str | None) -> list[str]:
        """A task's questions answered, with an adapter or (None) the base alone."""
        replies = self.ask([item.question for item in items], task.max_new_tokens, adapter)
        return [reply.text for reply in replies]

    def ask(
        self,
        questions: Sequence[str],
        max_tokens: int,
        model: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[Reply]:
        """Greedy replies in the questions' order. `extra`: more fields of the body."""
        rest = {"model": model or self.base, "temperature": 0, "max_tokens": max_tokens, **(extra or {})}
        return self.send([{"messages": [{"role": "user", "content": asked}], **rest} for asked in questions])

    def send(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """Replies to requests for chat completions in their order, sixteen at a time."""
        return asyncio.run(self._send(bodies))

    async def _send(self, bodies: Sequence[Mapping[str, Any]]) -> list[Reply]:
        free = asyncio.Semaphore(CONCURRENT)
        async with AsyncOpenAI(base_url=self._url, api_key=self._key, timeout=600) as client:

            async def send(body: Mapping[str, Any]) -> Reply:
                rest = {key: value for key, value in body.items() if key not in {"model", "messages"}}
                async with free:
                    reply = await client.chat.completions.create(
                        model=body["model"], messages=body["messages"], extra_body=rest
                    )
                return Reply(reply.choices[0].message.content or "", (reply.model_extra or {}).get("perseid") or {})

            return await asyncio.gather(*(send(body) for body in bodies))


def _wait_for_url(process: subprocess.Popen[bytes], out: Path, err: Path) -> str:
    """The address that the server prints, once /ready answers 200 there."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:[1-9]\d*\b", out.read_text(errors="replace")):
            url = found[0]
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == httpx.codes.OK:
                    return url
            except httpx.TransportError:
                pass  # it does not listen yet
        time.sleep(0.2)
    said = "\n".join(file.read_text(errors="replace")[-2000:] for file in (out, err))
    raise SystemExit(f"the server did not become ready:\n{said}")


@contextmanager
def own_server(adapters: Sequence[Path], base: Path | None) -> Iterator[str]:
    """A Perseid with these adapters on a free port, stopped at the end."""
    command = [sys.executable, "-m", "perseid_server", "serve", "--http-port", "0", "--grpc-port", "0"]
    for folder in adapters:
        command += ["--adapter", f"{folder.name}={folder}"]
    if base is not None:
        command += ["--model", str(base)]
    with tempfile.TemporaryDirectory() as scratch:
        command += ["--store", str(Path(scratch, "store"))]  # not the user's, where these names may mean others
        out, err = Path(scratch, "stdout"), Path(scratch, "stderr")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            yield _wait_for_url(process, out, err)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
