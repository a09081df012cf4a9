"""Which layers are expanded: by times that are made up, and what it does to a loaded pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffpress.calibration.layer_uses import layer_uses
from diffpress.export.artifact import expansion_here, load, load_pipeline
from diffpress.export.edits import Pack
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest, write_manifest
from diffpress.export.runtime import (
    Expansion,
    LayerForm,
    LayerUse,
    PackedEmbedding,
    PackedLayer,
    StepClock,
    Times,
    decide,
    expansion,
    layers_of,
    pack_layer,
)
from diffpress.export.runtime.expansion import Candidate, choose
from diffpress.export.runtime.forms import form_of
from diffpress.export.runtime.fusion.outcome import EXPANDED, NOT_YET, Fusions
from diffpress.export.runtime.packed import float_form
from diffpress.kernels import dequantize_groups, unpack_codes

W8A8 = Pack(component="", module="", weight_bits=8, activation_bits=8)
W4 = Pack(component="", module="", weight_bits=4, activation_bits=None, group_size=8)
STEPS = [900.0, 100.0]


def form(edit: Pack = W8A8, rows: int = 64) -> LayerForm:
    return LayerForm(edit, (rows, 8), 8, torch.float32)


def candidate(form: LayerForm, size_bytes: int = 100, calls: int = 1) -> Candidate:
    return Candidate(form, calls, size_bytes)


SLOW, FAST = form(W8A8), form(W4)
TIMES = {SLOW: Times(3.0, 1.0), FAST: Times(1.05, 1.0)}


def test_layers_that_lose_to_floats_are_expanded_and_no_others() -> None:
    layers = {"a": candidate(SLOW), "b": candidate(FAST), "c": candidate(SLOW)}
    assert choose(layers, TIMES, 10**6) == {"a", "c"}
    assert choose({}, TIMES, 10**6) == frozenset()


@pytest.mark.parametrize(
    ("budget", "chosen"), [(0, ""), (99, "c"), (100, "b"), (199, "bc"), (350, "bc"), (399, "bc"), (599, "abc")]
)
def test_what_is_expanded_never_takes_more_than_there_is(budget: int, chosen: str) -> None:
    """Those that save the most time a byte go first, and a smaller one may fit where a larger one does not."""
    layers = {"a": candidate(SLOW, 400), "b": candidate(SLOW, 100, calls=9), "c": candidate(SLOW, 99, calls=2)}
    found = choose(layers, TIMES, budget)
    assert found == set(chosen)
    assert sum(layers[name].size_bytes for name in found) <= budget


def test_the_plan_says_both_times_and_what_is_done() -> None:
    layers = {"a": candidate(SLOW), "b": candidate(SLOW), "c": candidate(FAST)}
    found = Expansion(layers, TIMES, frozenset("a"), others=2)
    assert found.words("a") == "here 3 ms packed, 1 ms in floats (W8A8 linear [64, 8] x 8): expanded at load"
    assert found.words("b").endswith("in floats (W8A8 linear [64, 8] x 8): too little memory to expand it")
    assert found.words("c") == found.words("no layer") == ""
    assert (found.count, found.size_bytes) == (5, 100)


LAYERS = {
    "linear": (nn.Linear(320, 1280), (2, 4096, 320), (1024, 256), 1024),
    "one row": (nn.Linear(5, 3, bias=False), (5,), (1, 4), 4),
    "convolution": (nn.Conv2d(24, 40, 3, padding=1), (2, 24, 8, 9), (2, 32, 8, 8), 32),
    "large images": (nn.Conv2d(640, 4, 3, padding=1), (2, 640, 96, 96), (1, 512, 32, 32), 4),
    "patches": (nn.Conv2d(3, 64, 16, stride=16), (8, 3, 64, 16), (2, 4, 32, 16), 64),
    "flat": (nn.Conv2d(4, 4, (1, 9), dilation=2, padding=(0, 4)), (1, 4, 1, 10), (1, 4, 1, 17), 4),
}
"""Layers, shapes of their inputs, and both of what stands for them."""


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("edit", [W8A8, W4], ids=lambda edit: edit.words())
def test_a_layer_stands_for_its_form(name: str, edit: Pack) -> None:
    layer, given, shape, outputs = LAYERS[name]
    packed = pack_layer(layer, edit, StepClock(STEPS))
    found = form_of(packed, LayerUse(input=given, calls=1), torch.bfloat16)
    assert found is not None
    assert (found.shape, found.outputs) == (shape, outputs)
    output = found.layer()(found.input())
    assert output.dtype == torch.bfloat16
    assert output.shape[1] == outputs


def test_forms_that_run_otherwise_have_other_keys() -> None:
    conv = ((3, 3), (1, 1), (1, 1), (1, 1))
    forms = [
        form(),
        form(rows=16),
        form(W4),
        form(W8A8.model_copy(update={"asymmetric": True})),
        LayerForm(W8A8, (64, 8), 8, torch.bfloat16),
        LayerForm(W8A8, (1, 8, 8, 8), 8, torch.float32, conv),
        LayerForm(W8A8, (1, 8, 8, 8), 8, torch.float32, (*conv[:1], (2, 2), *conv[2:])),
    ]
    assert len({own.key() for own in forms}) == len(forms)


def test_an_embedding_and_what_nothing_is_known_of_stay(floats_win: None) -> None:
    layers = {
        "table": pack_layer(nn.Embedding(9, 8), W4, None),
        "known": pack_layer(nn.Linear(8, 8), W8A8, StepClock(STEPS)),
        "new": pack_layer(nn.Linear(8, 8), W8A8, StepClock(STEPS)),
    }
    uses = {name: LayerUse(input=(3, 8), calls=1) for name in ("table", "known")}
    found = decide(layers, uses, torch.float32)
    assert found.expanded == {"known"}
    assert found.size_bytes == 8 * 8 * 4
    assert (found.count, found.others) == (3, 2)


@pytest.mark.parametrize("cause", ["references", "GPU"])
def test_nothing_is_decided_where_references_or_a_gpu_answer(
    cause: str, floats_win: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cause == "GPU":
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    else:
        monkeypatch.setenv("DIFFPRESS_KERNELS", "reference")
    layers = {"a": pack_layer(nn.Linear(8, 8), W8A8, StepClock(STEPS))}
    found = decide(layers, {"a": LayerUse(input=(3, 8), calls=1)}, torch.float32)
    assert not found.expanded
    assert found.reason


def test_a_pipeline_that_stays_on_the_cpu_is_decided_there_beside_a_gpu(
    artifact: Path, floats_win: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert expanded(load(artifact)) == set()
    assert expanded(load(artifact, device="cpu"))


def test_layers_are_timed_and_their_memory_is_counted_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def layer_times(forms: Any, device: torch.device) -> dict[LayerForm, Times]:
        asked.append(device)
        return {form: Times(2.0, 1.0) for form in forms}

    monkeypatch.setattr(expansion, "layer_times", layer_times)
    monkeypatch.setattr(expansion, "free_bytes", lambda device: asked.append(device) or 10**6)
    layers = {"a": pack_layer(nn.Linear(8, 8), W8A8, StepClock(STEPS))}
    gpu = torch.device("cuda", 1)
    found = decide(layers, {"a": LayerUse(input=(3, 8), calls=1)}, torch.float16, device=gpu)
    assert asked == [gpu, gpu]
    assert found.expanded == {"a"}
    # Halves stay halves there: a CPU with AVX2 alone would multiply them as float32.
    assert found.size_bytes == 8 * 8 * 2


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device nowhere cannot be used here"):
        load(tmp_path / "nowhere", device="nowhere")


def image(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(5), output_type="pt"
    ).images


@pytest.fixture(scope="module")
def artifact(
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pack_all: Callable[..., Any],
    pack_weights: Callable[..., Any],
    save_artifact: Callable[..., Path],
) -> Path:
    """Integers in the denoiser, weights in few bits in the text encoder, and what both were given."""
    pipeline = load_pipeline(PipelineFolder(tiny_text, "text"))
    parts = {
        "unet": pack_all(pipeline.unet, "unet", 8, 8, len(STEPS)),
        "text_encoder": pack_weights(pipeline.text_encoder, "text_encoder", 4),
    }
    edits = [edit for part in parts.values() for edit in part[0]]
    tensors = {component: part[1] for component, part in parts.items()}
    path = save_artifact(tiny_text, tmp_path_factory.mktemp("artifact") / "parts", edits, tensors, STEPS)
    loaded = load(path)
    with layer_uses(loaded) as uses:
        image(loaded)
    write_manifest(path, read_manifest(path).model_copy(update={"layers": uses}))
    return path


def expanded(pipeline: Any) -> set[str]:
    return {name for name, layer in layers_of(pipeline) if layer.floats is not None}


def test_what_layers_are_given_is_known(artifact: Path) -> None:
    uses = read_manifest(artifact).layers
    assert uses.keys() == {name for name, _ in layers_of(load(artifact))}
    # Two steps with guidance in one call; the text encoder for the prompt and for none.
    assert uses["unet.conv_in"] == LayerUse(input=(2, 4, 8, 8), calls=2)
    assert {own.calls for name, own in uses.items() if name.startswith("text_encoder.")} == {2}


def test_loaded_for_speed_it_is_a_pipeline_of_plain_layers(artifact: Path, floats_win: None) -> None:
    fast, plain = load(artifact), load(artifact, prefer="memory")
    tables = {name for name, layer in layers_of(fast) if isinstance(layer, PackedEmbedding)}
    assert expanded(fast) == {name for name, _ in layers_of(fast)} - tables
    assert expanded(plain) == set()
    packed = image(plain)
    for name, layer in list(layers_of(plain)):
        component, _dot, module = name.partition(".")
        if name not in tables:
            getattr(plain, component).set_submodule(module, plain_layer(layer))
    assert torch.equal(image(fast), image(plain))
    assert not torch.equal(image(fast), packed)


def plain_layer(layer: PackedLayer) -> nn.Module:
    """The layer of floats with the weights that the codes of a packed one stand for."""
    codes = unpack_codes(layer.weight, layer.columns, layer.edit.weight_bits)
    scale = layer.weight_scale.view(len(codes), -1)
    plain = float_form(layer)
    with torch.no_grad():
        plain.weight.copy_(
            dequantize_groups(codes, scale, layer.edit.group_size or layer.columns).view_as(plain.weight)
        )
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def test_memory_is_not_exceeded(artifact: Path, floats_win: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [4 * layer.columns * len(layer.weight) for _, layer in layers_of(load(artifact, prefer="memory"))]
    monkeypatch.setattr(expansion, "free_bytes", lambda _device: sum(sizes))
    pipeline = load(artifact)
    taken = sum(layer.floats.nbytes for _, layer in layers_of(pipeline) if layer.floats is not None)
    assert 0 < taken <= sum(sizes) / 2
    monkeypatch.setattr(expansion, "free_bytes", lambda _device: 0)
    assert expanded(load(artifact)) == set()


def test_an_expanded_pipeline_saves_what_was_loaded(artifact: Path, floats_win: None, tmp_path: Path) -> None:
    pipeline = load(artifact)
    pipeline.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert expanded(again) == set()
    assert torch.equal(image(again), image(load(artifact, prefer="memory")))


def test_what_inspect_tells_is_what_load_does(artifact: Path, floats_win: None) -> None:
    found, pipeline = expansion_here(artifact, read_manifest(artifact)), load(artifact)
    layers = dict(layers_of(pipeline))
    assert found.expanded == expanded(pipeline)
    assert found.count == len(layers)
    assert found.size_bytes == sum(layer.floats.nbytes for layer in layers.values() if layer.floats is not None)


def test_an_artifact_that_does_not_say_what_its_layers_are_given_stays_packed(artifact: Path, floats_win: None) -> None:
    manifest = read_manifest(artifact)
    try:
        write_manifest(artifact, manifest.model_copy(update={"layers": {}}))
        assert expanded(load(artifact)) == set()
    finally:
        write_manifest(artifact, manifest)


def test_another_preference_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='prefer must be "speed" or "memory", not \'fast\''):
        load(tmp_path / "nowhere", prefer="fast")  # type: ignore[arg-type]


def test_compiling_says_why_no_norm_is_fused_into_an_expanded_layer() -> None:
    layer = pack_layer(nn.Linear(8, 8), W8A8, StepClock(STEPS))
    model = nn.Sequential(layer)
    assert next(iter(Fusions(model, {"": model}))).reason == NOT_YET
    layer.expand_(torch.float32)
    assert next(iter(Fusions(model, {"": model}))).reason == EXPANDED
