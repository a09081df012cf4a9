"""From how layers are rounded to what the artifact stores: edits, their tensors, and the plan for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffpress.export.edits import Edit, Pack, QuantizeAttention
from diffpress.export.manifest import PlanRow
from diffpress.kernels import pack_codes

from .attention import AttentionChoice
from .overlay import QuantizedLayer


@dataclass
class QuantizationResult:
    """What a method found for one component: how each layer is rounded, and why others are left alone."""

    component: str
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Per layer, why it was left alone or got another format than asked."""
    sensitivity: dict[str, float] = field(default_factory=dict)
    """Relative squared error of the denoiser's output when only this layer is rounded."""
    attention: dict[str, AttentionChoice] = field(default_factory=dict)
    """Per module that computes some, where the recipe asks for integers in it."""
    history: list[dict[str, float]] = field(default_factory=list)
    """How learning went: iteration, loss, evaluation."""


def drop_what_does_not_shrink_(found: QuantizationResult, stored: Mapping[str, Tensor]) -> None:
    """Leave layers alone that would take as many bytes packed as they do in `stored`."""
    for name, layer in list(found.layers.items()):
        if _bytes(_packed_tensors(name, layer)) >= _bytes(_replaced_tensors(name, layer, stored)):
            del found.layers[name]
            found.reasons[name] = "would not be smaller"


def edits_and_tensors(found: QuantizationResult) -> tuple[list[Edit], dict[str, Tensor]]:
    """What the artifact stores of one component: one edit a layer or attention, and the tensors of all."""
    edits: list[Edit] = [_edit(found.component, name, layer) for name, layer in found.layers.items()]
    edits += [
        _attend(found.component, name, choice) for name, choice in found.attention.items() if choice.products != "none"
    ]
    tensors = [_packed_tensors(name, layer) for name, layer in found.layers.items()]
    return edits, {name: tensor for own in tensors for name, tensor in own.items()}


def _edit(component: str, module: str, layer: QuantizedLayer) -> Pack:
    return Pack.model_validate(
        {
            "component": component,
            "module": module,
            "weight_bits": layer.format.weight_bits,
            "activation_bits": layer.format.activation_bits,
            "group_size": layer.format.group_size,
            "float8": layer.format.float8,
            "asymmetric": layer.zero_point is not None,
            "smoothed": layer.smoothing is not None,
        }
    )


def _attend(component: str, module: str, choice: AttentionChoice) -> QuantizeAttention:
    return QuantizeAttention(component=component, module=module, integer_values=choice.products == "all")


def _packed_tensors(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    codes = layer.codes.flatten(1)
    tensors = {
        "weight": codes if layer.format.float8 else pack_codes(codes, layer.format.weight_bits),
        "weight_scale": layer.weight_scale,
        "activation_scale": layer.activation_scale,
        "zero_point": layer.zero_point,
        "smoothing": layer.smoothing,
        "bias": layer.bias,
    }
    return {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items() if tensor is not None}


def _replaced_tensors(name: str, layer: QuantizedLayer, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [f"{name}.weight"] if layer.bias is None else [f"{name}.weight", f"{name}.bias"]
    return {name: stored[name] for name in names if name in stored}


def plan_rows(found: QuantizationResult, stored: Mapping[str, Tensor], packed: Mapping[str, Tensor]) -> list[PlanRow]:
    """One row a weighted module: its format, bytes before and after, and why it was left alone or got more bits.

    After them one row an attention that the recipe would have on integers.
    """
    rows = []
    for module in dict.fromkeys(map(_module_of, stored)):
        own = {name: tensor for name, tensor in stored.items() if _module_of(name) == module}
        new = {name: tensor for name, tensor in packed.items() if _module_of(name) == module}
        layer = found.layers.get(module)
        first = own.get(f"{module}.weight", next(iter(own.values())))
        kept = {name: tensor for name, tensor in own.items() if name not in new}
        rows.append(
            PlanRow(
                component=found.component,
                module=module,
                shape=tuple(first.shape),
                format=_format_name(found.component, module, layer) if layer else str(first.dtype)[6:],
                source_bytes=_bytes(own),
                bytes=_bytes(kept) + _bytes(new),
                reason=found.reasons.get(module, "" if layer else "not of a kind that is quantized"),
                error=found.sensitivity.get(module),
            )
        )
    return rows + [_attention_row(found.component, module, choice) for module, choice in found.attention.items()]


def _attention_row(component: str, module: str, choice: AttentionChoice) -> PlanRow:
    return PlanRow(
        component=component,
        module=module,
        shape=choice.shape,
        format="attention float" if choice.products == "none" else _attend(component, module, choice).format,
        source_bytes=0,
        bytes=0,
        reason=choice.reason,
        error=choice.error,
    )


def _format_name(component: str, module: str, layer: QuantizedLayer) -> str:
    """As the edit says it, but for a group that is a whole row, which is no group."""
    whole_row = layer.format.group_size is not None and layer.weight_scale.shape[-1] == 1
    return f"W{layer.format.weight_bits}" if whole_row else _edit(component, module, layer).format


def _module_of(name: str) -> str:
    """The module a tensor belongs to; a parameter of the model itself stands for its own."""
    return name.rpartition(".")[0] or name


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
