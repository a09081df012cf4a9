"""One denoiser call on the CPU, of Stable Diffusion 1.5's size and of the zoo's: `python bench/cpu.py --json`.

float32, bfloat16 and W8A8, the large one with random weights, taken in alternation in one process with one thread. Peers run
in a process and an environment of their own, beside float32 in that same process; ratios compare, milliseconds of a shared
machine do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpress.calibration.cost import latencies_ms, median_ratio
from diffpress.calibration.sampling import Call, Sampling, denoiser_of, sample, watch
from diffpress.compress.attention import AttentionChoice
from diffpress.compress.options import Products, Qalora
from diffpress.compress.result import QuantizationResult, edits_and_tensors
from diffpress.export.apply import apply_edits_
from diffpress.export.artifact import load_pipeline
from diffpress.export.runtime import computes_attention
from diffpress.kernels.cpu import why_no_library
from diffpress.kernels.library import only_reference
from diffpress.models import resolve
from diffpress.pairs import paired_conditions

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "peers"))
from environment import PEERS, python_for
from machine import machine
from memory import LATENT, TEXT, TIMESTEPS, simple_start
from one_call import Inputs, call, random_denoiser, random_inputs

OFFERED = ("torchao", "openvino")
LARGE = "Stable Diffusion 1.5's size"
SMALL = 10
"""Times that a small model is called for each of a large one."""


def packed_(denoiser: nn.Module, attention: Products = "none") -> nn.Module:
    """Every layer in 8 bits, in the modules that an artifact is loaded into, and products of attention as well."""
    options = Qalora.model_validate({"method": "qalora", "weights": 8, "activations": 8})
    modules = [name for name, module in denoiser.named_modules() if computes_attention(module)]
    chosen = {name: AttentionChoice(products=attention) for name in modules}
    found = QuantizationResult("unet", simple_start(denoiser, options), attention=chosen)
    edits, tensors = edits_and_tensors(found)
    stored = denoiser.state_dict()
    apply_edits_(denoiser, edits, TIMESTEPS)
    denoiser.load_state_dict({name: tensors.get(name, stored.get(name)) for name in denoiser.state_dict()})
    return denoiser


def large(repeats: int) -> list[dict[str, Any]]:
    """Ours at Stable Diffusion 1.5's size."""
    plain, inputs = random_denoiser(TEXT[-1]), random_inputs(LATENT, TEXT, TIMESTEPS[0])
    runs: dict[str, Callable[[], Tensor]] = {
        "float32": partial(call, plain, inputs),
        "bfloat16": partial(call, copy.deepcopy(plain).bfloat16(), half(inputs)),
        "W8A8": partial(call, packed_(copy.deepcopy(plain)), inputs),
        "W8A8, scores in integers": partial(call, packed_(copy.deepcopy(plain), "scores"), inputs),
        "W8A8, attention in integers": partial(call, packed_(copy.deepcopy(plain), "all"), inputs),
    }
    return measure(LARGE, runs, repeats)


def small(model: str, repeats: int) -> list[dict[str, Any]]:
    """Ours on a model of the zoo, fed as its pipeline feeds it for one image."""
    pipeline = load_pipeline(resolve(model))
    plain = denoiser_of(pipeline)
    inputs = first_inputs(pipeline)
    runs: dict[str, Callable[[], Tensor]] = {
        "float32": partial(call, plain, inputs),
        "bfloat16": partial(call, copy.deepcopy(plain).bfloat16(), half(inputs)),
        "W8A8": partial(call, packed_(copy.deepcopy(plain)), inputs),
    }
    return measure(model, runs, repeats)


def first_inputs(pipeline: Any) -> Inputs:
    """What a pipeline gives its denoiser first, by name."""
    calls: list[Call] = []
    with watch(pipeline, calls.append):
        sample(pipeline, paired_conditions(pipeline, 1, seed=0), Sampling(steps=1))
    return calls[0].inputs


def measure(model: str, runs: dict[str, Callable[[], Tensor]], repeats: int) -> list[dict[str, Any]]:
    """A row for each run, against float32."""
    times = dict(zip(runs, latencies_ms(list(runs.values()), repeats), strict=True))
    return [
        {
            "model": model,
            "row": name,
            "milliseconds": min(own),
            "over_float32": median_ratio(own, times["float32"]),
            "over_bfloat16": median_ratio(own, times["bfloat16"]),
        }
        for name, own in times.items()
    ]


def half(inputs: Inputs) -> Inputs:
    """In bfloat16, but for the time step."""
    return {name: value if name == "timestep" else value.bfloat16() for name, value in inputs.items()}


def peer_row(peer: str, repeats: int, work: Path) -> dict[str, Any]:
    """What the peer's own process found, or why it did not."""
    try:
        command = [python_for(peer, work / "environments"), Path(__file__).parent / "peers" / "one_call.py", peer]
        sizes = ["--latent", *map(str, LATENT), "--text", *map(str, TEXT), "--repeats", str(repeats)]
        done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False, cwd=work)
    except RuntimeError as error:
        return {"model": LARGE, "row": peer, "error": str(error)}
    if done.returncode:
        return {
            "model": LARGE,
            "row": peer,
            "error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1],
        }
    # Some peers draw progress there as well.
    return {"model": LARGE, "row": peer, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--zoo", default="zoo:emoji", help="the small model")
    parser.add_argument("--peers", nargs="*", default=OFFERED, choices=PEERS)
    parser.add_argument("--work", type=Path, default=Path("out/peers"), help="where peers' environments are kept")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = large(arguments.repeats) + small(arguments.zoo, SMALL * arguments.repeats)
    rows += [peer_row(peer, arguments.repeats, arguments.work.absolute()) for peer in arguments.peers]
    if arguments.json:
        print(json.dumps({"machine": machine(), "kernels": answering(), "rows": rows}, indent=1))
        return
    for row in rows:
        print(row.get("model", ""), row["row"], row.get("error") or f"{row['over_float32']:.2f} of float32's time")


def answering() -> str:
    """What computes the layers."""
    return "reference" if only_reference() or why_no_library() else "C++"


if __name__ == "__main__":
    main()
