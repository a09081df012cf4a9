"""Which order learning takes: the recipe's or, left out, the one that fits; settled once, and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffpress.compress.qalora import order as orders
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest
from diffpress.flow import compress
from diffpress.recipe import Recipe, parse_recipe

QUICK = {"sampling": {"steps": 3}, "record": {"trajectories": 4, "batch": 2}}
LEARN = {"method": "qalora", "weights": 4, "activations": 8, "iterations": 2, "batch": 2, "validation_images": 2}


def recipe_of(**options: object) -> Recipe:
    return parse_recipe({**QUICK, "quantize": {**LEARN, **options}})


def free(amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "free_bytes", lambda _pipeline: amount)


def test_a_denoiser_without_blocks_is_refused(
    diffpress, tiny_pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**QUICK, "quantize": {**LEARN, "order": "blocks"}}))
    monkeypatch.setattr(orders, "find_blocks", lambda _model: [])
    for extra in ([], ["--estimate"]):
        status, _, errors = diffpress("compress", tiny_pixels, "--recipe", recipe, "--out", tmp_path / "out", *extra)
        assert status == 2
        assert "quantize.order: blocks needs a denoiser of repeated modules" in " ".join(errors.split())
        assert list(tmp_path.iterdir()) == [recipe]


def test_estimate_shows_what_both_take_and_which_is_taken(
    diffpress, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**QUICK, "quantize": LEARN}))
    arguments = ("compress", tiny_text, "--recipe", recipe, "--out", tmp_path / "out", "--estimate")
    for amount, expected in ((10**12, "whole"), (0, "blocks")):
        free(amount, monkeypatch)
        values = json.loads(diffpress(*arguments, "--json").output)
        assert values["order"] == expected
        assert set(values["learning_bytes"]) == {"whole", "blocks"}
        assert f"order {expected}, taken" in " ".join(diffpress(*arguments).output.split())


@pytest.mark.long
def test_the_order_is_written_down_and_stays_when_a_killed_run_continues(
    tiny_class: Path, digests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if stage.startswith("learn"):
            raise Killed

    source, out = PipelineFolder(tiny_class, "tiny"), tmp_path / "out"
    free(0, monkeypatch)
    with pytest.raises(Killed):
        compress(source, recipe_of(), out, notify=kill)
    free(10**12, monkeypatch)
    compress(source, recipe_of(), out)
    assert read_manifest(out).recipe["quantize"]["order"] == "blocks"
    compress(source, recipe_of(), tmp_path / "other")
    assert read_manifest(tmp_path / "other").recipe["quantize"]["order"] == "whole"
    free(0, monkeypatch)
    compress(source, recipe_of(), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(out)
