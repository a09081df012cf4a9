"""Every quantizer at every width on every model of the zoo, in one run: `python bench/quantize.py --work DIR --json`.

Same prompts, same noise, seeds that nothing was tuned on. Finished rows are kept under `--work`, so that a stopped run goes
on. Each row is a process of its own, because its memory is measured; a peer has an environment of its own as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffpress.calibration.metrics import psnr_db, ssim
from diffpress.export.artifact import open_pipeline
from diffpress.models import resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import Recipe, RecordSection
from diffpress.stages import recorded_conditions
from diffpress.zoo import PIPELINES
from diffpress.zoo.classifier import load_classifier

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from diffpress_rows import SPARE_BITS
from environment import PEERS, python_for
from machine import machine
from tables import quantizers

STEPS = 25
GUIDANCE = 3.0
"""What the models' cards recommend."""
SEED = 5_000
"""Apart from the seeds that anything was tuned on."""
RECORDED = 32
"""Runs that peers may calibrate on, and that ptq looks at."""
BATCH = 8
BITS = ("W8A8", "W4A8", "W4A4", "W2A8", "w4")
OWN_ROWS = {"nearest": BITS[:-1], "ptq": BITS, "qalora": BITS[1:-1]}
"""At which widths; the preset of eight bits does not learn, since rounding alone is hard to tell from the original."""
AT_SIZE_OF = "modelopt"
"""The peer that rounds inputs too at every width, and whose bytes the rows `ROW-same-size` may spend."""
SAME_SIZE = {"ptq-same-size": ("W4A8", "W4A4", "W2A8"), "qalora-same-size": ("W4A8", "W4A4", "W2A8")}
ROWS = (*OWN_ROWS, *PEERS, *SAME_SIZE)
ABLATION = ("ptq", "lora", "lora-scale-aware", "lora-per-step", "qalora", "qat")
"""Each adds one thing to the row before it; the last trains whole weights instead."""


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    model: str
    bits: str
    row: str

    def file(self, work: Path) -> Path:
        """Where its images and figures are kept."""
        return work / "rows" / f"{self.model.removeprefix('zoo:')}-{self.bits}-{self.row}.safetensors"


def jobs(models: list[str], bits: list[str], rows: list[str], ablation: str) -> list[Job]:
    """All rows that there are: a peer has those that it offers, weights alone are not learned."""
    wanted = [Job(model, "float", "teacher") for model in models]
    for model in models:
        for width in bits:
            own = [row for row, widths in OWN_ROWS.items() if width in widths]
            offered = [peer for peer, what in PEERS.items() if width in what.bits]
            larger = [row for row, widths in SAME_SIZE.items() if width in widths]
            wanted += [Job(model, width, row) for row in [*own, *offered, *larger] if row in rows]
    if ablation:
        wanted += [Job(ablation, "W4A4", row) for row in ABLATION]
    return list(dict.fromkeys(wanted))


def run(job: Job, work: Path, count: int, iterations: int) -> None:
    """Make one row, unless it is there; a failure is written down in its place."""
    out = job.file(work)
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    request = out.with_suffix(".request.json")
    request.write_text(json.dumps(request_of(job.model, count)))
    folder = Path(__file__).resolve().parent
    arguments = ["--bits", job.bits, "--request", str(request), "--out", str(out)]
    try:
        if job.row in PEERS:
            python = python_for(job.row, work / "environments")
            command = [python, folder / "peers" / "run.py", job.row, "--model", resolve(job.model).path, *arguments]
        else:
            command = [
                sys.executable,
                folder / "diffpress_rows.py",
                job.row.removesuffix("-same-size"),
                "--model",
                job.model,
                "--iterations",
                str(iterations),
                *(["--spare-bits", str(spare_bits(job, work))] if job.row in SAME_SIZE else []),
                *arguments,
            ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
        error = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1:] if done.returncode else []
    except RuntimeError as failure:
        error = [str(failure)]
    if error:
        save_file({}, out, {"peer": json.dumps({"error": error[0]})})


def spare_bits(job: Job, work: Path) -> float:
    """Bits a weight above the width, so that the denoiser takes the bytes of AT_SIZE_OF's and no more.

    Raises RuntimeError where one of the rows that this is reckoned from has failed.
    """
    own, peer = (denoiser_bytes(replace(job, row=row), work) for row in ("ptq", AT_SIZE_OF))
    source = resolve(job.model)
    weights = sum(tensor.numel() for _, tensor in source.tensors(source.denoiser))
    return max(SPARE_BITS + 8 * (peer - own) / weights, 0.0)


def denoiser_bytes(job: Job, work: Path) -> int:
    """Of a finished row."""
    figures = json.loads(_read(job.file(work)).metadata["peer"]) if job.file(work).exists() else {}
    if "denoiser_bytes" not in figures:
        raise RuntimeError(f"needs the bytes of {job.bits} {job.row}, which are not there")
    return int(figures["denoiser_bytes"])


def request_of(model: str, count: int) -> dict[str, Any]:
    """What every row of a model is asked for."""
    pipeline = open_pipeline(resolve(model))
    compared = paired_conditions(pipeline, count, SEED)
    recorded = recorded_conditions(pipeline, Recipe(record=RecordSection(trajectories=RECORDED)))
    return {
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "record": [[each.text, each.seed] for each in recorded],
        "compare": [[each.text, each.seed] for each in compared],
        "batch": BATCH,
    }


def table(model_jobs: list[Job], work: Path) -> list[dict[str, Any]]:
    """All rows of one model beside its teacher's, over the images that every one of them drew."""
    found = {job: _read(job.file(work)) for job in model_jobs}
    count = min(len(each.images) for each in found.values() if each.images is not None)
    truth = found[model_jobs[0]]
    rows = []
    for job, own in found.items():
        row = {"bits": job.bits, "row": job.row, **json.loads(own.metadata["peer"])}
        if own.images is not None:
            images, latents = own.images[:count], own.latents[:count]
            row |= {
                "count": count,
                "psnr_db": float(psnr_db(images, truth.images[:count]).mean()),
                "ssim": ssim(images, truth.images[:count]),
                "latent_mse": float((latents - truth.latents[:count]).square().mean()),
            }
            if job.model == "zoo:digits":
                row["class_accuracy"] = class_accuracy(images)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Found:
    """A finished row."""

    images: Any
    """None where the row failed; likewise the latents."""
    latents: Any
    metadata: dict[str, str]


def _read(file: Path) -> Found:
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        tensors = [opened.get_tensor(name) if name in names else None for name in ("images", "latents")]
        return Found(*tensors, opened.metadata())


@torch.no_grad()
def class_accuracy(images: Tensor) -> float:
    """Of the classifier, on images [N, C, H, W] in 0..1 that cycle through the classes."""
    found = load_classifier()(images * 2 - 1).argmax(1)
    return float((found == torch.arange(len(images)) % 10).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[f"zoo:{name}" for name in PIPELINES])
    parser.add_argument("--bits", nargs="+", default=BITS, choices=BITS)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--ablation", default="zoo:digits-unet", help="the model that is taken apart; empty for none")
    parser.add_argument("--count", type=int, default=64, help="pairs of images")
    parser.add_argument("--iterations", type=int, default=1200, help="of everything that learns")
    parser.add_argument("--work", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    wanted = jobs(arguments.models, arguments.bits, arguments.rows, arguments.ablation)
    for number, job in enumerate(wanted):
        print(f"{number + 1}/{len(wanted)} {job.model} {job.bits} {job.row}", file=sys.stderr, flush=True)
        run(job, arguments.work, arguments.count, arguments.iterations)
    results: dict[str, Any] = {"machine": machine(), "count": arguments.count, "iterations": arguments.iterations}
    models = dict.fromkeys(job.model for job in wanted)
    results["models"] = {
        model: table([job for job in wanted if job.model == model], arguments.work) for model in models
    }
    print(json.dumps(results, indent=1) if arguments.json else quantizers(results))


if __name__ == "__main__":
    main()
