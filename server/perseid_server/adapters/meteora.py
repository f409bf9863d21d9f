"""A MeteoRA checkpoint, split into the adapters it was made of and a gate set that chooses among them.

The reference implementation (NJUDeepEngine/meteora) saves one model.safetensors. In each adapted module the adapters'
matrices lie side by side, with a bias-free gate:

    …layers.{i}.{self_attn|mlp}.{projection}.lora_A.weight    [Σr, d_in]
    …                                       .lora_B.weight    [d_out, Σr]
    …                                       .moe_gate.weight  [N, d_in]
    …                                       .base_layer.weight   the base's own weight, not read

Rows of A and columns of B are cut at the cumulative ranks that meteora.json gives (meteora_config.py). A module that an
adapter's `modules` leave out has no rows for it, and no gate row: the adapter gets none there, and its column is never
chosen. A block of zeros, the other way of leaving a module alone, is left out of the adapter; its gate row is kept, as
choosing it takes weight from the others in the reference as well. There is no null column: some adapter always acts.
"""

import json
import re
import shutil
import uuid
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perseid_router.gate_set import NEVER, Column, Gate, GateSet, GateSetConfig
from perseid_server.adapters.gate_set_file import check_gate_set
from perseid_server.adapters.lora import WEIGHTS_FILE, Site, check_adapter
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.meteora_config import MeteoraAdapter, MeteoraConfig, read_meteora_config
from perseid_server.adapters.store import version_of
from perseid_server.adapters.tensor_file import TensorFile
from perseid_server.adapters.tensor_writer import append_tensors, begin_tensors
from perseid_server.errors import AdapterRejected
from perseid_server.model.spec import PARENT_OF_PROJECTION, BaseSpec

CHECKPOINT_FILE = "model.safetensors"
_PARTS = ("lora_A", "lora_B", "moe_gate")
_PREFIX = r"(?:base_model\.model\.)?(?:model\.)?"
_MODULE = re.compile(
    _PREFIX + r"layers\.(?P<layer>0|[1-9]\d{0,4})\.(?P<parent>\w+)\.(?P<projection>\w+)"
    r"\.(?P<part>base_layer|lora_A|lora_B|moe_gate)\.weight",
    re.ASCII,
)
_OF_THE_BASE = re.compile(
    _PREFIX + r"(?:lm_head\.weight|embed_tokens\.weight|norm\.weight|layers\.\d+\.(?:\w+norm\.weight|"
    r"self_attn\.rotary_emb\.inv_freq|(?:self_attn|mlp)\.\w+_proj\.(?:base_layer\.)?(?:weight|bias)))",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class MeteoraParts:
    """What a checkpoint became."""

    adapter_folders: Mapping[str, Path]  # by name, in the order of the gates' columns
    gate_set_folder: Path
    warnings: tuple[str, ...] = ()


def is_meteora(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint of this kind, whether or not it is a good one."""
    if not (folder / CHECKPOINT_FILE).is_file():  # a pipe would be waited for
        return False
    try:
        return any(".moe_gate." in name for name in TensorFile.open(folder / CHECKPOINT_FILE).tensors)
    except AdapterRejected:
        return False


def split_meteora(folder: Path, out: Path, base: BaseSpec) -> MeteoraParts:
    """Write `out`/adapters/NAME for each adapter and `out`/gates, all or nothing; `out` must not exist yet.

    AdapterRejected names the key or tensor that is wrong.
    """
    if out.exists():
        raise AdapterRejected(f"{out.name} exists already; name a folder that does not", field="out")
    if not (folder / CHECKPOINT_FILE).is_file():
        raise AdapterRejected(f"the checkpoint has no {CHECKPOINT_FILE}; shards must be joined into one file first")
    config = read_meteora_config(folder, base)
    file = TensorFile.open(folder / CHECKPOINT_FILE)
    checkpoint = _Checkpoint(config, file, _modules(file, base))
    acting = checkpoint.check(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        checkpoint.write_adapters(acting, draft / "adapters", base)
        columns = []
        for adapter in config.adapters:
            target = draft / "adapters" / adapter.name
            check_adapter(target, base)
            columns.append(Column(adapter.name, version_of(target)))
        _refuse_twins(columns)
        checkpoint.write_gates(tuple(columns), draft / "gates")
        warnings = check_gate_set(draft / "gates", base).info.warnings
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    folders = {adapter.name: out / "adapters" / adapter.name for adapter in config.adapters}
    return MeteoraParts(folders, out / "gates", (*checkpoint.warnings(base), *warnings))


def _modules(file: TensorFile, base: BaseSpec) -> dict[Site, dict[str, str]]:
    """Tensor names by module and part. Every tensor must find its place, or be one of the base's."""
    modules: dict[Site, dict[str, str]] = {}
    for name in file.tensors:
        match = _MODULE.fullmatch(name)
        if match is None or match["part"] == "base_layer":
            if not _OF_THE_BASE.fullmatch(name):
                raise AdapterRejected(_why_unknown(name))
            continue
        projection, layer = match["projection"], int(match["layer"])
        if PARENT_OF_PROJECTION.get(projection) != match["parent"] or projection not in base.projections:
            raise AdapterRejected(_why_unknown(name))
        if layer >= base.num_layers:
            raise AdapterRejected(
                f"tensor {name!r} is for layer {layer}; the base has layers 0 to {base.num_layers - 1}"
            )
        parts = modules.setdefault(Site(layer, projection), {})
        if match["part"] in parts:
            raise AdapterRejected(f"tensors {parts[match['part']]!r} and {name!r} are for the same matrix")
        parts[match["part"]] = name
    if not modules:
        raise AdapterRejected(f"{CHECKPOINT_FILE} holds no lora_A, lora_B and moe_gate; it is no MeteoRA checkpoint")
    return dict(sorted(modules.items()))


def _why_unknown(name: str) -> str:
    return (
        f"unknown tensor {name!r}; expected layers.N.(self_attn|mlp).PROJECTION.(lora_A|lora_B|moe_gate).weight and "
        "the base's own tensors"
    )


def _stem(site: Site) -> str:
    """What the names of a module's tensors begin with in an adapter's file."""
    return f"base_model.model.{site.module}"


def _refuse_twins(columns: list[Column]) -> None:
    """Equal adapters are one version, which a gate set cannot list twice."""
    first: dict[str, str] = {}
    for column in columns:
        if first.setdefault(column.version, column.name) != column.name:
            raise AdapterRejected(
                f"the adapters {first[column.version]!r} and {column.name!r} are equal; a gate set lists each once"
            )


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    config: MeteoraConfig
    file: TensorFile
    modules: Mapping[Site, Mapping[str, str]]

    def holders(self, site: Site) -> list[MeteoraAdapter]:
        """Adapters that have rows in a module, in order."""
        return [adapter for adapter in self.config.adapters if site.projection in adapter.modules]

    def slices(self, site: Site) -> list[tuple[MeteoraAdapter, slice]]:
        """Adapters that have rows in a module, and which of its ranks are theirs."""
        holders = self.holders(site)
        ends = accumulate(adapter.rank for adapter in holders)
        return [(adapter, slice(end - adapter.rank, end)) for adapter, end in zip(holders, ends, strict=True)]

    def check(self, base: BaseSpec) -> dict[str, frozenset[Site]]:
        """Refuse missing parts, wrong shapes, and numbers that are not finite. The modules that each adapter acts in:
        both its blocks hold something else than zeros."""
        acting: dict[str, list[Site]] = {adapter.name: [] for adapter in self.config.adapters}
        for site, parts in self.modules.items():
            self._check_shapes(site, parts, base)
            a, b, _ = (self._finite(parts[part]) for part in _PARTS)
            for adapter, ranks in self.slices(site):
                if a[ranks].any() and b[:, ranks].any():
                    acting[adapter.name].append(site)
        return {name: frozenset(sites) for name, sites in acting.items()}

    def _finite(self, name: str) -> NDArray[np.float32]:
        values = self.file.read(name)
        if not np.isfinite(values).all():
            raise AdapterRejected(f"tensor {name!r} holds NaN or Inf")
        return values

    def _check_shapes(self, site: Site, parts: Mapping[str, str], base: BaseSpec) -> None:
        for part in _PARTS:
            if part not in parts:
                raise AdapterRejected(f"tensor {next(iter(parts.values()))!r} has no {part} beside it")
        shape, holders = base.projections[site.projection], self.holders(site)
        total = sum(adapter.rank for adapter in holders)
        self._check_shape(parts["lora_A"], (total, shape.in_features), f"the sum of {len(holders)} ranks", total)
        self._check_shape(parts["lora_B"], (shape.out_features, total), f"the sum of {len(holders)} ranks", total)
        self._check_shape(parts["moe_gate"], (len(holders), shape.in_features), "the adapters with it", len(holders))

    def _check_shape(self, name: str, wanted: tuple[int, int], what: str, count: int) -> None:
        shape = self.file.tensors[name].shape
        if shape != wanted:
            raise AdapterRejected(
                f"tensor {name!r} has the shape {list(shape)}, expected {list(wanted)}, where {count} is {what}: "
                "correct rank and modules in meteora.json, or serve the base that the checkpoint was trained on"
            )

    def write_adapters(self, acting: Mapping[str, frozenset[Site]], target: Path, base: BaseSpec) -> None:
        """For each adapter a PEFT folder with its part of every module that it acts in, exactly. Each matrix is read
        once, however many adapters lie in it."""
        for adapter in self.config.adapters:
            self._begin_adapter(adapter, acting[adapter.name], target / adapter.name, base)
        for site in sorted(self.modules, key=_stem):  # the order of the tensors in the files
            a, b = (self.file.read(self.modules[site][part]) for part in ("lora_A", "lora_B"))
            for adapter, ranks in self.slices(site):
                # An adapter that is zero everywhere stays one, and is warned about when it is loaded.
                if site in acting[adapter.name] or not acting[adapter.name]:
                    append_tensors(target / adapter.name / WEIGHTS_FILE, a[ranks], b[:, ranks])

    def _begin_adapter(self, adapter: MeteoraAdapter, acting: frozenset[Site], target: Path, base: BaseSpec) -> None:
        sites = acting or [site for site in self.modules if site.projection in adapter.modules]
        if not sites:
            raise AdapterRejected(f"the adapter {adapter.name!r} has no rows: no module of its `modules` is adapted")
        shapes = {}
        for site in sites:
            shape = base.projections[site.projection]
            shapes[f"{_stem(site)}.lora_A.weight"] = (adapter.rank, shape.in_features)
            shapes[f"{_stem(site)}.lora_B.weight"] = (shape.out_features, adapter.rank)
        target.mkdir(parents=True)
        config = self._peft_config(adapter, {site.projection for site in sites})
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=1))
        begin_tensors(target / WEIGHTS_FILE, shapes)

    def _peft_config(self, adapter: MeteoraAdapter, projections: Set[str]) -> dict[str, object]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.config.base or None,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "use_rslora": adapter.rslora,
            "target_modules": sorted(projections),
            "bias": "none",
            "inference_mode": True,
        }

    def write_gates(self, columns: tuple[Column, ...], target: Path) -> None:
        """The gate set: the checkpoint's rows, and rows that are never chosen where an adapter lacks a module."""
        gates = {}
        for site, parts in self.modules.items():
            rows = self.file.read(parts["moe_gate"])
            weight = np.zeros((len(columns), rows.shape[1]), np.float32)
            bias = np.full(len(columns), NEVER, np.float32)
            held = [site.projection in adapter.modules for adapter in self.config.adapters]
            weight[held], bias[held] = rows, 0
            gates[site.layer, site.projection] = Gate(weight, bias)
        config = GateSetConfig(
            columns,
            null=False,
            k=self.config.k,
            temperature=self.config.temperature,
            method="meteora",
            base=self.config.base,
        )
        GateSet(config, gates).write(target)

    def warnings(self, base: BaseSpec) -> tuple[str, ...]:
        """What a user should know."""
        taken = {name for parts in self.modules.values() for name in parts.values()}
        ignored = len(self.file.tensors) - len(taken)
        if not ignored:
            return ()
        return (f"{ignored} tensors of the base in {CHECKPOINT_FILE} were not read; {base.name} is served as it is",)
