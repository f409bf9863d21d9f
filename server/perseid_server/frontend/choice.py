"""One answer of a request: a sequence in the engine, and its text."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from perseid_server.engine.messages import SequenceOutput
from perseid_server.errors import DeadlineExceeded, GenerationFailed, PerseidError, Unavailable
from perseid_server.frontend.detokenizer import Detokenizer, Piece
from perseid_server.frontend.generation import Delta, Generation, StopReason
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.outputs import first_tokens
from perseid_server.frontend.routing_report import Shares
from perseid_server.frontend.text import TextProcessor


class Choice:
    """One answer of a request: a sequence in the engine, and its text."""

    def __init__(
        self,
        generation: Generation,
        index: int,
        sequence: str,
        outputs: AsyncIterator[SequenceOutput],
        text: TextProcessor,
        metrics: Metrics,
    ) -> None:
        """`sequence`: its id in the engine; `outputs`: of it."""
        options = generation.request.sampling
        self._generation = generation
        self._index = index
        self._sequence = sequence
        self._stream = outputs
        self._text = text
        self._metrics = metrics
        self._options = options
        self._detokenizer = Detokenizer(
            text.tokenizer,
            options.stop,
            keep_stop=options.include_stop_str_in_output,
            skip_special_tokens=options.skip_special_tokens,
        )

    async def deltas(self) -> AsyncGenerator[Delta]:
        """The answer's deltas, the last one with its finish reason."""
        record = self._generation.record.answer(self._sequence)
        async with contextlib.aclosing(self._outputs()) as outputs:
            with self._metrics.time_request(self._generation) as timer:
                async for whole in outputs:
                    output, piece = self._read(whole)
                    timer.saw(output)
                    record.saw(len(output.token_ids), output.queue_s, output.prefill_s, output.load_s)
                    if self._options.echo and not timer.has_echoed:
                        timer.has_echoed = True
                        yield self._echo(output)
                    delta = self._delta(output, piece)
                    if record.texts is not None:
                        record.texts.append(delta.text)
                    self._generation.usage.count(output)
                    self._generation.meter.spend(len(output.token_ids))
                    if delta.finish_reason is not None:
                        timer.finish(delta.finish_reason)
                        record.finish_reason = delta.finish_reason
                        yield delta
                        return
                    if delta.token_ids or delta.text:
                        yield delta

    async def _outputs(self) -> AsyncGenerator[SequenceOutput]:
        try:
            async for output in self._stream:
                if output.finish_reason == "error":
                    raise _error_of(output)
                usage = self._generation.usage
                usage.cached_tokens = max(usage.cached_tokens, output.cached_tokens)
                self._generation.record.cached_tokens = usage.cached_tokens
                yield output
        finally:
            await self._stream.aclose()  # type: ignore[attr-defined]  # an async generator: aborts what is not finished

    def _read(self, output: SequenceOutput) -> tuple[SequenceOutput, Piece]:
        """The output as far as the token that completes a stop text, and the text it makes certain."""
        text = ""
        for count, token in enumerate(output.token_ids, start=1):
            piece = self._detokenizer.feed((token,))
            text += piece.text
            if piece.stop is not None:
                return first_tokens(output, count), Piece(text, piece.stop)
        return output, Piece(text)

    def _delta(self, output: SequenceOutput, piece: Piece) -> Delta:
        finish: StopReason | None = None
        stop_reason: str | int | None = piece.stop
        if piece.stop is not None:
            finish = "stop"
        elif output.finish_reason is not None:
            last = self._detokenizer.finish()
            piece = Piece(piece.text + last.text, last.stop)
            finish = "length" if output.finish_reason == "length" and last.stop is None else "stop"
            stop_reason = last.stop if last.stop is not None else self._stop_token(output)
        routing = self._routing(output)
        return Delta(self._index, piece.text, output.token_ids, output.logprobs, finish, stop_reason, routing=routing)

    def _routing(self, output: SequenceOutput) -> tuple[Shares, ...]:
        """Also adds the tokens to the generation's summary."""
        if self._generation.routing is None:
            return ()
        tokens = self._generation.routing.saw(output)
        return tokens if self._generation.request.report == "tokens" else ()

    def _stop_token(self, output: SequenceOutput) -> int | None:
        """The token the client asked to stop at; the model's own end token is no news."""
        return output.stop_token_id if output.stop_token_id in self._options.stop_token_ids else None

    def _echo(self, output: SequenceOutput) -> Delta:
        prompt = self._generation.prompt_token_ids
        text = self._text.decode(prompt, skip_special_tokens=self._options.skip_special_tokens)
        return Delta(self._index, text, prompt, output.prompt_logprobs or (), is_prompt=True)


def _error_of(output: SequenceOutput) -> PerseidError:
    """Why the engine ended a sequence."""
    if output.error_kind == "deadline":
        return DeadlineExceeded(output.error or "timeout: the request's time was over", field="timeout")
    if output.error_kind == "unavailable":
        return Unavailable(output.error or "the engine gave this request up; try again")
    return GenerationFailed(output.error or "the engine gave this request up")
