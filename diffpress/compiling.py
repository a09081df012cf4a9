"""`diffpress.compile`: a loaded artifact's denoiser, compiled with its norms fused into the layers they feed."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffpress.calibration.sampling import denoiser_of
from diffpress.export.errors import UnsupportedModelError
from diffpress.export.runtime import PackedLayer
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
    denoiser = pipeline if isinstance(pipeline, nn.Module) else _denoiser(pipeline)
    if not any(isinstance(module, PackedLayer) for module in denoiser.modules()):
        raise UnsupportedModelError(
            f"diffpress.compile fuses packed layers, and {type(denoiser).__name__} has none. Give it what "
            "`diffpress.load(ARTIFACT)` returns, after `diffpress compress`; torch.compile does for other models."
        )
    return compile_(denoiser, backend, regional=regional, dynamic=dynamic, fullgraph=fullgraph)


def _denoiser(pipeline: Any) -> nn.Module:
    try:
        return denoiser_of(pipeline)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"diffpress.compile takes a pipeline with a unet or transformer, or that module, and got "
            f"{type(pipeline).__name__}. Give it what `diffpress.load(ARTIFACT)` returns."
        ) from error
