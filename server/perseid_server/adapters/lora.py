"""PEFT's LoRA and rsLoRA: is this folder an adapter of this base, and what are its matrices?

    y = W x + s · B A x        A [r, d_in], B [d_out, r], s = α/r or α/√r

`check_adapter` decides before anything is accepted; whatever it does not understand it refuses by name, because an
adapter that quietly does nothing is worse than none. `lowering.py` turns a checked adapter into rank pages.
NumPy only: the API process checks, the engine lowers.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseid_server.adapters.lora_config import LoraConfig, read_lora_config
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import PARENT_OF_PROJECTION, BaseSpec, LinearShape

WEIGHTS_FILE = "adapter_model.safetensors"
PAGE_RANK = 16
"""Ranks in a page; the same number as `perseid_kernels.segments.PAGE_RANK`, which cannot be imported without torch."""

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(?P<layer>0|[1-9]\d{0,4})\.(?P<parent>\w+)\.(?P<projection>\w+)"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight",
    re.ASCII,  # a digit of another script would be the same layer under another name
)
_HEAD_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?medusa_head\.(?P<head>[0-7])\.0\.linear\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
MAX_HEADS = 8
"""Medusa heads whose first block an adapter may change; the same number as `speculation.heads_config.MAX_HEADS`."""

_OTHER_ARCHITECTURES = {
    "transformer.h.": "GPT-2, GPT-J, Falcon or BLOOM",
    "gpt_neox.": "GPT-NeoX",
    "decoder.layers.": "OPT or an encoder-decoder model",
    "encoder.": "an encoder model",
    "query_key_value": "Falcon, BLOOM, GPT-NeoX or ChatGLM",
    "c_attn": "GPT-2 or the first Qwen",
    "qkv_proj": "Phi-3",
    "Wqkv": "MPT or Phi",
    "block_sparse_moe": "Mixtral",
    ".experts.": "a mixture-of-experts model",
}


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One adapted projection."""

    layer: int
    projection: str  # a key of PARENT_OF_PROJECTION

    @property
    def module(self) -> str:
        """Hugging Face's name of the module."""
        return f"model.layers.{self.layer}.{PARENT_OF_PROJECTION[self.projection]}.{self.projection}"


@dataclass(frozen=True, slots=True, order=True)
class HeadSite:
    """The first block of a Medusa head, where an adapter changes it: drafts depend on it, answers do not."""

    head: int

    @property
    def module(self) -> str:
        """Medusa's name of the module."""
        return f"medusa_head.{self.head}.0.linear"


@dataclass(frozen=True, slots=True)
class Pair:
    """The matrices of one projection, by the names of their tensors."""

    a: str
    b: str
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an adapter holds, for people and metrics."""

    kind: str  # "LoRA" or "rsLoRA"
    rank: int  # the largest
    num_pages: int
    targets: tuple[str, ...]  # projections, in the base's order
    layers: tuple[int, ...]
    num_parameters: int
    nbytes: int  # of the tensor file
    trained_on: str | None  # as the adapter's config says
    warnings: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()  # Medusa heads whose first block it changes


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """An adapter that this base can serve."""

    pairs: Mapping[Site, Pair]
    head_pairs: Mapping[HeadSite, Pair]
    file: TensorFile
    info: AdapterInfo


def check_adapter(folder: Path, base: BaseSpec) -> CheckedAdapter:
    """Read a PEFT folder and hold it against the base. AdapterRejected names the key or tensor that is wrong."""
    config = read_lora_config(folder)
    file = _open_weights(folder)
    found, of_heads = _sites(file, base)
    pairs = {
        site: _pair(base.projections[site.projection], sides, config, file, base)
        for site, sides in sorted(found.items())
    }
    square = LinearShape(base.hidden_size, base.hidden_size)
    head_pairs = {site: _pair(square, sides, config, file, base) for site, sides in sorted(of_heads.items())}
    _refuse_missing_targets(config, {site.module for site in pairs} | {site.module for site in head_pairs})
    _any_effect(head_pairs, file)
    is_noop = not _any_effect(pairs, file)
    return CheckedAdapter(pairs, head_pairs, file, _info(config, pairs, head_pairs, file, base, is_noop=is_noop))


def _open_weights(folder: Path) -> TensorFile:
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterRejected(why_missing(folder, WEIGHTS_FILE))
    file = TensorFile.open(folder / WEIGHTS_FILE)
    if not file.tensors:
        raise AdapterRejected(f"{WEIGHTS_FILE} holds no tensors")
    return file


def why_missing(folder: Path, name: str) -> str:
    """What to say when one of an adapter's files is not there."""
    others = [other for other in ("adapter_model.bin", "adapter_model.pt") if (folder / other).exists()]
    if name == WEIGHTS_FILE and others:
        return (
            f"the adapter has no {name}; {others[0]} is not read, because such files can run code: "
            "load it with PEFT and save it again with safe_serialization=True"
        )
    return f"the adapter has no {name}; expected a PEFT adapter folder"


Sides = dict[str, str]
"""Tensor names by side, A and B."""


def _sites(file: TensorFile, base: BaseSpec) -> tuple[dict[Site, Sides], dict[HeadSite, Sides]]:
    """Tensor names by projection, and by Medusa head. Every tensor must find its place."""
    sites: dict[Site, Sides] = {}
    heads: dict[HeadSite, Sides] = {}
    for name in file.tensors:
        of_head = _HEAD_TENSOR_NAME.fullmatch(name)
        if of_head is not None:
            _put(heads.setdefault(HeadSite(int(of_head["head"])), {}), of_head["side"], name)
            continue
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterRejected(_why_unknown(name, base))
        projection, layer = match["projection"], int(match["layer"])
        if PARENT_OF_PROJECTION.get(projection) != match["parent"]:
            raise AdapterRejected(_why_unknown(name, base))
        if layer >= base.num_layers:
            raise AdapterRejected(
                f"tensor {name!r} is for layer {layer}; the base has layers 0 to {base.num_layers - 1}"
            )
        _put(sites.setdefault(Site(layer, projection), {}), match["side"], name)
    return sites, heads


def _put(sides: Sides, side: str, name: str) -> None:
    if side in sides:
        raise AdapterRejected(f"tensors {sides[side]!r} and {name!r} are for the same matrix")
    sides[side] = name


def _why_unknown(name: str, base: BaseSpec) -> str:
    if "lora_embedding" in name or "embed_tokens" in name or "lm_head" in name:
        return f"tensor {name!r}: adapters of embed_tokens and lm_head are not supported yet"
    if "lora_magnitude_vector" in name:
        return f"tensor {name!r}: DoRA is not supported yet"
    if name.endswith(".bias"):
        return f"tensor {name!r}: trained biases are not supported yet"
    for part, family in _OTHER_ARCHITECTURES.items():
        if part in name:
            return f"tensor {name!r} belongs to another architecture ({family}); this base is {base.architecture}"
    return (
        f"unknown tensor {name!r}; expected base_model.model.model.layers.N.(self_attn|mlp).PROJECTION.lora_A.weight "
        f"and lora_B.weight with PROJECTION one of {', '.join(base.projections)}"
    )


def _pair(shape: LinearShape, sides: Sides, config: LoraConfig, file: TensorFile, base: BaseSpec) -> Pair:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise AdapterRejected(f"tensor {sides[other]!r} has no lora_{side} beside it")
    module = sides["A"].removeprefix("base_model.model.").partition(".lora_A.")[0]  # the name that patterns match
    rank = config.rank_of(module)
    _check_shape(sides["A"], file, (rank, shape.in_features), config, base)
    _check_shape(sides["B"], file, (shape.out_features, rank), config, base)
    return Pair(sides["A"], sides["B"], rank, config.scale_of(module, rank))


def _check_shape(name: str, file: TensorFile, wanted: tuple[int, int], config: LoraConfig, base: BaseSpec) -> None:
    shape = file.tensors[name].shape
    if shape == wanted:
        return
    rank_axis = 0 if ".lora_A." in name else 1
    if len(shape) != 2:
        raise AdapterRejected(f"tensor {name!r} has the shape {list(shape)}; expected a matrix, {list(wanted)}")
    if shape[1 - rank_axis] == wanted[1 - rank_axis]:
        raise AdapterRejected(
            f"tensor {name!r} has rank {shape[rank_axis]}; the config says {wanted[rank_axis]} (r, rank_pattern)"
        )
    if shape == wanted[::-1]:
        raise AdapterRejected(f"tensor {name!r} is transposed: it has the shape {list(shape)}, expected {list(wanted)}")
    trained = f", trained on {config.trained_on}," if config.trained_on else ""
    raise AdapterRejected(
        f"tensor {name!r} has the shape {list(shape)}, this base needs {list(wanted)}: the adapter{trained} is for a "
        f"base of another size (this one is {base.name}, hidden size {base.hidden_size})"
    )


def _refuse_missing_targets(config: LoraConfig, adapted: Set[str]) -> None:
    """A module that the config names and the file does not hold would be silently left as it is."""
    for target in config.named_targets:
        if not any(module == target or module.endswith(f".{target}") for module in adapted):
            raise AdapterRejected(f"target_modules names {target!r}, but {WEIGHTS_FILE} has no tensor for it")


def _any_effect(pairs: Mapping[Any, Pair], file: TensorFile) -> bool:
    """Refuses NaN, Inf and what overflows when it is scaled; tells whether any product B·A is not zero for certain."""
    effect = False
    for pair in pairs.values():
        a = file.read(pair.a)
        _refuse_not_finite(pair.a, a)
        b = file.read(pair.b)
        _refuse_not_finite(pair.b, b)
        b = scaled(b, pair.scale)
        if not np.isfinite(b).all():
            raise AdapterRejected(
                f"tensor {pair.b!r} times its scale {pair.scale:g} (lora_alpha, alpha_pattern) exceeds float32"
            )
        effect = effect or bool(a.any() and b.any())
    return effect


def _refuse_not_finite(name: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise AdapterRejected(f"tensor {name!r} holds {'NaN' if np.isnan(values).any() else 'Inf'}")


def scaled(b: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """B times a scale. What overflows is infinite, and no warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        product: NDArray[np.float32] = b * np.float32(scale)
    return product


def _info(
    config: LoraConfig,
    pairs: Mapping[Site, Pair],
    head_pairs: Mapping[HeadSite, Pair],
    file: TensorFile,
    base: BaseSpec,
    *,
    is_noop: bool,
) -> AdapterInfo:
    rank = max(pair.rank for pair in (*pairs.values(), *head_pairs.values()))
    warnings = []
    if is_noop:
        warnings.append("every product of lora_B, lora_A and its scale is zero: the adapter changes nothing")
    if config.trained_on and config.trained_on.rstrip("/").rsplit("/", 1)[-1].lower() != base.name.lower():
        warnings.append(f"trained on {config.trained_on}, served on {base.name}")
    return AdapterInfo(
        kind="rsLoRA" if config.rslora else "LoRA",
        rank=rank,
        num_pages=-(-rank // PAGE_RANK),
        targets=tuple(name for name in base.projections if any(site.projection == name for site in pairs)),
        layers=tuple(sorted({site.layer for site in pairs})),
        num_parameters=sum(entry.nbytes // _WIDTH[entry.dtype] for entry in file.tensors.values()),
        nbytes=file.nbytes,
        trained_on=config.trained_on,
        warnings=tuple(warnings),
        heads=tuple(site.head for site in head_pairs),
    )


_WIDTH = {"F32": 4, "F16": 2, "BF16": 2}
