"""What objects still hold: every text that can be reached from them."""

import gc
import types
from collections.abc import Iterator

_NOT_HELD = (types.ModuleType, type, types.FrameType, types.CodeType)
"""These lead everywhere: to all that is imported, and to the test itself."""


def texts_held_by(*roots: object) -> Iterator[str]:
    """All strings, in keys, values, fields and closures, however deep."""
    seen: set[int] = set()
    ahead: list[object] = list(roots)
    while ahead:
        each = ahead.pop()
        if id(each) in seen or isinstance(each, _NOT_HELD):
            continue
        seen.add(id(each))
        if isinstance(each, str):
            yield each
        elif isinstance(each, types.FunctionType):
            ahead += [each.__closure__, each.__defaults__, each.__kwdefaults__]
        else:
            ahead += gc.get_referents(each)
            if isinstance(each, dict):  # whose keys the collector skips where all of them are strings
                ahead += list(each)
