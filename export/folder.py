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

from .denoisers import denoisers_in, library_with, no_denoiser
from .digests import digest
from .errors import ModelFileError, UnsupportedModelError
from .weight_files import PICKLES, WeightFiles, weights_of_variant, why_no_weights

VARIANTS = ("fp16", "bf16")
"""What the file names of half precision weights have in them when full precision may lie beside them; taken in this order."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What a tokenizer has beside its vocabulary."""
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
            index = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelFileError(f"{self.name}: model_index.json is no JSON ({error}). Restore the file.") from error
        if not isinstance(index, dict) or "_class_name" not in index:
            raise UnsupportedModelError(f"{self.name}: model_index.json names no pipeline class.")
        if not isinstance(index["_class_name"], str):
            raise UnsupportedModelError(
                f"{self.name}: model_index.json names the pipeline class {index['_class_name']!r}, whose code comes with the "
                "model. Only classes of diffusers itself can be used: put the name of one there."
            )
        return index

    @cached_property
    def components(self) -> dict[str, str]:
        """Component name to class name, without those the pipeline leaves empty."""
        return {name: str(value[1]) for name, value in self._entries.items()}

    @cached_property
    def libraries(self) -> dict[str, str]:
        """Component name to the library its class is from."""
        return {name: library_with(str(value[0]), str(value[1])) for name, value in self._entries.items()}

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
    def denoisers(self) -> list[str]:
        """The parts that are told the time step. Raises UnsupportedModelError where there is none."""
        found = denoisers_in(self.components, self.libraries)
        if not found:
            raise UnsupportedModelError(no_denoiser(self.name, self.components))
        return found

    @property
    def denoiser(self) -> str:
        """The first of them, the only one of most pipelines."""
        return self.denoisers[0]

    def require(self, component: str) -> list[str]:
        """The folders that `component` names: one, or as many as there are `denoiser`s or `text_encoders`."""
        if component == "denoiser":
            return self.denoisers
        if component == "text_encoders":
            return self.text_encoders
        if component not in self.components:
            raise UnsupportedModelError(f"{self.name} has no component {component!r}; its parts are {self._parts()}.")
        return [component]

    def _parts(self) -> str:
        return ", ".join(self.components)

    def config(self, component: str) -> dict[str, Any]:
        """The parsed config.json of one model. Raises ModelFileError where there is none."""
        return self.settings(self.path / component / "config.json")

    def settings(self, file: Path) -> dict[str, Any]:
        """The settings of one JSON file. Raises ModelFileError where it cannot be read or holds none."""
        where = file.relative_to(self.path).as_posix()
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"{self.name}: {where} cannot be read ({error}). Copy or download it again."
            ) from error
        if not isinstance(settings, dict):
            raise ModelFileError(f"{self.name}: {where} holds no settings. Copy or download it again.")
        return settings

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors that are loaded for one component, empty where it has no weights (see `export/weight_files.py`).

        Raises ModelFileError where there are weights, but none that can be loaded.
        """
        weights = self._weights(component)
        return weights.files if weights else []

    def _weights(self, component: str) -> WeightFiles | None:
        for variant in dict.fromkeys((self._variant, None)):
            weights = self._of_variant(component, variant)
            if weights is not None:
                return weights
        reason = why_no_weights(self.path / component)
        if reason is None and component in denoisers_in(self.components, self.libraries):
            reason = "has no weights. Copy or download it again."
        if reason is not None:
            raise ModelFileError(f"{self.name}: {component} {reason}")
        return None

    def _of_variant(self, component: str, variant: str | None) -> WeightFiles | None:
        try:
            return weights_of_variant(self.path / component, self.libraries[component], variant)
        except ModelFileError as error:
            raise ModelFileError(f"{self.name}: {error}") from error

    @property
    def _variant(self) -> str | None:
        # Diffusers takes a variant for all components that have it, and the plain weights of the others.
        lacking = [component for component in self.components if not self._of_variant(component, None)]
        needed = [component for component in lacking if any(self._of_variant(component, own) for own in VARIANTS)]
        fitting = [own for own in VARIANTS if all(self._of_variant(component, own) for component in needed)]
        return fitting[0] if needed and fitting else None

    @property
    def variant(self) -> str | None:
        """`fp16` or `bf16` where a component has weights of that variant only."""
        for component in self.denoisers:
            self.weight_files(component)
        return self._variant

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
        """Read every file once. Raises ModelFileError for pickles, damaged files and NaN or infinite weights."""
        for component in self.components:
            self._check_complete(component)
        for component in self.components:
            for name, tensor in self.tensors(component):
                if tensor.is_floating_point() and not _finite(tensor):
                    layer = name.rsplit(".", 1)[0]
                    raise ModelFileError(
                        f"{self.name}: {component}.{layer} has NaN or infinite weights ({name}). Use a sound checkpoint."
                    )

    def _check_complete(self, component: str) -> None:
        folder = self.path / component
        if not folder.is_dir():
            raise ModelFileError(f"{self.name}: the folder {component} is missing. Copy or download it again.")
        files = [file for file in folder.rglob("*") if file.is_file()]
        if not any(file.name not in SETTINGS for file in files) and _has_vocabulary(self.components[component]):
            raise ModelFileError(f"{self.name}: {component} holds no vocabulary. Copy or download it again.")
        if not files:
            raise ModelFileError(f"{self.name}: the folder {component} is empty. Copy or download it again.")
        for file in files:
            if file.suffix == ".json" and not _is_weight(file):
                self.settings(file)

    def files(self) -> list[str]:
        """Relative paths of everything the pipeline needs, sorted: settings, tokenizers and the chosen weights."""
        kept = [file for file in self.path.glob("*") if file.is_file() and _is_document(file)]
        for component in self.components:
            chosen = self._weights(component)
            weights = {*chosen.files, chosen.index} if chosen else set()
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


def _finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; torch cannot tell for the 8-bit floats themselves."""
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _is_weight(file: Path) -> bool:
    shards = file.suffix == ".json" and ".index" in file.suffixes
    return shards or file.suffix in (".safetensors", *PICKLES, *OTHER_FRAMEWORKS)


def _has_vocabulary(class_name: str) -> bool:
    """Whether a part is a tokenizer that needs more than settings; ByT5's tokens are the bytes themselves."""
    return "Tokenizer" in class_name and not class_name.startswith("ByT5")


def _is_document(file: Path) -> bool:
    return file.name == "model_index.json" or file.stem.upper() in ("README", "LICENSE", "NOTICE")
