"""Reading a stream of server-sent events at little cost: how many tokens came, and when."""

import msgspec

from perseid_loadtest.traffic.target import Answer, Failed

_DONE = b"[DONE]"
_NULL = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """OpenAI's usage."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Timings(msgspec.Struct):
    """llama-server's."""

    prompt_n: int = 0
    predicted_n: int = 0


class Event(msgspec.Struct):
    """What counts of an event, or of a whole answer. All else is skipped unread."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    timings: _Timings | None = None
    error: msgspec.Raw = _NULL


class _Error(msgspec.Struct):
    message: str = ""
    type: str = ""  # OpenAI's name of it
    code: int | str | None = None
    param: object = None  # the field that is wrong, if it is one


class _Refusal(msgspec.Struct):
    error: _Error | str | None = None
    message: str = ""


_decode = msgspec.json.Decoder(Event).decode
_decode_error = msgspec.json.Decoder(_Error | str).decode
_decode_refusal = msgspec.json.Decoder(_Refusal).decode


def read_whole(body: bytes, answer: Answer) -> None:
    """An answer that is not streamed: all tokens came now. Failed when it is none."""
    try:
        event = _decode(body)
    except msgspec.DecodeError as error:
        raise Failed("malformed", f"the answer is not a completion: {error}") from error
    _raise_told(event)
    prompt, output = _usage(event)
    if not output and any(choice.text for choice in event.choices):
        output, answer.tokens_told = 1, False  # as a chunk with text
    answer.prompt_tokens = prompt
    answer.output_tokens = output
    if output:
        answer.arrivals.append((answer.now(), output))


def refusal_words(body: bytes) -> str:
    """What a server says with a status that is not 200: OpenAI's error object, or the body as it is."""
    try:
        told = _decode_refusal(body)
    except msgspec.DecodeError:
        return body.decode(errors="replace").strip()
    if isinstance(told.error, _Error):
        message, param = told.error.message, told.error.param
        return message if not isinstance(param, str) or param in message else f"{message} ({param})".strip()
    return told.error or told.message or body.decode(errors="replace").strip()


class EventReader:
    """Takes bytes as they come and writes arrivals into an answer.

    A chunk of text is not always one token: characters of several are held back until they are whole. Where the
    server tells how many tokens there are so far, the difference counts. Where it tells the sum at the end, all
    chunks with text count the same share of it; where it tells nothing, a chunk counts one.
    """

    __slots__ = ("_answer", "_chunks", "_counted", "_rest", "_told", "is_complete")

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""
        self._counted: list[tuple[float, float]] = []  # by what the server told
        self._chunks: list[tuple[float, float]] = []  # one for each event with text
        self._told = 0
        self.is_complete = False

    def feed(self, data: bytes, moment: float) -> None:
        """Bytes that came at this moment. Failed when an event tells an error or is none."""
        if self._rest:
            data = self._rest + data
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), moment)

    def finish(self) -> None:
        """Put what was read into the answer; also when the stream broke off."""
        answer = self._answer
        if len(self._counted) > 1 or not self._chunks:
            answer.arrivals = self._counted
        else:
            share = self._told / len(self._chunks) if self._told else 1.0
            answer.arrivals = [(moment, share) for moment, _ in self._chunks]
        answer.output_tokens = self._told or len(self._chunks)
        answer.tokens_told = bool(self._told) or not self._chunks

    def _event(self, data: bytes, moment: float) -> None:
        if data == _DONE:
            self.is_complete = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            raise Failed("malformed", f"an event is not a completion: {error}") from error
        if event.error is not _NULL:
            _raise_told(event)
        for choice in event.choices:
            if choice.text:
                self._chunks.append((moment, 1.0))
                self._answer.output_tokens += 1
            if choice.finish_reason is not None:
                self.is_complete = True
        if event.usage is not None or event.timings is not None:
            self._count(event, moment)

    def _count(self, event: Event, moment: float) -> None:
        prompt, output = _usage(event)
        self._answer.prompt_tokens = prompt or self._answer.prompt_tokens
        if output > self._told:
            self._counted.append((moment, output - self._told))
            self._told = output


def _usage(event: Event) -> tuple[int, int]:
    """Prompt and output tokens so far."""
    if event.usage is not None:
        return event.usage.prompt_tokens, event.usage.completion_tokens
    if event.timings is not None:
        return event.timings.prompt_n, event.timings.predicted_n
    return 0, 0


def _raise_told(event: Event) -> None:
    """An error in place of an answer, after the status was sent."""
    if bytes(event.error) == b"null":
        return
    try:
        told = _decode_error(event.error)
    except msgspec.DecodeError:
        raise Failed("error event", bytes(event.error).decode(errors="replace")) from None
    if isinstance(told, str):
        raise Failed("error event", told)
    raise Failed(str(told.code or told.type or "error event"), told.message)
