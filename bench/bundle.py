"""The runner of a bundle beside `diffpress run` of its export: `python bench/bundle.py EXPORT ... --json`.

Images, times and memory of both with as many threads, each in a process of its own, and the runner once more in a root that
holds the unzipped bundle and the C libraries alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from diffpress.export.bundle.manifest import LIBRARY, RUNNER, here
from diffpress.export.bundle.write import package
from diffpress.export.portable.manifest import ExportManifest, read_export

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

PROMPTS = ("slice of pizza", "red apple", "It's a CAFÉ's birthday cake, 3 of 'em!")
LARGEST_DB = 120.0
"""Said of images that are equal."""
PROGRAMS = f"{os.defpath}:/usr/sbin:/sbin"
PYTHON = """
import json, sys
from time import perf_counter
from pathlib import Path
from diffpress.export.engines.onnxruntime import ONNXRUNTIME
from diffpress.export.portable.pipeline import PortablePipeline
import numpy as np
from PIL import Image

export, threads, repeats, out, *conditions = sys.argv[1:]
pipeline = PortablePipeline(export, ONNXRUNTIME, int(threads))
for seed, condition in enumerate(conditions):
    levels = (pipeline.generate(condition, seed) * 255).round().astype(np.uint8)
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(Path(out) / f"python-{seed}.png")
times = []
for _ in range(int(repeats)):
    begun = perf_counter()
    pipeline.generate(conditions[0], 0)
    times.append(perf_counter() - begun)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = 1024 * int(status["VmHWM"].split()[0])
print(json.dumps({"image_ms": 1e3 * min(times), "peak_memory_bytes": peak, "torch": "torch" in sys.modules}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", nargs="+", type=Path, help="folders that `diffpress export --to onnx` wrote")
    parser.add_argument("--repeats", type=int, default=5, help="timed images, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(export, arguments.threads, arguments.repeats) for export in arguments.exports]
    found = {
        "machine": {**machine(), "onnxruntime": onnxruntime.__version__, "threads": arguments.threads},
        "rows": rows,
    }
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(map(words, rows)))


def measure(export: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Everything of one export."""
    manifest, target = read_export(export), here()
    assert target is not None, "bundles run on Linux alone"
    with TemporaryDirectory() as work:
        folder, images = Path(work) / "bundle", Path(work) / "images"
        images.mkdir()
        begun = perf_counter()
        packed = package(export, target, Path(work) / "bundle.zip")
        package_s = perf_counter() - begun
        unzip(Path(work) / "bundle.zip", folder)
        conditions = conditions_of(manifest)
        python = in_python(export, threads, repeats, images, conditions)
        walls = [in_runner(folder, manifest, threads, images, seed, own) for seed, own in enumerate(conditions)]
        command = [folder / RUNNER, "--bench", "--threads", threads, *asked(manifest, conditions[0])]
        benches = [json.loads(output_of(*command)) for _ in range(3)]
        images_of = [
            [pixels(images / f"{name}-{seed}.png") for name in ("python", "runner")] for seed in range(len(conditions))
        ]
        return {
            "export": export.name,
            "pipeline": manifest.pipeline,
            "format": manifest.format,
            "step_plan": manifest.step_plan is not None,
            "steps": manifest.steps,
            "images": len(conditions),
            "psnr_db": min(psnr(*pair) for pair in images_of),
            "levels_that_differ": int(sum((left != right).sum() for left, right in images_of)),
            "zip_bytes": (Path(work) / "bundle.zip").stat().st_size,
            "package_s": package_s,
            "start_ms": min(own["start_ms"] for own in benches),
            "start_processor_ms": min(own["start_processor_ms"] for own in benches),
            "runner_wall_ms": 1e3 * min(walls),
            "runner_image_ms": min(own["image_ms"] for own in benches),
            "runner_denoiser_ms": min(own["denoiser_ms"] for own in benches),
            "python_image_ms": python["image_ms"],
            "runner_peak_memory_bytes": packed.peak_memory_bytes,
            "python_imports_torch": python["torch"],
            "python_peak_memory_bytes": python["peak_memory_bytes"],
            "memory_ratio": (packed.peak_memory_bytes or 0) / python["peak_memory_bytes"],
            "empty_root": in_empty_root(folder, manifest, Path(work) / "root", conditions[0], images_of[0][1]),
        }


def unzip(bundle: Path, folder: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    (folder / RUNNER).chmod(0o755)


def conditions_of(manifest: ExportManifest) -> list[str]:
    if manifest.tokens is not None:
        return list(PROMPTS)
    return ["1", "7", "3"] if manifest.labels is not None else [""] * 3


def asked(manifest: ExportManifest, condition: str) -> list[str]:
    """How the runner is told a condition."""
    if manifest.tokens is not None:
        return ["--prompt", condition]
    return ["--label", condition] if manifest.labels is not None else []


def in_python(export: Path, threads: int, repeats: int, images: Path, conditions: list[str]) -> dict[str, float]:
    numbers = (str(threads), str(repeats))
    return json.loads(output_of(sys.executable, "-c", PYTHON, export, *numbers, images, *conditions))


def in_runner(folder: Path, manifest: ExportManifest, threads: int, images: Path, seed: int, condition: str) -> float:
    """Seconds from start to exit."""
    place = images / f"runner-{seed}.png"
    begun = perf_counter()
    output_of(folder / RUNNER, "--threads", threads, "--seed", seed, "--out", place, *asked(manifest, condition))
    return perf_counter() - begun


def output_of(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_empty_root(folder: Path, manifest: ExportManifest, root: Path, condition: str, expected: np.ndarray) -> str:
    """`same image` where the runner makes it in a root with nothing else, or why that could not be tried."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rmpf", "true"], capture_output=True).returncode != 0
    ):
        return "not tried: unshare is not allowed here"
    shutil.copytree(folder, root / "bundle")
    for file in (folder / RUNNER, folder / LIBRARY):
        for library in (Path(word) for word in output_of("ldd", file).split() if word.startswith("/")):
            place = root / library.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, place)
            place.chmod(0o755)
    (root / "proc").mkdir()
    # The library asks /proc where its files are. Nothing of the path is left inside.
    steps = 'mount -t proc proc "$0/proc" && chroot=$(command -v chroot) && PATH= exec "$chroot" "$0" "$@"'
    runner = [f"/bundle/{RUNNER}", "--threads", "1", "--out", "/image.png", *asked(manifest, condition)]
    command = ["unshare", "-rmpf", "sh", "-c", steps, str(root), *runner]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": PROGRAMS}, check=False)
    if done.returncode != 0:
        return f"failed: {done.stderr.strip()}"
    return "same image" if (pixels(root / "image.png") == expected).all() else "another image"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    """Of 8-bit images, in dB."""
    error = float(np.square((left.astype(float) - right) / 255).mean())
    return LARGEST_DB if error == 0 else float(-10 * np.log10(error))


def words(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


if __name__ == "__main__":
    main()
