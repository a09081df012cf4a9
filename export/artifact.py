"""Save and check an artifact: a diffusers folder plus `diffpress.json`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from torch import Tensor, nn

from .devices import check_device
from .digests import known_files
from .edits import Edit, edits_of, store_edits
from .errors import ArtifactError, ModelFileError, UserError
from .folder import VARIANTS, PipelineFolder
from .load.config import EditsConfig
from .load.empty import apply_to_empty_
from .load.libraries import empty_model, library_of
from .manifest import MANIFEST, Manifest, check_files, read_manifest, timesteps_of
from .runtime import Expansion, PackedLayer, decide, expand_, named_packed_layers
from .source import source_tensors
from .tensor_files import save_tensors

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Preference = Literal["speed", "memory"]
"""What decides about packed layers that are slower than floats where they are loaded."""


def is_artifact(path: Path) -> bool:
    """Whether a folder carries our manifest."""
    return (path / MANIFEST).is_file()


def write_pipeline(
    folder: Path,
    source: PipelineFolder,
    edits: Sequence[Edit],
    tensors: Mapping[str, Tensors],
    timesteps: list[float],
    parts: Mapping[str, list[float]] | None = None,
) -> None:
    """Write the pipeline files of an artifact into the empty `folder`: copies, but for components with edits.

    So that all parts load alike when no precision is asked for, weights of a variant lose that in their names and text
    encoders in their configs.
    `tensors` holds per component what the edits store, named `MODULE.TENSOR`. `timesteps` are the
    denoiser's; of several, `parts` holds each one's. Raises UnsupportedModelError where a
    component is no model of a library that can load edits.
    """
    edited = {edit.component for edit in edits}
    for name in source.files():
        if name.split("/")[0] not in edited:
            _copy_plain(source, folder, name)
    for component in sorted(edited):
        own = edits_of(component, edits)
        stored = store_edits(source_tensors(source, component), own, tensors[component])
        stored = {name: tensor.contiguous() for name, tensor in stored.items()}
        save_tensors(stored, folder / component / library_of(source, component).WEIGHTS, {"format": "pt"})
        config = _plain_config(source.config(component))
        config["quantization_config"] = EditsConfig.of(own, (parts or {}).get(component, timesteps)).to_dict()
        (folder / component / "config.json").write_text(
            json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )


def _copy_plain(source: PipelineFolder, folder: Path, name: str) -> None:
    dot, path = f".{source.variant or VARIANTS[0]}", source.path / name
    plain = name.replace(dot, "")
    (folder / plain).parent.mkdir(parents=True, exist_ok=True)
    config = json.loads(path.read_text(encoding="utf-8")) if name.endswith("/config.json") else {}
    if config != _plain_config(config):
        (folder / plain).write_text(
            json.dumps(_plain_config(config), indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    elif plain != name and name.endswith(".json"):
        text = path.read_text(encoding="utf-8").replace(dot, "")
        (folder / plain).write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(path, folder / plain)


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers would load the precision that is named here, diffusers loads float32: the parts must fit together."""
    return config | {key: "float32" for key in ("dtype", "torch_dtype") if key in config}


def verify(path: Path) -> Manifest:
    """Check every digest, read every tensor and apply every edit to the empty model; returns the manifest.

    Raises ArtifactError (or ModelFileError) at the first thing that is not as it was saved.
    """
    manifest = read_manifest(path)
    strangers = _strangers(path, manifest)
    with known_files(path, manifest.files, strangers) as known:
        folder = PipelineFolder(known, str(path))
        folder.check()
        for component in sorted({edit.component for edit in manifest.edits}):
            _check_edits_apply(
                folder, component, edits_of(component, manifest.edits), timesteps_of(manifest, component)
            )
    return manifest


def _strangers(path: Path, manifest: Manifest) -> list[str]:
    """What lies in an artifact's folder and is not of it, once every digest has matched; it is said, and not read."""
    strangers = check_files(path, manifest.files)
    # What the hub, git and file managers leave is no news.
    said = [name for name in strangers if not name.startswith(".") and "/." not in name]
    if said:
        logger.warning("%s: not of the artifact, and not read: %s", path, ", ".join(said))
    return strangers


def _check_edits_apply(folder: PipelineFolder, component: str, edits: list[Edit], timesteps: list[float]) -> None:
    try:
        own = EditsConfig.from_dict(folder.config(component)["quantization_config"])
    except (KeyError, ValueError, ModelFileError) as error:
        raise ArtifactError(
            f"{folder.name}: {component} has no readable edits in its config.json ({error!r})."
        ) from error
    if own != EditsConfig.of(edits, timesteps):
        raise ArtifactError(f"{folder.name}: {component}/config.json and {MANIFEST} disagree about the edits.")
    model = _edited_empty(folder, component, own)
    expected = {name: _form(tensor) for name, tensor in library_of(folder, component).held(model).items()}
    stored = {name: _form(tensor) for name, tensor in folder.tensors(component)}
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != stored.get(name):
            raise ArtifactError(
                f"{folder.name}: {component} should hold {name} as {expected.get(name)}, but holds {stored.get(name)}."
            )


def _edited_empty(folder: PipelineFolder, component: str, config: EditsConfig) -> nn.Module:
    """The model that the weights of an edited component are loaded into."""
    model = empty_model(folder, component)
    apply_to_empty_(model, config)
    return model


def expansion_here(path: Path, manifest: Manifest, dtype: torch.dtype = torch.float32) -> Expansion:
    """What `load` will do with the packed layers of an artifact on this machine; no weight is read."""
    folder = PipelineFolder(path, str(path))
    layers: dict[str, PackedLayer] = {}
    for component in sorted({edit.component for edit in manifest.edits}):
        config = EditsConfig.of(edits_of(component, manifest.edits), timesteps_of(manifest, component))
        model = _edited_empty(folder, component, config)
        layers |= dict(named_packed_layers(model, f"{component}."))
    return decide(layers, manifest.layers, dtype, folder.size_bytes())


def _form(tensor: Tensor) -> str:
    # Loaders may change the precision of ordinary floats, and of nothing else.
    free = tensor.is_floating_point() and tensor.element_size() > 1
    return f"{'float' if free else tensor.dtype} {list(tensor.shape)}"


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    prefer: Preference = "speed",
    device: str | torch.device | None = None,
) -> diffusers.DiffusionPipeline:
    """The pipeline of an artifact on `device`, the CPU if that is None, after every digest has matched.

    Some packed layers are slower there than layers of floats. With `prefer="speed"` their weights are expanded, as far as
    half of the free memory goes; inputs are not rounded there. With `prefer="memory"` all stay as they are stored, and multiply
    the same integers on every machine. A pipeline that is moved afterwards is packed again: where there is a GPU, name the
    device here. Raises ArtifactError where a digest does not match, UserError for another preference or no such device.
    """
    if prefer not in get_args(Preference):
        raise UserError(f'prefer must be "speed" or "memory", not {prefer!r}.')
    check_device(device)
    path = Path(path)
    manifest = read_manifest(path)
    with known_files(path, manifest.files, _strangers(path, manifest)) as known:
        pipeline = load_pipeline(PipelineFolder(known, str(path)), dtype)
    if device is not None:
        pipeline.to(device)
    if prefer == "speed":
        expand_(pipeline, manifest.layers, stays=device is not None)
    return pipeline


def open_pipeline(
    folder: PipelineFolder, dtype: torch.dtype = torch.float32, prefer: Preference = "memory"
) -> diffusers.DiffusionPipeline:
    """The running pipeline; of an artifact only after every digest has matched, of others after every weight was read."""
    if is_artifact(folder.path):
        return load(folder.path, dtype, prefer)
    folder.check()
    return load_pipeline(folder, dtype)


def load_pipeline(folder: PipelineFolder, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    """Any local pipeline folder, from safetensors only, without network. Raises ModelFileError where diffusers cannot."""
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder.path, dtype=dtype, use_safetensors=True, local_files_only=True, variant=folder.variant
        )
    except (ImportError, UserError):
        raise
    except Exception as error:
        if is_artifact(folder.path):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelFileError(
            f"{folder.name} cannot be loaded by diffusers ({reason}). Check its settings, or copy or download it again."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
