"""Which files hold the weights of one component: those that the loader of its library would take, and no others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelFileError

STEMS = {"diffusers": ("diffusion_pytorch_model",), "transformers": ("model",)}
"""What each library calls weights; a class of another library is looked for under all of these names."""
SHARDS_FIRST = "diffusion_pytorch_model"
"""Where a single file lies beside shards, diffusers takes the shards, and transformers the single file."""
NO_GGUF = (
    "They are rounded already, and what is rounded twice is worse: take the safetensors that they were made from, and compress "
    "those (the preset w4 makes weights as small)."
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class WeightFiles:
    """The chosen files, and the index that says which tensor is in which."""

    files: list[Path]
    index: Path | None = None


def weights_of_variant(folder: Path, library: str, variant: str | None) -> WeightFiles | None:
    """The weights of one variant in a component's folder, None where it has none.

    Raises ModelFileError where an index of shards is damaged, or names one that is not there.
    """
    dot = f".{variant}" if variant else ""
    for stem in STEMS.get(library, tuple(name for names in STEMS.values() for name in names)):
        single = folder / f"{stem}{dot}.safetensors"
        # The second is what older diffusers wrote.
        names = (f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json")
        index = next((folder / name for name in names if (folder / name).is_file()), None)
        if single.is_file() and (index is None or stem != SHARDS_FIRST):
            return WeightFiles([single])
        if index is not None:
            return WeightFiles(_shards(index), index)
    return None


def _shards(index: Path) -> list[Path]:
    where = f"{index.parent.name}/{index.name}"
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.with_name(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{where} is no index of shards ({error!r}). Copy or download it again.") from error
    missing = [shard for shard in shards if not shard.is_file()]
    if missing or not shards:
        lost = f"{index.parent.name}/{missing[0].name} is missing" if missing else f"{where} names no file"
        raise ModelFileError(f"{lost}. Copy or download it again.")
    return shards


def why_no_weights(folder: Path) -> str | None:
    """What to say of a component's folder whose weights no loader takes; None where it holds nothing like weights."""
    files = sorted(file.name for file in folder.glob("*") if file.is_file())
    found = [name for name in files if name.endswith(".safetensors")]
    quantized = [name for name in files if name.endswith(".gguf")]
    shards = [name for name in found if "-of-" in name]
    pickles = [name for name in files if name.endswith(PICKLES)]
    if shards:
        return f"has the shard {shards[0]}, but no index that says what is in which. Copy or download it again."
    if found:
        return f"has only variants or names that we do not know: {found[0]}. Rename it as `save_pretrained` would."
    if pickles:
        return (
            f"has only pickled weights ({pickles[0]}), which can run code when read. Convert them with "
            "`save_pretrained(..., safe_serialization=True)`."
        )
    if quantized:
        return f"has only weights in GGUF ({quantized[0]}). {NO_GGUF}"
    return None
