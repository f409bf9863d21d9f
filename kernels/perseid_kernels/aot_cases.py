"""The kernels and signatures that `aot` compiles: every variant a bfloat16 8B-class Llama launches.

Launch knobs come from the same `choose_config` functions the launchers use, so a knob that does not fit a target
fails the test suite and not a user's GPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from perseid_kernels import attention, expand, gate, matmul_common, routed_lora, shrink
from perseid_kernels._triton import power_of_two, tl
from perseid_kernels.activation import silu_mul_kernel
from perseid_kernels.devices import compiler_options
from perseid_kernels.matmul_dense import matmul_dense_kernel
from perseid_kernels.matmul_q4 import matmul_q4_kernel
from perseid_kernels.matmul_q8 import matmul_q8_kernel
from perseid_kernels.move_slots import move_slots_kernel
from perseid_kernels.norm import rms_norm_kernel
from perseid_kernels.rope import rope_and_store_kernel
from perseid_kernels.segments import PAGE_RANK

_FLOATS = ("eps", "scale_log2", "zero")
_DIVISIBLE = ("N", "K", "F", "split_k")  # sizes a launcher passes as multiples of 16, beside strides and pointers
_POINTER_TYPES = {
    "codes": "*i32", "codebook": "*fp32", "scale": "*fp32", "offset": "*fp32", "parts": "*fp32", "z": "*fp32",
    "weights": "*fp32", "cos": "*fp32", "sin": "*fp32", "maxima": "*fp32", "sums": "*fp32",
    "rows": "*i32", "in_use": "*i32", "counts": "*i32", "pages": "*i32",
    "items": "*i32", "tiles": "*i32", "columns": "*i32", "page_indptr": "*i32", "chosen": "*i32", "top_k": "*i32",
    "absolute": "*i32", "allowed": "*i32",
    "ancestors": "*i64", "tree_rows": "*i32", "tree_sequences": "*i32",
    "caches": "*i64", "sources": "*i64", "targets": "*i64", "indptr": "*i32",
    "gates": "*fp32", "logits": "*fp32", "bias": "*fp32", "temperature": "*fp32", "tally": "*fp32",
    "query_start": "*i32", "context_len": "*i32", "block_table": "*i32", "positions": "*i64", "slots": "*i64",
    **dict.fromkeys(
        ("x", "a", "b", "w", "y", "q", "k", "v", "k_cache", "v_cache", "out", "residual", "weight"), "*bf16"
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One kernel with the constants of one variant; types follow from the parameters' names."""

    name: str
    kernel: Any  # a @triton.jit function
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    types: Mapping[str, str] = field(default_factory=dict)  # where a variant's type differs
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of the target's compiler
    blocks: int = 1  # that must fit one multiprocessor at once, so that one computes while others wait for memory

    def signature(self) -> dict[str, str]:
        """Triton's type of each parameter."""
        return {name: self._type_of(name) for name in self.kernel.arg_names}

    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """Pointers, strides and sizes are multiples of 16, as the launcher would find at run time where it looks."""
        looked_at = [not parameter.do_not_specialize for parameter in self.kernel.params]
        return {
            (index,): [["tt.divisibility", 16]]
            for index, (name, kind) in enumerate(self.signature().items())
            if looked_at[index]
            and (kind.startswith("*") or name.startswith("stride_") or (name in _DIVISIBLE and kind == "i32"))
        }

    def _type_of(self, name: str) -> str:
        if name in self.constexprs:
            return "constexpr"
        if name in _FLOATS:
            return "fp32"
        return {**_POINTER_TYPES, **self.types}.get(name, "i32")


def _matmul_cases(target: str) -> Iterator[KernelCase]:
    """Each row class on a weight that is split over K, and prefill also on one that is not and in one launch."""
    affine = {"AFFINE": True, "HAS_OFFSET": True, "PAIRED": True, "GROUP_SIZE": 32, "CHUNK": 128}
    lookup = {"AFFINE": False, "HAS_OFFSET": False, "PAIRED": False, "GROUP_SIZE": 64, "CHUNK": 128}
    odd = {"AFFINE": True, "HAS_OFFSET": True, "PAIRED": False, "GROUP_SIZE": 48, "CHUNK": 64}
    q8 = {"GROUP_SIZE": 32, "CHUNK": 128, "BLOCK_K": 64}
    square = [((4096, 4096), rows) for rows in (1, 32, 64, 128, 4096)]
    for shape, rows in [*square, ((1024, 4096), 256), ((28672, 4096), 4096)]:
        config = matmul_common.choose_config(*shape, rows, target)
        tile = {"EVEN_K": True, **config.constants()}
        launch: dict[str, Any] = {**_launch(config.launch()), "blocks": 2 if rows <= 32 else 1}
        if config.parallel:
            launch["types"] = {"out": "*fp32"}
        form = "parallel" if config.parallel else "serial" if config.splits > 1 else "whole"
        name = f"{form}/t{rows}"
        paired = {**launch, "types": {**launch.get("types", {}), "scale": "*i32"}}
        block_k = config.tile.block_k
        yield KernelCase(f"matmul_q4/affine/{name}", matmul_q4_kernel, {**affine, **tile, "BLOCK_K": block_k}, **paired)
        yield KernelCase(f"matmul_q4/nf4/{name}", matmul_q4_kernel, {**lookup, **tile, "BLOCK_K": block_k}, **launch)
        if rows == 1:
            ragged = {**odd, **tile, "BLOCK_K": 64, "EVEN_K": False}
            yield KernelCase(f"matmul_q4/odd/{name}", matmul_q4_kernel, ragged, **launch)
        q8_launch = {**launch, "types": {**launch.get("types", {}), "codes": "*u8"}}
        yield KernelCase(f"matmul_q8/{name}", matmul_q8_kernel, {**q8, **tile}, **q8_launch)
        yield KernelCase(f"matmul_dense/{name}", matmul_dense_kernel, {"BLOCK_K": 64, **tile}, **launch)
    splits = {"SPLITS": 4, "BLOCK": 256}
    yield KernelCase("reduce_splits", matmul_common.reduce_splits_kernel, splits, num_warps=2)


def _launch(options: Mapping[str, Any]) -> dict[str, Any]:
    """A launcher's options as a case's fields."""
    known = ("num_warps", "num_stages")
    rest = {name: value for name, value in options.items() if name not in known}
    return {**{name: options[name] for name in known}, "options": rest}


def _lora_cases(target: str) -> Iterator[KernelCase]:
    for tile_rows in (16, 64):
        down = shrink.choose_config(4096, tile_rows)
        common = {"SLICES": 3, "SPLITS": down.splits, "RANK": PAGE_RANK, "TILE_ROWS": tile_rows}
        yield KernelCase(
            f"shrink/rows{tile_rows}",
            shrink.shrink_kernel,
            {"BLOCK_K": down.block_k, **common},
            down.num_warps,
            down.num_stages,
            options=compiler_options(target),
            blocks=2 if tile_rows == 16 else 1,
        )
        up = expand.choose_config(tile_rows)
        yield KernelCase(
            f"expand/rows{tile_rows}",
            expand.expand_kernel,
            {"BLOCK_N": up.block_n, **common},
            up.num_warps,
            up.num_stages,
            options=compiler_options(target),
            blocks=2 if tile_rows == 16 else 1,
        )


def _gate_cases(target: str) -> Iterator[KernelCase]:
    """Few and many columns, all of which may be chosen."""
    for columns, max_k in ((9, 2), (65, 8), (512, 512)):
        knobs = gate.choose_config(3 * columns, 4096)
        tile = {"TILE_ROWS": knobs.tile_rows, "BLOCK_C": knobs.block_c, "BLOCK_K": knobs.block_k}
        yield KernelCase(
            f"gate_logits/c{columns}",
            gate.gate_logits_kernel,
            {"SPLITS": knobs.splits, **tile},
            knobs.num_warps,
            knobs.num_stages,
            options=compiler_options(target),
            blocks=2,
        )
        sizes = {"BLOCK_S": 4, "BLOCK_C": power_of_two(columns), "BLOCK_PLACES": power_of_two(max_k)}
        choice = {"GATED": 7, "SLICES": 3, "SPLITS": knobs.splits, **sizes}
        name = f"gate_choice/c{columns}/k{max_k}"
        yield KernelCase(name, gate.gate_choice_kernel, choice, num_warps=gate.choose_warps(columns))


def _routed_cases(target: str) -> Iterator[KernelCase]:
    """Decode by places and by columns, prefill, and the most picks of large and of small tiles."""
    for num_rows, max_k in ((1, 2), (16, 2), (2048, 2), (2048, 32), (2048, 512)):
        config = routed_lora.choose_config(num_rows, 4096, max_k)
        common = {"SLICES": 3, "SPLITS": config.shrink.splits, "RANK": PAGE_RANK, "PLACES": power_of_two(max_k)}
        yield KernelCase(
            f"routed_shrink/t{num_rows}/k{max_k}",
            routed_lora.routed_shrink_kernel,
            {
                "TILE_ROWS": config.shrink_rows,
                "BLOCK_K": config.shrink.block_k,
                "BY_COLUMN": num_rows > 1,
                **common,
            },
            config.shrink.num_warps,
            config.shrink.num_stages,
            options=compiler_options(target),
            blocks=2 if config.shrink_rows == 16 else 1,
        )
        yield KernelCase(
            f"routed_expand/t{num_rows}/k{max_k}",
            routed_lora.routed_expand_kernel,
            {
                "ROWS": config.expand_rows,
                "TILE_ROWS": config.expand_lanes,
                "BLOCK_N": config.expand.block_n,
                **common,
            },
            config.expand.num_warps,
            config.expand.num_stages,
            options=compiler_options(target),
            blocks=2 if config.expand_rows == 1 else 1,
        )


def _attention_cases(target: str) -> Iterator[KernelCase]:
    group = 4
    for head_dim in (64, 96, 128, 256):
        for decode, trees in product((True, False), (True, False)):
            config = attention.choose_config(group, head_dim, decode=decode, kind=target)
            shape = {
                "G": group,
                "BS": 16,
                "D": head_dim,
                "BLOCK_M": config.block_m,
                "BLOCK_D": power_of_two(head_dim),
                "BLOCK_KEYS": config.block_keys,
                "SPAN": config.span,
                "TREES": trees,
            }
            kernel = attention.attention_decode_kernel if decode else attention.attention_prefill_kernel
            variant = {"ONE_SPAN": False} if decode else {"GROUP": power_of_two(group)}
            yield KernelCase(
                f"attention/{'decode' if decode else 'prefill'}{'_trees' if trees else ''}/d{head_dim}",
                kernel,
                {**shape, **variant},
                config.num_warps,
                config.num_stages,
                types=_tree_types(trees),
                options=compiler_options(target),
            )
        for trees in (True, False):
            yield KernelCase(
                f"attention/merge{'_trees' if trees else ''}/d{head_dim}",
                attention.attention_merge_kernel,
                {"D": head_dim, "BLOCK_D": power_of_two(head_dim), "SPAN": 512, "TREES": trees},
                num_warps=1,
                types=_tree_types(trees),
            )


def _tree_types(trees: bool) -> dict[str, str]:
    """Without trees a stand-in is given for them."""
    return {} if trees else {"ancestors": "*i32"}


def _move_cases(_target: str) -> Iterator[KernelCase]:
    for name, word in (("bf16", tl.int16), ("fp32", tl.int32)):
        yield KernelCase(
            f"move_slots/{name}", move_slots_kernel, {"WORD": word, "BLOCK": 1024}, num_warps=4, num_stages=1
        )


def _row_cases(_target: str) -> Iterator[KernelCase]:
    yield KernelCase("add_rms_norm", rms_norm_kernel, {"ADD": True, "BLOCK": 4096}, num_warps=8)
    yield KernelCase("rms_norm/heads", rms_norm_kernel, {"ADD": False, "BLOCK": 128}, num_warps=1)
    rope = {"H": 32, "HKV": 8, "HALF": 64, "BLOCK_H": 32, "BLOCK_HKV": 8, "BLOCK_HALF": 64}
    yield KernelCase("rope_and_store/d128", rope_and_store_kernel, rope, num_warps=4)
    yield KernelCase("silu_mul", silu_mul_kernel, {"BLOCK": 1024}, num_warps=4)


def cases_for(target: str) -> dict[str, KernelCase]:
    """Every variant a target launches, by name, so that a worker process finds its case without pickling a kernel."""
    parts = (_matmul_cases, _lora_cases, _gate_cases, _routed_cases, _attention_cases, _move_cases, _row_cases)
    return {case.name: case for part in parts for case in part(target)}
