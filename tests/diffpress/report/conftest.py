"""What a run would hand to the report, made up."""

import pytest
import torch

from diffpress.calibration.conditions import Condition
from diffpress.calibration.metrics import psnr_db
from diffpress.export.manifest import Manifest, PlanRow
from diffpress.pairs import Pairs
from diffpress.report import write_report


@pytest.fixture
def cost():
    return {
        "parameters": {"reference": 6_783_104, "candidate": 6_783_104},
        "macs_per_image": {"reference": 18_400_000_000, "candidate": 18_400_000_000},
        "latency_ms": {"reference": 800.0, "candidate": 1096.0, "ratio": 1.35},
        "peak_memory_bytes": {"reference": 96_400_000, "candidate": 75_900_000},
    }


@pytest.fixture
def make_pairs():
    """Pair i differs by (i + 1) times `noise` everywhere, so the last one is the worst."""

    def make(count=4, channels=3, side=16, prompts=("pizza",), noise=0.02, steps=5):
        generator = torch.Generator().manual_seed(0)
        reference = torch.rand(count, channels, side, side, generator=generator) * 0.5
        candidate = reference + noise * torch.arange(1, count + 1).view(-1, 1, 1, 1)
        conditions = [Condition(prompts[i % len(prompts)], 100 + i) for i in range(count)]
        errors = [1e-3 * (step + 1) for step in range(steps)]
        scores = psnr_db(candidate, reference).tolist()
        return Pairs(conditions, reference, candidate, scores, 0.98, 3e-3, errors, steps)

    return make


@pytest.fixture
def make_metrics():
    """What a manifest says of `pairs` and of sizes."""

    def make(pairs, missed=None):
        sizes = {
            "size_bytes": {"reference": 27_000_000, "candidate": 6_750_000},
            "total_size_bytes": {"reference": 41_000_000, "candidate": 20_500_000},
        }
        return {**pairs.metrics(), **sizes, **({} if missed is None else {"gates_missed": missed})}

    return make


@pytest.fixture
def make_plan():
    """Every other row is packed and has an error, the last the largest."""

    def make(rows=40, first="norm"):
        return [
            PlanRow(
                component="unet",
                module=f"blocks.{i}.to_q" if i else first,
                shape=(64, 64),
                format="W4A8" if i % 2 else "float32",
                source_bytes=16384,
                bytes=2048 if i % 2 else 16384,
                reason="" if i % 2 else "neither Linear nor Conv2d",
                error=1e-5 * i if i % 2 else None,
            )
            for i in range(rows)
        ]

    return make


@pytest.fixture
def mixed_plan():
    """Of two components: 60 layers in the bits asked for, 20 in safe ones, 3 embeddings, and what is not quantized."""

    def row(component, module, format, size, **more):
        return PlanRow(
            component=component, module=module, shape=(64, 64), format=format, source_bytes=16384, bytes=size, **more
        )

    return [
        *(row("unet", f"blocks.{i}.to_q", "W4A4", 2048, error=1e-4 * (i + 1)) for i in range(60)),
        *(row("unet", f"time.{i}", "W8", 4096, error=1e-6, reason="conditioning layer") for i in range(20)),
        *(row("unet", f"norm.{i}", "float32", 16384, reason="neither Linear nor Conv2d") for i in range(5)),
        *(row("text_encoder", f"embeddings.{i}", "W8", 4096, reason="embedding, 8 bits") for i in range(3)),
        *(row("text_encoder", f"layer_norm.{i}", "float32", 16384, reason="not of a kind") for i in range(2)),
    ]


@pytest.fixture
def make_manifest(make_plan):
    def make(plan=None, gates=None, timesteps=(801.0, 601.0, 401.0, 201.0, 1.0), **more):
        return Manifest(
            fingerprint="f" * 64,
            versions={"diffpress": "0.1.0", "torch": "2.13.0"},
            recipe={"seed": 7, "quantize": {"method": "ptq", "weights": 4}, "gates": gates or {}},
            source={"model": "zoo:emoji", "files": {"unet/model.safetensors": "abc123"}},
            timesteps=list(timesteps),
            edits=[],
            plan=make_plan() if plan is None else plan,
            metrics={},
            files={},
            **more,
        )

    return make


@pytest.fixture
def history():
    """Twenty evaluations: the loss of batches jumps, held out is best at the 16th and rises after it."""
    evaluation = [4e-3 * 0.8**i for i in range(16)] + [1.5e-4, 1.6e-4, 1.7e-4, 1.8e-4]
    return [
        {"iteration": 60.0 * (i + 1), "loss": held * (1.5 if i % 2 else 0.75), "evaluation": held}
        for i, held in enumerate(evaluation)
    ]


@pytest.fixture
def page(tmp_path, cost, make_pairs, make_metrics):
    """Writes a report and gives its HTML."""

    def write(pairs=None, manifest=None, metrics=None, cost=cost, model="zoo:emoji"):
        pairs = make_pairs() if pairs is None else pairs
        path = tmp_path / "report.html"
        write_report(path, model, manifest, pairs, metrics or make_metrics(pairs), cost)
        return path.read_text(encoding="utf-8")

    return write
