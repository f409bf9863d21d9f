"""From tokens to text as they come: no half characters, and no stop text that slips out."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain. `stop` is the stop text that ended the answer."""

    text: str
    stop: str | None = None


class Detokenizer:
    """One answer. The pieces together are the decoded answer, up to the first stop text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...] = (),
        *,
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._watch = StopWatch(stops, keep_stop=keep_stop)
        self._token_ids: list[int] = []
        self._decoded = ""

    def feed(self, token_ids: Iterable[int]) -> Piece:
        """Take tokens; a character that is not whole yet stays inside."""
        fresh = ""
        for token in token_ids:
            self._token_ids.append(token)
            fresh += self._step(token)
        self._decoded += fresh
        return self._watch.feed(fresh)

    def _step(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001  tokenizers has no class of its own for it
            # A byte-fallback vocabulary decodes a run of bytes as a whole: one that is broken takes back characters
            # already sent. The stream cannot go on from there, so a new one does.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return "\ufffd" + (self._stream.step(self._tokenizer, token) or "")

    def finish(self) -> Piece:
        """The answer is over: what was held back comes out, broken characters as U+FFFD."""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        last = self._watch.feed(rest)
        if last.stop is not None:
            return last
        return Piece(last.text + self._watch.flush())


class StopWatch:
    """Finds the first stop text in a stream of text, holding back what may become one."""

    def __init__(self, stops: tuple[str, ...], *, keep_stop: bool = False) -> None:
        self._stops = stops
        self._keep_stop = keep_stop
        self._held = ""

    def feed(self, text: str) -> Piece:
        """Text that can go out now; `stop` is set once, at the first stop text."""
        if not self._stops:
            return Piece(text)
        self._held += text
        found = self._first_stop()
        if found is not None:
            start, stop = found
            return Piece(self._held[: start + len(stop)] if self._keep_stop else self._held[:start], stop)
        certain = len(self._held) - self._longest_beginning()
        out, self._held = self._held[:certain], self._held[certain:]
        return Piece(out)

    def flush(self) -> str:
        """What was held back for a stop text that never came."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self) -> tuple[int, str] | None:
        """The stop text that is complete first; of those that end together, the longest."""
        places = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), -len(stop), start, stop) for start, stop in places if start >= 0]
        if not ends:
            return None
        _, _, start, stop = min(ends)
        return start, stop

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop text."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
