"""cache_groups: which layers share a page table."""

import pytest

from tscompile.cache_groups import CacheGroup, cache_groups
from tscompile.errors import InternalError

SIZES = {"max_context": 8192, "max_tokens": 512, "page_size": 64}


def test_layers_of_one_kind_are_one_group() -> None:
    assert cache_groups([0] * 5, **SIZES) == [CacheGroup(0, (0, 1, 2, 3, 4))]
    assert cache_groups([256] * 3, **SIZES) == [CacheGroup(256, (0, 1, 2))]
    assert cache_groups([0], **SIZES)[0].fields() == {"kind": "full"}
    assert cache_groups([256], **SIZES)[0].fields() == {"kind": "window", "window": 256}


def test_half_and_half_are_two_groups() -> None:
    assert cache_groups([0, 9, 0, 9], **SIZES) == [CacheGroup(0, (0, 2)), CacheGroup(9, (1, 3))]


def test_five_windows_to_one_full() -> None:
    """As Gemma 3: groups of as many layers as attend to everything, so no page has a part without use."""
    windows = [0 if layer % 6 == 5 else 1024 for layer in range(36)]
    groups = cache_groups(windows, **SIZES)
    assert [len(group.layers) for group in groups] == [6] * 6
    assert [group.window for group in groups] == [0] + [1024] * 5
    assert sorted(layer for group in groups for layer in group.layers) == list(range(36))


def test_few_full_layers_are_not_padded_to_many_windows() -> None:
    """Two layers that attend to everything beside 20: ten times their pages would be wasted otherwise."""
    groups = cache_groups([0, 0] + [64] * 20, **SIZES)
    assert [len(group.layers) for group in groups] == [2] * 11


def test_windows_that_hold_the_longest_context_are_none() -> None:
    groups = cache_groups([0, 5, 5, 5], max_context=64, max_tokens=512, page_size=64)
    assert [len(group.layers) for group in groups] == [1] * 4
    assert cache_groups([0, 64, 100], max_context=64, max_tokens=512, page_size=32) == [
        CacheGroup(0, (0, 1, 2))
    ]


def test_there_is_a_most() -> None:
    assert len(cache_groups([0] + [64] * 40, **SIZES)) <= 16
    with pytest.raises(InternalError, match="17 kinds of layers make more than 16 cache groups"):
        cache_groups(list(range(17)), **SIZES)
