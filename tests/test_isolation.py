"""A test finds the process as the first one did, whatever the one before it has left."""

from __future__ import annotations

import os
import signal
import sys

import torch

from hymba_align.data.reading import converters
from hymba_align.processes import signals


def test_a_test_may_leave_what_outlives_it_changed() -> None:
    os.environ["LEFT_BY_A_TEST"] = "1"
    del os.environ["HF_HUB_OFFLINE"]
    sys.path.append("left by a test")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signals._state.received_at = 1.0
    torch.set_default_dtype(torch.float64)
    converters._named.add(("left", "by a test"))


def test_the_next_one_finds_it_as_it_was() -> None:
    assert "LEFT_BY_A_TEST" not in os.environ
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "left by a test" not in sys.path
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not signals.requested()
    assert torch.get_default_dtype() == torch.float32
    assert ("left", "by a test") not in converters._named
