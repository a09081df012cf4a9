"""What is kept with a weight: as long as it lives and does not change, and where it may be."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from diffpress.kernels import kept
from diffpress.kernels.kept import all_kept_with, kept_with, memory_is_lent


class Made:
    """Something that was made."""


def test_it_is_made_once_for_every_form_and_state() -> None:
    weight = torch.ones(3)
    first = kept_with(weight, "a", Made)
    assert kept_with(weight, "a", Made) is first
    assert kept_with(weight, "b", Made) is not first
    assert len(all_kept_with(weight)) == 2
    weight.neg_()
    assert kept_with(weight, "a", Made) is not first
    assert len(all_kept_with(weight)) == 1


def test_it_goes_with_its_weight() -> None:
    weight = torch.ones(3)
    made = weakref.ref(kept_with(weight, "a", Made))
    del weight
    gc.collect()
    assert made() is None


def test_a_weight_that_may_change_unseen_keeps_nothing() -> None:
    with torch.inference_mode():
        weight = torch.ones(3)
    assert kept_with(weight, "a", Made) is not kept_with(weight, "a", Made)


class OnGPU(SimpleNamespace):
    """A tensor as far as it is looked at here."""

    __hash__ = object.__hash__
    is_cuda, _version, device = True, 0, torch.device("cuda", 0)

    def is_inference(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return 0


def test_the_memory_of_a_graph_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_kept", {})
    weight, lent = OnGPU(), True
    monkeypatch.setattr(kept, "memory_is_lent", lambda _device: lent)
    waited: list[torch.device] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(weight.device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    assert kept_with(weight, "a", Made) is not kept_with(weight, "a", Made)
    lent = False
    first = kept_with(weight, "a", Made)
    lent = True
    assert kept_with(weight, "a", Made) is first
    # Once, so that other streams may read it.
    assert waited == [weight.device]


def test_memory_is_lent_while_a_graph_is_recorded_and_after_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    here, states = torch.device("cuda", 0), trees.ExecutionState
    manager = SimpleNamespace(path_state=states.NONE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trees, "get_manager", lambda _index, create_if_none_exists: manager)
    assert not memory_is_lent(here)
    for state in (states.WARMUP, states.RECORDING, states.EXECUTION):
        manager.path_state = state
        assert memory_is_lent(here)
    monkeypatch.setattr(trees, "get_manager", lambda _index, create_if_none_exists: None)
    assert not memory_is_lent(here)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert memory_is_lent(here)
