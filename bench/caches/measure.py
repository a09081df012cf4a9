"""What one way of running a pipeline computes, keeps and draws."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from task import Request
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.calibration.conditions import Condition
from diffpress.calibration.cost import operation_formulas
from diffpress.calibration.sampling import Sample, Sampling, denoiser_of, sample, sample_in_batches


@dataclass(frozen=True)
class Run:
    """A pipeline that spends less, with the steps it is run for."""

    pipeline: Any
    sampling: Sampling

    def draw(self, wanted: Sequence[Condition]) -> Sample:
        """One call of the pipeline."""
        return sample(self.pipeline, wanted, self.sampling)


def load(folder: Path) -> Any:
    """The plain pipeline in single precision."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Counter(FlopCounterMode):
    """Torch's counter of operations, which does not ask in which module: cache-dit's blocks have no end of names."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=operation_formulas())
        self.mod_tracker = Nowhere()


class Nowhere(AbstractContextManager[None]):
    """In the place of torch's tracker of modules."""

    parents = ("Global",)

    def __exit__(self, *_: object) -> None:
        """Nothing was entered."""


@contextmanager
def counted_macs(denoiser: nn.Module) -> Iterator[list[int]]:
    """Multiply-accumulates of every call of the denoiser and of nothing else, one after the other."""
    macs: list[int] = []
    forward = denoiser.forward

    @wraps(forward)
    def counted(*arguments: Any, **options: Any) -> Any:
        with Counter() as counter:
            output = forward(*arguments, **options)
        macs.append(int(counter.get_total_flops()) // 2)
        return output

    denoiser.forward = counted
    try:
        yield macs
    finally:
        denoiser.forward = forward


def draw_and_count(run: Run, wanted: Sequence[Condition], batch: int) -> tuple[Sample, float]:
    """Images of all conditions, and the denoiser's multiply-accumulates for one of them on average.

    Averaged over all that are drawn, as some caches decide by what they see how much to compute.
    """
    with counted_macs(denoiser_of(run.pipeline)) as macs:
        images = sample_in_batches(run.pipeline, wanted, run.sampling, batch)
    return images, sum(macs) / len(wanted)


def full_macs(folder: Path, request: Request) -> float:
    """The plain denoiser's multiply-accumulates for one image, in the steps that are asked for."""
    return draw_and_count(Run(load(folder), request.sampling), request.record[:1], 1)[1]


def cached_bytes(run: Run, plain: Run, condition: Condition) -> int:
    """Bytes of tensors that outlive a call of the denoiser, beyond those of the plain pipeline, at the call with the most."""
    return max(0, _alive_between_calls(run, condition) - _alive_between_calls(plain, condition))


def _alive_between_calls(run: Run, condition: Condition) -> int:
    """Of tensors that came to be since the run began: weights are there before it."""
    alive: list[int] = []
    handle = denoiser_of(run.pipeline).register_forward_hook(lambda *_: alive.append(_new_tensor_bytes()))
    gc.collect()
    gc.freeze()
    try:
        run.draw([condition])
    finally:
        gc.unfreeze()
        handle.remove()
    return max(alive)


def _new_tensor_bytes() -> int:
    """Of all storages made since `gc.freeze`."""
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
