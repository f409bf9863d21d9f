"""Generation, as both transports see it: one call in, text deltas out.

async with service.generate(request) as generation:   # raises before anything is sent
    async for delta in generation: …                  # leaving early frees everything the request holds
generation.usage
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.messages import EngineReady, SequenceOutput, Submit
from perseid_server.errors import GenerationFailed, InvalidRequest, QueueFull, Unavailable
from perseid_server.frontend.detokenizer import Detokenizer, Piece
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.registry import AdapterRegistry, LoadedAdapter
from perseid_server.frontend.requests import (
    NUM_SEEDS,
    GenerationRequest,
    SamplingOptions,
    check_request_id,
    check_sampling,
)
from perseid_server.frontend.streams import merge
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import SamplingParams, TokenLogprobs

StopReason = Literal["stop", "length"]


class Engine(Protocol):
    """What the service needs of the engine: `ipc.engine_client.EngineProcess`, or a fake."""

    ready: EngineReady | None

    def submit(self, request: Submit) -> AsyncIterator[SequenceOutput]: ...


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step brought one choice."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # one for each token, when asked for
    finish_reason: StopReason | None = None
    stop_reason: str | int | None = None  # the stop text or token that ended it
    is_prompt: bool = False  # the echo of the prompt; logprobs[0] is None


@dataclass(slots=True)
class Usage:
    """Counts of tokens so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class Generation:
    """A request that has been accepted. Iterate it once."""

    request: GenerationRequest
    adapter: LoadedAdapter | None
    prompt_token_ids: tuple[int, ...]
    deltas: AsyncIterator[Delta]
    usage: Usage = field(default_factory=Usage)
    created: int = field(default_factory=lambda: int(time.time()))

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self.deltas


class GenerationService:
    """Prepares requests, hands them to the engine, turns its tokens into text."""

    def __init__(
        self, engine: Engine, registry: AdapterRegistry, text: TextProcessor, metrics: Metrics, max_queue: int
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._metrics = metrics
        self._max_queue = max_queue
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._serials = itertools.count()
        self.text = text
        self.draining = False

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        if self._engine.ready is None:
            raise Unavailable("the engine is starting; try again")
        return self._engine.ready.max_model_len

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generation]:
        """Check and start a request. Raises a PerseidError before the first token is computed."""
        check_request_id(request.request_id)
        check_sampling(request.sampling, self.text.vocab_size)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._place_in_queue(request.sampling.n))
            adapter = stack.enter_context(self._registry.lease(request.adapter)) if request.adapter else None
            prompt = await self.text.encode(request.input)
            params = self._sampling_params(request.sampling, len(prompt))
            generation = Generation(request, adapter, prompt, _nothing())
            generation.usage.prompt_tokens = len(prompt)
            deltas = self._run(generation, params)
            generation.deltas = deltas
            stack.push_async_callback(deltas.aclose)
            yield generation

    async def drain(self, grace_s: float) -> None:
        """Take no more requests; return when those in progress have ended, or the grace time has."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)

    # --- preparing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _place_in_queue(self, num_choices: int) -> Iterator[None]:
        if self.draining:
            raise Unavailable("the server is shutting down", retry_after_s=5.0)
        if self._in_progress + num_choices > self._max_queue and self._in_progress > 0:
            raise QueueFull(f"{self._in_progress} requests are in progress, the limit is {self._max_queue}; try again")
        self._in_progress += num_choices
        self._idle.clear()
        try:
            yield
        finally:
            self._in_progress -= num_choices
            if self._in_progress == 0:
                self._idle.set()

    def _sampling_params(self, options: SamplingOptions, num_prompt: int) -> SamplingParams:
        room = self.max_model_len - num_prompt
        if num_prompt == 0:
            raise InvalidRequest("prompt: expected at least one token", field="prompt")
        usual = room if options.usual_max_tokens is None else min(room, options.usual_max_tokens)
        wanted = options.max_tokens if options.max_tokens is not None else max(usual, 1)
        if room < min(wanted, 1):
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens; prompt and completion together may have {self.max_model_len}",
                field="prompt",
            )
        if options.max_tokens is not None and options.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {options.max_tokens} and the prompt has {num_prompt} tokens; together they may have "
                f"{self.max_model_len}",
                field="max_tokens",
            )
        ends = () if options.ignore_eos else self.text.stop_token_ids
        return SamplingParams(
            max_tokens=wanted,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=max(options.top_k, 0),
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            logit_bias=tuple(options.logit_bias.items()),
            seed=options.seed,
            stop_token_ids=tuple(dict.fromkeys((*options.stop_token_ids, *ends))),
            ignore_eos=options.ignore_eos,
            min_tokens=options.min_tokens,
            logprobs=options.logprobs,
            prompt_logprobs=options.logprobs if options.echo else None,
        )

    # --- running ------------------------------------------------------------------------------------------------

    async def _run(self, generation: Generation, params: SamplingParams) -> AsyncGenerator[Delta]:
        """All choices, their deltas in the order they come."""
        choices = [
            _Choice(self, generation, index, _seeded(params, index)) for index in range(generation.request.sampling.n)
        ]
        if len(choices) == 1:
            async with contextlib.aclosing(choices[0].deltas()) as deltas:
                async for delta in deltas:
                    yield delta
            return
        async with contextlib.aclosing(merge([choice.deltas() for choice in choices])) as merged:
            async for delta in merged:
                yield delta

    def submit(self, submit: Submit) -> AsyncIterator[SequenceOutput]:
        """Hand one sequence to the engine."""
        return self._engine.submit(submit)

    def sequence_id(self, request_id: str) -> str:
        """A name for a new sequence. Clients choose request ids; two that choose the same must not meet."""
        return f"{request_id}#{next(self._serials)}"

    @property
    def metrics(self) -> Metrics:
        """Where requests are counted."""
        return self._metrics


class _Choice:
    """One answer of a request: a sequence in the engine, and its text."""

    def __init__(self, service: GenerationService, generation: Generation, index: int, params: SamplingParams) -> None:
        request = generation.request
        options = request.sampling
        self._service = service
        self._generation = generation
        self._index = index
        self._options = options
        self._submit = Submit(
            request_id=service.sequence_id(request.request_id),
            prompt_token_ids=generation.prompt_token_ids,
            sampling=params,
            adaptation=Adaptation.of(generation.adapter.version if generation.adapter else None),
        )
        self._detokenizer = Detokenizer(
            service.text.tokenizer,
            options.stop,
            keep_stop=options.include_stop_str_in_output,
            skip_special_tokens=options.skip_special_tokens,
        )

    async def deltas(self) -> AsyncGenerator[Delta]:
        """The answer's deltas, the last one with its finish reason."""
        async with contextlib.aclosing(self._outputs()) as outputs:
            with self._service.metrics.time_request(self._generation) as timer:
                async for output in outputs:
                    timer.saw(output)
                    if self._options.echo and not timer.has_echoed:
                        timer.has_echoed = True
                        yield self._echo(output)
                    delta = self._delta(output)
                    self._generation.usage.completion_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        timer.finish(delta.finish_reason)
                        yield delta
                        return
                    if delta.token_ids or delta.text:
                        yield delta

    async def _outputs(self) -> AsyncGenerator[SequenceOutput]:
        stream = self._service.submit(self._submit)
        try:
            async for output in stream:
                if output.finish_reason == "error":
                    raise GenerationFailed(output.error or "the engine gave this request up")
                self._generation.usage.cached_tokens = max(self._generation.usage.cached_tokens, output.cached_tokens)
                yield output
        finally:
            await stream.aclose()  # type: ignore[attr-defined]  # an async generator: aborts what is not finished

    def _delta(self, output: SequenceOutput) -> Delta:
        piece = self._detokenizer.feed(output.token_ids)
        finish: StopReason | None = None
        stop_reason: str | int | None = piece.stop
        if piece.stop is not None:
            finish = "stop"
        elif output.finish_reason is not None:
            last = self._detokenizer.finish()
            piece = Piece(piece.text + last.text, last.stop)
            finish = "length" if output.finish_reason == "length" and last.stop is None else "stop"
            stop_reason = last.stop if last.stop is not None else self._stop_token(output)
        return Delta(self._index, piece.text, output.token_ids, output.logprobs, finish, stop_reason)

    def _stop_token(self, output: SequenceOutput) -> int | None:
        """The token the client asked to stop at; the model's own end token is no news."""
        return output.stop_token_id if output.stop_token_id in self._options.stop_token_ids else None

    def _echo(self, output: SequenceOutput) -> Delta:
        prompt = self._generation.prompt_token_ids
        text = self._service.text.decode(prompt, skip_special_tokens=self._options.skip_special_tokens)
        return Delta(self._index, text, prompt, output.prompt_logprobs or (), is_prompt=True)


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Choices differ by their seeds; without one each draws its own."""
    return params if params.seed is None else replace(params, seed=(params.seed + index) % NUM_SEEDS)


async def _nothing() -> AsyncGenerator[Delta]:
    """No deltas: what a generation has before it runs."""
    return
    yield
