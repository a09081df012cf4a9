"""Checkpoints of one file, as many are published, made into pipeline folders by diffusers with settings beside them."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from diffpress.export.errors import ModelFileError, UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.weight_files import NO_GGUF

from .precision import STORED

_WRITTEN: dict[tuple[Path, int], TemporaryDirectory[str]] = {}
"""What was made of which file as it was then; deleted when the process ends."""


def folder_of_file(path: Path) -> Path:
    """A pipeline folder with what is in a checkpoint. Raises UserError where diffusers cannot make one of it."""
    key = (path.resolve(), path.stat().st_mtime_ns)
    if key not in _WRITTEN:
        settings = _settings(path)
        pipeline = _loaded(path, settings)
        written = TemporaryDirectory(prefix="diffpress-")
        pipeline.save_pretrained(written.name, safe_serialization=True)
        _WRITTEN[key] = written
    return Path(_WRITTEN[key].name)


def _settings(path: Path) -> PipelineFolder:
    """The folder of settings that belongs to a checkpoint: that of its name beside it, or the one that it lies in."""
    if path.suffix == ".gguf":
        raise UnsupportedModelError(f"{path} holds weights in GGUF. {NO_GGUF}")
    if path.suffix != ".safetensors":
        raise UnsupportedModelError(
            f"{path} is a single file that may run code when it is read. Give a .safetensors checkpoint or a pipeline folder."
        )
    for folder in (path.with_suffix(""), path.parent):
        if (folder / "model_index.json").is_file():
            return PipelineFolder(folder, str(folder))
    raise UnsupportedModelError(
        f"{path} is a single file, and says nothing of how its models are built. Put the settings of the pipeline that it "
        f"was made from (model_index.json and the folders, weights may be left out) into {path.with_suffix('')}, such as by "
        f"`hf download OWNER/NAME --exclude '*.safetensors' --local-dir {path.with_suffix('')}`."
    )


def _loaded(path: Path, settings: PipelineFolder) -> Any:
    name = str(settings.index["_class_name"])
    load = getattr(getattr(import_module("diffusers"), name, None), "from_single_file", None)
    if load is None:
        raise UnsupportedModelError(
            f"{path}: {settings.name} is of a {name}, which diffusers does not read from a single file. Give a pipeline folder."
        )
    options = {"config": str(settings.path), "local_files_only": True, "torch_dtype": _dtype(path)}
    try:
        try:
            return load(str(path), **options)
        except SingleFileComponentError:
            # Of large models a file holds the denoiser, and what reads the prompt lies beside.
            return load(str(path), **options, **_encoders(settings, options["torch_dtype"]))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelFileError(
            f"{path} cannot be read with the settings in {settings.name} ({reason}). Put those of the pipeline there that it "
            "was made from, or give a pipeline folder."
        ) from error


def _encoders(settings: PipelineFolder, dtype: Any) -> dict[str, Any]:
    """The models of transformers whose weights lie with the settings."""
    classes = {
        name: getattr(import_module("transformers"), settings.components[name])
        for name, library in settings.libraries.items()
        if library == "transformers" and settings.weight_files(name)
    }
    return {
        name: own.from_pretrained(settings.path / name, dtype=dtype, local_files_only=True)
        for name, own in classes.items()
    }


def _dtype(path: Path) -> torch.dtype:
    """What most of a file is stored in."""
    counts: Counter[str] = Counter()
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                counts[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is damaged ({error}). Copy or download it again.") from error
    known = [name for name, _ in counts.most_common() if name in STORED]
    return STORED[known[0]] if known else torch.float32
