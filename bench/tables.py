"""The tables that stand in README.md and docs/, from what is recorded: `python bench/tables.py recipes`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ORIGINAL = "original, float32"
"""What presets and their alternatives are measured against."""
LEARNED = {"qalora", "qalora-same-size"}
RECORDED = 256
"""Runs that rows recorded that learn; all others looked at no more than a peer."""
SENSITIVE = {"ptq", "ptq-same-size", *LEARNED}
"""Rows that leave more bits to the layers that measure as most sensitive, where all have few."""
NAMES = {
    "nearest": "nearest, min-max",
    "ptq": "**ptq**",
    "qalora": "**qalora**",
    "ptq-same-size": "**ptq**, bytes of ModelOpt",
    "qalora-same-size": "**qalora**, bytes of ModelOpt",
    "modelopt": "ModelOpt",
    "openvino": "OpenVINO, NNCF",
}
STEPS_OF_LEARNING = {
    "ptq": "ptq",
    "lora": "+ low-rank changes",
    "lora-scale-aware": "+ scale-aware rates",
    "lora-per-step": "+ a scale a step",
    "qalora": "+ student rollouts (qalora)",
    "qat": "whole weights instead of low-rank changes",
}
"""Each adds one thing to the row before it, but for the last."""


def recipes(results: dict[str, Any]) -> str:
    """Presets beside the cheap alternatives, of `results/recipes.json`."""
    header = ("", "denoiser", "folder", "PSNR dB", "SSIM", "time", "peak memory")
    models = {model: sorted(rows, key=lambda row: row["row"] != ORIGINAL) for model, rows in results["models"].items()}
    return _by_model(models, header, _recipe)


def _recipe(row: dict[str, Any]) -> Sequence[str]:
    name = row["row"] if row["row"].startswith("original") else f"`{row['row'].removeprefix('recipe ')}`"
    if "error" in row:
        return (name, f"the pipeline does not run: {row['error']}", *[""] * 5)
    quality = ("", "") if row["row"] == ORIGINAL else (f"{row['psnr_db']:.1f}", f"{row['ssim']:.3f}")
    sizes = (_megabytes(row["denoiser_bytes"]), _megabytes(row["folder_bytes"]))
    return name, *sizes, *quality, f"{row['latency_ratio']:.2f}", f"{row['peak_memory_bytes'] / 1e6:.1f} MB"


def quantizers(results: dict[str, Any]) -> str:
    """Quantizers at every width, the worst first, of `results/quantize.json`."""
    header = ("bits", "", "PSNR dB", "SSIM", "denoiser", "parameters quantized", "seconds")
    ablation = set(STEPS_OF_LEARNING) - set(NAMES)
    models = {
        model: sorted(
            (row for row in rows if row["bits"] != "float" and row["row"] not in ablation), key=_width_then_quality
        )
        for model, rows in results["models"].items()
    }
    return _by_model(models, header, _quantizer)


def _width_then_quality(row: dict[str, Any]) -> tuple[int, float]:
    return ("W8A8", "W4A8", "W4A4", "W2A8", "w4").index(row["bits"]), row.get("psnr_db", 0)


def _quantizer(row: dict[str, Any]) -> Sequence[str]:
    name = NAMES.get(row["row"], row["row"])
    if row["row"] in SENSITIVE and row["bits"] == "W4A4":
        name += ", 8-bit inputs where sensitive"
    if row["row"] in LEARNED:
        name += f", {RECORDED} runs recorded"
    if "error" in row:
        return (row["bits"], name, row["error"], *[""] * 4)
    share = f"{row['quantized_parameters_share'] * 100:.0f} %" if "quantized_parameters_share" in row else ""
    quality = (f"{row['psnr_db']:.1f}", f"{row['ssim']:.3f}")
    return row["bits"], name, *quality, _megabytes(row["denoiser_bytes"]), share, f"{row['seconds']:.0f}"


def learning(results: dict[str, Any]) -> str:
    """What learning is made of, of `results/quantize.json`: W4A4 on the one model that is taken apart."""
    (rows,) = (
        {row["row"]: row for row in rows if row["bits"] == "W4A4"}
        for rows in results["models"].values()
        if any(row["row"] == "lora" for row in rows)
    )
    return _table(
        ("", "PSNR dB", "latent MSE", "seconds", "more memory than running"),
        [
            (
                words,
                f"{rows[name]['psnr_db']:.1f}",
                f"{rows[name]['latent_mse']:.4f}",
                f"{rows[name]['seconds']:.0f}",
                f"{rows[name]['peak_bytes'] / 1e6:.0f} MB",
            )
            for name, words in STEPS_OF_LEARNING.items()
        ],
    )


def cpu(results: dict[str, Any]) -> str:
    """One denoiser call, of `results/cpu.json`."""
    rows = [
        (
            f"{row['model']}, {row['row']}",
            f"{row['milliseconds']:,.{0 if row['milliseconds'] > 100 else 1}f}",
            f"{row['over_float32']:.2f}",
            f"{row['over_bfloat16']:.2f}" if "over_bfloat16" in row else "",
        )
        for row in sorted(results["rows"], key=lambda row: row["model"])
    ]
    return _table(("", "ms", "of float32's time", "of bfloat16's"), rows)


def fusion(results: dict[str, Any]) -> str:
    """Packed layers whose norm is fused with them, of `results/fusion.json`."""
    rows = [(row["model"], str(row["layers"]), str(row["fused"])) for row in results["rows"]]
    return _table(("model", "packed layers", "fused with their norm"), rows)


def _by_model(
    models: dict[str, list[dict[str, Any]]], header: Sequence[str], line: Callable[[dict[str, Any]], Sequence[str]]
) -> str:
    lines: list[Sequence[str]] = []
    for model, rows in models.items():
        lines += [(f"**{model}**", *[""] * (len(header) - 1)), *map(line, rows)]
    return _table(header, lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "recipes": ("recipes.json", recipes),
    "quantizers": ("quantize.json", quantizers),
    "learning": ("quantize.json", learning),
    "cpu": ("cpu.json", cpu),
    "fusion": ("fusion.json", fusion),
}
"""Name to the results file and what is made of it."""


def recorded(name: str) -> str:
    """The table of that name from what is recorded."""
    file, make = TABLES[name]
    return make(json.loads((RESULTS / file).read_text(encoding="utf-8")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    print(recorded(parser.parse_args().table))
