"""The study of the guard: what each rule keeps of a run, and that a real run has all it needs."""
import contextlib
import io
import json
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import train
from model import load_base
from support import run as run_folder
from tiny import clips, study_guard


def test_what_each_rule_keeps():
    """The reward rises to the end; the judge falls after step 20, pixels after step 40."""
    prompts = {"a": [f"prompt {i}" for i in range(8)], "b": [f"other {i}" for i in range(8)]}
    rewards, tables = {0: .3, 20: .4, 40: .5, 60: .6, 80: .7}, {}
    for step, judge, motion in zip(rewards, (.8, .9, .7, .6, .5), (.2, .2, .15, .01, .01)):
        g = torch.Generator().manual_seed(step)
        noise = .001 * torch.randn(8, generator=g, dtype=torch.float64)
        table = {"reward": rewards[step] + noise, "judge": judge + noise, "pixel_motion": motion + noise}
        for name in ("flicker", "consistency", "sharpness", "saturation"):
            table[f"pixel_{name}"] = .5 + noise
        tables[step] = {name: table for name in prompts}
    rows = study_guard.choices(tables, rewards, prompts)
    assert [(row["rule"], row["step"], row["turned"]) for row in rows] == [
        ("best judge score", 20, None), ("highest reward", 80, None), ("guard, judge watched", 20, 40),
        ("guard, pixels watched", 40, 60)]
    assert [row["of_best_judge"] for row in rows] == pytest.approx([1, 5 / 9, 1, 7 / 9], abs=.01)
    assert rows[3]["measures"]["judge"] == pytest.approx(.7, abs=.01) and rows[3]["measures"]["n"] == 16
    difference, error = rows[3]["differences"]["reward"]
    assert difference == pytest.approx(.2, abs=.01) and 0 < error < .001


def test_on_a_real_run_of_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clips, "tiny_clips", partial(clips.tiny_clips, count=2))
    for writer in ("write_video", "write_comparison_gif", "draw_curves"):
        monkeypatch.setattr(run_folder, writer, lambda *args: None)
    monkeypatch.setattr(run_folder, "read_video", lambda path: None)

    class Lab:
        base, guidance = load_base("tiny"), 1.5

        def tune(self, *flags, watch=()):
            flags = [*flags, *watch, "--device", "cpu", "--batch-size", "1", "--num-steps", "2", "--tau", "1", "--out", "run"]
            with contextlib.redirect_stdout(io.StringIO()):
                assert train.main(flags) == 0
            return Path("run")
    monkeypatch.setattr(study_guard, "SEEDS", (5,))
    monkeypatch.setattr(study_guard, "COUNT", 1)
    monkeypatch.setattr(study_guard, "CHEATING", ("--steps", "1"))
    monkeypatch.setattr(study_guard, "WATCH", ("--eval-every", "1", "--eval-count", "1", *study_guard.WATCH[4:]))
    rows = study_guard.guard(Lab())
    assert [row["label"] for row in rows] == [f"seed 5, {rule}" for rule in ("best judge score", *study_guard.RULES)]
    assert all(.9 < row["of_best_judge"] <= 1 and row["measures"]["n"] == 3 and row["step"] in (0, 1) for row in rows)
    assert capsys.readouterr().out.count("of the best") == 4
    report = json.loads(json.dumps({"rows": rows, "reward": "HPStiny", "command": "a command", "versions": {"torch": "2"}}))
    table = study_guard.as_table(report)
    assert len({line.count("|") for line in table.splitlines()[2:]}) == 1  # as many cells in every row
    assert len(table.splitlines()) == 4 + 4 and f"| seed 5, highest reward | {rows[1]['step']} |" in table
    study_guard.draw(report, tmp_path / "guard.png")
    assert iio.imread(tmp_path / "guard.png").ndim == 3 and len(rows[0]["curve"]) == 2
