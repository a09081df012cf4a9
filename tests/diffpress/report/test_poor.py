"""A poor result is told first, by its worst layers, with what to try."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from diffpress.cli import app
from diffpress.poor import LARGE_ERROR, POOR_PSNR_DB, poor_of

GOOD, BAD = {"psnr_db": POOR_PSNR_DB}, {"psnr_db": 13.6}


@pytest.fixture
def manifest_of(make_plan, make_manifest):
    """A function: a manifest with one layer of this error, of a recipe with these sections."""

    def make(error, **recipe):
        plan = make_plan()
        plan[1] = plan[1].model_copy(update={"error": error})
        made = make_manifest(plan)
        made.recipe = recipe or made.recipe
        return made

    return make


def test_what_is_good_is_not_spoken_of(manifest_of):
    assert poor_of(manifest_of(LARGE_ERROR), GOOD) is None


def test_a_low_psnr_names_the_worst_layers_in_order(manifest_of):
    poor = poor_of(manifest_of(4e-4), BAD)
    assert next(iter(poor.layers.items())) == ("unet.blocks.1.to_q", 4e-4)
    assert list(poor.layers.values()) == sorted(poor.layers.values(), reverse=True)
    assert poor.sentence().startswith(
        "Poor: 13.6 dB from the original, less than 25; most moved by unet.blocks.1.to_q (2 %), "
    )


def test_a_layer_that_errs_much_is_named_whatever_the_images_are_like(manifest_of):
    poor = poor_of(manifest_of(0.04), GOOD)
    assert poor.layers == {"unet.blocks.1.to_q": 0.04}
    assert poor.sentence().startswith(
        "Uneven: 25.0 dB from the original, but the denoiser's output is moved by unet.blocks.1."
    )


@pytest.mark.parametrize(
    ("recipe", "error", "advice"),
    [
        ({"quantize": {"activations": 4, "weights": 4}}, 1e-4, "quantize.activations=8"),
        ({"quantize": {"activations": 8, "weights": 8}}, 1e-4, "quantize.float_activations=0.2"),
        ({"quantize": {"activations": 8, "weights": 4, "float_activations": 0.5}}, 1e-4, "quantize.weights=8"),
        ({"quantize": {"activations": 8, "weights": 8, "float_activations": 0.5}}, 1e-4, "quantize.activations=none"),
        ({"quantize": {"activations": "none", "weights": 2}}, 1e-4, "quantize.weights=4"),
        ({"quantize": {"activations": "none", "weights": 8}}, 0.1, "quantize.keep=[blocks.1.to_q]"),
        ({"quantize": {"activations": "none", "weights": 8}}, 1e-4, "more of record.trajectories"),
        ({"quantize": {"activations": 8}, "steps": {"speedup": 2.5}}, 1e-4, "less of steps.speedup, which is 2.5"),
        ({"quantize": {"activations": 8}, "steps": {"speedup": 2.5}}, 0.1, "quantize.float_activations=0.2"),
        ({"prune": {"remove": 0.3}}, 1e-4, "less of prune.remove, which is 0.3"),
    ],
)
def test_advice_is_about_what_the_recipe_asks_for(manifest_of, recipe, error, advice):
    assert advice in poor_of(manifest_of(error, **recipe), BAD).advice


def test_compress_says_it_before_anything_else(
    manifest_of, monkeypatch, tmp_path, make_pairs, make_metrics, tiny_class
):
    manifest = manifest_of(4e-4)
    manifest.metrics = make_metrics(make_pairs()) | BAD
    artifact = SimpleNamespace(manifest=manifest, cost={}, speed=None, missed=[])
    monkeypatch.setattr("diffpress.flow.compress", lambda *_, **__: artifact)
    command = ["compress", str(tiny_class), "--recipe", "w8", "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(app, command)
    assert told.stdout.startswith("Poor: 13.6 dB from the original")
    assert "is ready" in told.stdout
    data = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert data["poor"]["psnr_db"] == 13.6
    assert next(iter(data["poor"]["layers"])) == "unet.blocks.1.to_q"
    assert "quantize." in data["poor"]["advice"]


def test_the_report_of_an_artifact_says_it_above_its_figures(page, manifest_of, make_pairs, make_metrics):
    metrics = make_metrics(make_pairs()) | BAD | {"gates_missed": []}
    html = page(manifest=manifest_of(4e-4), metrics=metrics)
    assert html.index("Poor: 13.6 dB") < html.index('<dl class="tiles">')
    assert "Poor:" not in page(manifest=manifest_of(4e-4), metrics=metrics | GOOD)
