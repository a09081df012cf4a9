"""The libraries whose models can carry edits, each described by the file of its name beside this one."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from accelerate import init_empty_weights
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..folder import PipelineFolder
from .registration import LIBRARIES


class Library(Protocol):
    """What we need to know of one."""

    WEIGHTS: str
    """The file it reads a model's weights from."""

    def build(self, model_class: Any, config: dict[str, Any]) -> nn.Module:
        """A model with the weights that it is born with."""

    def held(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of `model` that are stored: of tied ones, one."""

    def renamed(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors under the names that they have in `model`: older files have other ones."""


def library_of(folder: PipelineFolder, component: str) -> Library:
    """The library of one component. Raises UnsupportedModelError where we do not know it."""
    name = folder.libraries[component]
    if name not in LIBRARIES:
        raise UnsupportedModelError(
            f"{folder.name}: {component} is from {name}, but only models of {' and '.join(LIBRARIES)} can carry edits."
        )
    library: Any = import_module(f".{name}", __package__)
    return library


def empty_model(folder: PipelineFolder, component: str) -> nn.Module:
    """The model of one component before any edit, without weights. Raises UnsupportedModelError where it is no model."""
    library, name = library_of(folder, component), folder.components[component]
    model_class = getattr(import_module(folder.libraries[component]), name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise UnsupportedModelError(
            f"{folder.name}: {component} is of the class {name}, which is no model that the installed "
            f"{folder.libraries[component]} knows. Only models can carry edits."
        )
    config = {key: value for key, value in folder.config(component).items() if key != "quantization_config"}
    with init_empty_weights(include_buffers=True):
        return library.build(model_class, config)
