"""The look of every figure: one of two widths, fonts that are read in print, and nothing that lies on anything else."""

import itertools

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Text

from dlr.figures.register import registered
from dlr.figures.style import DOUBLE, SINGLE, drawn, legend
from dlr.runs import project_root

# Of each function the picture with most to show.
FILES = {}
for entry in registered().values():
    for file, arguments in entry.files_of(project_root() / "results").items():
        if len(repr(arguments)) > len(repr(FILES.get(entry.draw, (None, ()))[1])):
            FILES[entry.draw] = file, arguments
SMALLEST = 6.0                        # points
CLOSE = 1.0                           # pixels that the boxes of two texts may share


def shared(first, second) -> bool:
    return (min(first.x1, second.x1) - max(first.x0, second.x0) > CLOSE
            and min(first.y1, second.y1) - max(first.y0, second.y0) > CLOSE)


def tick_labels(axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if low <= tick.get_loc() <= high]
    return [text for tick in ticks for text in (tick.label1, tick.label2) if text.get_visible() and text.get_text()]


def problems(picture) -> list[str]:
    """What a reader of the printed figure would stumble over."""
    picture.canvas.draw()
    box = Text.get_window_extent
    shown = [axes for axes in picture.axes if axes.get_visible()]
    axis_labels = [tick_labels(axis) for axes in shown for axis in (axes.xaxis, axes.yaxis)]
    names = [text for axes in shown for text in (axes.title, axes.xaxis.label, axes.yaxis.label) if text.get_text()]
    told = [f"legend over {axes.get_title()!r}" for axes in shown for key in [*picture.legends, axes.get_legend()]
            if key is not None and shared(key.get_window_extent(), axes.get_window_extent())]
    level = [labels for labels in axis_labels if not any(text.get_rotation() % 90 for text in labels)]
    pairs = [pair for group in [names, *level] for pair in itertools.combinations(group, 2)]
    told += [f"{first.get_text()!r} over {second.get_text()!r}" for first, second in pairs if shared(box(first), box(second))]
    texts = [text for text in [*names, *sum(axis_labels, []), *picture.texts] if text.get_text()]
    keys = [key for key in [*picture.legends, *(axes.get_legend() for axes in shown)] if key is not None]
    for text in [*texts, *sum((key.get_texts() for key in keys), [])]:
        if text.get_fontsize() < SMALLEST:
            told.append(f"{text.get_text()!r} is {text.get_fontsize()} points")
        own, whole = box(text), picture.bbox
        if min(own.x0, own.y0, whole.x1 - own.x1, whole.y1 - own.y1) < -CLOSE:
            told.append(f"{text.get_text()!r} is cut off")
    return told


@pytest.mark.parametrize("draw", FILES, ids=lambda draw: FILES[draw][0])
def test_a_figure_is_read_at_print_size(draw):
    picture = draw(*FILES[draw][1])
    assert problems(picture) == []
    assert picture.get_figwidth() in (SINGLE, DOUBLE) and picture.get_figheight() < 9.6
    plt.close("all")


def test_what_overlaps_is_seen():
    @drawn
    def crowded():
        picture, axes = plt.subplots(figsize=(SINGLE, 2))
        axes.plot([0, 1], label="line")
        axes.set_xticks([0.5, 0.51], ["a long label", "another"])
        axes.set_title("wider than a column of print is, so that it is cut off at both of its ends")
        axes.legend(fontsize=5)
        return picture
    told = " ".join(problems(crowded()))
    assert "legend over" in told and "'a long label' over 'another'" in told
    assert "'line' is 5.0 points" in told and "both of its ends' is cut off" in told
    plt.close("all")


def test_a_label_that_recurs_stands_once_in_the_legend():
    picture, grid = plt.subplots(1, 2)
    for axes in grid:
        axes.plot([0, 1], label="same")
    grid[1].plot([1, 0], label="other")
    assert [text.get_text() for text in legend(picture).get_texts()] == ["same", "other"]
    assert [text.get_text() for text in legend(picture, [grid[0]]).get_texts()] == ["same"]
    plt.close("all")
