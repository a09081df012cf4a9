"""Which library answers, and that one does."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from diffpress.kernels import quantized_linear
from diffpress.kernels.cpu import TierError, library, shared_library, tier, why_no_library
from diffpress.kernels.cpu.library import CHOICE
from diffpress.kernels.library import CHOICE as KERNELS
from diffpress.kernels.quantized_linear import cpu_kernel

FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx_vnni"},
    "avx512vnni": {"avx512_vnni", "avx512bw"},
    "neon": {"asimd"},
    "neondot": {"asimddp"},
    "i8mm": {"asimddp", "i8mm"},
}
"""What the system says of a processor that has a tier."""


@pytest.fixture(autouse=True, name="tier")
def nothing_chosen(monkeypatch: pytest.MonkeyPatch, references_answer: None) -> Iterator[None]:
    """In the place of the other tests' tiers."""
    monkeypatch.delenv(KERNELS)
    monkeypatch.delenv(CHOICE, raising=False)
    caches = (library._library, library._tier, library.built_tiers, library.processor_tiers, library._loaded)
    for function in caches:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in caches:
        function.cache_clear()


def test_tiers_are_those_that_the_system_names() -> None:
    information = Path("/proc/cpuinfo")
    if not information.exists() or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the system does not say it")
    said = set(information.read_text().split())
    assert {name for name in library.processor_tiers() if name in FLAGS} == {
        n for n, need in FLAGS.items() if need <= said
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("processor", "tiers"),
    [("cortex-a53", ["neon"]), ("cortex-a76", ["neondot", "neon"]), ("max", ["i8mm", "neondot", "neon"])],
)
def test_tiers_of_other_processors(aarch64: Callable, processor: str, tiers: list[str]) -> None:
    found, _ = aarch64(processor, "diffpress_cpu.so").call("diffpress_tiers")
    assert [name for place, name in enumerate(library.TIERS) if found >> place & 1] == tiers


def test_the_fastest_tier_answers() -> None:
    here = [name for name in library.processor_tiers() if name == library.ONEDNN or name in library.built_tiers()]
    assert tier() == next(iter(here), None)
    assert (shared_library() is None) == (why_no_library() is not None)


def test_a_lower_tier_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "processor_tiers", lambda: ("amx", "avx512vnni", "avxvnni", "avx2"))
    monkeypatch.setattr(library, "built_tiers", lambda: ("avx512vnni", "avx2"))
    assert tier() == "amx"
    monkeypatch.setenv(CHOICE, "avx2")
    assert tier() == "avx2"
    for absent in ("avxvnni", "sse2"):
        monkeypatch.setenv(CHOICE, absent)
        with pytest.raises(TierError, match=f"{CHOICE}={absent}.*amx, avx512vnni, avx2"):
            tier()


@pytest.mark.parametrize(
    ("processor", "built", "reason"),
    [((), ("avx2",), "none of amx"), (("avx2",), (), "no C\\+\\+ library"), (("amx", "avx2"), ("avx2",), "oneDNN")],
)
def test_reasons_for_the_reference(
    monkeypatch: pytest.MonkeyPatch, processor: tuple[str, ...], built: tuple[str, ...], reason: str
) -> None:
    expected = quantized_linear(*arguments())
    monkeypatch.setattr(library, "processor_tiers", lambda: processor)
    monkeypatch.setattr(library, "built_tiers", lambda: built)
    monkeypatch.setattr(cpu_kernel, "compute_linear", None)
    for function in (library._library, library._tier):
        function.cache_clear()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(why_no_library())
    assert torch.equal(quantized_linear(*arguments()), expected)


def arguments() -> tuple:
    weight = torch.arange(-32, 32, dtype=torch.int8).view(4, 16)
    return torch.ones(2, 16), weight, torch.ones(4), torch.ones(1), None, None, 8, 8


def test_formats_that_it_does_not_know_go_to_the_reference() -> None:
    x, *rest = arguments()
    assert quantized_linear(x.double(), *rest).dtype == torch.float64
    assert torch.equal(quantized_linear(x.double(), *rest).float(), quantized_linear(x, *rest))
