"""Numbers of videos and what people look at: measures of pixels, which videos are shown and how, curves, tables."""
import numpy as np
import pytest
import torch
from PIL import Image

from support import pictures, tables
from support.tables import best_middle_worst
from support.videos import write_video


def test_the_best_the_middle_and_the_worst_gain_are_shown():
    assert best_middle_worst({0: .1, 1: .4, 2: .3, 3: -.2, 4: .4}) == {"best": 1, "middle": 2, "worst": 3}
    assert best_middle_worst({0: np.nan, 1: -1., 2: 0.}) == {"best": 2, "middle": 1, "worst": 0}
    assert best_middle_worst({3: .1, 7: .2}) == {"best": 7, "worst": 3}
    assert best_middle_worst({3: .1}) == {"best": 3} and best_middle_worst({}) == {}


def test_videos_are_chosen_among_those_with_both_clips(tmp_path):
    files = [(tmp_path / f"before{i}.mp4", tmp_path / f"after{i}.mp4") for i in range(3)]
    for file in (*files[0], *files[1], files[2][0]):
        write_video(file, np.zeros((2, 32, 32, 3), np.uint8), 8)
    best, worst = pictures.choose_comparisons(["a", "b", "c"], [(.2, .1), (.2, .5), (.1, .9)], files)
    assert (best.label, best.prompt, best.rewards) == ("best gain of 2", "b", (.2, .5))
    assert (worst.label, worst.prompt, worst.videos[1].shape) == ("worst gain of 2", "a", (2, 256, 256, 3))


@pytest.mark.parametrize(("rewards", "before", "after"), [
    ((.1, .3), "white", pictures.RISES), ((.3, .1), pictures.FALLS, "white"), ((.3, .30001), "white", "white")])
def test_a_frame_marks_the_higher_reward(rewards, before, after):
    videos = [np.full((1, 48, 48, 3), 128, np.uint8)] * 2
    picture = pictures.draw_comparison(pictures.Comparison("best of 2", "a red circle", rewards, videos), lambda video: video[0])
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
    pictures.draw_curves(lines, "HPStiny", None, ["judge"])
    training, held_out, judge, watched = figures[0].axes
    dots, mean = training.lines
    assert dots.get_ydata().tolist() == [1, 2, 3, 0, 1, 2, 3, 0] and mean.get_label() == "mean of 2 steps"
    assert mean.get_xdata()[0] == 2 and mean.get_ydata().tolist() == [1.5, 2.5, 1.5, .5, 1.5, 2.5, 1.5]
    assert [line.get_label() for line in judge.lines] == ["watermark"]  # and not colour
    assert "HPStiny" in training.get_title() and "HPStiny" in held_out.get_title() and "judge" in watched.get_title()
    pictures.draw_curves(lines[8:9], "HPStiny", None)  # before the first step
    assert len(figures[1].axes) == 2
    nothing = {"reward_mean": None, "reward_std": None, "n": 1}  # of a reward that is never finite
    pictures.draw_curves([{"step": 1, "reward": None}, *({"step": i, "eval": {"a": nothing}} for i in (1, 2))], "mine", None)
    assert len(figures) == 2


def test_tables_fit_a_terminal():
    names = ["watermark", "sharpness", "saturation", "noise", "shape", "direction", "motion", "steadiness"]
    row = {"set": "in_domain", "num_steps": 20, "guidance": 2., "model": "fine-tuned", "differences": {"reward": (.1, .01)},
           "measures": {"reward_mean": .8, "reward_std": .1, "n": 64} | dict.fromkeys(names, .5)}
    text = pictures.evaluation_text([row], "HPStiny")
    assert max(map(len, text.splitlines())) <= 100
    assert all(f" {name} " in text for name in [*names, "HPStiny ± std"]) and "+0.1000 ± 0.0100" in text


def measures(*frames):
    """Of one clip of these frames, each (3, H, W) or a grey value."""
    frames = [f if torch.is_tensor(f) else torch.full((3, 8, 8), f) for f in frames]
    of_clip = tables.pixel_measures(torch.stack(frames)[None], tables.PIXELS[:5])
    return {name.removeprefix("pixel_"): value.item() for name, value in of_clip.items()}


def test_measures_of_known_clips():
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(3, 8, 8)
    edge, red = torch.zeros(3, 8, 8), torch.full((3, 8, 8), .1)
    edge[:, :, 4:] = .6
    red[0, :2] = .8
    exact, rough = 1e-6, .01
    for frames, expected, error in (
            ((board, board, board), {"motion": 0, "flicker": 0, "consistency": 1}, exact),
            ((board, 1 - board, board), {"motion": 1, "flicker": 2}, exact),
            ((board, 1 - board, board), {"consistency": -1}, rough),
            ((0., .25, .5), {"motion": .25, "flicker": 0, "consistency": 1}, exact),  # changes, but steadily
            ((board, .5 + .5 * (board - .5)), {"consistency": .8}, rough),            # paler: 2 c / (1 + c^2)
            ((edge, edge), {"sharpness": .6, "saturation": 0}, exact), ((red, red), {"sharpness": 0, "saturation": .7}, exact)):
        found = measures(*frames)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=error)
    values = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    for q in (.9, .99, 1.):  # torch's own are for at most 16 million values
        torch.testing.assert_close(tables.quantile(values, q), values.quantile(q, dim=1))


def test_diversity_is_among_the_videos_of_a_prompt():
    base = torch.rand(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    clips = torch.cat([base, base + .25, base, base + .5])
    rows = [tables.pixel_measures(clip[None], ["diversity"]) for clip in clips]
    for captions, expected in (("abab", [0, .25, 0, .25]), ("aaba", [.375, .25, torch.nan, .375])):
        values = tables.table_of(rows, list(captions))["pixel_diversity"]
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert tables.summary({"reward": values, "pixel_diversity": values})["pixel_diversity"] == pytest.approx(1 / 3)


def test_the_judges_score_is_the_mean_of_six():
    table = {"colour": [1., 0.], "shape": [1., 1.], "direction": [0., 1.], "fidelity": [.9, .5], "watermark": [.1, .3],
             "motion": [.1, .8]}  # motion kept: a quarter, and all of it
    table = {name: torch.tensor(values) for name, values in table.items()}
    for watched in (("hpsv2",), ("judge",)):
        assert "judge" not in table
        tables.add_judge(watched, table, {"motion": torch.tensor([.2, .6])})
    torch.testing.assert_close(table["judge"], torch.tensor([(1 + 1 + 0 + .9 + .9 + .25) / 6, (0 + 1 + 1 + .5 + .7 + 1) / 6]))
