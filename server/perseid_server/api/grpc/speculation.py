"""What drafts for a request, from the messages and back into them."""

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_server.frontend.generation import Generation
from perseid_server.frontend.speculation_options import SpeculationOptions, TypicalOptions

_MODES = {
    pb.SPECULATION_UNSPECIFIED: None,
    pb.SPECULATION_AUTO: "auto",
    pb.SPECULATION_MEDUSA: "medusa",
    pb.SPECULATION_NGRAM: "ngram",
    pb.SPECULATION_OFF: "off",
}
_ACCEPTANCES = {
    pb.ACCEPTANCE_UNSPECIFIED: "exact",
    pb.ACCEPTANCE_EXACT: "exact",
    pb.ACCEPTANCE_TYPICAL: "typical",
}


def read_speculation(message: pb.GenerateRequest) -> SpeculationOptions:
    """The fields of the request. Numbers of no enum stay what they are: the frontend refuses them by name."""
    return SpeculationOptions(
        mode=_MODES.get(message.speculation, str(message.speculation)),
        acceptance=_ACCEPTANCES.get(message.acceptance, str(message.acceptance)),
        typical=_typical(message.typical) if message.HasField("typical") else None,
    )


def _typical(message: pb.Typical) -> TypicalOptions:
    return TypicalOptions(**{name: getattr(message, name) for name in ("epsilon", "delta") if message.HasField(name)})


def speculation_report(generation: Generation) -> pb.SpeculationReport | None:
    """Says that drafts may have changed the answer, where they may."""
    if not generation.is_lossy:
        return None
    return pb.SpeculationReport(acceptance=pb.ACCEPTANCE_TYPICAL, lossy=True)
