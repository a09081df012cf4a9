"""Rows of measurements, written as they come, so that neither a failure nor the end of the time loses what there is."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from time import time
from typing import Any, NamedTuple

import torch
import triton
from machine import machine

Measure = Callable[[], dict[str, Any]]
DEADLINE = "DIFFPRESS_BENCH_DEADLINE"
"""Environment variable that hands the end of the time, in seconds since 1970, on to a process that takes over."""
LATE = "no time was left"


class Row(NamedTuple):
    """What a row is called, and what fills it in."""

    names: dict[str, str]
    measure: Measure


class BrokenGPUError(Exception):
    """The GPU answers this process no more."""


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Put a file in its place in one step, so that it is whole whenever it is looked at."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(_plain(content), indent=1) + "\n")
    unfinished.replace(path)


def run_rows(
    path: Path, head: Mapping[str, Any], rows: Iterable[Row], deadline: float, clock: Callable[[], float] = time
) -> list[dict[str, Any]]:
    """Fill in what `path` lacks, and write it after every row. Raises BrokenGPUError, with the row written, where it is."""
    done = json.loads(path.read_text())["rows"] if path.exists() else []
    known = [_names(row) for row in done]
    for row in rows:
        if tuple(row.names.values()) in known:
            continue
        found = _outcome(row.measure) if clock() < deadline else {"error": LATE}
        done.append({**row.names, **found})
        write(path, {**head, "rows": done})
        print(*row.names.values(), _summary(found), sep=", ", file=sys.stderr, flush=True)
        _look_after_gpu()
    return done


def together(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> list[Row]:
    """One row for all of a `key`, which is measured by measuring them; what it finds is left out."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [Row({**group[0].names, "shape": "all"}, partial(_each, group)) for group in groups.values()]


def _each(rows: Iterable[Row]) -> dict[str, Any]:
    for row in rows:
        _outcome(row.measure)
    return {}


NAMES = ("op", "model", "shape", "form", "dtype", "tile")
"""Keys that say which row it is."""


def _names(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in row if name in NAMES)


def _outcome(measure: Measure) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # whatever a library may raise is a result here
        return {"error": in_a_line(error)}


def in_a_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _summary(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if not isinstance(value, dict))


def _look_after_gpu() -> None:
    """An access outside of memory is told by every later call as well. Memory is given back to the other workers."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        raise BrokenGPUError(in_a_line(error)) from error


def _plain(value: Any) -> Any:
    """As JSON has it: four digits of a float are more than what is measured, and one that is not finite is a word."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if isfinite(value) else str(value)
    return value


def main(
    title: str,
    name: str,
    rows: Callable[[int], Iterable[Row]],
    passed: Callable[[dict[str, Any]], bool],
    rehearsal: Callable[[int], Iterable[Row]] | None = None,
) -> int:
    """Run a file of rows, made from a seed; 1 where a row did not pass.

    Several workers share the rows, most of whose time goes into compiling. Rows that are timed have the GPU to themselves:
    theirs are rehearsed by the workers, so that all they need has been compiled.
    After a fault that a process cannot get over, another one goes on with the next row.
    """
    arguments = _arguments(title)
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here")
    path = arguments.folder / name
    if DEADLINE not in os.environ:
        os.environ[DEADLINE] = str(time() + arguments.seconds)
        path.unlink(missing_ok=True)
    deadline, chosen = float(os.environ[DEADLINE]), list(rows(arguments.seed))
    if arguments.share:
        worker, workers = map(int, arguments.share.split("/"))
        path = path.with_suffix(f".{worker}.json")
        chosen = list((rehearsal or rows)(arguments.seed))[worker::workers]
    elif arguments.workers > 1:
        done = _by_workers(arguments, path, time() + (deadline - time()) / 2 if rehearsal else deadline)
        if rehearsal is None:
            order = [tuple(row.names.values()) for row in chosen]
            done.sort(key=lambda row: order.index(_names(row)))
            write(path, {**found_machine(), "seed": arguments.seed, "rows": done})
    try:
        with torch.no_grad():
            head = {**found_machine(), "seed": arguments.seed}
            done = run_rows(path, head, chosen, deadline)
    except BrokenGPUError as error:
        print(f"{error}: going on in another process", file=sys.stderr, flush=True)
        again = ["--workers", "1", "--seed", str(arguments.seed)]
        os.execv(sys.executable, [sys.executable, *sys.argv, *again])
    return int(not all(passed(row) for row in done))


def _arguments(title: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=600, help="after which no row is begun")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)), help="left out: a new one")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that compile side by side (default: %(default)s)"
    )
    parser.add_argument("--share", help=argparse.SUPPRESS)
    return parser.parse_args()


def _by_workers(arguments: argparse.Namespace, path: Path, deadline: float) -> list[dict[str, Any]]:
    """The rows that as many processes have done, each of them its share."""
    environment = {**os.environ, DEADLINE: str(deadline)}
    command = [sys.executable, *sys.argv, "--seed", str(arguments.seed)]
    shares = [f"{worker}/{arguments.workers}" for worker in range(arguments.workers)]
    files = [path.with_suffix(f".{worker}.json") for worker in range(arguments.workers)]
    for file in files:
        file.unlink(missing_ok=True)
    workers = [subprocess.Popen([*command, "--share", share], env=environment) for share in shares]
    for worker in workers:
        worker.wait()
    done = [row for file in files if file.exists() for row in json.loads(file.read_text())["rows"]]
    for file in files:
        file.unlink(missing_ok=True)
    return done


def found_machine() -> dict[str, Any]:
    """The machine, its GPU and Triton."""
    try:
        found: dict[str, Any] = {**machine()}
    except FileNotFoundError:  # a machine without git
        found = {"torch": torch.__version__}
    gpu = {}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    return {"machine": {**found, **gpu, "cuda": torch.version.cuda, "triton": triton.__version__}}
