"""Every script runs as README asks: from any folder, with neither that folder nor its own on the path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted(str(path) for path in BENCH.rglob("*.py") if "__main__" in path.read_text())
ASK = """
import contextlib, io, json, runpy, sys

def status(script):
    sys.argv, path, known = [script, "--help"], sys.path.copy(), set(sys.modules)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as help:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return "answers" if not end.code and "--help" in help.getvalue() else f"ends with {end.code}"
    except Exception as error:
        return repr(error)
    finally:
        # Imported once are the libraries, anew what lies beside the script.
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if BENCH in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    return "ran"

BENCH = sys.argv[1]
print(json.dumps({script: status(script) for script in sys.argv[2:]}))
"""


def test_every_script_answers_without_its_folder_on_the_path(tmp_path: Path) -> None:
    """One after the other in one process, as most of the time goes by in importing libraries."""
    assert len(SCRIPTS) > 12
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-c", ASK, str(BENCH), *SCRIPTS]
    environment["PYTHONSAFEPATH"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(SCRIPTS, "answers")
