"""A load test in a file: JSON, so that other tools can read it.

    {"kind": "perseid loadtest", "version": 1, "run": {…}, "summary": {…}}

`run` and `summary` are `Run` and `Summary` field by field, but for `arrivals`: pairs [moment, tokens]. Anything but a
change that old readers can pass over raises the version.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from perseid_loadtest.analysis.summary import Summary
from perseid_loadtest.drive import Arrival
from perseid_loadtest.traffic.record import RequestRecord, Run
from perseid_server.errors import InvalidRequest
from perseid_server.training import files

KIND = "perseid loadtest"
VERSION = 1
_MEASURED = ("started_at", "seconds", "client_busy", "most_late_s")

_Arrivals = tuple[tuple[tuple[float, float], ...], ...]


class _Head(msgspec.Struct):
    """What tells the file's kind before the rest is read."""

    kind: str
    version: int


class _Content(msgspec.Struct):
    """The rest, its arrivals still apart."""

    run: dict[str, Any]
    summary: Summary


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file holds."""

    run: Run
    summary: Summary


def write(path: Path, run: Run, summary: Summary) -> None:
    """Write the file whole or not at all; one that is there is replaced."""
    told = {"kind": KIND, "version": VERSION, "run": _lowered(run), "summary": summary}
    write_whole(path, msgspec.json.encode(told, enc_hook=str) + b"\n")


def read(path: Path) -> Saved:
    """What `write` wrote. InvalidRequest that names the file, and where it differs, on anything else."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from error
    try:
        head = msgspec.json.decode(text, type=_Head)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        head = _Head("", 0)
    if head.kind != KIND:
        raise InvalidRequest(
            f"{path} is not the file of a load test; expected what `perseid loadtest --json FILE` writes"
        )
    if head.version != VERSION:
        raise InvalidRequest(
            f"{path} is of version {head.version} and this perseid reads version {VERSION}; read it with the perseid "
            "that wrote it, or run the test again"
        )
    try:
        content = msgspec.json.decode(text, type=_Content)
        return Saved(_raised(content.run), _of_today(content))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is damaged: {error}; run the test again") from error


def write_whole(path: Path, content: bytes) -> None:
    """The old file or the new one, whatever happens meanwhile. InvalidRequest where that cannot be."""
    try:
        files.write_whole(Path(path), content)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}") from error


def check_place(path: Path, field: str) -> None:
    """InvalidRequest, with the option, where `write_whole` could not write. Makes the folder."""
    try:
        files.check_place(Path(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        wanted = "expected a file, in a folder that allows new ones"
        raise InvalidRequest(f"--{field}: {path} cannot be written ({reason}); {wanted}", field=field) from error


def _lowered(run: Run) -> dict[str, Any]:
    """As JSON has it: pairs take a third of what objects would."""
    told: dict[str, Any] = {name: getattr(run, name) for name in run.__slots__}
    told |= {name: told[name] if math.isfinite(told[name]) else 0.0 for name in _MEASURED}  # JSON has no NaN
    told["records"] = [
        {name: getattr(record, name) for name in record.__slots__}
        | {"arrivals": [(round(arrival.moment, 6), arrival.tokens) for arrival in record.arrivals]}
        for record in run.records
    ]
    return told


def _of_today(content: _Content) -> Summary:
    """Files once lacked the time of sending, and had what was due over the time of measuring: another figure."""
    known = content.run.get("window_s")
    return content.summary if known is not None else replace(content.summary, offered_per_s=None)


def _raised(told: dict[str, Any]) -> Run:
    records = msgspec.convert(told.get("records"), list[dict[str, Any]])
    pairs = msgspec.convert([record.pop("arrivals", ()) for record in records], _Arrivals)
    run = msgspec.convert(told | {"records": records}, Run)
    arrivals = (tuple(Arrival(moment, tokens) for moment, tokens in own) for own in pairs)
    filled = (replace(record, arrivals=own) for record, own in zip(run.records, arrivals, strict=True))
    return replace(run, records=tuple[RequestRecord, ...](filled))
