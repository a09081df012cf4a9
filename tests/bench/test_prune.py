"""What the rows of the benchmark of pruning share: the same budget, the same cutting, and scores that mean what they say."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffpress.calibration.cost import parameter_count
from diffpress.calibration.sampling import denoiser_of, sample
from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import Candidates, find_candidates
from diffpress.compress.prune.structures import Structure
from diffpress.compress.prune.weighing import Weights
from diffpress.export.artifact import load_pipeline
from diffpress.stages import component_forms, recorded_conditions, stages_of

BENCH = Path(__file__).parents[2] / "bench"
STEPS = 3
RECORDED = 2
HALF = {"prune": {"method": "magnitude", "remove": 0.5, "share_of": "units"}}
BASELINES = ("random", "taylor", "taylor-even", "wanda", "obs-even", "obs-even+refit")


@pytest.fixture(scope="module")
def bench():
    """Imports a module of the folder, which is none of ours to install."""
    path = sys.path.copy()
    sys.path[:0] = [str(BENCH / folder) for folder in ("", "caches", "peers", "pruning")]
    yield import_module
    sys.path[:] = path


@pytest.fixture
def prepared(bench, tmp_path: Path):
    """A function: a pipeline with two recorded runs of three steps."""
    return lambda folder: bench("subject").Prepared(str(folder), STEPS, tmp_path / "work", RECORDED)


def subject_of(prepared: Any):
    """What a baseline is given, with its options."""
    recipe = prepared.recipe(HALF)
    recorded = prepared.trajectories(recipe).folder
    (stage,) = stages_of(prepared.source, prepared.pipeline, recipe, component_forms(prepared.source, recipe), recorded)
    return stage.subject, stage.options


def candidates_of(weights: dict[str, float], count: int) -> Candidates:
    structures = [Structure(name, "neurons", count, (), ()) for name in weights]
    return Candidates(structures, Weights(weights, sum(count * own for own in weights.values())))


def options_of(remove: float, multiple: int = 1) -> Magnitude:
    return Magnitude(method="magnitude", remove=remove, share_of="units", multiple=multiple)


def test_all_structures_lose_the_same_share(bench) -> None:
    candidates = candidates_of({"a": 1.0, "b": 3.0}, 10)
    scores = {"a": torch.arange(10.0), "b": -torch.arange(10.0)}
    assert bench("shares").lowest_of_each(candidates, options_of(0.3), scores) == {"a": [0, 1, 2], "b": [9, 8, 7]}


def test_the_lowest_of_all_go_by_score_a_parameter_but_for_one(bench) -> None:
    candidates = candidates_of({"a": 1.0, "b": 4.0}, 4)
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([5.0, 9.0, 90.0, 91.0])}
    # By parameter 1, 2, 3, 4 and 1.25, 2.25, 22.5, 22.75; 20 in all.
    found = bench("shares").lowest_of_all(candidates, options_of(0.5), scores)
    assert found == {"a": [0, 1], "b": [0, 1]}
    most = bench("shares").lowest_of_all(candidates, options_of(0.99), scores)
    assert most == {"a": [0, 1, 2], "b": [0, 1, 2]}


@pytest.mark.parametrize("row", BASELINES)
def test_every_way_of_pruning_spends_the_same_parameters(
    bench, prepared, tiny_class: Path, tmp_path: Path, row: str
) -> None:
    case = prepared(tiny_class)
    subject, options = subject_of(case)
    candidates = find_candidates(subject, options)
    made = case.saved(case.changed(row, HALF, tmp_path / "stages"), tmp_path / "made")
    smaller = load_pipeline(made)
    gone = parameter_count(subject.model) - parameter_count(denoiser_of(smaller))
    # The last unit, or step of units, to go is a whole one.
    largest = max(candidates.weights.units.values())
    assert 0 <= gone - candidates.target(options) < largest
    assert sample(smaller, case.compared(2), case.sampling).images.isfinite().all()
    assert set(bench("subject").BASELINES) == set(BASELINES)


@pytest.mark.parametrize("pipeline", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_what_is_noised_anew_are_the_images_that_were_made(
    bench, prepared, pipeline: str, request: pytest.FixtureRequest
) -> None:
    case = prepared(request.getfixturevalue(pipeline))
    subject, _ = subject_of(case)
    *_, last = subject.trajectories.calls()
    found = bench("by_taylor").last_sample(subject.model, subject.pipeline.scheduler, last)
    wanted = recorded_conditions(case.pipeline, case.recipe(HALF))
    made = sample(case.pipeline, wanted, case.sampling).latents
    vae = getattr(case.pipeline, "vae", None)
    # Pipelines that guide twice as many samples make each of them twice.
    own = found[:RECORDED]
    decoded = own.clamp(-1, 1) if vae is None else own / vae.config.scaling_factor
    torch.testing.assert_close(decoded, made, rtol=0, atol=64 * 2.0**-24 * float(made.abs().max()))
    loss = bench("by_taylor").loss(subject.model, subject.pipeline.scheduler, last, found, torch.Generator())
    assert loss.requires_grad


def test_weights_of_units_are_all_that_goes_with_them(bench, prepared, tiny_class: Path) -> None:
    subject, options = subject_of(prepared(tiny_class))
    ones = {name: torch.ones_like(own) for name, own in subject.model.named_parameters()}
    for own in find_candidates(subject, options).structures:
        found = bench("by_taylor").scores_of(subject.model, own, ones)
        assert found.tolist() == [own.parameters(subject.model)] * own.count


@pytest.mark.parametrize("module", ["by_taylor", "by_wanda", "by_surgeon"])
def test_a_unit_that_does_nothing_goes_first(bench, prepared, tiny_class: Path, module: str) -> None:
    subject, _ = subject_of(prepared(tiny_class))
    (own,) = (each for each in find_candidates(subject, options_of(0.1)).structures if each.name.endswith("1.ff.net"))
    (writer,), (reader,) = own.writers, own.readers
    with torch.no_grad():
        for parameter in subject.model.get_submodule(writer.module).parameters():
            parameter[writer.places([5])] = 0
        subject.model.get_submodule(reader.module).weight[:, reader.places([5])] = 0
    changes = bench(module).prune("taylor-even", subject, options_of(0.05))
    (edit,) = (edit for edit in changes.edits if edit.module == reader.module)
    assert not any(first <= 5 < first + count for first, count in edit.inputs)


def test_time_is_that_of_the_denoiser_alone_and_no_image_changes(bench, prepared, tiny_class: Path) -> None:
    case = prepared(tiny_class)
    (wanted,) = case.compared(1)
    run = bench("measure").Run(case.pipeline, case.sampling)
    plain = run.draw([wanted]).images
    with bench("timing").timed_calls(denoiser_of(case.pipeline)) as calls:
        assert torch.equal(run.draw([wanted]).images, plain)
    assert len(calls) == STEPS
    run.draw([wanted])
    assert len(calls) == STEPS
    assert [len(own) for own in bench("timing").denoiser_ms([run, run], wanted, 2)] == [2, 2]


@pytest.mark.parametrize(("share", "steps"), [(0.81, 20), (0.5, 12), (0.01, 1)])
def test_fewer_steps_come_nearest_to_the_same_multiplications(bench, prepared, share: float, steps: int) -> None:
    plain = bench("measure").Run(None, bench("measure").Sampling(25))
    assert bench("prune").fewer_steps(plain, share).sampling.steps == steps


def row(name: str, share: float, psnr_db: float) -> dict[str, Any]:
    return {
        "model": "zoo:emoji",
        "row": name,
        "share": share,
        "psnr_db": psnr_db,
        "ssim": 0.9,
        "latent_mse": 0.01,
        "steps": 20,
        "parameters": 80,
        "full_parameters": 100,
        "macs": 75,
        "full_macs": 100,
        "latency_ratio": 0.8,
        "denoiser_bytes": 42 if name == "W8A8" else 100,
    }


def test_tables_rank_ways_at_equal_shares_and_keep_combinations_apart(bench) -> None:
    rows = [row("original", 0, 100), row("obs", 0.2, 30), row("fewer-steps", 0.2, 35), row("random", 0.2, 12)]
    rows += [row("random", 0.1, 20), row("W8A8", 0, 40)]
    lines = bench("tables").pruning({"rows": rows}).splitlines()
    assert lines[2] == "| **zoo:emoji** |  |  |  |  |  |  |  |  |  |"
    assert [line.split(" | ")[:3] for line in lines[3:]] == [
        ["| 10%", "random", "20.0"],
        ["| 20%", "random", "12.0"],
        ["| 20%", "**obs**", "30.0"],
        ["| 20%", "fewer steps, 20", "35.0"],
    ]
    other = {**row("original", 0, 100), "model": "zoo:digits", "denoiser_bytes": 7}
    together = bench("tables").pruning_together({"rows": [other, *rows]}).splitlines()
    assert together[2:] == ["| W8A8 | 40.0 | 1.00e-02 | 0.42 | 0.75 | 0.80 |"]


def test_curves_are_over_the_parameters_that_are_left(bench, tmp_path: Path) -> None:
    rows = [row("original", 0, 100), row("obs", 0.2, 30), {**row("obs", 0.3, 25), "parameters": 70}]
    results = {"rows": [*rows, row("fewer-steps", 0.2, 35)]}
    assert bench("curves").by_parameters(results) == {"zoo:emoji": {"obs": [(70, 25), (80, 30)]}}
    bench("curves").draw("prune", results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_finished_rows_are_kept_and_unfinished_ones_left_out(
    bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prune, made = bench("prune"), []

    def run(job, prepared, work, count, repeats) -> None:
        made.append(job.row)
        job.file(work).parent.mkdir(parents=True, exist_ok=True)
        images = torch.full((10, 1, 16, 16), 0.5 if job.row == "original" else 0.4)
        figures = {"parameters": 1, "macs": 1}
        save_file({"images": images, "latents": images.clone()}, job.file(work), {"row": json.dumps(figures)})

    monkeypatch.setattr(prune, "run", run)
    arguments = ["prune.py", "--models", "zoo:digits", "--shares", "0.2", "--work", str(tmp_path), "--json", "--rows"]
    for rows in (["random"], ["random", "obs"]):
        monkeypatch.setattr(sys, "argv", arguments + rows)
        prune.main()
    assert made == ["original", "random", "obs"]
    found = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "\n}")
    assert [own["row"] for own in found["rows"]] == ["original", "random", "obs"]
    assert found["rows"][0]["psnr_db"] == 100
    assert found["rows"][1]["psnr_db"] == pytest.approx(20, abs=1e-4)
