"""Any units: what every score has to beat."""

from __future__ import annotations

import torch
from shares import lowest_of_each

from diffpress.compress.changes import Changes
from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import find_candidates
from diffpress.compress.prune.cutting import cut
from diffpress.compress.stage import Subject


def prune(row: str, subject: Subject, options: Magnitude) -> Changes:
    """The same share of every structure, drawn."""
    candidates = find_candidates(subject, options)
    generator = torch.Generator().manual_seed(subject.seed)
    scores = {own.name: torch.rand(own.count, generator=generator) for own in candidates.structures}
    return cut(subject, candidates.structures, lowest_of_each(candidates, options, scores))
