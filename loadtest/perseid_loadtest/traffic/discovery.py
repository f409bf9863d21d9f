"""What an OpenAI-compatible server calls its base and its adapters."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from perseid_loadtest.engines import ByLoraField, ByModel, Dialect, is_llama_server, lora_list, lora_numbers
from perseid_loadtest.traffic.tls import HINT
from perseid_server.errors import PerseidError

TIMEOUT = aiohttp.ClientTimeout(total=10.0)
MODELS, LORA_ADAPTERS, PROPS = "/v1/models", "/lora-adapters", "/props"
_NOT_OURS = "is this an OpenAI-compatible server?"


@dataclass(frozen=True, slots=True)
class Peer:
    """How to ask a server."""

    dialect: Dialect
    names: tuple[str, ...] | None  # adapters it has; None: it lists none, and may know some


class _Refused(PerseidError):
    """The server answers, but has no such list."""


class Discovery:
    """Asks one server. PerseidError, one line, when it cannot be told what it serves."""

    def __init__(self, http: aiohttp.ClientSession, address: str, headers: Mapping[str, str]) -> None:
        self._http = http
        self._address = address
        self._headers = headers

    async def peer(self, model: str | None, adapters: Sequence[str]) -> Peer:
        """`model`: what it calls its base, if not the first that it lists. `adapters`: names that will be asked for."""
        cards = await self._cards(model or None)
        models = [str(card["id"]) for card in cards]
        base = model or models[0]
        listed = await self._lora_list(is_llama_server(cards))
        if listed is None:
            names = tuple(name for name in models if name != base and name.partition(":")[0] != "auto")
            return Peer(ByModel(base, frozenset(models)), names or None)
        numbers = _numbers(listed, adapters)
        return Peer(ByLoraField(base, numbers, tuple(entry["id"] for entry in listed)), tuple(numbers))

    async def _cards(self, model: str | None) -> Sequence[Mapping[str, Any]]:
        """The models; none of a server without this list, which only --model makes up for."""
        try:
            cards = _models(await self._get(MODELS))
        except _Refused as error:
            if model is None:
                more = f"{_NOT_OURS} One without this list needs --model, the name of its base"
                raise PerseidError(f"{self._address}: {error.message}; {more}") from error
            return ()
        if not cards and model is None:
            raise PerseidError(f"{self._address}: {MODELS} lists no model; name the base with --model")
        return cards

    async def _lora_list(self, is_llama: bool) -> Sequence[Mapping[str, Any]] | None:
        """llama-server's adapters. None of another server, which may answer anything there."""
        try:
            listed = lora_list(await self._get(LORA_ADAPTERS))
        except _Refused:
            return None
        except PerseidError:
            if is_llama:
                raise
            return None
        if not listed and not is_llama and not await self._has_build_info():
            return None
        return listed

    async def _has_build_info(self) -> bool:
        """As llama-server does, whatever its models are called."""
        try:
            told = await self._get(PROPS)
        except PerseidError:
            return False
        return isinstance(told, dict) and "build_info" in told

    async def _get(self, path: str) -> Any:
        """JSON. _Refused, without the address, where the server answers something else."""
        try:
            async with self._http.get(self._address + path, headers=self._headers, timeout=TIMEOUT) as response:
                if response.status in {401, 403}:
                    raise PerseidError(f"{self._address}: HTTP {response.status}; it wants another --api-key")
                if response.status >= 500 and response.status != 501:  # it has the route, and is not well
                    raise PerseidError(f"{self._address}: {path} answers HTTP {response.status}; {_NOT_OURS}")
                if response.status != 200:
                    raise _Refused(f"{path} answers HTTP {response.status}")
                return await response.json(content_type=None)
        except aiohttp.InvalidURL as error:
            raise PerseidError(f"--target {self._address}: not a URL") from error
        except ValueError as error:
            raise _Refused(f"{path} answers no list of models") from error
        except TimeoutError as error:
            raise PerseidError(f"{self._address}: no answer within {TIMEOUT.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            hint = f"is a server running there?{HINT if self._address.startswith('https:') else ''}"
            raise PerseidError(f"{self._address}: {words(error)}; {hint}") from error


def words(error: Exception) -> str:
    """Why a connection could not be used."""
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        return f"cannot connect ({os.strerror(number).lower() if number else error.os_error})"
    return str(error) or type(error).__name__


def _models(told: Any) -> Sequence[Mapping[str, Any]]:
    cards = told.get("data") if isinstance(told, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and card.get("id") for card in cards):
        raise _Refused(f"{MODELS} answers no list of models")
    return cards


def _numbers(listed: Sequence[Mapping[str, Any]], adapters: Sequence[str]) -> Mapping[str, int]:
    """llama-server's numbers by name: those asked for by what was asked, the others by their file's name, or by all of
    its path where two files are called the same."""
    asked = lora_numbers(listed, adapters)
    stems = Counter(Path(entry["path"]).stem for entry in listed)
    rest = [entry for entry in listed if entry["id"] not in asked.values()]
    return {_name(entry["path"], stems): entry["id"] for entry in rest} | asked


def _name(path: str, stems: Mapping[str, int]) -> str:
    stem = Path(path).stem
    return stem if stems[stem] == 1 else path
