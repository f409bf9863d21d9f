"""perseid.v1.Generation."""

import uuid
from collections.abc import AsyncIterator, Iterable

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc
from perseid_server.access.caller import current_caller
from perseid_server.api.grpc.adaptation import (
    adapter_ref,
    auto_ref,
    blend_refs,
    read_adaptation,
    read_report,
    routing_of,
)
from perseid_server.api.grpc.errors import abort
from perseid_server.api.grpc.handlers import Context
from perseid_server.api.grpc.speculation import read_speculation, speculation_report
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.generation import Delta, Generation, Usage
from perseid_server.frontend.requests import (
    ChatInput,
    GenerationRequest,
    Input,
    SamplingOptions,
    TextInput,
    TokenInput,
)
from perseid_server.frontend.service import GenerationService
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import TokenLogprobs
from perseid_server.observe.record import current_call

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
_COPIED = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "logprobs", "n", "echo", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip
"""Optional fields of SamplingParams that SamplingOptions has under the same name."""


SHORTEST_TIMEOUT_S = 0.001
"""Of calls that come after their deadline, which is no mistake of the request."""


class GenerationServicer(generation_pb2_grpc.GenerationServicer):
    """Generate and GenerateStream."""

    def __init__(self, service: GenerationService, base: str) -> None:
        self._service = service
        self._base = base

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """Generate to the end."""
        try:
            async with self._service.generate(
                read_request(request, self._base, context.time_remaining())
            ) as generation:
                choices: dict[int, list[Delta]] = {}
                async for delta in generation:
                    choices.setdefault(delta.index, []).append(delta)
                return pb.GenerateResponse(
                    request_id=generation.request.request_id,
                    choices=[self._choice(index, deltas) for index, deltas in sorted(choices.items())],
                    adapter=adapter_ref(generation),
                    usage=_usage(generation.usage),
                    blend=blend_refs(generation),
                    auto=auto_ref(generation),
                    routing=routing_of(generation, choices.get(0, ()), summary=True),
                    speculation=speculation_report(generation),
                )
        except Exception as error:
            await abort(context, error)
            raise

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateChunk]:
        """Generate, telling tokens as they come."""
        try:
            async with self._service.generate(
                read_request(request, self._base, context.time_remaining())
            ) as generation:
                unfinished = generation.request.sampling.n
                is_first = True
                async for delta in generation:
                    unfinished -= delta.finish_reason is not None
                    yield self._chunk(generation, delta, is_first=is_first, is_last=unfinished == 0)
                    is_first = False
        except Exception as error:  # noqa: BLE001  the boundary: every error becomes a status
            await abort(context, error)

    def _choice(self, index: int, deltas: list[Delta]) -> pb.Choice:
        answer = [delta for delta in deltas if not delta.is_prompt]
        stop = deltas[-1].stop_reason
        return pb.Choice(
            index=index,
            text="".join(delta.text for delta in deltas),
            token_ids=[token for delta in answer for token in delta.token_ids],
            finish_reason=_FINISH[deltas[-1].finish_reason],
            logprobs=[told for delta in answer for told in _logprobs(delta.logprobs, self._service.text)],
            stop_reason=self._service.text.token_text(stop) if isinstance(stop, int) else stop or "",
        )

    def _chunk(self, generation: Generation, delta: Delta, *, is_first: bool, is_last: bool) -> pb.GenerateChunk:
        return pb.GenerateChunk(
            request_id=generation.request.request_id,
            index=delta.index,
            text=delta.text,
            token_ids=() if delta.is_prompt else delta.token_ids,
            logprobs=() if delta.is_prompt else _logprobs(delta.logprobs, self._service.text),
            finish_reason=_FINISH[delta.finish_reason],
            usage=_usage(generation.usage) if is_last else None,
            adapter=adapter_ref(generation) if is_first else None,
            blend=blend_refs(generation) if is_first else (),
            auto=auto_ref(generation) if is_first else None,
            routing=routing_of(generation, [delta], summary=is_last),
            speculation=speculation_report(generation) if is_last else None,
        )


def read_request(message: pb.GenerateRequest, base: str, time_remaining_s: float | None = None) -> GenerationRequest:
    """The message as the frontend's request. InvalidRequest names a missing field.

    `time_remaining_s`: to the call's deadline, if it has one.
    """
    return GenerationRequest(
        request_id=message.request_id or current_call().request_id or uuid.uuid4().hex,
        input=_input(message),
        adaptation=read_adaptation(message, base),
        sampling=_sampling(message.sampling),
        report=read_report(message),
        speculation=read_speculation(message),
        timeout_s=None if time_remaining_s is None else max(time_remaining_s, SHORTEST_TIMEOUT_S),
        caller=current_caller(),
    )


def _input(message: pb.GenerateRequest) -> Input:
    match message.WhichOneof("input"):
        case "prompt":
            return TextInput(message.prompt)
        case "token_ids":
            return TokenInput(tuple(message.token_ids.ids))
        case "chat":
            chat = message.chat
            for index, turn in enumerate(chat.messages):
                if not turn.role:
                    field = f"chat.messages[{index}].role"
                    raise InvalidRequest(f"{field}: expected a text such as user or assistant", field=field)
            turns = tuple({"role": turn.role, "content": turn.content} for turn in chat.messages)
            generation_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
            return ChatInput(turns, generation_prompt)
    raise InvalidRequest("input: expected one of prompt, chat, token_ids", field="input")


def _sampling(message: pb.SamplingParams) -> SamplingOptions:
    stated = {name: getattr(message, name) for name in _COPIED if message.HasField(name)}
    return SamplingOptions(
        **stated,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        accepted_draft_tokens=usage.accepted_tokens,
        rejected_draft_tokens=usage.rejected_tokens,
    )


def _logprobs(logprobs: Iterable[TokenLogprobs | None], text: TextProcessor) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=told.token_id,
            token=text.token_text(told.token_id),
            logprob=told.logprob,
            rank=told.rank,
            top=[pb.TopLogprob(token_id=i, token=text.token_text(i), logprob=value) for i, value in told.top],
        )
        for told in logprobs
        if told is not None
    ]
