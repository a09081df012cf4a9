"""How long forms of layers take on this machine, packed and in floats: measured once, and kept in the user's cache folder."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffpress.kernels.answering import machine_words

from ..errors import OutputError
from ..publishing import replacing
from .forms import LayerForm
from .memory import CPU

logger = logging.getLogger(__name__)

ROUNDS, SECONDS = 3, 0.2
"""Alternations that a form is timed in, at least, and how long: short layers need many, for others use the machine too."""


CALLS = 10
"""Of a layer on a GPU, that are timed together."""


class Times(NamedTuple):
    """Of one call of a layer."""

    packed_ms: float
    floats_ms: float


def layer_times(forms: Iterable[LayerForm], device: torch.device = CPU) -> dict[LayerForm, Times]:
    """The times of all `forms` on a device; what this machine has not timed before is timed now."""
    machine, file = machine_key(device), cache_file()
    known, wanted = _known(machine, file), set(forms)
    missing = sorted((form for form in wanted if form.key() not in known), key=LayerForm.key)
    if missing:
        logger.info("timing %d forms of layers, once on this machine", len(missing))
        known |= {form.key(): time_form(form, device) for form in missing}
        if file is not None:
            _keep(file, machine, known)
    return {form: known[form.key()] for form in wanted}


@torch.inference_mode(False)
@torch.no_grad()
def time_form(form: LayerForm, device: torch.device = CPU) -> Times:
    """The shorter of several times of either way, taken in alternation."""
    packed, x = form.layer().to(device), form.input().to(device)
    floats = copy.deepcopy(packed)
    floats.expand_(form.dtype)
    runs: tuple[Callable[[], object], ...] = (lambda: packed(x), lambda: floats(x))
    # What is made once, by the first call, is not timed.
    for run in runs:
        run()
    times: list[tuple[float, ...]] = []
    start = time.perf_counter()
    while len(times) < ROUNDS or time.perf_counter() - start < SECONDS:
        times.append(tuple(_milliseconds(run, device) for run in runs))
    return Times(*map(min, zip(*times, strict=True)))


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call. A GPU computes while the processor prepares the next, as in a model: it is waited for after several."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    wait = partial(torch.cuda.synchronize, device)
    wait()
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    wait()
    return 1e3 * (time.perf_counter() - start) / CALLS


def machine_key(device: torch.device = CPU) -> str:
    """All that times depend on beside the form."""
    parts = (machine_words(str(device)), torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}")
    return ", ".join((*parts, f"diffpress {version('diffpress')}"))


def cache_file() -> Path | None:
    """Where times are kept; None where the user has no folder for such things."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return folder / "diffpress" / "layer-times.json" if folder.is_absolute() else None


@cache
def _known(machine: str, file: Path | None) -> dict[str, Times]:
    """The times of one machine, read once a process and added to by what it measures."""
    return {} if file is None else _read(file).get(machine, {})


def _read(file: Path) -> dict[str, dict[str, Times]]:
    """By machine and form; nothing where there is no such file, or it is none of ours."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {machine: {form: _times(pair) for form, pair in own.items()} for machine, own in data.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.debug("%s is not used: %s", file, error)
        return {}


def _times(pair: Any) -> Times:
    times = Times(*map(float, pair))
    if not all(math.isfinite(value) and value > 0 for value in times):
        raise ValueError(f"{pair} are no times")
    return times


def _keep(file: Path, machine: str, known: Mapping[str, Times]) -> None:
    """Add to what is kept; where that cannot be written, the next process measures again."""
    kept = _read(file)
    kept[machine] = {**kept.get(machine, {}), **known}
    try:
        with replacing(file) as place:
            place.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except OutputError as error:
        logger.debug("times are not kept: %s", error)
