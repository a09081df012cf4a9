"""The time below which no GPU can go, from bytes and operations: `python bench/gpu/roofline.py --markdown`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from shapes import MODELS, Attention, Conv, Form, Images, Linear, Spec, Tokens, specs


class Peak(NamedTuple):
    """What a data sheet promises, without sparsity."""

    bandwidth: float
    """Bytes a second."""
    operations: Mapping[str, float]
    """A second, by the kind of tensor cores: a multiplication and an addition are two."""


class Work(NamedTuple):
    """What an operation cannot do without, if every tensor is read or written once."""

    bytes: int
    operations: Mapping[str, int]
    """By the kind of tensor cores."""


PEAKS = {
    "H200": Peak(4.8e12, {"half": 989.4e12, "int8": 1978.9e12, "fp8": 1978.9e12}),
    "H100 PCIe": Peak(2.0e12, {"half": 756.5e12, "int8": 1513e12, "fp8": 1513e12}),
    "H100 NVL": Peak(3.9e12, {"half": 835.5e12, "int8": 1671e12, "fp8": 1671e12}),
    "H100": Peak(3.35e12, {"half": 989.4e12, "int8": 1978.9e12, "fp8": 1978.9e12}),
    "RTX 4090": Peak(1.008e12, {"half": 165.2e12, "int8": 660.6e12, "fp8": 330.3e12}),
    "Orin": Peak(0.2048e12, {"half": 42.5e12, "int8": 85e12}),
}
"""NVIDIA's data sheets of H200 (SXM) and H100 (PCIe, NVL, SXM); the Ada GPU architecture white paper, appendix A, summed in
float32; the technical brief of Jetson AGX Orin 64 GB, its GPU alone. Where a sheet gives sparse figures, half of them."""
PAGE = ("H200", "RTX 4090", "Orin")


def peak_of(name: str) -> Peak | None:
    """The peak of the GPU that calls itself `name`; None where it is not in the table."""
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def limit_seconds(work: Work, peak: Peak) -> float | None:
    """The longer of moving the bytes and doing the operations; None where the GPU has no such cores."""
    if any(cores not in peak.operations for cores in work.operations):
        return None
    computing = sum(count / peak.operations[cores] for cores, count in work.operations.items())
    return max(work.bytes / peak.bandwidth, computing)


def work_of(spec: Spec) -> Work:
    """Bytes and operations of a row, without the scales and biases of whole channels, which are few."""
    shape, form = spec.shape, spec.form
    if isinstance(shape, Attention):
        return _attention(shape, form)
    if isinstance(shape, Linear):
        return _product(shape, form, shape.rows * shape.depth)
    if isinstance(shape, Conv):
        return _product(shape.as_linear(), form, shape.batch * shape.height * shape.width * shape.channels)
    return _codes(spec.op, shape)


def _product(shape: Linear, form: Form, inputs: int) -> Work:
    rows, depth, columns = shape
    weights = int(columns * depth * form.kept)
    stored = weights * form.bits // 8
    # Where single weights are left out, it has to be said in two bits which ones are kept.
    stored += weights // 4 if form.words == "2:4" else 0
    stored += 4 * columns * -(-depth // form.group) if form.group else 0
    outputs = rows * columns // (2 if form.activation == "geglu" else 1)
    branch = form.rank * (depth + columns)
    operations = 2 * rows * (weights + branch)
    return Work(form.input_bytes * inputs + stored + 2 * branch + 2 * outputs, {form.cores: operations})


def _attention(shape: Attention, form: Form) -> Work:
    batch, heads, queries, keys, columns = shape
    product = 2 * batch * heads * queries * keys * columns
    # Queries and outputs, keys and values.
    numbers = 2 * batch * heads * columns * (queries + keys)
    return Work(2 * numbers, {"int8": 2 * product} if form.integer_values else {"int8": product, "half": product})


def _codes(op: str, shape: Tokens | Images) -> Work:
    """Two bytes in and one out; a scale a row where there are rows, scale and shift where the norm is modulated."""
    if isinstance(shape, Images):
        return Work(3 * shape.batch * shape.channels * shape.height * shape.width, {})
    rows = shape.batch * shape.tokens
    modulation = 4 * shape.batch * shape.channels if op == "norm_modulate_quantize" else 0
    return Work(3 * rows * shape.channels + 4 * rows + modulation, {})


def markdown() -> str:
    """The page of the documentation."""
    return "\n".join([*HEAD, *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    for spec in sorted(specs(), key=lambda spec: (spec.op, spec.form.words, MODELS.index(spec.model))):
        work, names = work_of(spec), spec.names()
        limits = " | ".join(_microseconds(limit_seconds(work, PEAKS[name])) for name in PAGE)
        operations = sum(work.operations.values()) / 1e9
        counts = f"{work.bytes / 1e6:.2f} | {operations:.2f}"
        yield f"| `{spec.op}` | {names['form']} | {spec.model} | {names['shape']} | {counts} | {limits} |"


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


HEAD = [
    "# Roofline",
    "",
    "Made by `python bench/gpu/roofline.py --markdown` from the shapes in `bench/gpu/shapes.py`: the limit is the longer of",
    "reading and writing every tensor once at the bandwidth, and doing the operations at the dense peak of the tensor cores,",
    "that the vendor's data sheet gives.",
    "",
    "A linear layer's shape is rows x depth x columns; a convolution's batch, height, width, channels, outputs, kernel,",
    "stride; an attention's batch, heads, queries, keys, columns; of tokens batch, tokens, channels; of images batch,",
    "channels, height, width, groups. Nothing stands where a GPU has no tensor cores for the format.",
    "",
    "| | form | model | shape | MB | 10⁹ operations | " + " | ".join(f"{name}, µs" for name in PAGE) + " |",
    "|---|---|---|---|---|---|" + "---|" * len(PAGE),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="the page of the documentation")
    if parser.parse_args().markdown:
        print(markdown(), end="")
        return
    for name, peak in PEAKS.items():
        print(name, peak)


if __name__ == "__main__":
    main()
