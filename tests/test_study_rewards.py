"""The study of other rewards: every run is measured by what watches it, and the file becomes a table and a picture."""
import json

import imageio.v3 as iio
import pytest
import torch

import train
from methods import draft
from tiny import study_rewards, world
from tiny.lab import Lab, Settings

SHORT = ["--steps", "1", "--batch-size", "1", "--num-steps", "2", "--grad-steps", "2"]


def test_every_run_is_measured_by_the_judge_and_by_what_watches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    mixed = ["--reward", "hpsv2", "--reward", "action:left=0.1"]
    monkeypatch.setattr(study_rewards, "groups", lambda: {"mixed": (draft, [*mixed, *SHORT], (4,))})
    lab = Lab(Settings(count=1, work=tmp_path / "work"))
    base, tuned = study_rewards.rewards(lab)
    assert (base["group"], tuned["group"], tuned["seed"], tuned["label"]) == ("base", "mixed", 4, "mixed, seed 4")
    for row in (base, tuned):
        assert row["measures"].keys() >= study_rewards.COLUMNS.keys() and row["measures"]["left"] in (0, 1)
    assert tuned["differences"].keys() >= {"reward", "action:left", "removal:watermark", "left", "watermark"}
    config = json.loads(next((tmp_path / "work" / "rewards").glob("*/config.json")).read_text())
    assert config["reward"] == ["hpsv2", "action:left=0.1"] and config["seed"] == 4
    assert lab.reward.name == "HPStiny" and lab.cfg.work == tmp_path / "work"  # the caller's is as it was


def test_the_share_of_left_is_the_judges_own_word(tmp_path):
    lab = Lab(Settings(count=1, work=tmp_path))
    clips = torch.stack([world.make_clip(world.Scene("red", "square", d), 5, {})[0] for d in ("left", "right", "up")])
    said = study_rewards.watched(lab).judge(clips, ["a red square moving right"] * 3)
    assert said["left"].tolist() == [1, 0, 0] and said["direction"].tolist() == [0, 1, 0]


def test_seeds_are_one_line_of_the_table_and_dots_of_the_picture(tmp_path):
    def row(group, value):
        return {"group": group, "measures": dict.fromkeys(study_rewards.COLUMNS, value) | {"n": 7}}
    report = {"command": "python x", "rows": [row("base", .25), row("action:left", .8), row("action:left", .9)]}
    lines = study_rewards.as_table(report).splitlines()
    assert "7 videos" in lines[0] and lines[2].count("|") == lines[3].count("|") == lines[4].count("|")
    assert lines[4].startswith("| base | 0.250 | ") and lines[5].startswith("| action:left | 0.850 ± 0.071 | ")
    study_rewards.draw(report, tmp_path / "a.png")
    assert iio.imread(tmp_path / "a.png").shape[2] >= 3


@pytest.mark.parametrize("name", study_rewards.groups())
def test_every_groups_flags_are_its_scripts(name):
    module, flags, _ = study_rewards.groups()[name]
    cfg = train.settings.parse(["tiny", *flags, "--seed", "0"], module.PRESETS, "")
    module.check(cfg)
    kinds = [reward.partition("=") for reward in cfg.reward or ("hpsv2",)]
    assert name == " + ".join(f"{weight} {kind}" if weight else kind.replace("hpsv2", "HPS") for kind, _, weight in kinds)
