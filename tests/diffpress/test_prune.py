"""Pruning the whole way: alone and before what rounds and what inherits, killed and continued, run elsewhere, refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffpress as package
from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import parameter_count
from diffpress.calibration.sampling import Sampling, denoiser_of, sample
from diffpress.export.artifact import load_pipeline, verify
from diffpress.export.edits import Pack, Resize
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import Manifest, read_manifest
from diffpress.flow import compress
from diffpress.recipe import parse_recipe

QUICK: dict[str, Any] = {"sampling": {"steps": 3}, "record": {"trajectories": 4, "batch": 2}}
PRUNE: dict[str, Any] = {**QUICK, "prune": {"method": "obs", "remove": 0.2}}
BOTH: dict[str, Any] = {**PRUNE, "quantize": {"method": "ptq"}}
UNITS: dict[str, Any] = {**QUICK, "prune": {**PRUNE["prune"], "share_of": "units"}}
"""Of the tiny class pipeline most is a table of labels."""
ALL: dict[str, Any] = {**UNITS, "quantize": {"method": "ptq"}}
STEPS: dict[str, Any] = {"method": "inherit", "speedup": 1.2, "trials": 4, "images": 2}
ASKED = Condition("red apple", 3)


def made(model: Path, out: Path, recipe: dict[str, Any], **options: Any) -> Path:
    return compress(PipelineFolder(model, "tiny"), parse_recipe(recipe), out, **options).path


@pytest.fixture(scope="module")
def pruned(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny text pipeline without a fifth of its parameters, what is left in eight bits."""
    return made(tiny_text, tmp_path_factory.mktemp("pruned") / "artifact", BOTH)


def removed(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Of each structure, how many units are kept, and how many there were."""
    return {row.module: row.shape for row in manifest.plan if row.format in ("heads", "neurons", "channels")}


def test_pruned_and_quantized_it_is_one_sound_artifact(pruned: Path, tiny_text: Path) -> None:
    verify(pruned)
    manifest = read_manifest(pruned)
    assert {edit.kind for edit in manifest.edits} == {"resize", "pack"}
    sizes = removed(manifest)
    assert all(0 < kept <= count for kept, count in sizes.values())
    assert any(kept < count for kept, count in sizes.values())
    source, artifact = PipelineFolder(tiny_text, "tiny"), PipelineFolder(pruned, "artifact")
    assert sum(row.bytes for row in manifest.plan) == artifact.component_bytes("unet")
    assert sum(row.source_bytes for row in manifest.plan) == source.component_bytes("unet")
    # What is rounded is what is left: no layer is packed with more rows than it has.
    model = denoiser_of(load_pipeline(artifact))
    rows = {
        edit.module: sum(n for _, n in edit.outputs)
        for edit in manifest.edits
        if isinstance(edit, Resize) and edit.outputs
    }
    both = rows.keys() & {edit.module for edit in manifest.edits if isinstance(edit, Pack)}
    assert both
    assert all(len(model.get_submodule(module).weight) == rows[module] for module in both)


def test_a_share_of_what_can_be_removed_is_gone(tiny_class: Path, tmp_path: Path) -> None:
    """As much as was asked for, and one unit more at the most."""
    out = made(tiny_class, tmp_path / "out", UNITS)
    before, after = (denoiser_of(load_pipeline(PipelineFolder(path, "tiny"))) for path in (tiny_class, out))
    gone = parameter_count(before) - parameter_count(after)
    # In each of two blocks q, k and v of 16 rows with a bias and their output's 16 columns; 64 neurons of a row and a column.
    heads, neurons = 3 * 16 * 17 + 16 * 16, 64 * (17 + 16)
    asked = 0.2 * 2 * (heads + neurons)
    assert asked <= gone < asked + heads / 2


@pytest.mark.long
def test_plain_diffusers_draws_the_same_in_a_fresh_process(pruned: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch, diffpress; from diffusers import DiffusionPipeline; torch.set_num_threads(1);"
        "p = DiffusionPipeline.from_pretrained(sys.argv[1]); g = torch.Generator().manual_seed(3);"
        "torch.save(torch.from_numpy(p('red apple', num_inference_steps=3, generator=g, output_type='np').images), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, pruned, tmp_path / "image"], check=True, cwd="/")
    pipeline = DiffusionPipeline.from_pretrained(pruned)
    generator = torch.Generator().manual_seed(3)
    image = pipeline("red apple", num_inference_steps=3, generator=generator, output_type="np").images
    assert torch.equal(torch.load(tmp_path / "image"), torch.from_numpy(image))


@pytest.mark.long
def test_a_killed_run_continues_to_the_same_bytes(pruned: Path, tiny_text: Path, digests, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "prune, fitting again" and done == 2:
            raise Killed

    with pytest.raises(Killed):
        made(tiny_text, tmp_path / "out", BOTH, notify=kill)
    assert not (tmp_path / "out").exists()
    made(tiny_text, tmp_path / "out", BOTH)
    assert digests(tmp_path / "out") == digests(pruned)


@pytest.mark.long
@pytest.mark.parametrize("rounded", [False, True], ids=["alone", "rounded"])
def test_steps_inherit_on_what_is_left(tiny_class: Path, tmp_path: Path, rounded: bool) -> None:
    recipe = {**(ALL if rounded else UNITS), "steps": STEPS}
    out = made(tiny_class, tmp_path / "out", recipe)
    verify(out)
    manifest = read_manifest(out)
    assert {edit.kind for edit in manifest.edits} == {"resize", "attach"} | ({"pack"} if rounded else set())
    assert sum(row.bytes for row in manifest.plan) == PipelineFolder(out, "out").component_bytes("transformer")
    images = [
        sample(own, [Condition(1, 3)], Sampling(3)).images
        for own in (DiffusionPipeline.from_pretrained(out), load_pipeline(PipelineFolder(out, "out")))
    ]
    assert torch.equal(*images)
    assert images[0].isfinite().all()


@pytest.mark.long
def test_it_is_exported(diffpress, tiny_class: Path, tmp_path: Path) -> None:
    """Graph by graph as torch computes it."""
    out = made(tiny_class, tmp_path / "out", ALL)
    result = diffpress("export", out, "--to", "onnx", "--out", tmp_path / "onnx")
    assert result.status == 0, result.errors
    assert diffpress("verify", tmp_path / "onnx").status == 0


@pytest.mark.long
def test_it_is_compiled(tiny_class: Path, tmp_path: Path) -> None:
    pipeline = package.load(made(tiny_class, tmp_path / "out", ALL))
    torch._dynamo.reset()
    expected = sample(pipeline, [Condition(1, 3)], Sampling(3)).images
    graphs: list[nn.Module] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    package.compile(pipeline, backend, fullgraph=True)
    compiled = sample(pipeline, [Condition(1, 3)], Sampling(3)).images
    assert graphs
    # Codes that lie between two may round otherwise: far less than two noises differ.
    other = sample(pipeline, [Condition(1, 4)], Sampling(3)).images
    assert (compiled - expected).abs().mean() < 0.05 * (other - expected).abs().mean()


WRONG = [
    ({"remove": 0.97}, r"prune\.remove 0\.97: 0\.\d\d of its parameters is the most that .* can lose"),
    ({"remove": 0.5, "share_of": "macs", "kinds": ["heads"]}, r"of its multiplications is the most"),
    (
        {"keep": ["no.such.*"]},
        r"prune\.keep: 'no\.such\.\*' fits nothing that could be removed\. There are transformer_blocks",
    ),
    ({"kinds": ["channels"]}, r"DiTTransformer2DModel has no channels that can be removed"),
    ({"keep": ["*"]}, r"has no heads or neurons or channels that can be removed"),
    ({"kinds": ["weights"]}, r"prune\.(obs\.)?kinds"),
]


@pytest.mark.parametrize(("own", "words"), WRONG)
def test_what_is_wrong_is_refused_before_any_work(diffpress, tiny_class, tmp_path, own, words) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**PRUNE, "prune": {**PRUNE["prune"], **own}}))
    for extra in ([], ["--estimate"]):
        status, _, errors = diffpress("compress", tiny_class, "--recipe", file, "--out", tmp_path / "out", *extra)
        assert status == 2
        assert list(tmp_path.iterdir()) == [file]
        assert re.search(words, " ".join(errors.split())), errors


def test_an_estimate_says_what_it_takes(diffpress, tiny_class: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(ALL))
    found = diffpress("compress", tiny_class, "--recipe", file, "--out", tmp_path / "out", "--estimate", "--json")
    assert json.loads(found.output)["seconds"]["prune"] > 0
    assert list(tmp_path.iterdir()) == [file]
