"""Settings every test folder shares."""

import os

import pytest

# Triton reads this when it is first imported, and a test elsewhere may import it before the kernels' tests do.
# TRITON_INTERPRET=0 in the environment runs the kernels' tests on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `chaos` runs only where it is asked for (`make chaos`)."""
    if "chaos" in config.option.markexpr:
        return
    long_forms = [item for item in items if item.get_closest_marker("chaos")]
    if long_forms:
        config.hook.pytest_deselected(items=long_forms)
        items[:] = [item for item in items if not item.get_closest_marker("chaos")]
