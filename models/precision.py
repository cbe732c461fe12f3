"""Full precision inside mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Context without autocast, for what bfloat16 would spoil: 1 + dg would round away every |dg|
    below 2^-8. Nothing where autocast is off anyway: files of exported programs cannot hold such
    a context."""
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
