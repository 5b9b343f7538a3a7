"""Progress bars: on a terminal one line that redraws itself, in a log or a notebook a line now and then."""
import io
import re

import pytest

from support import ranks
from support.ranks import progress


@pytest.fixture
def shown(monkeypatch):
    """What a job of 200 steps, with a part of 20 steps inside, writes where; a clock that moves by a second a step."""
    def run(is_terminal, seconds=1., leave=True):
        now = [1000.]
        monkeypatch.setattr("tqdm.std.time", lambda: now[0])
        screen = io.StringIO()
        screen.isatty = lambda: is_terminal
        monkeypatch.setattr("sys.stderr", screen)
        bar = progress(range(200), "fine-tuning", 200, leave=leave)
        for step in bar:
            now[0] += seconds
            bar.set_postfix_str(f"HPS {step / 1000:.3f}", refresh=False)
            if step == 99:
                with progress(None, "evaluating", 20, unit="videos", leave=False) as inner:
                    for _ in range(20):
                        now[0] += seconds
                        inner.update()
        return screen.getvalue()
    return run


def test_a_log_has_a_line_now_and_then_that_says_what_how_far_the_reward_and_the_time_left(shown):
    text = shown(False)
    lines = text.splitlines()
    assert not re.search(r"[\r\x1b]", text) and len(lines) == len(set(lines))
    # A line at the start, one for each 30 of 220 seconds, one at the end; the part of 20 seconds has none.
    assert 7 <= len(lines) <= 10 and not any("evaluating" in line for line in lines)
    assert lines[0] == "fine-tuning: 0/200 steps, 00:00 gone, ? left"
    assert lines[1] == "fine-tuning: 30/200 steps, 00:30 gone, 02:50 left, HPS 0.029"
    assert lines[-1] == "fine-tuning: 200/200 steps, 03:40 gone, 00:00 left, HPS 0.199"
    assert shown(False, seconds=.01).count("\n") == 2 and shown(False, seconds=.01, leave=False) == ""  # of a short job


def test_a_terminal_has_a_bar_that_redraws_itself(shown):
    text = shown(True)
    assert text.count("\r") > 150 and text.count("\n") - text.count("\x1b[A") == 1  # inside, tqdm goes down and up again
    assert "fine-tuning: 100%" in text and "HPS 0.199" in text and "evaluating:  50%" in text


def test_with_several_ranks_a_bar_shows_the_work_of_all(monkeypatch):
    """Three videos on two ranks: rank 0 makes two of them, and its second one ends the work of both."""
    monkeypatch.setattr(ranks, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr("sys.stderr", screen := io.StringIO())
    with progress(None, "generating", 3, unit="videos", shared=True) as bar:
        shown = []
        for _ in range(2):
            bar.update()
            shown.append(bar.n)
    assert shown == [2, 3] and screen.getvalue().splitlines()[-1].startswith("generating: 3/3 videos, ")
    assert list(progress(range(3), "hidden", disable=True)) == [0, 1, 2] and "hidden" not in screen.getvalue()
