"""A diffusers pipeline folder as files: what is in it, whether it is safe and sound, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .digests import digest
from .errors import ModelFileError, UnsupportedModelError

DENOISERS = ("transformer", "unet")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
OTHER_FRAMEWORKS = (".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")


@dataclass(frozen=True)
class PipelineFolder:
    """A local pipeline folder; nothing is read until asked for."""

    path: Path
    name: str
    """What the user called it, for messages."""

    @cached_property
    def index(self) -> dict[str, object]:
        """The parsed model_index.json. Raises UnsupportedModelError where there is none."""
        file = self.path / "model_index.json"
        if not file.is_file():
            raise UnsupportedModelError(
                f"{self.name} is no diffusers pipeline: it has no model_index.json. Give a folder written by "
                "`save_pretrained`, a hub id, or zoo:NAME."
            )
        try:
            index = json.loads(file.read_text())
        except ValueError as error:
            raise ModelFileError(f"{self.name}: model_index.json is no JSON ({error}). Restore the file.") from error
        if not isinstance(index, dict) or "_class_name" not in index:
            raise UnsupportedModelError(f"{self.name}: model_index.json names no pipeline class.")
        return index

    @cached_property
    def components(self) -> dict[str, str]:
        """Component name to class name, without those the pipeline leaves empty."""
        return {name: str(value[1]) for name, value in self._entries.items()}

    @cached_property
    def libraries(self) -> dict[str, str]:
        """Component name to the library its class is from."""
        return {name: str(value[0]) for name, value in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, list[object]]:
        """Component name to library and class, where there is a class."""
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        for name in pairs:
            if not name.isidentifier():
                raise ModelFileError(
                    f"{self.name}: model_index.json names a part {name!r}, which is no name of a folder."
                )
        return {name: value for name, value in pairs.items() if value[1] is not None}

    @property
    def text_encoders(self) -> list[str]:
        """The models of transformers that read the prompt, in the pipeline's order."""
        return sorted(
            name
            for name, library in self.libraries.items()
            if library == "transformers" and name.startswith("text_encoder")
        )

    @cached_property
    def denoiser(self) -> str:
        """`unet` or `transformer`. Raises UnsupportedModelError where there is neither."""
        for name in DENOISERS:
            if name in self.components:
                return name
        raise UnsupportedModelError(f"{self.name} has no {' or '.join(DENOISERS)}; its parts are {self._parts()}.")

    def require(self, component: str) -> str:
        """The folder name of `component`, `denoiser` standing for the unet or transformer."""
        name = self.denoiser if component == "denoiser" else component
        if name not in self.components:
            raise UnsupportedModelError(f"{self.name} has no component {component!r}; its parts are {self._parts()}.")
        return name

    def _parts(self) -> str:
        return ", ".join(self.components)

    def config(self, component: str) -> dict[str, Any]:
        """The parsed config.json of one model. Raises ModelFileError where there is none."""
        try:
            config = json.loads((self.path / component / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{self.name}: {component} has no readable config.json ({error}).") from error
        if not isinstance(config, dict):
            raise ModelFileError(f"{self.name}: {component}/config.json holds no settings.")
        return config

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors of one component, empty where it has no weights. Raises ModelFileError where all are pickles."""
        found = sorted((self.path / component).glob("*.safetensors"))
        if not found:
            pickles = [file.name for file in (self.path / component).glob("*") if file.suffix in PICKLES]
            if pickles:
                raise ModelFileError(
                    f"{self.name}: {component} has only pickled weights ({pickles[0]}), which can run code when read. "
                    "Convert them with `save_pretrained(..., safe_serialization=True)`."
                )
            if component in DENOISERS:
                raise ModelFileError(f"{self.name}: {component} has no weights. Copy or download it again.")
            return []
        plain = [file for file in found if "." not in _base(file)]
        chosen = plain or [file for file in found if _base(file).rsplit(".", 1)[-1] == "fp16"]
        if not chosen:
            raise ModelFileError(f"{self.name}: {component} has only variants we do not know: {found[0].name}.")
        return chosen

    @cached_property
    def variant(self) -> str | None:
        """`fp16` where only that variant of the denoiser's weights is there."""
        return None if "." not in _base(self.weight_files(self.denoiser)[0]) else "fp16"

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of all weights of one component, as stored. Raises ModelFileError where a file is damaged."""
        for file in self.weight_files(component):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in sorted(opened.keys()):
                        yield name, opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                where = file.relative_to(self.path)
                raise ModelFileError(
                    f"{self.name}: {where} is damaged ({error}). Copy or download it again."
                ) from error

    def check(self) -> None:
        """Read every weight once. Raises ModelFileError for pickles, damaged files and NaN or infinite weights."""
        for component in self.components:
            self._check_complete(component)
            for name, tensor in self.tensors(component):
                if tensor.is_floating_point() and not _finite(tensor):
                    layer = name.rsplit(".", 1)[0]
                    raise ModelFileError(
                        f"{self.name}: {component}.{layer} has NaN or infinite weights ({name}). Use a sound checkpoint."
                    )

    def _check_complete(self, component: str) -> None:
        if not (self.path / component).is_dir():
            raise ModelFileError(f"{self.name}: the folder {component} is missing. Copy or download it again.")
        index = self._index_of_shards(component)
        if not index.is_file():
            return
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in shards if not (index.parent / name).is_file())
        if missing:
            raise ModelFileError(f"{self.name}: {component}/{missing[0]} is missing. Copy or download it again.")

    def _index_of_shards(self, component: str) -> Path:
        """Where the list of shards of the chosen weights would be."""
        stem, dot, variant = next((_base(file) for file in self.weight_files(component)), "").partition(".")
        return self.path / component / f"{stem}.safetensors.index{dot}{variant}.json"

    def files(self) -> list[str]:
        """Relative paths of everything the pipeline needs, sorted: settings, tokenizers and the chosen weights."""
        kept = [file for file in self.path.glob("*") if file.is_file() and _is_document(file)]
        for component in self.components:
            weights = {*self.weight_files(component), self._index_of_shards(component)}
            for file in sorted((self.path / component).rglob("*")):
                if file.is_file() and (file in weights or not _is_weight(file)):
                    kept.append(file)
        return sorted(str(file.relative_to(self.path)) for file in kept)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file the pipeline needs."""
        return {name: digest(self.path / name) for name in self.files()}

    def size_bytes(self) -> int:
        """Size of every file the pipeline needs."""
        return sum((self.path / name).stat().st_size for name in self.files())

    def component_bytes(self, component: str) -> int:
        """Size of the stored tensors of one component."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors(component))


def _base(file: Path) -> str:
    """File name without `.safetensors` and without the number of a shard."""
    return file.name.removesuffix(".safetensors").split("-0")[0]


def _finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; torch cannot tell for the 8-bit floats themselves."""
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _is_weight(file: Path) -> bool:
    shards = file.suffix == ".json" and ".index" in file.suffixes
    return shards or file.suffix in (".safetensors", *PICKLES, *OTHER_FRAMEWORKS)


def _is_document(file: Path) -> bool:
    return file.name == "model_index.json" or file.stem.upper() in ("README", "LICENSE", "NOTICE")
