"""Adapters of unequal ranks and targets in one batch: each row gets what PEFT gives it alone."""

import copy
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from perseid_kernels.routing import Gates, GateTable
from perseid_kernels.segments import PAGE_RANK, PageList
from perseid_server.adapters.lora import check_adapter
from perseid_server.adapters.lowering import lower
from perseid_server.adapters.pool import AdapterPool
from perseid_server.model.decoder import Decoder
from perseid_server.model.spec import PARENT_OF_PROJECTION, BaseSpec
from tests.server.model.passes import CPU, Part, Passes, Route, assert_logits, backend_named, decoder_of
from tests.server.model.tiny import Base, logits_by, random_prompt, write_tiny

ADAPTERS = {
    "rank-1": LoraConfig(r=1, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
    "rank-8": LoraConfig(r=8, lora_alpha=16, target_modules=list(PARENT_OF_PROJECTION)),
    "rank-17": LoraConfig(r=17, lora_alpha=8, target_modules=["gate_proj", "down_proj", "o_proj"], use_rslora=True),
    "rank-64": LoraConfig(r=64, lora_alpha=64, target_modules=["k_proj", "up_proj"], layers_to_transform=[1]),
}
PROMPTS = {"base": random_prompt(10, 75)} | {name: random_prompt(i, 40 + 13 * i) for i, name in enumerate(ADAPTERS)}
ORDER = ("rank-17", "base", "rank-1", "rank-64", "rank-8")


@dataclass(frozen=True)
class Adapted:
    """A base, its adapters as PEFT folders, and the logits PEFT gives each prompt alone."""

    base: Base
    folders: dict[str, Path]
    logits: dict[str, Tensor]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    root = tmp_path_factory.mktemp("adapters")
    base = Base(write_tiny(root / "base", "llama", torch.bfloat16, tie_word_embeddings=True))
    logits = {"base": logits_by(base.oracle, PROMPTS["base"])}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model = get_peft_model(copy.deepcopy(base.oracle), config).eval()
        _randomise(model, seed)
        model.save_pretrained(root / name, save_embedding_layers=False)
        logits[name] = logits_by(model, PROMPTS[name])
    return Adapted(base, {name: root / name for name in ADAPTERS}, logits)


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """B is zero in a fresh adapter. Matrices as large as these move logits by some units."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def loaded(folders: dict[str, Path], spec: BaseSpec) -> tuple[AdapterPool, dict[str, PageList | None]]:
    """A pool with all adapters in scattered pages. It held NaN everywhere before they were written."""
    pool = AdapterPool(spec, 12, CPU, torch.float32)
    for layer in pool.layers:
        for held in layer.values():
            held.a.fill_(float("nan"))
            held.b.fill_(float("nan"))
            held.live.fill_(PAGE_RANK)
    lists: dict[str, PageList | None] = {"base": None}
    held = pool.allocate(5)
    for name, folder in folders.items():
        adapter = check_adapter(folder, spec)
        pages = pool.allocate(adapter.info.num_pages)
        if pages is None:
            pool.free(reversed(held))
            pages = pool.allocate(adapter.info.num_pages)
        pool.write(pages, lower(adapter, spec))
        lists[name] = PageList.of(pages)
    return pool, lists


@pytest.fixture(scope="module", params=["eager", "native"])
def decoder(request: pytest.FixtureRequest, adapted: Adapted) -> Decoder:
    return decoder_of(adapted.base.checkpoint, backend_named(request.param), 128)


def passes_of(adapted: Adapted, decoder: Decoder, names: tuple[str, ...]) -> Passes:
    checkpoint = adapted.base.checkpoint
    pool, lists = loaded(adapted.folders, checkpoint.spec)
    return Passes(decoder, checkpoint, [PROMPTS[name] for name in names], pool, [lists[name] for name in names])


def test_pages_follow_ranks(adapted: Adapted) -> None:
    _, lists = loaded(adapted.folders, adapted.base.checkpoint.spec)
    used = [page for pages in lists.values() if pages is not None for page in pages.pages]
    assert len(used) == len(set(used)) == sum(-(-config.r // PAGE_RANK) for config in ADAPTERS.values())


def test_adapters_matter(adapted: Adapted) -> None:
    """Without this the other tests could pass on adapters that do nothing."""
    for name in ADAPTERS:
        plain = logits_by(adapted.base.oracle, PROMPTS[name])
        assert (adapted.logits[name] - plain).abs().max() > 0.1, name


@pytest.mark.parametrize("name", ORDER)
def test_alone(adapted: Adapted, decoder: Decoder, name: str) -> None:
    (logits,) = passes_of(adapted, decoder, (name,)).run(Part(0, 0, len(PROMPTS[name])))
    assert_logits(logits, adapted.logits[name])


def test_mixed_ranks_and_base_in_one_batch(adapted: Adapted, decoder: Decoder) -> None:
    parts = [Part(i, 0, len(PROMPTS[name])) for i, name in enumerate(ORDER)]
    for logits, name in zip(passes_of(adapted, decoder, ORDER).run(*parts), ORDER, strict=True):
        assert_logits(logits, adapted.logits[name])


def test_a_backends_whole_pass_is_its_ops_one_by_one(adapted: Adapted, decoder: Decoder) -> None:
    parts = [Part(i, 0, len(PROMPTS[name])) for i, name in enumerate(ORDER)]
    passes = passes_of(adapted, decoder, ORDER)
    for one, other in zip(passes.run(*parts), passes.run_op_by_op(*parts), strict=True):
        assert torch.equal(one, other)


def random_gates(pool: AdapterPool, columns: int, seed: int) -> GateTable:
    """Gates for most projections: the first layer has some on q, k and v only, others leave a projection out."""
    rng = torch.Generator().manual_seed(seed)
    layers: list[dict[str, Gates]] = []
    for index, layer in enumerate(pool.layers):
        of_layer = {}
        for fused, pages in layer.items():
            if index or fused == "qkv":
                gated = tuple(s != 1 or index % 2 == 0 for s in range(len(pages.slices)))
                weight = torch.randn(len(gated) * columns, pages.a.shape[2], generator=rng)
                weight *= torch.tensor(gated).repeat_interleave(columns)[:, None]
                of_layer[fused] = Gates(weight, torch.randn(len(gated) * columns, generator=rng), gated)
        layers.append(of_layer)
    return GateTable(tuple(layers), torch.randint(0, 2, (columns,), generator=rng, dtype=torch.int32), columns)


def passes_with_routes(adapted: Adapted, decoder: Decoder) -> Passes:
    """Two gate sets, one of which routes two sequences in two ways, beside adapters named and the base."""
    checkpoint = adapted.base.checkpoint
    pool, lists = loaded(adapted.folders, checkpoint.spec)
    adapters = tuple(lists[name].pages for name in ADAPTERS)
    first, second = (random_gates(pool, columns, columns) for columns in (5, 3))
    null = ()
    routes = [
        Route(first, (*adapters, null), 2, 1.0, (1, 1, 1, 1, 1)),
        None,
        Route(second, (*adapters[:2], null), 5, 20.0, (1, 0, 1)),
        None,
        Route(first, (*adapters, null), 1, 0.5, (0, 1, 1, 1, 1)),
    ]
    pages = [None if route is not None else lists[name] for name, route in zip(ORDER, routes, strict=True)]
    return Passes(decoder, checkpoint, [PROMPTS[name] for name in ORDER], pool, pages, routes)


def test_a_whole_pass_with_routed_rows_is_its_ops_one_by_one(adapted: Adapted, decoder: Decoder) -> None:
    """A prefill, then a step in which all decode; the tallies too."""
    passes = passes_with_routes(adapted, decoder)
    ends = [len(PROMPTS[name]) - 1 for name in ORDER]
    for starts, stops in ((repeat(0), ends), (ends, [end + 1 for end in ends])):
        parts = [Part(i, start, stop) for i, (start, stop) in enumerate(zip(starts, stops, strict=False))]
        whole, tallies = passes.run(*parts), [rows.tally for rows in passes.routed]
        for one, other in zip(whole, passes.run_op_by_op(*parts), strict=True):
            assert torch.equal(one, other)
        assert len(tallies) == 2
        for one, rows in zip(tallies, passes.routed, strict=True):
            assert torch.equal(one, rows.tally)
            weights = rows.tally[:, :-1].sum(dim=1)
            torch.testing.assert_close(weights, torch.full_like(weights, rows.table.num_gated))
    routed, plain = whole[0], passes_of(adapted, decoder, ORDER).run(*[Part(i, 0, ends[i] + 1) for i in range(5)])[0]
    assert (routed[-1] - plain[-1]).abs().max() > 0.1, "the gates change nothing"


def test_decodes_and_chunks_of_mixed_ranks(adapted: Adapted, decoder: Decoder) -> None:
    """Two sequences decode beside three that go on with their prompts, in the opposite order of the pass before."""
    passes = passes_of(adapted, decoder, ORDER)
    ends = [len(PROMPTS[name]) for name in ORDER]
    cuts = [ends[0] - 1, 5, ends[2] - 1, 20, 1]
    first = passes.run(*[Part(i, 0, cut) for i, cut in enumerate(cuts)])
    second = passes.run(*[Part(i, cuts[i], ends[i]) for i in reversed(range(len(ORDER)))])
    for i, name in enumerate(ORDER):
        assert_logits(torch.cat((first[i], second[-1 - i])), adapted.logits[name])


def test_a_rewritten_page_keeps_nothing(adapted: Adapted, decoder: Decoder) -> None:
    """Rank 1 in a page that rank 8 on every linear had: what it does not adapt is the base again."""
    checkpoint = adapted.base.checkpoint
    pool = AdapterPool(checkpoint.spec, 1, CPU, torch.float32)
    for name in ("rank-8", "rank-1"):
        pages = pool.allocate(1)
        pool.write(pages, lower(check_adapter(adapted.folders[name], checkpoint.spec), checkpoint.spec))
        pool.free(pages)
    prompt = PROMPTS["rank-1"]
    (logits,) = Passes(decoder, checkpoint, [prompt], pool, [PageList.of(pages)]).run(Part(0, 0, len(prompt)))
    assert_logits(logits, adapted.logits["rank-1"])
