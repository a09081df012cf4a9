"""The float denoiser as an ONNX graph, and a module that lets another engine compute it inside the pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from numpy.typing import NDArray
from task import Inputs
from torch import Tensor, nn

OPSET = 21
"""The first with 4-bit tensors in QuantizeLinear and DequantizeLinear."""
TRACED_BATCH = 2
"""A dynamic axis cannot be traced at size 1."""

Arrays = dict[str, NDArray[Any]]


def export(denoiser: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write the denoiser at `path`, traced on recorded `inputs`, its batch left open."""
    batch = torch.export.Dim("batch")
    example = {name: value[:TRACED_BATCH] if value.ndim else value for name, value in inputs.items()}
    dynamic = {name: {0: batch} if value.ndim else None for name, value in inputs.items()}
    program = torch.onnx.export(
        denoiser,
        kwargs={**example, "return_dict": False},
        dynamic_shapes={**dynamic, "return_dict": None},
        dynamo=True,
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def arrays(inputs: Inputs) -> Arrays:
    """The same numbers for engines that know no torch."""
    return {name: value.numpy() for name, value in inputs.items()}


class StandIn(nn.Module):
    """In the place of diffusers' denoiser: takes its arguments, and has `run` compute the answer."""

    def __init__(self, denoiser: nn.Module, run: Callable[[Arrays], NDArray[np.float32]]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = denoiser.config, denoiser.dtype, denoiser.device
        self._signature, self._run = inspect.signature(denoiser.forward), run
        # With the signature of the denoiser, by which pipelines, and we, know what it takes.
        self.forward = functools.update_wrapper(functools.partial(self._answer), denoiser.forward)

    def _answer(self, *arguments: Any, **options: Any) -> UNet2DOutput:
        given = self._signature.bind(*arguments, **options).arguments
        inputs = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        return UNet2DOutput(torch.from_numpy(self._run(arrays(inputs))))
