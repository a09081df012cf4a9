"""Weights times what they are fed (Sun et al. 2023, arXiv 2306.11695), a column of the layers that read units at a time."""

from __future__ import annotations

import torch
from once import moments_once
from shares import lowest_of_each

from diffpress.compress.changes import Changes
from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import find_candidates
from diffpress.compress.prune.cutting import cut
from diffpress.compress.prune.moments import affine
from diffpress.compress.prune.structures import columns
from diffpress.compress.stage import Subject


def prune(row: str, subject: Subject, options: Magnitude) -> Changes:
    """The same share of every structure; what is kept stays as it is."""
    candidates = find_candidates(subject, options)
    columnwise = {
        name: affine(subject.model.get_submodule(name)).abs().sum(0) * moments.xx.diagonal().sqrt()
        for name, moments in moments_once(subject, candidates.readers).items()
    }
    scores = {
        own.name: torch.stack(
            [
                sum(columnwise[part.module][columns(subject.model, part, [unit])].sum() for part in own.readers)
                for unit in range(own.count)
            ]
        )
        for own in candidates.structures
    }
    return cut(subject, candidates.structures, lowest_of_each(candidates, options, scores))
