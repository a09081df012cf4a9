"""Quality over what is spent, from recorded rows: `python bench/curves.py --picture steps --out docs/steps.png`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = dict[str, list[Row]]
"""By name, in the order in which they were measured."""
Lines = dict[str, dict[str, list[tuple[float, float]]]]
"""By the title of a panel and the name of a line: what is spent, and PSNR in dB."""
Case = tuple[str, str, int]
"""Model, scheduler and steps: what rows are compared within."""

SPEEDUPS = (1.8, 2.5, 3.5)
"""Times fewer multiplications, at which all are compared."""
PLAIN = "fewer-steps"
DRAWN_AT = ("ddim", 25)
SCHEDULERS = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}


def cases(results: dict[str, Any]) -> dict[Case, Rows]:
    """The rows of each case."""
    found: dict[Case, Rows] = {}
    for row in results["rows"]:
        rows = found.setdefault((row["model"], row["scheduler"], row["steps"]), {})
        rows.setdefault(row["row"], []).append(row)
    return found


def words(case: Case) -> str:
    """A case as it is written."""
    return f"{case[0]}, {SCHEDULERS[case[1]]}, {case[2]} steps"


def frontier(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Times fewer multiplications and PSNR of the rows that no other beats in both, from the dearest to the cheapest."""
    points = [(row["mac_speedup"], row["psnr_db"]) for row in rows if "error" not in row]
    kept: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def psnr_at(rows: Sequence[Row], speedup: float) -> float | None:
    """PSNR in dB at `speedup` times fewer multiplications, on the straight line between the nearest points of the frontier.

    What spends less than asked for counts as it is; None where nothing spends so little.
    """
    points = frontier(rows)
    cheaper = [point for point in points if point[0] >= speedup]
    if not cheaper:
        return None
    right, dearer = cheaper[0], [point for point in points if point[0] < speedup]
    if not dearer:
        return right[1]
    left = dearer[-1]
    share = (speedup - left[0]) / (right[0] - left[0])
    return left[1] + share * (right[1] - left[1])


def by_computation(results: dict[str, Any]) -> Lines:
    """Of `results/steps.json`: every way of computing less, but for what another row of it beats."""
    shown = {words(case): rows for case, rows in cases(results).items() if case[1:] == DRAWN_AT}
    return {
        title: {name: [point for point in frontier(own) if point[0] > 1] for name, own in rows.items()}
        for title, rows in shown.items()
    }


def by_parameters(results: dict[str, Any]) -> Lines:
    """Of `results/prune.json`: every way of removing units, the original left out."""
    lines: Lines = {}
    for row in results["rows"]:
        if row["share"] and row["row"] != PLAIN:
            own = lines.setdefault(row["model"], {}).setdefault(row["row"], [])
            own.append((100 * row["parameters"] / row["full_parameters"], row["psnr_db"]))
    return {title: {name: sorted(own) for name, own in rows.items()} for title, rows in lines.items()}


PICTURES = {
    "steps": ("steps.json", by_computation, "times fewer multiplications of the denoiser", (1, 4.5)),
    "prune": ("prune.json", by_parameters, "parameters of the denoiser that are left, %", None),
}
"""Name to the results file, what is drawn of it, and over what."""


def draw(picture: str, results: dict[str, Any], out: Path) -> None:
    """One panel a model, one line for every way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, lines_of, label, limits = PICTURES[picture]
    shown = lines_of(results)
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(row["row"] for row in results["rows"]))}
    figure, panels = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False, layout="constrained")
    for panel, (title, lines) in zip(panels[0], shown.items(), strict=True):
        for name, points in lines.items():
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colors[name], label=name)
        panel.set(title=title, xlabel=label, ylabel="PSNR, dB", xlim=limits)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", choices=PICTURES, default="steps")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = Path(__file__).parent / "results" / PICTURES[arguments.picture][0]
    draw(arguments.picture, json.loads(results.read_text(encoding="utf-8")), arguments.out)


if __name__ == "__main__":
    main()
