"""Packed weights to int8."""

from __future__ import annotations

import torch
from torch import nn

from diffpress.export.edits import Pack
from diffpress.export.onnx.passes import widen_weights_
from diffpress.export.runtime import pack_layer
from diffpress.kernels import pack_codes


def test_values_stay_and_eight_bits_are_left_alone() -> None:
    edit = Pack(component="unet", module="layer", weight_bits=3, activation_bits=None, group_size=2)
    layer = pack_layer(nn.Linear(3, 1), edit, None)
    layer.weight = pack_codes(torch.tensor([[-4, 3, 1]], dtype=torch.int8), 3)
    x = torch.tensor([[1.0, 10.0, 100.0]])
    before, module = layer(x), nn.Sequential(layer)
    assert widen_weights_(module)
    assert layer.weight.tolist() == [[-4, 3, 1]]
    assert torch.equal(layer(x), before)
    assert not widen_weights_(module)
