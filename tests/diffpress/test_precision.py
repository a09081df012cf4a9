"""Which precision pipelines are loaded in, and that everything works in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline

from diffpress import flow
from diffpress.calibration.sampling import Sampling
from diffpress.calibration.trajectory import record
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.flow import compress
from diffpress.pairs import compare_pairs, paired_conditions
from diffpress.precision import recipe_dtype, settle_dtype, working_dtype
from diffpress.recipe import load_recipe, parse_recipe


def stored_in(dtype: torch.dtype, source: Path, folder: Path) -> PipelineFolder:
    DiffusionPipeline.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    return PipelineFolder(folder, "tiny")


def memory(total: int, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=free))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cpu_computes_in_float32_where_that_fits(
    dtype: torch.dtype, tiny_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored_in(dtype, tiny_class, tmp_path / "source")
    numbers = sum(tensor.numel() for part in ("transformer", "vae") for _, tensor in folder.tensors(part))
    # Float32 has 4 bytes. Whatever else runs, all of the memory free or none of it.
    for free in (0, 12 * numbers):
        memory(12 * numbers, free, monkeypatch)
        assert working_dtype(folder) == torch.float32
        memory(12 * numbers - 1, free, monkeypatch)
        assert working_dtype(folder) == dtype


def test_a_gpu_computes_in_what_is_stored(tiny_class: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half, brain = PipelineFolder(tiny_class, "tiny"), stored_in(torch.bfloat16, tiny_class, tmp_path / "source")
    for knows in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _emulated, knows=knows: knows)
        assert working_dtype(half, "cuda") == torch.float16
        assert working_dtype(brain, "cuda") == (torch.bfloat16 if knows else torch.float32)


def test_learning_never_has_gradients_in_float16(tiny_class: Path, tmp_path: Path) -> None:
    half, brain = PipelineFolder(tiny_class, "tiny"), stored_in(torch.bfloat16, tiny_class, tmp_path / "source")
    rounding, learning = (parse_recipe({"quantize": {"method": method}}) for method in ("ptq", "qalora"))
    assert recipe_dtype(half, rounding, "meta") == torch.float16
    assert recipe_dtype(half, learning, "meta") == torch.float32
    assert recipe_dtype(brain, learning, "meta") == torch.bfloat16


def test_work_goes_on_in_the_precision_it_began_in(tmp_path: Path) -> None:
    assert settle_dtype(tmp_path, torch.bfloat16) == torch.bfloat16
    assert settle_dtype(tmp_path, torch.float32) == torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compress_works_in_half_precision(
    dtype: torch.dtype, tiny_class: Path, quick_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded, searched and measured in what is stored, with results near those of float32."""
    folder, recipe = stored_in(dtype, tiny_class, tmp_path / "source"), load_recipe(quick_recipe)
    whole = compress(folder, recipe, tmp_path / "whole")
    seen: list[torch.dtype] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        runs = record(*arguments, **options)
        seen.append(runs.call(runs.shards[0], 0).output.dtype)
        return runs

    monkeypatch.setattr(flow, "record", watched)
    monkeypatch.setattr(flow, "recipe_dtype", lambda *_: dtype)
    half = compress(folder, recipe, tmp_path / "half")
    assert seen == [dtype]
    teacher, other = (load_pipeline(folder, precision) for precision in (torch.float32, dtype))
    precision = compare_pairs(teacher, other, paired_conditions(teacher, flow.MEASURED, 0), Sampling(2)).metrics()
    errors = [
        10 ** (-metrics["psnr_db"] / 20) for metrics in (whole.manifest.metrics, half.manifest.metrics, precision)
    ]
    # Both images of a pair are off by what the precision rounds.
    assert abs(errors[0] - errors[1]) <= 2 * errors[2]
