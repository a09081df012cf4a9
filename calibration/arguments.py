"""From a condition to the arguments of a pipeline's call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .calls import Call, Parameter
from .media import MediaFile, Setting, Sound, StandIn, picture_tensor

SIDE, FRAMES, RATE, CHANNELS = 256, 9, 16_000, 2
"""Of drawings for a pipeline that says nothing of sizes."""


def opened_arguments(pipeline: Any, call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with their files and drawings opened, each in the form that the call takes it in."""
    setting = _setting(pipeline, call, given)
    opened: dict[str, Any] = {}
    for name, value in given.items():
        found = _open(value, setting)
        opened[name] = _as_taken(call.parameters[name], found) if name in call.parameters else found
        rate = name.removesuffix("_waveforms") + "_sampling_rate"
        if isinstance(found, Sound) and rate in call.parameters:
            opened.setdefault(rate, found.rate)
    return opened


def _open(value: Any, setting: Setting) -> Any:
    if isinstance(value, (MediaFile, StandIn)):
        return value.open(setting)
    return [_open(item, setting) for item in value] if isinstance(value, list) else value


def _as_taken(parameter: Parameter, value: Any) -> Any:
    if isinstance(value, Sound):
        return value.samples[None] if parameter.batched else value.samples
    if parameter.takes_pictures or parameter.medium == "array":
        return value
    if isinstance(value, Image.Image):
        return picture_tensor(value)
    if isinstance(value, list) and value and isinstance(value[0], Image.Image):
        # [1, C, F, H, W], as pipelines take videos that are tensors.
        return torch.stack([picture_tensor(frame)[0] for frame in value], 1)[None]
    return value


def _setting(pipeline: Any, call: Call, given: Mapping[str, Any]) -> Setting:
    """What drawings have to fit to: the first picture that is given, what the call says, or what the model was made for."""
    sizes = [size for value in given.values() if (size := _size_of(value)) is not None]
    natural = (_side(pipeline, call, given, "width"), _side(pipeline, call, given, "height"))
    size = sizes[0] if sizes else natural
    frames = _number(call, given, "num_frames") or FRAMES
    return Setting(size[0], size[1], frames, rate_of(pipeline), _channels(pipeline))


def _size_of(value: Any) -> tuple[int, int] | None:
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, MediaFile) or first.medium in ("audio", "array"):
        return None
    found = first.open(Setting(1, 1, 1, 1, 1))
    return (found[0] if isinstance(found, list) else found).size


def _number(call: Call, given: Mapping[str, Any], name: str) -> int | None:
    """What is given, or the call's own default."""
    own = call.parameters.get(name)
    value = given.get(name, own.default if own else None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _side(pipeline: Any, call: Call, given: Mapping[str, Any], name: str) -> int:
    found = _number(call, given, name)
    if found is not None:
        return found
    scale = getattr(pipeline, "vae_scale_factor", 1)
    known = getattr(pipeline, "default_sample_size", None)
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    side = known if isinstance(known, int) else getattr(getattr(denoiser, "config", None), "sample_size", None)
    if isinstance(side, (list, tuple)) and len(side) == 2:
        side = side[name == "width"]
    return side * (scale if isinstance(scale, int) else 1) if isinstance(side, int) else SIDE


def rate_of(pipeline: Any) -> int:
    """Samples a second of the sounds that a pipeline makes, as its models' configurations say."""
    for model in getattr(pipeline, "components", {}).values():
        config = getattr(model, "config", None)
        for name in ("sampling_rate", "sample_rate"):
            found = getattr(config, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return RATE


def _channels(pipeline: Any) -> int:
    config = getattr(getattr(pipeline, "vae", None), "config", None)
    found = getattr(config, "audio_channels", None)
    return found if isinstance(found, int) else CHANNELS


def several(values: Sequence[Any]) -> Any:
    """One value as it is, several as a list."""
    return values[0] if len(values) == 1 else list(values)
