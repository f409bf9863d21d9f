"""`perseid keys new|list|revoke`: the file that `perseid serve --api-keys` reads. A running server follows it."""

import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from perseid_server.access.caller import Role
from perseid_server.access.key_edit import Value, add_key, remove_key
from perseid_server.access.key_file import read_keys
from perseid_server.access.keys import Key

keys = App(name="keys", help="Make, list and revoke the API keys of a server.")

_File = Annotated[Path, Parameter(name="--api-keys", help="The file that the server reads.")]
_LAST = datetime(9999, 12, 31, tzinfo=UTC)  # a later moment west of Greenwich is none in UTC
_REPEATED = Parameter(negative=(), consume_multiple=False, show_default=False)


@keys.command
def new(
    name: str,
    /,
    *,
    api_keys: _File,
    role: Annotated[tuple[Role, ...], _REPEATED] = ("generate",),
    tenant: str | None = None,
    adapters: Annotated[tuple[str, ...], _REPEATED] = (),
    weight: float | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    tokens_total: int | None = None,
    expires: date | None = None,
) -> None:
    """Make a key and print it, once; the file gets its hash only.

    Parameters
    ----------
    name
        What logs call it.
    role
        generate, or admin for loading adapters. Repeat for both. Default: generate.
    tenant
        Keys of one tenant share its fair share and its prefix cache. Default: the key's name.
    adapters
        Pattern (acme-*) of names that exist for this key. Repeat for more. Default: all.
    weight
        Of the tenant's share when many want to run. Default: 1.
    requests_per_minute
        Default: no limit.
    tokens_per_minute
        Of prompts and answers. Default: no limit.
    tokens_per_day
        Days in UTC. Default: no limit.
    tokens_total
        Default: no limit.
    expires
        The last day, in UTC. Default: never.
    """
    stated: dict[str, Value | None] = {
        "roles": role,
        "tenant": tenant,
        "adapters": adapters or None,
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "tokens_total": tokens_total,
        "expires": expires,
    }
    sys.stdout.write(add_key(api_keys, name, {field: value for field, value in stated.items() if value is not None}))
    sys.stdout.write("\n")
    sys.stderr.write("This is the only time that the key is shown.\n")


@keys.command(name="list")
def list_all(*, api_keys: _File) -> None:
    """List the keys' names, roles and limits."""
    table = Table("name", "tenant", "roles", "adapters", "limits", "state", box=None, padding=(0, 2, 0, 0))
    for key in read_keys(api_keys).keys.values():
        caller = key.caller
        patterns = "all" if caller.adapters is None else " ".join(caller.adapters) or "none"
        table.add_row(key.name, caller.tenant, " ".join(sorted(caller.roles)), patterns, _limits(key), _state(key))
    Console(highlight=False, markup=False).print(table)


@keys.command
def revoke(name: str, /, *, api_keys: _File) -> None:
    """Take a key out of the file. A running server refuses it within seconds; what it has begun ends."""
    remove_key(api_keys, name)


def _limits(key: Key) -> str:
    told = key.allowance
    limits = {
        "requests/min": told.requests_per_minute,
        "tokens/min": told.tokens_per_minute,
        "tokens/day": told.tokens_per_day,
        "tokens": told.tokens_total,
    }
    return ", ".join(f"{limit} {unit}" for unit, limit in limits.items() if limit is not None) or "none"


def _state(key: Key) -> str:
    if not key.enabled:
        return "disabled"
    if key.expires is None:
        return "good"
    if key.expires <= datetime.now(UTC):
        return "expired"
    return f"until {min(key.expires, _LAST).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
