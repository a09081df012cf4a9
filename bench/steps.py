"""Images from fewer computations, a row for every way of it: `python bench/steps.py --work DIR --json`.

Quality against multiplications and against measured time, beside the full run with the same noise, on seeds that nothing was
tuned on. Finished rows are kept under `--work`, so that a stopped run goes on; failed ones are tried again. Each row is a
process of its own, since what skips computation is put into the pipeline and what surrounds it; a package of a peer has an
environment of its own as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpress.calibration.metrics import psnr_db
from diffpress.export.artifact import open_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.models import resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import Recipe, RecordSection
from diffpress.stages import recorded_conditions
from diffpress.zoo import PIPELINES

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "caches"))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import python_for
from machine import machine
from run_row import PLAIN, ROWS
from tables import steps

GUIDANCE = 3.0
"""What the models' cards recommend."""
SEED = 7_000
"""Apart from the seeds that anything was tuned on."""
RECORDED = 8
"""Runs that peers may calibrate on."""
BATCH = 8
SPEEDUPS = (1.8, 2.5, 3.5)
"""Times fewer multiplications, at which all are compared."""
SCHEDULERS = {"ddim": DDIMScheduler, "dpmpp": DPMSolverMultistepScheduler}
ENVIRONMENTS = {"deepcache": "deepcache", "dbcache": "cache-dit"}
"""Rows whose package is installed for them alone."""
Settings = dict[str, Any]

AT_SPEEDUPS: list[Settings] = [{"speedup": speedup} for speedup in SPEEDUPS]
FARTHER: list[Settings] = [*AT_SPEEDUPS, {"speedup": 4.5}]
"""For what only comes near: a point beyond the last as well."""
INTERVALS: list[Settings] = [
    {"interval": interval, "warmup": warmup}
    for interval, warmup in ((2, 3), (2, 1), (3, 3), (3, 1), (4, 3), (4, 1), (5, 1), (7, 1))
]
SETTINGS: dict[str, list[Settings]] = {
    "deepcache": [
        {"interval": interval, "branch": branch}
        for interval, branch in ((2, 0), (3, 0), (4, 0), (5, 0), (7, 0), (2, 1), (3, 1), (5, 1))
    ],
    "taylorseer": [*INTERVALS, *({"interval": interval, "warmup": 1, "last": 1} for interval in (3, 4, 5))],
    "faster-cache": [{"interval": interval} for interval in (2, 3, 5)],
    "pyramid-attention": [{"interval": interval} for interval in (2, 4)],
    "first-block": FARTHER,
    "magcache": FARTHER,
    "dbcache": [{**each, "even": even} for even in (False, True) for each in FARTHER],
    "inherit": AT_SPEEDUPS,
    "inherit+W8A8": AT_SPEEDUPS,
}
"""What is tried of each, so that there are points around every speed-up; what the settings mean says the row's module."""


@dataclass(frozen=True)
class Case:
    """What all rows are compared within."""

    model: str
    scheduler: str
    steps: int

    def name(self) -> str:
        return f"{self.model.removeprefix('zoo:')}-{self.scheduler}-{self.steps}"


@dataclass(frozen=True)
class Job:
    """One row of a case; its settings as JSON."""

    case: Case
    row: str
    settings: str

    def file(self, work: Path) -> Path:
        """Where its images and figures are kept."""
        words = "-".join(f"{key}={value}" for key, value in json.loads(self.settings).items())
        return work / "rows" / f"{self.case.name()}-{self.row}-{words}.safetensors"


def jobs(case: Case, rows: list[str]) -> Iterator[Job]:
    """All rows of a case, the full run first."""
    for count in step_counts(case.steps):
        if PLAIN in rows or count == case.steps:
            yield Job(case, PLAIN, json.dumps({"steps": count}))
    for row, several in SETTINGS.items():
        if row in rows:
            yield from (Job(case, row, json.dumps(settings)) for settings in several)


def step_counts(steps: int) -> list[int]:
    """Counts with those on both sides of every speed-up among them, the full one first."""
    around = [count(steps / speedup) for speedup in (1.25, *SPEEDUPS, 5) for count in (ceil, floor)]
    return sorted({steps, *around}, reverse=True)


def prepare(case: Case, work: Path, count: int) -> list[str]:
    """Write what all rows of a case start from; returns the arguments that name it."""
    folder = with_scheduler(resolve(case.model).path, case.scheduler, work / "pipelines" / case.name())
    request = work / "requests" / f"{case.name()}.json"
    request.parent.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(request_of(folder, case, count)))
    return ["--model", str(folder), "--request", str(request)]


def run(job: Job, prepared: list[str], work: Path) -> None:
    """Make one row; a failure is written down in its place."""
    out = job.file(work)
    out.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).resolve().parent / "caches" / "run_row.py"
    arguments = [*prepared, "--settings", job.settings, "--out", str(out)]
    try:
        peer = ENVIRONMENTS.get(job.row)
        python = python_for(peer, work / "environments") if peer else sys.executable
        done = subprocess.run([python, script, job.row, *arguments], capture_output=True, text=True, check=False)
        error = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1:] if done.returncode else []
    except RuntimeError as failure:
        error = [str(failure)]
    if error:
        save_file({}, out, {"row": json.dumps({"error": error[0]})})


def with_scheduler(source: Path, scheduler: str, out: Path) -> Path:
    """A copy of a pipeline's folder with another scheduler in it."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    own = SCHEDULERS[scheduler].from_pretrained(source, subfolder="scheduler")
    own.save_pretrained(out / "scheduler")
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", type(own).__name__]
    if index["_class_name"] == "DDIMPipeline" and scheduler != "ddim":
        # It makes DDIM of every scheduler; this one takes them as they are.
        index["_class_name"] = "DDPMPipeline"
    (out / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


def request_of(folder: Path, case: Case, count: int) -> dict[str, Any]:
    """What every row of a case is asked for."""
    pipeline = open_pipeline(PipelineFolder(folder, str(folder)))
    compared = paired_conditions(pipeline, count, SEED)
    recorded = recorded_conditions(pipeline, Recipe(record=RecordSection(trajectories=RECORDED)))
    return {
        "steps": case.steps,
        "guidance_scale": GUIDANCE,
        "record": [[each.text, each.seed] for each in recorded],
        "compare": [[each.text, each.seed] for each in compared],
        "batch": BATCH,
    }


@dataclass(frozen=True)
class Found:
    """A finished row."""

    images: Tensor | None
    """None where the row failed; likewise the latents."""
    latents: Tensor | None
    figures: dict[str, Any]


def read(file: Path) -> Found:
    """What a row left."""
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        tensors = [opened.get_tensor(name) if name in names else None for name in ("images", "latents")]
        return Found(*tensors, json.loads(opened.metadata()["row"]))


def failed(job: Job, work: Path) -> bool:
    """Whether a row is there that has no images."""
    return job.file(work).exists() and read(job.file(work)).images is None


def run_all(case_jobs: list[Job], work: Path, count: int) -> list[Job]:
    """Make what is missing; returns the rows that there are. Of what fails at its first settings no others are tried."""
    prepared = prepare(case_jobs[0].case, work, count)
    there: dict[str, list[Job]] = {}
    for job in case_jobs:
        before = there.setdefault(job.row, [])
        if before and failed(before[0], work):
            continue
        if not job.file(work).exists() or failed(job, work):
            print(f"{job.case.name()} {job.row} {job.settings}", file=sys.stderr, flush=True)
            run(job, prepared, work)
        before.append(job)
    return [job for several in there.values() for job in several]


def table(case_jobs: list[Job], work: Path) -> list[dict[str, Any]]:
    """The rows of one case; the first is the full run."""
    full = read(case_jobs[0].file(work))
    assert full.images is not None, f"{case_jobs[0]}: {full.figures['error']}"
    rows = []
    for job in case_jobs:
        own, case, settings = read(job.file(work)), job.case, json.loads(job.settings)
        row = {"model": case.model, "scheduler": case.scheduler, "steps": case.steps, "row": job.row}
        row |= {"settings": settings, "wanted_speedup": settings.get("speedup"), **own.figures}
        if own.images is not None:
            row["psnr_db"] = float(psnr_db(own.images, full.images).mean())
            row["latent_mse"] = float((own.latents - full.latents).square().mean())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[f"zoo:{name}" for name in PIPELINES])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", nargs="+", type=int, default=[25, 20, 50])
    parser.add_argument("--schedulers", nargs="+", default=list(SCHEDULERS), choices=list(SCHEDULERS))
    parser.add_argument("--count", type=int, default=32, help="pairs of images")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    results: dict[str, Any] = {"machine": machine(), "count": arguments.count, "rows": []}
    for scheduler in arguments.schedulers:
        for count in arguments.steps:
            for model in arguments.models:
                wanted = list(jobs(Case(model, scheduler, count), arguments.rows))
                results["rows"] += table(run_all(wanted, work, arguments.count), work)
    print(json.dumps(results, indent=1) if arguments.json else steps(results))


if __name__ == "__main__":
    main()
