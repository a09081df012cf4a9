"""The student: the teacher's own modules with everything that is learned laid over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from diffpress.calibration.sampling import device_of
from diffpress.export.runtime import Attention, StepClock, Wrap, step_weights

from ..options import Qalora
from ..overlay import checkpointed, is_large, overlaid, overriding_attention, teacher
from ..quantized_layer import QuantizedLayer
from .layer import QaloraLayer


class BatchClock(StepClock):
    """A clock that reads a step for every entry of the batch, so that one batch may mix steps."""

    def set(self, timestep: Tensor | float) -> None:
        """Move to the time steps [B] (or one for all)."""
        self.weights = step_weights(self.timesteps, torch.as_tensor(timestep).flatten())

    def select(self, table: Tensor) -> Tensor:
        """The entries [B] of `table` [steps]."""
        return self.weights.to(table) @ table


class Student:
    """All layers under training, and the attention between them; off unless asked to be on."""

    def __init__(
        self,
        denoiser: nn.Module,
        start: Mapping[str, QuantizedLayer],
        timesteps: list[float],
        options: Qalora,
        seed: int,
        layer_type: type[QaloraLayer] = QaloraLayer,
        attention: Mapping[str, Attention] | None = None,
    ) -> None:
        """`attention` answers for that of the modules it names."""
        generator = torch.Generator().manual_seed(seed)
        self.denoiser = denoiser
        self.large = is_large(denoiser)
        self.checkpointing = self.large if options.checkpointing is None else options.checkpointing
        self.clock = BatchClock(timesteps)
        self.layers = {
            name: layer_type(denoiser.get_submodule(name), own, options.rank, unit, options.per_step, generator)
            for (name, own), unit in zip(start.items(), lora_scales(start, options.scale_aware), strict=True)
        }
        self.attention = attention or {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is learned, by name."""
        return {
            f"{name}.{key}": parameter
            for name, layer in self.layers.items()
            for key, parameter in layer.named_parameters()
        }

    @contextmanager
    def on(self) -> Iterator[None]:
        """The denoiser answers as the quantized one will; gradients have to be taken while it is on."""
        wraps = {name: self._wrap(name) for name in self.layers} | overriding_attention(self.attention)
        with overlaid(self.denoiser, wraps, self.clock), checkpointed(self.denoiser, self.checkpointing):
            yield

    def _wrap(self, name: str) -> Wrap:
        learner, layer = self.layers[name], self.denoiser.get_submodule(name)
        forward = learner.forward_in_parts if self.checkpointing else learner.forward
        return lambda beneath: partial(forward, layer, clock=self.clock, beneath=beneath)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The teacher answers, also where the student is on."""
        with teacher(self.denoiser):
            yield

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return device_of(self.denoiser)

    def finish(self) -> dict[str, QuantizedLayer]:
        """The integers that were trained."""
        return {name: layer.finish(self.denoiser.get_submodule(name)) for name, layer in self.layers.items()}


def lora_scales(start: Mapping[str, QuantizedLayer], scale_aware: bool) -> list[float]:
    """What the low-rank change of each layer is counted in: its mean weight scale, or that of all layers.

    One learning rate then moves every layer by the same share of a code. That is what He et al. 2024, arXiv 2310.03270,
    eq. 8 asks for; multiplied onto gradients, as it is written there, it would change nothing under Adam.
    """
    means = [float(own.weight_scale.abs().mean()) for own in start.values()]
    return means if scale_aware else [sum(means) / len(means)] * len(means)
