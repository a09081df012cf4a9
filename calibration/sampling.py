"""Run a real pipeline: the pipeline is the sampler, nothing of its loop is written again."""

from __future__ import annotations

import inspect
import re
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpress.export.denoisers import is_denoiser, no_denoiser, parts_of
from diffpress.export.errors import UnsupportedModelError, UserError
from diffpress.export.runtime import time_argument, time_of

from .arguments import opened_arguments
from .calls import OutputKind, call_of
from .conditions import Condition
from .inputs import Inputs, first_answer
from .made import made_of
from .media import MediaFile, StandIn
from .schedulers import schedulers_of

BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
OTHER_SEED = 2**31 - 1
OURS, THEIRS = "diffpress.", ("diffusers.", "transformers.")
OUT_OF_MEMORY = re.compile("out of memory|DefaultCPUAllocator", re.IGNORECASE)
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What pipelines raise where they do not take what they are given."""


@dataclass(frozen=True)
class Sampling:
    """How to sample; None leaves the pipeline's own default."""

    steps: int | None = None
    guidance_scale: float | None = None
    call: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other arguments that all calls share."""


class Sample(NamedTuple):
    """What was made of N conditions and the latents it was decoded from; where there are none, what was made itself, images
    in -1..1.
    """

    images: Tensor
    """Images [N, C, H, W] or videos [N, F, C, H, W] in 0..1, sounds [N, C, T], or arrays [N, ...]."""
    latents: Tensor
    kind: OutputKind = "image"


class Call(NamedTuple):
    """One call of a denoiser: what it was given, the tensors by path (`outer/inner` in a dict), its output, and its step.

    The step counts distinct time steps in the order in which the pipeline asks this part for them.
    """

    inputs: Mapping[str, Tensor]
    """`Inputs`, or dicts of tensors alone."""
    output: Tensor
    """As one tensor, see `first_answer`."""
    step: int
    guided: Tensor | None = None
    """What the scheduler was given after this call: the output itself, or what guidance made of it."""
    branch: int = 0
    """Recorded calls only: how many came before it since the sample was last updated, as where guidance takes two."""
    part: str = ""
    """What the pipeline calls the denoiser."""


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The parts that are told the time step, and so are called at every step or at some, by their names in the pipeline.

    Raises UnsupportedModelError where there is none.
    """
    parts = parts_of(pipeline)
    # What is compiled has the class of its compiler.
    found = {name: part for name, part in parts.items() if is_denoiser(getattr(part, "_orig_mod", part))}
    if not found:
        raise UnsupportedModelError(no_denoiser(type(pipeline).__name__, list(parts)))
    return found


def denoiser_of(pipeline: Any) -> nn.Module:
    """The only one. Raises UnsupportedModelError where there are several."""
    found = denoisers_of(pipeline)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has several parts that are told the time step ({', '.join(found)}), and this works "
            "with one."
        )
    return next(iter(found.values()))


def device_of_pipeline(pipeline: Any) -> torch.device:
    """Where its denoiser is, the first of several."""
    return device_of(next(iter(denoisers_of(pipeline).values())))


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; one that is packed as a whole has buffers only, and what stands in for one may say it alone."""
    held = next(chain(model.parameters(), model.buffers()), None)
    return torch.device(getattr(model, "device", "cpu")) if held is None else held.device


@torch.no_grad()
def sample(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> Sample:
    """Make one output a condition, in one call of the pipeline where it can; each starts from its own seed's noise.

    Raises UserError where the pipeline does not take what it is given, or a number of steps.
    """
    groups = groups_of(pipeline, conditions, sampling, len(conditions))
    return joined([_sample_together(pipeline, group, sampling) for group in groups])


def groups_of(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling, batch: int) -> list[list[Condition]]:
    """The conditions by calls of the pipeline, at most `batch` together: alone where they have arguments of their own, or
    pictures that lists of texts could be told from in more than one way.
    """
    shared = any(isinstance(value, (list, MediaFile, StandIn)) for value in sampling.call.values())
    alone = shared or not call_of(pipeline).takes_lists
    groups: list[list[Condition]] = []
    for condition in conditions:
        joins = groups and not (alone or condition.arguments or groups[-1][-1].arguments) and len(groups[-1]) < batch
        groups[-1].append(condition) if joins else groups.append([condition])
    return groups


def _sample_together(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> Sample:
    seen: list[Tensor] = []
    arguments = call_arguments(pipeline, conditions, sampling)
    with watch_decoder(pipeline, seen.append), drawing(pipeline, conditions), refusals_told(pipeline):
        kind, made = made_of(pipeline(**arguments), len(conditions))
    if seen:
        latents = torch.cat(seen)
        # Some decode frames or pieces of one output apart.
        several = len(latents) != len(conditions) and len(latents) % len(conditions) == 0
        latents = latents.unflatten(0, (len(conditions), -1)) if several else latents
    else:
        latents = made * 2 - 1 if kind == "image" else made
    return Sample(made, latents, kind)


def joined(parts: Sequence[Sample]) -> Sample:
    """What several calls made, as of one. Raises UserError where it is of different sizes."""
    if len(parts) == 1:
        return parts[0]
    if len({part.images.shape[1:] for part in parts}) > 1:
        shapes = sorted({" x ".join(map(str, part.images.shape[1:])) for part in parts})
        raise UserError(
            f"The calls give outputs of different sizes ({'; '.join(shapes)}), which cannot be put beside each other. Give "
            "pictures of one size, or `height` and `width` in sampling.call."
        )
    return Sample(
        torch.cat([part.images for part in parts]), torch.cat([part.latents for part in parts]), parts[0].kind
    )


@contextmanager
def drawing(pipeline: Any, conditions: Sequence[Condition]) -> Iterator[None]:
    """While the context lasts, noise that is drawn from no generator depends on the first condition's seed alone.

    Schedulers that keep a source of noise from one run to the next begin with a new one.
    """
    for scheduler in schedulers_of(pipeline):
        if getattr(scheduler, "noise_sampler", None) is not None:
            scheduler.noise_sampler = None
    device = device_of_pipeline(pipeline)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Another than the generators', whose first noise this would repeat.
        torch.manual_seed(conditions[0].seed + OTHER_SEED)
        yield


@contextmanager
def refusals_told(pipeline: Any) -> Iterator[None]:
    """Raise a UserError in place of what the pipeline itself says to arguments that it does not take."""
    try:
        yield
    except REFUSALS as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        # Whose code it failed in: torch's own is anybody's.
        known = [name for name in modules if name.startswith((OURS, *THEIRS))]
        ours = not known or known[-1].startswith(OURS)
        if ours or isinstance(error, UserError) or OUT_OF_MEMORY.search(str(error)):
            raise
        if isinstance(error, NameError):
            # What diffusers imports where it is installed, and uses in any case.
            raise UserError(
                f"the package {error.name} is needed by {type(pipeline).__name__} and not installed: pip install {error.name}"
            ) from error
        words = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        raise UserError(
            f"{type(pipeline).__name__} does not take this call: {words}. Change what it is given by sampling.call "
            "(--set sampling.call.NAME=VALUE) or record.calls."
        ) from error


def call_arguments(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> dict[str, Any]:
    """What one call of the pipeline is given (see `sample`)."""
    call = call_of(pipeline)
    known = call.parameters
    given = {**sampling.call, **conditions[0].arguments}
    arguments = opened_arguments(pipeline, call, given) if given else {}
    generators = [torch.Generator().manual_seed(condition.seed) for condition in conditions]
    listed = call.takes_lists
    # What is asked for alone may go through code that takes no list of generators.
    together = listed and not given
    settled = {
        "generator": generators if together else generators[0],
        "output_type": "np",
        "batch_size": len(conditions),
    }
    if call.takes != "nothing":
        del settled["batch_size"]
    arguments |= {name: value for name, value in settled.items() if name in known}
    texts = [condition.text for condition in conditions]
    if call.takes == "prompt":
        arguments["prompt"] = texts if listed else texts[0]
    elif call.takes == "label":
        arguments["class_labels"] = [int(text) for text in texts]
    if sampling.steps is not None:
        if "num_inference_steps" not in known:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} has steps of its own: leave sampling.steps (--steps) out."
            )
        arguments["num_inference_steps"] = sampling.steps
    if sampling.guidance_scale is not None and "guidance_scale" in known:
        arguments["guidance_scale"] = sampling.guidance_scale
    return arguments


def pixels_as_latents(images: Tensor) -> Tensor:
    """Images [N, H, W, C] in 0..1 as [N, C, H, W] in -1..1, which stand for latents where there are none."""
    return _at_least_single(images).permute(0, 3, 1, 2) * 2 - 1


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_in_batches(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling, batch: int) -> Sample:
    """The same for any number of conditions, `batch` images in memory at a time."""
    return joined(
        [sample(pipeline, conditions[start : start + batch], sampling) for start in range(0, len(conditions), batch)]
    )


@contextmanager
def watch_decoder(pipeline: Any, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand what the pipeline gives its image decoder, in single precision at least, to `receive`; none without a `vae`.

    It is decoded without a gradient.
    """
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        yield
        return
    decode = vae.decode

    def watched(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        receive(_at_least_single(latents))
        with torch.no_grad():
            return decode(latents, *arguments, **options)

    vae.decode = watched
    try:
        yield
    finally:
        del vae.decode


@contextmanager
def watch(pipeline: Any, receive: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call of a denoiser to `receive` while the pipeline runs once."""
    # What the receiver asks a denoiser itself is no call of the pipeline.
    idle = Lock()
    handles = [
        module.register_forward_hook(_Watcher(part, module, receive, idle), with_kwargs=True)
        for part, module in denoisers_of(pipeline).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """A hook of one denoiser."""

    def __init__(self, part: str, denoiser: nn.Module, receive: Callable[[Call], None], idle: Lock) -> None:
        self.part, self.receive, self.idle = part, receive, idle
        self.signature = inspect.signature(denoiser.forward)
        self.timesteps: list[float] = []

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if not self.idle.acquire(blocking=False):
            return
        try:
            self.receive(self._call(arguments, options, output))
        finally:
            self.idle.release()

    def _call(self, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Call:
        given = self.signature.bind(*arguments, **options).arguments
        inputs = Inputs.of(given, [name for name in (time_argument(given),) if name])
        timestep = timestep_of(inputs)
        # A scheduler may ask twice for one time step.
        if timestep not in self.timesteps:
            self.timesteps.append(timestep)
        result = first_answer(output, apart=_is_apart(given))
        return Call(inputs, result.detach(), self.timesteps.index(timestep), part=self.part)


def _is_apart(given: Mapping[str, Any]) -> bool:
    """Whether a denoiser is given its samples in a list, each for itself."""
    return isinstance(next(iter(given.values()), None), list)


def timestep_input(inputs: Iterable[str]) -> str | None:
    """Which of a denoiser's `inputs` tells the time step."""
    return time_argument(inputs)


def timestep_of(inputs: Mapping[str, Tensor]) -> float:
    """The time step of one call. Raises UnsupportedModelError where the denoiser is not told any."""
    given = Inputs.like(inputs).given(lambda _, value: value)
    name = time_argument(given)
    if name is None or given[name] is None:
        raise UnsupportedModelError(
            f"The denoiser is called with {', '.join(sorted(given))}, and none of it is the time step; steps cannot be told "
            "apart."
        )
    return float(time_of(torch.as_tensor(given[name])))


@torch.no_grad()
def replay(denoiser: nn.Module, call: Call) -> Tensor:
    """What `denoiser` answers to recorded inputs; they are cast to its dtype, but for the time step and what was not in
    the dtype of the recorded denoiser either.
    """
    return answer(denoiser, call.inputs, call.output.dtype)


def answer(denoiser: nn.Module, inputs: Mapping[str, Tensor], recorded: torch.dtype) -> Tensor:
    """Call `denoiser` with inputs by name, as recorded of one that computed in the dtype `recorded` (see `replay`)."""
    device, dtype = device_of(denoiser), next((p.dtype for p in denoiser.parameters()), torch.float32)
    time = timestep_input(inputs)

    def place(path: str, value: Tensor) -> Tensor:
        return value.to(device, dtype if value.dtype == recorded and path != time else None)

    given = Inputs.like(inputs).given(place)
    positional, named = _as_called(denoiser, given)
    return first_answer(denoiser(*positional, **named), apart=_is_apart(given))


def _as_called(denoiser: nn.Module, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """By name whatever can be: what is laid around a forward looks arguments up so."""
    signature = inspect.signature(denoiser.forward)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if any(kinds.get(name) in BY_PLACE for name in given):
        bound = inspect.BoundArguments(signature, OrderedDict(given))
        return bound.args, bound.kwargs
    spread = [name for name in given if kinds.get(name) is inspect.Parameter.VAR_KEYWORD]
    named = {name: value for name, value in given.items() if name not in spread}
    return (), named | {key: value for name in spread for key, value in given[name].items()}
