"""Forecasts in the places of features."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from diffpress.export.onnx.features import Feature
from diffpress.export.onnx.passes import ForecastFeatures
from diffpress.export.portable.manifest import CORRECTION, FORECAST

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
unit (float[N, 2] x) => (float[N, 2] output, float[N, 2] feature)
<float[2] w = {3, 5}>
{
    branch = Mul(x, w)
    sum = Add(x, branch)
    feature = Sub(sum, x)
    output = Neg(sum)
}
"""
X = np.array([[1, 2], [3, 4]], np.float32)
PAST = [np.array([[5, 6], [7, 8]], np.float32), np.array([[1, 1], [2, 3]], np.float32)]
WEIGHTS = np.array([[0, 0], [1.5, -0.5]], np.float32)
TABLES = (np.array([[2, 3], [1, 1]], np.float16), np.array([[0.5, 0.25], [0, 0]], np.float16))


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def feature(**settings: Any) -> Feature:
    own: dict[str, Any] = {"added": True, "kept": 2, "storage": "computed", "tables": TABLES}
    return Feature(name="feature", unit=1, place=0, shape=(2,), **{**own, **settings})


def forecast(model: ir.Model, own: Feature, inputs: dict[str, Any]) -> Any:
    assert ForecastFeatures([own], units=2)(model).modified
    assert {value.name for value in model.graph.inputs} == {"x", *inputs}
    assert [value.name for value in model.graph.outputs] == ["output"]
    (output,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": X, **inputs})
    return output


def test_what_a_feature_is_added_to_stays_fresh(model: ir.Model) -> None:
    pasts = {f"feature.past{count}": past for count, past in enumerate(PAST, 1)}
    output = forecast(model, feature(), {FORECAST: WEIGHTS, CORRECTION: np.array(0), **pasts})
    made = WEIGHTS[1, 0] * PAST[0] + WEIGHTS[1, 1] * PAST[1]
    np.testing.assert_array_equal(output, -(X + made * TABLES[0][0] + TABLES[1][0]))
    # Its weights are needed no more.
    assert "branch" not in {value.name for node in model.graph for value in node.outputs}


def test_the_last_row_corrects_nothing(model: ir.Model) -> None:
    pasts = {f"feature.past{count}": past for count, past in enumerate(PAST, 1)}
    output = forecast(model, feature(), {FORECAST: WEIGHTS, CORRECTION: np.array(1), **pasts})
    np.testing.assert_array_equal(output, -(X + 1.5 * PAST[0] - 0.5 * PAST[1]))


def test_all_that_a_unit_gives_is_held_without_weights() -> None:
    text = TEXT.replace("feature = Sub(sum, x)", "feature = Identity(sum)")
    own = feature(added=False, kept=1, tables=None)
    output = forecast(ir.from_proto(onnx.parser.parse_model(text)), own, {"feature.past1": PAST[0]})
    np.testing.assert_array_equal(output, -PAST[0])


def test_past_integers_are_multiplied_by_their_scale(model: ir.Model) -> None:
    inputs = {"feature.past1": np.array([[10, -20], [30, 40]], np.int8), "feature.scale.past1": np.float32(0.5)}
    output = forecast(model, feature(kept=1, storage="int8", tables=None), inputs)
    np.testing.assert_array_equal(output, -(X + np.array([[5, -10], [15, 20]], np.float32)))


def test_no_feature_changes_nothing(model: ir.Model) -> None:
    assert not ForecastFeatures([], units=2)(model).modified
    assert [value.name for value in model.graph.outputs] == ["output", "feature"]
