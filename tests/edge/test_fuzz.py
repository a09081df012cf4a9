"""The runner's readers under sanitizers, given what was never packaged."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "edge" / "fuzz"
READERS = [
    FUZZ / "readers.cpp",
    *(FUZZ.parent / f"{name}.cpp" for name in ("image_files", "manifest", "tokenizer", "utf8")),
]
CORPUS = sorted((FUZZ / "corpus").iterdir())
ROUNDS, SECONDS = 10_000, 20


def built(folder: Path, compiler: str, *more: object) -> Path:
    command = [compiler, "-std=c++17", "-g", "-O1", "-fno-sanitize-recover=all", *more, *READERS, "-o", folder / "fuzz"]
    subprocess.run([str(word) for word in command], check=True)
    return folder / "fuzz"


def passes(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_mutations_of_the_corpus_are_read_or_refused(tmp_path):
    driver = built(tmp_path, "g++", "-fsanitize=address,undefined", FUZZ / "driver.cpp")
    assert f"{len(CORPUS)} files, {ROUNDS} mutations of each" in passes(driver, ROUNDS, 0, *CORPUS)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++, whose libFuzzer looks for new paths")
def test_libfuzzer_finds_nothing(tmp_path):
    fuzzer = built(tmp_path, "clang++", "-fsanitize=fuzzer,address,undefined")
    found = tmp_path / "found"
    found.mkdir()
    passes(fuzzer, f"-max_total_time={SECONDS}", found, FUZZ / "corpus")
