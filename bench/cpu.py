"""One denoiser call on the CPU, of large models' sizes and of the zoo's: `python bench/cpu.py --json`.

float32, bfloat16 and ours in each format, the large ones with random weights (normal, as trained ones nearly are), taken in
alternation in one process, with one thread and with all, on every tier that the processor has. Peers run in a process and
an environment of their own, beside float32 in that same process; ratios compare, milliseconds of a shared machine do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpress.calibration.cost import latencies_ms, median_ratio
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, sample, watch
from diffpress.compress.attention import AttentionChoice
from diffpress.compress.options import Products, Qalora
from diffpress.compress.result import QuantizationResult, edits_and_tensors
from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load_pipeline
from diffpress.export.runtime import PackedLayer, computes_attention, named_packed_layers
from diffpress.kernels import quantized_linear
from diffpress.kernels.answering import answering_kernels
from diffpress.kernels.cpu import panel_bytes, processor_tiers
from diffpress.kernels.cpu.library import CHOICE, ONEDNN, built_tiers
from diffpress.kernels.processor import fast_dtype
from diffpress.models import resolve
from diffpress.pairs import paired_conditions

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import PEERS, python_for
from machine import machine
from memory import LATENT, TEXT, TIMESTEPS, simple_start
from one_call import Inputs, call, random_denoiser, random_inputs, random_transformer

OFFERED = ("torchao", "openvino", "onnxruntime")
STABLE_DIFFUSION, PIXART = "Stable Diffusion 1.5's size", "PixArt's size"
CAPTION, SMALL_LATENT = (1, 120, 4096), (1, 4, 32, 32)
MODELS = (STABLE_DIFFUSION, PIXART, "zoo:emoji", "zoo:digits")
SMALL = 10
"""Times that a small model is called for each of a large one."""
SLOW = 4
"""Times float32's time at which a row is called once."""
LARGE_LAYER = (960, 2048, 1024)
"""Rows, inputs and outputs of a layer around whose products there is next to nothing."""


class Row(NamedTuple):
    """A format in which every layer of a denoiser is packed."""

    name: str
    weights: int
    activations: int | str
    attention: Products = "none"


ROWS = (
    Row("W8A8", 8, 8),
    Row("W8A8, scores in integers", 8, 8, "scores"),
    Row("W8A8, attention in integers", 8, 8, "all"),
    Row("W4A8", 4, 8),
    Row("W4A8, attention in integers", 4, 8, "all"),
    Row("w4", 4, "none"),
)


def packed_(denoiser: nn.Module, row: Row = ROWS[0]) -> nn.Module:
    """Every layer in the row's format, in the modules that an artifact is loaded into, and products of attention as well."""
    asked = {"method": "qalora", "weights": row.weights, "activations": row.activations}
    options = Qalora.model_validate(asked)
    modules = [name for name, module in denoiser.named_modules() if computes_attention(module)]
    chosen = {name: AttentionChoice(products=row.attention) for name in modules}
    found = QuantizationResult("unet", simple_start(denoiser, options), attention=chosen)
    edits, tensors = edits_and_tensors(found)
    stored = denoiser.state_dict()
    apply_edits_(denoiser, edits, TIMESTEPS)
    denoiser.load_state_dict({name: tensors.get(name, stored.get(name)) for name in denoiser.state_dict()})
    return denoiser


def model_and_inputs(name: str) -> tuple[nn.Module, Inputs]:
    """A denoiser in float32 and what one call of it is fed: a small one's pipeline feeds it for one image."""
    if name == STABLE_DIFFUSION:
        return random_denoiser(TEXT[-1]), random_inputs(LATENT, TEXT, TIMESTEPS[0])
    if name == PIXART:
        inputs = random_inputs(SMALL_LATENT, CAPTION, TIMESTEPS[0])
        return random_transformer(CAPTION[-1]), {"hidden_states": inputs.pop("sample"), **inputs}
    pipeline = load_pipeline(resolve(name))
    return denoiser_of(pipeline), first_inputs(pipeline)


def measure(name: str, rows: tuple[Row, ...], repeats: int, threads: int) -> Iterator[dict[str, Any]]:
    """A row for each format on each tier of the processor, against float32."""
    torch.set_num_threads(threads)
    plain, inputs = model_and_inputs(name)
    # Where the processor does not multiply it, a large model takes half an hour.
    half_made = copy.deepcopy(plain).bfloat16() if name.startswith("zoo:") or multiplies_bfloat16() else None
    models = {row.name: packed_(copy.deepcopy(plain), row) for row in rows}
    for chosen in tiers():
        with on_tier(chosen):
            runs: dict[str, Callable[[], Tensor]] = {"float32": partial(call, plain, inputs)}
            if half_made is not None:
                runs["bfloat16"] = partial(call, half_made, half(inputs))
            runs |= {row: partial(call, model, inputs) for row, model in models.items()}
            times = alternating(runs, repeats)
            for row, own in times.items():
                against = [other for other in ("float32", "bfloat16") if other in times]
                ratios = {f"over_{other}": median_ratio(own, times[other]) for other in against}
                made = {
                    "model": name,
                    "row": row,
                    "threads": threads,
                    "tier": chosen,
                    "milliseconds": min(own),
                    **ratios,
                }
                yield made | (of_packed(models[row], inputs, made) if row in models else {"bytes": held_bytes(plain)})


def multiplies_bfloat16() -> bool:
    """Whether the processor does."""
    return fast_dtype(torch.empty(0, dtype=torch.bfloat16)) is torch.bfloat16


def alternating(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Times of each; those that take `SLOW` times as long as the first are called once, all others in alternation."""
    first = {name: [min(latencies_ms([run], 2)[0])] for name, run in runs.items()}
    slow = [name for name in runs if first[name][0] > SLOW * next(iter(first.values()))[0]]
    quick = {name: run for name, run in runs.items() if name not in slow}
    times = dict(zip(quick, latencies_ms(list(quick.values()), repeats, warm=True), strict=True))
    return {name: times.get(name, first[name] * repeats) for name in runs}


def of_packed(model: nn.Module, inputs: Inputs, row: dict[str, Any]) -> dict[str, Any]:
    """What it holds, and which share of its time its products would take as fast as a large layer's."""
    layers = [layer for _, layer in named_packed_layers(model)]
    held = held_bytes(model) + sum(panel_bytes(layer.weight) for layer in layers)
    if layers[0].activation_scale is None:
        return {"bytes": held}
    fastest = sum(layer_macs(model, layers, inputs)) / macs_a_millisecond(layers[0].edit.weight_bits)
    return {"bytes": held, "share_of_bound": fastest / row["milliseconds"]}


def layer_macs(model: nn.Module, layers: list[PackedLayer], inputs: Inputs) -> list[int]:
    """Multiplications of each layer in one call."""
    found: list[int] = []

    def count(layer: PackedLayer, _: Any, output: Tensor) -> None:
        found.append(output.numel() * layer.columns)

    hooks = [layer.register_forward_hook(count) for layer in layers]
    call(model, inputs)
    for hook in hooks:
        hook.remove()
    return found


def macs_a_millisecond(bits: int) -> float:
    """Of a large layer of normal weights."""
    rows, inputs, outputs = LARGE_LAYER
    plain = nn.Linear(inputs, outputs).requires_grad_(False)
    nn.init.normal_(plain.weight)
    layer = packed_(nn.Sequential(plain), Row("", bits, 8))[0]
    x, scale = torch.randn(rows, inputs), torch.full((1,), 0.03)
    weight, weight_scale = layer.weight, layer.weight_scale
    run = partial(quantized_linear, x, weight, weight_scale, scale, None, layer.bias, bits, 8)
    return float(rows * inputs * outputs / min(latencies_ms([run], 5)[0]))


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def tiers() -> list[str | None]:
    """Those that can be chosen here, the fastest first; None where references answer."""
    return [name for name in processor_tiers() if name == ONEDNN or name in built_tiers()] or [None]


@contextmanager
def on_tier(name: str | None) -> Iterator[None]:
    """Compute on it while the context lasts."""
    before = os.environ.pop(CHOICE, None)
    if name is not None:
        os.environ[CHOICE] = name
    yield
    os.environ.pop(CHOICE, None)
    if before is not None:
        os.environ[CHOICE] = before


def first_inputs(pipeline: Any) -> Inputs:
    """What a pipeline gives its denoiser first, by name."""
    calls: list[Call] = []
    with watch(pipeline, calls.append):
        sample(pipeline, paired_conditions(pipeline, 1, seed=0), Sampling(steps=1))
    return calls[0].inputs


def half(inputs: Inputs) -> Inputs:
    """In bfloat16, but for the time step and what is no float."""
    kept = ("timestep", "class_labels")
    return {name: value if name in kept else value.bfloat16() for name, value in inputs.items()}


def peer_row(peer: str, repeats: int, work: Path) -> dict[str, Any]:
    """What the peer's own process found, or why it did not."""
    row: dict[str, Any] = {"model": STABLE_DIFFUSION, "row": peer, "threads": 1}
    try:
        command = [python_for(peer, work / "environments"), Path(__file__).parent / "peers" / "one_call.py", peer]
        sizes = ["--latent", *map(str, LATENT), "--text", *map(str, TEXT), "--repeats", str(repeats)]
        done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False, cwd=work)
    except RuntimeError as error:
        return row | {"error": str(error)}
    if done.returncode:
        return row | {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    # Some peers draw progress there as well.
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=MODELS, help="sizes, or models of the zoo")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--peers", nargs="*", default=OFFERED, choices=PEERS)
    parser.add_argument("--work", type=Path, default=Path("out/peers"), help="where peers' environments are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads:
        for name in arguments.models:
            times = arguments.repeats * (SMALL if name.startswith("zoo:") else 1)
            for row in measure(name, ROWS, times, threads):
                rows.append(row)
                show(row)
    for peer in arguments.peers:
        rows.append(peer_row(peer, arguments.repeats, arguments.work.absolute()))
        show(rows[-1])
    if arguments.json:
        print(json.dumps({"machine": machine(), "kernels": answering_kernels("cpu"), "rows": rows}, indent=1))


def show(row: dict[str, Any]) -> None:
    """A line of progress."""
    words = row.get("error") or f"{row['over_float32']:.2f} of float32's time"
    print(row["model"], row["row"], f"{row['threads']} threads:", words, file=sys.stderr)


if __name__ == "__main__":
    main()
