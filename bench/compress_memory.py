"""Peak memory of a whole `compress` over that of running, of a pipeline that is stored in half precision.

Both are resident memory of processes of their own, less what the libraries take when nothing is loaded yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

IMPORTS = "import diffpress.flow, diffpress.running, diffpress.compress.ptq"
RUN = """from diffpress.models import resolve
from diffpress.running import Wanted, run_torch
run_torch(resolve({model!r}), Wanted({text!r}, None, 0, {steps}, None))"""
COMPRESS = "import diffpress; diffpress.compress({model!r}, {recipe!r}, {out!r})"
PEAK = """
import re; from pathlib import Path
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
"""


def peak_bytes(program: str) -> int:
    """Most memory that a process of its own held while it ran `program`."""
    source = f"{IMPORTS}\n{program}\n{PEAK}"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:emoji", help="a pipeline that is stored in half precision")
    parser.add_argument("--text", default="slice of pizza", help="a prompt or label that it takes")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    libraries = peak_bytes("")
    running = peak_bytes(RUN.format(model=arguments.model, text=arguments.text, steps=arguments.steps)) - libraries
    rows = {}
    for batch in (1, 4):
        recipe = {
            "sampling": {"steps": arguments.steps},
            "record": {"trajectories": arguments.trajectories, "batch": batch},
            "quantize": {"method": "ptq"},
        }
        with tempfile.TemporaryDirectory() as folder:
            program = COMPRESS.format(model=arguments.model, recipe=recipe, out=str(Path(folder) / "out"))
            peak = peak_bytes(program) - libraries
        rows[f"compress, {batch} images at a time"] = {"peak_bytes": peak, "over_running": peak / running}
        print(
            f"batch {batch}: {peak / 1e6:.0f} MB, {peak / running:.2f} of running ({running / 1e6:.0f} MB)", flush=True
        )
    found = {"machine": machine(), "model": arguments.model, "running_bytes": running, "rows": rows}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
