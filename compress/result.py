"""From how layers are rounded to what the artifact stores: edits, their tensors, and notes for the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffpress.export.edits import Edit, Pack, QuantizeAttention
from diffpress.export.source import Form
from diffpress.kernels import pack_codes

from .attention import AttentionChoice
from .changes import Changes, Note
from .quantized_layer import QuantizedLayer


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


def drop_what_does_not_shrink_(found: QuantizationResult, forms: Mapping[str, Form]) -> None:
    """Leave layers alone that would take as many bytes packed as they do in the `forms` that the source stores."""
    for name, layer in list(found.layers.items()):
        replaced = [f"{name}.weight"] if layer.bias is None else [f"{name}.weight", f"{name}.bias"]
        before = sum(forms[tensor].size_bytes for tensor in replaced if tensor in forms)
        if sum(tensor.nbytes for tensor in _packed_tensors(name, layer).values()) >= before:
            del found.layers[name]
            found.reasons[name] = "would not be smaller"


def edits_and_tensors(found: QuantizationResult) -> tuple[list[Edit], dict[str, Tensor]]:
    """What the artifact stores of one component: one edit a layer or attention, and the tensors of all."""
    edits: list[Edit] = [_pack(found.component, name, layer) for name, layer in found.layers.items()]
    chosen = {name: choice for name, choice in found.attention.items() if choice.products != "none"}
    edits += [_quantize_attention(found.component, name, choice) for name, choice in chosen.items()]
    tensors = [_packed_tensors(name, layer) for name, layer in found.layers.items()]
    return edits, {name: tensor for own in tensors for name, tensor in own.items()}


def _pack(component: str, module: str, layer: QuantizedLayer) -> Pack:
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


def _quantize_attention(component: str, module: str, choice: AttentionChoice) -> QuantizeAttention:
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


def changes_of(found: QuantizationResult, forms: Mapping[str, Form]) -> Changes:
    """The same as changes of a component that is stored in these `forms`."""
    edits, tensors = edits_and_tensors(found)
    modules = dict.fromkeys([name.rpartition(".")[0] for name in forms] + list(found.layers))
    notes = {module: _note(found, module) for module in modules if module}
    notes |= {
        module: Note(choice.reason, choice.error, _attention_format(found.component, module, choice), choice.shape)
        for module, choice in found.attention.items()
    }
    return Changes(tuple(edits), tensors, notes, tuple(found.history))


def _note(found: QuantizationResult, module: str) -> Note:
    layer = found.layers.get(module)
    reason = found.reasons.get(module, "" if layer else "not of a kind that is quantized")
    # A group that is a whole row is no group.
    whole_row = layer is not None and layer.format.group_size is not None and layer.weight_scale.shape[-1] == 1
    return Note(reason, found.sensitivity.get(module), f"W{layer.format.weight_bits}" if layer and whole_row else None)


def _attention_format(component: str, module: str, choice: AttentionChoice) -> str:
    return "attention float" if choice.products == "none" else _quantize_attention(component, module, choice).words()
