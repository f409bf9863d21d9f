"""The latencies of one request. All count from when it was planned, so a client that is late is part of the wait."""

import math
from itertools import pairwise

from perseid_loadtest.traffic.record import RequestRecord


def answered(record: RequestRecord) -> bool:
    """Whether it ended without an error. An answer may be empty."""
    return record.error is None


def tokens_of(record: RequestRecord) -> int:
    """How many tokens came: what the server says, else what arrived."""
    return record.output_tokens or round(sum(arrival.tokens for arrival in record.arrivals))


def gaps(record: RequestRecord) -> list[float]:
    """ITL, inter-token latencies, s: the times between two chunks that follow each other, however many tokens they
    hold. None of an answer that came as one."""
    return [later.moment - earlier.moment for earlier, later in pairwise(record.arrivals)]


def tpot(record: RequestRecord) -> float | None:
    """TPOT, time per output token, s: (last chunk − first chunk) / (tokens − 1). None of an answer of one token, and of
    one that came as one chunk, streamed or not: nothing tells how long its tokens took each."""
    tokens = tokens_of(record)
    if len(record.arrivals) < 2 or tokens < 2:
        return None
    return (record.arrivals[-1].moment - record.arrivals[0].moment) / (tokens - 1)


def normalised_latency(record: RequestRecord) -> float | None:
    """End-to-end latency / output tokens, s (as Orca and vLLM's paper have it). None of an empty answer."""
    tokens = tokens_of(record)
    return record.latency / tokens if tokens else None


def first_token_by(record: RequestRecord) -> float:
    """TTFT, s, for a limit on it. Where no chunk was kept the first token came with the last; where no token came it
    never did."""
    if record.ttft is not None:
        return record.ttft
    return record.latency if tokens_of(record) else math.inf
