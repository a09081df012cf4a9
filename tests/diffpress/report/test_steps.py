"""A step plan drawn, and the trials that it was chosen from."""

import math
import re
from html import unescape

import numpy as np
import pytest

from diffpress.export.edits import Attach
from diffpress.export.manifest import PlanRow
from diffpress.export.runtime import StepPlan, Unit
from diffpress.report.plan import lines, sensitivity, summary
from diffpress.report.steps import NAMED, step_plan

TIMES = "\N{MULTIPLICATION SIGN}"
REASON = "1.80 times fewer multiplications, 0.9 MB of features an image"
TRIALS = [{"speedup": 1.8, "psnr_db": 44.0}, {"speedup": 2.0, "psnr_db": 42.0}, {"speedup": 1.9, "psnr_db": 30.0}]


def unit(*modules, adds_to="hidden_states"):
    return Unit(modules=modules, adds_to=(adds_to,), channels=(8,))


def plan(units, rows, **settings):
    patterns = tuple(dict.fromkeys(rows))
    return StepPlan(units=tuple(units), patterns=patterns, steps=tuple(map(patterns.index, rows)), **settings)


SMALL = plan([unit("down.0"), unit("mid", adds_to=None), unit("up.0", "up.1")], ["###", ".-.", "##.", ".-.", "###"])


@pytest.fixture
def planned(make_manifest):
    """A manifest with a step plan in it."""

    def make(steps=SMALL, trials=TRIALS, **more):
        edit = Attach(component="unet", module="step_plan", settings=steps)
        row = PlanRow(
            component="unet",
            module="step_plan",
            shape=(),
            format=edit.words(),
            source_bytes=0,
            bytes=1000,
            reason=REASON,
            error=1e-3,
        )
        manifest = make_manifest(learning=trials, **more)
        return manifest.model_copy(update={"edits": [edit], "plan": [*manifest.plan, row]})

    return make


def cells(path, units):
    """[steps, units] covered by a shape's path, how often."""
    found = np.zeros((50, units), dtype=int)
    for step, first, count in re.findall(r"M(\d+) (\d+)h1v(\d+)h-1z", path):
        found[int(step), int(first) : int(first) + int(count)] += 1
    return found


def section(html):
    return re.search(r'<section id="steps">.*?</section>', html, re.S).group()


def words(html):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html.replace("<wbr>", ""))))


def test_nothing_where_every_step_is_computed(make_manifest, page):
    assert step_plan(make_manifest()) is None
    assert 'id="steps"' not in page(manifest=make_manifest())


def test_every_cell_is_drawn_once_as_what_it_is(planned):
    shapes = dict(step_plan(planned()).cells.shapes)
    assert list(shapes) == ["computed", "inherited", "not needed"]
    rows = [SMALL.patterns[index] for index in SMALL.steps]
    for kind, sign in (("computed", "#"), ("inherited", "."), ("not needed", "-")):
        expected = [[int(cell == sign) for cell in row] for row in rows]
        assert cells(shapes[kind], 3)[:5].tolist() == expected
        assert cells(shapes[kind], 3)[5:].sum() == 0


def test_what_no_cell_is_has_no_shape(planned):
    assert [kind for kind, _ in step_plan(planned(plan([unit("a")], ["#", "."]))).cells.shapes] == [
        "computed",
        "inherited",
    ]


def test_each_step_says_what_its_units_do(planned):
    strips = step_plan(planned()).cells.strips
    assert [(strip.start, strip.width) for strip in strips] == [(step, 1) for step in range(5)]
    assert strips[0].text == "step 1 (time step 801): of 3 units 3 computed"
    assert strips[1].text == "step 2 (time step 601): of 3 units 2 inherited, 1 not needed"
    assert strips[2].text == "step 3 (time step 401): of 3 units 2 computed, 1 inherited"
    assert step_plan(planned(timesteps=(1.0,))).cells.strips[0].text == "step 1: of 3 units 3 computed"


def test_steps_are_marked_in_the_middle_of_their_cells(planned):
    ticks = step_plan(planned()).cells.ticks
    assert [(tick.at, tick.text, tick.below) for tick in ticks] == [
        (pytest.approx(100 * (step + 0.5) / 5), str(step + 1), below)
        for step, below in enumerate(["801", "601", "401", "201", "1"])
    ]


def test_units_that_follow_each_other_have_one_name(planned):
    assert [name.text for name in step_plan(planned()).cells.names] == ["down.0", "mid", "up.0 to 1"]


@pytest.mark.parametrize("count", [1, NAMED, NAMED + 1, 150])
def test_names_share_the_height_of_all_units(count, planned):
    many = plan([unit(f"blocks.{i}") for i in range(count)], ["#" * count] + ["." * count] * 49)
    found = step_plan(planned(many)).cells
    assert sum(name.units for name in found.names) == count
    assert len(found.names) <= NAMED
    first = 0
    for name in found.names:
        assert name.text == f"blocks.{first}"
        first += name.units
    assert found.height % count == 0
    assert (found.line is not None) == (len(found.names) == count)


def test_what_each_unit_does_in_words(planned):
    down, mid, up = step_plan(planned()).rows
    assert (down.inherits, mid.inherits) == ("what is added to hidden_states", "all that it gives")
    assert (down.computed, down.unused) == ("1, 3, 5", "")
    assert (mid.computed, mid.unused) == ("1, 3, 5", "2, 4")
    assert up.computed == "1, 5"
    steps = plan([unit("a")], ["#", "#", "#", ".", "#", "#"])
    assert step_plan(planned(steps)).rows[0].computed == "1-3, 5-6"


def test_facts_say_what_is_forecast_and_what_it_saves(planned):
    facts = dict(step_plan(planned(plan([unit("a")], ["#", ".", "#", "."], order=2, corrected=True))).facts)
    assert facts["Computed in full"] == "2 of 4 steps"
    assert facts["Multiply-accumulates of the denoiser"] == f"1.80{TIMES} fewer"
    # Four steps at the price of 4 / 1.8: two in full, and two others that share the rest: (4 / 1.8 - 2) / 2 = 0.111.
    assert facts["A step that inherits costs"] == "11% of a full one"
    assert facts["Forecast"] == "its parabola continued"
    assert facts["Forecasts are"] == "scaled and shifted by channel"
    assert facts["Features are kept"] == "as computed"
    held = dict(step_plan(planned(plan([unit("a")], ["#", "."], order=0, storage="int8"))).facts)
    assert (held["Forecast"], held["Forecasts are"]) == ("the last feature", "taken as they are")
    assert held["Features are kept"] == "in int8"


def test_no_costs_where_none_are_known(planned):
    assert [name for name, _ in step_plan(planned(trials=[])).facts][:2] == ["Computed in full", "Forecast"]


def test_trials_by_speedup_and_psnr_the_chosen_one_first(planned):
    found = step_plan(planned())
    assert found.spread is None
    assert [tick.text for tick in found.tradeoff.x_ticks] == ["1.8", "1.85", "1.9", "1.95", "2"]
    assert [tick.text for tick in found.tradeoff.y_ticks] == ["30", "35", "40", "45"]
    assert [(dot.x, dot.y) for dot in found.tradeoff.dots] == [
        pytest.approx(place) for place in [(0, 100 / 15), (100, 100 * 3 / 15), (50, 100)]
    ]
    assert [dot.text for dot in found.tradeoff.dots] == [
        f"chosen: 44.0 dB at 1.80{TIMES}",
        f"42.0 dB at 2.00{TIMES}",
        f"30.0 dB at 1.90{TIMES}",
    ]


def test_trials_that_are_as_fast_as_each_other_are_counted(planned):
    alike = [{**trial, "speedup": 1.8 + 1e-3 * i} for i, trial in enumerate(TRIALS)]
    found = step_plan(planned(trials=alike))
    assert found.tradeoff is None
    assert sum(bar.count for bar in found.spread.bars) == 3
    assert found.spread.bars[-1].count == 1


def test_a_single_trial_was_chosen_from_nothing(planned, page):
    found = step_plan(planned(trials=TRIALS[:1]))
    assert (found.tradeoff, found.spread) == (None, None)
    assert "Plans that were tried" not in page(manifest=planned(trials=TRIALS[:1]))


def test_trials_that_gave_nothing_finite_are_counted_and_not_drawn(planned, page):
    broken = [*TRIALS, {"speedup": 2.5, "psnr_db": -math.inf}]
    found = step_plan(planned(trials=broken))
    assert (found.trials, found.failed, len(found.tradeoff.dots)) == (3, 1, 3)
    text = words(section(page(manifest=planned(trials=broken))))
    assert "1 more gave nothing finite" in text
    assert "Other plans, 2" in text
    assert "nothing finite" not in words(page(manifest=planned()))


def test_the_section_says_all_of_it(planned, page):
    html = section(page(manifest=planned()))
    text = words(html)
    assert f"instead: {REASON}." in text
    assert "Computed Inherited Not needed" in text
    assert "A step that inherits costs 26% of a full one" in text
    assert "mid all that it gives 1, 3, 5 2, 4" in text
    assert html.count('class="trial') == 3
    assert html.count('class="trial chosen"') == 1
    assert html.count('<rect class="touch"') == 5
    for figure in re.findall("<svg[^>]*>", html):
        assert re.search(r'role="img" aria-label="[^"]+"', figure)
    assert not re.search(r'class="[a-z-]*"[^>]*class=', html)


def test_learning_is_told_apart_from_trials(planned, page, history):
    html = page(manifest=planned(trials=[*history, *TRIALS]))
    assert 'id="learning"' in html
    assert section(html).count('class="trial') == 3
    assert 'id="learning"' not in page(manifest=planned())


def test_a_large_plan_stays_small(planned, page):
    """150 units that change at every step, each on its own: the figure, and the table beneath it."""
    generator = np.random.default_rng(0)
    rows = ["#" * 150] + ["".join(generator.choice(["#", "."], 150)) for _ in range(49)]
    assert len(section(page(manifest=planned(plan([unit(f"blocks.{i}") for i in range(150)], rows))))) < 3e5


def test_module_names_are_escaped(planned, page):
    hostile = plan([unit("<script>alert(1)</script>")], ["#", "."])
    assert "<script" not in page(manifest=planned(hostile))


def test_an_error_of_images_is_no_sensitivity_of_a_layer(planned):
    manifest = planned()
    assert "step_plan" not in [bar.name for bar in sensitivity(manifest.plan)]
    row = lines(manifest.plan)[-1]
    assert (row.module, row.shape, row.error, row.reason) == ("step_plan", "—", "", REASON)


def test_the_summary_says_what_a_plan_saves(planned):
    assert summary(planned().plan) == f"W4A8, 20 of 40 layers; {REASON}"
