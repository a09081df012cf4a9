"""One module to one ONNX file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import Tensor, nn

from diffpress.kernels import code_range, unpack_codes

from ..errors import UnsupportedModelError
from ..runtime import PackedLayer, StepClock
from .manifest import Port
from .translate import translations

OPSET = 21
TRACED_BATCH = 2
"""A dynamic axis cannot be traced at size 1."""


@dataclass(frozen=True)
class Input:
    """One input of a graph, and how to make an example of it."""

    name: str
    shape: tuple[int, ...]
    """Without the batch."""
    below: int | None = None
    """Whole numbers below this one; None for normal random numbers."""
    choices: tuple[float, ...] = ()
    """One of these numbers for the whole batch, which the input then does not have."""

    def example(self, batch: int, generator: torch.Generator) -> Tensor:
        """A random value."""
        if self.choices:
            return torch.tensor([self.choices[int(torch.randint(len(self.choices), (), generator=generator))]])
        if self.below is not None:
            return torch.randint(self.below, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)

    def port(self) -> Port:
        """How the manifest describes it."""
        shape = self.shape if self.choices else ("batch", *self.shape)
        return Port(name=self.name, dtype="float32" if self.below is None else "int64", shape=shape)


@dataclass(frozen=True)
class Part:
    """One graph of a pipeline before it is written: a module that takes `inputs` in their order and gives one tensor."""

    name: str
    module: nn.Module
    inputs: tuple[Input, ...]
    output: str

    def example(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values of all inputs."""
        return {item.name: item.example(batch, generator) for item in self.inputs}


def packed_layers(module: nn.Module) -> list[PackedLayer]:
    """The layers that a Pack edit left in a module."""
    return [layer for layer in module.modules() if isinstance(layer, PackedLayer)]


def widen_weights_(module: nn.Module) -> int:
    """Store the integer weights of packed layers as int8, with the same values, so that the graph needs no unpacking.

    Returns how many layers that changed.
    """
    layers = [layer for layer in packed_layers(module) if layer.edit.weight_bits < 8]
    for layer in layers:
        layer.weight = unpack_codes(layer.weight, layer.columns, layer.edit.weight_bits)
        layer.edit = layer.edit.model_copy(update={"weight_bits": 8})
    return len(layers)


def write_graph(part: Part, folder: Path) -> None:
    """Trace a part and write `NAME.onnx` with all its weights in `NAME.onnx.data`, its batch left open.

    Raises UnsupportedModelError where torch cannot trace it.
    """
    example = part.example(TRACED_BATCH, torch.Generator().manual_seed(0))
    batch = torch.export.Dim("batch")
    dynamic = tuple(None if item.choices else {0: batch} for item in part.inputs)
    with _clocks_kept(part.module), _quiet():
        try:
            program = torch.onnx.export(
                part.module,
                tuple(example.values()),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                input_names=[item.name for item in part.inputs],
                output_names=[part.output],
                custom_translation_table=translations(),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(f"{part.name} cannot be exported to ONNX: torch says {reason!r}.") from error
    assert program is not None
    _finish_(program.model)
    # Everything is external from the first byte on: one place to look for weights.
    ir.save(program.model, folder / f"{part.name}.onnx", external_data=f"{part.name}.onnx.data")


def _finish_(model: ir.Model) -> None:
    """Lay weights out once instead of in every run, and drop what only a debugger of the trace needs."""
    optimizer.fold_constants(model, should_fold=_lays_out_weights)
    RemoveUnusedNodesPass()(model)
    for value in model.graph.initializers.values():
        _narrow_(value)
    ClearMetadataAndDocStringPass()(model)


def _lays_out_weights(node: ir.Node) -> bool:
    return node.op_type in ("Reshape", "Transpose")


def _narrow_(weight: ir.Value) -> None:
    """Store weights that fit four bits in four bits, where they are only dequantized: what else engines do with int4 varies."""
    used = {node.op_type for node, _ in weight.uses()}
    if weight.dtype != ir.DataType.INT8 or used != {"DequantizeLinear"} or weight.const_value is None:
        return
    codes, (low, high) = weight.const_value.numpy(), code_range(4)
    if low <= codes.min() and codes.max() <= high:
        weight.const_value = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), name=weight.name)
        weight.dtype = ir.DataType.INT4


@contextmanager
def _clocks_kept(module: nn.Module) -> Iterator[None]:
    """Tracing moves the clocks with tensors that stand for no value; put the real ones back."""
    clocks: list[StepClock] = [layer.clock for layer in packed_layers(module) if layer.clock is not None]
    before = [clock.weights for clock in clocks]
    try:
        yield
    finally:
        for clock, weights in zip(clocks, before, strict=True):
            clock.weights = weights


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns about packages and about its own future, neither of which a user can do anything about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
