"""Which order learning takes: the recipe's or, left out, the one that fits; settled once, and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from diffpress import order as orders
from diffpress.export.artifact import load_pipeline
from diffpress.export.errors import RecipeError
from diffpress.export.folder import PipelineFolder
from diffpress.export.manifest import read_manifest
from diffpress.flow import compress
from diffpress.order import choose_order, learning_bytes, with_order
from diffpress.recipe import Recipe, parse_recipe
from diffpress.work import work_folder

QUICK = {"sampling": {"steps": 3}, "record": {"trajectories": 4, "batch": 2}}
LEARN = {"method": "qalora", "weights": 4, "activations": 8, "iterations": 2, "batch": 2, "validation_images": 2}


def recipe_of(**options: object) -> Recipe:
    return parse_recipe({**QUICK, "quantize": {**LEARN, **options}})


def free(amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "free_bytes", lambda _pipeline: amount)


@pytest.mark.parametrize("source", ["tiny_text", "tiny_class", "tiny_pixels"])
def test_left_out_it_is_whole_where_that_fits(
    source: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, recipe = load_pipeline(PipelineFolder(request.getfixturevalue(source), source)), recipe_of()
    needed = learning_bytes(pipeline, recipe)
    assert 0 < needed["blocks"] < needed["whole"]
    # A tenth is left to others.
    for amount, expected in ((needed["whole"], "blocks"), (needed["whole"] * 2, "whole"), (0, "blocks")):
        free(amount, monkeypatch)
        assert choose_order(pipeline, recipe) == expected
    for said in ("whole", "blocks"):
        assert choose_order(pipeline, recipe_of(order=said)) == said


def test_where_nothing_is_learned_there_is_no_order(tiny_class: Path) -> None:
    pipeline = load_pipeline(PipelineFolder(tiny_class, "tiny"))
    assert choose_order(pipeline, recipe_of(activations="none", components=["text_encoders"])) is None
    recipe = parse_recipe({**QUICK, "quantize": {"method": "ptq"}})
    assert choose_order(pipeline, recipe) is None
    assert with_order(recipe, None) is recipe


class Plain(nn.Module):
    """A denoiser of two layers that nothing repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 1, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.first(sample))


def test_a_denoiser_without_blocks_is_refused(
    diffpress, tiny_pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipeline = DDIMPipeline(Plain(), DDIMScheduler())
    with pytest.raises(RecipeError, match=r"Plain has none\. Give whole; .*accumulate"):
        choose_order(pipeline, recipe_of(order="blocks"))
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


def test_another_request_settles_anew(tmp_path: Path):
    class Killed(BaseException):
        pass

    def begin() -> None:
        with work_folder(tmp_path / "out", "a", False) as work:
            assert work.settled_order("blocks") == work.settled_order("whole") == "blocks"
            raise Killed

    with pytest.raises(Killed):
        begin()
    with work_folder(tmp_path / "out", "b", False) as work:
        assert work.settled_order("whole") == "whole"


def test_free_memory_counts_what_the_pipeline_takes_itself(tiny_class: Path, monkeypatch: pytest.MonkeyPatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(orders.psutil, "virtual_memory", Memory)
    pipeline = load_pipeline(PipelineFolder(tiny_class, "tiny"))
    weights = sum(
        tensor.numel() * tensor.element_size()
        for part in (pipeline.transformer, pipeline.vae)
        for tensor in (*part.parameters(), *part.buffers())
    )
    assert orders.free_bytes(pipeline) == 1000 + weights
