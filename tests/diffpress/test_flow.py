"""The whole way on tiny pipelines: compress, verify, load, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffpress as package
from diffpress import flow
from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import load_pipeline, verify
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import REPORT, read_manifest
from diffpress.export.runtime import PackedLayer
from diffpress.flow import compress
from diffpress.pairs import COSTS
from diffpress.recipe import load_recipe


@pytest.fixture(scope="session")
def compressed(tiny_text: Path, quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny text pipeline."""
    out = tmp_path_factory.mktemp("compressed") / "artifact"
    compress(PipelineFolder(tiny_text, "tiny"), load_recipe(quick_recipe), out)
    return out


@pytest.fixture(scope="session")
def smallest(one_block: Path, quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that is quickly made again."""
    out = tmp_path_factory.mktemp("smallest") / "artifact"
    compress(PipelineFolder(one_block, "tiny"), load_recipe(quick_recipe), out)
    return out


def test_every_kind_of_pipeline_goes_the_whole_way(diffpress, digests, request, quick_recipe, tmp_path):
    for fixture in ("tiny_class", "tiny_pixels"):
        model, out = request.getfixturevalue(fixture), tmp_path / fixture
        status, output, errors = diffpress("compress", model, "--recipe", quick_recipe, "--out", out, "--json")
        assert status == 0, errors
        printed = json.loads(output)
        assert printed["size_bytes"]["candidate"] < printed["size_bytes"]["reference"]
        assert {path.name for path in tmp_path.iterdir() if fixture in path.name} == {fixture}
        verify(out)
        again = json.loads(diffpress("compress", model, "--recipe", quick_recipe, "--out", out, "--json").output)
        assert again == {**printed, **dict.fromkeys(COSTS)}


def test_artifact_is_smaller_and_holds_no_pickle(compressed: Path, tiny_text: Path):
    manifest = read_manifest(compressed)
    assert manifest.metrics["total_size_bytes"]["candidate"] < manifest.metrics["total_size_bytes"]["reference"]
    assert {path.suffix for path in compressed.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".html",
        ".txt",
    }


def test_plan_accounts_for_every_stored_byte(compressed: Path, tiny_text: Path):
    plan = read_manifest(compressed).plan
    source, artifact = PipelineFolder(tiny_text, "tiny"), PipelineFolder(compressed, "artifact")
    assert sum(row.source_bytes for row in plan) == source.component_bytes("unet")
    assert sum(row.bytes for row in plan) == artifact.component_bytes("unet")
    assert all(row.reason for row in plan if row.format.startswith("float"))


def test_first_last_and_conditioning_layers_keep_eight_bits(compressed: Path):
    plan = {row.module: row for row in read_manifest(compressed).plan}
    assert plan["conv_in"].format == plan["conv_out"].format == "W8 g32"
    assert plan["time_embedding.linear_1"].format == "W8"
    assert "first layer" in plan["conv_in"].reason
    assert "conditioning layer" in plan["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].reason
    assert plan["mid_block.attentions.0.transformer_blocks.0.ff.net.2"].format == "W4A8"


def test_loaded_artifact_has_packed_layers_and_draws_what_was_measured(compressed: Path):
    pipeline = package.load(compressed)
    packed = [module for module in pipeline.unet.modules() if isinstance(module, PackedLayer)]
    assert len(packed) == len(read_manifest(compressed).edits) > 20
    again = load_pipeline(PipelineFolder(compressed, "artifact"))
    wanted = [Condition("red apple", 3)]
    assert torch.equal(*(sample(p, wanted, Sampling(2)).images for p in (pipeline, again)))


@pytest.mark.long
def test_plain_diffusers_loads_it_in_a_fresh_process(compressed: Path):
    code = (
        "import sys, diffpress; assert 'torch' not in sys.modules; from diffusers import DiffusionPipeline as P; "
        f"print(P.from_pretrained({str(compressed)!r})('red apple', num_inference_steps=2).images[0].size)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip().endswith("(16, 16)")


def test_same_command_again_finds_it_done(diffpress, digests, compressed: Path, tiny_text, quick_recipe):
    before, changed = digests(compressed), (compressed / REPORT).stat().st_mtime_ns
    compress(PipelineFolder(tiny_text, "tiny"), load_recipe(quick_recipe), compressed)
    assert digests(compressed) == before
    assert (compressed / REPORT).stat().st_mtime_ns == changed


def test_damaged_artifact_is_made_anew_by_the_same_command(smallest, one_block, quick_recipe, digests, tmp_path):
    damaged = shutil.copytree(smallest, tmp_path / "damaged")
    (damaged / "model_index.json").write_text("{}")
    compress(PipelineFolder(one_block, "tiny"), load_recipe(quick_recipe), damaged)
    assert digests(damaged) == digests(smallest)


def test_other_prompts_in_the_same_file_are_another_request(tiny_text, quick_recipe, tmp_path, monkeypatch):
    prompts, requests = tmp_path / "prompts.txt", []
    recipe = load_recipe(quick_recipe, [f"record.prompts={prompts}"])

    class ReachedError(Exception):
        pass

    def make(source, recipe, forms, out, request, *_):
        requests.append(request)
        raise ReachedError

    monkeypatch.setattr(flow, "_make", make)
    for text in ("red apple", "blue car", "red apple"):
        prompts.write_text(text)
        with pytest.raises(ReachedError):
            compress(PipelineFolder(tiny_text, "tiny"), recipe, tmp_path / "out")
    assert requests[0] == requests[2] != requests[1]


STAGES = ["quantize", *(pytest.param(stage, marks=pytest.mark.long) for stage in ("record", "measure", "save"))]


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_run_continues_to_the_same_bytes(smallest, one_block, quick_recipe, digests, tmp_path, stage):
    class Killed(BaseException):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if name == stage:
            raise Killed

    out = tmp_path / "artifact"
    source, recipe = PipelineFolder(one_block, "tiny"), load_recipe(quick_recipe)
    with pytest.raises(Killed):
        compress(source, recipe, out, notify=kill)
    assert not out.exists()
    compress(source, recipe, out)
    assert digests(out) == digests(smallest)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_continued_run_keeps_what_was_recorded(one_block, quick_recipe, tmp_path):
    class Killed(BaseException):
        pass

    def kill(name: str, done: int, total: int) -> None:
        if (name, done) == ("record", 1):
            raise Killed

    source, recipe = PipelineFolder(one_block, "tiny"), load_recipe(quick_recipe)
    with pytest.raises(Killed):
        compress(source, recipe, tmp_path / "artifact", notify=kill)
    shard = next(tmp_path.rglob("shard-00000.safetensors"))
    written = shard.stat().st_mtime_ns

    def look(name: str, done: int, total: int) -> None:
        if name == "save" and done == 0:
            assert shard.stat().st_mtime_ns == written

    compress(source, recipe, tmp_path / "artifact", notify=look)


def test_missed_gate_keeps_the_artifact_and_gives_status_3(diffpress, one_block, quick_recipe, tmp_path):
    arguments = [
        "--recipe",
        quick_recipe,
        "--out",
        tmp_path / "out",
        "--set",
        "gates.psnr_db=99",
        "--set",
        "gates.size=0.01",
    ]
    status, _, errors = diffpress("compress", one_block, *arguments)
    assert status == 3
    assert "gate missed: PSNR is" in errors
    assert "gate missed: the denoiser is" in errors
    assert len(verify(tmp_path / "out").metrics["gates_missed"]) == 2


def test_estimate_writes_nothing(diffpress, tiny_text, quick_recipe, digests, tmp_path, monkeypatch):
    """Nor beside `--out`, in the working folder, among temporary files or into the source."""
    for place in ("here", "temporary"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before, out = digests(tiny_text), tmp_path / "out"
    status, output, _ = diffpress("compress", tiny_text, "--recipe", quick_recipe, "--out", out, "--estimate", "--json")
    assert status == 0
    assert set(json.loads(output)) == {"steps", "dtype", "seconds", "disk_bytes", "memory_bytes"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "temporary"]
    assert digests(tiny_text) == before


@pytest.mark.long
def test_foreign_out_is_replaced_with_force(diffpress, one_block, quick_recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert diffpress("compress", one_block, "--recipe", quick_recipe, "--out", out, "--force").status == 0
    assert not (out / "mine.txt").exists()
    verify(out)


def test_flipped_bit_in_an_artifact_stops_verify_run_compare_and_load(diffpress, compressed, tiny_text, tmp_path):
    damaged = shutil.copytree(compressed, tmp_path / "damaged")
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for command in (
        ["verify", damaged],
        ["run", damaged, "--out", tmp_path / "a.png"],
        ["compare", tiny_text, damaged],
    ):
        status, _, errors = diffpress(*command)
        assert status == 2
        assert "unet/diffusion_pytorch_model.safetensors is not what was saved" in " ".join(errors.split())
    with pytest.raises(Exception, match="digest differs"):
        package.load(damaged)


def test_run_draws_the_same_picture_for_the_same_seed(diffpress, compressed, tmp_path):
    images = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.png"
        assert diffpress("run", compressed, "--prompt", "red apple", "--seed", seed, "--out", path).status == 0
        images.append(np.asarray(Image.open(path)))
    assert images[0].shape == (16, 16, 3)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_compare_json_has_every_promised_key(diffpress, compressed, tiny_text, tmp_path):
    report = tmp_path / "report.html"
    status, output, _ = diffpress("compare", tiny_text, compressed, "--count", 3, "--json", "--report", report)
    assert status == 0
    printed = json.loads(output)
    assert (printed["count"], printed["steps"]) == (3, 2)
    for key in ("size_bytes", "total_size_bytes", "parameters", "macs_per_image", "peak_memory_bytes"):
        assert set(printed[key]) == {"reference", "candidate"}
    assert set(printed["latency_ms"]) == {"reference", "candidate", "ratio"}
    assert {"psnr_db", "ssim", "latent_mse"} <= set(printed)
    assert printed["parameters"]["candidate"] == printed["parameters"]["reference"]
    assert printed["macs_per_image"]["candidate"] == printed["macs_per_image"]["reference"]
    assert "<html" in report.read_text()


def test_comparing_a_pipeline_with_itself_finds_no_difference(diffpress, one_block):
    printed = json.loads(diffpress("compare", one_block, one_block, "--count", 2, "--steps", 2, "--json").output)
    assert printed["psnr_db"] == pytest.approx(100)
    assert printed["latent_mse"] == 0


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["zoo"], ["methods"], ["doctor"], ["--help"], ["compress", "--help"]]
)
def test_commands_that_only_tell(diffpress, arguments):
    status, output, errors = diffpress(*arguments)
    assert status == 0, errors
    assert len(output.splitlines()) > 3


def test_inspect_shows_plan_and_source(diffpress, compressed):
    printed = json.loads(diffpress("inspect", compressed, "--json").output)
    assert {row["module"] for row in printed["plan"]} >= {"conv_in", "conv_out"}
    shown = " ".join(diffpress("inspect", compressed).output.split())
    before, after = (sum(row[key] for row in printed["plan"]) for key in ("source_bytes", "bytes"))
    assert "conv_in" in shown
    assert f"unet bytes │ {before:,} -> {after:,}" in shown


@pytest.mark.long
def test_the_folder_one_is_in_takes_an_artifact(diffpress, one_block, quick_recipe, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, _, errors = diffpress("compress", one_block, "--recipe", quick_recipe, "--out", ".")
    assert status == 0, errors
    assert diffpress("verify", ".").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_an_export_never_replaces_its_artifact(diffpress, digests, compressed, tmp_path):
    before = digests(compressed)
    (tmp_path / "link").symlink_to(compressed, target_is_directory=True)
    for out in (compressed, tmp_path / "link", compressed / "onnx"):
        status, _, errors = diffpress("export", compressed, "--to", "onnx", "--out", out, "--force")
        assert status == 2
        assert "the input" in errors
    assert digests(compressed) == before


def test_press_takes_names_and_returns_an_artifact(one_block, quick_recipe, tmp_path):
    artifact = package.compress(one_block, quick_recipe, tmp_path / "out")
    assert artifact.path == tmp_path / "out"
    assert artifact.manifest == read_manifest(artifact.path)
    assert sample(artifact.load(), [Condition("", 0)], Sampling(2)).images.shape == (1, 1, 8, 8)


@pytest.mark.long
def test_ten_kills_leave_the_same_bytes(tiny_text, quick_recipe, digests, tmp_path):
    command = [sys.executable, "-m", "diffpress.cli", "compress", str(tiny_text), "--recipe", str(quick_recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONSAFEPATH": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL, cwd="/")

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - began
    for moment in range(1, 11):
        process = start(tmp_path / "killed")
        time.sleep(seconds * moment / 11)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
