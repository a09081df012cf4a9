"""What can be removed from a subject, as every pruning method begins."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from diffpress.calibration.sampling import Call
from diffpress.calibration.shortest import short_run
from diffpress.export.errors import RecipeError, UnsupportedModelError

from ..options import Removal
from ..stage import Subject
from .cutting import removable
from .finding import find_structures
from .structures import Structure
from .weighing import Weights, weigh


class Candidates(NamedTuple):
    """Structures that units may be removed from, and what these weigh."""

    structures: Sequence[Structure]
    weights: Weights

    @property
    def readers(self) -> list[str]:
        """Layers that read units, in the order in which they are called."""
        return list(dict.fromkeys(part.module for own in self.structures for part in own.readers))

    def target(self, options: Removal) -> float:
        """What all that goes is to weigh."""
        return options.remove * self.weights.total


def find_candidates(subject: Subject, options: Removal) -> Candidates:
    """Raises UnsupportedModelError where nothing can be removed, RecipeError where less can be than is asked for, or where a
    pattern fits nothing.
    """
    model, call = subject.model, _middle_call(subject)
    found, _ = find_structures(model, call)
    kept = _kept(found, options.keep)
    wanted = [own for own in found if own.kind in options.kinds and own.name not in kept]
    structures, reasons = removable(subject, wanted, call)
    if not structures:
        why = f" ({next(iter(reasons.values()))})" if reasons else ""
        raise UnsupportedModelError(
            f"prune: {type(model).__name__} has no {' or '.join(options.kinds)} that can be removed{why}."
        )
    candidates = Candidates(structures, weigh(model, structures, call, options))
    most = candidates.weights.most(structures, options.multiple)
    if options.remove > most:
        of = {"parameters": "its parameters", "units": "what can be removed", "macs": "its multiplications"}
        raise RecipeError(
            f"prune.remove {options.remove:g}: {most:.2f} of {of[options.share_of]} is the most that {type(model).__name__} "
            f"can lose of its {', '.join(options.kinds)}, and little of the images is left then. Give less."
        )
    return candidates


def _middle_call(subject: Subject) -> Call:
    """Of a short run of one image."""
    calls = short_run(subject.pipeline, subject.conditions(1)[0], subject.sampling)
    return calls[len(calls) // 2]


def _kept(structures: Sequence[Structure], patterns: Sequence[str]) -> set[str]:
    names = [own.name for own in structures]
    kept: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise RecipeError(
                f"prune.keep: {pattern!r} fits nothing that could be removed. There are {', '.join(names[:3])}."
            )
        kept |= found
    return kept
