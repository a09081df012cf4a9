"""From how layers are rounded to what the artifact stores: edits, their tensors, and notes for the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffpress.export.edits import Edit, Pack, QuantizeAttention
from diffpress.export.source import Form
from diffpress.export.tensor_files import save_tensors
from diffpress.kernels import pack_codes

from .attention import AttentionChoice
from .changes import Changes, Note
from .quantized_layer import Format, QuantizedLayer


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


def drop_what_does_not_shrink_(result: QuantizationResult, forms: Mapping[str, Form]) -> None:
    """Leave layers alone that would take as many bytes packed as they do in the `forms` that the source stores."""
    for name, layer in list(result.layers.items()):
        replaced = [f"{name}.weight"] if layer.bias is None else [f"{name}.weight", f"{name}.bias"]
        before = sum(forms[tensor].size_bytes for tensor in replaced if tensor in forms)
        if sum(tensor.nbytes for tensor in _packed_tensors(name, layer).values()) >= before:
            del result.layers[name]
            result.reasons[name] = "would not be smaller"


def edits_and_tensors(result: QuantizationResult) -> tuple[list[Edit], dict[str, Tensor]]:
    """What the artifact stores of one component: one edit a layer or attention, and the tensors of all."""
    edits: list[Edit] = [_pack(result.component, name, layer) for name, layer in result.layers.items()]
    chosen = {name: choice for name, choice in result.attention.items() if choice.products != "none"}
    edits += [_quantize_attention(result.component, name, choice) for name, choice in chosen.items()]
    tensors = [_packed_tensors(name, layer) for name, layer in result.layers.items()]
    return edits, {name: tensor for packed in tensors for name, tensor in packed.items()}


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
        "weight_scale": layer.stored_scale(),
        "activation_scale": layer.activation_scale,
        "zero_point": layer.zero_point,
        "smoothing": layer.smoothing,
        "bias": layer.bias,
    }
    return {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items() if tensor is not None}


def changes_of(result: QuantizationResult, forms: Mapping[str, Form]) -> Changes:
    """The same as changes of a component that is stored in these `forms`."""
    edits, tensors = edits_and_tensors(result)
    modules = dict.fromkeys([name.rpartition(".")[0] for name in forms] + list(result.layers))
    notes = {module: _note(result, module) for module in modules if module}
    notes |= {
        module: Note(choice.reason, choice.error, _attention_format(result.component, module, choice), choice.shape)
        for module, choice in result.attention.items()
    }
    return Changes(tuple(edits), tensors, notes, tuple(result.history))


def _note(result: QuantizationResult, module: str) -> Note:
    layer = result.layers.get(module)
    reason = result.reasons.get(module, "" if layer else "not of a kind that is quantized")
    # A group that is a whole row is no group.
    whole_row = layer is not None and layer.format.group_size is not None and layer.weight_scale.shape[-1] == 1
    return Note(reason, result.sensitivity.get(module), f"W{layer.format.weight_bits}" if layer and whole_row else None)


def _attention_format(component: str, module: str, choice: AttentionChoice) -> str:
    return "attention float" if choice.products == "none" else _quantize_attention(component, module, choice).words()


def save_result(result: QuantizationResult, path: Path) -> None:
    """Write everything that was found to `path`, a safetensors file; the old file stays until it is whole."""
    tensors = {
        f"{key}/{name}": value.contiguous()
        for name, layer in result.layers.items()
        for key, value in vars(layer).items()
        if isinstance(value, Tensor)
    }
    words = {
        "component": result.component,
        "formats": {name: asdict(layer.format) for name, layer in result.layers.items()},
        "reasons": result.reasons,
        "sensitivity": result.sensitivity,
        "attention": {name: asdict(choice) for name, choice in result.attention.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, {"result": json.dumps(words)})


def load_result(path: Path) -> QuantizationResult | None:
    """What `save_result` wrote; None where there is no readable file."""
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()["result"])
            tensors: dict[str, dict[str, Tensor]] = {name: {} for name in words["formats"]}
            for stored in file.keys():  # noqa: SIM118  # no mapping
                key, _, name = stored.partition("/")
                tensors[name][key] = file.get_tensor(stored)
    except (OSError, SafetensorError):
        return None
    return QuantizationResult(
        words["component"],
        {name: QuantizedLayer(Format(**form), **tensors[name]) for name, form in words["formats"].items()},
        words["reasons"],
        words["sensitivity"],
        {
            name: AttentionChoice(**{**choice, "shape": tuple(choice["shape"])})
            for name, choice in words["attention"].items()
        },
    )
