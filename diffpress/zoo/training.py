"""`diffpress zoo train`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from diffpress.export.outputs import check_output
from diffpress.export.publishing import publish, staging

from . import classifier, digits, digits_unet, emoji

TRAINERS: dict[str, Callable[[Path, Path, Path, int, int | None], None]] = {
    "digits": digits.train,
    "digits-classifier": classifier.train,
    "digits-unet": digits_unet.train,
    "emoji": emoji.train,
}


def train_by_name(name: str, data: Path, out: Path, seed: int, steps: int | None, force: bool = False) -> None:
    """Train one model of the zoo into `out`, checkpoints beside it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = check_output(out, [data], force)
    with staging(out) as staged:
        TRAINERS[name](data, staged, out.with_name(f"{out.name}.training"), seed, steps)
        publish(staged, out)
