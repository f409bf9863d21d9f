"""Bodies that fit the document, bent towards what this server can do: else nearly all would be answered with 404 or
400, and few answers would be looked at."""

from collections.abc import Callable
from random import Random
from typing import Any

from perseid_server.api.http.schemas import ChatBody, CompletionBody

Body = dict[str, Any]

MODELS = ("tiny", "tiny", "one", "tiny:two", "auto", "auto:gates", "nobody")
NAMES = ("one", "two", "gates", "heads", "mine", "mine")
SOURCES = ("source", "source", "gates", "heads", "nowhere", "/etc", "org/name")
FIELDS = {*CompletionBody.model_fields, *ChatBody.model_fields}
ODD = (
    "adapters",
    "suffix",
    "best_of",
    "timeout",
    "typical",
    "top_logprobs",
    "stream_options",
    "routing",
    "auto",
    "stop",
)
"""Fields that ask for something else as well, or for what few requests want."""


def likely(body: Body) -> Body:
    """The same body with likely names and sizes. What the body is decides what it becomes."""
    random, bent = Random(repr(sorted(body.items(), key=str))), dict(body)
    for name, bend in _BENDS.items():
        if name in bent:
            bent[name] = bend(random, bent[name])
    if "lora_path" in bent:
        bent["load_inplace"] = True
    return _request(random, bent) if {"model", "prompt"} <= set(bent) or {"model", "messages"} <= set(bent) else bent


def _request(random: Random, body: Body) -> Body:
    """A request to generate."""
    bent = {name: value for name, value in body.items() if name in FIELDS or random.random() < 0.02}
    for name in ODD:
        if name in bent and random.random() < 0.8:
            del bent[name]
    bent |= {"max_tokens": random.choice((1, 2, 3)), "min_tokens": 0}
    if bent.get("temperature") == 0 and random.random() < 0.9:
        bent["n"] = 1
    if bent.get("model", "").startswith("auto") and random.random() < 0.5:
        bent |= {"routing": random.choice(("summary", "tokens")), "n": 1}
    if bent.get("stream_options") is not None:
        bent["stream"] = True
    if "max_completion_tokens" in bent:
        bent["max_completion_tokens"] = 2
    return bent


def _prompt(random: Random, prompt: Any) -> Any:
    if isinstance(prompt, list):
        return [_prompt(random, one) for one in prompt[:3]] or "hi"
    return (prompt or "hi") if isinstance(prompt, str) else int(prompt) % 256


def _messages(random: Random, messages: Any) -> Any:
    return [{"role": "user", "content": "hi"}] if random.random() < 0.6 else messages


def _bias(_: Random, bias: Any) -> Any:
    return {str(int(token) % 256): value for token, value in bias.items()} if bias else bias


def _tokens(_: Random, tokens: Any) -> Any:
    return [int(token) % 256 for token in tokens] if tokens else tokens


_BENDS: dict[str, Callable[[Random, Any], Any]] = {
    "model": lambda random, _: random.choice(MODELS),
    "lora_name": lambda random, _: random.choice(NAMES),
    "lora_path": lambda random, _: random.choice(SOURCES),
    "prompt": lambda random, prompt: prompt if prompt is None else _prompt(random, prompt),
    "messages": _messages,
    "logit_bias": _bias,
    "stop_token_ids": _tokens,
    "tokens": _tokens,
    "top_k": lambda _, top_k: top_k if top_k is None else int(top_k) % 258,
    "n": lambda random, n: n if n is None else random.choice((1, 1, 2, 5)),
    "chat_template_kwargs": lambda random, value: value if random.random() < 0.2 else None,
    "continue_final_message": lambda random, _: random.random() < 0.1,
}
