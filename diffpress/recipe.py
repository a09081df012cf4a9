"""What to do to a pipeline: one YAML file, checked before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffpress.compress.methods import STAGES
from diffpress.compress.options import Feedback, Inherit, Magnitude, Masks, Modulation, Obs, Ptq, Qalora
from diffpress.export.errors import RecipeError


class Section(BaseModel):
    """A part of a recipe; a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SamplingSection(Section):
    """How the pipeline samples while it is recorded and compared."""

    steps: int | None = Field(
        default=None, ge=1, le=1000, description="sampling steps; left out: the pipeline's own default"
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, description="guidance; left out: the pipeline's own default"
    )
    call: dict[str, Any] = Field(
        default={},
        description="other arguments that all calls of the pipeline share, such as `{height: 512, num_frames: 9, "
        "strength: 0.6}`; files are named relative to the recipe",
    )


class RecordSection(Section):
    """What is observed of the original before anything is changed."""

    trajectories: int = Field(default=32, ge=1, description="sampling runs to record")
    prompts: str | list[str] = Field(
        "builtin", description="`builtin`, a file with one prompt or label a line, or a list"
    )
    calls: str | list[dict[str, Any]] = Field(
        default=[],
        description="arguments of single calls, taken in turn: a list such as `[{prompt: make it snow, image: house.png}]`, "
        "or a YAML or JSON file with one; files are named relative to it",
    )
    batch: int = Field(default=4, ge=1, description="runs at a time; memory grows with it")


class GatesSection(Section):
    """Limits that the result must meet; where one is missed the exit status is 3."""

    psnr_db: float | None = Field(default=None, ge=0, description="lowest PSNR against the original, in dB")
    size: float | None = Field(default=None, gt=0, description="largest ratio of the denoiser's stored bytes")
    latency: float | None = Field(default=None, gt=0, description="largest ratio of the time an image takes")


class Recipe(Section):
    """The stages, always run in this order; one that is left out is not run."""

    seed: int = Field(default=0, ge=0, lt=2**31, description="the only source of randomness")
    sampling: SamplingSection = SamplingSection()
    record: RecordSection = RecordSection()
    prune: Obs | Masks | Magnitude | Modulation | None = Field(
        default=None, discriminator="method", description="remove what the denoiser can do without"
    )
    quantize: Ptq | Qalora | None = Field(
        default=None, discriminator="method", description="store weights in fewer bits"
    )
    steps: Inherit | Feedback | None = Field(
        default=None, discriminator="method", description="compute less at most steps"
    )
    gates: GatesSection = GatesSection()
    export: list[Literal["onnx"]] = Field(default=[], description="formats to export the result to")


RENAMED = {
    "quantize.own_trajectory": "quantize.rollout_share",
    "quantize.held_back": "quantize.validation_images",
    "quantize.float_inputs": "quantize.float_activations",
}
"""Keys that were called otherwise."""


def presets() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(Path(entry.name).stem for entry in _presets_folder().iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The YAML of a built-in recipe."""
    return (_presets_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(name: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Read a recipe file or a preset, with `key.path=value` overrides.

    Raises RecipeError for an unknown preset, key or value, with the key path and what is allowed.
    """
    text, where = _read(str(name))
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {where} must be a mapping such as `quantize: {{method: ptq}}`, not {data!r}.")
    _place_files_(data, Path(name).parent)
    for override in overrides:
        _override_(data, override)
    if seed is not None:
        data["seed"] = seed
    return parse_recipe(data, where)


def parse_recipe(data: dict[str, Any], where: str = "given") -> Recipe:
    """Check recipe data. Raises RecipeError naming the key path, the value and what is allowed."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {where}: " + "; ".join(_explained(error.errors()))) from error
    if all(getattr(recipe, stage, None) is None for stage in STAGES):
        raise RecipeError(f"recipe {where} changes nothing: give it a stage such as `quantize: {{method: ptq}}`.")
    if recipe.steps is not None and recipe.steps.method != "inherit" and recipe.export:
        raise RecipeError(
            f"recipe {where}: export = {recipe.export}: steps.method {recipe.steps.method} cannot be exported yet, graphs "
            "have no inner loop. Leave out export, or take `method: inherit`."
        )
    return recipe


def sampling_overrides(overrides: Sequence[str]) -> SamplingSection:
    """What `sampling.key=value` overrides say. Raises RecipeError for other keys, and for values that are not allowed."""
    data: dict[str, Any] = {"sampling": {}}
    for override in overrides:
        if not override.startswith("sampling."):
            raise RecipeError(
                f"--set {override!r}: only sampling.* can be set here, such as sampling.call.strength=0.6."
            )
        _override_(data, override)
    try:
        return Recipe.model_validate(data).sampling
    except ValidationError as error:
        raise RecipeError("--set: " + "; ".join(_explained(error.errors()))) from error


def _place_files_(data: dict[str, Any], folder: Path) -> None:
    """Put the recipe's `folder` before the names of files that calls are given and that lie there."""
    sampling, record = data.get("sampling"), data.get("record")
    shared = sampling.get("call") if isinstance(sampling, dict) else None
    calls = record.get("calls") if isinstance(record, dict) else None
    for own in (shared, *(calls if isinstance(calls, list) else ())):
        if isinstance(own, dict):
            own |= {name: _placed(value, folder) for name, value in own.items()}
    if isinstance(record, dict) and isinstance(calls, str):
        record["calls"] = _placed(calls, folder)


def _placed(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    try:
        beside = isinstance(value, str) and value != "" and (folder / value).exists()
    except (OSError, ValueError):
        # A text that no file could be called.
        return value
    return str((folder / value).resolve()) if beside else value


def _presets_folder() -> Traversable:
    return files("diffpress") / "recipes"


def _read(name: str) -> tuple[str, str]:
    if Path(name).is_file():
        try:
            return Path(name).read_text(encoding="utf-8-sig"), name
        except UnicodeError as error:
            raise RecipeError(f"recipe {name} is no text in UTF-8 ({error}). Save it as UTF-8.") from error
    if name in presets():
        return preset_text(name), name
    close = get_close_matches(name, presets(), 1, 0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"there is no recipe {name!r}.{hint} Built in are {', '.join(presets())}; or give a YAML file.")


def _override_(data: dict[str, Any], override: str) -> None:
    path, found, value = override.partition("=")
    if not found or not path:
        raise RecipeError(f"--set {override!r} must read key.path=value, such as quantize.weights=4.")
    *outer, last = path.split(".")
    for key in outer:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {override!r}: {key} is no section.")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: {value!r} is no YAML value ({error}).") from error


def _explained(errors: Sequence[Any]) -> list[str]:
    """One sentence a key: what two alternatives of one key say of it is joined."""
    sentences: dict[tuple[str, ...], str] = {}
    for error in errors:
        path = tuple(_path(error["loc"]))
        known = sentences.get(path)
        sentences[path] = _explain(error) if known is None else f"{known}, or {_reason(error)}"
    return list(sentences.values())


def _reason(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _explain(error: Any) -> str:
    path = ".".join(_path(error["loc"]))
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "union_tag_not_found":
        return f"{path}.method is missing, it is one of {_tags(error)}"
    if error["type"] == "union_tag_invalid":
        return f"{path}.method = {error['ctx']['tag']!r}: it is one of {_tags(error)}"
    if error["type"] != "extra_forbidden":
        return f"{path} = {error['input']!r}: {_reason(error)}"
    if path in RENAMED:
        return f"{path} is called {RENAMED[path]} now"
    allowed = _keys(error["loc"][:-1])
    close = get_close_matches(str(error["loc"][-1]), allowed, 1, 0.5)
    hint = f", did you mean {close[0]!r}?" if close else ","
    return f"unknown key {path!r}{hint} allowed here: {', '.join(allowed)}"


def _path(loc: Sequence[int | str]) -> list[str]:
    """The keys that lead to an error, without what pydantic puts between them: a method's name, a type of two."""
    names: list[str] = []
    sections: list[type[BaseModel]] = [Recipe]
    for part in map(str, loc):
        fields = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        tag = [section for section in sections if _method(section) == part]
        if fields:
            names.append(part)
            sections = _sections(fields[0])
        elif tag:
            sections = tag
        elif sections or part.isdecimal():
            names.append(part)
    return names


def _method(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("method")
    return None if field is None else get_args(field.annotation)[0]


def _tags(error: Any) -> str:
    return " or ".join(
        repr(get_args(section.model_fields["method"].annotation)[0])
        for section in _sections(Recipe.model_fields[error["loc"][0]].annotation)
    )


def _keys(loc: Sequence[int | str]) -> list[str]:
    """What the section at `loc` allows; a second part names which of several methods it is."""
    if not loc:
        return list(Recipe.model_fields)
    sections = _sections(Recipe.model_fields[str(loc[0])].annotation)
    chosen = [s for s in sections if len(loc) == 1 or get_args(s.model_fields["method"].annotation) == (loc[1],)]
    return list(chosen[0].model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections a field can hold, also where it may be left out."""
    return [part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields")]


def _joined(known: str, other: str) -> str:
    """What two methods say of one key."""
    return known if other == known else f"{known}; {other}"


def reference_rows() -> list[tuple[str, str, str]]:
    """Key, default and meaning of everything a recipe may say, from the fields themselves."""
    rows: dict[str, tuple[str, str]] = {}
    for key, info in Recipe.model_fields.items():
        sections = _sections(info.annotation)
        entries = [(f"{key}.{name}", entry) for section in sections for name, entry in section.model_fields.items()]
        for path, entry in entries or [(key, info)]:
            default = "" if entry.is_required() else json.dumps(entry.default)
            meaning = entry.description or ""
            known = rows.get(path, (default, meaning))
            rows[path] = (_joined(known[0], default), _joined(known[1], meaning))
    return [(path, default, meaning) for path, (default, meaning) in rows.items()]


def reference() -> str:
    """The recipe reference as a Markdown table."""
    rows = [
        f"| `{key}` | {f'`{default}`' if default else ''} | {meaning} |" for key, default, meaning in reference_rows()
    ]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])
