"""Where an adapter, a gate set or heads may come from: a local folder, or a repository of the Hugging Face hub.

The operator's own command line may name anything. A remote client may name what lies below an `--adapter-root`, with
no symbolic link on the way, and hub ids when `--allow-hub` is set. Refusals tell a client nothing about what exists
outside.
"""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perseid_server.adapters.hub import HubAccess, HubId, download
from perseid_server.adapters.layout import ALL_FILES, FILES
from perseid_server.errors import AdapterRejected, Forbidden, InvalidRequest, NotFound, quoted

_HUB_ID = re.compile(
    r"(?P<repo>[a-z0-9][\w.-]{0,95}/[a-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>(?=.{1,128}$)[a-z0-9_][\w.-]*(?:/[a-z0-9_][\w.-]*)*))?",
    re.ASCII | re.IGNORECASE,
)
"""A revision becomes part of a path in the hub's cache: none of its parts is `.` or `..`."""
_MAX_SOURCE = 4096


@dataclass(frozen=True, slots=True)
class SourcePolicy:
    """What may be named. `trusted`: the operator speaks, every local path is allowed."""

    roots: tuple[Path, ...] = ()
    allow_hub: bool = False
    trusted: bool = False
    sees: Callable[[str], bool] | None = None  # by the path below a root, or its first part; None: all that is there
    allow_pickle_heads: bool = False  # whether the hub is asked for Medusa v1's pickles


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder that may be read. `follow_links`: its files may be symbolic links (the operator's own, or the hub's)."""

    path: Path
    follow_links: bool


OPERATOR = SourcePolicy(allow_hub=True, trusted=True)


def resolve_adapter(source: str, policy: SourcePolicy) -> AdapterFolder:
    """A folder on this machine that holds the files of an adapter, a gate set or heads. Blocking: a hub id is
    downloaded, into the operator's own cache."""
    found = locate(source, policy)
    return found if isinstance(found, AdapterFolder) else from_hub(found, policy)


def from_hub(
    at: HubId, policy: SourcePolicy, *, own_cache: Path | None = None, until: float | None = None
) -> AdapterFolder:
    """Download a repository. Blocking, and long. `own_cache`: an empty folder, which whoever sees only a part needs;
    `until`: by time.monotonic, when to give up."""
    if policy.sees is not None and own_cache is None:
        raise ValueError("the operator's cache is not for those who see only a part")
    access = HubAccess(own_cache, policy.allow_pickle_heads, until)
    return AdapterFolder(download(at, access), follow_links=True)


def locate(source: str, policy: SourcePolicy) -> AdapterFolder | HubId:
    """The folder, or the repository that is allowed to be asked for. Blocking: it looks at the disk."""
    if not source or len(source) > _MAX_SOURCE or "\0" in source:
        raise InvalidRequest("source: expected a folder or a hub id org/name[@revision]", field="source")
    if policy.trusted:
        return _trusted(source)
    inside = _inside_a_root(source, policy)
    if inside is not None:
        return AdapterFolder(inside, follow_links=False)
    if match := _HUB_ID.fullmatch(source):
        if policy.allow_hub:
            return HubId(match["repo"], match["revision"])
        if not source.startswith(("/", ".")):
            raise Forbidden(
                f"source {quoted(source)}: loading from the hub is not allowed here; the operator can allow it with "
                "--allow-hub",
                field="source",
            )
    raise Forbidden(
        f"source {quoted(source)}: not a folder below one of the server's adapter roots; the operator sets them with "
        "--adapter-root",
        field="source",
    )


def _trusted(source: str) -> AdapterFolder | HubId:
    try:
        folder = Path(source).expanduser()
        mode = folder.stat().st_mode
        if stat.S_ISDIR(mode):
            return AdapterFolder(folder.resolve(), follow_links=True)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        mode = None
    except (OSError, RuntimeError) as error:  # RuntimeError: `~nobody`
        why = error.strerror if isinstance(error, OSError) else error
        raise AdapterRejected(f"source {quoted(source)} cannot be read: {why}", field="source") from error
    if mode is not None:
        raise AdapterRejected(
            f"source {quoted(source)} is not a folder; name the folder with {' and '.join(FILES['adapter'])}",
            field="source",
        )
    if match := _HUB_ID.fullmatch(source):
        return HubId(match["repo"], match["revision"])
    raise NotFound(f"source {quoted(source)}: no such folder, and not a hub id org/name[@revision]", field="source")


def _inside_a_root(source: str, policy: SourcePolicy) -> Path | None:
    """The folder if it lies below a root; relative sources are looked up in each root in turn."""
    for root in policy.roots:
        base = root.resolve()
        named = Path(os.path.normpath(base / source))  # `..` is resolved as text: no link is followed
        for start in (base, Path(os.path.normpath(root.absolute()))):
            if named != start and named.is_relative_to(start):
                below = named.relative_to(start)
                folder = base / below
                if policy.sees is not None and not (policy.sees(str(below)) or policy.sees(below.parts[0])):
                    continue  # as if it were not there
                if _is_plain_folder(base, folder):
                    return folder
    return None


def _is_plain_folder(base: Path, folder: Path) -> bool:
    """Every part below the root is a real directory, and the files that are read are regular files."""
    try:
        current = base
        for part in folder.relative_to(base).parts:
            current /= part
            if not stat.S_ISDIR(current.lstat().st_mode):
                return False
        for name in ALL_FILES:
            path = folder / name
            if path.is_symlink() or (path.exists() and not path.is_file()):
                return False
    except (OSError, ValueError):
        return False
    return True
