"""What becomes of every kind of pipeline, step by step: `python bench/pipelines.py --json`; `--data` adds others.

Small pipelines with random weights show what works and what is refused, in which words. Their pictures are noise, so that
figures of quality say little of trained ones.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import diffpress
from diffpress import flow, measuring
from diffpress.calibration.calls import call_of
from diffpress.calibration.sampling import sample
from diffpress.compare import compare_by_name
from diffpress.export.errors import UserError
from diffpress.exporting import export_to
from diffpress.inspecting import verify_folder
from diffpress.models import pipeline_class, resolve
from diffpress.pairs import paired_conditions
from diffpress.recipe import parse_recipe
from diffpress.stages import sampling_of

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from pipeline_table import COLUMNS
from pipeline_table import pipelines as table
from small_denoisers import DENOISERS
from small_pipelines import PIPELINES

PAIRS = 2
STEPS = 4
SIZE = {
    "height": 64,
    "width": 64,
    "num_frames": 5,
    "max_sequence_length": 16,
    "use_resolution_binning": False,
}
"""Of what is made, as far as a pipeline can be asked for it."""
OTHERWISE: dict[str, dict[str, Any]] = {
    "auraflow": {"height": 16, "width": 16},
    "cogvideox": {"height": 16, "width": 16},
    "hunyuandit": {"height": 16, "width": 16},
    "if_": {"height": 8, "width": 8},
}
"""Of those that cannot make that size."""
FEWER = {"sana_sprint": 2}
"""Steps of those that make no more."""


class UnlikeError(Exception):
    """What should have been finite, or the same, is not."""


@dataclass(frozen=True)
class Bench:
    """One pipeline on its way."""

    source: str
    name: str
    work: Path

    @property
    def artifact(self) -> Path:
        return self.work / "artifact"

    def recipe(self) -> Any:
        """W8A8 of every denoiser."""
        known = call_of(pipeline_class(resolve(self.source))).parameters
        wanted = SIZE | OTHERWISE.get(self.name, {})
        call = {key: value for key, value in wanted.items() if key in known}
        steps = {"steps": FEWER.get(self.name, STEPS)} if "num_inference_steps" in known else {}
        return parse_recipe(
            {
                "sampling": {**steps, "call": call},
                "record": {"trajectories": 2, "batch": 2},
                "quantize": {"method": "ptq", "weights": 8, "activations": 8},
            }
        )

    def compress(self) -> str:
        """Of what size, and how far from the original."""
        made = flow.compress(resolve(self.source), self.recipe(), self.artifact, fresh=True)
        size = made.manifest.metrics["size_bytes"]
        return f"{made.manifest.metrics['psnr_db']:.1f} dB, {size['candidate'] / size['reference']:.2f} of the size"

    def verify(self) -> str:
        """Its digests and edits."""
        return verify_folder(self.artifact).rpartition(", ")[2]

    def load(self) -> str:
        """By plain diffusers, and by `diffpress.load`: both make the same."""
        plain = self._made(diffusers.DiffusionPipeline.from_pretrained(self.artifact))
        ours = self._made(diffpress.load(self.artifact, prefer="memory"))
        if not torch.equal(plain, ours):
            raise UnlikeError("plain diffusers makes something else")
        return "the same"

    def compare(self) -> str:
        """With the original, as it was made."""
        metrics = compare_by_name(self.source, str(self.artifact), "onnx", PAIRS, None, 0, None, quiet).metrics
        return f"{metrics['psnr_db']:.1f} dB"

    def compile(self) -> str:
        """Its graphs rewritten, so that norms are fused into layers, and run as they are."""
        pipeline = diffpress.load(self.artifact, prefer="memory")
        diffpress.compile(pipeline, "eager")
        self._made(pipeline)
        return "yes"

    def export(self) -> str:
        """To ONNX."""
        summary = export_to(resolve(str(self.artifact)), "onnx", (), self.work / "onnx", quiet)
        return f"{summary['format']}, largest error {summary['largest_error']:.1g}"

    def _made(self, pipeline: Any) -> torch.Tensor:
        recipe = self.recipe()
        pipeline.set_progress_bar_config(disable=True)
        given = flow.given_of(pipeline, recipe)
        (condition,) = paired_conditions(pipeline, 1, 0, given)
        images = sample(pipeline, [condition], sampling_of(pipeline, recipe)).images
        if not bool(torch.isfinite(images).all()):
            raise UnlikeError("what it makes is not finite")
        return images


def quiet(*_: Any) -> None:
    """Says nothing."""


def outcomes(bench: Bench) -> dict[str, dict[str, str]]:
    """What became of every step; where there is no artifact, nothing more is tried."""
    found: dict[str, dict[str, str]] = {}
    for column in COLUMNS:
        if column != "compress" and not bench.artifact.exists():
            break
        told = outcome(getattr(bench, column))
        # Where the folders were is no matter.
        found[column] = {
            kind: words.replace(str(bench.artifact), "ARTIFACT").replace(bench.source, bench.name)
            for kind, words in told.items()
        }
        torch.compiler.reset()
    return found


def outcome(step: Callable[[], str]) -> dict[str, str]:
    """`works`, `refused` or `fault`, and the words for it."""
    try:
        return {"works": step()}
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"fault": f"{type(error).__name__}: {error}"}


def built(name: str, make: Callable[[Path], Any], work: Path) -> str:
    """A small pipeline of this project's own, saved."""
    torch.manual_seed(0)
    pipeline = make(work)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.save_pretrained(work / name)
    return str(work / name)


def sources(data: Path | None, work: Path, only: list[str]) -> Mapping[str, Callable[[], str]]:
    """Where each pipeline is, made when it is asked for."""
    makers = PIPELINES | DENOISERS
    found: dict[str, Callable[[], str]] = {name: partial(built, name, makers[name], work) for name in makers}
    for folder in sorted(data.iterdir()) if data is not None else ():
        if (folder / "model_index.json").is_file():
            found[folder.name] = partial(str, folder)
    return {name: make for name, make in found.items() if not only or name in only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of other pipelines, each in a folder")
    parser.add_argument("--only", nargs="*", default=[], help="names of some of them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    flow.MEASURED, measuring.REPEATS = PAIRS, 1
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in sources(arguments.data, Path(folder), arguments.only).items():
            source = make()
            rows[name] = {
                "class": str(resolve(source).index["_class_name"]),
                **outcomes(Bench(source, name, Path(folder) / f"{name}-work")),
            }
            print(name, rows[name], file=sys.stderr, flush=True)
    results = {"machine": machine(), "steps": STEPS, "pairs": PAIRS, "pipelines": rows}
    print(json.dumps(results, indent=1) if arguments.json else table(results))


if __name__ == "__main__":
    main()
