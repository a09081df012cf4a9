"""One file of recorded calls: what several calls saw alike, such as the prompt's encoding, is held once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpress.export.tensor_files import save_tensors

from .sampling import Call, timestep_of

Answer = Callable[[Call], Tensor]
"""What is written as the output of a call, where that is not what the denoiser itself answered."""


@dataclass
class Shard:
    """What is recorded of one call of the pipeline, in main memory."""

    answer: Answer | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    """Names of tensors that are not held, with that of an equal one that is."""
    steps: list[int] = field(default_factory=list)
    """Of every call."""
    branches: list[int] = field(default_factory=list)
    """Of every call: how many came before it since the sample was last updated."""
    updates: list[int] = field(default_factory=list)
    """The step of every update of the sample by the scheduler."""
    timesteps: dict[int, float] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    """Bytes that are held of every call."""
    _known: dict[bytes, str] = field(default_factory=dict)

    def receive(self, call: Call) -> None:
        """Hold a call of the denoiser."""
        following = bool(self.steps) and self.steps[-1] == call.step and not self._guided()
        self.branches.append(self.branches[-1] + 1 if following else 0)
        self.steps.append(call.step)
        self.timesteps[call.step] = timestep_of(call.inputs)
        self.sizes.append(0)
        for name, value in call.inputs.items():
            self._hold(f"inputs.{name}", value)
        self._hold("output", call.output if self.answer is None else self.answer(call))

    def receive_guided(self, guided: Tensor) -> None:
        """Hold what the scheduler was given after the last call."""
        self.updates.append(self.steps[-1])
        self._hold("guided", guided)

    def write(self, path: Path, request: str) -> None:
        """Write everything into one file; a file that is there is whole."""
        record = {
            "request": request,
            "steps": self.steps,
            "branches": self.branches,
            "updates": self.updates,
            "timesteps": list(self.timesteps.values()),
            "same": self.same,
        }
        # One key: safetensors writes several in a random order, and the same request must give the same bytes.
        save_tensors(self.tensors, path, {"record": json.dumps(record)})

    def _guided(self) -> bool:
        name = f"{len(self.steps) - 1:05d}.guided"
        return name in self.tensors or name in self.same

    def _hold(self, name: str, value: Tensor) -> None:
        name, value = f"{len(self.steps) - 1:05d}.{name}", value.detach().cpu().contiguous()
        first = self._known.setdefault(_content(value), name)
        if first != name:
            self.same[name] = first
            return
        self.tensors[name] = value.clone()
        self.sizes[-1] += value.numel() * value.element_size()


def _content(value: Tensor) -> bytes:
    """What is equal for equal tensors alone."""
    form = f"{value.dtype} {list(value.shape)}".encode()
    # One number that was expanded counts as contiguous, and cannot be looked at as bytes.
    flat = value.reshape(-1).clone(memory_format=torch.contiguous_format)
    return hashlib.sha256(form + flat.view(torch.uint8).numpy().tobytes()).digest()


def record_of(file: Any) -> dict[str, Any]:
    """What an open shard says of itself."""
    return json.loads((file.metadata() or {}).get("record", "{}"))


def holds(path: Path, request: str) -> bool:
    """Whether a readable shard of exactly this request is there already."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return record_of(file).get("request") == request
    except (SafetensorError, OSError):
        return False


def read_call(file: Any, record: dict[str, Any], index: int) -> Call:
    """One call of an open shard."""
    own = {name: file.get_tensor(held) for name, held in names_of(file.keys(), record["same"], index).items()}
    output, guided = own.pop("output"), own.pop("guided", None)
    inputs = {name.removeprefix("inputs."): value for name, value in own.items()}
    return Call(inputs, output, record["steps"][index], guided, record["branches"][index])


def names_of(stored: Sequence[str], same: dict[str, str], index: int) -> dict[str, str]:
    """What is recorded of the call at `index`, with the name under which each tensor is held."""
    prefix = f"{index:05d}."
    held = {name: name for name in stored} | same
    own = sorted(name for name in held if name.startswith(prefix))
    return {name.removeprefix(prefix): held[name] for name in own}
