"""What layers see, measured while recorded calls are replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration import replaying
from diffpress.calibration.conditions import conditions
from diffpress.calibration.moments import SecondMoments
from diffpress.calibration.observe import (
    KEPT_ROWS,
    ROWS,
    RangeCandidates,
    channel_weights,
    layer_matrix,
    observe_inputs,
    range_errors,
    rounding_errors,
    row_count,
    rows_at,
)
from diffpress.calibration.replaying import SHARDS, looked_at, observed_shards, replay_with
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, replay
from diffpress.calibration.trajectory import Trajectories, record
from diffpress.export.artifact import load_pipeline
from diffpress.export.folder import PipelineFolder
from diffpress.kernels import dequantize, quantize, quantize_dequantize

FLOAT = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def observed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[nn.Module, Trajectories]]:
    """A function: the denoiser of that name, and three recorded shards of it."""
    made: dict[str, tuple[nn.Module, Trajectories]] = {}

    def get(name: str) -> tuple[nn.Module, Trajectories]:
        if name not in made:
            pipeline = load_pipeline(PipelineFolder(request.getfixturevalue(name), name))
            folder = tmp_path_factory.mktemp("observed")
            wanted = conditions(pipeline, "builtin", 5, 0)
            made[name] = denoiser_of(pipeline), record(pipeline, wanted, Sampling(3, 3.0), folder, batch=2)
        return made[name]

    return get


def layers_of(denoiser: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)) -> dict[str, nn.Module]:
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, kinds)}


def every_row(layer: nn.Module, x: Tensor) -> Tensor:
    return rows_at(layer, x, torch.arange(row_count(layer, x)))


def fed(denoiser: nn.Module, layer: str, runs: Trajectories) -> dict[int, Tensor]:
    """Everything that one layer is fed at each step, as rows."""
    rows: dict[int, list[Tensor]] = {}
    module = denoiser.get_submodule(layer)
    replay_with(
        denoiser, {layer: module}, runs, lambda _, x, step: rows.setdefault(step, []).append(every_row(module, x))
    )
    return {step: torch.cat(parts) for step, parts in rows.items()}


@pytest.mark.parametrize("source", ["tiny_class", "tiny_pixels"])
def test_ranges_and_moments_are_those_of_the_inputs(
    source: str, observed: Callable[[str], tuple[nn.Module, Trajectories]]
) -> None:
    denoiser, runs = observed(source)
    layers = layers_of(denoiser)
    seen = observe_inputs(denoiser, layers, runs, seed=0)
    for name in list(layers)[::5]:
        steps, own = fed(denoiser, name, runs), seen[name]
        rows = torch.cat(list(steps.values()))
        # Ranges hold zero, which every code must be able to say.
        assert torch.equal(own.low, rows.amin(0).clamp(max=0))
        assert torch.equal(own.high, rows.amax(0).clamp(min=0))
        assert torch.equal(own.largest, rows.abs().amax(0))
        moment = rows.double().square().mean(0)
        assert ((own.second_moment - moment).abs() <= len(rows) * FLOAT * moment).all()
        assert own.rows.shape[0] <= KEPT_ROWS
        assert own.rows.shape[1] == rows.shape[1]
        # Every kept row is one that was fed.
        assert ((own.rows[:10, None] == rows[None]).all(2).any(1)).all()


def test_first_layer_sees_what_was_recorded(observed: Callable[[str], tuple[nn.Module, Trajectories]]) -> None:
    denoiser, runs = observed("tiny_pixels")
    own = observe_inputs(denoiser, {"conv_in": denoiser.get_submodule("conv_in")}, runs, seed=0)["conv_in"]
    samples = torch.cat([call.inputs["sample"] for call in runs.calls()])
    assert own.high == samples.max()
    assert own.low == samples.min()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tiny_class", ("timestep_embedder", "norm1.linear", "proj_out_1")),
        ("tiny_pixels", ("time_",)),
        ("tiny_text", ("time_", "attn2.to_k", "attn2.to_v")),
    ],
)
def test_conditioning_layers_are_fed_one_row_an_image_or_the_same_at_every_step(
    source: str, expected: tuple[str, ...], observed: Callable[[str], tuple[nn.Module, Trajectories]]
) -> None:
    denoiser, runs = observed(source)
    for name, own in observe_inputs(denoiser, layers_of(denoiser), runs, seed=0).items():
        assert own.conditioning == any(word in name for word in expected), name


@pytest.mark.parametrize("source", ["tiny_class", "tiny_pixels"])
def test_multiplications_are_those_that_torch_counts(
    source: str, observed: Callable[[str], tuple[nn.Module, Trajectories]]
) -> None:
    denoiser, runs = observed(source)
    seen = observe_inputs(denoiser, layers_of(denoiser), runs, seed=0)
    # Products within attention are no layer's.
    layers = [torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.convolution]
    with FlopCounterMode(display=False) as counter:
        for call in runs.calls(runs.shards):
            replay(denoiser, call)
    counted = counter.get_flop_counts()["Global"]
    assert 2 * sum(entry.macs for entry in seen.values()) == sum(counted.get(operation, 0) for operation in layers)


def test_layers_that_are_never_called_are_missing(observed: Callable[[str], tuple[nn.Module, Trajectories]]) -> None:
    denoiser, runs = observed("tiny_class")
    layers = {"stranger": nn.Linear(3, 3), "known": denoiser.get_submodule("proj_out_2")}
    assert set(observe_inputs(denoiser, layers, runs, seed=0)) == {"known"}


class Late(nn.Module):
    """Calls one of its layers from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.late = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.always(sample)
        return (self.late(x) if float(timestep) < 900 else x,)


def test_layers_may_be_called_first_at_a_later_step(observed: Callable[[str], tuple[nn.Module, Trajectories]]) -> None:
    _, runs = observed("tiny_pixels")
    denoiser = Late()
    seen = observe_inputs(denoiser, layers_of(denoiser), runs, seed=0)
    calls = [call for call in runs.calls() if float(call.inputs["timestep"].flatten()[0]) < 900]
    fed = torch.cat([denoiser.always(call.inputs["sample"].float()) for call in calls])
    assert 0 < len(calls) < len(list(runs.calls()))
    assert seen["late"].high == fed.max().clamp(min=0)
    assert seen["late"].low == fed.min().clamp(max=0)


class Conditioned(nn.Module):
    """Looks at a prompt, the same at every step of a run, and at the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.sees_prompt, self.sees_sample = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.sees_sample(sample) + self.sees_prompt(prompt),)


class Guided:
    """Recorded runs of two shards and four steps; at the steps `guided`, one call of two parts or two calls of one."""

    shards: ClassVar = [Path("a"), Path("b")]
    timesteps: ClassVar = [9.0, 6.0, 3.0, 0.0]

    def __init__(self, guided: set[int], calls: int) -> None:
        self.guided, self.of_guided = guided, calls

    def steps(self, shard: Path) -> list[int]:
        return [call.step for call in self.calls([shard])]

    def call(self, shard: Path, index: int) -> Call:
        return self.calls([shard])[index]

    def calls(self, shards: list[Path]) -> list[Call]:
        found = []
        for shard in shards:
            generator = torch.Generator().manual_seed(ord(shard.name))
            prompts = torch.randn(2, 3, 2, generator=generator)
            for step, time in enumerate(self.timesteps):
                own = prompts if step in self.guided else prompts[:1]
                for part in own.chunk(self.of_guided if step in self.guided else 1):
                    sample = torch.randn(len(part), 3, 2, generator=generator)
                    inputs = {"sample": sample, "timestep": torch.tensor(time), "prompt": part}
                    found.append(Call(inputs, sample, step))
        return found


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("guided", [{0, 1, 2, 3}, {0, 1}, {1, 2}, set()], ids=str)
def test_prompts_are_told_from_samples_however_guidance_calls(guided: set[int], calls: int) -> None:
    denoiser = Conditioned()
    seen = observe_inputs(denoiser, layers_of(denoiser), Guided(guided, calls), seed=0)  # type: ignore[arg-type]
    assert {name: own.conditioning for name, own in seen.items()} == {"sees_prompt": True, "sees_sample": False}


@pytest.mark.parametrize("guided", [{0, 1, 2, 3}, set()], ids=str)
def test_of_many_steps_shards_are_asked_by_turns(guided: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that begins with the second step tells conditioning layers as well."""
    monkeypatch.setattr(replaying, "MANY_STEPS", 4)
    runs: Any = Guided(guided, 1)
    assert looked_at(runs, runs.shards) == {Path("a"): [0, 2], Path("b"): [1, 3]}
    assert looked_at(runs, runs.shards[:1]) == {Path("a"): [0, 1, 2, 3]}
    assert list(looked_at(runs, [Path(name) for name in "abcdef"]).values()) == [[0], [1], [2], [3], [0], [1]]
    denoiser = Conditioned()
    seen = observe_inputs(denoiser, layers_of(denoiser), runs, seed=0)
    assert {name: own.conditioning for name, own in seen.items()} == {"sees_prompt": True, "sees_sample": False}


class Shared(nn.Module):
    """Feeds one tensor to three layers in turn, but changes it before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = sample.clone()
        y = self.a(x) + self.b(x)
        x += 100
        return (y + self.c(x),)


def test_layers_that_share_an_input_see_it_as_it_is_when_they_are_called(
    observed: Callable[[str], tuple[nn.Module, Trajectories]],
) -> None:
    _, runs = observed("tiny_pixels")
    denoiser = Shared()
    layers = layers_of(denoiser)
    moments = SecondMoments(denoiser, layers, runs, 0)
    seen = observe_inputs(denoiser, layers, runs, seed=0, others=[moments.look])
    samples = torch.cat([call.inputs["sample"].float() for call in runs.calls()])
    assert seen["a"].high.max() == seen["b"].high.max() == samples.max()
    assert seen["c"].high.max() == (samples + 100).max()
    h = dict(moments.of(layers))
    assert torch.equal(h["a"], h["b"])
    assert (h["c"].diagonal(dim1=1, dim2=2) > 50**2).all()


def test_same_seed_keeps_the_same_rows_and_hooks_are_gone(
    observed: Callable[[str], tuple[nn.Module, Trajectories]],
) -> None:
    denoiser, runs = observed("tiny_class")
    layers = {"known": denoiser.get_submodule("transformer_blocks.0.attn1.to_q")}
    first, second, other = (observe_inputs(denoiser, layers, runs, seed)["known"].rows for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())


def test_hooks_are_gone_after_a_failure(observed: Callable[[str], tuple[nn.Module, Trajectories]]) -> None:
    denoiser, runs = observed("tiny_class")

    def fail(name: str, x: Tensor, step: int) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="known"):
        replay_with(denoiser, {"known": denoiser.get_submodule("proj_out_2")}, runs, fail)
    assert not any(module._forward_pre_hooks for module in denoiser.modules())


def test_progress_counts_shards(observed: Callable[[str], tuple[nn.Module, Trajectories]]) -> None:
    denoiser, runs = observed("tiny_class")
    told: list[tuple[int, int]] = []
    observe_inputs(denoiser, {"a": denoiser.get_submodule("proj_out_2")}, runs, 0, lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("count", [1, 2, SHARDS, SHARDS + 1, 50, 1000])
def test_at_most_so_many_shards_are_looked_at_spread_over_all(count: int, tmp_path: Path) -> None:
    names = [f"shard-{index:05d}.safetensors" for index in range(count)]
    for name in names:
        (tmp_path / name).touch()
    chosen = [path.name for path in observed_shards(Trajectories(tmp_path))]
    assert len(chosen) <= SHARDS
    positions = [names.index(name) for name in chosen]
    assert positions == list(range(0, count, max(1, -(-count // SHARDS))))
    # The last one is within one stride of the end.
    assert count - positions[-1] <= -(-count // SHARDS)


def test_rows_are_positions() -> None:
    image = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    rows = every_row(nn.Conv2d(3, 1, 1), image)
    assert rows.shape == (40, 3)
    assert rows[23].tolist() == image[1, :, 0, 3].tolist()
    tokens = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert every_row(nn.Linear(3, 1), tokens)[5].tolist() == tokens[1, 1].tolist()


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, (3, 2))], ids=["linear", "convolution"])
def test_errors_of_a_grid_are_those_at_the_output_of_independent_channels(layer: nn.Module) -> None:
    """Against the definition: the mean over rows and the sum over channels and taps, in float64."""
    generator = torch.Generator().manual_seed(0)
    rows, smoothing = torch.randn(50, 6, generator=generator), torch.rand(6, generator=generator) + 0.5
    grid = RangeCandidates(torch.tensor([0.5, 0.25]), torch.tensor([3.0, -2.0]))
    weights = channel_weights(layer, smoothing)
    found = range_errors(rows * smoothing, weights, grid, 4)
    assert grid.zero_point is not None
    for index, (scale, zero) in enumerate(zip(grid.scale, grid.zero_point, strict=True)):
        fed_rows = rows * smoothing
        error = dequantize(quantize(fed_rows, scale, 4, zero), scale, zero).double() - fed_rows
        heavy = (layer_matrix(layer).double() / smoothing[None, :, None]).square().sum((0, 2))
        expected = float((error.square().mean(0) * heavy).sum())
        terms = 50 + 6 + layer_matrix(layer)[:, 0].numel()
        assert float(found[index]) == pytest.approx(expected, rel=terms * FLOAT)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [None, 1.0])
def test_rounded_to_is_quantize_then_dequantize(bits: int, zero: float | None) -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3
    scale, zero_point = torch.tensor([0.3]), None if zero is None else torch.tensor([zero])
    expected = dequantize(quantize(values, scale, bits, zero_point), scale, zero_point)
    assert torch.equal(quantize_dequantize(values, scale, bits, zero_point), expected)


def test_rounding_errors_part_the_shards_into_halves(
    observed: Callable[[str], tuple[nn.Module, Trajectories]],
) -> None:
    """With layers of so few rows that all of them are looked at, each half is what its own shards give."""
    denoiser, runs = observed("tiny_class")
    name = "transformer_blocks.0.attn1.to_q"
    layer = denoiser.get_submodule(name)
    grid = RangeCandidates(torch.tensor([0.5, 0.1, 0.02]), None)
    smoothing: Any = torch.linspace(0.5, 2, 16)
    found = rounding_errors(denoiser, {name: layer}, runs, {name: grid}, {name: smoothing}, {name: 4}, seed=0)[name]
    assert found.shape == (2, 3, 3)
    halves = [runs.shards[0::2], runs.shards[1::2]]
    expected = torch.zeros(2, 3, 3)
    for half, shards in enumerate(halves):

        def look(_: str, x: Tensor, step: int, half: int = half) -> None:
            rows = every_row(layer, x)
            assert len(rows) <= ROWS
            expected[half, step] += range_errors(rows * smoothing, channel_weights(layer, smoothing), grid, 4)

        replay_with(denoiser, {name: layer}, runs, look, shards=shards)
    assert torch.equal(found, expected)


def test_one_shard_is_both_halves(tiny_pixels: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_pixels, "x"))
    runs = record(pipeline, conditions(pipeline, "builtin", 1, 0), Sampling(2), tmp_path, batch=1)
    denoiser = denoiser_of(pipeline)
    layers = {"conv_in": denoiser.get_submodule("conv_in")}
    grids, ones = {"conv_in": RangeCandidates(torch.tensor([0.1]), None)}, {"conv_in": torch.ones(1)}
    first, second = rounding_errors(denoiser, layers, runs, grids, ones, {"conv_in": 8}, seed=0)["conv_in"]
    assert torch.equal(first, second)
    assert (first > 0).all()
