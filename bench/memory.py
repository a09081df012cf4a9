"""What learning takes beside running: bytes and seconds on a UNet of Stable Diffusion 1.5's size with random weights."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.functional import pad

from diffpress.calibration.examples import Batch
from diffpress.calibration.observe import layer_matrix
from diffpress.calibration.sampling import answer
from diffpress.compress.importance import StepImportance
from diffpress.compress.layers import find_layers, weights_only
from diffpress.compress.options import Qalora
from diffpress.compress.qalora.blocks import learn_blocks
from diffpress.compress.qalora.layer import QaloraLayer
from diffpress.compress.qalora.student import Student
from diffpress.compress.qalora.train import learn
from diffpress.compress.quantized_layer import Format, QuantizedLayer
from diffpress.kernels import code_range, quantize

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from diffpress_rows import FullWeightLayer
from machine import machine
from rss import peak_rss_bytes, reset_peak, rss_bytes

LATENT, TEXT = (1, 4, 64, 64), (1, 77, 768)
CHANNELS = (320, 640, 1280, 1280)
TIMESTEPS = [float(step) for step in range(961, 0, -40)]
ACTIVATION_REACH = 4.0
"""What the largest code of an input stands for; most of a normalised input lies below, and costs are the same at any."""
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has the C library give memory back at once, so that what is resident is what is alive."""


class Times(NamedTuple):
    """Seconds by the clock and of this process's own, which other processes beside it stretch less."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> Times:
        return cls(perf_counter(), process_time())

    def since(self, begun: Times) -> Times:
        return Times(self.clock - begun.clock, self.processor - begun.processor)


class RandomLessons:
    """In the place of `TrainingData`: random inputs with the teacher's answers, and a evaluate who is always better pleased."""

    def __init__(self, teacher: nn.Module, count: int) -> None:
        self.examples = [self._example(teacher, torch.Generator().manual_seed(seed)) for seed in range(count)]
        self.recorded = self
        self.begun: Times | None = None
        self.steps: list[Times] = []
        """What each step took: from when its batch is asked for until it is evaluated."""

    def batch(self, number: int | list[int], _size: int = 1) -> Batch:
        if torch.is_grad_enabled():
            self.begun = Times.now()
        return self.examples[number % len(self.examples) if isinstance(number, int) else 0]

    def evaluate(self, _student: Student) -> float:
        if self.begun is not None:
            self.steps.append(Times.now().since(self.begun))
        return 1 / (1 + len(self.steps))

    @torch.no_grad()
    def _example(self, teacher: nn.Module, generator: torch.Generator) -> Batch:
        step = int(torch.randint(len(TIMESTEPS), (), generator=generator))
        inputs = {
            "sample": torch.randn(LATENT, generator=generator),
            "timestep": torch.tensor([TIMESTEPS[step]]),
            "encoder_hidden_states": torch.randn(TEXT, generator=generator),
        }
        return Batch(inputs, answer(teacher, inputs, torch.float32), torch.tensor([step]), torch.tensor([0]))


def simple_start(denoiser: nn.Module, options: Qalora) -> dict[str, QuantizedLayer]:
    """Every layer rounded between its largest weights, its input by one scale for all; or groups of weights alone."""
    layers, _ = find_layers(denoiser, options)
    return {name: _simple(layer, options) for name, layer in layers.items() if not isinstance(layer, nn.Embedding)}


@torch.no_grad()
def _simple(layer: nn.Module, options: Qalora) -> QuantizedLayer:
    if options.activation_bits is None:
        return _simple_weights(layer, options)
    weight = layer_matrix(layer)
    scale = weight.abs().amax((1, 2)).clamp(min=1e-8) / code_range(options.weights)[1]
    codes = quantize(weight, scale[:, None, None], options.weights).view(layer.weight.shape)
    activation_scale = torch.full((len(TIMESTEPS),), ACTIVATION_REACH / code_range(options.activation_bits)[1])
    return QuantizedLayer(Format(options.weights, options.activation_bits), codes, scale, activation_scale)


def _simple_weights(layer: nn.Module, options: Qalora) -> QuantizedLayer:
    format = weights_only(layer, options.weights, options.group_size)
    assert format.group_size is not None
    weight = layer.weight.flatten(1)
    groups = pad(weight, (0, -weight.shape[1] % format.group_size)).unflatten(1, (-1, format.group_size))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-8) / code_range(options.weights)[1]
    codes = quantize(groups, scale, options.weights).flatten(1)[:, : weight.shape[1]]
    return QuantizedLayer(format, codes.reshape(layer.weight.shape), scale[..., 0])


def measure(
    options: Qalora, threads: int, channels: Sequence[int] = CHANNELS, layer_type: type[QaloraLayer] = QaloraLayer
) -> dict[str, Any]:
    """Run, then learn, in this process; what rounding the start takes is counted apart."""
    torch.set_num_threads(threads)
    libraries = rss_bytes()
    torch.manual_seed(0)
    denoiser = (
        UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=TEXT[-1]).eval().requires_grad_(False)
    )
    reset_peak()
    begun = Times.now()
    training_data = RandomLessons(denoiser, options.iterations)
    running, took = peak_rss_bytes(), Times.now().since(begun)
    reset_peak()
    student = Student(denoiser, simple_start(denoiser, options), TIMESTEPS, options, 0, layer_type)
    starting = peak_rss_bytes()
    reset_peak()
    losses: list[float] = []

    def report(_done: int, _all: int, loss: float) -> None:
        losses.append(loss)

    with TemporaryDirectory() as folder:
        even = StepImportance(torch.full((len(TIMESTEPS),), 1 / len(TIMESTEPS)), torch.ones(len(TIMESTEPS)))
        if options.order == "blocks":
            learn_blocks(student, training_data, even, options, Path(folder), report)  # type: ignore[arg-type]
        else:
            learn(student, training_data, even, None, options, Path(folder), report)  # type: ignore[arg-type]
    learning = peak_rss_bytes()
    return {
        "denoiser_parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "learned_parameters": sum(parameter.numel() for parameter in student.parameters().values()),
        "libraries_bytes": libraries,
        "running_peak_bytes": running,
        "starting_peak_bytes": starting,
        "learning_peak_bytes": learning,
        "ratio": learning / running,
        "running_seconds": took.clock / options.iterations,
        "running_cpu_seconds": took.processor / options.iterations,
        "step_seconds": median(step.clock for step in training_data.steps),
        "step_cpu_seconds": median(step.processor for step in training_data.steps),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--order", choices=["whole", "blocks"], default="whole")
    parser.add_argument("--full-weights", action="store_true", help="learn whole weights instead of low-rank changes")
    parser.add_argument("--channels", type=int, nargs=4, default=CHANNELS, help="of the UNet's four resolutions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method, as JSON")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        # The C library reads these when a process begins.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    own = {key: json.loads(value) for key, value in (option.split("=", 1) for option in arguments.option)}
    common = {"method": "qalora", "weights": 4, "activations": 4, "batch": 1, "rollout_share": 0}
    chosen = {"iterations": arguments.iterations, "order": arguments.order}
    options = Qalora.model_validate(common | chosen | own)
    layer_type = FullWeightLayer if arguments.full_weights else QaloraLayer
    figures = measure(options, arguments.threads, arguments.channels, layer_type)
    if arguments.json:
        print(json.dumps({"machine": machine(), "options": options.model_dump(), **figures}, indent=1))
        return
    for name, value in figures.items():
        print(f"{name:24} {value / 1e9:.2f} GB" if name.endswith("bytes") else f"{name:24} {value}")


if __name__ == "__main__":
    main()
