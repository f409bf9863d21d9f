"""The JSON that clients get: completions and chat completions, whole and as chunks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from perseid_server.frontend.generation import Delta, Generation, Usage
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.sampling_params import TokenLogprobs

Json = dict[str, Any]


class Shape(Protocol):
    """How one of the two routes writes its answers."""

    prefix: str

    def head(self, generation: Generation, *, chunk: bool) -> Json: ...

    def opening(self, index: int) -> Json | None: ...

    def delta(self, delta: Delta) -> Json: ...

    def choice(self, index: int, deltas: Sequence[Delta]) -> Json: ...


def usage_json(usage: Usage) -> Json:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.rejected_tokens,
        },
    }


def perseid_json(generations: Sequence[Generation], deltas: Sequence[Delta] = ()) -> Json:
    """What only Perseid tells, under one key, so that strict clients are untouched.

    With several prompts each may be served by another choice of `auto`: `prompts` tells them all.
    """
    first = generations[0]
    told = _adapted_json(first) | {"cached_tokens": first.usage.cached_tokens}
    if len(generations) > 1 and first.resolved.auto is not None:
        told |= {"adapter": None, "auto": None, "prompts": [_adapted_json(each) for each in generations]}
    if first.routing is not None:
        summary = {"prompt": dict(first.routing.prompt), "completion": dict(first.routing.completion)}
        told["routing"] = summary | token_routing_json(deltas)
    if first.is_lossy:
        told["speculation"] = {"acceptance": first.speculation.acceptance, "lossy": True}
    return told


def token_routing_json(deltas: Sequence[Delta]) -> Json:
    """For each token of these deltas (name, share) of its top adapters; nothing where that was not asked for."""
    tokens = [token for delta in deltas for token in delta.routing]
    return {"tokens": tokens} if tokens else {}


def _adapted_json(generation: Generation) -> Json:
    """What adapted the base: one adapter, a blend, or `auto`, which may have chosen one adapter."""
    resolved, adapter = generation.resolved, generation.adapter
    told: Json = {"adapter": {"name": adapter.name, "version": adapter.version} if adapter else None}
    if resolved.blend:
        told["adapters"] = [
            {"name": each.name, "version": each.version, "weight": weight} for each, weight in resolved.blend
        ]
    if resolved.auto is not None:
        auto = resolved.auto
        told["auto"] = {
            "gate_set": auto.gate_set.name,
            "version": auto.gate_set.version,
            "tier": auto.tier,
            "joined": list(auto.joined),
        }
    return told


class _Base:
    """What both shapes share."""

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(self, model: str, text: TextProcessor) -> None:
        self._model = model
        self._text = text

    def head(self, generation: Generation, *, chunk: bool) -> Json:
        """The fields before the choices."""
        return {
            "id": generation.request.request_id,
            "object": self.chunk if chunk else self.whole,
            "created": generation.created,
            "model": self._model,
        }

    def opening(self, index: int) -> Json | None:  # noqa: ARG002
        """What a stream says of a choice before its first text."""
        return None


class CompletionShape(_Base):
    """POST /v1/completions."""

    prefix = "cmpl-"
    whole = chunk = "text_completion"

    def __init__(self, model: str, text: TextProcessor, *, skip_special_tokens: bool = True) -> None:
        super().__init__(model, text)
        self._skip_special_tokens = skip_special_tokens
        self._offsets: Counter[int] = Counter()  # by choice: characters of the tokens told so far

    def delta(self, delta: Delta) -> Json:
        """A chunk's choice."""
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.index, [delta]) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def choice(self, index: int, deltas: Sequence[Delta]) -> Json:
        """A whole answer's choice."""
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(index, deltas) if any(delta.logprobs for delta in deltas) else None,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, index: int, deltas: Iterable[Delta]) -> Json:
        """Four parallel lists, a place for each token. The first prompt token of an echo has no probability.

        Offsets follow the tokens, not the text: text may still be held back when its tokens are told.
        """
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[Mapping[str, float] | None] = []
        offsets: list[int] = []
        for delta in deltas:
            for token_id, logprob in zip(delta.token_ids, delta.logprobs, strict=False):
                tokens.append(self._text.token_text(token_id))
                offsets.append(self._offsets[index])
                self._offsets[index] += self._text.num_characters(
                    token_id, skip_special_tokens=self._skip_special_tokens
                )
                values.append(logprob.logprob if logprob else None)
                top.append(self._top(logprob) if logprob else None)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _top(self, logprob: TokenLogprobs) -> Mapping[str, float]:
        chosen = {self._text.token_text(logprob.token_id): logprob.logprob}
        return {self._text.token_text(token): value for token, value in logprob.top} | chosen


class ChatShape(_Base):
    """POST /v1/chat/completions."""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        """The role comes first."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, delta: Delta) -> Json:
        """A chunk's choice."""
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or delta.token_ids else {},
            "logprobs": self._logprobs([delta]) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def choice(self, index: int, deltas: Sequence[Delta]) -> Json:
        """A whole answer's choice."""
        content = "".join(delta.text for delta in deltas)
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None, "tool_calls": []},
            "logprobs": self._logprobs(deltas) if any(delta.logprobs for delta in deltas) else None,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, deltas: Iterable[Delta]) -> Json:
        content = [
            {
                **self._token(logprob.token_id, logprob.logprob),
                "top_logprobs": [self._token(token, value) for token, value in logprob.top],
            }
            for delta in deltas
            for logprob in delta.logprobs
            if logprob
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self._text.token_text(token_id),
            "logprob": logprob,
            "bytes": list(self._text.token_bytes(token_id)),
        }
