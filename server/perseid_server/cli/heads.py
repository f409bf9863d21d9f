"""How the commands show Medusa heads."""

from collections.abc import Sequence

from perseid_protos.perseid.v1 import adapter_admin_pb2 as pb

_SHOWN_RANKS = 4


def heads_rows(heads: pb.Heads, num_layers: int) -> dict[str, str]:
    """Lines of `perseid adapters show`."""
    return {
        "kind": f"heads ({heads.layout}), {heads.num_heads} of {blocks(num_layers)}",
        "for": for_whom(heads),
        "lm_head": lm_head(shared=heads.shares_lm_head, num_tokens=heads.num_draft_tokens),
        **accuracy_rows([of_head.candidates for of_head in heads.accuracy], measured=heads.accuracy_measured),
    }


def for_whom(heads: pb.Heads) -> str:
    """The adapter that they are for, or the base."""
    if not heads.adapter and not heads.adapter_version:
        return "the base"
    named = " ".join(part for part in (heads.adapter, heads.adapter_version[:8]) if part)
    return named if heads.in_use else f"{named}, which is not loaded"


def blocks(num_layers: int) -> str:
    """The residual blocks of a head."""
    return "one block" if num_layers == 1 else f"{num_layers} blocks"


def lm_head(*, shared: bool, num_tokens: int) -> str:
    """Where the logits come from."""
    return f"{'that of the base' if shared else 'their own'}, {num_tokens:,} tokens"


def accuracy_rows(accuracy: Sequence[Sequence[float]], *, measured: bool) -> dict[str, str]:
    """A line for each head: how often its first candidates were right, each by itself."""
    told = {"accuracy": "measured" if measured else "that of published heads, not measured with these"}
    for head, shares in enumerate(accuracy, 1):
        told[f"head {head}"] = f"{', '.join(f'{share:.1%}' for share in shares[:_SHOWN_RANKS])} right by rank"
    return told
