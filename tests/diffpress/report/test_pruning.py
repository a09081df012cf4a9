"""What was removed, drawn and in words."""

import re
from html import unescape

import pytest

from diffpress.export.manifest import PlanRow
from diffpress.report.plan import summary
from diffpress.report.pruning import NAMED, pruning

ROWS = [("down.attn", "heads", 3, 4, "1 removed"), ("down.ff", "neurons", 90, 100, "0-4, 50-52, 98-99 removed")]
ROWS += [("up.ff", "neurons", 100, 100, "all kept"), ("up", "channels", 6, 8, "6-7 removed")]


def row(module, kind, kept, count, reason):
    return PlanRow(
        component="unet",
        module=f"{module}, {kind}",
        shape=(kept, count),
        format=kind,
        source_bytes=0,
        bytes=0,
        reason=reason,
    )


@pytest.fixture
def pruned(make_plan):
    """A plan with units in it."""
    return [*make_plan(), *(row(*own) for own in ROWS)]


def covered(path, count):
    """Units of which a path draws anything, and how wide it is in all, in units."""
    runs = [
        (float(a) * count / 1000, float(b) * count / 1000) for a, b in re.findall(r"M([\d.]+) 0H([\d.]+)V1H\1z", path)
    ]
    return {unit for unit in range(count) for a, b in runs if a <= unit + 0.5 <= b}, sum(b - a for a, b in runs)


def test_nothing_where_nothing_could_be_removed(make_plan, make_manifest, page):
    assert pruning(make_plan(), {}) is None
    assert 'id="pruning"' not in page(manifest=make_manifest())


def test_every_unit_that_is_kept_is_drawn_and_no_other(pruned):
    gone = [{1}, {*range(5), 50, 51, 52, 98, 99}, set(), {6, 7}]
    for own, missing in zip(pruning(pruned, {}).structures, gone, strict=True):
        units, width = covered(own.path, own.count)
        assert units == set(range(own.count)) - missing
        # Numbers have four digits.
        assert width == pytest.approx(own.kept, abs=1e-3 * own.count)


def test_it_is_said_how_much_of_each_kind_went(pruned):
    assert pruning(pruned, {}).words == "1 of 4 heads, 10 of 200 neurons and 2 of 8 channels removed"
    assert pruning([row(*ROWS[0])], {}).words == "1 of 4 heads removed"
    assert summary(pruned).startswith(
        "1 of 4 heads, 10 of 200 neurons and 2 of 8 channels removed; W4A8, 20 of 40 layers"
    )


@pytest.mark.parametrize("count", [1, NAMED, NAMED + 1, 300])
def test_names_share_the_height_of_all_structures(count):
    found = pruning([row(f"blocks.{i}", "heads", 3, 4, "1 removed") for i in range(count)], {})
    assert sum(share for _, share in found.names) == count
    assert len(found.names) <= NAMED
    assert found.height % count == 0
    assert (found.line is not None) == (len(found.names) == count)


def test_the_page_has_the_section_and_leaves_units_out_of_the_plan(pruned, make_manifest, page):
    html = page(manifest=make_manifest(pruned))
    section = re.search(r'<section id="pruning">.*?</section>', html, re.S).group()
    words = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", section.replace("<wbr>", ""))))
    assert "Heads kept 3 of 4" in words
    assert "Parameters of the denoiser 6.78 million → 6.78 million" in words
    assert "down.ff neurons 90 100 0-4, 50-52, 98-99" in words
    assert "up.ff neurons 100 100 none" in words
    plan = re.search(r'<section id="plan">.*?</section>', html, re.S).group()
    assert "down.ff" not in plan
    assert "40 rows" in plan
