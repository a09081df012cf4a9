"""SHA-256 of what each preset makes of each model of the zoo: a change that is none of a method leaves them as they are.

Recording and learning are cut short; what is compared is how a result is stored, not how good it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import torch

from diffpress.flow import compress_by_name
from diffpress.recipe import load_recipe, presets
from diffpress.zoo import PIPELINES

SHORT = ["record.trajectories=8", "sampling.steps=4"]
LEARNING = ["quantize.iterations=12", "quantize.batch=8", "quantize.validation_images=2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(PIPELINES))
    parser.add_argument("--presets", nargs="+", default=presets())
    parser.add_argument("--json", type=Path, help="also write the digests there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for model in arguments.models:
        for preset in arguments.presets:
            rows[f"{model} {preset}"] = _digest(model, preset)
            print(f"{model} {preset}: {rows[f'{model} {preset}']}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _digest(model: str, preset: str) -> str:
    learned = load_recipe(preset).quantize.method == "qalora"
    recipe = load_recipe(preset, [*SHORT, *(LEARNING if learned else [])])
    with tempfile.TemporaryDirectory() as folder:
        artifact = compress_by_name(f"zoo:{model}", recipe, Path(folder) / "artifact")
        files = {name: file.sha256 for name, file in artifact.manifest.files.items()}
        plan = [row.model_dump(mode="json") for row in artifact.manifest.plan]
    return hashlib.sha256(json.dumps([files, plan], sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
