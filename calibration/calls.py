"""What a pipeline is called with, as its signature and the words beside it say."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from diffpress.export.errors import UserError

from .media import EXAMPLES, Medium

Takes = Literal["prompt", "label", "nothing"]
"""What a pipeline is asked for."""
TEXTS = {"prompt": "prompt", "label": "class_labels"}
"""The argument that says it."""
OURS = {
    "generator": "--seed, or `seed` in a recipe,",
    "num_inference_steps": "sampling.steps (--steps)",
    "guidance_scale": "sampling.guidance_scale (--guidance)",
    "output_type": "what is compared",
    "return_dict": "what is compared",
    "batch_size": "record.batch",
    "num_images_per_prompt": "record.trajectories",
    "num_videos_per_prompt": "record.trajectories",
    "num_waveforms_per_prompt": "record.trajectories",
}
"""Arguments that no call gives for itself, and what settles them."""
SIZES = {"height": ("height",), "width": ("width",), "frames": ("num_frames", "video_length")}
"""Options of the command line, and what the argument of that meaning may be called."""


@dataclass(frozen=True)
class Parameter:
    """An argument that a pipeline's call takes."""

    name: str
    medium: Medium | None
    """What file it is given as; None for texts and numbers."""
    needed: bool
    default: Any
    takes_pictures: bool
    """Whether pictures are given as such; else as a tensor."""
    batched: bool = True
    """Whether a sound has an axis of the batch."""


class Call(NamedTuple):
    """What a class of pipelines is called with."""

    name: str
    """Of the class."""
    takes: Takes
    parameters: Mapping[str, Parameter]
    takes_lists: bool
    """Whether one call can make several images, each with its own text and noise."""

    def needs(self) -> list[Parameter]:
        """What has to be given beside a text."""
        texts = {*TEXTS.values(), *OURS}
        return [own for own in self.parameters.values() if own.needed and own.name not in texts]


def call_of(pipeline: Any) -> Call:
    """How a pipeline, or a class of pipelines, is called."""
    return _call_of(pipeline if isinstance(pipeline, type) else type(pipeline))


@functools.lru_cache(maxsize=64)
def _call_of(pipeline_class: Any) -> Call:
    function = pipeline_class.__call__
    described = inspect.getdoc(function) or ""
    plain = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [own for own in list(inspect.signature(function).parameters.values())[1:] if own.kind not in plain]
    known = {own.name: _parameter(own, described) for own in parameters}
    classes = known.get("class_labels")
    takes: Takes = "prompt" if "prompt" in known else "label" if classes and classes.needed else "nothing"
    told = TEXTS.get(takes, "batch_size")
    words = {own.name: str(own.annotation) for own in parameters}
    unsaid = str(inspect.Parameter.empty)
    lists = told in known and (
        takes == "nothing" or "list" in words[told].lower() or words[told] == unsaid or takes == "label"
    )
    several = words.get("generator", "list")
    return Call(
        pipeline_class.__name__,
        takes,
        known,
        lists and ("list" in several.lower() or several in (unsaid, "Any", "typing.Any")),
    )


def _parameter(own: inspect.Parameter, described: str) -> Parameter:
    words = "" if own.annotation is own.empty else str(own.annotation)
    pictures = re.search("PIL|PipelineImageInput", words) is not None
    medium = _medium(own.name, words, pictures)
    needed = _is_needed(own, words, medium, described)
    # As `of shape [channels, samples]`.
    alone = re.search(rf"^\s*{re.escape(own.name)}:? *\([^)]*\) *:.{{0,80}}?[\[(]channels", described, re.M | re.S)
    return Parameter(own.name, medium, needed, own.default, pictures, batched=alone is None)


def _medium(name: str, words: str, pictures: bool) -> Medium | None:
    """Told by the annotation, and by the name where that leaves it open."""
    if re.search(r"(latents|embeds|embeddings|codes)$", name):
        return "array"
    if name.endswith("rate"):
        return None
    if pictures:
        if re.search("video|frames", name):
            return "video"
        return "mask" if "mask" in name else "image"
    if "Tensor" not in words and "ndarray" not in words:
        return None
    if re.search("audio|waveform", name):
        return "audio"
    if re.search(r"(^|_)video$", name):
        return "video"
    if re.search(r"^(mask|mask_image|control_mask)$", name):
        return "mask"
    return "image" if re.search(r"(^|_)(image|hint|depth_map)$", name) else "array"


def _is_needed(own: inspect.Parameter, words: str, medium: Medium | None, described: str) -> bool:
    """An argument without a default; or a file whose default is None where neither annotation nor words allow that.

    diffusers gives pictures that are needed the default None, and says `optional` of those that are not.
    """
    if own.default is own.empty:
        return True
    if own.default is not None or medium in (None, "array") or re.search("None|Optional", words):
        return False
    said = re.search(rf"^\s*{re.escape(own.name)}:? *\((.*?)\) *:", described, re.MULTILINE | re.DOTALL)
    return said is not None and ("optional" not in said[1] or "control" in own.name)


def check_arguments(call: Call, given: Mapping[str, Any], where: str) -> None:
    """Raises UserError where the call takes no such argument, or it is settled elsewhere; `where` says who gave it."""
    for name in given:
        if name in OURS:
            raise UserError(f"{where}.{name}: {OURS[name]} settles it. Leave it out here.")
        if name not in call.parameters and name not in ("label", "prompt"):
            close = get_close_matches(name, call.parameters, 1, 0.6)
            hint = f" Did you mean {close[0]}?" if close else ""
            known = ", ".join(own for own in call.parameters if own not in OURS)
            raise UserError(f"{where}.{name}: {call.name} has no such argument.{hint} It takes {known}.")


def check_needs(call: Call, given: Mapping[str, Any], drawn: bool) -> None:
    """Raises UserError where a needed argument is not `given`, nor `drawn` by us; it says how to give it."""
    for own in call.needs():
        if own.name not in given and not (drawn and can_be_drawn(own)):
            raise UserError(f"{call.name} needs {own.name}: {how_to_give(call, own)}.")


def can_be_drawn(own: Parameter) -> bool:
    """Whether there is something to stand in for it."""
    return own.medium is not None and own.medium != "array"


def how_to_give(call: Call, own: Parameter) -> str:
    """In words, on the command line and in a recipe."""
    value = EXAMPLES[own.medium] if own.medium else "VALUE"
    flag = next((flag for flag in MEDIA_FLAGS if flag_parameter(call, flag) == own.name), None)
    option = f"--{flag} {value}" if flag else f"--set sampling.call.{own.name}={value}"
    return f"give {option}, or in a recipe `sampling: {{call: {{{own.name}: {value}}}}}` or `record.calls`"


MEDIA_FLAGS = ("image", "mask", "control")
CONTROL = "control|condition|hint|pose"


def flag_parameter(call: Call, flag: str) -> str | None:
    """The argument that `--image`, `--mask` or `--control` gives; None where the pipeline has none.

    A pipeline whose only picture is the control image calls it `image`.
    """
    return next(_candidates(call, flag), None)


def _candidates(call: Call, flag: str) -> Iterator[str]:
    shown = [own for own in call.parameters.values() if own.medium in ("image", "video", "mask")]
    control = [own.name for own in shown if re.search(CONTROL, own.name) and own.medium != "mask"]
    if flag == "mask":
        yield from (own.name for own in shown if own.medium == "mask")
    elif flag == "control":
        yield from control
        if "ControlNet" in call.name or "controlnet_conditioning_scale" in call.parameters:
            yield from (own.name for own in shown if own.name == "image")
    else:
        plain = [own for own in shown if own.medium != "mask" and own.name not in control]
        plain.sort(key=lambda own: (own.name not in ("image", "video"), not own.needed, "adapter" in own.name))
        yield from (own.name for own in plain)


def flag_arguments(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the options `height`, `width`, `frames`, `image`, `mask` and `control`; None is left out.

    Raises UserError where the pipeline takes nothing of the kind.
    """
    found = {}
    for flag, value in given.items():
        if value is None:
            continue
        sizes = (own for own in SIZES.get(flag, ()) if own in call.parameters)
        name = next(sizes, None) if flag in SIZES else flag_parameter(call, flag)
        if name is None:
            raise UserError(f"--{flag} {value}: a {call.name} takes none. Leave it out.")
        found[name] = value
    return found


OutputKind = Literal["image", "video", "audio", "array"]
OUTPUTS: dict[str, OutputKind] = {
    "frames": "video",
    "videos": "video",
    "video": "video",
    "images": "image",
    "image": "image",
    "audios": "audio",
    "audio": "audio",
    "rgb": "image",
}
"""What comes back under these names, the most telling first."""


def output_kind(pipeline: Any) -> OutputKind:
    """What a pipeline gives, as the type of its output says; of one that says nothing it is taken to be images."""
    pipeline_class = pipeline if isinstance(pipeline, type) else type(pipeline)
    function: Callable[..., Any] = inspect.unwrap(pipeline_class.__call__)
    names: Sequence[str] = getattr(getattr(function, "__code__", None), "co_names", ())
    types = [getattr(function, "__globals__", {}).get(name) for name in names if name.endswith("Output")]
    fields = {field for own in types for field in getattr(own, "__dataclass_fields__", ())}
    known = [kind for name, kind in OUTPUTS.items() if name in fields]
    return known[0] if known else "array" if fields else "image"
