"""A layer of two factors: what may be done with it once it is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load, load_pipeline, verify
from diffpress.export.edits import Factorize, Pack
from diffpress.export.errors import ArtifactError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx
from diffpress.export.runtime import FactorizedLinear, PackedLinear, factorize_layer
from diffpress.kernels import pack_codes

LAYER = "transformer_blocks.1.ff.net.2"
RANK = 4


def factors(module: str, columns: int, rows: int) -> tuple[Factorize, dict[str, Tensor]]:
    """Of a layer in the unet, or in the transformer where its name says so."""
    component = "transformer" if module.startswith("transformer") else "unet"
    generator = torch.Generator().manual_seed(0)
    shapes = {"down.weight": (RANK, columns), "up.weight": (rows, RANK), "up.bias": (rows,)}
    tensors = {f"{module}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Factorize(component=component, module=module, rank=RANK), tensors


def packed(module: str, rows: int, columns: int) -> tuple[Pack, dict[str, Tensor]]:
    """Weights in eight bits, all of them one tenth."""
    edit = Pack(component="transformer", module=module, weight_bits=8, activation_bits=None, group_size=columns)
    codes = torch.full((rows, columns), 10, dtype=torch.int8)
    return edit, {f"{module}.weight": pack_codes(codes, 8), f"{module}.weight_scale": torch.full((rows, 1), 0.01)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_later_edits_name_its_factors(
    dtype: torch.dtype, tiny_class: Path, save_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    edit, tensors = factors(LAYER, 64, 16)
    later = [packed(f"{LAYER}.down", RANK, 64), packed(f"{LAYER}.up", 16, RANK)]
    edits = [edit, *(own for own, _ in later)]
    for _, own in later:
        tensors |= own
    out = save_artifact(tiny_class, tmp_path / "out", edits, {"transformer": tensors}, [])
    verify(out)
    layer = DiffusionPipeline.from_pretrained(out, dtype=dtype).transformer.get_submodule(LAYER)
    assert isinstance(layer, FactorizedLinear)
    assert isinstance(layer.down, PackedLinear)
    assert isinstance(layer.up, PackedLinear)
    bias = tensors[f"{LAYER}.up.bias"]
    assert torch.equal(layer.up.bias, bias)
    x = torch.linspace(-1, 1, 64).expand(3, 64).to(dtype)
    found = layer(x)
    assert found.dtype == dtype
    expected = 0.1 * RANK * 0.1 * x.float().sum(-1, keepdim=True) + bias
    # Sums of some tens of numbers around one, rounded to the dtype that is answered in.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_the_layer_itself_can_be_packed_no_more(tiny_class: Path) -> None:
    model = load_pipeline(PipelineFolder(tiny_class, "tiny")).transformer
    with pytest.raises(ArtifactError, match=rf"{LAYER} does not apply.*FactorizedLinear is neither Linear"):
        apply_edits_(model, [factors(LAYER, 64, 16)[0], packed(LAYER, 16, 64)[0]], [])


def test_what_has_no_factors_of_that_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 5 is more than a weight of 4 x 9 can have"):
        factorize_layer(nn.Linear(9, 4), 5)
    with pytest.raises(ValueError, match=r"Conv2d is no Linear"):
        factorize_layer(nn.Conv2d(3, 3, 1), 1)


def test_torch_compile_takes_it_as_one_graph() -> None:
    layer = factorize_layer(nn.Linear(9, 4), 2)
    for tensor in layer.buffers():
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    graphs = []

    def backend(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    x = torch.ones(3, 9)
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.long
def test_it_is_exported_with_the_rest(tiny_text: Path, save_artifact: Callable[..., Path], tmp_path: Path) -> None:
    """An export compares itself with the model that it was made of."""
    unet = load_pipeline(PipelineFolder(tiny_text, "tiny")).unet
    layers = [name for name, _ in unet.named_modules() if name.endswith("time_emb_proj")]
    edits, tensors = [], {}
    for name in layers:
        layer = unet.get_submodule(name)
        edit, own = factors(name, layer.in_features, layer.out_features)
        edits.append(edit)
        tensors |= {key: 0.1 * tensor for key, tensor in own.items()}
    out = save_artifact(tiny_text, tmp_path / "out", edits, {"unet": tensors}, [])
    load(out)
    export_onnx(PipelineFolder(out, "out"), tmp_path / "export", steps=3, guidance_scale=3.0)
