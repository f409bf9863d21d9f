"""Adapters that no server has seen: copies of some that there are, each with a scale of its own.

A server keeps adapters by content, so what comes and goes must differ from what stays, or nothing would be loaded.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

_CONFIG = "adapter_config.json"
_SMALLEST_STEP = 1e-3
"""Of the scale; enough for another content, too little for another behaviour."""


def vary(sources: Sequence[Path], folder: Path, count: int) -> list[str]:
    """`count` adapter folders below `folder`, the sources in turn; all differ from each other and from the sources."""
    made = []
    for number in range(count):
        target = folder / f"{number}"
        shutil.copytree(sources[number % len(sources)], target)
        config = json.loads((target / _CONFIG).read_text())
        config["lora_alpha"] *= 1.0 + _SMALLEST_STEP * (number + 1)
        (target / _CONFIG).write_text(json.dumps(config))
        made.append(str(target))
    return made
