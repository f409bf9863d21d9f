"""From how a client wants its request drafted for to what the engine is asked for.

Heads are advisory: a request holds no lease on them, and ends as it would have without them.
"""

from typing import Protocol

from perseid_server.engine.adaptation import Adaptation
from perseid_server.errors import InvalidRequest
from perseid_server.frontend.adaptation import Resolved
from perseid_server.frontend.speculation_options import ACCEPTANCES, MODES, SpeculationOptions, TypicalOptions
from perseid_server.speculation.options import Mode, Speculation


class Heads(Protocol):
    """Medusa heads that the engine knows."""

    @property
    def version(self) -> str: ...


class HeadsOf(Protocol):
    """Knows which heads are loaded for what."""

    def heads_for(self, adaptation: Adaptation) -> Heads | None:
        """The adapter's own heads, else the base's; None where there are neither."""
        ...


class NoHeads:
    """Nothing is loaded."""

    def heads_for(self, adaptation: Adaptation) -> Heads | None:  # noqa: ARG002
        """None."""
        return None


class Drafting:
    """Resolves how requests are drafted for."""

    def __init__(self, heads: HeadsOf | None = None, default: Mode = "auto") -> None:
        """`default`: the mode of requests that name none. It is a wish: without heads, "medusa" drafts nothing then."""
        self._heads = heads or NoHeads()
        self._default = default

    def resolve(self, options: SpeculationOptions, resolved: Resolved) -> Speculation:
        """What to ask the engine for; `options` have been checked.

        InvalidRequest when the client asks for heads and none serve its request.
        """
        mode = MODES[options.mode] if options.mode is not None else self._default
        heads = self._heads.heads_for(resolved.adaptation) if mode in {"auto", "medusa"} else None
        if options.mode == "medusa" and heads is None:
            raise _no_heads(resolved)
        typical = options.typical or TypicalOptions()
        return Speculation(
            mode=mode,
            heads=heads.version if heads is not None else None,
            acceptance=ACCEPTANCES[options.acceptance],
            epsilon=typical.epsilon,
            delta=typical.delta,
        )


def _no_heads(resolved: Resolved) -> InvalidRequest:
    missing = "none are loaded for the base"
    if resolved.adapter is not None:
        missing = f"none are loaded for adapter {resolved.adapter.name!r}, and none for the base"
    return InvalidRequest(
        f"speculation: no Medusa heads serve this request ({missing}); load some as adapters are loaded, with "
        f'"perseid adapters load NAME FOLDER", or ask for "auto", "ngram" or "off"',
        field="speculation",
    )
