"""What a step of an image takes on this machine, and what of it each unit saves where it is inherited."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpress.calibration.sampling import Call, replay, sample, timestep_of
from diffpress.export.runtime import Inheritance, StepClock, StepPlan, Unit, find_timestep, time_of

from ..overlay import overlaid
from ..stage import Subject
from .units import Costs
from .unused import with_unused

ROUNDS, SECONDS = 7, 1.0
"""Alternations that calls are timed in, at least, and how long: others use the machine too, and the shortest times count."""


def kept_in_nanoseconds(file: Path, measure: Callable[[], Costs]) -> Costs:
    """What was measured before a run was killed, so that it goes on to the same plan."""
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        return Costs(tuple(known["units"]), known["total"], tuple(known["feature_bytes"]), known["itemsize"])
    costs = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vars(costs)), encoding="utf-8")
    return costs


@torch.no_grad()
def in_nanoseconds(subject: Subject, calls: Sequence[Call], units: Sequence[Unit], order: int, costs: Costs) -> Costs:
    """`costs` of a step as nanoseconds, with all that the pipeline does beside its denoiser.

    `calls` are the denoiser's for one image, at two steps. What all units save together is measured, and shared among them
    by what each takes.
    """
    ask = [partial(replay, subject.model, call) for call in calls[:2]]
    whole, inherited = _call_times(subject.model, ask, [timestep_of(call.inputs) for call in calls[:2]], units, order)
    calls_a_step, around = _step_times(subject)
    saved = calls_a_step * max(0, whole - inherited)
    # None saves nothing at all, however short it is.
    own = tuple(max(1, round(saved * share)) for share in _shares(subject.model, ask[0], units))
    return replace(costs, units=own, total=round(calls_a_step * whole + around))


def _call_times(
    model: nn.Module, ask: Sequence[Callable[[], Any]], timesteps: list[float], units: Sequence[Unit], order: int
) -> tuple[int, int]:
    """Of a call of the plain model, and of one that inherits all units."""
    cells = np.array([[True] * len(units), [False] * len(units)])
    plan = with_unused(StepPlan.of(units, cells, order=min(order, 1)), model, ask[1], timesteps)
    part = Inheritance(plan, StepClock(timesteps))
    whole: list[int] = []
    inherited: list[int] = []
    start = perf_counter_ns()
    while len(whole) < ROUNDS or perf_counter_ns() - start < 1e9 * SECONDS:
        whole.append(_nanoseconds(ask[0]))
        with overlaid(model, part.wraps(model), part.clock):
            ask[0]()
            inherited.append(_nanoseconds(ask[1]))
    return min(whole), min(inherited)


def _step_times(subject: Subject) -> tuple[float, float]:
    """Calls of the denoiser a step, and what a step takes beside them, in a whole run."""
    model, begun, taken, steps = subject.model, [0], [0], set()

    def begin(module: nn.Module, arguments: Any, options: Any) -> None:
        steps.add(float(time_of(torch.as_tensor(find_timestep(module, arguments, options)))))
        begun.append(perf_counter_ns())

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(lambda *_: taken.append(perf_counter_ns() - begun[-1])),
    ]
    try:
        whole = _nanoseconds(partial(sample, subject.pipeline, subject.conditions(1), subject.sampling))
    finally:
        for handle in handles:
            handle.remove()
    return (len(taken) - 1) / len(steps), (whole - sum(taken)) / len(steps)


def _shares(model: nn.Module, ask: Callable[[], Any], units: Sequence[Unit]) -> list[float]:
    """Of each unit in what all take together."""
    with _clocked(model, units) as taken:
        for _ in range(ROUNDS):
            ask()
    own = [min(taken[index]) for index in range(len(units))]
    return [each / max(1, sum(own)) for each in own]


@contextmanager
def _clocked(model: nn.Module, units: Sequence[Unit]) -> Iterator[dict[int, list[int]]]:
    taken: dict[int, list[int]] = defaultdict(list)
    begun: dict[int, int] = {}

    def end(index: int) -> None:
        taken[index].append(perf_counter_ns() - begun[index])

    handles = []
    for index, unit in enumerate(units):
        first, last = (model.get_submodule(unit.modules[place]) for place in (0, -1))
        start = lambda *_, index=index: begun.update({index: perf_counter_ns()})  # noqa: E731
        handles.append(first.register_forward_pre_hook(start))
        handles.append(last.register_forward_hook(lambda *_, index=index: end(index)))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _nanoseconds(run: Callable[[], Any]) -> int:
    start = perf_counter_ns()
    run()
    return perf_counter_ns() - start
