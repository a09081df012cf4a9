"""Files of tensors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import unwritable


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`; whoever looks there finds the older file or the whole new one.

    Raises OutputError where they cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of_new(partial)
        save_file(dict(tensors), partial, metadata=metadata)
        # Safetensors keeps what it writes from everybody else.
        partial.chmod(mode)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def _mode_of_new(path: Path) -> int:
    """The permissions that files get here, by the umask and what the folder says."""
    path.unlink(missing_ok=True)
    path.touch()
    return S_IMODE(path.stat().st_mode)
