"""What the time step feeds the layers of a denoiser, over all time steps that there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffpress.calibration.sampling import Call, Sampling, sample, timestep_of, watch
from diffpress.calibration.shortest import shortest
from diffpress.export.errors import UnsupportedModelError

from ...stage import Subject
from .low_rank import Span, largest_error, span_of
from .time_tape import Inputs, TimeTape, Traced, distinct_rows, trace, watched_layers
from .times import Times, times_of

WORDS = {
    "encoder_hidden_states": "text",
    "pooled_projections": "pooled text",
    "text_embeds": "pooled text",
    "time_ids": "image sizes",
    "hidden_states": "the sample",
    "sample": "the sample",
}
"""What users call inputs of denoisers; others are called as they are."""
PROBES = 4
"""Time steps at which the inputs of layers are compared."""


@dataclass(frozen=True)
class Curve:
    """What the layers of one input are fed, in float32."""

    fitted: Tensor
    """[N, K] at the time steps that the scheduler was made for."""
    between: Tensor
    """[M, K] at time steps between them."""

    @cached_property
    def span(self) -> Span:
        return span_of(self.fitted)

    @cached_property
    def points(self) -> Tensor:
        return torch.cat([self.fitted, self.between])


class Curves(NamedTuple):
    """What the time step feeds the layers of a denoiser, told by a short run of its pipeline."""

    layers: dict[str, Curve]
    """Of those that read nothing else, by name; those that are fed the same share it."""
    reasons: dict[str, str]
    """Why others that read the time step, and see one row an image, are left alone."""
    times: Times
    sampling: Sampling
    """Of the short run."""
    feeds: dict[str, bool]
    """Whether one of the `layers` feeds another."""


@torch.no_grad()
def curves_of(subject: Subject) -> Curves:
    """Raises UnsupportedModelError where what the denoiser is told is no time step of the scheduler."""
    pipeline = subject.pipeline
    if not subject.denoises:
        raise UnsupportedModelError(f"prune: {subject.component} is no denoiser, and is told no time step.")
    subject.check_alone("prune.method modulation")
    first, second = subject.conditions(2)
    sampling = shortest(pipeline, first, subject.sampling)
    traced = trace(pipeline, first, sampling)
    times = times_of(pipeline.scheduler, traced.told)
    alone, reasons = _alone(traced)
    fed = {name: traced.fed[name] for name in alone}
    wrong = set[str]()
    at = traced.tape.replay(fed)
    with (
        watched_layers(subject.model, found := dict[str, list[Tensor]]()),
        watch(pipeline, lambda call: wrong.update(_disproved(call, at, found))),
    ):
        sample(pipeline, [second], sampling)
    reasons |= dict.fromkeys(wrong, "is fed something else than the time step makes")
    fed = {name: own for name, own in fed.items() if name not in wrong}
    everything = [x for own in fed.values() for x in own]
    feeds = {name: traced.tape.reads(everything, subject.model.get_parameter(f"{name}.weight")) for name in fed}
    return Curves(walk(traced.tape, fed, times, subject.seed), reasons, times, sampling, feeds)


def _alone(traced: Traced) -> tuple[list[str], dict[str, str]]:
    """The layers that read the time step alone, and what others read beside it."""
    sources = {name: traced.tape.sources(own) for name, own in traced.fed.items()}
    time = traced.tape.alone
    reasons = {name: f"reads {_words(own - time)} beside the time step" for name, own in sources.items() if own > time}
    return [name for name, own in sources.items() if own == time], reasons


def _words(sources: frozenset[str]) -> str:
    return " and ".join(sorted({WORDS.get(name, name.replace("_", " ")) for name in sources}))


def _disproved(call: Call, at: Callable[[float], dict[str, Tensor]], found: dict[str, list[Tensor]]) -> list[str]:
    """The layers that were fed something else in a call than the tape says; what was `found` is done with."""
    wrong = []
    for name, expected in at(timestep_of(call.inputs)).items():
        inputs = found.get(name, [])
        rows = distinct_rows(inputs) if inputs else expected[:0]
        if rows.shape != expected.shape or largest_error(rows, expected) > torch.finfo(inputs[0].dtype).eps ** 0.5:
            wrong.append(name)
    found.clear()
    return wrong


def walk(tape: TimeTape, fed: Inputs, times: Times, seed: int) -> dict[str, Curve]:
    """What each layer is fed over all time steps; those that are fed the same share it."""
    holders = _holders(tape, fed, times)
    at = tape.replay({name: fed[name] for name in dict.fromkeys(holders.values())})
    whole, between = ([at(time) for time in own.tolist()] for own in (times.all(), times.between(seed)))
    curves = {
        name: Curve(*(torch.cat([rows[name] for rows in own]) for own in (whole, between)))
        for name in dict.fromkeys(holders.values())
    }
    return {name: curves[holder] for name, holder in holders.items()}


def _holders(tape: TimeTape, fed: Inputs, times: Times) -> dict[str, str]:
    """For each layer the first that is fed the same, bit for bit, at some time steps."""
    at = tape.replay(fed)
    probes = [at(time) for time in times.between(0)[:: max(1, times.last // PROBES)].tolist()]
    known: dict[str, Tensor] = {}
    holders: dict[str, str] = {}
    for name in fed:
        rows = torch.cat([probe[name] for probe in probes])
        holders[name] = next((other for other, own in known.items() if torch.equal(own, rows)), name)
        known.setdefault(holders[name], rows)
    return holders
