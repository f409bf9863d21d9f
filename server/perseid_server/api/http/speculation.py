"""How a body says what drafts for it: `speculation`, `acceptance` and `typical`."""

from perseid_server.api.http.bounded import Options
from perseid_server.api.http.field_types import Share
from perseid_server.frontend.speculation_options import SpeculationOptions, TypicalOptions


class TypicalBody(Options):
    """Options of typical acceptance."""

    epsilon: Share = None
    delta: Share = None

    def options(self) -> TypicalOptions:
        """With the defaults for what is left out."""
        stated = {"epsilon": self.epsilon, "delta": self.delta}
        return TypicalOptions(**{name: value for name, value in stated.items() if value is not None})


def speculation_of(mode: str | None, acceptance: str | None, typical: TypicalBody | None) -> SpeculationOptions:
    """The texts as they stand; the frontend checks them for both transports."""
    options = typical.options() if typical is not None else None
    return SpeculationOptions(mode, "exact" if acceptance is None else acceptance, options)
