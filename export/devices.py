"""Where a pipeline can be."""

from __future__ import annotations

import torch

from .errors import UserError


def check_device(device: str | torch.device | None, word: str = "device ") -> None:
    """Raises UserError for a device that this machine has not; `word` is what the user knows it by. None is the CPU."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{word}{device} cannot be used here: {reason}") from error
