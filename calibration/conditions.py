"""What a pipeline is asked for: a prompt, a class or nothing, other arguments, and the seed of its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffpress.export.errors import RecipeError, UserError

from .calls import Takes, call_of
from .given import NOTHING_GIVEN, Given

PROMPTS = Path(__file__).with_name("prompts")
"""The built-in prompts, one a line: `record.txt` to calibrate with and `compare.txt`, kept apart, to report on."""

Purpose = Literal["record", "compare"]
COMPARED_FROM = 1_000_000
"""Number of the first drawing that results are reported on: none of them is recorded."""


@dataclass(frozen=True)
class Condition:
    """One image to make: `text` is a prompt, or the number of a class, or empty where the pipeline takes neither."""

    text: str
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Beside the text: numbers, `MediaFile`s and `StandIn`s by name."""


def conditions(
    pipeline: Any,
    wanted: str | Sequence[str],
    count: int,
    seed: int,
    purpose: Purpose = "record",
    given: Given = NOTHING_GIVEN,
) -> list[Condition]:
    """`count` conditions with seeds from `seed` on, cycling through the texts and the calls that are `given`.

    `wanted` is `builtin` (the set for `purpose`), a file with one prompt or label a line, or the texts themselves; texts of
    the calls go before. Raises RecipeError where the file is missing or empty, or a label is no number.
    """
    call = call_of(pipeline)
    texts = _texts(pipeline, given.texts(call) or wanted, purpose)
    first = COMPARED_FROM if purpose == "compare" else 0
    return [Condition(texts[i % len(texts)], seed + i, given.arguments(call, i, first)) for i in range(count)]


def call_parameters(pipeline: Any) -> set[str]:
    """Names that the call of a pipeline, or of a class of pipelines, accepts."""
    return set(call_of(pipeline).parameters)


def kind(pipeline: Any) -> Takes:
    """What the call of a pipeline, or of a class of pipelines, takes."""
    return call_of(pipeline).takes


def check_texts(takes: Takes, wanted: str | Sequence[str]) -> None:
    """Raises RecipeError where `wanted` (see `conditions`) is for another kind of pipeline, or cannot be read."""
    if takes == "nothing" and wanted != "builtin":
        raise RecipeError("record.prompts: this pipeline draws without prompt or label. Leave it out.")
    if isinstance(wanted, str) and wanted != "builtin":
        _read(Path(wanted))


def _texts(pipeline: Any, wanted: str | Sequence[str], purpose: Purpose) -> list[str]:
    takes = kind(pipeline)
    check_texts(takes, wanted)
    if takes == "nothing":
        return [""]
    if not isinstance(wanted, str):
        texts = list(wanted)
    elif wanted == "builtin":
        texts = [str(label) for label in _labels(pipeline)] if takes == "label" else builtin_prompts(purpose)
    else:
        texts = _read(Path(wanted))
    if not texts:
        raise RecipeError("record.prompts: the list is empty. Give at least one prompt or label.")
    for text in texts:
        try:
            check_text(pipeline, text)
        except UserError as error:
            raise RecipeError(f"record.prompts: {error}") from error
    return texts


def check_text(pipeline: Any, text: str) -> None:
    """Raises UserError where `text` is not what the pipeline takes."""
    name, takes = type(pipeline).__name__, kind(pipeline)
    if takes == "nothing" and text:
        raise UserError(f"{name} draws without prompt or label: leave {text!r} out.")
    if takes != "label":
        return
    if not text.isdecimal():
        raise UserError(f"{name} draws classes: {text!r} is no class number such as 3 (--label 3).")
    known = _labels(pipeline)
    if int(text) not in known:
        raise UserError(f"there is no class {text}: {name} knows {known[0]} to {known[-1]}.")


def _labels(pipeline: Any) -> list[int]:
    """Numbers of the classes: those that have names, or all that the model could embed."""
    named = sorted(set((getattr(pipeline, "labels", None) or {}).values()))
    return named or list(range(pipeline.transformer.config.num_embeds_ada_norm))


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise RecipeError(f"record.prompts: there is no file {path}. Give a file with one prompt a line, or `builtin`.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(f"record.prompts: {path} is no text file in UTF-8 ({error}).") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise RecipeError(f"record.prompts: {path} is empty. Write one prompt or label a line.")
    return texts


def builtin_prompts(purpose: Purpose) -> list[str]:
    """Prompts that come along."""
    return (PROMPTS / f"{purpose}.txt").read_text(encoding="utf-8").splitlines()
