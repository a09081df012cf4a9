"""What a step plan says of every call of every schedule: found out before anything runs, and data from then on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from ..portable.manifest import Kept, PlannedCall, StepPlanTables
from ..runtime import Inheritance, Row, StepClock, last_of_run, row_of
from .features import Feature
from .write_plan import PlannedGraphs

BYTES = {"float32": 4, "int8": 1}


def inheritance_of(module: nn.Module) -> Inheritance | None:
    """The runtime part of a step plan in a model, if there is one."""
    return next((own for own in module.modules() if isinstance(own, Inheritance)), None)


def planned_rows(inheritance: Inheritance, timesteps: Sequence[float]) -> list[Row]:
    """What each call of a run at `timesteps` does, as `Inheritance` would find it out call by call."""
    plan, clock = inheritance.plan, StepClock(inheritance.clock.timesteps)
    damping = inheritance.damping.numpy(force=True)
    history: list[list[float]] = [[] for _unit in plan.units]
    rows, last = [], None
    for timestep in timesteps:
        clock.set(timestep)
        position = clock.position
        if last is None or position <= last:
            history, last = [[] for _unit in plan.units], None
        row = row_of(plan, damping, position, last, history)
        for places, computes in zip(history, row.computes, strict=True):
            if computes:
                places[:] = [position, *places][: plan.kept]
        rows.append(row)
        last = None if last_of_run(position, last, len(plan.steps)) else position
    return rows


def plan_tables(planned: PlannedGraphs, rows: Mapping[int, Sequence[Row]], neutral: int) -> StepPlanTables:
    """The plan as an export has it; `neutral` is the row of tables that corrects nothing."""
    kept = [tensor for feature in planned.kept for tensor in _kept(feature)]
    calls = {steps: tuple(_call(planned, row, neutral) for row in own) for steps, own in rows.items()}
    return StepPlanTables(kept=tuple(kept), bytes=sum(own.bytes for own in kept), calls=calls)


def _kept(feature: Feature) -> list[Kept]:
    dtype = "int8" if feature.storage == "int8" else "float32"
    size = BYTES[dtype] * math.prod(feature.shape) * feature.kept
    own = Kept(name=feature.name, dtype=dtype, shape=("batch", *feature.shape), count=feature.kept, bytes=size)
    if dtype == "float32":
        return [own]
    return [own, Kept(name=feature.scale, dtype="float32", shape=(), count=feature.kept, bytes=4 * feature.kept)]


def _call(planned: PlannedGraphs, row: Row, neutral: int) -> PlannedCall:
    return PlannedCall(
        graph=planned.names[row.computes],
        forecast=() if all(row.computes) else tuple(map(tuple, row.weights)),
        correction=neutral if row.correction is None else row.correction,
    )
