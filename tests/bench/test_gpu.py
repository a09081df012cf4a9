"""What of `bench/gpu.sh` can be tried without a GPU; its kernels run in Triton's interpreter here."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from itertools import count
from math import isnan
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
KERNELS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernel.py"))


@pytest.fixture(scope="module")
def gpu():
    """Imports a module of the folder, which is none of ours to install."""
    path = sys.path.copy()
    sys.path[:0] = [str(ROOT / "bench" / "gpu"), str(ROOT / "bench")]
    yield import_module
    sys.path[:] = path


def tiny(shapes, op: str):
    """A small shape of the kind that an operation takes."""
    kind = type(next(iter(shapes.OPERATIONS[op][0].values()))[0])
    sizes = {
        shapes.Linear: (20, 64, 36),
        shapes.Conv: (1, 6, 7, 20, 18),
        shapes.Attention: (1, 2, 20, 33, 24),
        shapes.Tokens: (2, 5, 48),
        shapes.Images: (1, 24, 6, 5, 6),
    }
    return kind(*sizes[kind])


def tiny_specs(shapes) -> list:
    return [
        shapes.Spec(op, shapes.RAGGED, tiny(shapes, op), form)
        for op, (_, forms) in shapes.OPERATIONS.items()
        for form in forms
    ]


def test_bytes_and_operations_by_hand(gpu):
    roofline, shapes = gpu("roofline"), gpu("shapes")
    spec = shapes.Spec("weight_only_linear", "FLUX", shapes.Linear(16, 3072, 12288), shapes.HALF_A_WEIGHT)
    work = roofline.work_of(spec)
    # Inputs, half a byte a weight, 48 scales a row of the weight, outputs.
    assert work.bytes == 16 * 3072 * 2 + 3072 * 12288 // 2 + 12288 * 48 * 4 + 16 * 12288 * 2 == 21_725_184
    assert work.operations == {"half": 2 * 16 * 3072 * 12288}
    assert roofline.limit_seconds(work, roofline.PEAKS["H200"]) == pytest.approx(21_725_184 / 4.8e12)


def test_a_large_product_is_limited_by_its_operations(gpu):
    roofline, shapes = gpu("roofline"), gpu("shapes")
    spec = shapes.Spec("int8_attention", "FLUX", shapes.Attention(1, 24, 4608, 4608, 128), shapes.Form("int8"))
    product = 2 * 24 * 4608**2 * 128
    assert roofline.work_of(spec).operations == {"int8": product, "half": product}
    expected = product / 1978.9e12 + product / 989.4e12
    assert roofline.limit_seconds(roofline.work_of(spec), roofline.PEAKS["H200"]) == pytest.approx(expected)
    both = spec._replace(form=shapes.Form("int8 values", integer_values=True))
    assert roofline.work_of(both).operations == {"int8": 2 * product}


def test_a_convolution_is_a_product_with_a_row_for_every_output(gpu):
    shapes = gpu("shapes")
    assert shapes.Conv(2, 64, 65, 640, 320, stride=2).as_linear() == (2 * 32 * 33, 640 * 9, 320)


def test_peaks_are_found_by_what_gpus_call_themselves(gpu):
    peak_of, peaks = gpu("roofline").peak_of, gpu("roofline").PEAKS
    assert peak_of("NVIDIA H100 PCIe") == peaks["H100 PCIe"]
    assert peak_of("NVIDIA H100 80GB HBM3") == peaks["H100"]
    assert peak_of("Tesla T4") is None


def test_the_page_is_what_the_generator_prints(gpu):
    command = "python bench/gpu/roofline.py --markdown > docs/roofline.md"
    assert (ROOT / "docs" / "roofline.md").read_text() == gpu("roofline").markdown(), f"make it anew: {command}"


@pytest.mark.parametrize("part", ["correctness", "speed"])
def test_no_kernel_is_forgotten(gpu, part: str):
    named = [row.names["op"] for row in gpu(part).rows(0)]
    assert set(KERNELS) <= set(named)
    assert len(set(named[: len(set(named))])) == len(set(named)), "every operation comes before the second row of any"


def test_every_model_is_in_the_rows(gpu):
    named = {row.names["model"] for row in gpu("correctness").rows(0)}
    assert named == set(gpu("shapes").MODELS)


def test_operations_are_right_in_small(gpu):
    check = gpu("correctness").check
    found = {(spec.op, spec.form.words): check(spec, 5, "cpu") for spec in tiny_specs(gpu("shapes"))}
    assert {name: row for name, row in found.items() if not row["passed"]} == {}


@pytest.mark.parametrize("op", KERNELS)
def test_a_wrong_result_is_seen(gpu, op: str):
    shapes, inputs = gpu("shapes"), gpu("inputs")
    for spec in [spec for spec in tiny_specs(shapes) if spec.op == op]:
        given = inputs.arguments(spec, inputs.Source(5, "cpu", torch.float16))
        output = gpu("correctness").implementation(op, "cpu")(**given)
        first = output[0] if isinstance(output, tuple) else output
        first[(0,) * first.ndim] += 2 if first.dtype == torch.int8 else 0.25
        assert not gpu("tolerance").verdict(op, given, output)["passed"]


def test_a_failing_row_is_kept_and_the_rest_goes_on(gpu, tmp_path: Path):
    rows, path = gpu("rows"), tmp_path / "rows.json"
    seen = []

    def fine() -> dict:
        seen.append(json.loads(path.read_text())["rows"] if path.exists() else [])
        return {"us": 1 / 3, "off": float("nan")}

    def broken() -> dict:
        raise RuntimeError("no such\nkernel")

    measures = {"a": fine, "b": broken, "c": fine}
    made = [rows.Row({"op": name}, measure) for name, measure in measures.items()]
    rows.run_rows(path, {"gpu": "none"}, made, deadline=1.0, clock=lambda: 0.0)
    expected = [
        {"op": "a", "us": 0.3333, "off": "nan"},
        {"op": "b", "error": "RuntimeError: no such"},
        {"op": "c", "us": 0.3333, "off": "nan"},
    ]
    assert json.loads(path.read_text()) == {"gpu": "none", "rows": expected}
    assert seen == [[], expected[:2]]
    assert list(tmp_path.iterdir()) == [path]


def test_rows_after_the_end_of_the_time_say_so_and_those_there_are_not_measured_again(gpu, tmp_path: Path):
    rows, clock = gpu("rows"), count()
    made = [rows.Row({"op": name}, lambda: {"us": 1.0}) for name in "ab"]
    found = rows.run_rows(tmp_path / "rows.json", {}, made, deadline=1, clock=lambda: next(clock))
    assert found == [{"op": "a", "us": 1.0}, {"op": "b", "error": rows.LATE}]
    more = [*made, rows.Row({"op": "c"}, lambda: {"us": 2.0})]
    assert rows.run_rows(tmp_path / "rows.json", {}, more, 1, lambda: 0) == [*found, {"op": "c", "us": 2.0}]


def test_a_gpu_that_answers_no_more_ends_the_process_after_its_row_is_written(
    gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows, path = gpu("rows"), tmp_path / "rows.json"

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    made = [rows.Row({"op": name}, broken) for name in "ab"]
    with pytest.raises(rows.BrokenGPUError, match="illegal memory access"):
        rows.run_rows(path, {}, made, 1.0, lambda: 0.0)
    assert [row["op"] for row in json.loads(path.read_text())["rows"]] == ["a"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert [row["op"] for row in rows.run_rows(path, {}, made, 1.0, lambda: 0.0)] == ["a", "b"]


def fake_timer(call) -> float:
    """Runs a call, and finds that it takes two milliseconds."""
    call()
    return 2.0


def test_speeds_stand_beside_their_baselines(gpu, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu("baselines"), "_compiled", lambda call: call)
    speed, known = gpu("speed"), {}
    for spec in tiny_specs(gpu("shapes")):
        row = speed.measure(spec, 5, known, fake_timer, "cpu")
        assert row["us"] == 2000
        for name, other in row["baselines"].items():
            missing = name.startswith(("torchao", "bitsandbytes"))
            host_us = other.pop("host_us", None)
            assert (other == {"us": 2000, "ratio": 1, "speedup": 1} and isnan(host_us)) or (
                missing and "No module" in other["error"]
            )


def test_a_baseline_is_measured_once_and_compared_with_each(gpu):
    speed, shapes = gpu("speed"), gpu("shapes")
    spec, known = tiny_specs(shapes)[0], {}
    others = {"torch": lambda: partial(int), "gone": lambda: 1 / 0}
    times = iter([4.0])
    for ours in (2000.0, 1000.0):
        found = speed.compare(spec, ours, others, known, lambda call: next(times))
        assert isnan(found["torch"].pop("host_us"))
        assert found["torch"] == {"us": 4000, "ratio": ours / 4000, "speedup": 4000 / ours}
        assert found["gone"] == {"error": "ZeroDivisionError: division by zero"}


@pytest.mark.parametrize(
    "word", ["W8A8", *(pytest.param(word, marks=pytest.mark.long) for word in ("bf16", "W4A8", "w4"))]
)
def test_a_packed_denoiser_answers(gpu, word: str):
    torch._dynamo.reset()
    denoisers, inputs = gpu("denoisers"), gpu("inputs")
    options = {
        "sample_size": 8,
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
    }
    shapes = {"sample": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 16), "timestep": (2,)}
    small = denoisers.Denoiser("UNet2DConditionModel", options, shapes, {})
    source = inputs.Source(5, "cpu", torch.float32)
    model, given = denoisers.prepared(small, denoisers.FORMATS[word], source)
    packed = [module for module in model.modules() if type(module).__name__ in ("PackedLinear", "PackedConv2d")]
    assert bool(packed) == (word != "bf16")
    with torch.no_grad():
        answer = model(**given).sample
        fusions = denoisers.compile_(model, denoisers.FORMATS[word], "eager")
        compiled = model(**given).sample
    assert answer.shape == compiled.shape == (2, 4, 8, 8)
    assert answer.isfinite().all()
    assert compiled.isfinite().all()
    assert any(fusion.norm for fusion in fusions) == (word in ("W8A8", "W4A8"))


def test_every_denoiser_can_be_packed(gpu):
    denoisers = gpu("denoisers")
    diffusers = pytest.importorskip("diffusers")
    for denoiser in denoisers.DENOISERS.values():
        with torch.device("meta"):
            model = getattr(diffusers, denoiser.kind)(**denoiser.options)
            assert denoisers.pack_(model, denoisers.FORMATS["w4"]) > 100
        assert set(denoiser.inputs) <= set(inspect.signature(model.forward).parameters)


def test_the_script_runs_from_a_checkout_and_wants_a_gpu(tmp_path: Path):
    script, python, out = str(ROOT / "bench" / "gpu.sh"), tmp_path / "python", tmp_path / "out"
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2
    # Without `site`, an interpreter knows of no package that is installed as a checkout: what it finds is the script's tree.
    packages = Path(torch.__file__).parents[1]
    alone = f'PYTHONPATH="$PYTHONPATH:{packages}" exec {sys.executable} -S "$@"'
    python.write_text(f'#!/bin/sh\ncase "$1" in *correctness.py) {alone};; esac\nbasename "$1"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([script, str(out)], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "speed.py\ndenoisers.py\npipelines.py\n",
        "torch finds no GPU here\n",
    )
    assert list(out.iterdir()) == []
