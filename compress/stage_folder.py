"""Where a stage keeps what it has done so far, and what it has left behind in the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffpress.export.edits import Edit
from diffpress.export.tensor_files import save_tensors

from .changes import Changes, Note

EDITS: TypeAdapter[Sequence[Edit]] = TypeAdapter(list[Edit])


@dataclass(frozen=True)
class StageFolder:
    """One stage's work on one component. What a method puts beside our two files is its own."""

    path: Path

    @property
    def _words(self) -> Path:
        return self.path / "changes.json"

    @property
    def _tensors(self) -> Path:
        return self.path / "changes.safetensors"

    def finished(self) -> Changes | None:
        """What the stage has left behind; None where it has not come to its end, or its files are damaged."""
        try:
            data = json.loads(self._words.read_text(encoding="utf-8"))
            return Changes(
                tuple(EDITS.validate_python(data["edits"])),
                load_file(self._tensors),
                {module: Note(**{**note, "shape": tuple(note["shape"])}) for module, note in data["notes"].items()},
                tuple(data["history"]),
                data["settled"],
            )
        except (OSError, ValueError, KeyError, SafetensorError):
            return None

    def finish(self, changes: Changes) -> None:
        """Write the changes down; the words last, so that what is there is whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_tensors({name: tensor.contiguous() for name, tensor in changes.tensors.items()}, self._tensors)
        words = {
            "edits": EDITS.dump_python(list(changes.edits), mode="json"),
            "notes": {module: asdict(note) for module, note in changes.notes.items()},
            "history": list(changes.history),
            "settled": dict(changes.settled),
        }
        partial = self._words.with_suffix(".partial")
        partial.write_text(json.dumps(words), encoding="utf-8")
        partial.replace(self._words)
