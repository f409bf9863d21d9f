"""A folder with Medusa heads as data that may be hostile: are these heads of this base, and what are their numbers?

    x_0 = h,   x_{l+1} = x_l + SiLU(W_l x_l + b_l),   logits = M x_L

with h [E] the base's hidden state after its last norm, W [E, E], b [E], M [V', E] the base's lm_head or the heads' own;
V' is the vocabulary V, or the part of it that the heads choose among (arXiv:2401.10774, section 2.1.1).

`check_heads` decides before anything is accepted, as `check_adapter` does for adapters: what it does not understand it
refuses by name. NumPy only: the API process checks, the engine loads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import BaseSpec
from perseid_server.speculation.heads_config import (
    CONFIG_FILE,
    HeadsConfig,
    HeadsConfigError,
    default_accuracy,
    parse_config,
)
from perseid_server.speculation.heads_folder import FOREIGN_CONFIG_FILE, read_foreign_config, read_small, tensors_file
from perseid_server.speculation.heads_names import HeadNames, Layout, sort_names

HeadMatrices = tuple[tuple[NDArray[np.float32], ...], ...]


@dataclass(frozen=True, slots=True)
class HeadsInfo:
    """What heads hold, for people and metrics."""

    num_heads: int
    num_layers: int  # residual blocks of each head
    layout: Layout
    shares_lm_head: bool  # whether the logits come from the base's lm_head
    adapter: str | None  # content hash of the adapter they were trained for, as their file says; None: the base
    num_draft_tokens: int  # V', the tokens that they choose among
    nbytes: int  # of the tensor file
    num_parameters: int = 0
    accuracy: tuple[tuple[float, ...], ...] = ()  # [head][rank]: how often that candidate was right
    has_accuracy: bool = False  # whether that was measured with these heads rather than taken from the paper
    trained_on: str | None = None  # the base, as their config says
    warnings: tuple[str, ...] = ()
    kind: str = "heads"


@dataclass(frozen=True, slots=True)
class HeadsTensors:
    """The numbers, in one form whatever the layout."""

    weights: HeadMatrices  # [head][layer] of [E, E]
    biases: tuple[tuple[NDArray[np.float32] | None, ...], ...]  # [head][layer] of [E]
    lm_heads: tuple[NDArray[np.float32], ...]  # [V', E]; none: the base's; one: for all heads; one for each head


@dataclass(frozen=True, slots=True)
class CheckedHeads:
    """Heads that this base can use. Their numbers stay in the file until they are asked for."""

    names: HeadNames
    file: TensorFile
    rows: NDArray[np.int64] | None  # of the file's lm_heads, in the order of the draft vocabulary; None: as they are
    config: HeadsConfig
    info: HeadsInfo

    def tensors(self) -> HeadsTensors:
        """Read all. AdapterRejected when the file is gone or shorter since it was checked."""
        read = self.file.read
        return HeadsTensors(
            tuple(tuple(read(name) for name in of_head) for of_head in self.names.weights),
            tuple(tuple(None if name is None else read(name) for name in of_head) for of_head in self.names.biases),
            tuple(self._rows(read(name)) for name in self.names.lm_heads),
        )

    def _rows(self, lm_head: NDArray[np.float32]) -> NDArray[np.float32]:
        return lm_head if self.rows is None else lm_head[self.rows]


def check_heads(folder: Path, base: BaseSpec) -> CheckedHeads:
    """Read a folder with heads and hold it against the base. AdapterRejected names the key or tensor that is wrong."""
    file = TensorFile.open(tensors_file(folder), integers=True)
    foreign = read_foreign_config(folder)
    names = sort_names(file.tensors, first_lm_head_for_all=foreign.get("original_lm_head") is True)
    config, has_accuracy = _config(folder, names, base)
    config, order = _with_token_map(config, names, file, base)
    rows = _check_shapes(names, file, config, order, base)
    for name in file.tensors:
        if name != names.token_map:
            _refuse_not_finite(name, file.read(name))
    info = HeadsInfo(
        num_heads=names.num_heads,
        num_layers=names.num_layers,
        layout=names.layout,
        shares_lm_head=not names.lm_heads,
        adapter=config.adapter,
        num_draft_tokens=len(config.draft_vocabulary or range(base.vocab_size)),
        nbytes=file.nbytes,
        num_parameters=sum(prod(entry.shape) for name, entry in file.tensors.items() if name != names.token_map),
        accuracy=config.accuracy,
        has_accuracy=has_accuracy,
        trained_on=_trained_on(foreign),
        warnings=_warnings(foreign, names, base),
    )
    return CheckedHeads(names, file, rows, config, info)


def _config(folder: Path, names: HeadNames, base: BaseSpec) -> tuple[HeadsConfig, bool]:
    """The configuration, and whether its accuracy was measured."""
    raw = read_small(folder / CONFIG_FILE)
    assumed = default_accuracy(names.num_heads)
    if raw is None:
        return HeadsConfig(accuracy=assumed), False
    try:
        config = parse_config(raw, names.num_heads, base.vocab_size)
    except HeadsConfigError as error:
        raise AdapterRejected(str(error)) from error
    return config, config.accuracy != assumed


def _with_token_map(
    config: HeadsConfig, names: HeadNames, file: TensorFile, base: BaseSpec
) -> tuple[HeadsConfig, NDArray[np.int64] | None]:
    """The draft vocabulary as a token map tells it, ascending; and the order of its rows, where it tells one."""
    if names.token_map is None:
        return config, None
    shape = file.tensors[names.token_map].shape
    if len(shape) != 1 or not 1 <= shape[0] <= base.vocab_size:
        raise AdapterRejected(
            f"tensor {names.token_map!r} has the shape {list(shape)}; expected a list of 1 to {base.vocab_size} token "
            "ids of this base"
        )
    ids = file.read_integers(names.token_map)
    order = np.argsort(ids, kind="stable")
    ascending = ids[order]
    if ascending[0] < 0 or ascending[-1] >= base.vocab_size or (np.diff(ascending) == 0).any():
        raise AdapterRejected(
            f"tensor {names.token_map!r} holds a token id twice or one that this base does not have; expected each at "
            f"most once, from 0 to {base.vocab_size - 1}"
        )
    vocabulary = tuple(ascending.tolist())
    if config.draft_vocabulary not in (None, vocabulary):
        raise AdapterRejected(
            f"tensor {names.token_map!r} lists other tokens than draft_vocabulary of {CONFIG_FILE}; leave one out"
        )
    return replace(config, draft_vocabulary=vocabulary), order


def _check_shapes(
    names: HeadNames, file: TensorFile, config: HeadsConfig, order: NDArray[np.int64] | None, base: BaseSpec
) -> NDArray[np.int64] | None:
    """Refuse wrong shapes. Returns which rows of the lm_heads are the draft vocabulary's, in its order."""
    size = base.hidden_size
    for of_head in names.weights:
        for name in of_head:
            _check_shape(file, name, ((size, size),), base)
    for name in (name for of_head in names.biases for name in of_head if name is not None):
        _check_shape(file, name, ((size,),), base)
    vocabulary = config.draft_vocabulary
    heights = (base.vocab_size,) if vocabulary is None else (len(vocabulary), base.vocab_size)
    for name in names.lm_heads:
        _check_shape(file, name, tuple((height, size) for height in heights), base)
        if file.tensors[name].shape != file.tensors[names.lm_heads[0]].shape:
            raise AdapterRejected(f"tensors {names.lm_heads[0]!r} and {name!r} differ in shape; expected one size")
    if not names.lm_heads or vocabulary is None:
        return None
    is_cut = file.tensors[names.lm_heads[0]].shape[0] == len(vocabulary)
    return order if is_cut else np.array(vocabulary, np.int64)


def _check_shape(file: TensorFile, name: str, wanted: tuple[tuple[int, ...], ...], base: BaseSpec) -> None:
    shape = file.tensors[name].shape
    if shape not in wanted:
        needed = " or ".join(str(list(each)) for each in dict.fromkeys(wanted))
        raise AdapterRejected(
            f"tensor {name!r} has the shape {list(shape)}, this base needs {needed}: the heads are damaged or for "
            f"another base (this one is {base.name}, hidden size {base.hidden_size}, {base.vocab_size} tokens)"
        )


def _refuse_not_finite(name: str, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise AdapterRejected(f"tensor {name!r} holds {'NaN' if np.isnan(values).any() else 'Inf'}")


def _warnings(foreign: Mapping[str, Any], names: HeadNames, base: BaseSpec) -> tuple[str, ...]:
    warnings = []
    for key, counted in (
        ("medusa_num_heads", names.num_heads),
        ("num_heads", names.num_heads),
        ("medusa_num_layers", names.num_layers),
        ("num_hidden_layers", names.num_layers),
    ):
        said = foreign.get(key)
        if type(said) is int and said != counted:
            warnings.append(f"{FOREIGN_CONFIG_FILE} says {key} {said}; the tensors are of {counted}")
    trained_on = _trained_on(foreign)
    if trained_on and trained_on.rstrip("/").rsplit("/", 1)[-1].lower() != base.name.lower():
        warnings.append(f"trained on {trained_on}, served on {base.name}")
    return tuple(warnings)


def _trained_on(foreign: Mapping[str, Any]) -> str | None:
    said = foreign.get("base_model_name_or_path")
    return said[:200] if isinstance(said, str) and said.isprintable() and said else None
