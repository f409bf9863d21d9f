"""What a caller that sees some names only may load, and under which names."""

from collections.abc import Sequence
from dataclasses import replace

from perseid_server.access.caller import current_caller
from perseid_server.adapters.source import SourcePolicy
from perseid_server.errors import Forbidden

_MOST_PATTERNS = 8
"""More are not told in a refusal."""


def policy_for_caller(policy: SourcePolicy) -> SourcePolicy:
    """It may load folders of such names only."""
    caller = current_caller()
    return policy if caller.adapters is None else replace(policy, sees=caller.sees)


def refuse_unseen(*names: str) -> None:
    """Whether or not a name is taken: what a caller cannot see it cannot give."""
    for name in names:
        if not current_caller().sees(name):
            raise Forbidden(
                f"name: this API key may use only {_listed(current_caller().adapters or ())}; {name!r} is none of them",
                field="name",
            )


def _listed(patterns: Sequence[str]) -> str:
    more = len(patterns) - _MOST_PATTERNS
    return (", ".join(map(repr, patterns[:_MOST_PATTERNS])) or "the base") + (f" and {more} more" if more > 0 else "")
