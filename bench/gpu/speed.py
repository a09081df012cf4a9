"""Medians of every operation beside what else one could call: `python bench/gpu/speed.py DIR`, a part of `gpu.sh`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from baselines import Baselines, baselines, memo_key
from correctness import implementation
from inputs import Source, arguments
from roofline import limit_seconds, peak_of, work_of
from rows import Row, in_a_line, main, together
from shapes import RAGGED, Spec, specs

Timer = Callable[[Callable[[], Any]], float]
"""Milliseconds of a call."""
Known = dict[tuple[Any, ...], dict[str, Any]]
"""Baselines that were measured already."""


def median_ms(call: Callable[[], Any]) -> float:
    """As `do_bench` takes it, with the cache emptied before every call."""
    return do_bench(call, warmup=10, rep=50, return_mode="median")


def host_us(call: Callable[[], Any], calls: int = 20) -> float:
    """What a call takes of the processor: a GPU that is done sooner waits for the next."""
    if not torch.cuda.is_available():
        return float("nan")
    call()
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(calls):
        call()
    took = perf_counter() - start
    torch.cuda.synchronize()
    return took / calls * 1e6


def measure(spec: Spec, seed: int, known: Known, timer: Timer = median_ms, device: str = "cuda") -> dict[str, Any]:
    """One row: our time, its share of the roofline, and every baseline as it is or with its error."""
    source = Source(seed, device, getattr(torch, spec.dtype))
    given = arguments(spec, source)
    call = partial(implementation(spec.op, device), **given)
    ours = timer(call) * 1e3
    found = {"us": ours, "host_us": host_us(call), **roofline(spec, ours, device)}
    return {**found, "baselines": compare(spec, ours, baselines(spec, given, source), known, timer)}


def roofline(spec: Spec, us: float, device: str) -> dict[str, Any]:
    """What had to be moved and computed, and how near to the limit of this GPU it came."""
    work = work_of(spec)
    found = {"bytes": work.bytes, "operations": sum(work.operations.values())}
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    limit = None if peak is None else limit_seconds(work, peak)
    return found if limit is None else {**found, "limit_us": limit * 1e6, "share_of_roofline": limit * 1e6 / us}


def compare(spec: Spec, ours: float, others: Baselines, known: Known, timer: Timer) -> dict[str, Any]:
    """`ratio` is our time by theirs, `speedup` theirs by ours."""
    found = {}
    for name, prepare in others.items():
        key = memo_key(spec, name)
        if key not in known:
            known[key] = _timed(prepare, timer)
        us = known[key].get("us")
        found[name] = known[key] if us is None else {**known[key], "ratio": ours / us, "speedup": us / ours}
    return found


def _timed(prepare: Callable[[], Callable[[], Any]], timer: Timer) -> dict[str, Any]:
    try:
        call = prepare()
        return {"us": timer(call) * 1e3, "host_us": host_us(call)}
    except Exception as error:  # whatever a library may raise is a result here
        return {"error": in_a_line(error)}


def rows(seed: int, timer: Timer = median_ms) -> Iterator[Row]:
    """All but ragged sizes, which are there to be right; cuDNN looks for its fastest convolution."""
    torch.backends.cudnn.benchmark = True
    known: Known = {}
    for spec in specs():
        if spec.model != RAGGED:
            yield Row(spec.names(), partial(measure, spec, seed, known, timer))


def rehearsal(seed: int) -> list[Row]:
    """All rows of one shape as one, so that no two workers compile the same baselines."""
    return together(rows(seed, once), lambda row: (row.names["shape"],))


def once(call: Callable[[], Any]) -> float:
    """Calls it so that what it needs is compiled; the time does not matter."""
    call()
    return float("nan")


if __name__ == "__main__":
    raise SystemExit(main(__doc__, "kernels.json", rows, lambda row: "us" in row, rehearsal))
