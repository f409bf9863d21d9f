"""The Hugging Face hub as huggingface_hub sees it over HTTP, without a network."""

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils._http import default_client_factory

_HTTP: Any = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # whichever client it uses
TOKEN = "hf_theoperators"
_PATH = re.compile(
    r"(?:/api/models/(?P<asked>[\w.-]+/[\w.-]+)(?:/revision/(?P<at>.+))?"
    r"|/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<commit>[^/]+)/(?P<file>.+))"
)


@dataclass
class Repository:
    """Files by name; `stated` are sizes that are told of files instead of theirs."""

    files: dict[str, bytes]
    private: bool = False
    stated: dict[str, int | None] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """Another one for other files."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class FakeHub:
    """Repositories; what was asked for; and what happens first to each request."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # method and path
    before: Callable[[str], None] = lambda _: None

    def add(self, name: str, folder: Path, **fields: Any) -> Repository:
        """A repository with the files of a folder."""
        self.repositories[name] = Repository({path.name: path.read_bytes() for path in folder.iterdir()}, **fields)
        return self.repositories[name]

    @property
    def downloaded(self) -> list[str]:
        """Names of files whose bytes were asked for."""
        return [asked.rpartition("/")[2] for asked in self.asked if asked.startswith("GET") and "/resolve/" in asked]

    def answer(self, request: Any) -> Any:
        """As the hub would."""
        asked = f"{request.method} {request.url.path}"
        self.asked.append(asked)
        self.before(asked)
        found = _PATH.fullmatch(request.url.path)
        repository = self.repositories.get((found["asked"] or found["repo"]) if found else "")
        if repository is None or (repository.private and TOKEN not in request.headers.get("authorization", "")):
            return _HTTP.Response(401, headers={"X-Error-Message": "Invalid username or password."}, request=request)
        if (found["at"] or found["commit"] or "main") not in {"main", repository.commit}:
            return _HTTP.Response(404, headers={"X-Error-Code": "RevisionNotFound"}, request=request)
        if found["asked"]:
            return _HTTP.Response(200, json=_info(found["asked"], repository), request=request)
        content = repository.files[found["file"]]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Content-Length": str(len(content)),
        }
        body = b"" if request.method == "HEAD" else content
        return _HTTP.Response(200, headers=headers, content=body, request=request)


def _info(name: str, repository: Repository) -> dict[str, Any]:
    sizes = {file: len(content) for file, content in repository.files.items()} | repository.stated
    return {
        "id": name,
        "sha": repository.commit,
        "siblings": [{"rfilename": file, "size": size} for file, size in sizes.items()],
    }


@contextmanager
def fake_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """In the place of the hub, for an operator who has a token; `cache` is huggingface_hub's own."""
    hub = FakeHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    huggingface_hub.set_client_factory(lambda: _HTTP.Client(transport=_HTTP.MockTransport(hub.answer)))
    try:
        yield hub
    finally:
        huggingface_hub.set_client_factory(default_client_factory)


def http_error(name: str) -> Exception:
    """One of huggingface_hub's HTTP client."""
    error: Exception = getattr(_HTTP, name)("https://hub.example/file?X-Amz-Signature=secret")
    return error
