"""How far learning has come, on disk, so that a killed run goes on as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpress.export.tensor_files import save_tensors


@dataclass
class Progress:
    """Where learning is; everything but the tensors."""

    iteration: int = 0
    best: float = float("inf")
    since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Iteration, loss and error of the validation images at every evaluation."""

    def take(self, evaluated: float, loss: float) -> bool:
        """Write a evaluation down; whether it is the best so far."""
        better = evaluated < self.best
        self.best, self.since_best = (evaluated, 0) if better else (self.best, self.since_best + 1)
        self.history.append({"iteration": self.iteration, "loss": loss, "evaluation": evaluated})
        return better

    def metadata(self) -> dict[str, str]:
        """What a file of tensors says of itself."""
        return {"progress": json.dumps(asdict(self))}


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write everything learned, its moving average, and the optimizer's state; the old file stays until then."""
    tensors: dict[str, Tensor] = {f"now.{name}": value for name, value in parameters.items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            # The code books of 8-bit states are one for all, which the file format refuses.
            tensors[f"optimizer.{key}.{name}"] = value.clone() if key.startswith("qmap") else torch.as_tensor(value)
    write_tensors(path, tensors, progress.metadata())


def checkpoint_bytes(learned: int, bytes_each: int, moments: int) -> int:
    """Most disk that checkpoints of so many learned numbers take, the optimizer keeping `moments` bytes of each.

    The latest, the next beside it until it is whole, and the best.
    """
    return learned * (2 * (2 * bytes_each + moments) + bytes_each)


def load_checkpoint(
    path: Path,
    parameters: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Put what `save_checkpoint` wrote back in place; the beginning where there is no readable file."""
    progress = read_progress(path)
    if progress is None:
        return Progress()
    read_tensors(path, parameters, "now.")
    read_tensors(path, average, "average.")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for stored_name in names:
            if stored_name.startswith("optimizer."):
                _, key, name = stored_name.split(".", 2)
                value, parameter = file.get_tensor(stored_name), parameters[name]
                # A copy, since what is read may be the file itself, which is about to be replaced.
                optimizer.state[parameter][key] = (
                    value.clone() if key == "step" else value.to(parameter.device, copy=True)
                )
    return progress


def read_progress(path: Path) -> Progress | None:
    """Where learning was when the file was written; None where there is no readable file."""
    try:
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads(file.metadata()["progress"]))
    except (SafetensorError, OSError):
        return None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors, without a copy of those in main memory; the old file stays until it is whole."""
    save_tensors({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, path, metadata)


@torch.no_grad()
def read_tensors(path: Path, into: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill the tensors of `into` from the file, one at a time."""
    with safe_open(path, framework="pt") as file:
        for name, value in into.items():
            value.copy_(file.get_tensor(prefix + name))
