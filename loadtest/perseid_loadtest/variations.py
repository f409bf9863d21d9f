"""Adapters that no server has seen: copies of some that there are, each with a scale of its own.

A server keeps adapters by content, so what comes and goes must differ from what stays and from what was there before,
or nothing would be loaded.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CONFIG = "adapter_config.json"
_SMALLEST_STEP = 1e-6
"""Of the scale; enough for another content, too little for another behaviour, also after thousands of them."""


class Variations:
    """Copies of the sources in turn, in folders of their own. Each can become another as often as one likes."""

    def __init__(self, sources: Sequence[Path], folder: Path, count: int) -> None:
        self._number = 0  # so many contents there have been
        self._configs: dict[str, dict[str, Any]] = {}  # of the sources, by copy
        for number in range(count):
            copy = shutil.copytree(sources[number % len(sources)], folder / f"{number}")
            self._configs[str(copy)] = json.loads((copy / _CONFIG).read_text())
            self.renew(str(copy))

    @property
    def folders(self) -> list[str]:
        """The copies, in order."""
        return list(self._configs)

    def renew(self, folder: str) -> None:
        """Give a copy a content that is none of the sources', and that no copy has had."""
        self._number += 1
        config = self._configs[folder]
        scale = config["lora_alpha"] * (1.0 + _SMALLEST_STEP * self._number)
        (Path(folder) / _CONFIG).write_text(json.dumps({**config, "lora_alpha": scale}))
