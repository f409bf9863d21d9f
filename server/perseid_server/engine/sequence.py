"""One request inside the engine: what it asked for, what it has so far, what it holds."""

import random
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from perseid_server.engine.adaptation import Adaptation
from perseid_server.engine.messages import BLENDED, ROUTED, Submit
from perseid_server.model.sampling_params import TokenLogprobs


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable state of one sequence. The scheduler owns `blocks` and `num_computed`, the engine the rest."""

    request: Submit
    arrival: int  # order of arrival, unique
    token_ids: list[int] = field(init=False)  # prompt, then output
    blocks: list[int] = field(default_factory=list)  # KV blocks held, in order
    block_keys: list[bytes] = field(default_factory=list)  # content keys of its first full blocks, as far as asked for
    num_published: int = 0  # blocks held that can be found by their keys
    num_computed: int = 0  # tokens whose K and V are in the blocks
    num_cached: int = 0  # of those, found in the prefix cache at first admission
    unfit_since: int | None = None  # the step in which there first were too few blocks for it to start
    was_preempted: bool = False
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_shares: tuple[float, ...] = ()  # what the gates chose for the prompt: shares per column, summed over tokens
    arrived_at: float = field(default_factory=time.perf_counter)
    scheduled_at: float | None = None
    load_s: float = 0.0  # of the time till then, while what it needs was not on the device
    has_answered: bool = False
    hidden: object = None  # the row its last token was sampled from, as Medusa heads take it; the runner's own
    _draws: deque[float] = field(default_factory=deque)  # for the next tokens; a draw stays until its token is accepted
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self._random = random.Random(self.request.sampling.seed)  # noqa: S311  (None: seeded by the system)

    @property
    def id(self) -> str:
        """The request id."""
        return self.request.request_id

    @property
    def adaptation(self) -> Adaptation:
        """What adapts the base."""
        return self.request.adaptation

    @property
    def label(self) -> str:
        """What its figures are told for: an adapter's version, "" the base, one name for all blends, one for gates."""
        if self.adaptation.routing is not None:
            return ROUTED
        if not self.adaptation.weights:
            return ""
        return self.adaptation.weights[0][0] if len(self.adaptation.weights) == 1 else BLENDED

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        """Sampled tokens."""
        return len(self.token_ids) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        """Sampled tokens so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_to_compute(self) -> int:
        """Tokens whose K and V are missing: 1 while decoding, more during prefill and after a preemption."""
        return len(self.token_ids) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Every prompt position's logits are needed, so nothing may come from the prefix cache."""
        return self.request.sampling.prompt_logprobs is not None

    def is_ended_by(self, token_id: int, eos_token_ids: Collection[int]) -> bool:
        """Whether a sampled token ends it, and is not part of the answer."""
        params = self.request.sampling
        return token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: priority (smaller first), then arrival."""
        return self.request.priority, self.arrival

    def add_prompt_shares(self, shares: tuple[float, ...]) -> None:
        """Count what the gates chose for further tokens of the prompt."""
        before = self.prompt_shares or (0.0,) * len(shares)
        self.prompt_shares = tuple(map(sum, zip(before, shares, strict=True)))

    def uniform(self, ahead: int = 0) -> float:
        """The random number, from [0, 1), of the next token, or of one further ahead: always the same for one place."""
        while len(self._draws) <= ahead:
            self._draws.append(self._random.random())
        return self._draws[ahead]

    def append(self, token_id: int) -> None:
        """Accept a sampled token, and with it its random number."""
        self.uniform()
        self._draws.popleft()
        self.token_ids.append(token_id)
