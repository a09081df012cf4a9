"""What the rows of the benchmark of steps share; no peer's package is installed here."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from math import log
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from safetensors.torch import save_file

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import macs_per_image
from diffpress.calibration.sampling import Sampling, denoiser_of

BENCH = Path(__file__).parents[2] / "bench"
TEXTS = {"tiny_text": "red apple", "tiny_class": "1", "tiny_pixels": ""}
SAMPLING = Sampling(4, 3.0)


@pytest.fixture(scope="module")
def bench():
    """Imports a module of the folder, which is none of ours to install."""
    path = sys.path.copy()
    sys.path[:0] = [str(BENCH / folder) for folder in ("", "caches", "peers")]
    yield import_module
    sys.path[:] = path


@pytest.fixture(params=TEXTS)
def plain(request: pytest.FixtureRequest, bench):
    """The plain run of a pipeline of each kind, and three conditions for it."""
    run = bench("measure").Run(bench("measure").load(request.getfixturevalue(request.param)), SAMPLING)
    return run, [Condition(TEXTS[request.param], seed) for seed in range(3)]


@pytest.fixture
def request_of_classes(bench):
    wanted = [Condition("1", seed) for seed in range(2)]
    return bench("task").Request(SAMPLING, wanted, wanted, 2)


def test_counting_changes_no_image_and_counts_the_denoiser_alone(bench, plain) -> None:
    run, wanted = plain
    counted, macs = bench("measure").draw_and_count(run, wanted, 2)
    assert torch.equal(counted.images[:2], run.draw(wanted[:2]).images)
    whole = macs_per_image(run.pipeline, wanted[0], SAMPLING)
    parts = [name for name in ("vae", "text_encoder") if getattr(run.pipeline, name, None) is not None]
    assert macs == whole if not parts else 0 < macs < whole


def test_half_the_steps_are_half_the_multiplications(bench, tiny_class: Path, request_of_classes) -> None:
    half = bench("by_steps").accelerate("fewer-steps", tiny_class, {"steps": 2}, request_of_classes)
    _, macs = bench("measure").draw_and_count(half, request_of_classes.compare, 2)
    assert 2 * macs == bench("measure").full_macs(tiny_class, request_of_classes)


def test_bytes_are_of_what_outlives_a_call(bench, tiny_class: Path) -> None:
    measure, wanted, kept = bench("measure"), Condition("1", 0), []
    run, keeping = (measure.Run(measure.load(tiny_class), SAMPLING) for _ in range(2))
    assert measure.cached_bytes(run, run, wanted) == 0
    denoiser_of(keeping.pipeline).register_forward_hook(lambda *_: kept.append(torch.ones(1000)))
    # After the last of four calls; guidance doubles the batch and takes no calls of its own.
    assert measure.cached_bytes(keeping, run, wanted) == 4 * 4 * 1000


@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp"])
def test_a_copy_has_the_other_scheduler_and_else_the_same(bench, plain, scheduler: str, tmp_path: Path) -> None:
    run, wanted = plain
    source = Path(run.pipeline.config._name_or_path)
    copy = bench("measure").Run(
        bench("measure").load(bench("steps").with_scheduler(source, scheduler, tmp_path)), SAMPLING
    )
    assert (type(copy.pipeline.scheduler) is DPMSolverMultistepScheduler) == (scheduler == "dpmpp")
    assert torch.equal(copy.draw(wanted).images, run.draw(wanted).images) == (scheduler == "ddim")


def test_unconditional_pipeline_makes_no_ddim_of_another_scheduler(bench, tiny_pixels: Path, tmp_path: Path) -> None:
    assert type(bench("measure").load(bench("steps").with_scheduler(tiny_pixels, "dpmpp", tmp_path))) is DDPMPipeline


def test_threshold_is_the_one_that_spends_what_is_asked_for(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = bench("threshold")
    # As caches do: the more, the higher the threshold, in no more than so many ways.
    monkeypatch.setattr(threshold, "draw_and_count", lambda run, *_: (None, 100 / run))
    found = threshold.find_threshold(lambda value: min(max(value, 1), 5), 100, 2.5, [])
    halved = log(threshold.HIGHEST / threshold.LOWEST) / 2**threshold.TRIES
    assert abs(log(found / 2.5)) <= halved
    assert threshold.find_threshold(lambda value: min(max(value, 1), 5), 100, 9, []) >= 5, "nearest where out of reach"


def test_a_cache_of_diffusers_that_skips_no_step_is_the_plain_pipeline(
    bench, tiny_class: Path, request_of_classes
) -> None:
    measure, by_diffusers = bench("measure"), bench("by_diffusers")
    full = measure.full_macs(tiny_class, request_of_classes)
    plain = measure.Run(measure.load(tiny_class), SAMPLING).draw(request_of_classes.compare)
    for interval, computes_all in ((1, True), (2, False)):
        settings = {"interval": interval, "warmup": 1, "last": 1}
        run = by_diffusers.accelerate("taylorseer", tiny_class, settings, request_of_classes)
        images, macs = measure.draw_and_count(run, request_of_classes.compare, 2)
        assert (macs == full) == computes_all
        assert torch.equal(images.images, plain.images) == computes_all
        # What one generation left must not reach the next.
        assert torch.equal(images.images, run.draw(request_of_classes.compare).images)


@pytest.mark.parametrize("row", ["first-block", "magcache"])
def test_caches_with_a_threshold_come_near_what_they_should_spend(
    bench, tiny_class: Path, request_of_classes, row: str
) -> None:
    run = bench("by_diffusers").accelerate(row, tiny_class, {"speedup": 1.2}, request_of_classes)
    _, macs = bench("measure").draw_and_count(run, request_of_classes.compare, 2)
    assert macs < bench("measure").full_macs(tiny_class, request_of_classes)


def test_a_cache_that_finds_nothing_says_so(bench, tiny_pixels: Path) -> None:
    request = bench("task").Request(SAMPLING, [Condition("", 0)], [Condition("", 0)], 1)
    with pytest.raises(RuntimeError, match="MagCacheConfig finds nothing in UNet2DModel to cache"):
        bench("by_diffusers").accelerate("magcache", tiny_pixels, {"speedup": 2}, request)


def test_a_row_is_written_with_all_its_figures(bench, tiny_class: Path, request_of_classes, tmp_path: Path) -> None:
    out = tmp_path / "row.safetensors"
    bench("run_row").run("fewer-steps", tiny_class, {"steps": 2}, request_of_classes, out)
    found = bench("steps").read(out)
    assert found.images.shape == (2, 1, 16, 16)
    assert found.figures["mac_speedup"] == 2
    assert found.figures["cached_bytes"] == 0
    assert {"macs", "full_macs", "latency_ms", "full_latency_ms", "latency_ratio"} <= set(found.figures)


def test_a_cache_that_computes_all_is_no_row(
    bench, tiny_class: Path, request_of_classes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench("run_row").ROWS, "idle", "by_steps")
    with pytest.raises(RuntimeError, match="nothing is cached"):
        bench("run_row").run("idle", tiny_class, {"steps": 4}, request_of_classes, tmp_path / "out")


def test_counts_of_steps_lie_on_both_sides_of_every_speedup(bench) -> None:
    for steps in (20, 25, 50):
        counts = bench("steps").step_counts(steps)
        assert counts[0] == steps
        for speedup in bench("curves").SPEEDUPS:
            assert any(steps / count >= speedup for count in counts)
            assert min(abs(steps / count - speedup) for count in counts) < 0.15 * speedup


def write(file: Path, level: float | None) -> None:
    """A row whose images are all of one level, or which has failed."""
    figures = {"error": "no"} if level is None else {"mac_speedup": 2.0}
    tensors = {} if level is None else {name: torch.full((1, 1, 2, 2), level) for name in ("images", "latents")}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, {"row": json.dumps(figures)})


def test_what_is_there_is_kept_and_what_fails_first_is_tried_once(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, made = bench("steps"), []

    def run(job, prepared, work) -> None:
        made.append((job.row, job.settings))
        write(job.file(work), None if job.row == "magcache" else 0.5)

    monkeypatch.setattr(steps, "prepare", lambda *_: [])
    monkeypatch.setattr(steps, "run", run)
    case = steps.Case("zoo:digits", "ddim", 25)
    wanted = list(steps.jobs(case, ["magcache", "pyramid-attention"]))
    there = steps.run_all(wanted, tmp_path, 1)
    assert [row for row, _ in made] == ["fewer-steps", "pyramid-attention", "pyramid-attention", "magcache"]
    assert steps.run_all(wanted, tmp_path, 1) == there
    assert [row for row, _ in made[4:]] == ["magcache"]
    rows = steps.table(there, tmp_path)
    assert [row.get("psnr_db") for row in rows] == [100, 100, 100, None]
    assert (rows[-1]["error"], rows[-1]["wanted_speedup"]) == ("no", 1.8)


def row(name: str, speedup: float, psnr_db: float) -> dict:
    return {
        "model": "zoo:digits",
        "scheduler": "ddim",
        "steps": 25,
        "row": name,
        "wanted_speedup": speedup,
        "mac_speedup": speedup,
        "psnr_db": psnr_db,
        "latency_ratio": 1.1 / speedup,
        "cached_bytes": 2000,
    }


def test_points_that_others_beat_are_left_out(bench) -> None:
    rows = [row("a", 2, 40), row("a", 3, 30), row("a", 1.5, 35), {"error": "no"}]
    assert bench("curves").frontier(rows) == [(2, 40), (3, 30)]


@pytest.mark.parametrize(("speedup", "psnr_db"), [(1.8, 40), (2, 40), (2.5, 35), (3, 30), (3.5, None)])
def test_quality_between_two_points(bench, speedup: float, psnr_db: float | None) -> None:
    rows = [row("a", 2, 40), row("a", 3, 30)]
    assert bench("curves").psnr_at(rows, speedup) == (psnr_db if psnr_db is None else pytest.approx(psnr_db))


def test_tables_name_the_best_peer_and_every_refusal(bench) -> None:
    rows = [row("fewer-steps", 1, 100), row("fewer-steps", 4, 25)]
    rows += [row("deepcache", 2, 30), row("taylorseer", 2, 45), row("taylorseer", 3, 20), row("inherit", 1.8, 47)]
    rows += [{**row("magcache", 1.8, 0), "error": "finds nothing"}]
    tables = bench("tables")
    assert tables.steps({"rows": rows}).splitlines()[2:] == [
        "| **zoo:digits, DDIM, 25 steps** |  |  |  |  |  |  |  |",
        "|  | 1.8x | 80.0 | 45.0, taylorseer | 47.0 | - | 0.61 | 2 kB |",
        "|  | 2.5x | 62.5 | 32.5, taylorseer | - | - |  |  |",
        "|  | 3.5x | 37.5 | - | - | - |  |  |",
    ]
    caches = tables.caches({"rows": rows})
    assert "| taylorseer | 45.0 | 32.5 | - | 3.00x | 1.10 | 2 kB |" in caches
    assert "| magcache | finds nothing |" in caches


def test_curves_are_drawn(bench, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    bench("curves").draw("steps", {"rows": [row("deepcache", 2, 30), row("deepcache", 3, 20)]}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
