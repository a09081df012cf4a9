"""How learning went, as a chart and in words."""

import pytest

from diffpress.report.learning import learning

TIMES = "\N{MULTIPLICATION SIGN}"
NAN = float("nan")


def evaluated(iteration, loss, evaluation):
    return {"iteration": float(iteration), "loss": loss, "evaluation": evaluation}


def test_nothing_without_judgements():
    assert learning([]) is None


def test_losses_that_are_close_start_at_zero():
    plot = learning([evaluated(1, 0.4, 0.2), evaluated(3, 0.1, 0.1), evaluated(4, 0.2, 0.05)]).plot
    assert not plot.logarithmic
    assert [(tick.at, tick.text) for tick in plot.y_ticks] == [
        (100, "0"),
        (75, "0.1"),
        (50, "0.2"),
        (25, "0.3"),
        (0, "0.4"),
    ]
    evaluation, batch = plot.curves
    assert (evaluation.name, batch.name) == ("held out", "batch")
    assert evaluation.points == [pytest.approx(point) for point in [(25, 50), (75, 75), (100, 87.5)]]
    assert batch.points == [pytest.approx(point) for point in [(25, 0), (75, 75), (100, 50)]]


def test_losses_decades_apart_share_a_logarithmic_axis():
    plot = learning([evaluated(100, 1e-1, 1e-2), evaluated(200, 1e-3, 1e-4)]).plot
    assert plot.logarithmic
    assert [tick.at for tick in plot.y_ticks] == pytest.approx([100, 200 / 3, 100 / 3, 0])
    assert [tick.text for tick in plot.y_ticks] == [f"1 {TIMES} 10⁻⁴", f"1 {TIMES} 10⁻³", "0.01", "0.1"]
    assert [[y for _, y in curve.points] for curve in plot.curves] == [
        pytest.approx([100 / 3, 100]),
        pytest.approx([0, 200 / 3]),
    ]


@pytest.mark.parametrize(
    ("last", "texts"),
    [
        (1, ["0", "1"]),
        (15, ["0", "3", "6", "9", "12", "15"]),
        (50, ["0", "10", "20", "30", "40", "50"]),
        (1150, ["0", "200", "400", "600", "800", "1,000"]),
        (1200, ["0", "200", "400", "600", "800", "1,000", "1,200"]),
    ],
)
def test_round_iterations_along_the_axis(last, texts):
    ticks = learning([evaluated(last, 0.1, 0.1)]).plot.x_ticks
    assert [tick.text for tick in ticks] == texts
    assert [tick.at for tick in ticks] == pytest.approx([100 * int(text.replace(",", "")) / last for text in texts])


def test_the_reader_is_told_both_losses_everywhere_along_the_axis():
    strips = learning([evaluated(60, 0.02, 0.5), evaluated(120, 1e-3, 0.25), evaluated(150, 1.0, 0.125)]).plot.strips
    assert [strip.text for strip in strips] == [
        "iteration 60: held out 0.500, batch 0.0200",
        f"iteration 120: held out 0.250, batch 1.0 {TIMES} 10⁻³",
        "iteration 150: held out 0.125, batch 1.00",
    ]
    assert [strip.start for strip in strips] == pytest.approx([20, 60, 90])
    assert [strip.start + strip.width for strip in strips] == pytest.approx([60, 90, 110])


def test_first_best_and_last_of_what_was_held_out(history):
    assert learning(history).evaluation == [
        ("first, iteration 60", f"4.0 {TIMES} 10⁻³"),
        ("best, iteration 960", f"1.4 {TIMES} 10⁻⁴"),
        ("last, iteration 1,200", f"1.8 {TIMES} 10⁻⁴"),
    ]


def test_a_single_judgement_is_all_three():
    single = learning([evaluated(3, 0.3, 0.2)])
    assert {value for _, value in single.evaluation} == {"0.200"}
    assert [curve.points for curve in single.plot.curves] == [
        [pytest.approx((100, 100 / 3))],
        [pytest.approx((100, 0))],
    ]
    assert [(strip.start, strip.width) for strip in single.plot.strips] == [(0, 100)]


def test_what_is_not_finite_is_left_out_of_the_chart_and_named():
    broken = learning([evaluated(1, 0.3, NAN), evaluated(2, 0.2, 0.1), evaluated(3, float("inf"), NAN)])
    evaluation, batch = broken.plot.curves
    assert (len(evaluation.points), len(batch.points)) == (1, 2)
    assert [value for _, value in broken.evaluation] == ["not finite", "0.100", "not finite"]
    assert broken.plot.strips[2].text == "iteration 3: held out not finite, batch not finite"


def test_no_chart_where_nothing_is_finite():
    assert learning([evaluated(1, NAN, NAN)]).plot is None
