"""From what the user asks for to what the denoiser is given, without transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..engines.engine import Array, Session
from ..errors import ArtifactError, UserError
from ..extras import import_extra
from .manifest import ExportManifest, Labels, Tokens


class Conditioner(Protocol):
    """Makes the denoiser's inputs of conditions."""

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        """Inputs for these conditions; raises UserError for one that this pipeline does not take."""

    def encode_null(self, count: int) -> dict[str, Array]:
        """Inputs for `count` times no condition, as guidance needs them."""


class PromptConditioner:
    """CLIP's way: tokens cut and padded to a fixed length, then the text encoder."""

    def __init__(self, folder: Path, tokens: Tokens, encoder: Session) -> None:
        self.tokenizer = _open_tokenizer(folder / tokens.file)
        self.tokenizer.enable_truncation(tokens.length)
        pad = self.tokenizer.token_to_id(tokens.pad_token)
        if pad is None:
            raise ArtifactError(f"{folder}: {tokens.file} does not know the token {tokens.pad_token!r}. Export again.")
        self.tokenizer.enable_padding(length=tokens.length, pad_id=pad, pad_token=tokens.pad_token)
        self.encoder = encoder

    def tokenize(self, texts: Sequence[str]) -> Array:
        """Token ids [B, T] of prompts."""
        return np.array([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))], np.int64)

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        return self.encoder.run({"input_ids": self.tokenize(texts)})

    def encode_null(self, count: int) -> dict[str, Array]:
        return {name: np.repeat(value, count, axis=0) for name, value in self.encode([""]).items()}


class LabelConditioner:
    """A class, by number or name."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        return {"class_labels": np.array([self._number(text) for text in texts], np.int64)}

    def encode_null(self, count: int) -> dict[str, Array]:
        return {"class_labels": np.full(count, self.labels.null, np.int64)}

    def _number(self, text: str) -> int:
        number = int(text) if text.isdecimal() else self.labels.names.get(text, -1)
        if not 0 <= number < self.labels.count:
            known = f", or one of {', '.join(sorted(self.labels.names)[:12])}" if self.labels.names else ""
            raise UserError(f"{text!r} is no class of this pipeline. Give a number below {self.labels.count}{known}.")
        return number


class NoConditioner:
    """The pipeline takes no condition."""

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        given = next((text for text in texts if text), None)
        if given is not None:
            raise UserError(f"This pipeline takes neither prompt nor label, but got {given!r}. Leave it out.")
        return {}

    def encode_null(self, count: int) -> dict[str, Array]:
        return {}


def conditioner_of(folder: Path, manifest: ExportManifest, open_graph: Callable[[str], Session]) -> Conditioner:
    """The conditioner that an export folder calls for; `open_graph` opens one of its components by name."""
    if manifest.tokens is not None:
        return PromptConditioner(folder, manifest.tokens, open_graph("text_encoder"))
    return NoConditioner() if manifest.labels is None else LabelConditioner(manifest.labels)


def _open_tokenizer(file: Path) -> Any:
    tokenizers = import_extra("tokenizers")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise ArtifactError(f"{file} is no tokenizer that can be read ({error}). Export again.") from error
