"""What the user gives a pipeline's calls beside texts, checked before any weight is read, and what stands in for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from diffpress.export.errors import RecipeError, UserError

from .calls import TEXTS, Call, can_be_drawn, check_arguments, check_needs
from .media import MediaFile, Medium, StandIn, media_file, picture_size

SHAPING = ("height", "width", "num_frames", "video_length", "audio_length_in_s", "audio_end_in_s", "audio_start_in_s")
"""What decides how large an output is: the same of all that are compared."""


@dataclass(frozen=True)
class Given:
    """Arguments that all calls share, and those of single calls, taken in turn; paths are of files that can be read."""

    shared: Mapping[str, Any] = field(default_factory=dict)
    calls: Sequence[Mapping[str, Any]] = ()

    def texts(self, call: Call) -> list[str]:
        """The prompts or labels of the single calls; none where they have none."""
        name = TEXTS.get(call.takes, "")
        return [str(own[name]) for own in self.calls if name in own]

    def arguments(self, call: Call, index: int, first_drawing: int) -> dict[str, Any]:
        """Of the call with that number, with a drawing in the place of every file that is needed and not given."""
        own = dict(self.calls[index % len(self.calls)]) if self.calls else {}
        own.pop(TEXTS.get(call.takes, ""), None)
        return {**_drawings(call, {**self.shared, **own}, first_drawing + index), **own}

    def drawn(self, call: Call) -> list[str]:
        """Names of the arguments that drawings stand in for."""
        calls = self.calls or [{}]
        return sorted({name for own in calls for name in _drawings(call, {**self.shared, **own}, 0)})


NOTHING_GIVEN = Given()


def _drawings(call: Call, known: Mapping[str, Any], index: int) -> dict[str, StandIn]:
    missing = [own for own in call.needs() if own.name not in known and can_be_drawn(own)]
    return {own.name: StandIn(own.medium, index) for own in missing if own.medium is not None}


def given_to(
    call: Call,
    shared: Mapping[str, Any],
    calls: Sequence[Mapping[str, Any]],
    folder: Path = Path(),
    drawn: bool = True,
    names: tuple[str, str] = ("sampling.call", "record.calls"),
) -> Given:
    """`shared` and `calls` as data, with paths relative to `folder`, for that kind of pipeline.

    Raises UserError where an argument is unknown, a file cannot be read or, unless it can be `drawn`, something is missing;
    `names` are what the user knows both by.
    """
    own_name = TEXTS.get(call.takes)
    check_arguments(call, shared, names[0])
    if own_name in shared or "label" in shared:
        raise UserError(f"{names[0]}.{own_name}: every image has a text of its own. Give it by record.prompts.")
    opened = Given(_opened(call, shared, folder), [])
    listed = []
    for index, own in enumerate(calls):
        where = f"{names[1]}[{index}]"
        check_arguments(call, own, where)
        renamed = {"class_labels" if name == "label" else name: value for name, value in own.items()}
        unlike = [name for name in SHAPING if renamed.get(name) != calls[0].get(name)]
        if unlike:
            raise UserError(
                f"{where}.{unlike[0]}: all outputs have one size. Give it once for all by {names[0]}.{unlike[0]}."
            )
        if own_name and any(own_name in other or "label" in other for other in calls) and own_name not in renamed:
            raise UserError(f"{where} has no {own_name}, but others have. Give it to all of them or to none.")
        if own_name in renamed and not isinstance(renamed[own_name], (str, int)):
            raise UserError(f"{where}.{own_name} = {renamed[own_name]!r}: give one text.")
        check_needs(call, {**opened.shared, **renamed}, drawn)
        listed.append(_opened(call, renamed, folder))
    if not calls:
        check_needs(call, opened.shared, drawn)
    return replace(opened, calls=_of_one_size(listed))


def _opened(call: Call, data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {name: _with_files(call, name, value, folder) for name, value in data.items()}


def _with_files(call: Call, name: str, value: Any, folder: Path) -> Any:
    """A value with its paths as files, where the argument is given as such."""
    parameter = call.parameters.get(name)
    medium = parameter.medium if parameter else None
    if medium is None:
        return value
    if isinstance(value, list):
        # A list of files is several pictures, or the frames of a video.
        inner: Medium = "image" if medium == "video" else medium
        return [media_file(folder / item, inner) if isinstance(item, str) else item for item in value]
    return media_file(folder / value, medium) if isinstance(value, str) else value


def _of_one_size(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls with every picture of an argument cropped and resized to the first call's, where they differ."""
    sizes: dict[str, tuple[int, int] | None] = {}
    fitted = []
    for own in calls:
        new = dict(own)
        for name, value in own.items():
            if isinstance(value, MediaFile):
                size = picture_size(value)
                first = sizes.setdefault(name, size)
                new[name] = replace(value, size=first) if size != first else value
        fitted.append(new)
    return fitted


def read_calls(path: Path) -> list[dict[str, Any]]:
    """The list of call arguments in a YAML or JSON file. Raises RecipeError where it is none."""
    if not path.is_file():
        raise RecipeError(f"record.calls: there is no file {path}. Give a YAML or JSON list of call arguments.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"record.calls: {path} is no YAML or JSON ({error}).") from error
    if not isinstance(data, list) or not data or not all(isinstance(own, dict) for own in data):
        raise RecipeError(
            f"record.calls: {path} must be a list of call arguments such as "
            "`- {prompt: make it snow, image: house.png}`."
        )
    return data
