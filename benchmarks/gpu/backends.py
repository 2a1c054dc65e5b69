"""Every backend of every part of a layer, and why those that cannot run here cannot."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hymba_align.model.kernels.choice import BACKENDS, PLAIN


def load(part: str, name: str) -> Any:
    """The class of a backend."""
    module, _, attribute = BACKENDS[part][name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def why_not(part: str, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run there, as its own module says; None if it can."""
    if name == PLAIN[part]:
        return None
    module = importlib.import_module(BACKENDS[part][name].partition(":")[0])
    reason: str | None = module.unavailable(device, dtype)
    return reason


def all_of(part: str) -> list[str]:
    """The names of a part's backends."""
    return list(BACKENDS[part])
