"""The denoiser of an export: one graph, or with a step plan one a pattern of rows and what is kept between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..engines.engine import Array, Session
from .manifest import CORRECTION, FORECAST, ExportManifest, PlannedCall, StepPlanTables

Floats = NDArray[np.float32]
Denoise = Callable[[dict[str, Array]], Floats]


class Denoiser:
    """Opens graphs as they are needed, the first of all at once."""

    def __init__(self, manifest: ExportManifest, open_graph: Callable[[str], Session]) -> None:
        self._manifest, self._open = manifest, open_graph
        self._sessions = {"denoiser": open_graph("denoiser")}

    def begin(self, steps: int) -> Denoise:
        """A run in so many steps: what answers its calls, one after the other, each given the denoiser's inputs."""
        plan = self._manifest.step_plan
        if plan is None:
            return lambda inputs: _split(self._sessions["denoiser"].run(inputs), ())[0]
        run = _PlannedRun(self, plan, steps)
        return run.denoise

    def session(self, graph: str) -> Session:
        """The session of a component."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(graph)
        return self._sessions[graph]

    def asked(self, graph: str) -> list[str]:
        """The inputs of a component."""
        return [port.name for port in self._manifest.components[graph].inputs]


class _PlannedRun:
    """One sampling run with what it has computed so far."""

    def __init__(self, denoiser: Denoiser, plan: StepPlanTables, steps: int) -> None:
        self.denoiser, self.counts = denoiser, {own.name: own.count for own in plan.kept}
        self.calls: Iterator[PlannedCall] = iter(plan.calls[steps])
        self.past: dict[str, list[Array]] = {}

    def denoise(self, inputs: dict[str, Array]) -> Floats:
        """The answer of the next call."""
        call = next(self.calls)
        known = inputs | self._planned(call)
        wanted = {name: known[name] for name in self.denoiser.asked(call.graph)}
        output, given = _split(self.denoiser.session(call.graph).run(wanted), self.counts)
        for name, value in given.items():
            self.past[name] = [value, *self.past.get(name, ())][: self.counts[name]]
        return output

    def _planned(self, call: PlannedCall) -> dict[str, Array]:
        past = {
            f"{name}.past{place + 1}": own[min(place, len(own) - 1)]
            for name, own in self.past.items()
            for place in range(self.counts[name])
        }
        forecast = np.array(call.forecast, np.float32)
        return {FORECAST: forecast, CORRECTION: np.array(call.correction, np.int64), **past}


def _split(outputs: Mapping[str, Array], kept: Mapping[str, int] | tuple[()]) -> tuple[Floats, dict[str, Array]]:
    """The output of a graph, and what it gives to be kept."""
    given = {name: value for name, value in outputs.items() if name in kept}
    (output,) = (value for name, value in outputs.items() if name not in kept)
    return output.astype(np.float32, copy=False), given
