"""Run an export folder with numpy, tokenizers and an engine alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..engines.engine import Array, Engine, Session
from ..errors import UserError
from .conditions import conditioner_of
from .denoiser import Denoiser
from .manifest import ExportManifest, SchedulerTable, check_files, read_export
from .noise import TorchNoise
from .sampler import sample_by_table

Floats = NDArray[np.float32]


class PortablePipeline:
    """A pipeline made of the graphs and tables of one export folder."""

    def __init__(self, path: str | Path, engine: Engine, threads: int = 0) -> None:
        """Open the folder once every digest has matched; 0 threads leaves the number to the engine."""
        folder = Path(path)
        self.manifest: ExportManifest = read_export(folder)
        check_files(folder, self.manifest)
        components = self.manifest.components

        def open_graph(name: str) -> Session:
            return engine.open(folder / components[name].file, threads)

        self._conditioner = conditioner_of(folder, self.manifest, open_graph)
        self._denoiser = Denoiser(self.manifest, open_graph)
        self._decoder = open_graph("decoder") if "decoder" in components else None

    def generate(
        self, condition: str = "", seed: int = 0, steps: int | None = None, guidance_scale: float | None = None
    ) -> Floats:
        """One image [H, W, C] in 0..1 of a prompt, a class number or name, or "" where the pipeline takes neither.

        Raises UserError for a condition, a number of steps or a guidance that this export has not.
        """
        return self.generate_batch([condition], [seed], steps, guidance_scale)[0]

    def generate_batch(
        self,
        conditions: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Floats:
        """Images [B, H, W, C] in 0..1, one for each condition and seed (see `generate`)."""
        return self.decode(self.sample(conditions, seeds, steps, guidance_scale))

    def sample(
        self,
        conditions: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        receive: Callable[[Floats], None] | None = None,
    ) -> Floats:
        """What is decoded [B, C, H, W] (see `generate`); `receive` is given each answer of the denoiser, both halves of it."""
        if len(conditions) != len(seeds) or not seeds:
            raise UserError(f"Give as many seeds as conditions, and at least one: {len(conditions)} and {len(seeds)}.")
        steps = self.manifest.steps if steps is None else steps
        table, guidance = schedule_of(self.manifest, steps), self._guidance(guidance_scale)
        inputs = self._conditioner.encode(conditions)
        if guidance > 1:
            inputs = self._join(inputs, self._conditioner.encode_null(len(seeds)))
        generators = [TorchNoise(seed) for seed in seeds]

        def draw() -> Floats:
            return np.concatenate([own.draw((1, *self.manifest.latent_shape)) for own in generators])

        answer = self._denoiser.begin(steps)

        def denoise(sample: Floats, timestep: float) -> Floats:
            now = np.array([timestep], np.float32)
            doubled = np.concatenate([sample, sample]) if guidance > 1 else sample
            output = answer({"sample": doubled, "timestep": now, **inputs})
            if receive is not None:
                receive(output)
            return self._guide(output, guidance) if guidance > 1 else output

        return sample_by_table(draw(), table, denoise, draw)

    def decode(self, sample: Floats) -> Floats:
        """Images [B, H, W, C] in 0..1."""
        if self._decoder is not None:
            sample = _only(self._decoder.run({"latents": self.latents(sample)}))
        return np.ascontiguousarray((sample / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1))

    def latents(self, sample: Floats) -> Floats:
        """What the decoder is given of a sample, or would be."""
        return sample / np.float32(self.manifest.scaling_factor)

    def _guidance(self, scale: float | None) -> float:
        if self.manifest.first_half is None:
            fixed = self.manifest.guidance_scale
            if scale is not None and scale != fixed:
                told = "has no guidance" if fixed is None else f"was exported for a guidance scale of {fixed:g}"
                raise UserError(f"This pipeline {told}. Leave the guidance scale out.")
            return 1.0
        chosen = self.manifest.guidance_scale if scale is None else scale
        return 1.0 if chosen is None else chosen

    def _join(self, conditional: dict[str, Array], null: dict[str, Array]) -> dict[str, Array]:
        first, second = (conditional, null) if self.manifest.first_half == "conditional" else (null, conditional)
        return {name: np.concatenate([first[name], second[name]]) for name in first}

    def _guide(self, output: Floats, scale: float) -> Floats:
        first, second = np.split(output, 2)
        conditional, null = (first, second) if self.manifest.first_half == "conditional" else (second, first)
        return null + np.float32(scale) * (conditional - null)


def schedule_of(manifest: ExportManifest, steps: int) -> SchedulerTable:
    """The table of so many steps. Raises UserError where there is none."""
    known = manifest.schedules
    if steps not in known:
        have = ", ".join(str(count) for count in sorted(known))
        raise UserError(
            f"This export has no schedule of {steps} steps. Use one of {have}; another number needs an export of a "
            "pipeline that was compressed for it (`sampling.steps` in the recipe)."
        )
    return known[steps]


def _only(outputs: dict[str, Array]) -> Floats:
    """The output of a graph that has one."""
    (value,) = outputs.values()
    return value.astype(np.float32, copy=False)
