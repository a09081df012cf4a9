"""Bundles for machines that are not this one: what is built for them, and what they build themselves."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpress.export.bundle.manifest import Target
from diffpress.export.bundle.runner import BUILD, cross_built, extract_sources
from diffpress.export.bundle.write import package
from diffpress.export.errors import UserError
from diffpress.export.portable.noise import torch_noise

EMULATOR = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
EDGE = Path(__file__).parents[3] / "edge"


@pytest.fixture(scope="module")
def for_arm(bundle: Path, prompt_export: Path, made_once: Callable[..., Path]) -> Path:
    """A bundle for linux-arm64, unzipped."""
    for tool in (EMULATOR[0], "aarch64-linux-gnu-g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}: apt-get install g++-aarch64-linux-gnu qemu-user")

    def make(folder: Path) -> None:
        package(prompt_export, Target.LINUX_ARM64, folder / "b.zip")
        shutil.unpack_archive(folder / "b.zip", folder / "b")
        (folder / "b" / "diffpress-run").chmod(0o755)

    return made_once("bundle-arm", make) / "b"


@pytest.mark.long
def test_the_runner_for_arm_reads_its_bundle(for_arm):
    """Up to the library, which is for others to put there."""
    command = [*EMULATOR, for_arm / "diffpress-run"]
    assert "--selftest" in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    done = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "onnxruntime cannot be opened" in done.stderr
    assert "pip download onnxruntime" in (for_arm / "README.txt").read_text()
    (for_arm / "tokenizer.bin").write_bytes(b"")
    done = subprocess.run([*command, "--selftest"], capture_output=True, text=True, check=False)
    assert "tokenizer.bin is not what was packaged" in done.stderr


@pytest.mark.long
def test_noise_on_arm_has_the_same_bits(for_arm, tmp_path):
    parts = [EDGE / "tests/probe.cpp", *(EDGE / f"{name}.cpp" for name in ("noise", "tokenizer", "utf8"))]
    flags = ["-std=c++17", "-O2"]
    subprocess.run(["aarch64-linux-gnu-g++", *flags, *parts, "-o", tmp_path / "probe"], check=True)
    found = subprocess.run(
        [*EMULATOR, tmp_path / "probe", "noise", "10003", "7"], capture_output=True, check=True
    ).stdout
    assert found == torch_noise((10_003,), 7).tobytes()


@pytest.mark.long
def test_the_line_for_a_jetson_builds_the_runner(bundle, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    extract_sources(tmp_path / "source")
    subprocess.run(BUILD, shell=True, check=True, cwd=tmp_path)
    done = subprocess.run([tmp_path / "diffpress-run", "--help"], capture_output=True, text=True, check=True)
    assert "--selftest" in done.stdout


def test_a_compiler_that_fails_is_told_of(bundle, tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(UserError, match="could not build the runner: no such instruction"):
        cross_built(tmp_path, str(compiler))


def test_without_a_cross_compiler_says_what_to_install(bundle, prompt_export, tmp_path, monkeypatch):
    monkeypatch.setattr("diffpress.export.bundle.runner.here", lambda: Target.LINUX_X64)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UserError, match="apt-get install g\\+\\+-aarch64-linux-gnu"):
        package(prompt_export, Target.LINUX_ARM64, tmp_path / "b.zip")
    assert list(tmp_path.iterdir()) == []
