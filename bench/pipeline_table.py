"""The table of `results/pipelines.json`: one row a pipeline, one column a step, refusals with their sentences below."""

from __future__ import annotations

import re
from typing import Any

COLUMNS = ("compress", "verify", "load", "compare", "compile", "export")
"""What is done to every pipeline, in this order."""


def pipelines(results: dict[str, Any]) -> str:
    """What worked, and by number what was said where it was refused."""
    said: dict[str, int] = {}
    lines = [f"| pipeline | {' | '.join(COLUMNS)} |", f"|{'---|' * (1 + len(COLUMNS))}"]
    for name, row in results["pipelines"].items():
        own = {
            column: {kind: _plain(words, row["class"]) for kind, words in row.get(column, {}).items()}
            for column in COLUMNS
        }
        cells = [_cell(own[column], said) for column in COLUMNS]
        lines.append(f"| {name} ({row['class'].removesuffix('Pipeline')}) | {' | '.join(cells)} |")
    notes = [f"{number}. {sentence}" for sentence, number in said.items()]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _plain(words: str, pipeline: str) -> str:
    """Sentences that differ in the name of the pipeline alone are one."""
    return " ".join(re.sub(rf"\b{pipeline}\b", "The pipeline", words, count=1).split())


def _cell(outcome: dict[str, str], said: dict[str, int]) -> str:
    if "works" in outcome:
        return outcome["works"]
    words = outcome.get("refused") or outcome.get("fault")
    if words is None:
        return ""
    kind = "refused" if "refused" in outcome else "**fault**"
    return f"{kind} ({said.setdefault(words, len(said) + 1)})"
