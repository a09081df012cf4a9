"""The graph by which an engine's sums are tried, in the form that layers are written in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from diffpress.kernels import int8_attention, quantized_conv2d, quantized_linear

from ..engines.engine import Form
from ..engines.worst_case import GRAPH, KERNEL, OUTPUT, worst_case
from .part import Input, Part
from .write import write_graph

GEOMETRY = ((KERNEL, KERNEL), (1, 1), (KERNEL // 2, KERNEL // 2), (1, 1))
"""Kernel size, stride, padding and dilation."""


class _EveryKind(nn.Module):
    """One layer of each kind, all scales 1, their outputs one after the other [B, ...]."""

    linear: Tensor
    conv2d: Tensor
    ones: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, weights in worst_case().weights.items():
            self.register_buffer(name, torch.from_numpy(weights))
        self.register_buffer("ones", torch.ones(len(self.linear)))

    def forward(self, tokens: Tensor, image: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scales = (self.ones, self.ones[:1], None, None)
        outputs = (
            quantized_linear(tokens, self.linear, *scales, 8, 8),
            quantized_conv2d(image, self.conv2d, *scales, *GEOMETRY, 8, 8),
            int8_attention(query, key, value),
            # Queries of 0 weigh all keys alike.
            int8_attention(0 * query, key, value, True),
        )
        return torch.cat([output.flatten(1) for output in outputs], 1)


def write_worst_case(folder: Path, form: Form) -> str:
    """Write the graph to a folder; returns its file name. The weights lie beside it."""
    for name, content in _files(form).items():
        (folder / name).write_bytes(content)
    return f"{GRAPH}.onnx"


@cache
def _files(form: Form) -> dict[str, bytes]:
    inputs = tuple(Input(name, array.shape[1:]) for name, array in worst_case().inputs.items())
    with TemporaryDirectory() as folder:
        write_graph(Part(GRAPH, _EveryKind().eval(), inputs, OUTPUT), Path(folder), form)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
