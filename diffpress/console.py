"""What the command line shows while it works and when it is done."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from .poor import Poor
    from .speed import Speed

ERRORS = Console(stderr=True, highlight=False)
OUTPUT = Console(highlight=False)


class Stages:
    """A progress bar for each stage, on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show `stage` as `done` of `total`; a stage may count up several times, and carry a note after a comma."""
        name = stage.partition(",")[0]
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total, description=stage)


@contextmanager
def stages() -> Iterator[Stages]:
    """Progress bars with an estimate of the time left while the context lasts."""
    columns = [
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=ERRORS) as progress:
        yield Stages(progress)


def say(sentence: str) -> None:
    """One sentence as it stands: a path in it is not broken where the terminal ends, nor read as markup."""
    OUTPUT.print(sentence, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """The one JSON object of `--json`."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> None:
    """A table on standard output; `numbers` sets all but the first column to the right."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    OUTPUT.print(table)


def print_comparison(metrics: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    """Reference beside candidate, with the ratio."""
    rows = [
        (name, "", f"{metrics[name]:.4g}", "")
        for name in ("psnr_db", "ssim", "snr_db", "latent_mse")
        if name in metrics
    ]
    pairs = {name: value for name, value in {**metrics, **cost}.items() if isinstance(value, dict)}
    for name, value in pairs.items():
        ratio = value.get("ratio", value["candidate"] / value["reference"])
        rows.append((name, _figure(value["reference"]), _figure(value["candidate"]), f"{ratio:.3f}"))
    title = f"{metrics['count']} pairs, {metrics['steps']} steps, same prompts and noise"
    print_table(title, ("", "reference", "candidate", "ratio"), rows, numbers=True)
    from .report.formatting import measured_words

    for sentence in measured_words(metrics):
        OUTPUT.print(f"{sentence}.", markup=False, soft_wrap=True)


def print_poor(poor: Poor | None) -> None:
    """What is wrong with a result; nothing where nothing is."""
    if poor is not None:
        OUTPUT.print(f"{poor.sentence()}.", style="bold", markup=False, soft_wrap=True)


def print_speed(speed: Speed | None) -> None:
    """Whether it is faster, and what is expanded; nothing where nothing was timed."""
    for sentence in (speed.headline(), speed.detail()) if speed else ():
        if sentence:
            OUTPUT.print(f"{sentence}.", markup=False, soft_wrap=True)


def print_estimate(values: Mapping[str, Any]) -> None:
    """What a `compress` will take."""
    rows = [(f"{stage}, seconds", f"{seconds:,.0f}") for stage, seconds in values["seconds"].items()]
    rows += [(name, f"{values[name] / 1e6:,.0f} MB") for name in ("disk_bytes", "memory_bytes")]
    if "cache_bytes" in values:
        rows.append(("features kept for an image", f"{values['cache_bytes'] / 1e6:,.1f} MB"))
    rows.append(("loaded in", values["dtype"]))
    for order, needed in values.get("learning_bytes", {}).items():
        taken = ", taken" if order == values["order"] else ""
        rows.append((f"learning memory, order {order}{taken}", f"{needed / 1e6:,.0f} MB"))
    print_table("estimate, from one timed step", ("", ""), rows, numbers=True)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
