"""What a peer is asked, what it may calibrate on, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Call, Sample, Sampling, sample_in_batches, watch

Inputs = dict[str, Tensor]
"""The tensors of one call of the denoiser, by the names of its arguments."""
Record = Callable[[], list[Inputs]]
FLOAT_BYTES = 2
"""Of a number that is not quantized, as the shipped models store it."""


@dataclass(frozen=True)
class Request:
    """How to sample, and which images to record and to draw."""

    sampling: Sampling
    record: list[Condition]
    compare: list[Condition]
    batch: int


@dataclass(frozen=True)
class QuantizationResult:
    """A denoiser as the peer leaves it."""

    denoiser: nn.Module
    size_bytes: int
    """As the peer stores it, or would."""
    parameters: int
    """How many of the denoiser's numbers are quantized."""
    simulated: bool
    """Whether it computes in floats what the format would compute in integers."""
    compiled: bool = False
    """Whether the peer means it to be timed after torch.compile."""


def read_request(path: Path) -> Request:
    """The request that the benchmark wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    record, compare = ([Condition(text, seed) for text, seed in found[name]] for name in ("record", "compare"))
    return Request(Sampling(found["steps"], found["guidance_scale"]), record, compare, found["batch"])


def draw(pipeline: Any, wanted: Sequence[Condition], request: Request) -> Sample:
    """Images of all conditions, a batch at a time."""
    return sample_in_batches(pipeline, wanted, request.sampling, request.batch)


def record_inputs(pipeline: Any, request: Request) -> list[Inputs]:
    """What the denoiser is called with while the recorded conditions are drawn."""
    calls: list[Inputs] = []

    def receive(call: Call) -> None:
        calls.append(call.inputs)

    with watch(pipeline, receive):
        draw(pipeline, request.record, request)
    return calls
