"""What is printed for people."""

import pytest

from diffpress.console import print_estimate

VALUES = {"seconds": {"record": 3.2}, "disk_bytes": 2_000_000, "memory_bytes": 5_000_000, "dtype": "float32"}


def shown(capsys, values):
    print_estimate(values)
    return " ".join(capsys.readouterr().out.split())


def test_an_estimate_says_what_features_take_where_steps_inherit(capsys: pytest.CaptureFixture[str]):
    assert "features" not in shown(capsys, VALUES)
    assert "features kept for an image │ 0.1 MB" in shown(capsys, {**VALUES, "cache_bytes": 123_000})
