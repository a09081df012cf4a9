"""How far learning has come, on disk, so that a killed run goes on as if it had not been."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass
class Progress:
    """Where learning is; everything but the tensors."""

    iteration: int = 0
    best: float = float("inf")
    since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """Iteration, loss and held_back of every judgement."""


def save_checkpoint(
    path: Path,
    parameters: dict[str, nn.Parameter],
    kept: dict[str, dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write everything learned, `kept` sets of tensors by name, and the optimizer's state; the old file stays until then."""
    tensors = {f"now.{name}": value.detach() for name, value in parameters.items()}
    tensors |= {f"{group}.{name}": value for group, values in kept.items() for name, value in values.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    partial = path.with_suffix(".partial")
    stored = {name: value.contiguous().cpu().clone() for name, value in tensors.items()}
    save_file(stored, partial, metadata={"progress": json.dumps(asdict(progress))})
    partial.replace(path)


def load_checkpoint(
    path: Path,
    parameters: dict[str, nn.Parameter],
    kept: dict[str, dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
) -> Progress:
    """Put what `save_checkpoint` wrote back in place; the beginning where there is no readable file of these parameters."""
    try:
        with safe_open(path, framework="pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError):
        return Progress()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[f"now.{name}"])
        for stored_name, value in stored.items():
            group, key, name = stored_name.split(".", 2) if stored_name.startswith("optimizer.") else ("", "", "")
            if group:
                parameter = parameters[name]
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        for group, values in kept.items():
            for name in values:
                values[name].copy_(stored[f"{group}.{name}"])
    return progress
