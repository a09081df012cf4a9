"""Quantization through the front door: learning, weights only, float8, text encoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffpress import flow
from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import load, load_pipeline, verify
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import REPORT, read_manifest
from diffpress.export.runtime import PackedLayer, attention_overrides
from diffpress.flow import compress
from diffpress.pairs import compare_pairs, paired_conditions
from diffpress.recipe import Recipe, parse_recipe

QUICK = {"sampling": {"steps": 3}, "record": {"trajectories": 4, "batch": 2}}
LEARN = {"method": "qalora", "weights": 4, "activations": 4, "iterations": 24, "batch": 4, "validation_images": 2}


def recipe_of(**quantize: object) -> Recipe:
    return parse_recipe({**QUICK, "quantize": quantize})


@pytest.fixture(scope="module")
def learned(one_block: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose layers were learned."""
    out = tmp_path_factory.mktemp("learned") / "artifact"
    compress(PipelineFolder(one_block, "tiny"), recipe_of(**LEARN), out)
    return out


def test_learned_artifact_holds_packed_integers_and_else_what_its_source_holds(learned: Path, one_block: Path):
    """Nothing that learning added is left: of a packed layer its integers, scales and bias, all others to the bit."""
    manifest = verify(learned)
    tensors = dict(PipelineFolder(learned, "artifact").tensors("unet"))
    assert {edit.weight_bits for edit in manifest.edits} == {4, 8}
    for edit in manifest.edits:
        held = {
            "weight": torch.int8 if edit.weight_bits == 8 else torch.uint8,
            "weight_scale": torch.float16,
            "activation_scale": torch.float32 if edit.activation_bits else None,
            "zero_point": torch.float32 if edit.asymmetric else None,
            "smoothing": torch.float32 if edit.smoothed else None,
        }
        for kind, dtype in held.items():
            assert dtype is None or tensors.pop(f"{edit.module}.{kind}").dtype == dtype, (edit.module, kind)
    packed = {f"{edit.module}.weight" for edit in manifest.edits}
    source = {name: tensor for name, tensor in PipelineFolder(one_block, "tiny").tensors("unet") if name not in packed}
    assert tensors.keys() == source.keys()
    # Learning moves the biases of what it packs.
    moved = {f"{edit.module}.bias" for edit in manifest.edits}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in source.items() if name not in moved)


def test_learning_is_written_down_and_shown(learned: Path):
    history = read_manifest(learned).learning
    assert [row["iteration"] for row in history][:3] == [0, 2, 4]
    assert all(set(row) == {"iteration", "loss", "evaluation"} for row in history)
    assert "<h2>Learning</h2>" in (learned / REPORT).read_text()


@pytest.mark.long
def test_learning_continues_to_the_same_bytes(learned, one_block, digests, tmp_path):
    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        # Between two checkpoints, and before learning that gets nowhere may stop by itself.
        if stage.startswith("learn") and done == 13:
            raise Killed

    source, out = PipelineFolder(one_block, "tiny"), tmp_path / "artifact"
    with pytest.raises(Killed):
        compress(source, recipe_of(**LEARN), out, notify=kill)
    compress(source, recipe_of(**LEARN), out)
    assert digests(out) == digests(learned)


def test_weights_only_of_denoiser_and_text_encoder(tiny_text: Path, tmp_path: Path):
    """Sizes shrink, inputs stay in float, and images stay close: eight bits lose little."""
    source, out = PipelineFolder(tiny_text, "tiny"), tmp_path / "artifact"
    wanted = recipe_of(method="ptq", weights=8, activations="none", components=["denoiser", "text_encoders"])
    artifact = compress(source, wanted, out)
    for component in ("unet", "text_encoder"):
        assert PipelineFolder(out, "out").component_bytes(component) < 0.75 * source.component_bytes(component)
    assert {edit.component for edit in artifact.manifest.edits} == {"unet", "text_encoder"}
    assert {edit.activation_bits for edit in artifact.manifest.edits} == {None}
    assert {row.component for row in artifact.manifest.plan} == {"unet", "text_encoder"}
    pipeline = load(out)
    assert any(isinstance(module, PackedLayer) for module in pipeline.text_encoder.modules())
    assert artifact.manifest.metrics["psnr_db"] > 30


def test_text_encoders_of_a_pipeline_without_any(one_block: Path, tmp_path: Path):
    wanted = recipe_of(method="ptq", weights=4, activations="none", components=["denoiser", "text_encoders"])
    artifact = compress(PipelineFolder(one_block, "tiny"), wanted, tmp_path / "artifact")
    assert {edit.component for edit in artifact.manifest.edits} == {"unet"}


@pytest.mark.parametrize("weights", [pytest.param(2, marks=pytest.mark.long), 3])
def test_few_bits_go_the_whole_way(weights: int, tiny_class: Path, tmp_path: Path):
    out = tmp_path / "artifact"
    compress(PipelineFolder(tiny_class, "tiny"), recipe_of(method="ptq", weights=weights, activations=6), out)
    assert weights in {edit.weight_bits for edit in verify(out).edits}
    images = sample(load(out), [Condition("3", 1)], Sampling(2)).images
    assert torch.isfinite(images).all()


def test_float8_goes_the_whole_way(tiny_class: Path, tmp_path: Path):
    artifact = compress(PipelineFolder(tiny_class, "tiny"), recipe_of(method="ptq", format="float8"), tmp_path / "out")
    assert "FP8" in {edit.words() for edit in verify(artifact.path).edits}
    assert artifact.manifest.metrics["psnr_db"] > 30


METHODS = [
    pytest.param({"method": "ptq"}, id="ptq"),
    pytest.param({**LEARN, "iterations": 4}, id="qalora", marks=pytest.mark.long),
]


@pytest.mark.parametrize("method", METHODS)
def test_attention_goes_the_whole_way(method: dict, diffpress, tiny_class: Path, tmp_path: Path):
    """Into edits, plan, report and what is printed; images are those that were measured."""
    out, source = tmp_path / "out", PipelineFolder(tiny_class, "tiny")
    compress(source, recipe_of(**method, attention="all"), out)
    manifest = verify(out)
    attends = [edit for edit in manifest.edits if edit.kind == "quantize_attention"]
    rows = [row for row in manifest.plan if row.format.startswith("attention ")]
    assert len(attends) == len(rows) == 2
    assert [row.format for row in rows] == [edit.words() for edit in attends]
    assert len(attention_overrides(load(out).transformer)) == 2
    assert rows[0].format in (out / REPORT).read_text()
    assert rows[0].format in " ".join(diffpress("inspect", out).output.split())
    teacher, sampling = load_pipeline(source), Sampling(3)
    pairs = compare_pairs(teacher, load(out), paired_conditions(teacher, flow.MEASURED, 0), sampling)
    assert pairs.metrics()["psnr_db"] == manifest.metrics["psnr_db"]
    # Learning sees integers in attention too, so it ends elsewhere.
    other = compress(source, recipe_of(**method), tmp_path / "plain").manifest
    weights = [
        manifest.files["transformer/diffusion_pytorch_model.safetensors"].sha256 for manifest in (manifest, other)
    ]
    assert (weights[0] == weights[1]) == (method["method"] == "ptq")


def test_kept_layers_are_left_alone(tiny_class: Path, tmp_path: Path):
    wanted = recipe_of(method="ptq", weights=4, keep=["*.attn1.*"])
    manifest = compress(PipelineFolder(tiny_class, "tiny"), wanted, tmp_path / "out").manifest
    assert not [edit for edit in manifest.edits if ".attn1." in edit.module]
    reasons = {row.reason for row in manifest.plan if ".attn1." in row.module}
    assert reasons == {"kept by the recipe"}


def test_pattern_that_fits_no_layer_is_refused(diffpress, tiny_class, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**QUICK, "quantize": {"method": "ptq", "keep": ["transformer_blocks.0.attn.to_q"]}}))
    status, _, errors = diffpress("compress", tiny_class, "--recipe", recipe, "--out", tmp_path / "out")
    assert status == 2
    assert "fits no layer" in errors
    assert "transformer_blocks.0.attn1.to_q" in " ".join(errors.split())
    assert not (tmp_path / "out").exists()


def test_all_layers_kept_is_refused(diffpress, tiny_class, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**QUICK, "quantize": {"method": "ptq", "keep": ["*"]}}))
    status, _, errors = diffpress("compress", tiny_class, "--recipe", recipe, "--out", tmp_path / "out")
    assert status == 2
    assert "kept by the recipe" in errors


def test_loss_that_is_not_finite_stops_with_the_layer_and_keeps_the_checkpoint(diffpress, one_block, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**QUICK, "quantize": {**LEARN, "lora_rate": 1e38, "scale_rate": 1e30}}))
    status, _, errors = diffpress("compress", one_block, "--recipe", recipe, "--out", tmp_path / "out")
    assert status == 2
    message = " ".join(errors.split())
    assert "the loss is not finite" in message
    assert "Lower quantize.lora_rate" in message
    assert not (tmp_path / "out").exists()
