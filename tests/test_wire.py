"""What workers send over their sockets."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch

from smaug_ds.data import wire
from tests.pools import descriptors


def test_wire_carries_views_of_large_arrays_and_copies_of_small_ones() -> None:
    here, there = wire.pair()
    with here, there:
        with pytest.raises(BlockingIOError):
            wire.receive(there)
        value: dict[str, Any] = {
            "large": torch.arange(100_000),
            "odd": torch.arange(70_001, dtype=torch.uint8),
            "small": torch.tensor([True, False]),
            "array": np.ones((300, 300), np.float32),
            "nothing": torch.empty(0),
            "words": ["a", "ä"],
        }
        gc.collect()
        before = descriptors(os.getpid())
        wire.send(here, 7, value, wait=lambda: None)
        wire.send(here, 8, "next", wait=lambda: None)
        note, received = wire.receive(there)
        assert note == 7 and received["words"] == value["words"]
        for name in ("large", "odd", "small", "nothing"):
            assert torch.equal(received[name], value[name]) and received[name].dtype == value[name].dtype
        np.testing.assert_array_equal(received["array"], value["array"])
        received["large"] += 1  # it is the receiver's own
        assert received["large"].data_ptr() % 64 == 0
        assert not received["small"].untyped_storage().nbytes() > 64
        assert wire.receive(there) == (8, "next")
        del received
        gc.collect()
        assert descriptors(os.getpid()) == before
        wire.send(there, 9, "never read", wait=lambda: None)
        wire.send(here, 10, "last", wait=lambda: None)
        here.close()
        assert wire.receive(there) == (10, "last")
        with pytest.raises(EOFError):
            wire.receive(there)
