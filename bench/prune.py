"""What images lose with what is removed, a row for every way of removing it: `python bench/prune.py --work DIR --json`.

Same prompts, same noise, seeds that nothing was tuned on; all ways look at the same recorded runs, remove units of the same
structures, and cut them in the same way down to the same parameters. Fewer steps stand beside them at the multiplications of
`obs`. Finished rows are kept under `--work`, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from safetensors.torch import save_file

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import median_ratio, parameter_count
from diffpress.calibration.metrics import psnr_db, ssim
from diffpress.calibration.sampling import denoiser_of, sample_in_batches
from diffpress.export.artifact import load_pipeline
from diffpress.zoo import PIPELINES

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parent / "caches"))
sys.path.insert(0, str(Path(__file__).parent / "pruning"))
from by_diffpress import EIGHT_BITS
from machine import machine
from measure import Run, draw_and_count
from quantize import class_accuracy
from steps import Found, read
from subject import BASELINES, BATCH, Prepared, Sections
from tables import pruning
from timing import denoiser_ms

STEPS = 25
REPEATS = 5
FULL = "original"
FEWER = "fewer-steps"
LIKE = "obs"
"""The row whose multiplications fewer steps may spend."""
OWN = ("magnitude", "obs", "masks")
"""Methods of ours, by what a recipe calls them."""
ROWS = (*BASELINES, *OWN, FEWER)
SHARES = (0.1, 0.2, 0.3, 0.5)
"""Of the parameters in heads, neurons and channels."""
FAST = {"steps": {"method": "inherit", "speedup": 1.8}}
W8A8 = {"quantize": EIGHT_BITS}


def smaller(share: float) -> dict[str, Any]:
    """The section that removes a share of all parameters of the denoiser."""
    return {"prune": {"method": "obs", "remove": share}}


TOGETHER: Mapping[str, Sections] = {
    "prune 0.15": smaller(0.15),
    "prune 0.2": smaller(0.2),
    "W8A8": W8A8,
    "fast": FAST,
    "prune 0.2 + W8A8": smaller(0.2) | W8A8,
    "prune 0.15 + W8A8 + fast": smaller(0.15) | W8A8 | FAST,
}
"""Stages alone and one after the other, on the model that `--together` names."""


@dataclass(frozen=True)
class Job:
    """One row of a model."""

    model: str
    row: str
    share: float = 0.0
    """Of what can be removed; 0 where the row says it, or nothing is removed."""

    def file(self, work: Path) -> Path:
        """Where its images and figures are kept."""
        return work / "rows" / f"{Path(self.model).name.removeprefix('zoo:')}-{self.row}-{self.share:g}.safetensors"

    def sections(self) -> Sections:
        """The recipe; a baseline's is the one whose budget it has."""
        if self.row in TOGETHER:
            return TOGETHER[self.row]
        method = self.row if self.row in OWN else "magnitude"
        return {"prune": {"method": method, "remove": self.share, "share_of": "units"}}


def jobs(model: str, rows: list[str], shares: list[float], *, together: bool) -> Iterator[Job]:
    """The original first, and fewer steps after what they are like."""
    yield Job(model, FULL)
    for share in shares:
        yield from (Job(model, row, share) for row in rows)
    if together:
        yield from (Job(model, row) for row in TOGETHER)


def run(job: Job, prepared: Prepared, work: Path, count: int, repeats: int) -> None:
    """Make one row."""
    plain = Run(prepared.pipeline, prepared.sampling)
    figures: dict[str, Any] = {"denoiser_bytes": prepared.source.component_bytes(prepared.source.denoiser)}
    with TemporaryDirectory() as folder:
        own = plain
        if job.row == FEWER:
            like, full = (
                read(each.file(work)).figures["macs"] for each in (replace(job, row=LIKE), Job(job.model, FULL))
            )
            own = fewer_steps(plain, like / full)
        elif job.row != FULL:
            start = perf_counter()
            changes = prepared.changed(job.row, job.sections(), Path(folder) / "stages")
            if job.row not in BASELINES:
                # These share what they look at with each other.
                figures["seconds"] = perf_counter() - start
            made = prepared.saved(changes, Path(folder) / "made")
            figures["denoiser_bytes"] = made.component_bytes(made.denoiser)
            own = Run(load_pipeline(made), prepared.sampling)
            own.pipeline.set_progress_bar_config(disable=True)
        save(job.file(work), own, plain, prepared.compared(count), repeats, figures)


def fewer_steps(plain: Run, share: float) -> Run:
    """As many steps as come nearest to a share of the multiplications."""
    steps = plain.sampling.steps
    assert steps is not None
    return Run(plain.pipeline, replace(plain.sampling, steps=max(1, round(share * steps))))


def save(out: Path, own: Run, plain: Run, wanted: list[Condition], repeats: int, figures: dict[str, Any]) -> None:
    """Draw, count, time and write."""
    images = sample_in_batches(own.pipeline, wanted, own.sampling, BATCH)
    macs = draw_and_count(own, wanted[:1], 1)[1]
    times = denoiser_ms([own, plain], wanted[0], repeats)
    figures |= {
        "steps": own.sampling.steps,
        "parameters": parameter_count(denoiser_of(own.pipeline)),
        "macs": round(macs),
        "latency_ms": statistics.median(times[0]),
        "full_latency_ms": statistics.median(times[1]),
        "latency_ratio": median_ratio(times[0], times[1]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"images": images.images.contiguous(), "latents": images.latents.contiguous()}
    save_file(tensors, out, {"row": json.dumps(figures)})


def table(model_jobs: list[Job], work: Path) -> list[dict[str, Any]]:
    """The finished rows of one model beside its original's."""
    full = read(model_jobs[0].file(work))
    return [row_of(job, read(job.file(work)), full) for job in model_jobs if job.file(work).exists()]


def row_of(job: Job, own: Found, full: Found) -> dict[str, Any]:
    """One row's quality and cost."""
    assert own.images is not None
    assert full.images is not None
    row = {"model": job.model, "row": job.row, "share": job.share, **own.figures}
    row |= {f"full_{name}": full.figures[name] for name in ("parameters", "macs")}
    row |= {
        "psnr_db": float(psnr_db(own.images, full.images).mean()),
        "ssim": ssim(own.images, full.images),
        "latent_mse": float((own.latents - full.latents).square().mean()),
    }
    if job.model == "zoo:digits":
        row["class_accuracy"] = class_accuracy(own.images)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[f"zoo:{name}" for name in PIPELINES])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--together", default="zoo:emoji", help="the model on which stages are combined")
    parser.add_argument("--count", type=int, default=32, help="pairs of images")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timings of each row, in alternation")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    results: dict[str, Any] = {"machine": machine(), "count": arguments.count, "rows": []}
    for model in arguments.models:
        prepared = Prepared(model, STEPS, work)
        wanted = list(jobs(model, arguments.rows, arguments.shares, together=model == arguments.together))
        for job in wanted:
            if not job.file(work).exists():
                print(f"{model} {job.row} {job.share:g}", file=sys.stderr, flush=True)
                run(job, prepared, work, arguments.count, arguments.repeats)
        results["rows"] += table(wanted, work)
    print(json.dumps(results, indent=1) if arguments.json else pruning(results))


if __name__ == "__main__":
    main()
