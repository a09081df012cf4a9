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

from .inputs import Inputs
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
    only: str | None = None
    """The part whose calls are held, where others' are not."""
    parts: list[str] = field(default_factory=list)
    """Which denoiser every call is of."""
    steps: list[int] = field(default_factory=list)
    """Of every call."""
    branches: list[int] = field(default_factory=list)
    """Of every call: how many of its denoiser came before it since the sample was last updated."""
    updates: list[tuple[str, int]] = field(default_factory=list)
    """The denoiser and the step of the last call before every update of the sample by a scheduler."""
    timesteps: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of every denoiser, by step."""
    around: list[str] = field(default_factory=list)
    """Of every call: what its tensors are in, and all that is no tensor, as JSON."""
    sizes: list[int] = field(default_factory=list)
    """Bytes that are held of every call."""
    _known: dict[bytes, str] = field(default_factory=dict)
    _since: list[tuple[str, int]] = field(default_factory=list)
    """The denoisers and steps of the calls since the sample was last updated."""
    _held: bool = True
    """Whether the latest call is."""

    def receive(self, call: Call) -> None:
        """Hold a call of a denoiser."""
        self._held = self.only in (None, call.part)
        if not self._held:
            return
        if any(own == call.part and step != call.step for own, step in self._since):
            self._since = []
        self.branches.append(self._since.count((call.part, call.step)))
        self._since.append((call.part, call.step))
        self.parts.append(call.part)
        self.steps.append(call.step)
        self.timesteps.setdefault(call.part, {})[call.step] = timestep_of(call.inputs)
        self.around.append(json.dumps(Inputs.like(call.inputs).around))
        self.sizes.append(0)
        for name, value in call.inputs.items():
            self._hold(f"inputs.{name}", value)
        self._hold("output", call.output if self.answer is None else self.answer(call))

    def receive_guided(self, guided: Tensor) -> None:
        """Hold what a scheduler was given after the last call."""
        self._since = []
        if self._held and self.steps:
            self.updates.append((self.parts[-1], self.steps[-1]))
            self._hold("guided", guided)

    def step_count(self) -> int:
        """The steps of the run: a step at which several denoisers are called is one."""
        return len(set(self.updates)) or sum(map(len, self.timesteps.values()))

    def write(self, path: Path, request: str) -> None:
        """Write everything into one file; a file that is there is whole."""
        record = {
            "request": request,
            "parts": self.parts,
            "steps": self.steps,
            "branches": self.branches,
            "updates": self.updates,
            "timesteps": {part: [own[step] for step in sorted(own)] for part, own in self.timesteps.items()},
            **_told_apart(self.around),
            "same": self.same,
        }
        # One key: safetensors writes several in a random order, and the same request must give the same bytes.
        save_tensors(self.tensors, path, {"record": json.dumps(record)})

    def _hold(self, name: str, value: Tensor) -> None:
        name, value = f"{len(self.steps) - 1:05d}.{name}", value.detach().cpu().contiguous()
        first = self._known.setdefault(_content(value), name)
        if first != name:
            self.same[name] = first
            return
        self.tensors[name] = value.clone()
        self.sizes[-1] += value.numel() * value.element_size()


def _told_apart(around: list[str]) -> dict[str, Any]:
    """What is around the tensors of calls, each once, and which of them is around those of which call."""
    different = list(dict.fromkeys(around))
    return {"around": [json.loads(own) for own in different], "arounds": [different.index(own) for own in around]}


def around(record: dict[str, Any], index: int) -> Any:
    """What is around the tensors of one call of a shard."""
    return record["around"][record["arounds"][index]]


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
    held = Inputs(inputs, around(record, index))
    step, branch, part = (record[key][index] for key in ("steps", "branches", "parts"))
    return Call(held, output, step, guided, branch, part)


def names_of(stored: Sequence[str], same: dict[str, str], index: int) -> dict[str, str]:
    """What is recorded of the call at `index`, with the name under which each tensor is held."""
    prefix = f"{index:05d}."
    held = {name: name for name in stored} | same
    own = sorted(name for name in held if name.startswith(prefix))
    return {name.removeprefix(prefix): held[name] for name in own}
