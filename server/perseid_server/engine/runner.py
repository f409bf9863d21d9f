"""From a scheduled step to tensors, through the decoder, to sampled tokens. The engine's only torch."""

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from perseid_kernels.fused import Outputs
from perseid_kernels.routing import RoutedRows
from perseid_kernels.segments import PageList
from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.ports import Chunk, ChunkResult, ScheduledStep
from perseid_server.engine.routed_rows import RoutedGroups, Tables, group_routed
from perseid_server.model.batch import HostBatch
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.decoder import AdapterPools, Decoder
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.sampling import SampleRequest, prompt_logprobs, sample
from perseid_server.model.sampling_params import TokenLogprobs


class ModelRunner:
    """Runs steps on one decoder, one KV cache and one pool of adapter pages; pure decode steps by `graphs`, where
    there are any."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        pools: AdapterPools,
        tables: Tables,
        block_size: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._decoder = decoder
        self._ordinary = decoder.bind(kv, pools)
        self._tables = tables
        self._block_size = block_size
        self._graphs = graphs
        self._eos_token_ids = decoder.config.eos_token_ids

    def run(self, step: ScheduledStep) -> tuple[ChunkResult, ...]:
        """One forward pass; samples for the chunks that end at their sequence's last token."""
        spans = _logits_spans(step.chunks)
        groups = group_routed(step.chunks, self._tables)
        batch = self._batch(step.chunks, [row for span in spans for row in span], groups)
        outputs, routed = self._forward(batch)
        logits_LV = outputs.logits_LV
        ends = list(accumulate(len(span) for span in spans))  # of each chunk's rows in the logits
        samplers = [index for index, chunk in enumerate(step.chunks) if _is_sampled(chunk)]
        rows_LV = logits_LV[[ends[index] - 1 for index in samplers]] if len(samplers) < ends[-1] else logits_LV
        sampled = sample(
            rows_LV, [self._sample_request(step.chunks[index]) for index in samplers], self._decoder.backend.best
        )
        token_of = dict(zip(samplers, sampled, strict=True))
        chosen = groups.results(routed, step.chunks)

        results = []
        for index, (chunk, span) in enumerate(zip(step.chunks, spans, strict=True)):
            judged = _judge_prompt(chunk, logits_LV[ends[index] - len(span) : ends[index]])
            token = token_of.get(index)
            if token is None:
                results.append(ChunkResult(prompt_logprobs=judged, routed=chosen.get(index)))
            else:
                results.append(ChunkResult(token.token_id, token.logprob, judged, token.error, chosen.get(index)))
        return tuple(results)

    def _forward(self, batch: HostBatch) -> tuple[Outputs, tuple[RoutedRows, ...]]:
        """Of the rows whose logits are wanted, and the routed rows with what was chosen for them."""
        if self._graphs is not None and self._graphs.takes(batch):
            return self._graphs.forward(batch), ()
        on_device = batch.on(self._decoder.device)
        return self._ordinary(on_device), on_device.routed

    def _batch(self, chunks: Sequence[Chunk], logits_rows: list[int], groups: RoutedGroups) -> HostBatch:
        size = self._block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        pages: list[PageList | None] = []
        query_start = [0]
        for chunk in chunks:
            sequence = chunk.sequence
            span = range(chunk.start, chunk.start + chunk.count)
            tokens += sequence.token_ids[chunk.start : chunk.start + chunk.count]
            positions += span
            slots += [sequence.blocks[position // size] * size + position % size for position in span]
            pages += [self._page_list(sequence.adaptation)] * chunk.count
            query_start.append(query_start[-1] + chunk.count)
        return HostBatch(
            token_ids=tokens,
            positions=positions,
            slots=slots,
            query_start=query_start,
            context_len=[chunk.start + chunk.count for chunk in chunks],
            blocks=[chunk.sequence.blocks for chunk in chunks],
            pages=pages,
            logits_rows=logits_rows,
            routed=groups.host(),
        )

    def _page_list(self, adaptation: Adaptation) -> PageList | None:
        """The pages of one adapter, or of a blend's, one adapter after the other."""
        if not adaptation.weights:
            return None
        lists = [(self._tables.pages(version), weight) for version, weight in adaptation.weights]
        return PageList(
            tuple(page for pages, _ in lists for page in pages.pages),
            tuple(weight * each for pages, weight in lists for each in pages.weights),
        )

    def _sample_request(self, chunk: Chunk) -> SampleRequest:
        sequence = chunk.sequence
        params = sequence.request.sampling
        too_early = sequence.num_output < params.min_tokens
        return SampleRequest(
            sampling=params,
            prompt_token_ids=sequence.request.prompt_token_ids,
            output_token_ids=sequence.output_token_ids,
            uniform=sequence.uniform,
            forbid_token_ids=(*self._eos_token_ids, *params.stop_token_ids) if too_early else (),
        )


def _is_sampled(chunk: Chunk) -> bool:
    return chunk.samples and chunk.sequence.request.sampling.max_tokens > 0


def _judge_prompt(chunk: Chunk, logits_LV: Tensor) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the prompt tokens that follow the chunk's rows, where the request wants them."""
    num_top = chunk.sequence.request.sampling.prompt_logprobs
    if num_top is None:
        return ()
    targets = chunk.sequence.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.count + 1]
    return tuple(prompt_logprobs(logits_LV[: len(targets)], targets, num_top))


def _logits_spans(chunks: Sequence[Chunk]) -> list[range]:
    """The rows of each chunk whose logits are wanted: all for prompt logprobs, the last where one is sampled."""
    spans = []
    first = 0
    for chunk in chunks:
        end = first + chunk.count
        if chunk.sequence.wants_prompt_logprobs and chunk.start < chunk.sequence.num_prompt:
            spans.append(range(first, end))
        else:
            spans.append(range(end - 1, end) if chunk.samples else range(0))
        first = end
    return spans
