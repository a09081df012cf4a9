"""Gates that learn which units go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffpress.calibration.sampling import replay
from diffpress.compress.options import Masks as Options
from diffpress.compress.overlay import overlaid
from diffpress.compress.prune.candidates import find_candidates
from diffpress.compress.prune.masks.gates import BOUND, gate, noise, open_probability, within_budget
from diffpress.compress.prune.masks.masking import Masks, predictor
from diffpress.compress.prune.masks.method import lowest, run
from diffpress.compress.prune.moments import Moments
from diffpress.compress.prune.structures import Part, Span
from diffpress.compress.prune.surgeon import DAMPING
from diffpress.compress.stage import Subject
from diffpress.compress.stage_folder import StageFolder
from diffpress.export.errors import LearningError

OPTIONS = Options(method="masks", share_of="units", remove=0.3, iterations=4, batch=2, validation_images=2)


def silent(stage: str, done: int, total: int) -> None:
    """The report of those who want none."""


def test_a_gate_is_shut_as_often_as_its_probability_says() -> None:
    """Without the bound on the noise, which this takes away, the logistic distribution gives eq. 12 exactly."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-2.0, 0.0, 1.5])
    u = torch.rand(3, 100_000, generator=generator, dtype=torch.float64)
    drawn = gate(logits[:, None].double(), torch.log(u / (1 - u)))
    share = (drawn > 0).double().mean(1)
    expected = open_probability(logits.double())
    # Five standard deviations of a share of so many draws.
    assert torch.all((share - expected).abs() < 5 * (expected * (1 - expected) / 100_000).sqrt())


def test_noise_is_bounded() -> None:
    drawn = noise(torch.zeros(10_000), torch.Generator().manual_seed(0))
    assert float(drawn.abs().max()) <= math.log((1 + BOUND) / BOUND)
    assert float(drawn.std()) > 0


def test_what_is_expected_to_be_shut_weighs_the_budget_and_moves_along_it() -> None:
    weights = {"a": 3.0, "b": 1.0}
    logits = {
        "a": torch.tensor([2.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True),
        "b": torch.linspace(-3, 3, 9, dtype=torch.float64, requires_grad=True),
    }
    shifted = within_budget(logits, weights, 7.0)
    shut = sum(weights[name] * (1 - open_probability(own)).sum() for name, own in shifted.items())
    assert isinstance(shut, Tensor)
    assert float(shut.detach()) == pytest.approx(7.0, rel=1e-9)
    # Whatever logits do, the budget is kept: there is no gradient of it.
    gradients = torch.autograd.grad(shut, list(logits.values()))
    assert max(float(own.abs().max()) for own in gradients) < 1e-9


def test_what_is_shut_is_told_from_the_others_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) @ torch.randn(
        6, 6, generator=generator, dtype=torch.float64
    )
    x = torch.cat([x + 0.5, torch.ones(400, 1, dtype=torch.float64)], 1)
    xx = x.t() @ x / 400
    layer = torch.nn.Linear(6, 2, dtype=torch.float64)
    found = predictor(layer, Moments(xx, torch.empty(0)), [(Part("layer", (Span(0, 2),)), 3)])
    damped = xx + DAMPING * xx.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    for unit in range(3):
        own, others = [2 * unit, 2 * unit + 1], [i for i in range(7) if i // 2 != unit or i == 6]
        solved = torch.linalg.solve(damped[others][:, others], damped[others][:, own]).t()
        assert torch.allclose(found.weight[own][:, others[:-1]], solved[:, :-1], rtol=1e-9, atol=1e-9)
        assert torch.allclose(found.bias[own], solved[:, -1], rtol=1e-9, atol=1e-9)
        assert not found.weight[own][:, own].any()


def test_open_gates_change_nothing(subject: Subject) -> None:
    candidates = find_candidates(subject, OPTIONS)
    layer_of = subject.model.get_submodule
    predictors = {
        name: predictor(layer_of(name), Moments(torch.eye(width + 1), torch.empty(0)), [])
        for name in candidates.readers
        for width in [layer_of(name).in_features]
    }
    gates = {own.name: torch.ones(own.count) for own in candidates.structures}
    call = next(iter(subject.trajectories.calls()))
    expected = replay(subject.model, call)
    masks = Masks(subject.model, candidates.structures, predictors, gates)
    with overlaid(subject.model, masks.wraps()):
        assert torch.equal(replay(subject.model, call), expected)
        masks.gates = {name: own * 0.5 for name, own in gates.items()}
        assert not torch.equal(replay(subject.model, call), expected)


def test_units_with_the_lowest_logits_go_as_many_as_the_budget_asks(subject: Subject) -> None:
    candidates = find_candidates(subject, OPTIONS)
    generator = torch.Generator().manual_seed(2)
    logits = {own.name: torch.randn(own.count, generator=generator) for own in candidates.structures}
    target = candidates.target(OPTIONS)
    removed = lowest(candidates, OPTIONS, logits, target)
    weights = candidates.weights.units
    taken = sum(len(units) * weights[name] for name, units in removed.items())
    assert target <= taken < target + max(weights.values())
    for own in candidates.structures:
        gone = removed[own.name]
        assert len(gone) < own.count
        kept = [unit for unit in range(own.count) if unit not in gone]
        assert not gone or logits[own.name][gone].max() < logits[own.name][kept].min()


def test_a_killed_run_ends_as_one_that_was_not(subject: Subject, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("prune, learning", 2):
            raise KilledError

    expected = run(subject, OPTIONS, StageFolder(tmp_path / "whole"), silent)
    with pytest.raises(KilledError):
        run(subject, OPTIONS, StageFolder(tmp_path / "killed"), kill)
    found = run(subject, OPTIONS, StageFolder(tmp_path / "killed"), silent)
    assert found.edits == expected.edits
    assert all(torch.equal(found.tensors[name], own) for name, own in expected.tensors.items())
    assert str(found.history) == str(expected.history)
    evaluations = [row["evaluation"] for row in found.history]
    assert len(evaluations) == 1 + OPTIONS.iterations


def test_a_loss_that_is_not_finite_is_said(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffpress.compress.prune.masks.learning.gate", lambda logits, _noise: logits * torch.tensor(math.nan)
    )
    with pytest.raises(LearningError, match=r"prune: the loss is not finite after 0 iterations"):
        run(subject, OPTIONS, StageFolder(tmp_path), silent)
