"""Modules with one tensor out, as graphs are: every argument in its place, nothing in a dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Wrapper(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


class TextEncoder(_Wrapper):
    """Token ids [B, T] to states [B, T, D]."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


class PromptDenoiser(_Wrapper):
    """Sample [B, C, H, W], time step [1] and states [B, T, D] to output [B, C, H, W]."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class DistilledDenoiser(_Wrapper):
    """The same of a model that is told the guidance scale, which is `embedded` [1, E] in the graph."""

    embedded: Tensor

    def __init__(self, model: Any, embedded: Tensor) -> None:
        super().__init__(model)
        self.register_buffer("embedded", embedded, persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        told = self.embedded.expand(sample.shape[0], -1)
        return self.model(sample, timestep, encoder_hidden_states, timestep_cond=told, return_dict=False)[0]


class LabelDenoiser(_Wrapper):
    """Sample [B, C, H, W], time step [1] and classes [B] to output [B, C, H, W]; a learned variance is left out."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        output = self.model(
            sample, timestep=timestep.expand(sample.shape[0]), class_labels=class_labels, return_dict=False
        )[0]
        return output[:, : sample.shape[1]]


class PlainDenoiser(_Wrapper):
    """Sample [B, C, H, W] and time step [1] to output [B, C, H, W]."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.model(sample, timestep, return_dict=False)[0]


class Decoder(_Wrapper):
    """Latents [B, C, H, W] to an image in -1..1."""

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents, return_dict=False)[0]
