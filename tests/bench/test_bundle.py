"""The script that holds the runner beside Python's run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffpress.export.bundle.manifest import here
from diffpress.export.bundle.runner import runner_for
from diffpress.export.errors import UserError
from diffpress.export.folder import PipelineFolder
from diffpress.export.onnx.export import export_onnx

SCRIPT = Path(__file__).parents[2] / "bench" / "bundle.py"


@pytest.mark.long
def test_images_are_the_same_and_an_empty_root_is_enough(one_block_text, tmp_path):
    try:
        runner_for(here(), tmp_path)
    except UserError as error:
        pytest.skip(str(error))
    export_onnx(PipelineFolder(one_block_text, "tiny"), tmp_path / "tiny", steps=4, guidance_scale=3.0)
    command = [sys.executable, SCRIPT, tmp_path / "tiny", "--repeats", "1", "--json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["psnr_db"] >= 60
    assert row["memory_ratio"] < 1
    assert row["empty_root"].startswith(("same image", "not tried"))
