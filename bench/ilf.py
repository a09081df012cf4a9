"""Inner-loop feedback beside fewer steps, at equal cost: `python bench/ilf.py --work DIR --data mnist.npz --json`.

Every row draws the same digits of zoo:digits from the same noise, which nothing was learned from. Finished rows are kept under
`--work`, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpress.calibration.cost import macs_per_image
from diffpress.calibration.metrics import psnr_db
from diffpress.calibration.sampling import Sampling, replay, sample_in_batches
from diffpress.calibration.trajectory import record
from diffpress.compress.changes import Changes, worn
from diffpress.compress.methods import method_of
from diffpress.compress.options import Feedback, Inherit
from diffpress.compress.stage import Subject, run_stage
from diffpress.compress.stage_folder import StageFolder
from diffpress.compress.steps.feedback.blocks import find_blocks
from diffpress.compress.steps.feedback.landing import fit_damping
from diffpress.compress.steps.feedback.search import outer_places, plain_plan
from diffpress.compress.steps.feedback.training_data import products_of
from diffpress.export.artifact import open_pipeline
from diffpress.export.edits import Attach
from diffpress.export.source import forms_of, source_tensors
from diffpress.models import resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import Recipe, RecordSection
from diffpress.stages import recorded_conditions, rollout_conditions
from diffpress.zoo.classifier import load_classifier
from diffpress.zoo.data import load_digits

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

MODEL = "zoo:digits"
STEPS, GUIDANCE = 25, 3.0
"""What the model's card recommends."""
LONG = 50
"""Steps of the run that all rows are measured against."""
SEED = 9_000
"""Apart from the seeds that anything was tuned on."""
SPEEDUP = 1.8
FEWER = (13, 14)
HELD = (13,)
CHOSEN = {"region": (2, 4), "trials": 1, "batch": 2}
"""Of feedback; a search takes a trial's time for each plan."""
TRIALS = 8
"""Of inherit."""
BATCH = 8
RECORD = RecordSection(trajectories=64, batch=BATCH)


@dataclass(frozen=True)
class Row:
    """How a row is drawn: in so many steps, with what is made of the subject laid around the denoiser."""

    steps: int
    changes: Callable[[Subject, Path], Changes] = lambda subject, folder: Changes()


def rows(iterations: int) -> dict[str, Row]:
    """Every row by its name."""
    fewer = {f"steps-{count}": Row(count) for count in (LONG, STEPS, *FEWER)}
    held = {f"held-{count}": Row(STEPS, partial(held_only, count)) for count in HELD}
    feedback = {
        f"feedback-{source}": Row(STEPS, partial(learned, source, iterations)) for source in ("forecast", "pass")
    }
    return {**fewer, **held, "inherit": Row(STEPS, inherited), **feedback}


def held_only(count: int, subject: Subject, folder: Path) -> Changes:
    """So many steps are computed, evenly spread, and the others continue their answers; nothing is learned."""
    trajectories = subject.trajectories
    call = trajectories.call(trajectories.shards[0], 0)
    blocks = find_blocks(subject.model, lambda: replay(subject.model, call))
    plan = plain_plan(blocks, STEPS, outer_places(STEPS, count, 1.0))
    damping = fit_damping(products_of(trajectories), plan.steps)
    edit = Attach(component=subject.component, module="feedback", settings=plan)
    return Changes((edit,), {"feedback.scales": torch.zeros(1), "feedback.damping": torch.tensor(damping)})


def inherited(subject: Subject, folder: Path) -> Changes:
    """What the method `inherit` leaves."""
    options = Inherit.model_validate({"method": "inherit", "speedup": SPEEDUP, "trials": TRIALS})
    return run_stage(method_of(options), subject, options, StageFolder(folder), _tell)


def learned(source: str, iterations: int, subject: Subject, folder: Path) -> Changes:
    """What the method leaves."""
    options = Feedback.model_validate(
        {"method": "feedback", "speedup": SPEEDUP, "iterations": iterations, "source": source, **CHOSEN}
    )
    return run_stage(method_of(options), subject, options, StageFolder(folder), _tell)


def subject_of(pipeline: Any, work: Path) -> Subject:
    """What the method works on, recorded runs in `work`."""
    recipe, sampling, source = Recipe(record=RECORD), Sampling(STEPS, GUIDANCE), resolve(MODEL)
    trajectories = record(pipeline, recorded_conditions(pipeline, recipe), sampling, work / "recorded", BATCH)
    forms = forms_of(source_tensors(source, source.denoiser))
    draw = partial(rollout_conditions, pipeline, recipe)
    return Subject(pipeline, source.denoiser, forms, trajectories, sampling, draw, BATCH, recipe.seed)


def sampled(name: str, row: Row, subject: Subject, work: Path, count: int) -> None:
    """Draw a row, unless it is there."""
    out = work / f"{name}.safetensors"
    if out.exists():
        return
    wanted = paired_conditions(subject.pipeline, count, SEED)
    sampling = Sampling(row.steps, GUIDANCE)
    changes = row.changes(subject, work / name)
    with worn(subject.model, changes, subject.timesteps):
        macs = macs_per_image(subject.pipeline, wanted[0], sampling)
        made = sample_in_batches(subject.pipeline, wanted, sampling, BATCH)
    words = {"macs": macs, "plan": [edit.settings.model_dump(mode="json") for edit in changes.edits]}
    save_file({"images": made.images, "latents": made.latents}, out, {"row": json.dumps(words)})


def _tell(stage: str, done: int, total: int) -> None:
    if done % 10 == 0:
        print(f"{stage}: {done}/{total}", file=sys.stderr, flush=True)


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """[N, 128] of the classifier, of images in 0..1."""
    return torch.cat([load_classifier().features(part * 2 - 1) for part in images.split(256)])


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of features [N, C] and [M, C], with the kernel (x y / C + 1)^3 of KID; unbiased."""
    x, y = x.double(), y.double()
    kernel: Callable[[Tensor, Tensor], Tensor] = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    own = [(k.sum() - k.diagonal().sum()) / (c * (c - 1)) for k, c in ((kernel(x, x), n), (kernel(y, y), m))]
    return float(own[0] + own[1] - 2 * kernel(x, y).mean())


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    with safe_open(file, framework="pt") as found:
        yield found


def table(names: list[str], work: Path, data: Path, count: int) -> list[dict[str, Any]]:
    """Every row beside the long run, and real digits beside each other."""
    truth = _read(work / f"steps-{LONG}.safetensors")
    base = _read(work / f"steps-{STEPS}.safetensors")
    digits = load_digits(data, "test")
    real = [_real(digits, count, part) for part in (0, 1)]
    known = features(truth["images"])
    found = [{"row": "real", "kernel_distance": kernel_distance(features(real[1]), features(real[0]))}]
    for name in names:
        own = _read(work / f"{name}.safetensors")
        seen = features(own["images"])
        found.append(
            {
                "row": name,
                "macs": own["macs"],
                "speedup": base["macs"] / own["macs"],
                "psnr_db": float(psnr_db(own["images"], base["images"]).mean()) if name != f"steps-{STEPS}" else None,
                "latent_mse": _mse(own["latents"], base["latents"]),
                "latent_mse_long": _mse(own["latents"], truth["latents"]),
                "kernel_distance": kernel_distance(seen, features(real[0])),
                "feature_mse_long": _mse(seen, known),
                "plan": own["plan"],
                "tried": _tried(work / name),
            }
        )
    return found


def _tried(folder: Path) -> list[dict[str, Any]]:
    """Plans that the method had to choose from, with their errors on its own images, and how the last one learned."""
    if not (folder / "tried.json").exists():
        return []
    history = json.loads((folder / "changes.json").read_text(encoding="utf-8"))["history"]
    return [*json.loads((folder / "tried.json").read_text(encoding="utf-8")), {"learning": history}]


def _mse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


def _real(digits: Any, count: int, part: int) -> Tensor:
    """Real digits in 0..1, as many of each class as are drawn."""
    each = [torch.nonzero(digits.labels == label).flatten()[part * count :][: -(-count // 10)] for label in range(10)]
    chosen = torch.stack([own[place] for place in range(-(-count // 10)) for own in each])[:count]
    return digits.images[chosen] / 2 + 0.5


def _read(file: Path) -> dict[str, Any]:
    with opened(file) as found:
        return {
            "images": found.get_tensor("images"),
            "latents": found.get_tensor("latents"),
            **json.loads(found.metadata()["row"]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="digits a row")
    parser.add_argument("--iterations", type=int, default=600, help="optimizer steps of feedback")
    parser.add_argument("--rows", nargs="+", default=None, help="of those there are")
    parser.add_argument("--data", type=Path, required=True, help="the npz of real digits")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    every = rows(arguments.iterations)
    wanted = arguments.rows or list(every)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pipeline = open_pipeline(resolve(MODEL))
    pipeline.set_progress_bar_config(disable=True)
    subject = subject_of(pipeline, arguments.work)
    for name in wanted:
        print(name, file=sys.stderr, flush=True)
        sampled(name, every[name], subject, arguments.work, arguments.count)
    results: dict[str, Any] = {
        "machine": machine(),
        "count": arguments.count,
        "iterations": arguments.iterations,
        "rows": table(wanted, arguments.work, arguments.data, arguments.count),
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
