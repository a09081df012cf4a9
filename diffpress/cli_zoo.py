"""The commands around the zoo."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .console import print_table

zoo_app = typer.Typer(help="The pipelines shipped with diffpress; `zoo train` makes one from data.")


class ZooModel(str, Enum):  # noqa: UP042
    """What `zoo train` can make."""

    CLASSIFIER = "digits-classifier"
    DIGITS = "digits"
    DIGITS_UNET = "digits-unet"
    EMOJI = "emoji"


@zoo_app.callback(invoke_without_command=True)
def zoo(context: typer.Context) -> None:
    """List the pipelines shipped with diffpress."""
    from .zoo import PIPELINES

    if context.invoked_subcommand is None:
        print_table("zoo", ("model", "what it is"), [(f"zoo:{name}", line) for name, line in PIPELINES.items()])


@zoo_app.command("train")
def zoo_train(
    name: Annotated[ZooModel, typer.Argument(help="what to train")],
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="npz file with the training data")],
    out: Annotated[Path, typer.Option(help="folder for the result; checkpoints go to OUT.training")],
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="seed of initialisation and batches")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps of the last stage")] = None,
    force: Annotated[bool, typer.Option(help="replace an --out that is there")] = False,
) -> None:
    """Train a model of the zoo from data; the same command continues a run that was interrupted."""
    from .zoo.training import train_by_name

    train_by_name(name.value, data, out, seed, steps, force)
