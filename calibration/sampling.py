"""Run a real pipeline: the pipeline is the sampler, nothing of its loop is written again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import TIMESTEPS

from .conditions import Condition, call_parameters, kind


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
    """One call of the denoiser: its numeric arguments by name (`outer/inner` in a dict), its output, and its step.

    The step counts distinct time steps in the order in which the pipeline asks for them.
    """

    inputs: dict[str, Tensor]
    output: Tensor
    step: int
    guided: Tensor | None = None
    """What the scheduler was given after this call: the output itself, or what guidance made of it."""
    branch: int = 0
    """Recorded calls only: how many came before it since the sample was last updated, as where guidance takes two."""


def denoiser_of(pipeline: Any) -> nn.Module:
    """The part called once a step."""
    return pipeline.transformer if getattr(pipeline, "transformer", None) is not None else pipeline.unet


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
    """Hand every call of the denoiser to `receive` while the pipeline runs once."""
    denoiser = denoiser_of(pipeline)
    signature = inspect.signature(denoiser.forward)
    timesteps: list[float] = []
    receiving = False

    def hook(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        nonlocal receiving
        if receiving:
            # The receiver asks the denoiser itself; that is no call of the pipeline.
            return
        inputs = dict(_numeric_arguments(signature.bind(*arguments, **options).arguments))
        timestep = timestep_of(inputs)
        # A scheduler may ask twice for one time step.
        if timestep not in timesteps:
            timesteps.append(timestep)
        result = output[0] if isinstance(output, tuple) else output.sample
        receiving = True
        try:
            receive(Call(inputs, result.detach(), timesteps.index(timestep)))
        finally:
            receiving = False

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def timestep_input(inputs: Container[str]) -> str | None:
    """Which of a denoiser's `inputs` tells the time step."""
    return next((name for name in TIMESTEPS if name in inputs), None)


def timestep_of(inputs: Mapping[str, Tensor]) -> float:
    """The time step of one call. Raises UnsupportedModelError where the denoiser is not told any."""
    name = timestep_input(inputs)
    if name is None:
        raise UnsupportedModelError(
            f"The denoiser is called with {', '.join(sorted(inputs))}, and none of it is the time step; steps cannot be told "
            "apart."
        )
    return float(inputs[name].flatten()[0])


@contextmanager
def watch_guided(pipeline: Any, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand what the scheduler is given at every step to `receive` while the pipeline runs once."""
    scheduler = pipeline.scheduler
    step = scheduler.step

    def watched(*arguments: Any, **options: Any) -> Any:
        receive((arguments[0] if arguments else options["model_output"]).detach())
        return step(*arguments, **options)

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def _numeric_arguments(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _numeric_arguments(value, f"{prefix}{name}/")
        elif isinstance(value, (Tensor, int, float)) and not isinstance(value, bool):
            yield prefix + name, torch.as_tensor(value).detach()
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            raise UnsupportedModelError(
                f"The denoiser is called with a list of tensors as {prefix + name!r}, which cannot be recorded; tensors, "
                "numbers and dicts of them can."
            )


@torch.no_grad()
def replay(denoiser: nn.Module, call: Call) -> Tensor:
    """What `denoiser` answers to recorded inputs; they are cast to its dtype, but for the time step and what was not in
    the dtype of the recorded denoiser either.
    """
    return answer(denoiser, call.inputs, call.output.dtype)


def answer(denoiser: nn.Module, inputs: Mapping[str, Tensor], recorded: torch.dtype) -> Tensor:
    """Call `denoiser` with inputs by name, as recorded of one that computed in the dtype `recorded` (see `replay`)."""
    device, dtype = device_of(denoiser), next((p.dtype for p in denoiser.parameters()), torch.float32)
    options: dict[str, Any] = {"return_dict": False}
    time = timestep_input(inputs)
    for name, value in inputs.items():
        *outer, last = name.split("/")
        cast = value.dtype == recorded and name != time
        place = options
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = value.to(device, dtype if cast else None)
    return denoiser(**options)[0]
