"""What `obs` is made of, with the same share of every structure instead of those that it measures."""

from __future__ import annotations

from once import moments_once, once

from diffpress.compress.changes import Changes
from diffpress.compress.options import Magnitude
from diffpress.compress.prune.candidates import Candidates, find_candidates
from diffpress.compress.prune.cutting import cut
from diffpress.compress.prune.magnitude import even_counts
from diffpress.compress.prune.moments import affine
from diffpress.compress.prune.obs import compensated
from diffpress.compress.prune.structures import columns
from diffpress.compress.prune.surgeon import Reader, removal_order
from diffpress.compress.stage import Subject


def prune(row: str, subject: Subject, options: Magnitude) -> Changes:
    """In the surgeon's order; `obs-even` leaves what is kept as it is, `obs-even+refit` solves for it."""
    candidates = find_candidates(subject, options)
    orders = once(subject.model, "orders", lambda: _orders(subject, candidates))
    removed = {name: orders[name][:count] for name, count in even_counts(candidates, options).items()}
    if row.endswith("+refit"):
        return compensated(subject, candidates.structures, removed, lambda *_: None)
    return cut(subject, candidates.structures, removed)


def _orders(subject: Subject, candidates: Candidates) -> dict[str, list[int]]:
    model, moments = subject.model, moments_once(subject, candidates.readers)
    return {
        own.name: removal_order(
            [
                Reader.of(
                    affine(model.get_submodule(part.module)),
                    moments[part.module],
                    [columns(model, part, [unit]) for unit in range(own.count)],
                )
                for part in own.readers
            ]
        )
        for own in candidates.structures
    }
