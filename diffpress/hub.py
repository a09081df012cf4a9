"""What lies on the hub, fetched to this machine; nothing here needs torch."""

from __future__ import annotations

import json
import re
from glob import escape
from pathlib import Path

from diffpress.export.digests import is_card
from diffpress.export.errors import ModelFileError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors", "LICENSE*", "README*", "*.bin"]
"""Of a pipeline that is no artifact."""
MANIFESTS = ("diffpress.json", "export.json")
"""Of an artifact and of an export."""
BESIDE = ("report.html", "README.md", "LICENSE*")
"""What comes with them and has no digest."""


def at_hand(model: str) -> str:
    """A hub id as the folder that it is fetched to; everything else as it is. Raises ModelFileError where it cannot be had."""
    known = model.startswith("zoo:") or Path(model).exists() or not HUB_ID.fullmatch(model)
    return model if known else str(fetched(model))


def fetched(model: str) -> Path:
    """The snapshot of a hub id; of an artifact or an export the files that its manifest names.

    Raises ModelFileError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        # The manifests first: beside the files of an export may lie others, which are large.
        first = Path(snapshot_download(model, allow_patterns=list(MANIFESTS)))
        return Path(snapshot_download(model, revision=first.name, allow_patterns=_wanted(first)))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
        raise ModelFileError(
            f"there is no folder {model}, and it could not be fetched from the hub ({reason}). Check the name and the "
            "network, or download the pipeline and give its folder."
        ) from error


def _wanted(folder: Path) -> list[str]:
    """Patterns of the files that are needed beside the manifests in `folder`."""
    for name in MANIFESTS:
        if (folder / name).is_file():
            # Whoever reads the manifest later says what is wrong with it.
            files = json.loads((folder / name).read_text(encoding="utf-8"))["files"]
            return [name, *BESIDE, *(escape(own) for own in files if not is_card(own))]
    return WANTED
