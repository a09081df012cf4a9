"""An export folder to a bundle."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..errors import ArtifactError, OutputError, UserError
from ..manifest import list_files
from ..outputs import check_output_file, check_space
from ..portable.manifest import ExportManifest, check_files, read_export
from ..publishing import replacing
from .manifest import (
    BUNDLE,
    GRAPHS,
    LIBRARY,
    LICENSES,
    PICTURE,
    README,
    RUNNER,
    SOURCES,
    TABLES,
    BundleManifest,
    Target,
    here,
    write_bundle_manifest,
)
from .readme import readme
from .runner import extract_sources, runner_for, runtime_library
from .tokenizer import tokenizer_tables

LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Of every member, so that the same export gives the same bytes."""
EXECUTABLE, PLAIN = 0o100755, 0o100644
PEAK = "peak memory in bytes: "
"""What the runner says before the number."""


def package(export: Path, target: Target, out: Path) -> BundleManifest:
    """Write the bundle of an export for a target to the zip `out`; returns what it says of itself.

    Where the target is this machine, the runner makes the self test's image first, by which its memory is measured. Raises
    UserError, and then leaves `out` as it was.
    """
    if out.suffix.lower() != ".zip":
        raise OutputError(f"--out {out} must end in .zip.")
    manifest = read_export(export)
    if manifest.form == "int8 folded":
        raise UserError(
            f"{export} is in a form for TensorRT, which onnxruntime is slow in. Package one that `diffpress export --to onnx` "
            "wrote."
        )
    check_output_file(out, [export])
    check_files(export, manifest)
    check_space(out, 2 * sum(file.size_bytes for file in manifest.files.values()))
    with TemporaryDirectory(prefix="diffpress-package-") as folder:
        staged = Path(folder) / "bundle"
        staged.mkdir()
        bundle = _stage(export, manifest, target, staged)
        with replacing(out) as file:
            _zip(staged, file)
    return bundle


def _stage(export: Path, manifest: ExportManifest, target: Target, folder: Path) -> BundleManifest:
    """Everything of the bundle in a folder, as it is unzipped."""
    runner = runner_for(target, folder)
    if runner is None:
        extract_sources(folder / SOURCES)
    elif runner.parent != folder:
        shutil.copyfile(runner, folder / RUNNER)
    shutil.copytree(export, folder / GRAPHS)
    if manifest.tokens is not None:
        (folder / TABLES).write_bytes(tokenizer_tables(export / manifest.tokens.file, manifest.tokens))
    _write_licenses(folder)
    library = runtime_library()
    if target is here() and library is not None:
        _copy_library(library[0], library[1], folder)
    _write_picture(export / manifest.self_test.image, folder / PICTURE)
    words = readme(manifest, target, (folder / RUNNER).is_file(), (folder / LIBRARY).is_file())
    (folder / README).write_text(words, encoding="utf-8")
    bundle = BundleManifest(
        target=target,
        versions={name: importlib.metadata.version(name) for name in ("diffpress", "onnxruntime")},
        tokenizer=TABLES if manifest.tokens is not None else None,
        peak_memory_bytes=None,
        measured_on=None,
        files=list_files(folder, (BUNDLE,)),
    )
    if (folder / RUNNER).is_file() and (folder / LIBRARY).is_file():
        write_bundle_manifest(folder, bundle)
        bundle = bundle.model_copy(update=_measured(folder))
    write_bundle_manifest(folder, bundle)
    return bundle


def _copy_library(library: Path, package: Path, folder: Path) -> None:
    (folder / LIBRARY).parent.mkdir()
    shutil.copyfile(library, folder / LIBRARY)
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        if (package / name).is_file():
            shutil.copyfile(package / name, folder / LICENSES / f"onnxruntime-{name}")


def _write_licenses(folder: Path) -> None:
    """Those of the runner's sources."""
    (folder / LICENSES).mkdir()
    with TemporaryDirectory() as work:
        extract_sources(Path(work))
        for file in sorted(Path(work).glob("third_party/*/LICENSE")):
            shutil.copyfile(file, folder / LICENSES / f"{file.parent.name}-LICENSE")


def _write_picture(array: Path, file: Path) -> None:
    from PIL import Image

    levels = (np.load(array, allow_pickle=False) * 255).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(file)


def _measured(folder: Path) -> dict[str, Any]:
    """Most memory of the runner while it makes the self test's image. Raises ArtifactError where it makes another."""
    (folder / RUNNER).chmod(0o755)
    done = subprocess.run([str(folder / RUNNER), "--selftest"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ArtifactError(
            f"the runner does not give the self test's image: {done.stderr.strip()} Nothing was written."
        )
    peak = int(done.stdout.partition(PEAK)[2])
    return {"peak_memory_bytes": peak, "measured_on": f"{platform.machine()}, {os.cpu_count()} processors"}


def _zip(folder: Path, out: Path) -> None:
    """Sorted, with one date, programs executable; weights are stored as they are, for they hardly pack."""
    with zipfile.ZipFile(out, "w") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            member = zipfile.ZipInfo(name, LONG_AGO)
            member.external_attr = (EXECUTABLE if name in (RUNNER, LIBRARY) else PLAIN) << 16
            member.compress_type = zipfile.ZIP_STORED if file.suffix == ".data" else zipfile.ZIP_DEFLATED
            with file.open("rb") as source, archive.open(member, "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed, 2**20)
