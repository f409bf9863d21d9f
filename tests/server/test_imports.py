"""The API process imports no torch: a module of it must not bring the engine's packages along."""

import subprocess
import sys

import pytest

MODULES = [
    "api.server",
    "api.http.app",
    "api.grpc.server",
    "frontend.service",
    "frontend.registry",
    "frontend.adaptation",
    "frontend.text",
    "ipc.engine_client",
    "cli.serve",
    "cli.generate",
    "cli.adapters",
]


@pytest.mark.parametrize("module", MODULES)
def test_no_heavy_package_comes_along(module: str) -> None:
    assert loaded_by(f"perseid_server.{module}", "torch", "transformers", "triton", "perseid_kernels") == "[]"


def test_the_engines_process_needs_no_packages_of_the_api() -> None:
    packages = ("fastapi", "grpc", "uvicorn", "prometheus_client", "jinja2")
    assert loaded_by("perseid_server.engine.build", *packages) == "[]"


def loaded_by(module: str, *packages: str) -> str:
    """Which of the packages a fresh interpreter holds after importing a module."""
    code = f"import sys, {module}\nprint([name for name in {packages!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
