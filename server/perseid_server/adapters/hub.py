"""The files of an adapter, a gate set or heads from a repository of the Hugging Face hub.

The operator, and clients that may see everything, use huggingface_hub's own cache and the operator's token. That cache
holds what the token opened, and huggingface_hub answers from it whenever the hub refuses or is away. So for whoever
sees only a part, everything goes into a folder that was empty, without a token: what comes is what the hub shows to
everybody now.

Sizes are read and checked before anything is downloaded.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseid_server.adapters.layout import HUB_FILES, kind_of
from perseid_server.adapters.sizes import check_size
from perseid_server.errors import AdapterRejected, InvalidRequest, NotFound, PerseidError, Unavailable, quoted
from perseid_server.hub_errors import hub_failed
from perseid_server.speculation.heads_config import TENSORS_FILE
from perseid_server.speculation.heads_folder import PICKLE_FILE, VLLM_TENSORS_FILE

_LISTING_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, at a branch, tag or commit."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        """As users write it, quoted."""
        return quoted(f"{self.repo}@{self.revision}" if self.revision else self.repo)


@dataclass(frozen=True, slots=True)
class HubAccess:
    """On whose behalf, and how long."""

    cache: Path | None = None  # an empty folder, and no token; None: huggingface_hub's own cache, the operator's token
    allow_pickle_heads: bool = False  # ask for Medusa v1's pickles
    until: float | None = None  # by time.monotonic: what has not come by then is given up


def download(at: HubId, access: HubAccess) -> Path:
    """A folder with those of the files that the repository has. TooLarge, InvalidRequest, NotFound or Unavailable say
    why there is none. Blocking."""
    with _told(at):
        try:
            repository = _ask(at, access)
        except Exception as error:
            if access.cache is not None:
                raise
            return _cached(at, error)
    folder = repository.fetch(HUB_FILES)
    if folder is None:
        raise AdapterRejected(f"source {at}: the repository has none of the files {', '.join(HUB_FILES)}")
    repository.fetch(_further_files(folder, access.allow_pickle_heads))
    return folder


@dataclass(frozen=True, slots=True)
class _Repository:
    """What the hub tells of a repository at one commit."""

    at: HubId
    access: HubAccess
    commit: str
    sizes: Mapping[str, int | None]

    def fetch(self, names: Sequence[str]) -> Path | None:
        """Download those of the files that are there; the folder they lie in. None: there are none."""
        import huggingface_hub  # noqa: PLC0415  slow to import, and needed for hub ids only

        there = [name for name in names if name in self.sizes]
        for name in there:
            self._check_size(name)
        folder = None
        for name in there:
            with _told(self.at):
                folder = Path(huggingface_hub.hf_hub_download(self.at.repo, name, **self._options())).parent
            if folder.name != self.commit:  # a folder is named after its commit
                raise Unavailable(f"source {self.at}: the repository changed while it was downloaded; try again")
        return folder

    def _check_size(self, name: str) -> None:
        size = self.sizes[name]
        if size is None:
            raise Unavailable(f"source {self.at}: the hub does not tell how large {name} is")
        check_size(name, size)

    def _options(self) -> dict[str, Any]:
        # In the operator's cache the branch is asked for, so that it is known there when the hub is away.
        options: dict[str, Any] = {"revision": self.at.revision}
        if self.access.cache is not None:
            options = {"revision": self.commit, "token": False, "cache_dir": self.access.cache}
        if self.access.until is not None:
            options["tqdm_class"] = _bar_until(self.access.until)
        return options


def _ask(at: HubId, access: HubAccess) -> _Repository:
    import huggingface_hub  # noqa: PLC0415

    token = None if access.cache is None else False
    found = huggingface_hub.HfApi().model_info(
        at.repo, revision=at.revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S, token=token
    )
    if found.sha is None:
        raise Unavailable(f"source {at}: the hub does not tell which commit that is")
    return _Repository(at, access, found.sha, {file.rfilename: file.size for file in found.siblings or ()})


def _cached(at: HubId, error: Exception) -> Path:
    """What the operator's cache has, where the hub could not be asked or did not answer."""
    import huggingface_hub  # noqa: PLC0415
    from huggingface_hub import errors  # noqa: PLC0415

    if isinstance(error, PerseidError | errors.HFValidationError | errors.RevisionNotFoundError):
        raise error
    try:
        cached = huggingface_hub.snapshot_download(
            at.repo, revision=at.revision, allow_patterns=list(HUB_FILES), local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        raise error from None
    return Path(cached)


@contextlib.contextmanager
def _told(at: HubId) -> Iterator[None]:
    """What huggingface_hub raises, as clients are told."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except PerseidError:
        raise
    except errors.HFValidationError as error:
        raise InvalidRequest(f"source {at}: not a hub id org/name[@revision]", field="source") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise NotFound(
            f"source {at}: the hub has no such repository or revision, or does not show it to this server",
            field="source",
        ) from error
    except Exception as error:
        raise hub_failed(f"source {at}", error) from error


def _further_files(folder: Path, allow_pickle_heads: bool) -> tuple[str, ...]:
    """Other files that heads' tensors may lie in. Those of a model are asked for only when its config says that it is
    Medusa heads."""
    if kind_of(folder) != "heads" or (folder / TENSORS_FILE).exists():
        return ()
    return (VLLM_TENSORS_FILE, PICKLE_FILE) if allow_pickle_heads else (VLLM_TENSORS_FILE,)


def _bar_until(end: float) -> type:
    """A progress bar that shows nothing and ends a download whose time is over: huggingface_hub tells bars of each
    piece, and asks nothing else whether to go on."""
    from huggingface_hub.utils.tqdm import tqdm  # noqa: PLC0415

    class Until(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if time.monotonic() > end:
                raise TimeoutError("the download took too long")
            super().update(n)

    return Until
