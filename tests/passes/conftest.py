"""Passes are tested in the order of the pipeline, so that --update-golden writes what the next test reads."""

from __future__ import annotations

import pytest
import torch

from tscompile.pipeline import ALL

torch.set_num_threads(1)  # what runs here is tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return ALL.index(name) if item.path.parent.name == "passes" and name in ALL else -1

    items.sort(key=place)
