"""The process that builds one TensorRT-RTX engine, apart from all others since it may crash.

`python -m diffpress.export.engines.tensorrt_build` is given a graph, where to write the engine, targets such as `SM86`,
and the fewest, the usual and the most rows of a call; it prints one JSON object.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..extras import import_extra

LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs:"
)
COMPUTES = frozenset({"correlation", "gemm", "runtime_fusion"})
"""What the builder calls convolutions, matrix products and those with weights in four bits."""
DATATYPE = re.compile(r"Datatype: (\w+)")
LOW_BITS = frozenset({"FP8", "Int4", "Int8"})


def build(graph: Path, out: Path, targets: list[str], batches: list[int]) -> dict[str, Any]:
    """Build an engine; returns how many layers compute in which types, or under `errors` what the builder said."""
    tensorrt = import_extra("tensorrt_rtx", "tensorrt")
    messages: list[tuple[str, str]] = []

    class Logger(tensorrt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.append((severity.name, message))

    builder = tensorrt.Builder(logger := Logger())
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        return {"errors": [parser.get_error(place).desc() for place in range(parser.num_errors)]}
    engine = builder.build_serialized_network(network, _settings(tensorrt, builder, network, targets, batches))
    if engine is None:
        return {"errors": [text for severity, text in messages if severity.endswith("ERROR")]}
    out.write_bytes(memoryview(engine))
    return {"layers": layers_of(text for _, message in messages for text in message.splitlines())}


def layers_of(lines: Any) -> dict[str, int]:
    """How many computing layers have inputs, or weights, of which type, of the builder's report."""
    types: Counter[str] = Counter()
    for line in lines:
        layer = LAYER.match(line)
        if layer is None or layer["type"] not in COMPUTES:
            continue
        found = DATATYPE.findall(layer["inputs"])[:1] + DATATYPE.findall(layer["constants"] or "")
        low = next((name for name in found if name in LOW_BITS), None)
        # Products that share their input are merged, and their names joined.
        types[low or next(iter(found), "unknown")] += layer["name"].count("+node_") + 1
    return dict(sorted(types.items()))


def _settings(tensorrt: Any, builder: Any, network: Any, targets: list[str], batches: list[int]) -> Any:
    settings = builder.create_builder_config()
    settings.num_compute_capabilities = len(targets)
    for place, target in enumerate(targets):
        settings.set_compute_capability(getattr(tensorrt.ComputeCapability, target), place)
    settings.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for given in (network.get_input(place) for place in range(network.num_inputs)):
        shape = tuple(given.shape)
        if -1 in shape:
            profile.set_shape(
                given.name, *(tuple(batch if size == -1 else size for size in shape) for batch in batches)
            )
    settings.add_optimization_profile(profile)
    return settings


if __name__ == "__main__":
    file, result, wanted, rows = sys.argv[1:]
    found = build(Path(file), Path(result), wanted.split(","), [int(count) for count in rows.split(",")])
    sys.stdout.write(json.dumps(found) + "\n")
