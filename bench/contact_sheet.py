"""`zoo:emoji` and artifacts of it, same prompts and noise, a row each: `python bench/contact_sheet.py OUT.png ARTIFACT ...`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, sample
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.models import resolve
from diffpress.writing import to_picture

PROMPTS = (
    "slice of pizza",
    "red apple",
    "grinning face with smiling eyes",
    "cat face",
    "sunflower",
    "rocket",
    "birthday cake",
    "tropical fish",
    "hot air balloon",
    "full moon with face",
    "teddy bear",
    "evergreen tree",
)
SCALE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--guidance", type=float, default=3.0)
    arguments = parser.parse_args()
    wanted = [Condition(prompt, index) for index, prompt in enumerate(PROMPTS)]
    rows = []
    for folder in (resolve("zoo:emoji"), *(PipelineFolder(path, str(path)) for path in arguments.artifacts)):
        images = sample(load_pipeline(folder), wanted, Sampling(25, arguments.guidance)).images
        rows.append(torch.cat(list(images), dim=2))
    sheet = to_picture(torch.cat(rows, dim=1).permute(1, 2, 0).numpy())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * SCALE, sheet.height * SCALE), 0).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
