"""A base and the adapters that gates choose among, on the device as the engine holds them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from perseid_kernels.backend import backend_for
from perseid_kernels.segments import PAGE_RANK, PageList
from perseid_server.adapters.lora import CheckedAdapter, Site, check_adapter
from perseid_server.adapters.lowering import lower
from perseid_server.adapters.pool import AdapterPool
from perseid_server.adapters.source import OPERATOR, resolve_adapter
from perseid_server.adapters.store import version_of
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.text import TextProcessor
from perseid_server.model.build import build_decoder
from perseid_server.model.checkpoint import Checkpoint, open_checkpoint
from perseid_server.model.decoder import Decoder
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.source import resolve_model
from perseid_server.model.spec import FUSED_LINEARS, BaseSpec
from perseid_server.model.tokenizer import export_tokenizer

MAX_SAMPLES = 256  # in a pass
BLOCK_SIZE = 8  # small, so that few tokens of a shared beginning are run more than once


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """An adapter in its pages."""

    name: str
    version: str
    pages: PageList
    checked: CheckedAdapter

    @property
    def sites(self) -> frozenset[Site]:
        """Projections it adapts."""
        return frozenset(self.checked.pairs)


@dataclass(frozen=True, slots=True)
class Workbench:
    """What training passes run on. `kv` has room for the rows of one pass."""

    checkpoint: Checkpoint
    decoder: Decoder
    pool: AdapterPool
    kv: KVCache
    text: TextProcessor
    adapters: tuple[HeldAdapter, ...]

    @property
    def spec(self) -> BaseSpec:
        """The base's shape."""
        return self.checkpoint.spec

    @property
    def block_size(self) -> int:
        """Tokens in a block of the cache."""
        return int(self.kv.keys[0].shape[1])

    @property
    def null(self) -> int:
        """The null column."""
        return len(self.adapters)

    @property
    def gated(self) -> frozenset[tuple[int, str]]:
        """(layer, fused linear) of those that some adapter changes: the ones that need gates."""
        adapted = {(site.layer, site.projection) for adapter in self.adapters for site in adapter.sites}
        fused_of = {name: fused for fused, names in FUSED_LINEARS.items() for name in names}
        return frozenset((layer, fused_of[projection]) for layer, projection in adapted)

    def page_list(self, column: int) -> PageList | None:
        """The pages of a column; None for the base."""
        return None if column == self.null else self.adapters[column].pages


def open_workbench(
    model: str, adapters: Mapping[str, str], *, device: str = "auto", max_rows: int = 2048, max_tokens: int = 2048
) -> Workbench:
    """Load the base and every adapter (name → folder or hub id). `max_rows` and `max_tokens` bound a pass and a sample.

    Raises PerseidError that names the adapter or model that cannot be used.
    """
    source = resolve_model(model)
    checkpoint = open_checkpoint(source)
    spec = checkpoint.spec
    checked = {name: _checked(name, where, spec) for name, where in adapters.items()}
    on = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    backend = backend_for(on)
    length = min(max_tokens, spec.max_position_embeddings)
    decoder = build_decoder(checkpoint, backend, on, length, lambda _done, _total: None)
    num_pages = sum(_num_pages(adapter) for _, adapter in checked.values())
    pool = AdapterPool(spec, max(num_pages, 1), on, backend.compute_dtype)
    blocks = -(-max_rows // BLOCK_SIZE) + MAX_SAMPLES  # each sample's last block may be all but empty
    return Workbench(
        checkpoint,
        decoder,
        pool,
        KVCache.allocate(spec, blocks, BLOCK_SIZE, on, backend.compute_dtype),
        TextProcessor(export_tokenizer(source), spec.vocab_size),
        tuple(_hold(name, version, adapter, pool, spec) for name, (version, adapter) in checked.items()),
    )


def _checked(name: str, where: str, spec: BaseSpec) -> tuple[str, CheckedAdapter]:
    folder: Path = resolve_adapter(where, OPERATOR).path
    try:
        return version_of(folder), check_adapter(folder, spec)
    except (FileNotFoundError, InvalidRequest) as error:
        raise InvalidRequest(f"--adapter {name}: {error}", field="adapter") from error


def _num_pages(adapter: CheckedAdapter) -> int:
    return -(-adapter.info.rank // PAGE_RANK)


def _hold(name: str, version: str, adapter: CheckedAdapter, pool: AdapterPool, spec: BaseSpec) -> HeldAdapter:
    pages = pool.allocate(_num_pages(adapter))
    assert pages is not None, "the pool was made for all adapters"
    pool.write(pages, lower(adapter, spec))
    return HeldAdapter(name, version, PageList.of(pages), adapter)
