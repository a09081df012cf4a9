"""Features as they are held between steps."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from diffpress.export.onnx.features import Feature
from diffpress.export.onnx.passes import HoldFeatures
from diffpress.export.runtime import hold
from diffpress.export.runtime.step_plan import Storage

TEXT = """
<ir_version: 10, opset_import: ["": 21]>
unit (float[N, 3] x) => (float[N, 3] output, float[N, 3] feature)
{
    output = Neg(x)
    feature = Identity(x)
}
"""


def held(storage: Storage) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    own = Feature("feature", 0, 0, added=True, shape=(3,), kept=1, storage=storage, tables=None)
    assert HoldFeatures([own])(model).modified == (storage != "computed")
    return model


@pytest.mark.parametrize("storage", ["int8", "bfloat16", "computed"])
@pytest.mark.parametrize("size", [1.0, 1e-20, 0.0])
def test_numbers_are_those_that_torch_holds(storage: Storage, size: float) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = size * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = hold(x, storage)
    session = onnxruntime.InferenceSession(ir.to_proto(held(storage)).SerializeToString())
    output, feature, *scale = session.run(None, {"x": x.numpy()})
    np.testing.assert_array_equal(output, -x.numpy())
    np.testing.assert_array_equal(
        feature, expected.values.to(torch.int8 if storage == "int8" else torch.float32).numpy()
    )
    assert [value.tolist() for value in scale] == ([] if expected.scale is None else [expected.scale.item()])
