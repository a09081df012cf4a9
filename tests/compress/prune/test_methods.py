"""Every method that removes units: what was asked for goes, and the original is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffpress.calibration.sampling import replay
from diffpress.compress.changes import Changes, worn
from diffpress.compress.methods import METHODS, method_of
from diffpress.compress.prune.candidates import find_candidates
from diffpress.compress.stage import Subject
from diffpress.compress.stage_folder import StageFolder
from diffpress.export.edits import Resize

REMOVING = [entry for entry in METHODS if entry.stage == "prune" and "remove" in entry.options.model_fields]
LITTLE = {"masks": {"iterations": 2, "batch": 2, "validation_images": 2}}
"""Of what takes long."""
SLOW = [("masks", "tiny_text")]
"""Channels are removed by the other methods too, and masks of heads and neurons are learned in the other pipeline."""
every_method = pytest.mark.parametrize("entry", REMOVING, ids=lambda entry: entry.name)


def pruned(subject: Subject, entry: Any, folder: Path, **options: Any) -> Changes:
    chosen = entry.options(method=entry.name, **LITTLE.get(entry.name, {}), **options)
    return method_of(chosen).run(subject, chosen, StageFolder(folder), lambda *_: None)


def looked_at(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that pruning might touch."""
    numbers = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in (int, bool)
    }
    return {**numbers, **{name: id(module) for name, module in model.named_modules()}}


PRUNED = [
    pytest.param(entry, name, id=f"{entry.name}-{name}", marks=[pytest.mark.long] * ((entry.name, name) in SLOW))
    for entry in REMOVING
    for name in ("tiny_class", "tiny_text")
]


@pytest.mark.parametrize(("entry", "name"), PRUNED)
def test_the_original_is_as_it_was_and_what_was_asked_for_is_gone(recorded_subject, entry, name, tmp_path) -> None:
    own = recorded_subject(name)
    weights = {key: tensor.clone() for key, tensor in own.model.state_dict().items()}
    learning = {key: parameter.requires_grad for key, parameter in own.model.named_parameters()}
    before = looked_at(own.model)
    changes = pruned(own, entry, tmp_path, remove=0.3, share_of="units")
    after = own.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in weights.items())
    assert looked_at(own.model) == before
    assert {key: parameter.requires_grad for key, parameter in own.model.named_parameters()} == learning
    options = entry.options(method=entry.name, remove=0.3, share_of="units")
    candidates = find_candidates(own, options)
    kept = {note: found.shape for note, found in changes.notes.items()}
    gone = {own.name: own.count - kept[f"{own.name}, {own.kind}"][0] for own in candidates.structures}
    weighed = sum(count * candidates.weights.units[name] for name, count in gone.items())
    heaviest = max(candidates.weights.units.values())
    assert weighed >= candidates.target(options)
    # Even shares are rounded everywhere, half a step each; a budget once.
    assert weighed <= candidates.target(options) + 8 * heaviest * len(candidates.structures)
    assert all(count < own.count for own, count in zip(candidates.structures, gone.values(), strict=True))


@every_method
def test_what_is_kept_of_many_is_a_multiple(recorded_subject, entry, tmp_path) -> None:
    changes = pruned(recorded_subject("tiny_class"), entry, tmp_path, remove=0.3, share_of="units", kinds=["neurons"])
    shapes = [note.shape for note in changes.notes.values()]
    assert all(count == 64 and kept % 8 == 0 for kept, count in shapes)
    assert sum(kept for kept, _ in shapes) < 128


@every_method
def test_what_is_to_stay_stays(recorded_subject, entry, tmp_path) -> None:
    changes = pruned(recorded_subject("tiny_class"), entry, tmp_path, remove=0.1, keep=["*.ff.*"], share_of="units")
    assert all(note.format == "heads" for note in changes.notes.values())
    assert not any(".ff." in edit.module for edit in changes.edits)


def test_closed_form_errs_less_than_the_smallest_weights(recorded_subject, tmp_path) -> None:
    own = recorded_subject("tiny_class")
    errors = {}
    for entry in REMOVING:
        changes = pruned(own, entry, tmp_path / entry.name, remove=0.3, share_of="units")
        calls = [own.trajectories.call(shard, place) for shard in own.trajectories.shards for place in range(3)]
        with worn(own.model, changes, own.timesteps), torch.no_grad():
            errors[entry.name] = sum(float((replay(own.model, call) - call.output).square().mean()) for call in calls)
    assert errors["obs"] < errors["magnitude"]
    assert all(isinstance(edit, Resize) for edit in changes.edits)
