"""Any OpenAI-compatible server over HTTP: Perseid, vLLM, llama-server."""

import math
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec

from perseid_loadtest.engines import ByModel, Dialect
from perseid_loadtest.traffic.discovery import TIMEOUT, Discovery, words
from perseid_loadtest.traffic.events import EventReader, read_whole, refusal_words
from perseid_loadtest.traffic.plan import Request
from perseid_loadtest.traffic.prompts import WORDS
from perseid_loadtest.traffic.target import Answer, Failed, kind_of_connection

ADMIN_TIMEOUT = aiohttp.ClientTimeout(total=120.0)
NO_TIMEOUT = aiohttp.ClientTimeout(total=None)  # the driver has its own
KEEP_ALIVE_S = 3.0
"""Less than servers keep idle connections (uvicorn: 5 s): a request on one that is just being closed would fail for
nothing."""
STALE_S = 1.0
"""A kept connection that ends this soon after a request went out had been closed by the server before: a client sends
such a request again. One that ends later was lost with the request on it."""
_Options = Mapping[str, bool] | None
STREAM_OPTIONS: tuple[_Options, ...] = (
    {"include_usage": True, "continuous_usage_stats": True},
    {"include_usage": True},
    None,
)
"""What is asked for; the next one where a server refuses the fields of this one."""
_OPTION_NAMES = ("stream_options", "include_usage", "continuous_usage_stats")


@dataclass(frozen=True, slots=True)
class _Extras:
    """Fields beyond OpenAI's, or younger, that a server may refuse; it is then asked without them."""

    stream_options: tuple[_Options, ...]  # the first is asked for; the others are left
    ignore_eos: bool = True

    def without(self, failed: Failed) -> "_Extras":
        """What is left to ask for where the server does not take a field; the same where that is not why it failed."""
        if failed.kind not in {"400", "422"}:
            return self
        refused = len(self.stream_options) > 1 and any(name in failed.message for name in _OPTION_NAMES)
        options = self.stream_options[1:] if refused else self.stream_options
        return _Extras(options, self.ignore_eos and "ignore_eos" not in failed.message)

    def both(self, other: "_Extras") -> "_Extras":
        """What neither of two requests was refused."""
        options = min(self.stream_options, other.stream_options, key=len)
        return _Extras(options, self.ignore_eos and other.ignore_eos)


@dataclass(slots=True)
class _Sent:
    """One request on its way."""

    reused_at: float | None = None  # when it got a kept connection
    is_answered: bool = False  # a status came

    def was_stale(self, error: Exception) -> bool:
        """Whether the server had closed the connection before it saw the request."""
        if self.reused_at is None or self.is_answered or time.perf_counter() - self.reused_at > STALE_S:
            return False
        return not isinstance(error, aiohttp.ServerDisconnectedError) or isinstance(error.message, str)


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
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = url.rstrip("/").removesuffix("/v1")
        self._adapters = adapters
        self._model = model
        self.streams = stream
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._fresh: aiohttp.ClientSession | None = None
        self._dialect: Dialect = ByModel("", frozenset())
        self._names: tuple[str, ...] | None = None
        self._extras = _Extras(STREAM_OPTIONS if stream else (None,))

    @property
    def names(self) -> Sequence[str] | None:
        """Adapters that the server lists; None: it lists none, and may know some."""
        return self._names

    @property
    def _http(self) -> aiohttp.ClientSession:
        assert self._session is not None, "open() comes first"
        return self._session

    @property
    def _once(self) -> aiohttp.ClientSession:
        """For a request that must not meet a connection that the server has closed meanwhile."""
        assert self._fresh is not None, "open() comes first"
        return self._fresh

    @property
    def stops_at_eos(self) -> bool:
        """Whether the server refused to go on after an end token."""
        return not self._extras.ignore_eos

    async def open(self) -> None:
        """Learn what the server calls its base and its adapters. PerseidError when it cannot be told."""
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S, ssl=self._tls or True)
        fresh = aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._tls or True)
        jar = aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(connector=kept, cookie_jar=jar, trace_configs=[_reuse_noted()])
        self._fresh = aiohttp.ClientSession(connector=fresh, cookie_jar=jar)
        peer = await Discovery(self._fresh, self.address, self._headers).peer(self._model, self._adapters)
        self._dialect, self._names = peer.dialect, peer.names

    async def close(self) -> None:
        """Give the connections back."""
        for session in (self._session, self._fresh):
            if session is not None:
                await session.close()

    async def vocabulary(self) -> Sequence[int] | None:
        """The server's own tokens of some words. Fields of Perseid, vLLM and llama-server, which skip each other's."""
        body = {"prompt": WORDS, "content": WORDS, "add_special_tokens": False, "add_special": False}
        body |= {"model": self._dialect.fields("")["model"]}
        try:
            async with self._once.post(
                f"{self.address}/tokenize", json=body, headers=self._headers, timeout=TIMEOUT
            ) as response:
                told = await response.json(content_type=None) if response.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        tokens = told.get("tokens") if isinstance(told, Mapping) else None
        known = {token for token in tokens if type(token) is int} if isinstance(tokens, list) else set[int]()
        return sorted(known) if len(known) > 1 else None

    async def ask(self, request: Request, answer: Answer) -> None:
        """Send it and read what comes. Failed names the status, "connection", "client" or "cut off"."""
        while True:
            extras = self._extras
            try:
                return await self._send(self._body(request, extras), answer)
            except Failed as failed:
                fewer = extras.without(failed)
                if fewer == extras:
                    raise
                self._extras = self._extras.both(fewer)

    async def load(self, name: str, source: str, *, replace: bool) -> None:
        """vLLM's route."""
        body = {"lora_name": name, "lora_path": source, "load_inplace": replace}
        await self._admin("/v1/load_lora_adapter", body)

    async def unload(self, name: str) -> None:
        """vLLM's route."""
        await self._admin("/v1/unload_lora_adapter", {"lora_name": name})

    async def _send(self, body: bytes, answer: Answer) -> None:
        """Twice where the first was for nothing: on a kept connection that the server had closed without a word."""
        sent = _Sent()
        try:
            try:
                await self._post(self._http, body, answer, sent)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError) as error:
                if not sent.was_stale(error):
                    raise
                await self._post(self._once, body, answer, _Sent())
        except aiohttp.ClientPayloadError as error:
            raise Failed("cut off", str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed("cut off" if answer.arrivals else kind_of_connection(error), words(error)) from error

    async def _post(self, http: aiohttp.ClientSession, body: bytes, answer: Answer, sent: _Sent) -> None:
        async with http.post(
            f"{self.address}/v1/completions",
            data=body,
            headers=self._headers,
            timeout=NO_TIMEOUT,
            trace_request_ctx=sent,
        ) as response:
            sent.is_answered = True
            if response.status != 200:
                raise await _refused(response)
            await self._read(response, answer)

    def _body(self, request: Request, extras: _Extras) -> bytes:
        body: dict[str, Any] = {
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            **self._fields(request.adapter),
        }
        if extras.ignore_eos:
            body["ignore_eos"] = True
        if self.streams:
            body["stream"] = True
            if extras.stream_options[0] is not None:
                body["stream_options"] = extras.stream_options[0]
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
            async with self._once.post(
                self.address + path, json=body, headers=self._headers, timeout=ADMIN_TIMEOUT
            ) as response:
                if response.status != 200:
                    raise await _refused(response)
        except TimeoutError as error:
            raise Failed("timeout", f"no answer within {ADMIN_TIMEOUT.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed(kind_of_connection(error), words(error)) from error


def _reuse_noted() -> aiohttp.TraceConfig:
    """Tells each request's _Sent that it got a kept connection."""

    async def note(
        _: aiohttp.ClientSession, context: SimpleNamespace, __: aiohttp.TraceConnectionReuseconnParams
    ) -> None:
        context.trace_request_ctx.reused_at = time.perf_counter()

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(note)
    return tracing


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
