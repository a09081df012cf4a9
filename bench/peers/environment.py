"""A Python for each peer: what it needs beside the project's own packages, and never another torch."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
READY = "ready"
"""Names the pins that were installed; written last."""


@dataclass(frozen=True)
class Peer:
    """What to install, and which combinations of bits the peer offers."""

    pins: tuple[str, ...]
    bits: tuple[str, ...]

    def packages(self) -> list[str]:
        """Names of what is pinned."""
        return [pin.partition("==")[0] for pin in self.pins]


PEERS = {
    "onnxruntime": Peer(("onnxruntime==1.32.0",), ("W8A8", "W4A8", "w4")),
    "openvino": Peer(("nncf==3.4.0", "openvino==2026.4.1"), ("W8A8", "W4A8", "w4")),
    "torchao": Peer(("torchao==0.18.0",), ("W8A8", "W4A8", "W2A8", "w4")),
    "modelopt": Peer(("nvidia-modelopt==0.47.0",), ("W8A8", "W4A8", "W4A4", "W2A8", "w4")),
}

CACHES = {"deepcache": Peer(("DeepCache==0.1.1",), ()), "cache-dit": Peer(("cache-dit==1.5.3",), ())}
"""Peers that skip computation between steps; they quantize nothing."""


def python_for(peer: str, work: Path) -> Path:
    """The interpreter of a virtual environment under `work`, made where it is missing.

    It sees the packages of the environment that runs this. Raises RuntimeError where it cannot be made.
    """
    folder, pins = work / peer, (PEERS | CACHES)[peer].pins
    python = folder / "bin" / "python"
    ready = folder / READY
    if ready.is_file() and ready.read_text().split() == list(pins):
        return python
    venv.create(folder, clear=True, with_pip=True)
    _see_parent(folder)
    _run([python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *pins], peer)
    _check_torch(python, peer)
    ready.write_text("\n".join(pins))
    return python


def _see_parent(folder: Path) -> None:
    """Put the parent's packages behind the peer's own, with what its own path files add."""
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    parent = sysconfig.get_path("purelib")
    (own / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")


def _check_torch(python: Path, peer: str) -> None:
    wanted = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    found = _run([python, "-c", "import torch; print(torch.__version__)"], peer).partition("+")[0].strip()
    if f"torch=={found}" != wanted:
        raise RuntimeError(f"{peer}: its environment has torch {found}, the project has {wanted}.")


def _run(command: list[str | Path], peer: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-500:]
        raise RuntimeError(f"{peer}: {Path(command[0]).name} failed: {reason}")
    return done.stdout
