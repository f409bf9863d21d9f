"""A fake model and a byte tokenizer: the whole server in milliseconds.

The fake model is exact about what a real one depends on: its next token is a hash of the adapter and of all tokens
before it, and it reads those tokens back through the sequence's KV blocks. A block that is shared wrongly, freed too
early or keyed wrongly changes the answer.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from hashlib import blake2b

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from perseid_server.adapters.state import Admission, Location, ResidencyEvents, ResidencyStats, Resident
from perseid_server.engine.adaptation import BASE, Adaptation
from perseid_server.engine.drafting import Drafter
from perseid_server.engine.engine import Engine, EngineLimits
from perseid_server.engine.kv_blocks import BlockAllocator
from perseid_server.engine.messages import EngineReady
from perseid_server.engine.ports import Chunk, ChunkResult, RoutedChunk, ScheduledStep
from perseid_server.engine.sequence import Sequence
from perseid_server.model.sampling_params import TokenLogprobs
from perseid_server.model.spec import BaseSpec, LinearShape
from perseid_server.model.tokenizer import TokenizerBundle
from perseid_server.speculation.draft import Candidates
from perseid_server.speculation.step_clock import StepClock
from perseid_server.speculation.tree import ROOT

VOCAB_SIZE = 258
EOS = 256
BLOCK_SIZE = 4


def tiny_spec(**changes: object) -> BaseSpec:
    """Two layers of a Llama-shaped base with four-wide linears."""
    hidden, kv, ffn = LinearShape(8, 8), LinearShape(8, 4), LinearShape(8, 16)
    fields: dict[str, object] = {
        "name": "tiny",
        "hash": "0" * 64,
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "hidden_size": 8,
        "num_kv_heads": 1,
        "head_dim": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "projections": {
            "q_proj": hidden,
            "k_proj": kv,
            "v_proj": kv,
            "o_proj": hidden,
            "gate_proj": ffn,
            "up_proj": ffn,
            "down_proj": LinearShape(16, 8),
        },
        "eos_token_ids": (EOS,),
    }
    return BaseSpec(**(fields | changes))  # type: ignore[arg-type]


def next_token(adapter: str | None, tokens: tuple[int, ...]) -> int:
    """The fake model: printable ASCII, decided by everything that may decide it."""
    digest = blake2b(repr((adapter, tokens)).encode(), digest_size=4).digest()
    return 97 + int.from_bytes(digest, "little") % 26


def name_of(adaptation: Adaptation) -> str | None:
    """What the fake model takes for the adapter: its version; for anything else than one adapter, the KV key."""
    if adaptation == BASE:
        return None
    plain = len(adaptation.weights) == 1 and adaptation.weights[0][1] == 1.0
    return adaptation.weights[0][0] if plain else adaptation.key


def expected(prompt: tuple[int, ...], adapter: str | None, num_tokens: int) -> tuple[int, ...]:
    """What the fake model answers, computed alone."""
    tokens = prompt
    for _ in range(num_tokens):
        tokens = (*tokens, next_token(adapter, tokens))
    return tokens[len(prompt) :]


@dataclass
class FakeRunner:
    """Writes tokens into KV slots and reads its context back from them."""

    num_blocks: int
    block_size: int = BLOCK_SIZE
    choose: Callable[[str | None, tuple[int, ...]], int] = next_token
    says: str | None = None  # every answer is this text, then the end token
    fail_on: set[str] = field(default_factory=set)  # request ids whose presence breaks the step
    nan_for: set[str] = field(default_factory=set)  # request ids whose row is broken
    steps: list[ScheduledStep] = field(default_factory=list)
    rows_of_steps: list[list[tuple[str, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._slots: list[tuple[str | None, int] | None] = [None] * (self.num_blocks * self.block_size)

    def run(self, step: ScheduledStep) -> tuple[ChunkResult, ...]:
        self.steps.append(step)
        self.rows_of_steps.append([(chunk.sequence.id, chunk.count) for chunk in step.chunks])
        if any(chunk.sequence.id in self.fail_on for chunk in step.chunks):
            raise MemoryError("no memory for this step")
        results = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            drafted = () if chunk.draft is None else chunk.draft.tree.token_ids
            rows = (*sequence.token_ids[chunk.start : chunk.start + chunk.count], *drafted)
            for place, token in enumerate(rows):
                where = self._slot(sequence.blocks, chunk.start + place)
                self._slots[where] = (name_of(sequence.adaptation), token)
            results.append(self._result(chunk))
        return tuple(results)

    def _result(self, chunk) -> ChunkResult:
        sequence = chunk.sequence
        judged = ()
        if sequence.wants_prompt_logprobs:
            targets = sequence.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.count + 1]
            judged = tuple(TokenLogprobs(target, -1.0, 1) for target in targets)
        if sequence.id in self.nan_for:
            return ChunkResult(error="NaN")
        if not chunk.samples:
            return ChunkResult(prompt_logprobs=judged, routed=_routed(chunk))
        path = list(range(chunk.start + chunk.count))  # places of what the next token follows
        accepted: list[int] = []
        sampled: list[int] = []
        while True:
            sampled.append(self._next(sequence, self._context(sequence, path), len(sampled)))
            if chunk.draft is None or sampled[-1] == EOS:
                break
            node = chunk.draft.tree.child(accepted[-1] if accepted else ROOT, sampled[-1])
            if node is None:
                break
            accepted.append(node)
            path.append(chunk.start + chunk.count + node)
        for depth, node in enumerate(accepted):
            source, target = (chunk.start + chunk.count + place for place in (node, depth))
            self._slots[self._slot(sequence.blocks, target)] = self._slots[self._slot(sequence.blocks, source)]
        found = [_logprob(token, sequence.request.sampling.logprobs) for token in sampled]
        return ChunkResult(
            tuple(sampled),
            tuple(logprob for logprob in found if logprob is not None),
            tuple(accepted),
            prompt_logprobs=judged,
            routed=_routed(chunk, len(accepted)),
        )

    def _context(self, sequence: Sequence, places: list[int]) -> tuple[int, ...]:
        entries = [self._slots[self._slot(sequence.blocks, place)] for place in places]
        assert all(entry is not None and entry[0] == name_of(sequence.adaptation) for entry in entries), "foreign KV"
        return tuple(entry[1] for entry in entries if entry is not None)

    def _next(self, sequence: Sequence, tokens: tuple[int, ...], ahead: int) -> int:
        if self.says is None:
            return self.choose(name_of(sequence.adaptation), tokens)
        said, place = self.says.encode(), sequence.num_output + ahead
        return said[place] if place < len(said) else EOS

    def _slot(self, blocks: list[int], position: int) -> int:
        return blocks[position // self.block_size] * self.block_size + position % self.block_size


def _routed(chunk: Chunk, num_accepted: int = 0) -> RoutedChunk | None:
    """The fake gates: of the columns that may be chosen, each gets twice what the one before it gets."""
    routing = chunk.sequence.adaptation.routing
    if routing is None:
        return None
    given = [0 if column is None else 2**place for place, column in enumerate(routing.columns)]
    last = tuple(share / sum(given) for share in given)
    num_prompt = max(0, min(chunk.count, len(chunk.sequence.request.prompt_token_ids) - chunk.start))
    num_rows = chunk.count + num_accepted
    return RoutedChunk(
        shares=tuple(num_rows * share for share in last),
        prompt_shares=tuple(num_prompt * share for share in last),
        sampled=(last,) * (1 + num_accepted),
        entropy=0.5 * num_rows,
    )


def _logprob(token: int, wanted: int | None) -> TokenLogprobs | None:
    """The chosen token is the most likely one, its neighbours in the vocabulary come next."""
    if wanted is None:
        return None
    return TokenLogprobs(token, -0.5, 1, tuple(((token + place) % VOCAB_SIZE, -0.5 - place) for place in range(wanted)))


@dataclass
class FakeResidency:
    """Adapters of one page each; `room` of them fit. Loads finish at the next poll but `delay`."""

    room: int = 1000
    delay: int = 1
    broken: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known: dict[str, str] = {}
        self.users: dict[str, int] = {}
        self.loading: dict[str, int] = {}
        self.device: list[str] = []  # least recently used first
        self.failed: dict[str, str] = {}
        self._moved: set[str] = set()

    @property
    def is_loading(self) -> bool:
        return bool(self.loading)

    def register(self, version: str, path: str) -> None:
        self.known[version] = path

    def register_gate_set(
        self, version: str, path: str | None, adapters: tuple[str, ...], *, null: bool, pinned: bool
    ) -> None:
        self.known[version] = path or ""

    def forget(self, version: str) -> None:
        self.known.pop(version)

    def pin(self, version: str, pinned: bool) -> None: ...

    def prefetch(self, *versions: str, claimed: ListOf[str] = ()) -> None: ...

    retry_in_s = None

    def acquire(self, *versions: str, evict_wanted: bool = True) -> Admission:
        found = [self._bring(version) for version in versions if version not in self.device]
        if found:
            return min(found, key=["failed", "no_room", "loading"].index)
        for version in versions:
            self.device.remove(version)
            self.device.append(version)
            self.users[version] = self.users.get(version, 0) + 1
        return "ready"

    def has_room(self, *versions: str, without: ListOf[str]) -> bool:
        missing = [version for version in versions if version not in self.device and version not in self.loading]
        idle = [each for each in self.device if each not in versions and (not self.users.get(each) or each in without)]
        return len(missing) <= self.room - len(self.device) - len(self.loading) + len(idle)

    def _bring(self, version: str) -> Admission:
        if version in self.failed:
            return "failed"
        if version not in self.loading:
            if len(self.device) + len(self.loading) >= self.room and not self._evict():
                return "no_room"
            self.loading[version] = self.delay
        return "loading"

    def _evict(self) -> bool:
        for version in self.device:
            if not self.users.get(version):
                self.device.remove(version)
                return True
        return False

    def release(self, *versions: str) -> None:
        for version in versions:
            self.users[version] -= 1
            assert self.users[version] >= 0

    def poll(self) -> ResidencyEvents:
        failed = {}
        for version in list(self.loading):
            self.loading[version] -= 1
            if self.loading[version] <= 0:
                del self.loading[version]
                if version in self.broken:
                    failed[version] = self.failed[version] = self.broken[version]
                else:
                    self.device.append(version)
                    self._moved.add(version)
        moved, self._moved = tuple(self._moved), set()
        return ResidencyEvents(moved, failed)

    def location(self, version: str) -> Location:
        return "device" if version in self.device else "disk"

    def is_pinned(self, version: str) -> bool:
        return False

    def knows(self, version: str) -> bool:
        return version in self.known

    def error(self, version: str) -> str | None:
        return self.failed.get(version)

    def problem(self, *versions: str) -> str | None:
        return next((self.failed[version] for version in versions if version in self.failed), None)

    def stats(self) -> ResidencyStats:
        return ResidencyStats(len(self.device), self.room)

    def residents(self) -> Iterator[Resident]:
        for version in self.known:
            where, users = self.location(version), self.users.get(version, 0)
            yield Resident(version, "adapter", where, int(where == "device"), users, is_loading=version in self.loading)


@dataclass
class FakeHeads:
    """Heads that know what the fake model says next, but are wrong about a share of it; loaded at the next poll."""

    num_heads: int = 3
    wrong: float = 0.3
    seed: int = 0
    asked: list[list[str]] = field(default_factory=list)  # request ids of each call

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._known: dict[str, bool] = {}  # whether they are loaded

    @property
    def is_loading(self) -> bool:
        return not all(self._known.values())

    def register(self, version: str, path: str) -> None:
        self._known.setdefault(version, False)

    def forget(self, version: str) -> None:
        self._known.pop(version, None)

    def poll(self) -> ResidencyEvents:
        moved = tuple(version for version, is_loaded in self._known.items() if not is_loaded)
        self._known |= dict.fromkeys(moved, True)
        return ResidencyEvents(moved)

    retry_in_s = None

    def knows(self, version: str) -> bool:
        return version in self._known

    def location(self, version: str) -> Location:
        return "device" if self._known[version] else "disk"

    def error(self, version: str) -> str | None:
        return None

    def can_propose(self, sequence: Sequence) -> bool:
        return self._known.get(sequence.request.speculation.heads or "", False)

    def propose(self, sequences: list[Sequence]) -> list[Candidates]:
        self.asked.append([sequence.id for sequence in sequences])
        return [self._propose(sequence) for sequence in sequences]

    def _propose(self, sequence: Sequence) -> Candidates:
        coming = expected(tuple(sequence.token_ids), name_of(sequence.adaptation), self.num_heads)
        ranked = []
        for token in coming:
            others = [other for other in self._random.sample(range(97, 123), 3) if other != token]
            ranked.append([others[0], token, *others[1:]] if self._random.random() < self.wrong else [token, *others])
        return Candidates(ranked, [[0.6, 0.2, 0.1, 0.05][: len(tokens)] for tokens in ranked])


FLAT_CLOCK = {1: 1.0, 64: 1.0}
"""A device on which a row more costs nothing: everything that is drafted pays."""


def fake_engine(
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 32,
    max_num_seqs: int = 8,
    max_model_len: int | None = None,
    caching: bool = True,
    residency: FakeResidency | None = None,
    runner: FakeRunner | None = None,
    heads: FakeHeads | None = None,
    step_times: Mapping[int, float] = FLAT_CLOCK,
    draft_tokens: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Engine:
    """The real engine over the fake model."""
    limits = EngineLimits(max_model_len or num_blocks * BLOCK_SIZE, max_batch_tokens, max_num_seqs, (EOS,))
    return Engine(
        limits,
        BlockAllocator(num_blocks, BLOCK_SIZE, caching=caching),
        residency or FakeResidency(),
        runner or FakeRunner(num_blocks),
        Drafter(StepClock(step_times), heads or FakeHeads(), draft_tokens),
        clock,
    )


def fake_ready(**changes: object) -> EngineReady:
    """What a fake engine says of itself."""
    fields: dict[str, object] = {
        "spec": tiny_spec(),
        "weight_bytes": 1000,
        "max_model_len": 256,
        "adapter_pages_total": 8,
        "device": "fake",
    }
    return EngineReady(**(fields | changes))  # type: ignore[arg-type]


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 is the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda char: _BYTE_OF[char])
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<turn>"])
    return tokenizer


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<turn>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)


def byte_bundle() -> TokenizerBundle:
    """The byte tokenizer as the frontend gets it."""
    return TokenizerBundle(
        tokenizer=byte_tokenizer(),
        chat_template=TEMPLATE,
        special_tokens={"eos_token": "<end>"},
        eos_token_id=EOS,
        stop_token_ids=(EOS,),
    )
