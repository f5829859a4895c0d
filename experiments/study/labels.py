"""Labels beside points of a picture, placed so that they cover neither each other nor a point."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..report.drawing import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 9.0  # points
AROUND = ((9, 6), (-9, 6), (9, -6), (-9, -6), (0, 12), (0, -12), (14, 0), (-14, 0))  # offsets in points
FURTHER = (1.0, 1.8, 2.8, 4.0)  # multiples of these, the nearest first


Point = tuple[float, float]


class Label(NamedTuple):
    """A text beside the point (x, y), in the units of the axes."""

    x: float
    y: float
    text: str
    colour: str


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The common area, in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def place(figure: "Figure", axes: "Axes", labels: Sequence[Label], lines: Sequence[Sequence[Point]] = ()) -> None:
    """Write each label at the nearest offset where it covers least of other labels, points and lines; call it last.

    Args:
        figure: whose layout is settled by this.
        axes: of the points.
        labels: to write.
        lines: drawn through points (x, y), in the units of the axes.
    """
    figure.draw_without_rendering()  # settles the layout, on which places in pixels depend
    unit = figure.dpi / 72
    taken = [_around(axes, (label.x, label.y), 5 * unit) for label in labels]
    taken += [_square(x, y, unit) for line in lines for x, y in _along(axes, line)]
    for label in labels:
        choices = [(dx * f, dy * f) for f in FURTHER for dx, dy in AROUND]
        boxes = [_box(axes, label, one, unit) for one in choices]
        costs = [sum(box.overlap(other) for other in taken) for box in boxes]
        least = costs.index(min(costs))
        best = choices[least]
        taken.append(boxes[least])
        far = max(map(abs, best)) > 2 * SIZE
        axes.annotate(
            literal(label.text),
            (label.x, label.y),
            xytext=best,
            textcoords="offset points",
            ha=_side(best[0]),
            va="center",
            fontsize=SIZE,
            color=label.colour,
            arrowprops=dict(arrowstyle="-", color=label.colour, linewidth=0.6) if far else None,
        )


def _side(dx: float) -> str:
    return "left" if dx > 0 else "right" if dx < 0 else "center"


def _around(axes: "Axes", point: Point, half: float) -> Box:
    """The box around a point."""
    x, y = axes.transData.transform(point)
    return _square(x, y, half)


def _square(x: float, y: float, half: float) -> Box:
    return Box(x - half, y - half, x + half, y + half)


def _along(axes: "Axes", line: Sequence[Point]) -> np.ndarray:
    """Places along a line in pixels, [N, 2], a few pixels apart."""
    corners = axes.transData.transform(line) if line else np.empty((0, 2))
    if len(corners) < 2:
        return corners
    shares = np.linspace(0, len(corners) - 1, 60 * len(corners))
    return np.stack([np.interp(shares, np.arange(len(corners)), column) for column in corners.T], axis=1)


def _box(axes: "Axes", label: Label, offset: tuple[float, float], unit: float) -> Box:
    """Where a label would be; a character is about 0.65 of the font size wide."""
    x, y = axes.transData.transform((label.x, label.y))
    x, y = x + offset[0] * unit, y + offset[1] * unit
    width, height = 0.65 * SIZE * unit * len(label.text), 1.2 * SIZE * unit
    left = x - {"left": 0.0, "right": width, "center": width / 2}[_side(offset[0])]
    return Box(left, y - height / 2, left + width, y + height / 2)
