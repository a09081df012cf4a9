"""`diffpress.compile` and `diffpress.record_graphs`: a loaded artifact's denoiser, compiled or its calls recorded."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffpress.calibration.sampling import denoisers_of
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import PackedLayer, RuntimePart
from diffpress.export.runtime.call_graphs import GraphedForward
from diffpress.export.runtime.forwards import set_forward
from diffpress.export.runtime.fusion import Backend, Fusions, compile_


def compile(
    pipeline: Any,
    backend: str | Backend = "inductor",
    *,
    regional: bool = False,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Fusions:
    """Have the denoiser of a packed `pipeline`, or a packed denoiser, compiled by its next call; returns what is fused.

    Where a norm feeds packed layers, one pass makes their codes. The options are those of torch.compile; `regional`
    compiles the blocks that repeat, each kind once. Raises UnsupportedModelError where no layer is packed.
    """
    denoiser = _denoiser(pipeline, "compile")
    if not any(isinstance(module, PackedLayer) for module in denoiser.modules()):
        raise UnsupportedModelError(
            f"diffpress.compile fuses packed layers, and {_name(denoiser)} has none. Give it what "
            "`diffpress.load(ARTIFACT)` returns, after `diffpress compress`; torch.compile does for other models."
        )
    return compile_(denoiser, backend, regional=regional, dynamic=dynamic, fullgraph=fullgraph)


def record_graphs(pipeline: Any) -> None:
    """Have the denoiser of a `pipeline` on a GPU, or a denoiser, answer by CUDA graphs; a first call records its form.

    The processor then launches a call as a whole. Modules are recorded as they are: call it again after changing them, as
    adapters and `diffpress.compile` do. Raises UnsupportedModelError where calls cannot be recorded.
    """
    denoisers = _parts(_denoiser(pipeline, "record_graphs"))
    for denoiser in denoisers:
        reason = _why_not_recorded(denoiser)
        if reason:
            raise UnsupportedModelError(f"diffpress.record_graphs cannot record {type(denoiser).__name__}: {reason}.")
    for denoiser in denoisers:
        forward = denoiser.forward
        before = forward.forward if isinstance(forward, GraphedForward) else forward
        set_forward(denoiser, GraphedForward(denoiser, before))


def _why_not_recorded(denoiser: nn.Module) -> str:
    devices = {tensor.device.type for tensor in (*denoiser.parameters(), *denoiser.buffers())}
    if any(isinstance(module, RuntimePart) for module in denoiser.modules()):
        return "its plan computes other parts at other steps. Compile its blocks instead: diffpress.compile(..., regional=True)"
    if any(hasattr(module, "_hf_hook") for module in denoiser.modules()):
        return "it is moved between devices while it runs. Move it to the GPU as a whole: pipeline.to('cuda')"
    if devices != {"cuda"}:
        return f"it lies on {' and '.join(sorted(devices)) or 'no device'}. Move it to a GPU first: pipeline.to('cuda')"
    return ""


def _denoiser(pipeline: Any, function: str) -> nn.Module:
    if isinstance(pipeline, nn.Module):
        return pipeline
    try:
        found = denoisers_of(pipeline)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"diffpress.{function} takes a pipeline with a denoiser, or that module, and got "
            f"{type(pipeline).__name__}. Give it what `diffpress.load(ARTIFACT)` returns."
        ) from error
    return next(iter(found.values())) if len(found) == 1 else nn.ModuleDict(found)


def _name(denoiser: nn.Module) -> str:
    return " and ".join(dict.fromkeys(type(part).__name__ for part in _parts(denoiser)))


def _parts(denoiser: nn.Module) -> list[nn.Module]:
    """The denoisers of a pipeline that has several."""
    return list(denoiser.values()) if isinstance(denoiser, nn.ModuleDict) else [denoiser]
