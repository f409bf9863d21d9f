"""How many tokens each key has used, over restarts. Standard library only.

The file is small JSON, replaced as a whole, some seconds after something was used and when the server ends: a kill
forgets what was used in the last seconds, nothing else. One that cannot be read is set aside, not replaced.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from perseid_server.access.periodically import Periodically

logger = logging.getLogger(__name__)

DAY_S = 86400
_INTERVAL_S = 5.0
_MAX_BYTES = 64 << 20
_MAX_COUNT = 1 << 62


@dataclass(slots=True)
class Used:
    """Tokens of one key."""

    total: int = 0
    day: int = 0  # days since 1970 in UTC
    today: int = 0  # on that day


class Ledger:
    """Counts by key. One thread writes them down: `start` and `stop` it. `path` None: they are kept in memory."""

    def __init__(self, path: Path | None = None, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        self._used = _read(path) if path is not None else {}
        self._lock = threading.RLock()  # of what is counted, which the thread reads
        self._dirty = False
        self._is_failing = False
        self._writing = Periodically("writing what API keys have used", _INTERVAL_S, self.save)

    def start(self) -> None:
        """Write now and then."""
        self._writing.start()

    def stop(self) -> None:
        """Write a last time."""
        self._writing.stop()
        self.save()

    def used(self, key: str) -> Used:
        """As of now. Where the clock is set back, what was used on the later day counts for this one: a clock that was
        a year ahead for a moment locks nobody out for a year."""
        with self._lock:
            used = self._used.setdefault(key, Used())
            day = int(self._wall() // DAY_S)
            if day > used.day:
                used.today = 0
            used.day = day
            return used

    def until_tomorrow_s(self, key: str) -> float:
        """When the day's count begins anew, s from now."""
        return max(0.001, (self.used(key).day + 1) * DAY_S - self._wall())

    def add(self, key: str, tokens: int) -> int:
        """Count tokens; returns the day that they count for."""
        with self._lock:
            used = self.used(key)
            used.total += tokens
            used.today += tokens
            self._dirty = True
            return used.day

    def give_back(self, key: str, tokens: int, day: int) -> None:
        """Tokens that were counted for a day. The next one has nothing of them to give."""
        with self._lock:
            used = self.used(key)
            used.total = max(0, used.total - tokens)
            if used.day <= day:  # less where the clock was set back: see `used`
                used.today = max(0, used.today - tokens)
            self._dirty = True

    def save(self) -> None:
        """Write what has changed. A disk that is full is logged once, and tried again."""
        with self._lock:
            if not self._dirty or self._path is None:
                return
            self._dirty = False
            content = json.dumps({key: asdict(used) for key, used in self._used.items()}, indent=1).encode()
        try:
            _replace(self._path, content)
        except OSError as error:
            self._dirty = True
            if not self._is_failing:
                logger.error("what API keys have used cannot be written: %s", error.strerror)  # noqa: TRY400
            self._is_failing = True
        else:
            self._is_failing = False


def _read(path: Path) -> dict[str, Used]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_BYTES))
        return {key: _one(told) for key, told in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        logger.error("%s cannot be read (%s): what API keys have used counts from zero", path, error)  # noqa: TRY400
        _set_aside(path)
        return {}


def _set_aside(path: Path) -> None:
    """The operator may mend it, or read in it what was used. An older one that was set aside is the better one."""
    aside = path.with_name(f"{path.name}.damaged")
    with contextlib.suppress(OSError):
        if not aside.exists():
            path.rename(aside)


def _one(told: dict[str, int]) -> Used:
    counts = [told[name] for name in ("total", "day", "today")]
    if any(type(count) is not int or not 0 <= count < _MAX_COUNT for count in counts):
        raise ValueError("expected whole numbers")
    return Used(*counts)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:  # noqa: PTH123
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
