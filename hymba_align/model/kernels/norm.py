"""Root mean square norm in plain torch, any device and dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` (L, D) in float32 with a root mean square of 1 per row, cast back, then scaled. Source: arXiv 1910.07467, equation 4."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)
