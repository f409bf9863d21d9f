"""The API process reads tokenizers and configs: what it imports must not bring torch."""

import subprocess
import sys

import pytest

MODULES = ["config", "embedded", "gguf_config", "gguf_tokenizer", "headers.gguf", "inspect", "source", "tokenizer"]


@pytest.mark.parametrize("module", MODULES)
def test_module_brings_no_heavy_package(module: str) -> None:
    code = (
        f"import sys, perseid_server.model.{module}\n"
        "heavy = ('torch', 'transformers', 'perseid_kernels', 'gguf', 'msgspec')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_checkpoints_need_neither_gguf_nor_transformers() -> None:
    code = (
        "import sys, perseid_server.model.checkpoint\nprint([n for n in ('gguf', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
