"""Any OpenAI-compatible server over HTTP: Perseid, vLLM, llama-server."""

import math
import os
import ssl
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec

from perseid_loadtest.engines import ByLoraField, ByModel, Dialect, lora_numbers
from perseid_loadtest.traffic.events import EventReader, read_whole, refusal_words
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.prompts import WORDS
from perseid_loadtest.traffic.target import Answer, Failed, kind_of_connection
from perseid_server.errors import PerseidError

OPEN_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
ADMIN_TIMEOUT = aiohttp.ClientTimeout(total=120.0)
NO_TIMEOUT = aiohttp.ClientTimeout(total=None)  # the driver has its own
KEEP_ALIVE_S = 3.0
"""Less than servers keep idle connections (uvicorn: 5 s): a request on one that is just being closed would fail for
nothing."""


class HttpTarget:
    """POST /v1/completions, streamed or whole. Connections are as many as requests: none waits for another."""

    def __init__(
        self,
        url: str,
        *,
        adapters: Sequence[str] = (),
        model: str | None = None,
        api_key: str | None = None,
        stream: bool = True,
        ca: ssl.SSLContext | None = None,
    ) -> None:
        self.address = url.rstrip("/").removesuffix("/v1")
        self._adapters = adapters
        self._model = model
        self.streams = stream
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._ca = ca
        self._session: aiohttp.ClientSession | None = None
        self._dialect: Dialect = ByModel("", frozenset())
        self._names: tuple[str, ...] = ()

    @property
    def names(self) -> Sequence[str]:
        """Adapters that the server lists."""
        return self._names

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "open() comes first"
        return self._session

    async def open(self) -> None:
        """Learn what the server calls its base and its adapters. PerseidError when it cannot be told."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=self._ca or True)
        self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        models = [str(card["id"]) for card in await self._list("/v1/models", "data")]
        base = self._model or next(iter(models), "")
        listed = await self._llama_adapters()
        if listed is None:
            self._dialect = ByModel(base, frozenset(models))
            self._names = tuple(name for name in models if name != base and name.partition(":")[0] != "auto")
        else:
            numbers = lora_numbers(listed, self._adapters)
            self._dialect = ByLoraField(base, numbers, tuple(int(entry["id"]) for entry in listed))
            self._names = tuple(numbers)

    async def close(self) -> None:
        """Give the connections back."""
        if self._session is not None:
            await self._session.close()

    async def vocabulary(self) -> Sequence[int] | None:
        """The server's own tokens of some words. Fields of Perseid, vLLM and llama-server, which skip each other's."""
        body = {"prompt": WORDS, "content": WORDS, "add_special_tokens": False, "add_special": False}
        body |= {"model": self._dialect.fields("")["model"]}
        try:
            async with self._http.post(
                f"{self.address}/tokenize", json=body, headers=self._headers, timeout=OPEN_TIMEOUT
            ) as response:
                told = await response.json(content_type=None) if response.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        tokens = told.get("tokens") if isinstance(told, Mapping) else None
        known = {token for token in tokens if type(token) is int} if isinstance(tokens, list) else set[int]()
        return sorted(known) if len(known) > 1 else None

    async def ask(self, request: Request, answer: Answer) -> None:
        """Send it and read what comes. Failed names the status, "connection", "client" or "cut off"."""
        try:
            async with self._http.post(
                f"{self.address}/v1/completions", data=self._body(request), headers=self._headers, timeout=NO_TIMEOUT
            ) as response:
                if response.status != 200:
                    raise await _refused(response)
                await self._read(response, answer)
        except aiohttp.ClientPayloadError as error:
            raise Failed("cut off", str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed("cut off" if answer.arrivals else kind_of_connection(error), _words(error)) from error

    async def load(self, name: str, source: str, *, replace: bool) -> None:
        """vLLM's route."""
        body = {"lora_name": name, "lora_path": source, "load_inplace": replace}
        await self._admin("/v1/load_lora_adapter", body)

    async def unload(self, name: str) -> None:
        """vLLM's route."""
        await self._admin("/v1/unload_lora_adapter", {"lora_name": name})

    def _body(self, request: Request) -> bytes:
        body: dict[str, Any] = {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **self._fields(request.adapter),
        }
        if self.streams:
            body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        return msgspec.json.encode(body)

    def _fields(self, adapter: str) -> Mapping[str, Any]:
        try:
            return self._dialect.fields(adapter)
        except KeyError:  # llama-server knows only what it was started with
            raise Failed("404", f"the server has no adapter {adapter!r}") from None

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        if not self.streams:
            read_whole(await response.read(), answer)
            return
        reader, content = EventReader(answer), response.content
        try:
            while data := await content.readany():
                reader.feed(data, answer.now())
        finally:
            reader.finish()
        if not reader.is_complete:
            raise Failed("cut off", "the stream ended before its end mark")

    async def _admin(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            async with self._http.post(
                self.address + path, json=body, headers=self._headers, timeout=ADMIN_TIMEOUT
            ) as response:
                if response.status != 200:
                    raise await _refused(response)
        except TimeoutError as error:
            raise Failed("timeout", f"no answer within {ADMIN_TIMEOUT.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed(kind_of_connection(error), _words(error)) from error

    async def _llama_adapters(self) -> Sequence[Mapping[str, Any]] | None:
        """Only llama-server has this route."""
        try:
            return await self._list("/lora-adapters", None)
        except PerseidError:
            return None

    async def _list(self, path: str, key: str | None) -> Sequence[Mapping[str, Any]]:
        """A list of JSON objects. PerseidError, one line, when none comes."""
        try:
            async with self._http.get(self.address + path, headers=self._headers, timeout=OPEN_TIMEOUT) as response:
                if response.status in {401, 403}:
                    raise PerseidError(f"{self.address}: HTTP {response.status}; it wants another --api-key")
                if response.status != 200:
                    raise PerseidError(f"{self.address}: {path} answers HTTP {response.status}; {_NOT_OURS}")
                told = await response.json(content_type=None)
                entries = told[key] if key else told
                return [{**entry, "id": entry["id"]} for entry in entries]
        except aiohttp.InvalidURL as error:
            raise PerseidError(f"--target {self.address}: not a URL") from error
        except (ValueError, KeyError, TypeError) as error:
            raise PerseidError(f"{self.address}: {path} answers no list of models; {_NOT_OURS}") from error
        except TimeoutError as error:
            raise PerseidError(f"{self.address}: no answer within {OPEN_TIMEOUT.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PerseidError(f"{self.address}: {_words(error)}; is a server running there?") from error


_NOT_OURS = "is this an OpenAI-compatible server?"


async def _refused(response: aiohttp.ClientResponse) -> Failed:
    words = refusal_words(await response.read())
    return Failed(str(response.status), words, _seconds(response.headers.get("Retry-After")))


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; None for none, and for a date."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        return f"cannot connect ({os.strerror(number).lower() if number else error.os_error})"
    return str(error) or type(error).__name__
