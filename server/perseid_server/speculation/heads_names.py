"""Names of the tensors of Medusa heads, in the layouts that are about. Standard library only.

    Medusa v2, TGI          {h}.{l}.linear.weight [E, E], {h}.{l}.linear.bias [E]; logits by the base's lm_head
    Medusa v1, LoRAX, TGI   the same, and {h}.{L}.weight [V, E]: each head has its own lm_head behind its L layers
    vLLM                    blocks.{h}.layers.{l}.weight [E, E] (.bias [E]), and lm_heads.{h}.weight [V, E] or one
                            lm_head.weight [V, E] for all; token_map [V'] where V is cut to the ids it lists

All may begin with `medusa_head.` or `medusa_heads.`, and that with `model.` and `base_model.`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from perseid_server.errors import AdapterRejected, quoted
from perseid_server.speculation.heads_config import MAX_HEADS

MAX_LAYERS = 8
"""Residual blocks of a head; published heads have one or two."""

Layout = Literal["Medusa v2", "Medusa v1", "vLLM"]
K = TypeVar("K")

_PREFIX = r"(?:(?:base_model\.)?(?:model\.)?medusa_heads?\.)?"
_HEAD, _LAYER = r"(?P<head>0|[1-9]\d{0,3})", r"(?P<layer>0|[1-9]\d{0,3})"
_LINEAR = re.compile(rf"{_PREFIX}{_HEAD}\.{_LAYER}\.linear\.(?P<part>weight|bias)", re.ASCII)
_OWN_LM_HEAD = re.compile(rf"{_PREFIX}{_HEAD}\.{_LAYER}\.weight", re.ASCII)
_BLOCK = re.compile(rf"{_PREFIX}blocks\.{_HEAD}\.layers\.{_LAYER}\.(?P<part>weight|bias)", re.ASCII)
_LM_HEADS = re.compile(rf"{_PREFIX}lm_heads\.{_HEAD}\.weight", re.ASCII)
_LM_HEAD = re.compile(rf"{_PREFIX}lm_head\.weight", re.ASCII)
_TOKEN_MAP = re.compile(rf"{_PREFIX}token_map", re.ASCII)

_EXPECTED = (
    "expected {head}.{layer}.linear.weight or .bias and {head}.{layers}.weight as Medusa names them, or "
    "blocks.{head}.layers.{layer}.weight or .bias, lm_heads.{head}.weight, lm_head.weight and token_map as vLLM does"
)


@dataclass(frozen=True, slots=True)
class HeadNames:
    """The tensors by what they are. All heads have as many layers."""

    layout: Layout
    weights: tuple[tuple[str, ...], ...]  # [head][layer]
    biases: tuple[tuple[str | None, ...], ...]  # [head][layer]
    lm_heads: tuple[str, ...]  # none: the base's; one: for all heads; one for each head
    token_map: str | None = None

    @property
    def num_heads(self) -> int:
        """How many tokens they look ahead, beside the next one."""
        return len(self.weights)

    @property
    def num_layers(self) -> int:
        """Residual blocks of each head."""
        return len(self.weights[0])


@dataclass(slots=True)
class _Found:
    layers: dict[tuple[int, int, str], str] = field(default_factory=dict)  # head, layer, part → tensor
    own: dict[tuple[int, int], str] = field(default_factory=dict)  # head, place behind its layers → its lm_head
    lm_heads: dict[int, str] = field(default_factory=dict)
    lm_head: dict[str, str] = field(default_factory=dict)  # one for all heads
    token_map: dict[str, str] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # who names so ("Medusa", "vLLM") → the first such tensor


def sort_names(names: Iterable[str], *, first_lm_head_for_all: bool = False) -> HeadNames:
    """Give every tensor its place. AdapterRejected names one that has none, or a place that none has.

    `first_lm_head_for_all`: `lm_heads.0.weight` alone serves all heads, as vLLM's `original_lm_head` has it.
    """
    found = _Found()
    for name in names:
        _place(name, found)
    if not found.layers:
        raise AdapterRejected(f"the file holds no Medusa heads; {_EXPECTED}")
    if len(found.first) == 2:
        raise AdapterRejected(
            f"tensor {found.first['Medusa']!r} is named as Medusa does and tensor {found.first['vLLM']!r} as vLLM "
            "does; write all heads in one of the two layouts"
        )
    num_heads, num_layers = _counts(found)
    weights = tuple(
        tuple(found.layers[head, layer, "weight"] for layer in range(num_layers)) for head in range(num_heads)
    )
    biases = tuple(
        tuple(found.layers.get((head, layer, "bias")) for layer in range(num_layers)) for head in range(num_heads)
    )
    if "vLLM" in found.first:
        lm_heads = _vllm_lm_heads(found, num_heads, first_for_all=first_lm_head_for_all)
        return HeadNames("vLLM", weights, biases, lm_heads, found.token_map.get("map"))
    own = _own_lm_heads(found, num_heads, num_layers)
    return HeadNames("Medusa v1" if own else "Medusa v2", weights, biases, own)


def _place(name: str, found: _Found) -> None:
    if match := _LINEAR.fullmatch(name) or _BLOCK.fullmatch(name):
        _put(found.layers, (int(match["head"]), int(match["layer"]), match["part"]), name)
    elif match := _OWN_LM_HEAD.fullmatch(name):
        _put(found.own, (int(match["head"]), int(match["layer"])), name)
    elif match := _LM_HEADS.fullmatch(name):
        _put(found.lm_heads, int(match["head"]), name)
    elif _LM_HEAD.fullmatch(name):
        _put(found.lm_head, "all", name)
    elif _TOKEN_MAP.fullmatch(name):
        _put(found.token_map, "map", name)
    else:
        raise AdapterRejected(f"unknown tensor {quoted(name)}; {_EXPECTED}")
    by = "Medusa" if _LINEAR.fullmatch(name) or _OWN_LM_HEAD.fullmatch(name) else "vLLM"
    found.first.setdefault(by, name)


def _put(places: dict[K, str], place: K, name: str) -> None:
    if places.setdefault(place, name) != name:
        raise AdapterRejected(f"tensors {places[place]!r} and {name!r} are for the same place; keep one of them")


def _counts(found: _Found) -> tuple[int, int]:
    """Heads, and layers of each. Nothing may be missing in between."""
    layers: defaultdict[int, set[int]] = defaultdict(set)
    for (head, layer, part), name in found.layers.items():
        if part == "bias" and (head, layer, "weight") not in found.layers:
            raise AdapterRejected(f"tensor {name!r} has no weight beside it")
        if head >= MAX_HEADS:
            raise AdapterRejected(
                f"tensor {name!r} is for head {head}; expected at most {MAX_HEADS} heads, 0 to {MAX_HEADS - 1}: leave "
                "out those that look farthest ahead"
            )
        if layer >= MAX_LAYERS:
            raise AdapterRejected(f"tensor {name!r} is for layer {layer}; expected at most {MAX_LAYERS} layers")
        layers[head].add(layer)
    num_heads, num_layers = max(layers) + 1, max(max(of_head) for of_head in layers.values()) + 1
    for head in range(num_heads):
        missing = set(range(num_layers)) - layers[head]
        if missing:
            raise AdapterRejected(
                f"head {head} has no tensors of layer {min(missing)}; expected heads 0 to {num_heads - 1} with layers "
                f"0 to {num_layers - 1} each, without a gap"
            )
    return num_heads, num_layers


def _own_lm_heads(found: _Found, num_heads: int, num_layers: int) -> tuple[str, ...]:
    for (head, layer), name in found.own.items():
        if layer != num_layers or head >= num_heads:
            raise AdapterRejected(
                f"tensor {name!r} has no place; the lm_head of a head with {num_layers} layers is "
                f"{{head}}.{num_layers}.weight, of heads 0 to {num_heads - 1}"
            )
    return _complete({head: name for (head, _), name in found.own.items()}, num_heads, f"{{head}}.{num_layers}.weight")


def _vllm_lm_heads(found: _Found, num_heads: int, *, first_for_all: bool) -> tuple[str, ...]:
    for head, name in found.lm_heads.items():
        if head >= num_heads:
            raise AdapterRejected(f"tensor {name!r} is for head {head}; the layers are of heads 0 to {num_heads - 1}")
    if found.lm_head:
        shared = found.lm_head["all"]
        for name in found.lm_heads.values():
            raise AdapterRejected(
                f"tensor {shared!r} is the lm_head of all heads and {name!r} of one; expected one or the other"
            )
        return (shared,)
    if first_for_all and set(found.lm_heads) == {0}:
        return (found.lm_heads[0],)
    return _complete(found.lm_heads, num_heads, "lm_heads.{head}.weight")


def _complete(lm_heads: Mapping[int, str], num_heads: int, pattern: str) -> tuple[str, ...]:
    """All heads have an lm_head of their own, or none has."""
    missing = [head for head in range(num_heads) if head not in lm_heads]
    if lm_heads and missing:
        raise AdapterRejected(
            f"head {missing[0]} has no lm_head ({pattern}) while others have; expected one for each of {num_heads} "
            "heads, or none to use the base's"
        )
    return tuple(lm_heads[head] for head in range(num_heads)) if lm_heads else ()
