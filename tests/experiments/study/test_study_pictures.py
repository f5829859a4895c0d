"""Laws of the study's pictures and of the model of devices."""

import math

import numpy as np
import pytest
from matplotlib.text import Text
from studies import Arm, main_sweep

from experiments.report import read_branched
from experiments.report.drawing import new_figure
from experiments.study import pictures
from experiments.study.arms import only, points
from experiments.study.devices import device_factor, factor, random_factor
from experiments.study.labels import Label, place

ARMS = {
    "bias": Arm(0.0, 0.2),
    "aux_1e-2": Arm(0.01, 0.4, 0.05),
    "aux_1e-1": Arm(0.02, 0.3, 0.5),
    "bias_1e-1": Arm(0.03, 0.8),
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return {"arms": read_branched(main_sweep(tmp_path_factory.mktemp("study"), ARMS))}


# --- quality against balance ------------------------------------------------------------------------------


def test_a_point_has_a_dot_for_every_block(tables):
    found = points(tables, ARMS)
    assert list(found) == list(ARMS)
    # in block 1 an arm's loss is 1e-5 higher; the trunks' levels cancel
    assert found["aux_1e-1"].dots[0] == pytest.approx((0.3, 0.02))
    assert found["aux_1e-1"].dots[1] == pytest.approx((0.3, 0.02001))
    assert found["bias"].dots[0] == found["bias"].dots[1] == pytest.approx((0.2, 0.0))
    assert found["bias"].difference.mean == 0.0


def test_the_frontier_joins_weights_and_rates_in_order(tables):
    figure = pictures.frontier(points(tables, ARMS)).figure
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    joined = [line for line in lines if len(line) == 2 and line[0][0] != line[1][0]]
    assert any(np.allclose(line, [[0.4, 0.010005], [0.3, 0.020005]]) for line in joined)  # 1e-2, 1e-1
    assert any(np.allclose(line, [[0.2, 0.0], [0.8, 0.030005]]) for line in joined)  # 5e-3, 1e-1
    dots = [line for line in figure.axes[0].lines if line.get_markersize() == 3.6]
    assert sum(len(line.get_xdata()) for line in dots) == len(ARMS) * 2


def test_pictures_without_data_are_left_out(tables):
    assert pictures.frontier({}) is None and pictures.rules({}) is None and pictures.scopes({}) is None
    assert pictures.strips("x", "x", "x", {"a": {}}, ["bias"], (None,)) is None
    bias = only(tables["arms"], ["bias"])
    assert pictures.interference(bias) is not None  # the trunks of aux_1e-2 have a gradient


def test_interference_has_a_line_for_every_weight_that_ran(tables):
    figure = pictures.interference(tables["arms"]).figure
    lines = [line.get_ydata() for axes in figure.axes for line in axes.lines if line.get_marker() != "None"]
    for weight in (0.05, 0.5):  # the gradient is 1 % larger in block 1; there are trunks of two methods
        assert sum(len(line) == 4 and np.allclose(line, 1.005 * weight) for line in lines) == 2
    assert sum(len(line) == 3 and np.allclose(line, 0.1) for line in lines) == 1  # of the trunks, one has a gradient


def test_only_keeps_arms_in_the_given_order_and_leaves_out_others(tables):
    kept = only(tables["arms"], ["aux_1e-1", "nothing", "bias"])
    assert kept.arms == ["aux_1e-1", "bias"]
    assert {branch.arm for branch in kept.runs} == {"aux_1e-1", "bias"}
    assert len(kept.runs) == 8 and len(tables["arms"].runs) == 16


# --- labels -----------------------------------------------------------------------------------------------


def test_labels_of_close_points_do_not_overlap():
    figure, grid = new_figure(4.0)
    axes = grid[0, 0]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    place(figure, axes, [Label(0.5 + 0.004 * i, 0.5, f"label {i}", "black") for i in range(6)])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
    assert len(boxes) == 6
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert width <= 1 or height <= 1


def test_a_label_avoids_a_line():
    def offset(lines):
        figure, grid = new_figure(4.0)
        axes = grid[0, 0]
        axes.set(xlim=(0, 1), ylim=(0, 1))
        place(figure, axes, [Label(0.5, 0.5, "label", "black")], lines)
        return axes.texts[0].xyann

    assert offset([]) == (9, 6)
    assert offset([[(0.5, 0.5), (0.7, 0.56)]]) != (9, 6)


# --- devices ----------------------------------------------------------------------------------------------


def test_the_slowest_device_has_the_factor():
    loads = np.ones((1, 1, 16))
    loads[0, 0, 5] = 9.0  # its device has 10 of 24 copies on 8 devices, mean 3
    assert factor(loads) == pytest.approx(10 / 3)
    both = np.concatenate([loads, np.ones((1, 1, 16))], axis=1)
    assert factor(both) == pytest.approx((10 / 3 + 1) / 2)  # layers wait one after the other
    neighbours = np.ones((1, 1, 16))
    neighbours[0, 0, [0, 1]] = 2.0, 0.0  # even as devices
    assert factor(neighbours) == 1.0
    assert math.isnan(factor(np.ones((1, 1, 12))))


def test_the_factor_of_a_run_is_of_its_last_quarter(tables):
    run = next(run for branch, run in tables["arms"].runs.items() if branch.arm == "bias_1e-1")
    # the first expert has 1.8 times the mean, the others 1 - 0.8 / 15 of it: a device of both (1.8 + 0.94667) / 2
    assert device_factor(run) == pytest.approx((1.8 + 1 - 0.8 / 15) / 2, rel=1e-4)


def test_a_random_router_is_near_even_with_many_tokens():
    assert 1 < random_factor(2048, 16, 4) < random_factor(64, 16, 4) < 2
    assert random_factor(4096, 16, 16) == 1.0
