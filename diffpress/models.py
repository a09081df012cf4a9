"""From what the user calls a model to a pipeline folder on this machine."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from diffpress.export.errors import UnsupportedModelError
from diffpress.export.folder import PipelineFolder
from diffpress.export.load.registration import LIBRARIES

from .hub import HUB_ID, fetched
from .single_file import folder_of_file
from .zoo import PIPELINES, zoo_folder


def resolve(model: str) -> PipelineFolder:
    """A local folder, a checkpoint of one file, `zoo:NAME` or a hub id, as a folder that holds a pipeline.

    Raises UnsupportedModelError where it is none, and ModelFileError where it cannot be had.
    """
    if model.startswith("zoo:"):
        return _checked(PipelineFolder(_zoo(model), model))
    path = Path(model)
    if path.is_dir():
        return _checked(PipelineFolder(path, model))
    if path.is_file():
        return _checked(PipelineFolder(folder_of_file(path), model))
    if not HUB_ID.fullmatch(model):
        raise UnsupportedModelError(f"there is no folder {model}, and it is neither zoo:NAME nor a hub id OWNER/NAME.")
    return _checked(PipelineFolder(fetched(model), model))


def pipeline_class(folder: PipelineFolder) -> type:
    """The class of a pipeline. Raises UnsupportedModelError where the installed diffusers has none of its name."""
    return _class_of(folder, "the pipeline", "diffusers", str(folder.index["_class_name"]))


def _checked(folder: PipelineFolder) -> PipelineFolder:
    pipeline_class(folder)
    for component, name in folder.components.items():
        if folder.libraries[component] in LIBRARIES:
            _class_of(folder, component, folder.libraries[component], name)
        folder.weight_files(component)
    return folder


def _class_of(folder: PipelineFolder, part: str, library: str, name: str) -> type:
    found = getattr(import_module(library), name, None)
    if found is None:
        raise UnsupportedModelError(
            f"{folder.name}: {part} is of the class {name}, which {library} {version(library)} does not have. Correct the "
            f"name in model_index.json, or install the version of {library} that it was saved with."
        )
    if type(found).__name__ == "DummyObject":
        # What diffusers has in place of a class whose packages are missing; it says which.
        found.from_config()
    return found


def _zoo(model: str) -> Path:
    name = model.removeprefix("zoo:")
    if name not in PIPELINES:
        close = get_close_matches(name, PIPELINES, 1, 0.4)
        hint = f" Did you mean zoo:{close[0]}?" if close else ""
        raise UnsupportedModelError(f"the zoo has no {name!r}.{hint} It has {', '.join(PIPELINES)}.")
    return zoo_folder(name)
