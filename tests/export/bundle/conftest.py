"""A bundle of a tiny random pipeline, as it is packed and as it is unzipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from diffpress.export.bundle.manifest import here
from diffpress.export.bundle.runner import runner_for
from diffpress.export.bundle.write import package
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx

STEPS, GUIDANCE = 6, 3.0


def need_runner(folder: Path) -> None:
    """Skip where no runner was built."""
    target = here()
    if target is None:
        pytest.skip("needs Linux on x86 or aarch64")
    try:
        runner_for(target, folder)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def prompt_export(one_block_text: Path, made_once: Callable[..., Path]) -> Path:
    # Under the name of the exporter's tests, which make the same one.
    def make(folder: Path) -> None:
        export_onnx(PipelineFolder(one_block_text, "prompt"), folder / "export", steps=STEPS, guidance_scale=GUIDANCE)

    return made_once("export-prompt", make) / "export"


@pytest.fixture(scope="session")
def bundle(prompt_export: Path, made_once: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip."""
    need_runner(tmp_path_factory.mktemp("runner"))
    return made_once("bundle-prompt", lambda folder: package(prompt_export, here(), folder / "b.zip")) / "b.zip"


@pytest.fixture(scope="session")
def unzipped_once(bundle: Path, made_once: Callable[..., Path]) -> Path:
    """A folder that a bundle was unzipped to, to be left as it is."""
    return made_once("unzipped-prompt", lambda folder: unzip(bundle, folder))


@pytest.fixture
def unzipped(unzipped_once: Path, tmp_path: Path) -> Path:
    """The same to be spoilt: its files are links, so one is changed by putting another in its place."""
    return shutil.copytree(unzipped_once, tmp_path / "unzipped", copy_function=os.link)


def unzip(bundle: Path, folder: Path) -> None:
    """As `unzip` does: with the mode that the zip says."""
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
        for member in archive.infolist():
            (folder / member.filename).chmod(member.external_attr >> 16 & 0o777)


class Done(NamedTuple):
    status: int
    output: str
    errors: str


@pytest.fixture(scope="session")
def run_alone() -> Callable[..., Done]:
    """A function: the runner of an unzipped bundle with these arguments, nothing in its environment."""

    def run(folder: Path, *arguments: object) -> Done:
        command = [str(word) for word in (folder / "diffpress-run", "--threads", 1, *arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""}, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return run
