"""What the denoiser's output loses when one of its modules is changed: of all modules at once, from a few backward passes.

To first order a change dy of a module's output moves the denoiser's output by J dy. For a random direction v of independent
signs, E[v v^T] = I, one backward pass gives g = J^T v at every module, and

    E[(g . dy)^2] = E[v^T J dy dy^T J^T v] = ||J dy||^2,

the squared error that is asked for (Hutchinson 1990, 10.1080/03610919008812866; with v of the output's own distribution it
would be the Fisher information). Images of a batch do not see each other, so each is a direction of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpress.calibration.sampling import Call, answer
from diffpress.calibration.trajectory import Trajectories
from diffpress.export.runtime import Attention, Forward, StepClock, Wrap

from .overlay import checkpointed, frozen, is_large, overlaid, overriding_attention
from .quantized_layer import QuantizedLayer, call_with, fake_quantization

PRODUCTS = 96
"""Products g . dy that an error is the mean of, at least: its relative standard deviation is sqrt(2 / 96), a seventh, where
images err alike, while errors of layers differ by orders of magnitude."""

Answers = Callable[..., Iterable[Tensor]]
"""What a module would answer to its inputs under each of several changes."""
Weights = tuple[Tensor, Tensor | None]
"""The weight and the bias of a layer."""


@torch.no_grad()
def measure_layers(
    denoiser: nn.Module, layers: Mapping[str, Sequence[QuantizedLayer]], trajectories: Trajectories, seed: int
) -> dict[str, list[float]]:
    """Relative squared error of the denoiser's output with one layer rounded at a time, for each way to round it.

    A mean over `evaluation_calls`, estimated (see above).
    """
    probes = _Probes(trajectories, {name: len(ways) for name, ways in layers.items()}, seed)

    def answers(name: str, beneath: Forward, x: Tensor) -> list[Tensor]:
        layer = denoiser.get_submodule(name)
        return [fake_quantization(layer, own, probes.clock)(beneath)(x) for own in layers[name]]

    return probes.measure(denoiser, probes.wraps(layers, answers))


@torch.no_grad()
def measure_attention(
    denoiser: nn.Module, attention: Mapping[str, Sequence[Attention]], trajectories: Trajectories, seed: int
) -> dict[str, list[float]]:
    """The same of modules whose attention is answered in other ways."""
    probes = _Probes(trajectories, {name: len(ways) for name, ways in attention.items()}, seed)

    def watch(name: str) -> Attention:
        def attend(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
            def answers(*given: Tensor) -> list[Tensor]:
                return [way(*given, *arguments, **options) for way in attention[name]]

            output = F.scaled_dot_product_attention(query, key, value, *arguments, **options)
            return probes.watch(name, answers, output, query, key, value)

        return attend

    return probes.measure(denoiser, overriding_attention({name: watch(name) for name in attention}))


@torch.no_grad()
def measure_weights(
    denoiser: nn.Module,
    weights: Mapping[str, Sequence[Weights]],
    trajectories: Trajectories,
    seed: int,
    calls: Sequence[tuple[Call, float]],
) -> dict[str, list[float]]:
    """Squared error of the denoiser's output with one layer at a time having other weights, estimated (see above): a sum
    over `calls`, each times the number beside it.
    """
    probes = _Probes(trajectories, {name: len(ways) for name, ways in weights.items()}, seed, calls)

    def answers(name: str, beneath: Forward, x: Tensor) -> Iterator[Tensor]:
        return (call_with(denoiser.get_submodule(name), beneath, x, *own) for own in weights[name])

    return probes.measure(denoiser, probes.wraps(weights, answers))


def evaluation_calls(trajectories: Trajectories) -> list[Call]:
    """Three steps of one shard: the first, the one in the middle and the last."""
    shard = trajectories.shards[0]
    last = len(trajectories.steps(shard)) - 1
    return [trajectories.call(shard, index) for index in (0, (last + 1) // 2, last)]


def _relative(calls: Sequence[Call]) -> list[tuple[Call, float]]:
    """Each with what makes of the sum of its squared errors a share of the mean; an answer of zeros, as an untrained
    ControlNet gives, has errors and no shares.
    """
    return [(call, 1 / (len(calls) * (float(call.output.float().square().sum()) or 1.0))) for call in calls]


class _Probes:
    """Products g . dy of every module that is watched, from one backward pass after the other."""

    def __init__(
        self,
        trajectories: Trajectories,
        ways: Mapping[str, int],
        seed: int,
        calls: Sequence[tuple[Call, float]] | None = None,
    ) -> None:
        """`ways`: in how many ways each module is changed."""
        self.calls, self.ways = calls or _relative(evaluation_calls(trajectories)), ways
        self.timesteps, self.clock = trajectories.timesteps, StepClock(trajectories.timesteps)
        self.generator = torch.Generator().manual_seed(seed)
        self.step_weights = self.clock.weights
        # What makes outputs need a gradient although no weight does.
        self.anchor = torch.zeros((), requires_grad=True)
        self.products: dict[str, Tensor] = {}

    def wraps(
        self, names: Iterable[str], answers: Callable[[str, Forward, Tensor], Iterable[Tensor]]
    ) -> dict[str, Wrap]:
        """Around the forwards of layers, so that each is watched; `answers` are what one would say, told what it is beneath."""

        def wrap(name: str) -> Wrap:
            return lambda beneath: lambda x: self.watch(name, partial(answers, name, beneath), beneath(x), x)

        return {name: wrap(name) for name in names}

    def watch(self, name: str, answers: Answers, output: Tensor, *inputs: Tensor) -> Tensor:
        """The `output` of the module `name` as it is; on the way back it is compared with the changed `answers`."""

        def receive(gradient: Tensor, output: Tensor, *inputs: Tensor) -> None:
            # Gradients may be computed in a thread of their own, and the clock is set for each thread.
            self.clock.weights = self.step_weights
            for way, changed in enumerate(answers(*inputs)):
                self._add(name, way, gradient.float() * (changed.float() - output.float()))

        result = _Watched.apply(self.anchor, receive, output, *inputs)
        assert isinstance(result, Tensor)
        return result

    def _add(self, name: str, way: int, product: Tensor) -> None:
        """Sum the `product` [B, ...] of a gradient and a change over all but the images; a module may be called twice."""
        images = self.products[name].shape[1]
        if len(product) % images == 0:
            self.products[name][way] += product.unflatten(0, (images, -1)).flatten(1).sum(1).cpu()
        else:
            self.products[name][way, 0] += product.sum().cpu()

    def measure(self, denoiser: nn.Module, wraps: Mapping[str, Wrap]) -> dict[str, list[float]]:
        """The errors of every module in each way, with `wraps` that let them be watched."""
        errors = {name: torch.zeros(count) for name, count in self.ways.items()}
        with overlaid(denoiser, wraps), frozen(denoiser), checkpointed(denoiser, is_large(denoiser)):
            for call, weight in self.calls:
                for name, squared in self._squared_errors(denoiser, call).items():
                    errors[name] += squared * weight
        return {name: own.tolist() for name, own in errors.items()}

    def _squared_errors(self, denoiser: nn.Module, call: Call) -> dict[str, Tensor]:
        self.clock.set(self.timesteps[call.step])
        self.step_weights, images = self.clock.weights, len(call.output)
        directions = ceil(PRODUCTS / (len(self.calls) * images))
        squared = {name: torch.zeros(count) for name, count in self.ways.items()}
        with torch.enable_grad():
            output = answer(denoiser, call.inputs, call.output.dtype)
        # Where none of the modules is called, nothing has a gradient.
        for left in reversed(range(directions if output.requires_grad else 0)):
            self.products = {name: torch.zeros(count, images) for name, count in self.ways.items()}
            signs = torch.randint(2, output.shape, generator=self.generator) * 2 - 1
            output.backward(signs.to(output), retain_graph=left > 0)
            for name, products in self.products.items():
                squared[name] += products.square().sum(1) / directions
        return squared


class _Watched(torch.autograd.Function):
    """An output that goes on as it is; on the way back it is handed on with its gradient and what it was computed from.

    Both are kept by autograd, so that checkpointing computes them again instead.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, receive: Callable[..., None], output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.receive = receive
        ctx.save_for_backward(output, *inputs)
        # A copy: models add to outputs in place.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        # Checkpointing hands out what is saved once only.
        saved = ctx.saved_tensors
        ctx.receive(gradient, *saved)
        return None, None, gradient, *[None] * (len(saved) - 1)
