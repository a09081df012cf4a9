"""What is done to a graph between tracing and writing it: one file a pass."""

from __future__ import annotations

import onnx_ir as ir

from ...engines.engine import Form
from .center_weights import CenterWeights
from .forecast_features import ForecastFeatures
from .hold_features import HoldFeatures
from .lay_weights_out import LayWeightsOut
from .narrow_weights import NarrowWeights
from .positive_scales import PositiveScales
from .simplify import Simplify
from .whole_blocks import WholeBlocks
from .widen_weights import widen_weights_

__all__ = [
    "CenterWeights",
    "ForecastFeatures",
    "HoldFeatures",
    "LayWeightsOut",
    "NarrowWeights",
    "PositiveScales",
    "Simplify",
    "WholeBlocks",
    "passes_for",
    "widen_weights_",
]


def passes_for(form: Form) -> list[ir.passes.InPlacePass]:
    """The passes that bring a traced graph into a form, in their order."""
    centered = [CenterWeights()] if form == "uint8 x uint8" else []
    positive = [WholeBlocks(), PositiveScales()] if form == "int8 folded" else []
    return [Simplify(), LayWeightsOut(), *centered, *positive, NarrowWeights()]
