"""Settings every test folder shares."""

import os

import pytest

# Triton reads this when it is first imported, and a test elsewhere may import it before the kernels' tests do.
# TRITON_INTERPRET=0 in the environment runs the kernels' tests on a GPU instead.
os.environ.setdefault("TRITON_INTERPRET", "1")

LONG_FORMS = ("chaos", "fuzz")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked as a long form runs only where it is asked for (`make chaos`, `make fuzz`)."""
    unwanted = [mark for mark in LONG_FORMS if mark not in config.option.markexpr]
    long_forms = [item for item in items if any(item.get_closest_marker(mark) for mark in unwanted)]
    if long_forms:
        config.hook.pytest_deselected(items=long_forms)
        items[:] = [item for item in items if item not in long_forms]
