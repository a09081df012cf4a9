"""Tiny pipelines, what was recorded of them, and what rounding finds: each made once, and changed by nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from torch import nn

from diffpress.calibration.conditions import conditions
from diffpress.calibration.sampling import Sampling, denoiser_of, replay
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.compress.options import Ptq
from diffpress.compress.ptq import quantize_denoiser
from diffpress.compress.result import QuantizationResult
from diffpress.compress.sensitivity import evaluation_calls
from diffpress.compress.stage import Subject
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.export.source import Form, forms_of, source_tensors

SAMPLING = Sampling(3, 3.0)


class Recorded(NamedTuple):
    """A tiny pipeline and four recorded runs of it."""

    pipeline: Any
    source: PipelineFolder
    denoiser: nn.Module
    forms: dict[str, Form]
    trajectories: Trajectories
    sampling: Sampling


@pytest.fixture(scope="session")
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recorded]:
    """A function: the tiny pipeline of that name."""
    made: dict[str, Recorded] = {}

    def get(name: str) -> Recorded:
        if name not in made:
            source = PipelineFolder(request.getfixturevalue(name), name)
            pipeline = load_pipeline(source)
            folder = tmp_path_factory.mktemp(f"recorded-{name}")
            runs = record(pipeline, conditions(pipeline, "builtin", 4, 0), SAMPLING, folder, batch=2)
            forms = forms_of(source_tensors(source, source.denoiser))
            made[name] = Recorded(pipeline, source, denoiser_of(pipeline), forms, runs, SAMPLING)
        return made[name]

    return get


@pytest.fixture
def recorded_subject(recorded: Callable[[str], Recorded]) -> Callable[[str], Subject]:
    """A function: the denoiser of the tiny pipeline of that name."""

    def get(name: str) -> Subject:
        own = recorded(name)
        draw = lambda count: conditions(own.pipeline, "builtin", count, 100)  # noqa: E731
        return Subject(own.pipeline, own.source.denoiser, own.forms, own.trajectories, own.sampling, draw, 2, 0)

    return get


@pytest.fixture
def subject(recorded_subject: Callable[[str], Subject]) -> Subject:
    """The transformer of the tiny pipeline that draws classes, in three steps."""
    return recorded_subject("tiny_class")


@pytest.fixture(scope="session")
def quantized(recorded: Callable[[str], Recorded]) -> Callable[..., QuantizationResult]:
    """A function: what rounding to nearest finds for the denoiser of that name with these options."""
    found: dict[tuple[str, str], QuantizationResult] = {}

    def get(name: str, **options: Any) -> QuantizationResult:
        chosen = Ptq(method="ptq", **options)
        key = (name, chosen.model_dump_json())
        if key not in found:
            own = recorded(name)
            found[key] = quantize_denoiser(
                own.source.denoiser, own.denoiser, own.forms, own.trajectories, chosen, seed=0
            )
        return found[key]

    return get


@pytest.fixture(scope="session")
def output_error() -> Callable[[nn.Module, Trajectories], float]:
    """A function: relative squared error of what a denoiser, as it is at that moment, answers to `evaluation_calls`."""

    def error(denoiser: nn.Module, trajectories: Trajectories) -> float:
        calls = evaluation_calls(trajectories)
        moved = [(replay(denoiser, call) - call.output).float() for call in calls]
        return sum(
            float(each.square().mean() / call.output.float().square().mean())
            for each, call in zip(moved, calls, strict=True)
        ) / len(calls)

    return error
