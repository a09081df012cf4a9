"""One resumable training loop for everything in the zoo."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffpress.export.tensor_files import save_tensors

logger = logging.getLogger(__name__)

Loss = Callable[[torch.Generator], Tensor]
"""The loss of one fresh batch, all randomness drawn from the given generator."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the rate falls linearly to zero over the last `cooldown` share."""

    steps: int
    rate: float
    warmup: int = 200
    cooldown: float = 0.4
    averaging: float = 0.999
    save_every: int = 500

    def rate_at(self, step: int) -> float:
        """Learning rate of the step about to be taken."""
        falling = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, falling)


def train_(model: nn.Module, loss: Loss, schedule: Schedule, checkpoint: Path, seed: int) -> int:
    """Train `model` in place, continuing from `checkpoint` where it exists; its weights end as their running average.

    Every step draws from a generator seeded by (seed, step), so a resumed run sees the batches an uninterrupted one does.
    Returns the number of steps taken now.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=schedule.rate, weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    start = _restore(checkpoint, parameters, average, optimizer) if checkpoint.exists() else 0
    began, running = time.monotonic(), 0.0
    for step in range(start, schedule.steps):
        value = _take_step(parameters, optimizer, loss, schedule, step, seed)
        decay = min(schedule.averaging, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        running = value if step == start else 0.98 * running + 0.02 * value
        if (step + 1) % 100 == 0:
            left = (schedule.steps - step - 1) * (time.monotonic() - began) / (step + 1 - start)
            logger.info("step %d/%d loss %.4f, %.0f s left", step + 1, schedule.steps, running, left)
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            _save(checkpoint, parameters, average, optimizer, step + 1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(average[name])
    return max(0, schedule.steps - start)


def _take_step(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    loss: Loss,
    schedule: Schedule,
    step: int,
    seed: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate_at(step)
    value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    return float(value.detach())


def _save(
    path: Path, parameters: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer: torch.optim.AdamW, step: int
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    save_tensors({key: value.contiguous() for key, value in tensors.items()}, path, {"step": str(step)})


def _restore(
    path: Path, parameters: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer: torch.optim.AdamW
) -> int:
    with safe_open(path, framework="pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            average[name].copy_(file.get_tensor(f"average.{name}"))
            moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            for key, value in moments.items():
                value.copy_(file.get_tensor(f"{key}.{name}"))
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step
