"""What a step plan says of every call of every schedule: found out before anything runs, and data from then on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from ..portable.manifest import Kept, PlannedCall, StepPlanTables
from ..runtime import Inheritance, Row, StepClock, StepPlan, last_of_run
from .features import Feature
from .write_plan import PlannedGraphs

BYTES = {"float32": 4, "int8": 1}


def inheritance_of(module: nn.Module) -> Inheritance | None:
    """The runtime part of a step plan in a model, if there is one."""
    return next((own for own in module.modules() if isinstance(own, Inheritance)), None)


def planned_rows(inheritance: Inheritance, timesteps: Sequence[float]) -> list[Row]:
    """What each call of a run at `timesteps` does, as `Inheritance` would find it out call by call."""
    plan, clock, rows = inheritance.plan, StepClock(inheritance.clock.timesteps), []
    places: dict[int, list[float]] = {}
    last: float | None = None
    for timestep in timesteps:
        clock.set(timestep)
        position = clock.position
        if last is None or position <= last:
            places, last = {}, None
        damping = inheritance.damping[inheritance.rows.step(position)].tolist()
        row = inheritance.rows.at(position, last, places, damping)
        for unit, computes in enumerate(row.computes):
            if computes and inheritance.keeps[unit]:
                places[unit] = [position, *places.get(unit, ())][: plan.kept]
        rows.append(row)
        last = None if last_of_run(position, last, len(plan.steps)) else position
    return rows


def plan_tables(planned: PlannedGraphs, rows: Mapping[int, Sequence[Row]], plan: StepPlan) -> StepPlanTables:
    """The plan as an export has it. The last row of tables corrects nothing."""
    kept = [tensor for feature in planned.kept for tensor in _kept(feature)]
    calls = {
        steps: tuple(_call(planned, row, plan.kept, len(plan.inheriting)) for row in own) for steps, own in rows.items()
    }
    return StepPlanTables(kept=tuple(kept), bytes=sum(own.bytes for own in kept), calls=calls)


def _kept(feature: Feature) -> list[Kept]:
    dtype = "int8" if feature.storage == "int8" else "float32"
    size = BYTES[dtype] * math.prod(feature.shape) * feature.kept
    own = Kept(name=feature.name, dtype=dtype, shape=("batch", *feature.shape), count=feature.kept, bytes=size)
    if dtype == "float32":
        return [own]
    return [own, Kept(name=feature.scale, dtype="float32", shape=(), count=feature.kept, bytes=4 * feature.kept)]


def _call(planned: PlannedGraphs, row: Row, kept: int, neutral: int) -> PlannedCall:
    # What is not forecast here is held, by whoever looks.
    held = [1.0] + [0.0] * (kept - 1)
    weights = tuple(tuple(row.weights.get(unit, held)) for unit in range(len(row.computes)))
    return PlannedCall(
        graph=planned.names[row.computes],
        forecast=() if all(row.computes) else weights,
        correction=neutral if row.correction is None else row.correction,
    )
