"""QuantizeAttention edits: what they change while a model runs, and how they are stored."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load, load_pipeline, verify
from diffpress.export.edits import QuantizeAttention
from diffpress.export.errors import ArtifactError
from diffpress.export.folder import PipelineFolder
from diffpress.export.load.config import EditsConfig
from diffpress.export.manifest import MANIFEST, list_files, read_manifest, write_manifest
from diffpress.export.runtime import attention_overrides, computes_attention
from diffpress.kernels import int8_attention

TIMESTEPS = [900.0, 400.0]


class Heads(nn.Module):
    """Self attention with a projection before it, in diffusers' form."""

    processor = None

    def __init__(self, heads: int = 2, columns: int = 8, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(12, 3 * heads * columns)
        self.heads, self.options = heads, options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        # One head of keys for all queries.
        k, v = (part[:, :1] if "enable_gqa" in self.options else part for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **self.options)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.project(x).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)


def attend(module: str = "", integer_values: bool = False, component: str = "unet") -> QuantizeAttention:
    return QuantizeAttention(component=component, module=module, integer_values=integer_values)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("integer_values", [False, True])
def test_attention_inside_of_the_module_is_the_operation(integer_values: bool) -> None:
    model, x = nn.Sequential(Heads(), Heads()), torch.randn(2, 10, 12)
    expected = int8_attention(*model[0].parts(x), integer_values)
    other = model[1](x)
    apply_edits_(model, [attend("0", integer_values)], [])
    assert torch.equal(model[0](x), expected)
    assert not torch.equal(expected, F.scaled_dot_product_attention(*model[0].parts(x)))
    assert torch.equal(model[1](x), other)
    assert len(attention_overrides(model)) == 1


def test_nothing_is_left_on_outside_of_the_module() -> None:
    model, x = Heads(), torch.randn(2, 10, 12)
    expected = F.scaled_dot_product_attention(*model.parts(x))
    apply_edits_(model, [attend()], [])
    model(x)
    assert torch.equal(F.scaled_dot_product_attention(*model.parts(x)), expected)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 10, 11))
    assert torch.equal(F.scaled_dot_product_attention(*model.parts(x)), expected)


OTHERS: dict[str, dict[str, Any]] = {
    "mask": {"attn_mask": torch.randn(10, 10)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.5},
    "large heads": {"columns": 136},
    "grouped heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_that_integers_cannot_answer_stays_in_float(name: str) -> None:
    model, x = Heads(**OTHERS[name]), torch.randn(2, 10, 12)
    expected = model(x)
    apply_edits_(model, [attend()], [])
    assert torch.equal(model(x), expected)


def test_the_usual_scale_in_words_is_no_other() -> None:
    model, x = Heads(scale=8**-0.5), torch.randn(2, 10, 12)
    apply_edits_(model, [attend()], [])
    assert torch.equal(model(x), int8_attention(*model.parts(x)))


def test_a_deep_copy_has_weights_and_attention_of_its_own() -> None:
    model, x = nn.Sequential(Heads()), torch.randn(2, 10, 12)
    apply_edits_(model, [attend("0")], [])
    before, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    twin[0].project.weight.zero_()
    assert torch.equal(twin(x), int8_attention(*twin[0].parts(x)))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([attend("project")], "unet.project does not apply: Linear has no attention processor"),
        ([attend("elsewhere")], "unet.elsewhere does not apply"),
        ([attend(), attend()], "computed on integers already"),
    ],
)
def test_edits_that_do_not_fit_are_named(edits: list[QuantizeAttention], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        apply_edits_(Heads(), edits, [])


def flux() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "patch_size": 1,
    }
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8)}
    given = {"hidden_states": (2, 16, 4), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 24)}
    places = {"img_ids": torch.randn(16, 3), "txt_ids": torch.randn(5, 3), "timestep": torch.tensor([0.5, 0.5])}
    return FluxTransformer2DModel(in_channels=4, **sizes, **text), {**noise(given), **places}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"sample_size": 8, "patch_size": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
    text = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 24}
    given = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 24)}
    model = SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=8, **sizes, **text)
    return model, {**noise(given), "timestep": torch.tensor([500.0, 500.0])}


def noise(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("make", [pytest.param(flux, marks=pytest.mark.long), sd3])
def test_newer_processors_are_answered_as_well(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    torch.manual_seed(0)
    model, given = make()
    before = model.eval()(**given, return_dict=False)[0]
    names = [name for name, module in model.named_modules() if computes_attention(module)]
    apply_edits_(model, [attend(name) for name in names], [])
    after = model(**given, return_dict=False)[0]
    assert 0 < (after - before).square().mean() < 1e-4 * before.square().mean()
    program = torch.export.export(model, (), given, strict=False)
    assert sum("int8_attention" in str(node.target) for node in program.graph.nodes) == len(names) == 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**given, return_dict=False)[0], after)


@pytest.fixture(scope="module")
def attentive(
    tiny_text: Path, save_artifact: Callable[..., Path], pack_all: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact whose layers are packed and whose attentions are on integers, every other one with its values too."""
    unet = load_pipeline(PipelineFolder(tiny_text, "tiny")).unet
    edits, tensors = pack_all(unet, "unet", 8, 8, len(TIMESTEPS))
    names = [name for name, module in unet.named_modules() if computes_attention(module)]
    edits += [attend(name, bool(index % 2)) for index, name in enumerate(names)]
    out = tmp_path_factory.mktemp("attentive") / "artifact"
    return save_artifact(tiny_text, out, edits, {"unet": tensors}, TIMESTEPS)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    return {"sample": sample, "timestep": torch.tensor(600.0), "encoder_hidden_states": states}


def test_an_artifact_computes_what_its_edits_say(attentive: Path, tiny_text: Path, pack_all: Any, edited: Any) -> None:
    """Bit for bit, however it is loaded."""
    manifest = verify(attentive)
    unet = load_pipeline(PipelineFolder(tiny_text, "tiny")).unet
    _, tensors = pack_all(unet, "unet", 8, 8, len(TIMESTEPS))
    expected = edited(unet, (manifest.edits, tensors), TIMESTEPS)(**inputs()).sample
    assert len(attention_overrides(unet)) == 8
    for pipeline in (load(attentive), DiffusionPipeline.from_pretrained(attentive, local_files_only=True)):
        assert torch.equal(pipeline.unet(**inputs()).sample, expected)
    packed = [edit for edit in manifest.edits if edit.kind == "pack"]
    plain = edited(load_pipeline(PipelineFolder(tiny_text, "tiny")).unet, (packed, tensors), TIMESTEPS)
    assert not torch.equal(plain(**inputs()).sample, expected)


def check_compiling(unet: nn.Module, inputs: dict[str, Tensor], count: int) -> None:
    expected = unet(**inputs).sample
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).sample, expected)
    program = torch.export.export(unet, (), inputs, strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("int8_attention" in target for target in targets) == count
    assert not any("scaled_dot_product" in target for target in targets)


@pytest.mark.long
def test_with_other_states_it_compiles_into_one_graph_and_exports(attentive: Path) -> None:
    check_compiling(load(attentive).unet, inputs(), 8)


def test_it_compiles_into_one_graph_and_exports(one_block: Path, pack_all: Any, edited: Any) -> None:
    unet = load_pipeline(PipelineFolder(one_block, "one")).unet
    edits, tensors = pack_all(unet, "unet", 8, 8, len(TIMESTEPS))
    (name,) = [name for name, module in unet.named_modules() if computes_attention(module)]
    edited(unet, ([*edits, attend(name, True)], tensors), TIMESTEPS)
    check_compiling(unet, {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor(600.0)}, 1)


def test_saved_again_by_diffusers_it_is_the_same(attentive: Path, tmp_path: Path) -> None:
    pipeline = load(attentive)
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert torch.equal(again.unet(**inputs()).sample, pipeline.unet(**inputs()).sample)


def test_an_edit_of_a_module_without_attention_is_found_by_verify(attentive: Path, tmp_path: Path) -> None:
    def wrong(edits: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**edit, "module": "conv_act"} if edit["kind"] == "quantize_attention" else edit for edit in edits]

    folder = shutil.copytree(attentive, tmp_path / "wrong")
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["edits"] = wrong(config["quantization_config"]["edits"])
    path.write_text(json.dumps(config))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "edits": wrong(manifest["edits"])}))
    write_manifest(folder, read_manifest(folder).model_copy(update={"files": list_files(folder)}))
    with pytest.raises(ArtifactError, match="conv_act does not apply: SiLU has no attention processor"):
        verify(folder)


def test_configs_written_before_there_was_attention_are_read() -> None:
    """As an artifact of schema 1 has it, word for word."""
    pack = {
        "activation_bits": 8,
        "asymmetric": False,
        "component": "unet",
        "float8": False,
        "group_size": None,
        "kind": "pack",
        "module": "conv_out",
        "smoothed": True,
        "weight_bits": 4,
    }
    old = {"edits": [pack], "quant_method": "diffpress", "timesteps": [961.0, 1.0]}
    read = EditsConfig.from_dict(old)
    assert read.to_dict() == old
    assert [edit.words() for edit in read.edits] == ["W4A8"]
