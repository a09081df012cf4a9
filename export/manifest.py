"""`diffpress.json`: what was done to a pipeline, and the digest of every file that came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .digests import File, compare_files, digest, inside, read_manifest_file
from .edits import Edit
from .errors import ArtifactError
from .runtime import LayerUse

MANIFEST = "diffpress.json"
REPORT = "report.html"
"""Holds timings, so it differs from run to run and is not under the digests."""
SCHEMA = 7
"""2 has edits of attention, and what became of it in the plan; 3 calls them `quantize_attention`; 4 may store scales of
weights in float16; 5 has layers of two factors; 6 says what packed layers were given;
7 has the time steps of several denoisers. All else is as it was."""
ANEW = "compress anew"


class PlanRow(BaseModel):
    """What became of one weighted module, of the attention that one computes, of units that can be removed together, or of a
    part that was added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    module: str
    """Of units, the innermost module that they are in, and their kind behind a comma."""
    shape: tuple[int, ...]
    """Of a weight in the source; of attention, heads and the columns of each; of units, how many are kept, and of how many."""
    format: str
    """Such as `W4A8`, or the dtype it was left in; of attention `attention Q·K int8`, `attention int8` or `attention float`;
    of units `heads`, `neurons` or `channels`."""
    source_bytes: int
    bytes: int
    reason: str = ""
    """Why it was left alone or given more bits than asked, and what is left of its weight; of units, those that are gone, such
    as `1, 4-7 removed`.
    """
    error: float | None = None
    """Relative squared error of the denoiser's output when only this is quantized."""


class Manifest(BaseModel):
    """Everything an artifact says of itself."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    fingerprint: str
    """Digest of source, recipe, seed and versions: the same request gives the same fingerprint."""
    versions: dict[str, str]
    recipe: dict[str, Any]
    source: dict[str, Any]
    timesteps: list[float]
    """Of the denoiser; of several, those of each after another, as far as a scheduler is given what they answer."""
    parts: dict[str, list[float]] = {}
    """The time steps of every denoiser by its name, where there are several."""
    edits: list[Edit]
    plan: list[PlanRow]
    learning: list[dict[str, float]] = []
    """How learning went: `iteration`, `loss` and `evaluation` at every evaluation; and what was tried, the best first: the
    `speedup` and `psnr_db` of each plan of steps. Empty where nothing was learned or tried."""
    layers: dict[str, LayerUse] = {}
    """What each packed layer, named `COMPONENT.MODULE`, was given while one image was made; empty before schema 6."""
    metrics: dict[str, Any]
    files: dict[str, File]


def timesteps_of(manifest: Manifest, component: str) -> list[float]:
    """The time steps that one component was made for."""
    return manifest.parts.get(component, manifest.timesteps)


def list_files(folder: Path, apart: Sequence[str] = (MANIFEST, REPORT)) -> dict[str, File]:
    """Size and digest of every file of `folder` but those named `apart`, such as the manifest itself."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    names = {file.relative_to(folder).as_posix(): file for file in found}
    return {
        name: File(size_bytes=file.stat().st_size, sha256=digest(file))
        for name, file in names.items()
        if name not in apart
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `diffpress.json`, keys sorted."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read `diffpress.json`. Raises ArtifactError where it is missing, damaged, newer than we know, or leaves its folder."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no artifact of diffpress: it has no {MANIFEST}.")
    inside(folder, MANIFEST)
    manifest = read_manifest_file(path, Manifest, SCHEMA, ANEW)
    for name in manifest.files:
        inside(folder, name)
    return manifest


def check_files(folder: Path, files: dict[str, File]) -> list[str]:
    """Compare every file with its digest; gives what lies beside them. Raises ArtifactError naming the first that differs or is
    missing.
    """
    return compare_files(folder, files, (MANIFEST, REPORT), ANEW)
