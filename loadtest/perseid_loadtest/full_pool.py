"""Writes to all of a server's adapter memory once: what is taken as it is first used is taken then, and not while
memory is measured."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from perseid_loadtest.engines import get_json
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.target import Answer, Target
from perseid_loadtest.variations import Variations

PAGE_RANK = 16
"""Rows of a page of adapter memory; an adapter of this rank on all linears fills one."""
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


async def fill_adapter_memory(target: Target, url: str, example: Path, folder: Path, plan: Plan) -> int:
    """Load and use as many adapters as there are pages, then unload them. Returns the number of pages.

    `example` adapts all linears with one rank of at most 16; `plan` has the prompts.
    """
    adapters = (await asyncio.to_thread(get_json, url, "/debug/state"))["adapters"]
    num_pages = int(adapters["pages_used"]) + int(adapters["pages_free"])
    fillers = Variations([widened(example, folder / "widened")], folder / "fillers", 1)
    (source,) = fillers.folders
    for number in range(num_pages):
        fillers.renew(source)
        await target.load(f"filler-{number}", source, replace=False)
    asked = (replace(plan.request(number), adapter=f"filler-{number}", output_tokens=1) for number in range(num_pages))
    await asyncio.gather(*(target.ask(request, Answer(0.0)) for request in asked))
    for number in range(num_pages):
        await target.unload(f"filler-{number}")
    return num_pages


def widened(example: Path, folder: Path) -> Path:
    """The example with its rows repeated up to a rank of 16, in a folder of its own."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415  torch, only where it is needed

    config: dict[str, Any] = json.loads((example / _CONFIG).read_text())
    times = PAGE_RANK // int(config["r"])
    shutil.copytree(example, folder)
    (folder / _CONFIG).write_text(json.dumps({**config, "r": times * int(config["r"])}))
    tensors = load_file(example / _WEIGHTS)
    repeated = {
        name: tensor.repeat(*((times, 1) if "lora_A" in name else (1, times))).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(repeated, folder / _WEIGHTS)
    return folder
