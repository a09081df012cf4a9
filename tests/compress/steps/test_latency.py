"""What a step takes, by a clock that only parts of the model move."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest

from diffpress.calibration.sampling import replay
from diffpress.calibration.shortest import short_run
from diffpress.compress.overlay import overlaid
from diffpress.compress.stage import Subject
from diffpress.compress.steps import latency
from diffpress.compress.steps.units import Costs, find_units

TIMES = {"transformer_blocks.0": 30, "transformer_blocks.1": 50, "proj_out_2": 20}
SCHEDULER = 7


class Clock:
    """That stands still but for what moves it."""

    def __init__(self) -> None:
        self.now = 0

    def moved_by(self, nanoseconds: int, answer: Callable[..., Any]) -> Callable[..., Any]:
        """`answer`, which takes so long."""

        @wraps(answer)
        def taking(*arguments: Any, **options: Any) -> Any:
            self.now += nanoseconds
            return answer(*arguments, **options)

        return taking


def test_units_save_what_they_take_and_all_else_of_an_image_stays(
    recorded_subject: Callable[[str], Subject],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, subject = Clock(), recorded_subject("tiny_class")
    calls = short_run(subject.pipeline, subject.conditions(1)[0], subject.sampling)
    units, costs = find_units(subject.model, [partial(replay, subject.model, call) for call in calls[:2]], 1, "block")
    monkeypatch.setattr(latency, "perf_counter_ns", lambda: clock.now)
    monkeypatch.setattr(latency, "SECONDS", 0)
    scheduler = subject.pipeline.scheduler
    monkeypatch.setattr(scheduler, "step", clock.moved_by(SCHEDULER, scheduler.step))
    taking = {name: lambda forward, own=own: clock.moved_by(own, forward) for name, own in TIMES.items()}
    with overlaid(subject.model, taking):
        measured = latency.in_nanoseconds(subject, calls, units, 1, costs)
    assert measured.units == (30, 50)
    assert measured.total == sum(TIMES.values()) + SCHEDULER
    assert measured.feature_bytes == costs.feature_bytes


def test_what_was_measured_before_a_run_was_killed_is_not_measured_again(tmp_path: Path) -> None:
    costs = Costs((30, 50), 107, (8, 8), 4)
    file = tmp_path / "steps" / "latency.json"
    assert latency.kept_in_nanoseconds(file, lambda: costs) == costs
    assert latency.kept_in_nanoseconds(file, lambda: pytest.fail("measured again")) == costs
