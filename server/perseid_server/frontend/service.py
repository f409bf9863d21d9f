"""Generation, as both transports see it: one call in, text deltas out.

async with service.generate(request) as generation:   # raises before anything is sent
    async for delta in generation: …                  # leaving early frees everything the request holds
generation.usage
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from perseid_server.access.caller import Caller
from perseid_server.access.limits import Limiter
from perseid_server.engine.adaptation import BASE_COLUMN
from perseid_server.engine.messages import EngineReady, SequenceOutput, Submit
from perseid_server.errors import InvalidRequest, QueueFull, Unavailable
from perseid_server.frontend.adaptation import Resolved, Resolver
from perseid_server.frontend.admission import OPEN_ANSWER, Admission, Place
from perseid_server.frontend.choice import Choice
from perseid_server.frontend.deadline import Deadline, Stage, Timeouts
from perseid_server.frontend.draining import Draining
from perseid_server.frontend.gate_sets import GateSets
from perseid_server.frontend.generation import Delta, Generation
from perseid_server.frontend.metrics import Metrics
from perseid_server.frontend.records import begin_record, tell_resolved
from perseid_server.frontend.requests import NUM_SEEDS, GenerationRequest, SamplingOptions, check_request
from perseid_server.frontend.routing_report import RoutingTally
from perseid_server.frontend.speculation import Drafting
from perseid_server.frontend.streams import merge
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import SamplingParams
from perseid_server.observe.record import GenerationRecord


class Engine(Protocol):
    """What the service needs of the engine: `ipc.engine_client.EngineProcess`, or a fake."""

    ready: EngineReady | None

    def submit(self, request: Submit) -> AsyncIterator[SequenceOutput]: ...


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A request that is in the queue."""

    request: GenerationRequest
    record: GenerationRecord
    deadline: Deadline
    place: Place


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The same when its tokens are known."""

    accepted: _Accepted
    prompt: tuple[int, ...]
    params: SamplingParams
    num_tokens: int  # of the prompt, and as much as the answers may become


class GenerationService:
    """Prepares requests, hands them to the engine, turns its tokens into text."""

    def __init__(
        self,
        engine: Engine,
        resolver: Resolver,
        text: TextProcessor,
        metrics: Metrics,
        admission: Admission,
        drafting: Drafting | None = None,
        limiter: Limiter | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._engine = engine
        self._resolver = resolver
        self._drafting = drafting or Drafting()
        self._limiter = limiter or Limiter()
        self._metrics = metrics
        self._admission = admission
        self._timeouts = timeouts or Timeouts()
        self._idle = asyncio.Event()
        self._idle.set()
        self._serials = itertools.count()
        self.text = text
        self.draining = Draining()
        self.draining.on_refusal(lambda: metrics.rejected("draining"))
        self._on_drain: list[Callable[[], None]] = []

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        if self._engine.ready is None:
            raise Unavailable("the engine is starting; try again")
        return self._engine.ready.max_model_len

    @property
    def gate_sets(self) -> GateSets:
        """What `auto` can mean."""
        return self._resolver.gate_sets

    @asynccontextmanager
    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Generation]:
        """Check and start a request. Raises a PerseidError before the first token is computed."""
        async with self.generate_all([request]) as [generation]:
            yield generation

    @asynccontextmanager
    async def generate_all(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Sequence[Generation]]:
        """The same for all requests of a call, which want the same adaptation. What its names stand for is looked up
        once, before anything is waited for: they are served alike, whatever is replaced or unloaded meanwhile."""
        self._admission.check_call(len(requests), num_answers=sum(one.sampling.n for one in requests))
        async with AsyncExitStack() as stack:
            accepted = [stack.enter_context(self._accepted(request)) for request in requests]
            decide = stack.enter_context(self._resolver.leased(requests[0].adaptation))
            encoded = await self._encode_all(accepted)
            yield [self._started(one, decide(one.prompt), stack) for one in encoded]

    def check_room(self, caller: Caller) -> None:
        """QueueFull or Unavailable when no request of the caller's could come in now: it need not be read."""
        self.draining.check()
        self._admission.check(caller)

    def on_drain(self, callback: Callable[[], None]) -> None:
        """Be told when no more requests are taken."""
        self._on_drain.append(callback)

    async def drain(self, grace_s: float) -> None:
        """Take no more requests; return when those in progress have ended, or the grace time has."""
        self.draining.begin()
        for callback in self._on_drain:
            callback()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)

    # --- preparing ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _accepted(self, request: GenerationRequest) -> Iterator[_Accepted]:
        """It is in the queue inside. Nothing is waited for here."""
        record = begin_record(request, self._resolver.base_name)
        check_request(request, self.text.vocab_size)

        def exceeded(stage: Stage) -> None:
            self._metrics.deadline_exceeded(stage)
            request.call.refused("deadline_exceeded", "timeout")

        deadline = Deadline(request.arrived, self._timeouts.of(request.timeout_s), exceeded)
        with self._place_in_queue(request) as place, deadline.minded():
            yield _Accepted(request, record, deadline, place)

    async def _encode_all(self, accepted: Sequence[_Accepted]) -> Sequence[_Encoded]:
        """Their tokens count as they are known."""
        encoded: list[_Encoded] = []
        for one in accepted:
            encoded.append(await self._encoded(one))
            self._admission.check_call(len(accepted), num_tokens=sum(each.num_tokens for each in encoded))
            one.place.count_tokens(encoded[-1].num_tokens)
        return encoded

    async def _encoded(self, accepted: _Accepted) -> _Encoded:
        request = accepted.request
        prompt = await accepted.deadline.within(self._encode(request))
        params = self._sampling_params(request.sampling, len(prompt))
        accepted.record.prompt_tokens = len(prompt)
        answers = request.sampling.n * _length_of_answer(request.sampling, params)
        return _Encoded(accepted, prompt, params, len(prompt) + answers)

    def _started(self, encoded: _Encoded, resolved: Resolved, stack: AsyncExitStack) -> Generation:
        """It ends with the stack."""
        request, record, deadline = encoded.accepted.request, encoded.accepted.record, encoded.accepted.deadline
        prompt = encoded.prompt
        tell_resolved(record, resolved)
        generation = Generation(request, resolved, prompt, _nothing(), deadline, record=record)
        metered = self._limiter.metered(request.caller, len(prompt), lambda: deadline.is_over)
        generation.meter = stack.enter_context(metered)
        generation.speculation = self._drafting.resolve(request.speculation, resolved)
        generation.routing = _tally(request, resolved, self._resolver.base_name)
        generation.usage.prompt_tokens = len(prompt)
        deltas = deadline.guard(self._run(generation, encoded.params, deadline.at))
        generation.deltas = deltas
        stack.push_async_callback(deltas.aclose)
        return generation

    @contextlib.contextmanager
    def _place_in_queue(self, request: GenerationRequest) -> Iterator[Place]:
        self.draining.check()
        try:
            with self._admission.enter(request.caller, request.sampling.n) as place:
                self._idle.clear()
                yield place
        finally:
            if self._admission.in_progress == 0:
                self._idle.set()

    async def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        try:
            return await self.text.encode(request.input, request.caller)
        except QueueFull:
            self._metrics.rejected("tokens")
            raise

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

    async def _run(
        self, generation: Generation, params: SamplingParams, deadline: float | None
    ) -> AsyncGenerator[Delta]:
        """All choices, their deltas in the order they come."""
        choices = [self._choice(generation, index, params, deadline) for index in range(generation.request.sampling.n)]
        if len(choices) == 1:
            async with contextlib.aclosing(choices[0].deltas()) as deltas:
                async for delta in deltas:
                    yield delta
            return
        async with contextlib.aclosing(merge([choice.deltas() for choice in choices])) as merged:
            async for delta in merged:
                yield delta

    def _choice(self, generation: Generation, index: int, params: SamplingParams, deadline: float | None) -> Choice:
        caller = generation.request.caller
        submit = Submit(
            request_id=self._sequence_id(generation.request.request_id),
            prompt_token_ids=generation.prompt_token_ids,
            sampling=_seeded(params, index),
            adaptation=generation.resolved.adaptation,
            report_routing=generation.routing is not None and not generation.routing.once,
            speculation=generation.speculation,
            deadline=deadline,
            tenant=caller.tenant,
            weight=caller.weight,
            cache_salt=caller.tenant,
        )
        return Choice(generation, index, submit.request_id, self._engine.submit(submit), self.text, self._metrics)

    def _sequence_id(self, request_id: str) -> str:
        """A name for a new sequence. Clients choose request ids; two that choose the same must not meet."""
        return f"{request_id}#{next(self._serials)}"


def _length_of_answer(options: SamplingOptions, params: SamplingParams) -> int:
    """What an answer counts in the queue, tokens: what the client allows, or the usual where it leaves that open."""
    is_open = options.max_tokens is None and options.usual_max_tokens is None
    return min(params.max_tokens, OPEN_ANSWER) if is_open else params.max_tokens


def _tally(request: GenerationRequest, resolved: Resolved, base: str) -> RoutingTally | None:
    auto = resolved.auto
    if request.report == "none" or auto is None:
        return None
    if auto.tier == "request":
        return RoutingTally([resolved.adapter.name if resolved.adapter else BASE_COLUMN], base, once=True)
    return RoutingTally(auto.columns, base)


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Choices differ by their seeds; without one each draws its own."""
    return params if params.seed is None else replace(params, seed=(params.seed + index) % NUM_SEEDS)


async def _nothing() -> AsyncGenerator[Delta]:
    """No deltas: what a generation has before it runs."""
    return
    yield
