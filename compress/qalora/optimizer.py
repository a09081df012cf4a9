"""The optimizer, and where its state is kept."""

from __future__ import annotations

from typing import Any

import torch

from diffpress.export.errors import UserError

BETAS = (0.9, 0.99)
"""Of Adam; the second moment forgets fast, since a scale of one step is seen in few batches."""


def make_optimizer(name: str, groups: list[dict[str, Any]], large: bool) -> torch.optim.Optimizer:
    """Adam over `groups`; `large`: in the way that takes no temporary copies. Raises UserError where adam8bit is missing."""
    if name == "adam8bit":
        return _adam8bit()(groups, betas=BETAS)
    # Small tensors are quicker many at a time.
    return torch.optim.Adam(groups, betas=BETAS, foreach=not large, fused=large)


def _adam8bit() -> Any:
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise UserError("quantize.optimizer: adam8bit needs bitsandbytes: pip install 'diffpress[gpu]'.") from error
    return Adam8bit
