"""The tables that stand in README.md and docs/, from what is recorded: `python bench/tables.py recipes`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import curves
import gpu_table
import pipeline_table

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

OWN = ("inherit", "inherit+W8A8")
"""Our rows of `results/steps.json`."""
NOT_REACHED = "-"
CACHES_AT = ("ddim", 25)
"""Scheduler and steps at which every peer is shown."""

PRUNED = {
    "taylor": "Diff-Pruning (Taylor), all layers together",
    "taylor-even": "Diff-Pruning (Taylor)",
    "wanda": "Wanda",
    "obs-even": "obs, even shares, not refitted",
    "obs-even+refit": "obs, even shares",
    "obs": "**obs**",
    "masks": "**masks**",
    "fewer-steps": "fewer steps",
}
COMBINED = "zoo:emoji"
"""On which stages are combined."""


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
    """One denoiser call on the fastest tier, of `results/cpu.json`."""
    rows = [row for row in results["rows"] if "error" not in row]
    threads = sorted({row["threads"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    header = ("", "ms", *(f"of float32's time, {n} thread{'s' * (n > 1)}" for n in threads), "of bfloat16's", "memory")

    def line(row: dict[str, Any]) -> Sequence[str]:
        same = [next((of for of in rows if _same_call(of, row) and of["threads"] == n), None) for n in threads]
        return (
            row["row"],
            f"{row['milliseconds']:,.{0 if row['milliseconds'] > 100 else 1}f}",
            *("" if of is None else f"{of['over_float32']:.2f}" for of in same),
            f"{row['over_bfloat16']:.2f}" if "over_bfloat16" in row else "",
            f"{row['bytes'] / 1e6:,.0f} MB" if "bytes" in row else "",
        )

    alone = {m: [row for row in rows if (row["model"], row["threads"]) == (m, threads[0])] for m in models}
    return _by_model(
        {m: list({row["row"]: row for row in reversed(own)}.values())[::-1] for m, own in alone.items()}, header, line
    )


def _same_call(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("model", "row", "tier"))


def fusion(results: dict[str, Any]) -> str:
    """Packed layers whose norm is fused with them, of `results/fusion.json`."""
    rows = [(row["model"], str(row["layers"]), str(row["fused"])) for row in results["rows"]]
    return _table(("model", "packed layers", "fused with their norm"), rows)


def steps(results: dict[str, Any]) -> str:
    """Fewer steps, the best peer and ours at equal multiplications of the denoiser, of `results/steps.json`."""
    header = ("", "fewer MACs", "fewer steps", "best peer", *(f"**{row}**" for row in OWN), "its time", "its cache")
    lines: list[Sequence[str]] = []
    for case, rows in curves.cases(results).items():
        lines.append((f"**{curves.words(case)}**", *[""] * (len(header) - 1)))
        lines += [("", *_at_speedup(rows, speedup)) for speedup in curves.SPEEDUPS]
    return _table(header, lines)


def _at_speedup(rows: curves.Rows, speedup: float) -> Sequence[str]:
    peers = {name: curves.psnr_at(own, speedup) for name, own in rows.items() if name not in (curves.PLAIN, *OWN)}
    best = max(((psnr, name) for name, psnr in peers.items() if psnr is not None), default=None)
    ours = [row for row in rows.get(OWN[0], []) if row["wanted_speedup"] == speedup and "error" not in row]
    return (
        f"{speedup}x",
        _decibels(curves.psnr_at(rows[curves.PLAIN], speedup)),
        NOT_REACHED if best is None else f"{best[0]:.1f}, {best[1]}",
        *(_decibels(curves.psnr_at(rows.get(row, []), speedup)) for row in OWN),
        "".join(f"{row['latency_ratio']:.2f}" for row in ours),
        "".join(_kilobytes(row["cached_bytes"]) for row in ours),
    )


def caches(results: dict[str, Any]) -> str:
    """Every way of computing less, at equal multiplications, where most was measured, of `results/steps.json`."""
    header = ("", *(f"{speedup}x" for speedup in curves.SPEEDUPS), "most", "time, of what its MACs promise", "cache")
    lines: list[Sequence[str]] = []
    for case, rows in curves.cases(results).items():
        if case[1:] == CACHES_AT:
            lines.append((f"**{case[0]}**", *[""] * (len(header) - 1)))
            lines += [(name, *_cache(own)) for name, own in rows.items()]
    return _table(header, lines)


def _cache(rows: list[dict[str, Any]]) -> Sequence[str]:
    fine = [row for row in rows if "error" not in row]
    if not fine:
        return (rows[0]["error"], *[""] * 5)
    return (
        *(_decibels(curves.psnr_at(rows, speedup)) for speedup in curves.SPEEDUPS),
        f"{max(row['mac_speedup'] for row in fine):.2f}x",
        f"{median(row['latency_ratio'] * row['mac_speedup'] for row in fine):.2f}",
        _kilobytes(max(row["cached_bytes"] for row in fine)),
    )


def _decibels(psnr_db: float | None) -> str:
    return NOT_REACHED if psnr_db is None else f"{psnr_db:.1f}"


def feedback(results: dict[str, Any]) -> str:
    """Inner-loop feedback beside fewer steps, of `results/ilf.json`."""
    header = ("", "multiplications", "PSNR dB", "latents", "latents, 50 steps", "features", "features, 50 steps")
    return _table(header, [_feedback(row) for row in results["rows"]])


def _feedback(row: dict[str, Any]) -> Sequence[str]:
    distance = f"{row['kernel_distance']:.4f}"
    if "macs" not in row:
        return (row["row"], *[""] * 4, distance, "")
    psnr = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
    errors = [f"{row[key]:.1e}" for key in ("latent_mse", "latent_mse_long")]
    return (row["row"], f"{1 / row['speedup']:.2f}", psnr, *errors, distance, f"{row['feature_mse_long']:.1e}")


def step_gradients(results: dict[str, Any]) -> str:
    """Peak memory and time of gradients through whole runs, of `results/step_gradients.json`."""
    rows = {(row["way"], row["steps"]): row for row in results["rows"]}
    ways, steps = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    header = (
        "",
        *(f"{count} steps" for count in steps),
        f"{steps[-1]} over {steps[0]}",
        *(f"s, {n} steps" for n in steps),
    )
    lines = []
    for way in ways:
        own = [rows[way, count] for count in steps]
        peaks = [row["peak_bytes"] for row in own]
        seconds = [f"{row['cpu_seconds']:.1f}" for row in own]
        # What a run without a gradient takes is too little to tell from what the C library holds back.
        growth = "" if way == "no gradient" else f"{peaks[-1] / peaks[0]:.2f}"
        lines.append((way, *(f"{peak / 1e6:.1f} MB" for peak in peaks), growth, *seconds))
    return _table(header, lines)


def step_gradient_sizes(results: dict[str, Any]) -> str:
    """What one call of a UNet in the shape of Stable Diffusion XL's keeps, of `results/step_gradients.json`."""
    header = ("width", "latents", "parameters", "kept, measured", "kept, by shapes")
    lines = [
        (
            str(row["width"]),
            f"{row['latents']} x {row['latents']}",
            f"{row['parameters'] / 1e6:,.0f} million",
            _megabytes(row["bytes"]) if "bytes" in row else "",
            _megabytes(row["bytes_by_shapes"]),
        )
        for row in results["sizes"]
    ]
    return _table(header, lines)


def pruning(results: dict[str, Any]) -> str:
    """Ways of removing units at equal parameters, the worst first, of `results/prune.json`."""
    header = ("removed", "", "PSNR dB", "SSIM", "latent MSE", "class", "parameters", "MACs", "time", "seconds")
    models: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["share"]:
            models.setdefault(row["model"], []).append(row)
    ranked = {name: sorted(rows, key=lambda row: (row["share"], row["psnr_db"])) for name, rows in models.items()}
    return _by_model(ranked, header, lambda row: (f"{row['share']:.0%}", *_pruned(row)))


def _pruned(row: dict[str, Any]) -> Sequence[str]:
    fewer = f", {row['steps']}" if row["row"] == curves.PLAIN else ""
    return (
        PRUNED.get(row["row"], row["row"]) + fewer,
        f"{row['psnr_db']:.1f}",
        f"{row['ssim']:.3f}",
        f"{row['latent_mse']:.1e}",
        f"{row['class_accuracy']:.0%}" if "class_accuracy" in row else "",
        f"{row['parameters'] / row['full_parameters']:.3f}",
        f"{row['macs'] / row['full_macs']:.2f}",
        f"{row['latency_ratio']:.2f}",
        f"{row['seconds']:.0f}" if "seconds" in row else "",
    )


def pruning_together(results: dict[str, Any]) -> str:
    """Pruning, rounding and fewer computations, alone and one after the other, of `results/prune.json`."""
    rows = [row for row in results["rows"] if not row["share"] and row["model"] == COMBINED]
    full = next(row for row in rows if row["row"] == "original")
    header = ("", "PSNR dB", "latent MSE", "denoiser's bytes", "MACs", "time")
    lines = [
        (
            row["row"],
            f"{row['psnr_db']:.1f}",
            f"{row['latent_mse']:.2e}",
            f"{row['denoiser_bytes'] / full['denoiser_bytes']:.2f}",
            f"{row['macs'] / row['full_macs']:.2f}",
            f"{row['latency_ratio']:.2f}",
        )
        for row in rows
        if row is not full
    ]
    return _table(header, lines)


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


def _kilobytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e3:.0f} kB"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


def gpu(results: dict[str, Any]) -> str:
    """Operations on a GPU, of `results/gpu_kernels.json`."""
    return _table(gpu_table.HEADER, gpu_table.lines(results))


def bundles(results: dict[str, Any]) -> str:
    """The runner beside Python's run of an export, of `results/bundle.json`."""
    header = ("export", "zip", "images", "start", "memory", "in Python", "ratio", "in an empty root")
    return _table(header, [_bundle(row) for row in results["rows"]])


def _bundle(row: dict[str, Any]) -> Sequence[str]:
    images = "equal" if row["levels_that_differ"] == 0 else f"{row['psnr_db']:.1f} dB"
    start = f"{row['start_ms']:.0f} ms"
    memory = [f"{row[f'{own}_peak_memory_bytes'] / 1e6:.0f} MB" for own in ("runner", "python")]
    name = f"{row['export']}, {row['pipeline']}"
    return (
        name,
        _megabytes(row["zip_bytes"]),
        images,
        start,
        *memory,
        f"{row['memory_ratio']:.2f}",
        row["empty_root"],
    )


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "recipes": ("recipes.json", recipes),
    "quantizers": ("quantize.json", quantizers),
    "learning": ("quantize.json", learning),
    "cpu": ("cpu.json", cpu),
    "cpu-avx512vnni": ("cpu-avx512vnni.json", cpu),
    "gpu": ("gpu_kernels.json", gpu),
    "feedback": ("ilf.json", feedback),
    "fusion": ("fusion.json", fusion),
    "bundles": ("bundle.json", bundles),
    "steps": ("steps.json", steps),
    "caches": ("steps.json", caches),
    "pipelines": ("pipelines.json", pipeline_table.pipelines),
    "step-gradients": ("step_gradients.json", step_gradients),
    "step-gradient-sizes": ("step_gradients.json", step_gradient_sizes),
    "pruning": ("prune.json", pruning),
    "pruning-together": ("prune.json", pruning_together),
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
