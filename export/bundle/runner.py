"""The C++ runner: what the installation built, and its sources for what it did not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import UserError
from ..extras import import_extra
from .manifest import RUNNER, Target, here

ARCHIVE = "edge.zip"
"""The runner's sources, as the installation left them."""
BUILD = "g++ -std=c++17 -O2 source/*.cpp -o diffpress-run -ldl"
"""How a target builds the runner from the bundle's own folder."""
CROSS_COMPILER = "aarch64-linux-gnu-g++"
LINKED = ("-static-libstdc++", "-static-libgcc", "-ldl")


def runner_for(target: Target, folder: Path) -> Path | None:
    """The runner of a target: the one of the installation, or cross-built in `folder`; None where the target builds it.

    Raises UserError where none can be had.
    """
    if target is here():
        return _installed(RUNNER)
    if target is Target.JETSON_ORIN:
        return None
    if target is not Target.LINUX_ARM64 or shutil.which(CROSS_COMPILER) is None:
        compiler = f": no {CROSS_COMPILER} is installed (apt-get install g++-aarch64-linux-gnu)"
        raise UserError(
            f"--target {target.value} cannot be built here{compiler if target is Target.LINUX_ARM64 else ''}. Package on a "
            "machine of that kind."
        )
    return cross_built(folder)


def cross_built(folder: Path, compiler: str = CROSS_COMPILER) -> Path:
    """The runner by another compiler. Raises UserError with its words where it fails."""
    with TemporaryDirectory() as work:
        sources = Path(work)
        extract_sources(sources)
        files = sorted(str(file) for file in sources.glob("*.cpp"))
        built = folder / RUNNER
        command = [compiler, "-std=c++17", "-O2", "-s", *files, "-o", str(built), *LINKED]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{compiler} could not build the runner: {done.stderr.strip()[:400]}")
    return built


def extract_sources(folder: Path) -> None:
    """Put the runner's sources there."""
    with zipfile.ZipFile(_installed(ARCHIVE)) as archive:
        archive.extractall(folder)


def runtime_library() -> tuple[Path, Path] | None:
    """onnxruntime's shared library of this machine and the folder of its licences, or None where the wheel has none."""
    package = Path(import_extra("onnxruntime").__file__).parent
    found = sorted(file for file in package.glob("capi/libonnxruntime.so*") if not file.is_symlink())
    return (found[0], package) if found else None


def _installed(name: str) -> Path:
    """A file that the build made; an editable install keeps those apart from the sources."""
    folders = map(Path, sys.modules[__name__.rpartition(".")[0]].__path__)
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise UserError(
            "the C++ runner was not built when diffpress was installed, for which a C++ compiler is needed. Install one "
            "(apt-get install g++) and install diffpress again."
        )
    return found
