"""Run a real pipeline: the pipeline is the sampler, nothing of its loop is written again."""

from __future__ import annotations

import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpress.export.denoisers import is_denoiser, no_denoiser
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import time_argument, time_of

from .conditions import Condition, call_parameters, kind
from .inputs import Inputs, first_answer

BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True)
class Sampling:
    """How to sample; None leaves the pipeline's own default."""

    steps: int | None = None
    guidance_scale: float | None = None


class Sample(NamedTuple):
    """Images [N, C, H, W] in 0..1 and the latents they were decoded from (the images in -1..1 where there are none)."""

    images: Tensor
    latents: Tensor


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


def _parts_of(pipeline: Any) -> dict[str, Any]:
    parts: dict[str, Any] = getattr(pipeline, "components", None) or getattr(pipeline, "__dict__", {})
    return parts


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The parts that are told the time step, and so are called at every step or at some, by their names in the pipeline.

    Raises UnsupportedModelError where there is none.
    """
    parts = _parts_of(pipeline)
    # What is compiled has the class of its compiler.
    found = {name: part for name, part in parts.items() if is_denoiser(type(getattr(part, "_orig_mod", part)))}
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


def schedulers_of(pipeline: Any) -> list[Any]:
    """What updates the sample by what it is given, mostly one."""
    parts = _parts_of(pipeline)
    return [part for part in parts.values() if hasattr(part, "step") and hasattr(part, "set_timesteps")]


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; one that is packed as a whole has buffers only."""
    return next(chain(model.parameters(), model.buffers())).device


@torch.no_grad()
def sample(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> Sample:
    """Make one image a condition in one call of the pipeline; each starts from its own seed's noise.

    Raises UnsupportedModelError where a number of steps is wanted and the pipeline takes none.
    """
    seen: list[Tensor] = []
    with watch_decoder(pipeline, seen.append):
        made = torch.from_numpy(pipeline(**call_arguments(pipeline, conditions, sampling)).images)
    return Sample(made.permute(0, 3, 1, 2).float(), torch.cat(seen) if seen else pixels_as_latents(made))


def call_arguments(pipeline: Any, conditions: Sequence[Condition], sampling: Sampling) -> dict[str, Any]:
    """What the call of the pipeline is given (see `sample`)."""
    arguments: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(condition.seed) for condition in conditions],
        "output_type": "np",
    }
    takes, known = kind(pipeline), call_parameters(pipeline)
    if takes == "prompt":
        arguments["prompt"] = [condition.text for condition in conditions]
    elif takes == "label":
        arguments["class_labels"] = [int(condition.text) for condition in conditions]
    else:
        arguments["batch_size"] = len(conditions)
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
    parts = [
        sample(pipeline, conditions[start : start + batch], sampling) for start in range(0, len(conditions), batch)
    ]
    return Sample(torch.cat([part.images for part in parts]), torch.cat([part.latents for part in parts]))


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


@contextmanager
def watch_guided(pipeline: Any, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand what a scheduler is given at every step to `receive` while the pipeline runs once."""
    schedulers = schedulers_of(pipeline)
    for scheduler in schedulers:
        scheduler.step = _WatchedStep(scheduler, receive)
    try:
        yield
    finally:
        for scheduler in schedulers:
            del scheduler.step


class _WatchedStep:
    """The step of a scheduler; a copy that a pipeline makes of the scheduler has its own, which nobody watches."""

    def __init__(self, scheduler: Any, receive: Callable[[Tensor], None]) -> None:
        self.scheduler, self.receive, self.step = scheduler, receive, scheduler.step
        # Pipelines ask by the signature what a step takes.
        functools.update_wrapper(self, scheduler.step)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.receive((arguments[0] if arguments else options["model_output"]).detach())
        return self.step(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.scheduler)]
        return types.MethodType(type(copied).step, copied)


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
