"""From a scheduled step to tensors, through the decoder, to sampled tokens."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from torch import Tensor

from perseid_kernels.fused import Outputs
from perseid_kernels.routing import RoutedRows
from perseid_server.engine.ports import Chunk, ChunkResult, ScheduledStep
from perseid_server.engine.routed_rows import Tables, group_routed
from perseid_server.engine.step_rows import accepted_moves, host_batch, logits_spans, page_list
from perseid_server.engine.verification import Walk, walk
from perseid_server.model.batch import HostBatch, slot_moves
from perseid_server.model.decode_graphs import DecodeGraphs
from perseid_server.model.decoder import AdapterPools, Decoder
from perseid_server.model.kv_cache import KVCache
from perseid_server.model.sampling import Sampler, SampleRequest, prompt_logprobs
from perseid_server.model.sampling_params import TokenLogprobs


class ModelRunner:
    """Runs steps on one decoder, one KV cache and one pool of adapter pages; steps of decodes and trees alone by
    `graphs`, where there are any."""

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
        self._kv = kv
        self._ordinary = decoder.bind(kv, pools)
        self._tables = tables
        self._block_size = block_size
        self._graphs = graphs
        self._eos_token_ids = decoder.config.eos_token_ids

    def run(self, step: ScheduledStep) -> tuple[ChunkResult, ...]:
        """One forward pass; samples for the chunks that end at their sequence's last token, and for their drafts."""
        chunks = step.chunks
        groups = group_routed(chunks, self._tables)
        batch = host_batch(chunks, self._block_size, partial(page_list, self._tables), groups.host())
        outputs, routed = self._forward(batch)
        spans = logits_spans(chunks)
        ends = list(accumulate(len(span) for span in spans))  # of each chunk's rows in the logits
        firsts = [end - chunk.num_rows + chunk.count - 1 for end, chunk in zip(ends, chunks, strict=True)]
        walks = self._walk(chunks, firsts, outputs)
        self._compact(chunks, walks)
        chosen = groups.results(routed, chunks, {place: taken.accepted for place, taken in walks.items()})

        results = []
        for place, (chunk, span) in enumerate(zip(chunks, spans, strict=True)):
            judged = _judge_prompt(chunk, outputs.logits_LV[ends[place] - len(span) : ends[place]])
            taken = walks.get(place, _NOTHING)
            results.append(
                ChunkResult(taken.token_ids, taken.logprobs, taken.accepted, judged, taken.error, chosen.get(place))
            )
        return tuple(results)

    def _forward(self, batch: HostBatch) -> tuple[Outputs, tuple[RoutedRows, ...]]:
        """What the pass ends with, and the routed rows with what was chosen for them."""
        if self._graphs is not None and self._graphs.takes(batch):
            outputs = self._graphs.forward(batch)
            return replace(outputs, hidden_LE=outputs.hidden_LE.clone()), ()  # rows may be kept beyond the next replay
        on_device = batch.on(self._decoder.device)
        return self._ordinary(on_device), on_device.routed

    def _walk(self, chunks: Sequence[Chunk], firsts: Sequence[int], outputs: Outputs) -> dict[int, Walk]:
        """What is sampled, by the chunk's place; keeps for Medusa heads the rows that last tokens came from."""
        places = [place for place, chunk in enumerate(chunks) if _is_sampled(chunk)]
        if not places:
            return {}
        sampler = Sampler(outputs.logits_LV, self._decoder.backend.best)
        walks = {}
        for place in places:
            chunk, first = chunks[place], firsts[place]
            taken = walk(chunk, first, sampler, self._sample_request, self._ends)
            if chunk.sequence.request.speculation.uses_heads:
                leaf = first + (taken.accepted[-1] + 1 if taken.accepted else 0)
                chunk.sequence.hidden = KeptRow(outputs.hidden_LE, leaf)
            walks[place] = taken
        return walks

    def _compact(self, chunks: Sequence[Chunk], walks: dict[int, Walk]) -> None:
        """What was accepted goes where it would have been without drafts: before anybody can find it by its key."""
        paths = [accepted_moves(chunks[place], taken.accepted, self._block_size) for place, taken in walks.items()]
        moves = slot_moves([path for path in paths if path], self._decoder.device)
        if moves is not None:
            self._decoder.backend.move_slots(self._kv.keys, self._kv.values, moves)

    def _sample_request(self, chunk: Chunk, ahead: Sequence[int]) -> SampleRequest:
        """How the token after those `ahead` is sampled, which have come in this step."""
        sequence = chunk.sequence
        params = sequence.request.sampling
        too_early = sequence.num_output + len(ahead) < params.min_tokens
        return SampleRequest(
            sampling=params,
            prompt_token_ids=sequence.request.prompt_token_ids,
            output_token_ids=[*sequence.output_token_ids, *ahead],
            uniform=sequence.uniform(len(ahead)),
            forbid_token_ids=(*self._eos_token_ids, *params.stop_token_ids) if too_early else (),
        )

    def _ends(self, chunk: Chunk, token_id: int) -> bool:
        return chunk.sequence.is_ended_by(token_id, self._eos_token_ids)


_NOTHING = Walk((), (), ())


_FEW_ROWS = 256


class KeptRow:
    """A row of a step's hidden states, which stay as long as one of them is wanted; where they are many (those of a
    prompt that is to be judged), the row alone."""

    __slots__ = ("_hidden_LE", "_row")

    def __init__(self, hidden_LE: Tensor, row: int) -> None:
        few = hidden_LE.shape[0] <= _FEW_ROWS
        self._hidden_LE, self._row = (hidden_LE, row) if few else (hidden_LE[row : row + 1].clone(), 0)

    @property
    def hidden(self) -> Tensor:
        """The row."""
        return self._hidden_LE[self._row]


def _is_sampled(chunk: Chunk) -> bool:
    return chunk.samples and chunk.sequence.request.sampling.max_tokens > 0


def _judge_prompt(chunk: Chunk, logits_LV: Tensor) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of the prompt tokens that follow the chunk's rows, where the request wants them."""
    num_top = chunk.sequence.request.sampling.prompt_logprobs
    if num_top is None:
        return ()
    targets = chunk.sequence.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.count + 1]
    return tuple(prompt_logprobs(logits_LV[: len(targets)], targets, num_top))
