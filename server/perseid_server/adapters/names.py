"""What an adapter may be called."""

import re

from perseid_server.errors import InvalidRequest

RESERVED = frozenset({"auto", "base"})
PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?"
_NAME = re.compile(PATTERN)
MAX_LENGTH = 128


def check_name(name: str, *, taken: frozenset[str] = frozenset(), field: str = "name") -> str:
    """The name itself if it is allowed: letters, digits, `.`, `_`, `-`, at most one `/` (as in `org/name`).

    Colons are left out: `<base>:<adapter>` names an adapter too. InvalidRequest says what is wrong.
    """
    if len(name) > MAX_LENGTH or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{field} {name[:MAX_LENGTH]!r}: expected 1 to {MAX_LENGTH} letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit, with at most one '/' between two such parts",
            field=field,
        )
    if name in RESERVED or name in taken:
        raise InvalidRequest(f"{field} {name!r} is reserved: it names the base or a mode of the server", field=field)
    return name
