"""Bad input, once for both transports: what is sent, which status comes back, and which field the message names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from perseid_protos.perseid.v1 import generation_pb2 as pb

Json = Mapping[str, Any]
NAMELESS: Json = {}


@dataclass(frozen=True)
class Bad:
    """One kind of bad input. `http`: changes to a good completion's body; `sampling` and `request`: to a good message.

    None: this transport cannot express it.
    """

    name: str
    names: str  # what the message must name
    http: Json | None = None
    sampling: Json | None = None
    request: Json | None = None
    status: int = 400
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    chat: bool = field(default=False)

    def message(self) -> pb.GenerateRequest:
        """The bad gRPC request."""
        sampling = {"max_tokens": 4} | dict(self.sampling or {})
        return pb.GenerateRequest(
            **({"prompt": "hi"} if self.request is None else dict(self.request)), sampling=pb.SamplingParams(**sampling)
        )

    def body(self) -> dict[str, Any]:
        """The bad HTTP body."""
        good = {"messages": [{"role": "user", "content": "hi"}]} if self.chat else {"prompt": "hi"}
        return {"model": "tiny", "max_tokens": 4} | good | dict(self.http or {})

    def __str__(self) -> str:
        return self.name


def both(name: str, names: str, **fields: Any) -> Bad:
    """The same fields of sampling on both transports."""
    return Bad(name, names, fields, fields)


def http_only(name: str, names: str, *, chat: bool = False, **fields: Any) -> Bad:
    """What protobuf's types leave no way to say."""
    return Bad(name, names, fields, chat=chat)


def unknown_adapter(name: str, adapter: str) -> Bad:
    """An adapter that is not there."""
    return Bad(
        name, "adapter|model", {"model": adapter}, request={"prompt": "hi", "adapter": adapter}, status=404,
        code=grpc.StatusCode.NOT_FOUND,
    )  # fmt: skip


RANGES = [
    both("temperature below", "temperature", temperature=-0.1),
    both("temperature above", "temperature", temperature=2.5),
    both("temperature NaN", "temperature", temperature=math.nan),
    both("temperature infinite", "temperature", temperature=math.inf),
    both("top_p zero", "top_p", top_p=0.0),
    both("top_p above", "top_p", top_p=2.0),
    both("top_k beyond the vocabulary", "top_k", top_k=259),
    http_only("top_k negative", "top_k", top_k=-5),
    both("min_p above", "min_p", min_p=1.5),
    both("repetition_penalty zero", "repetition_penalty", repetition_penalty=0.0),
    both("repetition_penalty so small that logits overflow", "repetition_penalty", repetition_penalty=1e-38),
    both("presence_penalty below", "presence_penalty", presence_penalty=-3.0),
    both("frequency_penalty NaN", "frequency_penalty", frequency_penalty=math.nan),
    both("n zero", "n", n=0),
    both("n too large", "n", n=10_000),
    both("several greedy answers", "n", n=2, temperature=0.0),
    both("max_tokens zero", "max_tokens", max_tokens=0),
    both("max_tokens beyond the context", "max_tokens is 100000", max_tokens=100_000),
    http_only("max_tokens negative", "max_tokens", max_tokens=-1),
    http_only("max_tokens astronomical", "max_tokens", max_tokens=10**30),
    both("min_tokens above max_tokens", "min_tokens", min_tokens=5),
    both("logprobs too large", "logprobs", logprobs=21),
    http_only("logprobs negative", "logprobs", logprobs=-1),
    http_only("seed above", "seed", seed=2**64),
    http_only("seed below", "seed", seed=-(2**63) - 1),
    both("too many stops", "stop", stop=["x"] * 17),
    both("stop too long", "stop", stop=["x" * 1025]),
    both("stop empty", "stop", stop=[""]),
    both("stop token out of vocabulary", "stop_token_ids", stop_token_ids=[258]),
    Bad("bias out of vocabulary", "logit_bias", {"logit_bias": {"258": 1.0}}, {"logit_bias": {258: 1.0}}),
    Bad("bias too large", "logit_bias", {"logit_bias": {"1": 101.0}}, {"logit_bias": {1: 101.0}}),
    Bad("bias NaN", "logit_bias", {"logit_bias": {"1": math.nan}}, {"logit_bias": {1: math.nan}}),
    http_only("bias key is no number", "logit_bias", logit_bias={"x": 1.0}),
    http_only("bias key negative", "logit_bias", logit_bias={"-1": 1.0}),
    http_only("bias key astronomical", "logit_bias", logit_bias={"9" * 5000: 1.0}),
    http_only("bias key another alphabet's digit", "logit_bias", logit_bias={"١": 1.0}),
]

INPUTS = [
    Bad("empty prompt", "prompt", {"prompt": ""}, request={"prompt": ""}),
    Bad("no tokens", "prompt", {"prompt": []}, request={"token_ids": pb.TokenIds()}),
    Bad("token out of vocabulary", "prompt", {"prompt": [1, 258]}, request={"token_ids": pb.TokenIds(ids=[1, 258])}),
    Bad("prompt longer than the context", "300 tokens|256", {"prompt": "x" * 300}, request={"prompt": "x" * 300}),
    http_only("token negative", "prompt", prompt=[-1]),
    http_only("one empty prompt of several", "prompt", prompt=["a", ""]),
    http_only("too many prompts", "prompt", prompt=["a"] * 257),
    http_only("prompts of mixed kinds", "prompt", prompt=["a", 1]),
    Bad("no input", "input", request={}),
    Bad("empty conversation", "messages", {"messages": []}, request={"chat": pb.Chat()}, chat=True),
    Bad(
        "unknown role", "messages: the chat template refuses them: unknown role judge",
        {"messages": [{"role": "judge", "content": "hi"}]},
        request={"chat": pb.Chat(messages=[pb.ChatMessage(role="judge", content="hi")])}, chat=True,
    ),
    Bad(
        "unknown role of a huge name", "messages: the chat template refuses them: unknown role 語語",
        {"messages": [{"role": "語" * 50_000, "content": "hi"}]},
        request={"chat": pb.Chat(messages=[pb.ChatMessage(role="語" * 50_000, content="hi")])}, chat=True,
    ),
    Bad(
        "no role", "messages|role", {"messages": [{"content": "hi"}]},
        request={"chat": pb.Chat(messages=[pb.ChatMessage(content="hi")])}, chat=True,
    ),
    http_only("role of another type", "messages.0.role", chat=True, messages=[{"role": 1, "content": "hi"}]),
    http_only("no content", "messages.0.content", chat=True, messages=[{"role": "user"}]),
    http_only("content of another type", "messages.0.content", chat=True, messages=[{"role": "user", "content": 1}]),
    http_only(
        "image part", "messages.0.content.1", chat=True,
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
    ),
    http_only(
        "part without text", "messages.0.content.0", chat=True,
        messages=[{"role": "user", "content": [{"type": "text"}]}],
    ),
    http_only("message is no object", "messages", chat=True, messages=["hi"]),
    http_only("prompt in a conversation", "prompt", chat=True, prompt="hi"),
    http_only("tools", "tools", chat=True, tools=[{"type": "function", "function": {"name": "f"}}]),
    http_only("special tokens of a template", "add_special_tokens", chat=True, add_special_tokens=True),
    http_only("JSON answers", "response_format", chat=True, response_format={"type": "json_object"}),
    http_only("top_logprobs alone", "top_logprobs", chat=True, top_logprobs=2),
    http_only("top_logprobs too large", "logprobs", chat=True, logprobs=True, top_logprobs=21),
    http_only("template's messages", "chat_template_kwargs", chat=True, chat_template_kwargs={"messages": []}),
    http_only("unknown field", "temprature", temprature=0.5),
    http_only("best_of", "best_of", best_of=3),
    http_only("suffix", "suffix", suffix="x"),
    http_only("stream_options without stream", "stream_options", stream_options={"include_usage": True}),
    Bad("request id with a line break", "request_id", request={"prompt": "hi", "request_id": "a\nb"}),
    Bad("request id too long", "request_id", request={"prompt": "hi", "request_id": "a" * 129}),
]  # fmt: skip

ADAPTERS = [
    unknown_adapter("unknown adapter", "nobody"),
    unknown_adapter("path upwards", "../../etc/passwd"),
    unknown_adapter("absolute path", "/etc/passwd"),
    unknown_adapter("NUL in a name", "a\0b"),
    unknown_adapter("name with quotes and line breaks", "'\n\"%s{}"),
    unknown_adapter("huge name", "x" * 100_000),
    unknown_adapter("huge name in another script", "語" * 50_000),
    Bad(
        "auto without gates",
        "no gate set is loaded",
        {"model": "auto"},
        request={"prompt": "hi", "auto": pb.Auto()},
        status=404,
        code=grpc.StatusCode.NOT_FOUND,
    ),
    Bad("auto behind the base", "no gate set is loaded", {"model": "tiny:auto"}, status=404),
    Bad(
        "unknown gate set",
        "auto.gate_set",
        {"model": "auto:nobody"},
        request={"prompt": "hi", "auto": pb.Auto(gate_set="nobody")},
        status=404,
        code=grpc.StatusCode.NOT_FOUND,
    ),
    Bad("auto as an adapter", "adapter", request={"prompt": "hi", "adapter": "auto"}, code=grpc.StatusCode.NOT_FOUND),
    Bad("unknown adapter behind the base", "nobody", {"model": "tiny:nobody"}, status=404),
]


def blend(name: str, names: str, *parts: tuple[str, float], **expected: Any) -> Bad:
    """A blend of these adapters."""
    message = pb.Blend(adapters=[pb.WeightedAdapter(name=each, weight=weight) for each, weight in parts])
    body = [{"name": each, "weight": weight} for each, weight in parts]
    return Bad(name, names, {"adapters": body}, request={"prompt": "hi", "blend": message}, **expected)


def auto(name: str, names: str, *, model: str = "auto", report: int = 0, **options: Any) -> Bad:
    """Options of auto on both transports."""
    message = {"prompt": "hi", "auto": pb.Auto(**options), "routing_report": report}
    return Bad(name, names, {"model": model, "auto": options}, request=message)


ADAPTATIONS = [
    blend("blend of nothing", "adapters: 0 to blend"),
    blend("blend of nine", "adapters: 9 to blend", *((f"a{i}", 1.0) for i in range(9))),
    blend("blend of one twice", "adapters.1.name", ("a", 1.0), ("a", 0.5)),
    blend("blend weight NaN", "adapters.0.weight", ("a", math.nan)),
    blend("blend weight infinite", "adapters.1.weight", ("a", 1.0), ("b", math.inf)),
    blend("blend weight above", "adapters.1.weight is 16.5; expected a number in [-16, 16]", ("a", 1.0), ("b", 16.5)),
    blend(
        "blend of an unknown adapter", "adapters.0.name", ("nobody", 1.0), status=404, code=grpc.StatusCode.NOT_FOUND
    ),
    http_only("blend weight of another type", "adapters.0.weight", adapters=[{"name": "a", "weight": "1"}]),
    http_only("blend without a name", "adapters.0.name", adapters=[{"weight": 1}]),
    http_only("blend with an unknown field", "adapters.0.scale", adapters=[{"name": "a", "scale": 1}]),
    http_only("blend that is no list", "adapters", adapters={"a": 1}),
    http_only("blend with an adapter as model", "adapters", model="one", adapters=[{"name": "a"}]),
    http_only("blend with auto as model", "adapters", model="auto", adapters=[{"name": "a"}]),
    http_only("blend beside auto", "adapters", adapters=[{"name": "a"}], auto={}),
    auto("auto k zero", "auto.k", k=0),
    http_only("auto k negative", "auto.k", model="auto", auto={"k": -1}),
    http_only("auto k of another type", "auto.k", model="auto", auto={"k": 1.5}),
    auto("auto temperature zero", "auto.temperature", temperature=0.0),
    auto("auto temperature above", "auto.temperature", temperature=100.5),
    auto("auto temperature NaN", "auto.temperature", temperature=math.nan),
    auto("auto temperature infinite", "auto.temperature", temperature=math.inf),
    auto("auto allow of too many", "auto.allow has 513 names", allow=["a"] * 513),
    http_only("auto allow of nobody", "auto.allow", model="auto", auto={"allow": []}),
    http_only("auto allow of another type", "auto.allow.0", model="auto", auto={"allow": [1]}),
    http_only("auto tier unknown", "auto.tier", model="auto", auto={"tier": "best"}),
    http_only("auto null of another type", "auto.null", model="auto", auto={"null": "no"}),
    http_only("auto with an unknown field", "auto.top_k", model="auto", auto={"top_k": 2}),
    http_only("auto for the base", "auto", auto={}),
    http_only("auto for an adapter", "auto", model="one", auto={"k": 1}),
    http_only("two gate sets", "auto.gate_set", model="auto:one", auto={"gate_set": "two"}),
    Bad("auto tier of another enum", "auto.tier", request={"prompt": "hi", "auto": pb.Auto(tier=9)}),
    Bad("report of another enum", "routing_report", request={"prompt": "hi", "routing_report": 9}),
    Bad("report of the base", "routing", {"routing": "summary"}, request={"prompt": "hi", "routing_report": 2}),
    Bad(
        "report of an adapter",
        "routing",
        {"model": "one", "routing": "tokens"},
        request={"prompt": "hi", "adapter": "one", "routing_report": 3},
    ),
    http_only("report unknown", "routing", routing="all"),
    http_only("report of several answers", "n", model="auto", routing="summary", n=2),
    http_only("report of several prompts", "routing", model="auto", routing="summary", prompt=["a", "b"]),
]


def drafts(name: str, names: str, body: Json, **message: Any) -> Bad:
    """Fields of speculation on both transports."""
    return Bad(name, names, body, request={"prompt": "hi"} | message)


def typical(name: str, names: str, **options: float) -> Bad:
    """Options of typical acceptance on both transports."""
    body = {"acceptance": "typical", "typical": options}
    return drafts(name, names, body, acceptance=pb.ACCEPTANCE_TYPICAL, typical=pb.Typical(**options))


SPECULATION = [
    drafts("speculation unknown", "speculation is", {"speculation": "draft"}, speculation=9),
    drafts("speculation by heads nobody loaded", "speculation", {"speculation": "medusa"}, speculation=2),
    http_only("speculation empty", "speculation", speculation=""),
    http_only("speculation huge", "speculation", speculation="x" * 100_000),
    http_only("speculation in a conversation", "speculation", chat=True, speculation="medusa"),
    drafts("acceptance unknown", "acceptance is", {"acceptance": "greedy"}, acceptance=7),
    drafts("typical alone", "typical", {"typical": {}}, typical=pb.Typical()),
    drafts(
        "typical with exact acceptance", "typical", {"acceptance": "exact", "typical": {"epsilon": 0.1}},
        acceptance=pb.ACCEPTANCE_EXACT, typical=pb.Typical(epsilon=0.1),
    ),
    typical("typical epsilon zero", "typical.epsilon is 0; expected a number in (0, 1]", epsilon=0.0),
    typical("typical epsilon above", "typical.epsilon", epsilon=1.5),
    typical("typical epsilon NaN", "typical.epsilon", epsilon=math.nan),
    typical("typical delta below", "typical.delta", epsilon=0.1, delta=-0.3),
    typical("typical delta infinite", "typical.delta", delta=math.inf),
    http_only("typical of another type", "typical", acceptance="typical", typical=0.1),
    http_only("typical epsilon of another type", "typical.epsilon", acceptance="typical", typical={"epsilon": "0.1"}),
    http_only("typical with an unknown field", "typical.alpha", acceptance="typical", typical={"alpha": 0.1}),
]  # fmt: skip

TYPES = [
    http_only(f"{name} of another type", name, **{name: value})
    for name, value in {
        "model": 1, "prompt": 5, "stream": "yes", "max_tokens": "4", "temperature": "hot", "top_p": [1], "top_k": 1.5,
        "seed": "x", "stop": 5, "stop_token_ids": ["x"], "n": True, "logit_bias": [1], "logprobs": "a", "echo": "x",
        "stream_options": "x", "speculation": True, "acceptance": 1, "ignore_eos": 1,
        "min_tokens": None, "min_p": {}, "skip_special_tokens": "no",
    }.items()
] + [
    http_only("messages of another type", "messages", chat=True, messages="hi"),
    http_only("model left out", "model", model=None),
    http_only("temperature beyond floats", "temperature", temperature=10**400),
    http_only("stop of mixed types", "stop", stop=["a", 1]),
    http_only("prompt null", "prompt", prompt=None),
]  # fmt: skip

ALL = [*RANGES, *INPUTS, *ADAPTERS, *ADAPTATIONS, *SPECULATION, *TYPES]
