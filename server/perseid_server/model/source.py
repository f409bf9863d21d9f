"""What an operator may name as a base, resolved to files on this machine. Imports no torch.

embedded                    the default base, fetched once (embedded.py)
path/to/model.gguf          one GGUF file
path/to/folder              a Hugging Face folder: config.json and safetensors
org/name or org/name@rev    a repository of the Hugging Face hub, fetched into its own cache
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perseid_server.errors import Forbidden, NotFound, UnsupportedModel
from perseid_server.hub_errors import hub_failed
from perseid_server.model.config import from_hf
from perseid_server.model.embedded import embedded_base
from perseid_server.model.headers.safetensors import read_json

EMBEDDED_SOURCE = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_QUANTIZATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|F16|BF16|F32)$", re.IGNORECASE)
_CONFIG_PATTERNS = ["*.json", "*.jinja", "tokenizer*", "chat_template*"]
_WEIGHT_PATTERNS = ["*.safetensors"]
# Pickles run code when loaded; folders and "consolidated" files repeat the weights in another layout.
_IGNORED_PATTERNS = ["*.bin", "*.pt", "*.pth", "*.pkl", "*/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base on this machine. `path` is the GGUF file or the Hugging Face folder."""

    kind: Literal["gguf", "hf"]
    path: Path
    name: str  # how it is served unless the operator says otherwise
    stated: str  # what the operator wrote


Fetch = Callable[[str, str | None, list[str]], Path]
"""(repository, revision, file patterns) → local folder with those files."""


def resolve_model(source: str, *, cache_dir: Path | None = None, progress: bool = True) -> ModelSource:
    """Find or fetch a base. NotFound, Forbidden, Unavailable or UnsupportedModel say what is wrong with it."""
    if source == EMBEDDED_SOURCE:
        return ModelSource("gguf", embedded_base(cache_dir, progress), EMBEDDED_NAME, source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, source)
    if path.is_file():
        return _file(path, source)
    if match := _HUB_ID.fullmatch(source):
        return from_hub(match["repo"], match["revision"], source, fetch_from_hub)
    raise NotFound(
        f'model {source!r}: no such file or folder, and not a hub id; expected "embedded", a .gguf file, '
        "a Hugging Face folder, or org/name[@revision]",
        field="model",
    )


def from_hub(repo: str, revision: str | None, stated: str, fetch: Fetch) -> ModelSource:
    """Fetch a repository: first its config, and the weights only if they could be served."""
    folder = fetch(repo, revision, _CONFIG_PATTERNS)
    from_hf(read_json(folder / "config.json"))
    return ModelSource("hf", fetch(repo, revision, _CONFIG_PATTERNS + _WEIGHT_PATTERNS), repo, stated)


def fetch_from_hub(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Download matching files into huggingface_hub's cache."""
    import huggingface_hub  # noqa: PLC0415  slow to import, and needed for hub ids only
    from huggingface_hub import errors  # noqa: PLC0415

    at = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS
            )
        )
    except errors.GatedRepoError as error:
        raise Forbidden(
            f"model {at}: the repository is gated; accept its terms on huggingface.co and set HF_TOKEN",
            field="model",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"model {at}: the repository has no revision {revision!r}", field="model") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(
            f"model {at}: neither a local path nor a public hub repository; set HF_TOKEN for a private one",
            field="model",
        ) from error
    except Exception as error:
        raise hub_failed(f"model {at}", error) from error


def _file(path: Path, stated: str) -> ModelSource:
    if path.suffix.lower() != ".gguf":
        raise UnsupportedModel(
            f"model {stated}: a single file must be a .gguf; for safetensors name the folder that also holds "
            "config.json",
            field="model",
        )
    return ModelSource("gguf", path.resolve(), _QUANTIZATION_SUFFIX.sub("", path.stem), stated)


def _folder(path: Path, stated: str) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource("hf", path.resolve(), path.resolve().name, stated)
    files = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; name one of its files, for example {path / files[0]}" if files else ""
    raise UnsupportedModel(f"model {stated}: the folder has no config.json{hint}", field="model")
