"""Post-training quantization: round to nearest with searched scales, no training. The baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffpress.calibration.observe import LayerInput, layer_matrix, observe_inputs, scale_errors
from diffpress.calibration.sampling import Call, replay
from diffpress.calibration.trajectory import Progress, Trajectories
from diffpress.export.edits import Pack
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.manifest import PlanRow
from diffpress.export.runtime import StepClock, why_not_packable
from diffpress.kernels import pack_int4, quantize

from .options import Ptq
from .overlay import Quantization, fake_quantized
from .scales import candidate_scales, choose_step_scales, search_weight_scale


@dataclass
class Quantized:
    """What quantization found: how each layer is rounded, and why others are left alone."""

    layers: dict[str, Quantization] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Per layer, why it was left alone or got more bits than asked."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """Relative squared error of the denoiser's output when only this layer is rounded."""


def quantize_denoiser(
    denoiser: nn.Module,
    stored: Mapping[str, Tensor],
    trajectories: Trajectories,
    options: Ptq,
    seed: int,
    progress: Progress | None = None,
) -> Quantized:
    """Find integers for every Linear and Conv2d of `denoiser`, which itself stays as it is.

    `stored` are its weights as the source stores them. Raises UnsupportedModelError where no layer can be quantized.
    """
    result = Quantized()
    layers = _packable_layers(denoiser, result)
    inputs = observe_inputs(denoiser, layers, trajectories, progress) if layers else {}
    result.reasons |= {name: "never called while recording" for name in layers if name not in inputs}
    layers = {name: layer for name, layer in layers.items() if name in inputs}
    if not layers:
        raise UnsupportedModelError(f"{type(denoiser).__name__} has no Linear or Conv2d that ptq could quantize.")
    bits = _choose_bits(layers, inputs, options, result)
    scales = _search_activation_scales(denoiser, layers, inputs, trajectories, bits, seed, progress)
    for name, layer in layers.items():
        quantization = _quantize_layer(layer, inputs[name], scales[name], bits[name])
        if _bytes(_packed_tensors(name, quantization)) < _bytes({name: stored[f"{name}.weight"]}):
            result.layers[name] = quantization
        else:
            result.reasons[name] = "would not be smaller"
    result.sensitivity = measure_sensitivity(denoiser, result.layers, trajectories)
    return result


def _packable_layers(denoiser: nn.Module, result: Quantized) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        reason = why_not_packable(module)
        if reason is None:
            layers[name] = module
        else:
            result.reasons[name] = reason
    return layers


def _choose_bits(
    layers: Mapping[str, nn.Module], inputs: Mapping[str, LayerInput], options: Ptq, result: Quantized
) -> dict[str, tuple[int, int]]:
    """Weight and activation bits of each layer: as asked, but 8 where an error would reach everything."""
    bits = {}
    order = list(layers)
    edges = {order[0]: "first layer", order[-1]: "last layer"}
    for name in layers:
        reason = edges.get(name) or ("conditioning layer" if inputs[name].conditioning else "")
        bits[name] = (8, 8) if reason else (options.weights, options.activations)
        if reason and bits[name] != (options.weights, options.activations):
            result.reasons[name] = f"{reason}, kept at 8 bits"
    return bits


def _search_activation_scales(
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Mapping[str, LayerInput],
    trajectories: Trajectories,
    bits: Mapping[str, tuple[int, int]],
    seed: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    activation_bits = {name: pair[1] for name, pair in bits.items()}
    candidates = {name: candidate_scales(inputs[name].largest, activation_bits[name]) for name in layers}
    errors = scale_errors(denoiser, layers, trajectories, candidates, activation_bits, seed, progress)
    return {name: choose_step_scales(candidates[name], errors[name])[0] for name in layers}


def _quantize_layer(layer: nn.Module, seen: LayerInput, steps: Tensor, bits: tuple[int, int]) -> Quantization:
    weight = layer_matrix(layer)
    scale = search_weight_scale(weight, seen.second_moment.to(weight.device), bits[0])
    codes = quantize(weight, scale[:, None, None], bits[0])
    shape = layer.weight.shape
    assert isinstance(shape, torch.Size)
    return Quantization(*bits, codes.view(shape), scale, steps)


@torch.no_grad()
def measure_sensitivity(
    denoiser: nn.Module, layers: Mapping[str, Quantization], trajectories: Trajectories
) -> dict[str, float]:
    """Relative squared error of the denoiser's output with one layer rounded at a time, over three steps of one shard."""
    calls = list(trajectories.calls(trajectories.shards[:1]))
    chosen = [calls[0], calls[len(calls) // 2], calls[-1]]
    clock = StepClock(trajectories.timesteps)
    errors = {}
    for name, quantization in layers.items():
        with fake_quantized(denoiser, {name: quantization}, clock):
            errors[name] = sum(_relative_error(denoiser, call) for call in chosen) / len(chosen)
    return errors


def _relative_error(denoiser: nn.Module, call: Call) -> float:
    truth = call.output.float()
    return float((replay(denoiser, call).float().cpu() - truth).square().mean() / truth.square().mean())


def edits_and_tensors(component: str, layers: Mapping[str, Quantization]) -> tuple[list[Pack], dict[str, Tensor]]:
    """What the artifact stores: one Pack edit a layer, and the tensors of all."""
    edits: list[Pack] = []
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        edits.append(
            Pack.model_validate(
                {
                    "component": component,
                    "module": name,
                    "weight_bits": layer.weight_bits,
                    "activation_bits": layer.activation_bits,
                }
            )
        )
        tensors |= _packed_tensors(name, layer)
    return edits, tensors


def _packed_tensors(name: str, layer: Quantization) -> dict[str, Tensor]:
    codes = layer.codes.flatten(1)
    tensors = {
        f"{name}.weight": pack_int4(codes) if layer.weight_bits == 4 else codes,
        f"{name}.weight_scale": layer.weight_scale,
        f"{name}.activation_scale": layer.activation_scale,
    }
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}


def plan_rows(
    component: str, stored: Mapping[str, Tensor], packed: Mapping[str, Tensor], result: Quantized
) -> list[PlanRow]:
    """One row a weighted module: its format, bytes before and after, and why it was left alone or got more bits."""
    rows = []
    for module in dict.fromkeys(map(_module_of, stored)):
        own = {name: tensor for name, tensor in stored.items() if _module_of(name) == module}
        layer = result.layers.get(module)
        first = own.get(f"{module}.weight", next(iter(own.values())))
        kept = {name: tensor for name, tensor in own.items() if layer is None or not name.endswith(".weight")}
        new = {name: tensor for name, tensor in packed.items() if _module_of(name) == module}
        default = "" if layer else "neither Linear nor Conv2d"
        rows.append(
            PlanRow(
                component=component,
                module=module,
                shape=tuple(first.shape),
                format=f"W{layer.weight_bits}A{layer.activation_bits}" if layer else str(first.dtype)[6:],
                source_bytes=_bytes(own),
                bytes=_bytes(kept) + _bytes(new),
                reason=result.reasons.get(module, default),
                error=result.sensitivity.get(module),
            )
        )
    return rows


def _module_of(name: str) -> str:
    """The module a tensor belongs to; a parameter of the model itself stands for its own."""
    return name.rpartition(".")[0] or name


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
