"""What an image costs: multiplications, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffpress.export.runtime import BufferedLinear, named_packed_layers
from diffpress.export.runtime.memory import free_bytes as free_of_device

from .conditions import Condition
from .sampling import Sampling, device_of_pipeline, sample
from .shortest import shortest

SPARE = 0.9
"""Share of the free memory that anything may count on."""


def macs_per_image(pipeline: Any, condition: Condition, sampling: Sampling) -> int:
    """Multiply-accumulates of one whole sampling call, decoder and text encoder included."""
    with FlopCounterMode(display=False, custom_mapping=operation_formulas()) as counter:
        sample(pipeline, [condition], sampling)
    return int(counter.get_total_flops()) // 2


def operation_formulas() -> dict[Any, Callable[..., int]]:
    """Operations that torch's counter does not know; it gives shapes in the place of tensors."""

    def linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
        return 2 * prod(x) * weight[0]

    def conv2d(place: int) -> Callable[..., int]:
        """The formula where the kernel's size is the argument at `place`."""
        return lambda x, *others, out_shape, **_: 2 * prod(out_shape) * x[1] * prod(others[place - 1])

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    ops = torch.ops.diffpress
    return {
        ops.quantized_linear: linear,
        ops.weight_only_linear: linear,
        ops.fp8_linear: linear,
        ops.quantized_conv2d: conv2d(6),
        ops.weight_only_conv2d: conv2d(4),
        ops.fp8_conv2d: conv2d(5),
        ops.int8_attention: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }


def latencies_ms(runs: list[Callable[[], object]], repeats: int, *, warm: bool = False) -> list[list[float]]:
    """Times of each of `runs`, taken in alternation: [run][repeat]; after one run more of each unless they are `warm`."""
    for run in () if warm else runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for own, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            own.append(1e3 * (time.perf_counter() - start))
    return times


def median_ratio(candidate: list[float], reference: list[float]) -> float:
    """Median of the ratios of neighbours in an alternation."""
    return statistics.median(a / b for a, b in zip(candidate, reference, strict=True))


def peak_memory_bytes(pipeline: Any, condition: Condition, sampling: Sampling) -> int:
    """Most bytes of tensors alive at once while one image is made in few steps, the weights included."""
    short = shortest(pipeline, condition, sampling)
    if device_of_pipeline(pipeline).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sample(pipeline, [condition], short)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sample(pipeline, [condition], short)
    return weight_bytes(pipeline) + _peak_of(profiler)


def _peak_of(profiler: Any) -> int:
    alive = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def weight_bytes(pipeline: Any) -> int:
    """Bytes of all parameters and buffers of a loaded pipeline."""
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(pipeline: Any) -> int:
    """Memory of the pipeline's device that is free, or is taken by the pipeline itself."""
    return weight_bytes(pipeline) + free_of_device(device_of_pipeline(pipeline))


def parameter_count(model: nn.Module) -> int:
    """Numbers the model computes with, however many bits each is stored in."""
    weights = [len(layer.weight) * layer.columns for _, layer in named_packed_layers(model)]
    floats = [module for module in model.modules() if isinstance(module, BufferedLinear)]
    numbers = [*model.parameters(), *(tensor for layer in floats for tensor in layer.buffers())]
    return sum(tensor.numel() for tensor in numbers) + sum(weights)
