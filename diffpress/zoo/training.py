"""`diffpress zoo train`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from . import classifier, digits, digits_unet, emoji

TRAINERS: dict[str, Callable[[Path, Path, Path, int, int | None], None]] = {
    "digits": digits.train,
    "digits-classifier": classifier.train,
    "digits-unet": digits_unet.train,
    "emoji": emoji.train,
}


def train_by_name(name: str, data: Path, out: Path, seed: int, steps: int | None) -> None:
    """Train one model of the zoo into `out`, checkpoints beside it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = out.with_name(f"{out.name}.training")
    work.mkdir(parents=True, exist_ok=True)
    TRAINERS[name](data, out, work, seed, steps)
