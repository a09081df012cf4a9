"""What the peers' rows of the benchmark share; no peer is installed here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffpress.calibration.conditions import Condition
from diffpress.calibration.sampling import Sampling, denoiser_of

PEERS = Path(__file__).parents[2] / "bench" / "peers"
TEXTS = {"tiny_text": "red apple", "tiny_class": "1", "tiny_pixels": ""}


@pytest.fixture(scope="module")
def peers():
    """Imports a module of the folder, which is none of ours to install."""
    path = sys.path.copy()
    sys.path.insert(0, str(PEERS))
    yield import_module
    sys.path[:] = path


@pytest.fixture(params=TEXTS)
def asked(request: pytest.FixtureRequest, peers, tmp_path: Path):
    """A pipeline, and a request as the benchmark writes it: three images, two at a time."""
    wanted = [[TEXTS[request.param], seed] for seed in range(3)]
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"steps": 2, "guidance_scale": 3.0, "record": wanted, "compare": wanted, "batch": 2}))
    folder = request.getfixturevalue(request.param)
    return peers("run").load(folder), peers("task").read_request(path)


def test_request_is_read_as_conditions(asked):
    _, request = asked
    assert request.sampling == Sampling(2, 3.0)
    assert request.record[1] == Condition(request.record[0].text, 1)


def test_recorded_inputs_replay_every_call_of_every_batch(peers, asked):
    pipeline, request = asked
    calls = peers("task").record_inputs(pipeline, request)
    assert len(calls) == 2 * request.sampling.steps
    with torch.no_grad():
        assert denoiser_of(pipeline)(**calls[0]).sample.shape[0] in (2, 4)


def test_stand_in_draws_what_the_denoiser_draws(peers, asked):
    pipeline, request = asked
    expected = peers("task").draw(pipeline, request.compare, request)
    denoiser = denoiser_of(pipeline)

    def run(inputs):
        return denoiser(**{name: torch.from_numpy(value) for name, value in inputs.items()}).sample.numpy()

    peers("run").replace_denoiser_(pipeline, peers("graph").StandIn(denoiser, run))
    found = peers("task").draw(pipeline, request.compare, request)
    assert denoiser_of(pipeline) is not denoiser
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.latents, expected.latents)


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux writes of a process")
def test_peak_counts_from_its_reset(peers):
    memory = peers("rss")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.peak_rss_bytes() >= block.numel()
    high = memory.rss_bytes()
    del block
    memory.reset_peak()
    assert memory.peak_rss_bytes() < high


@pytest.mark.long
def test_environment_sees_our_packages_behind_its_own(peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment = peers("environment")
    monkeypatch.setitem(environment.PEERS, "none", environment.Peer(pins=("pip",), bits=()))
    python = environment.python_for("none", tmp_path)
    done = subprocess.run(
        [python, "-c", "import pip, torch; print(pip.__file__)"], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    before = (tmp_path / "none" / environment.READY).stat().st_mtime_ns
    assert environment.python_for("none", tmp_path) == python
    assert (tmp_path / "none" / environment.READY).stat().st_mtime_ns == before


def test_other_torch_is_refused(peers, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 1.0.0+cpu\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"somebody: its environment has torch 1\.0\.0"):
        peers("environment")._check_torch(python, "somebody")


def test_failure_ends_with_its_reason(peers, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    missing = tmp_path / "request.json"
    arguments = ["--model", str(tmp_path), "--bits", "W8A8", "--request", str(missing), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["run.py", "torchao", *arguments])
    with pytest.raises(SystemExit, match=r"^FileNotFoundError: .*request\.json"):
        peers("run").main()


def test_loaded_pipeline_is_in_single_precision(peers, tiny_class: Path):
    pipeline: DiffusionPipeline = peers("run").load(tiny_class)
    assert next(denoiser_of(pipeline).parameters()).dtype == torch.float32
