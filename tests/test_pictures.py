"""What people look at: which videos are shown, how a comparison is marked, which curves are drawn, how wide tables are."""
import numpy as np
import pytest
from PIL import Image

from support import pictures
from support.tables import best_middle_worst


def test_the_best_the_middle_and_the_worst_gain_are_shown():
    assert best_middle_worst({0: .1, 1: .4, 2: .3, 3: -.2, 4: .4}) == {"best": 1, "middle": 2, "worst": 3}
    assert best_middle_worst({0: np.nan, 1: -1., 2: 0.}) == {"best": 2, "middle": 1, "worst": 0}
    assert best_middle_worst({3: .1, 7: .2}) == {"best": 7, "worst": 3}
    assert best_middle_worst({3: .1}) == {"best": 3} and best_middle_worst({}) == {}


@pytest.mark.parametrize(("rewards", "before", "after"), [
    ((.1, .3), "white", pictures.RISES), ((.3, .1), pictures.FALLS, "white"), ((.3, .30001), "white", "white")])
def test_a_frame_marks_the_higher_reward(rewards, before, after):
    grey = Image.new("RGB", (96, 60), "grey")
    picture = pictures.draw_comparison(pictures.Comparison("best of 2", "a red circle", rewards, []), [grey, grey])
    colours = [picture[39, 50].tolist(), picture[39, 108 + 50].tolist()]
    assert colours == [list(Image.new("RGB", (1, 1), name).getpixel((0, 0))) for name in (before, after)]
    assert picture[70, [50, 158]].tolist() == [[128] * 3] * 2  # within the frames


def test_curves_have_a_running_mean_and_no_constant_lines(monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "write_figure", lambda path, figure: figures.append(figure))
    lines = [{"step": step, "reward": step % 4} for step in range(1, 9)]
    for step in (0, 8):
        judged = {"reward_mean": .5 + step, "watermark": .5 - step / 20, "colour": 1., "judge": None if step else .5}
        lines.append({"step": step, "eval": {"set": judged}})
    pictures.draw_curves(lines, "HPStiny", None, ["judge"], 8)
    training, held_out, judge, watched = figures[0].axes
    dots, mean = training.lines
    assert dots.get_ydata().tolist() == [1, 2, 3, 0, 1, 2, 3, 0] and mean.get_label() == "mean of 2 steps"
    assert mean.get_xdata()[0] == 2 and mean.get_ydata().tolist() == [1.5, 2.5, 1.5, .5, 1.5, 2.5, 1.5]
    assert [line.get_label() for line in judge.lines] == ["watermark", "turned"]  # and not colour
    assert "HPStiny" in training.get_title() and "HPStiny" in held_out.get_title() and "judge" in watched.get_title()
    pictures.draw_curves(lines[8:9], "HPStiny", None)  # before the first step
    assert len(figures[1].axes) == 2


def test_tables_fit_a_terminal():
    names = ["watermark", "sharpness", "saturation", "noise", "shape", "direction", "motion", "steadiness"]
    row = {"set": "in_domain", "num_steps": 20, "guidance": 2., "model": "fine-tuned", "differences": {"reward": (.1, .01)},
           "measures": {"reward_mean": .8, "reward_std": .1, "n": 64} | dict.fromkeys(names, .5)}
    text = pictures.evaluation_text([row], "HPStiny")
    assert max(map(len, text.splitlines())) <= 100
    assert all(f" {name} " in text for name in [*names, "HPStiny ± std"]) and "+0.1000 ± 0.0100" in text
