"""What adapts the base, from the messages and back into them."""

from collections.abc import Iterable

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation_options import (
    AdaptationOptions,
    AutoOptions,
    BlendOf,
    Named,
    Report,
    Tier,
)
from perseid_server.frontend.generation import Delta, Generation
from perseid_server.frontend.loaded import LoadedAdapter
from perseid_server.frontend.routing_report import Shares

_TIERS: dict[int, Tier] = {
    pb.TIER_UNSPECIFIED: "auto",
    pb.TIER_AUTO: "auto",
    pb.TIER_REQUEST: "request",
    pb.TIER_TOKEN: "token",
}
_CHOSEN = {"request": pb.TIER_REQUEST, "token": pb.TIER_TOKEN}
_REPORTS: dict[int, Report] = {
    pb.ROUTING_REPORT_UNSPECIFIED: "none",
    pb.ROUTING_REPORT_NONE: "none",
    pb.ROUTING_REPORT_SUMMARY: "summary",
    pb.ROUTING_REPORT_TOKENS: "tokens",
}


def read_adaptation(message: pb.GenerateRequest, base: str) -> AdaptationOptions | None:
    """The oneof. InvalidRequest for a tier this server does not know."""
    match message.WhichOneof("adaptation"):
        case "blend":
            adapters = message.blend.adapters
            return BlendOf(tuple((each.name, each.weight if each.HasField("weight") else 1.0) for each in adapters))
        case "auto":
            return _auto(message.auto)
    return Named(message.adapter) if message.adapter and message.adapter != base else None


def _auto(auto: pb.Auto) -> AutoOptions:
    if auto.tier not in _TIERS:
        raise InvalidRequest(f"auto.tier is {auto.tier}; expected one of the enum Tier", field="auto.tier")
    return AutoOptions(
        gate_set=auto.gate_set or None,
        allow=tuple(auto.allow) or None,
        k=auto.k if auto.HasField("k") else None,
        temperature=auto.temperature if auto.HasField("temperature") else None,
        tier=_TIERS[auto.tier],
        null=auto.null if auto.HasField("null") else True,
        join=auto.join,
    )


def read_report(message: pb.GenerateRequest) -> Report:
    """What to tell of an automatic choice."""
    if message.routing_report not in _REPORTS:
        raise InvalidRequest(
            f"routing_report is {message.routing_report}; expected one of the enum RoutingReport",
            field="routing_report",
        )
    return _REPORTS[message.routing_report]


def adapter_ref(generation: Generation) -> pb.AdapterRef | None:
    """The one adapter that answers."""
    adapter = generation.adapter
    return pb.AdapterRef(name=adapter.name, version=adapter.version) if adapter else None


def blend_refs(generation: Generation) -> list[pb.AdapterRef]:
    """What a blend consists of."""
    return [_weighted(adapter, weight) for adapter, weight in generation.resolved.blend]


def _weighted(adapter: LoadedAdapter, weight: float) -> pb.AdapterRef:
    return pb.AdapterRef(name=adapter.name, version=adapter.version, weight=weight)


def auto_ref(generation: Generation) -> pb.AutoRef | None:
    """How `auto` is served."""
    auto = generation.resolved.auto
    if auto is None:
        return None
    return pb.AutoRef(
        gate_set=auto.gate_set.name, version=auto.gate_set.version, tier=_CHOSEN[auto.tier], joined=auto.joined
    )


def routing_of(generation: Generation, deltas: Iterable[Delta], *, summary: bool) -> pb.Routing | None:
    """The tokens of these deltas, and the summary of what has come so far; None where neither was asked for."""
    tokens = [pb.TokenRouting(top=_shares(token)) for delta in deltas for token in delta.routing]
    tally = generation.routing
    if tally is None or not (summary or tokens):
        return None
    if not summary:
        return pb.Routing(tokens=tokens)
    return pb.Routing(prompt=_shares(tally.prompt), completion=_shares(tally.completion), tokens=tokens)


def _shares(shares: Shares) -> list[pb.Share]:
    return [pb.Share(name=name, share=share) for name, share in shares]
