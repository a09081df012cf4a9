"""`bundle.json`: what a bundle holds, for which target, and what it needs."""

from __future__ import annotations

import json
import platform
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ..digests import File

BUNDLE = "bundle.json"
SCHEMA = 1
ANEW = "package the export anew"
GRAPHS, LICENSES, SOURCES = "export", "licenses", "source"
"""Folders of a bundle: the export, who owns what, and, where there is no built runner, what it is built from."""
RUNNER, LIBRARY, TABLES, PICTURE, README = (
    "diffpress-run",
    "lib/libonnxruntime.so",
    "tokenizer.bin",
    "selftest.png",
    "README.txt",
)


class Target(str, Enum):  # noqa: UP042  # typer shows the value of a str Enum
    """What a bundle can be made for."""

    LINUX_X64 = "linux-x64"
    LINUX_ARM64 = "linux-arm64"
    JETSON_ORIN = "jetson-orin"


MACHINES = {"x86_64": Target.LINUX_X64, "aarch64": Target.LINUX_ARM64}
WHEELS = {
    Target.LINUX_X64: "manylinux_2_28_x86_64",
    Target.LINUX_ARM64: "manylinux_2_28_aarch64",
    Target.JETSON_ORIN: "manylinux_2_28_aarch64",
}
"""The platform whose wheel of onnxruntime has the library of a target."""


class BundleManifest(BaseModel):
    """Everything a bundle says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA
    target: Target
    versions: dict[str, str]
    folder: str = GRAPHS
    """Of the export."""
    library: str = LIBRARY
    """Where onnxruntime lies, or has to be put."""
    tokenizer: str | None
    """Tables that the runner reads in the place of `tokenizer.json`."""
    peak_memory_bytes: int | None
    """Measured while the runner made the self test's image; None where it did not run here."""
    measured_on: str | None
    files: dict[str, File]


def here() -> Target | None:
    """The target that this machine is."""
    return MACHINES.get(platform.machine()) if platform.system() == "Linux" else None


def write_bundle_manifest(folder: Path, manifest: BundleManifest) -> None:
    """Write `bundle.json`, keys sorted."""
    text = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1)
    (folder / BUNDLE).write_text(text + "\n", encoding="utf-8")
