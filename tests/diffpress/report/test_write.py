"""The page: complete, honest, escaped, and in need of nothing beside it."""

import base64
import io
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffpress.calibration.conditions import Condition
from diffpress.export.manifest import Manifest
from diffpress.pairs import Pairs
from diffpress.report import write_report

HOSTILE = '<script>alert("1")</script>'


def images(html):
    """The embedded images in their order: reference, candidate, difference of each pair."""
    found = re.findall(r'src="data:image/(png|jpeg);base64,([^"]+)"', html)
    return [(kind, Image.open(io.BytesIO(base64.b64decode(data)))) for kind, data in found]


def words(html):
    """The text of the page without tags and with single spaces."""
    body = re.sub(r"<(style|title)>.*?</\1>", " ", html, flags=re.S)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body.replace("<wbr>", ""))))


def test_page_refers_to_nothing_outside_itself(page, make_manifest):
    html = page(manifest=make_manifest())
    links = re.findall(r"""\s(?:src|srcset|href|action|data)=["']([^"']*)""", html)
    links += re.findall(r"(?:url\(|@import)[^;)]*", html)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://", html)
    assert "<script" not in html
    assert "default-src 'none'" in html


def test_page_follows_the_reader_s_screen_and_scheme(page, make_manifest):
    html = page(manifest=make_manifest())
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_prompts_modules_and_names_are_escaped(page, make_pairs, make_plan, make_manifest):
    html = page(make_pairs(prompts=(HOSTILE, "a & b")), make_manifest(make_plan(first=HOSTILE)), model=HOSTILE)
    assert "<script" not in html
    assert "a &amp; b" in html
    assert html.count("&lt;script&gt;") > 3


def test_every_row_of_the_plan_is_there(page, make_plan, make_manifest):
    plan = make_plan()
    text = words(page(manifest=make_manifest(plan)))
    for row in plan:
        assert f"unet {row.module} 64 \N{MULTIPLICATION SIGN} 64" in text
    assert "40 rows" in text
    assert "W4A8, 20 of 40 layers" in text


def test_totals_of_each_format(page, make_manifest):
    text = words(page(manifest=make_manifest()))
    assert "W4A8 20 328 kB 41.0 kB 0.125" in text
    assert "float32 20 328 kB 328 kB 1.000" in text
    assert "All formats 40 655 kB 369 kB 0.562" in text


def test_most_sensitive_layers_first(page, make_plan, make_manifest):
    html = page(manifest=make_manifest(make_plan(100)))
    bars = re.findall(r'<span class="name">(.*?)</span>', html)
    assert len(bars) == 20
    assert [bar.replace("<wbr>", "") for bar in bars[:2]] == ["blocks.99.to_q", "blocks.97.to_q"]


def test_layers_without_an_error_have_no_bar(page, mixed_plan, make_manifest):
    html = page(manifest=make_manifest([row for row in mixed_plan if row.format != "W4A4"]))
    bars = [bar.replace("<wbr>", "") for bar in re.findall(r'<span class="name">(.*?)</span>', html)]
    assert bars == [f"time.{i}" for i in range(20)]


def test_plan_of_two_components(page, make_metrics, make_pairs, mixed_plan, make_manifest):
    pairs = make_pairs()
    text = words(page(pairs, make_manifest(mixed_plan), make_metrics(pairs, [])))
    assert "W4A4 in 60 and W8 in 23 of 90 layers. Compared" in text
    assert "Component module shape format before".lower() in text.lower()
    assert (
        "unet time.0 64 \N{MULTIPLICATION SIGN} 64 W8 16.4 kB 4.10 kB 1.0 \N{MULTIPLICATION SIGN} 10⁻⁶ conditioning"
        in text
    )
    assert "text_encoder embeddings.2 64 \N{MULTIPLICATION SIGN} 64 W8 16.4 kB 4.10 kB embedding, 8 bits" in text


def test_nothing_of_learning_where_nothing_was_learned(page, make_manifest):
    old = make_manifest().model_dump(mode="json", exclude={"learning"})
    html = page(manifest=Manifest.model_validate(old))
    assert 'id="learning"' not in html
    assert "learn" not in words(html).lower()
    assert html == page(manifest=make_manifest(learning=[]))


def test_learning_is_shown_with_what_was_held_out(page, make_manifest, history):
    html = page(manifest=make_manifest(learning=history))
    section = re.search(r'<section id="learning">.*?</section>', html, re.S).group()
    text = words(section)
    assert "Batch: squared difference of what the scheduler is given to the original's answer" in text
    assert "Loss Held out Batch logarithmic scale" in text
    assert "On what was held out First, iteration 60 4.0 \N{MULTIPLICATION SIGN} 10⁻³" in text
    assert "Best, iteration 960 1.4 \N{MULTIPLICATION SIGN} 10⁻⁴" in text
    assert "Last, iteration 1,200 1.8 \N{MULTIPLICATION SIGN} 10⁻⁴" in text
    assert len(re.findall(r'<path class="curve c[01]"', section)) == 2
    assert section.count('<rect class="touch"') == len(history)
    assert "is rounded, before anything was learned." in words(html)


def test_worst_pair_first_and_flagged(page, make_pairs):
    html = page(make_pairs(16))
    assert re.findall(r"seed (\d+)", html) == ["115", "113", "111", "109", "106", "104", "102", "100"]
    assert html.count('class="flag"') == 1
    assert re.search(r"seed 115.{0,40}worst of 16", html)
    assert "chosen from 16" in html


def test_every_pair_shown_where_there_are_few(page, make_pairs):
    html = page(make_pairs(3))
    assert len(images(html)) == 9
    assert "all 3 are shown" in html


def test_captions_say_class_prompt_or_neither(page, make_pairs):
    text = words(page(make_pairs(3, prompts=("3", "red fox", ""))))
    assert "class 3" in text
    assert "“red fox”" in text
    assert "no prompt" in text


def test_missed_gates_are_shown(page, make_pairs, make_metrics, make_manifest):
    sentence = "psnr_db is 28.31, the gate asks for at least 30"
    pairs = make_pairs()
    html = page(
        pairs, make_manifest(gates={"psnr_db": 30, "size": 0.35, "latency": None}), make_metrics(pairs, [sentence])
    )
    text = words(html)
    assert sentence in text
    assert "Gates 1 of 2 missed PSNR at least 30 dB; size at most 0.35" in text


def test_met_and_absent_gates(page, make_pairs, make_metrics, make_manifest):
    pairs = make_pairs()
    assert "Gates 1 of 1 met" in words(page(pairs, make_manifest(gates={"size": 0.35}), make_metrics(pairs, [])))
    assert "Gates none the recipe sets no limits" in words(page(pairs, make_manifest(), make_metrics(pairs, [])))


def test_slower_is_called_slower(page, cost):
    times = "\N{MULTIPLICATION SIGN}"
    text = words(page())
    assert f"Latency 1.35{times} slower 800 ms → 1,096 ms" in text
    assert f"Denoiser 4.00{times} smaller 27.0 MB → 6.75 MB" in text
    assert f"Multiply-accumulates 1{times} the same 18.4 billion each" in text
    faster = {**cost, "latency_ms": {"reference": 800.0, "candidate": 400.0, "ratio": 0.5}}
    assert f"Latency 2.00{times} faster" in words(page(cost=faster))


def test_cost_that_was_not_measured_is_said_to_be(page):
    text = words(page(cost={}))
    assert "Not measured in this run: parameters, multiply-accumulates, latency, peak memory." in text
    assert "alternation" not in text
    assert "Whole folder 41.0 MB 20.5 MB 0.500" in text


def test_comparison_has_no_plan(page):
    text = words(page(manifest=None, model="a and b"))
    assert "diffpress comparison a and b" in text
    assert "Reference and candidate compared on 4 pairs" in text
    for heading in ("Sensitivity", "Every module", "Recipe", "Gates"):
        assert heading not in text


def test_gates_stand_only_beside_the_run_that_checked_them(page, make_manifest):
    text = words(page(manifest=make_manifest(gates={"psnr_db": 99})))
    assert "diffpress comparison" in text
    assert "The candidate is W4A8, 20 of 40 layers." in text
    assert "Gates" not in text
    assert "Every module" in text


def test_recipe_versions_and_digests_are_there(page, make_manifest):
    text = words(page(manifest=make_manifest()))
    assert "seed: 7 quantize: method: ptq weights: 4" in text
    assert "torch 2.13.0" in text
    assert "abc123 unet/model.safetensors" in text


def test_difference_map_is_amplified_as_stated(page):
    # 0.05 everywhere in one channel: of the factors, 20 brings it to the end of the scale.
    reference = torch.full((1, 3, 8, 8), 0.5)
    candidate = reference.clone()
    candidate[:, 1, :, 4:] += 0.05
    pairs = Pairs([Condition("x", 0)], reference, candidate, [30.0], 0.9, 0.0, [0.1], 1)
    html = page(pairs)
    assert "amplified 20" in html
    assert "0.050 or more" in html
    difference = images(html)[2][1]
    assert difference.getpixel((0, 0)) == (6, 7, 20)
    assert difference.getpixel((7, 0)) == pytest.approx((252, 255, 190), abs=1)


def test_one_difference_scale_for_all_pairs(page):
    reference = torch.zeros(2, 1, 8, 8)
    candidate = torch.stack([torch.full((1, 8, 8), 0.2), torch.full((1, 8, 8), 0.1)])
    html = page(Pairs([Condition("", 0), Condition("", 1)], reference, candidate, [14.0, 20.0], 0.9, 0.0, [0.1], 1))
    assert "amplified 5" in html
    assert images(html)[2][1].getpixel((0, 0)) == pytest.approx((252, 255, 190), abs=1)
    assert images(html)[5][1].getpixel((0, 0)) == pytest.approx((186, 55, 84), abs=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_small_pictures_are_exact_and_at_their_own_size(page, channels, make_pairs):
    pairs = make_pairs(1, channels=channels, side=32)
    html = page(pairs)
    kind, image = images(html)[0]
    assert (kind, image.size, image.mode) == ("png", (32, 32), "L" if channels == 1 else "RGB")
    stored = torch.tensor(list(image.tobytes())).view(32, 32, channels).permute(2, 0, 1)
    assert torch.equal(stored, (pairs.reference[0] * 255).round().long())
    assert 'class="pairs pixelated"' in html


def test_large_pictures_are_downscaled(page, make_pairs):
    html = page(make_pairs(8, side=1024))
    assert {image.size for _, image in images(html)} == {(512, 512)}
    assert len(html) < 6e6
    assert "1024 \N{MULTIPLICATION SIGN} 1024 pixels" in html
    assert 'class="pairs"' in html


def test_eight_pairs_of_small_pictures_stay_small(page, make_pairs, make_manifest):
    assert len(page(make_pairs(16, side=64), make_manifest())) < 1.5e6


def test_time_steps_are_given_where_they_fit_the_run(page, make_manifest):
    assert "step 5 (time step 1.00): 5.0" in page(manifest=make_manifest())
    assert "time step 801" not in page(manifest=make_manifest(timesteps=(801.0,)))


@pytest.mark.parametrize("errors", [[0.0], [0.0, 0.0], [1e-9, 1.0, 0.0], [float("nan"), 1.0], [float("nan")]])
def test_odd_errors_still_make_a_page(page, errors, make_pairs):
    pairs = make_pairs(1)
    odd = Pairs(pairs.conditions, pairs.reference, pairs.reference, [100.0], 1.0, 0.0, errors, len(errors))
    html = page(odd)
    assert "PSNR equal no difference in any pair" in words(html)
    assert "nan" not in re.sub(r"base64,[^\"]+", "", html).lower()


def test_pictures_that_are_not_numbers_count_as_worst(page, make_pairs):
    pairs = make_pairs(3)
    pairs.candidate[0] = float("nan")
    broken = Pairs(pairs.conditions, pairs.reference, pairs.candidate, [float("nan"), 30.0, 20.0], 0.5, 0.0, [0.1], 1)
    html = page(broken)
    assert re.findall(r"seed (\d+)", html) == ["100", "102", "101"]
    assert "not finite" in html


def test_same_input_gives_the_same_file(page, make_manifest):
    assert page(manifest=make_manifest()) == page(manifest=make_manifest())


def test_template_and_style_are_package_data():
    folder = Path(write_report.__code__.co_filename).parent
    assert {"report.html.j2", "report.css"} <= {file.name for file in folder.iterdir()}
