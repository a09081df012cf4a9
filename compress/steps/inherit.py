"""Feature inheritance (A-SDM, 2406.00210, iv) as a method: find units, look at what they compute, try plans, keep the best."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from math import log10
from pathlib import Path

from diffpress.calibration.sampling import Call, replay, sample_in_batches, timestep_of
from diffpress.calibration.shortest import short_run
from diffpress.calibration.trajectory import Progress
from diffpress.export.edits import Attach
from diffpress.export.errors import RecipeError, UnsupportedModelError
from diffpress.export.runtime import Unit
from diffpress.export.runtime.rows import looked_at

from ..changes import Changes, Note
from ..options import Inherit
from ..stage import Cost, Report, Running, Subject
from ..stage_folder import StageFolder
from .budget import Budget
from .candidates import Candidate, by_hand, forecastings
from .forecasts import Forecasts
from .latency import in_nanoseconds, kept_in_nanoseconds
from .observing import observe_features
from .schedules import BENDS
from .search import search
from .trials import Fitted, Trials, fit, sampled
from .units import Costs, affordable, find_units
from .unused import with_unused

PART = "step_plan"
"""What the model calls the part."""
ITEMSIZE = {"bfloat16": 2, "int8": 1}
"""Bytes of a number that is kept so."""
WINDOW = 16
"""Steps that a forecast may reach back."""
OBSERVING = 2
"""What a run takes while its features are looked at, over what it takes else."""
MANY_STEPS = 1000
"""Where nobody says how many, the first step counts for next to nothing."""


def check(subject: Subject, options: Inherit) -> None:
    """Raises UnsupportedModelError where nothing can be inherited, RecipeError where the speed-up is out of reach."""
    calls = _short_run(subject)
    units, costs = _units_of(subject, calls, 1, options)
    if options.budget == "latency":
        costs = in_nanoseconds(subject, calls, units, options.order, costs)
    _check_reach(Budget(costs, _steps_of(subject) or MANY_STEPS), options)


def estimate(subject: Subject, options: Inherit, running: Running) -> Cost:
    """Whole runs are what takes time; what is written is the numbers of forecasts, and a line a trial."""
    trials = options.trials if options.schedule == "fitted" else 0
    images = 1 + OBSERVING + trials / options.speedup
    seconds = images * options.images / subject.batch * running.steps * running.step_seconds
    units, costs = _units_of(subject, _short_run(subject), 1, options)
    disk_bytes = running.steps * sum(4 * options.order + 2 * 2 * sum(unit.channels) for unit in units)
    return Cost(
        {"steps": seconds}, disk_bytes, {"cache_bytes": _cache_bytes(costs, options.order, [True] * len(units))}
    )


def run(subject: Subject, options: Inherit, folder: StageFolder, report: Report) -> Changes:
    """The method. Raises RecipeError where the speed-up is out of reach."""
    first = subject.trajectories.shards[0]
    recorded = list(subject.trajectories.calls([first]))
    calls = [call for call in recorded if call.branch == 0]
    middle = len(calls) // 2
    # Guidance in two calls keeps features of both.
    images = subject.trajectories.images(first) * len(calls) / len(recorded)
    units, costs = _units_of(subject, calls[middle - 1 :], images, options)
    counted = Budget(costs, len(subject.timesteps))
    budget = counted
    if options.budget == "latency":
        measure = partial(_timed, subject, units, options.order, costs)
        budget = replace(counted, costs=kept_in_nanoseconds(folder.path / "latency.json", measure))
    _check_reach(budget, options)
    seen = subject.conditions(options.images)
    moments = observe_features(subject, units, seen, WINDOW, partial(report, "steps, looking at features"))
    forecasts = Forecasts(moments)
    ranked = _ranked(subject, options, units, budget, forecasts, folder.path, partial(report, "steps"))
    fitted = fit(units, forecasts, ranked[0][0], options.cache)
    plan = with_unused(fitted.plan, subject.model, partial(replay, subject.model, calls[middle]), subject.timesteps)
    return _changes(subject, counted, budget, ranked, fitted._replace(plan=plan))


def _timed(subject: Subject, units: Sequence[Unit], order: int, costs: Costs) -> Costs:
    return in_nanoseconds(subject, _short_run(subject), units, order, costs)


def _ranked(
    subject: Subject,
    options: Inherit,
    units: Sequence[Unit],
    budget: Budget,
    forecasts: Forecasts,
    folder: Path,
    notify: Progress,
) -> list[tuple[Candidate, float]]:
    """Plans and their errors, the best first."""
    folder.mkdir(parents=True, exist_ok=True)
    tried = subject.conditions(2 * options.images)[options.images :]
    trials = Trials(
        folder / "trials.jsonl",
        lambda own: fit(units, forecasts, own, options.cache),
        lambda fitted: sampled(subject, tried, fitted),
        lambda: sample_in_batches(subject.pipeline, tried, subject.sampling, subject.batch).images,
    )
    orders = [order for order in (1, 2, 0) if order <= options.order]
    ways = forecastings(orders, [True, False] if options.correction else [False])
    if options.schedule != "fitted":
        own = by_hand(options.schedule, BENDS[0], budget, options.speedup, ways[0])
        return [(own, trials.error(own))]
    return search(trials, budget, options.speedup, options.trials, ways, options.patterns, subject.seed, notify)


def _changes(
    subject: Subject, counted: Budget, budget: Budget, ranked: Sequence[tuple[Candidate, float]], fitted: Fitted
) -> Changes:
    """`counted` are multiplications, `budget` what was to be saved."""
    best = ranked[0][0]
    edit = Attach(component=subject.component, module=PART, settings=fitted.plan)
    held = _cache_bytes(counted.costs, best.forecast.order, looked_at(fitted.plan))
    reason = f"{counted.speedup(best.cells):.2f} times fewer multiplications, {held / 1e6:.1f} MB of features an image"
    if budget is not counted:
        reason += f", {budget.speedup(best.cells):.2f} times faster where it was fitted"
    tensors = {f"{PART}.{name}": tensor.contiguous() for name, tensor in fitted.tensors.items()}
    history = [{"speedup": counted.speedup(own.cells), "psnr_db": -10 * log10(found)} for own, found in ranked]
    return Changes((edit,), tensors, {PART: Note(reason, format=edit.words())}, tuple(history))


def _units_of(subject: Subject, calls: Sequence[Call], images: float, options: Inherit) -> tuple[list[Unit], Costs]:
    """Of two neighbouring calls, the first of `calls`."""
    model = subject.model
    units, costs = find_units(model, [partial(replay, model, call) for call in calls[:2]], images, options.level)
    if options.cache in ITEMSIZE:
        costs = costs.kept_in(ITEMSIZE[options.cache])
    if options.cache_mb is not None:
        units, costs = affordable(units, costs, options.cache_mb * 1e6 / (options.order + 1))
    if not units:
        raise UnsupportedModelError(
            f"steps: {type(model).__name__} has no blocks that could be inherited"
            + (f" in cache_mb {options.cache_mb:g}. Give more." if options.cache_mb else ".")
        )
    return units, costs


def _short_run(subject: Subject) -> list[Call]:
    """The calls of a run in few steps. Raises UnsupportedModelError where steps are not called alike."""
    pipeline = subject.pipeline
    everything = short_run(pipeline, subject.conditions(1)[0], subject.sampling)
    calls = [call for call in everything if call.part == subject.component]
    if {timestep_of(call.inputs) for call in calls} != {timestep_of(call.inputs) for call in everything}:
        raise UnsupportedModelError(
            f"steps: {subject.component} of {type(pipeline).__name__} answers at some steps and other parts at others, so that "
            "too few follow each other to inherit from. Leave steps out."
        )
    counts = Counter(call.step for call in calls)
    if len(counts) == 1:
        raise UnsupportedModelError(
            f"steps: {type(pipeline).__name__} makes one step, which has nothing to inherit. Leave steps out."
        )
    if len(set(counts.values())) != 1:
        raise UnsupportedModelError(
            f"steps: the scheduler of {type(pipeline).__name__} calls the denoiser {sorted(set(counts.values()))} times a "
            "step, by turns. A step plan needs as many calls at every step: give the pipeline another scheduler, such as "
            "DPMSolverMultistepScheduler."
        )
    return calls[:: counts[0]]


def _steps_of(subject: Subject) -> int | None:
    default = inspect.signature(type(subject.pipeline).__call__).parameters.get("num_inference_steps")
    return subject.sampling.steps or (default.default if default and isinstance(default.default, int) else None)


def _check_reach(budget: Budget, options: Inherit) -> None:
    if budget.rows(options.speedup) < 1:
        rest = budget.costs.rest / budget.costs.total
        kept = (
            "multiplications are always computed" if options.budget == "macs" else "time is taken whatever is inherited"
        )
        of = "the denoiser's" if options.budget == "macs" else "an image's"
        raise RecipeError(
            f"steps.speedup {options.speedup:g}: {budget.fastest:.2f} is the most that can be reached here, and only by "
            f"computing nothing after the first step: {rest:.0%} of {of} {kept}. Give less; up to half of that most keeps "
            "images close."
        )


def _cache_bytes(costs: Costs, order: int, kept: Sequence[bool]) -> int:
    """Of an image's features, of the units that are `kept`."""
    return sum(compress(costs.feature_bytes, kept)) * (order + 1)
