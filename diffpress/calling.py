"""What pipelines are called with beside a text: from a recipe, or from the options of `run` and `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffpress.calibration.calls import call_of, flag_arguments
from diffpress.calibration.given import Given, given_to, read_calls
from diffpress.export.errors import UserError

from .recipe import Recipe, SamplingSection


@dataclass(frozen=True)
class Options:
    """What `run` and `compare` were given; what was not given is None."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    """`height`, `width`, `frames`, `image`, `mask` and `control`."""
    sampling: SamplingSection = field(default_factory=SamplingSection)
    """Of --set."""

    def refuse(self, export: str) -> None:
        """Raises UserError where there is something that an export cannot be given."""
        if self.sampling.call or any(value is not None for value in self.flags.values()):
            raise UserError(
                f"{export}: the sizes of an export are fixed, and it takes no files. Give a prompt or a label, a seed, steps "
                "and guidance only."
            )

    def given(self, pipeline: Any, made_for: Mapping[str, Any], drawn: bool) -> Given:
        """The arguments for a pipeline, or a class of pipelines, `made_for` where nothing else is said.

        Raises UserError where it does not take them or, unless it can be `drawn`, needs another.
        """
        call = call_of(pipeline)
        shared = {**made_for, **self.sampling.call, **flag_arguments(call, self.flags)}
        return given_to(call, shared, (), drawn=drawn, names=("--set sampling.call", "record.calls"))


NO_OPTIONS = Options()


def given_of(pipeline: Any, recipe: Recipe) -> Given:
    """The arguments that a recipe has for a pipeline, or a class of pipelines. Raises UserError where it takes no such."""
    calls, folder = recipe.record.calls, Path()
    if isinstance(calls, str):
        folder = Path(calls).parent
        calls = read_calls(Path(calls))
    return given_to(call_of(pipeline), recipe.sampling.call, calls, folder)


def portable(pipeline_class: type, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What an artifact's recipe says of its calls but for files, which are where it was made and nowhere else."""
    known = call_of(pipeline_class).parameters
    return {name: value for name, value in shared.items() if name not in known or known[name].medium is None}
