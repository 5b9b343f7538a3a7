"""The studies of the tiny world: their command lines, a study that is stopped, the rows of several seeds, the pages' tables."""
import importlib
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch
import tyro

import evaluate
import train
from support.clips import read_list
from support.tables import over_seeds
from tiny import judge, study, world

SHORT = "--steps 2 --batch-size 1 --num-steps 2 --tau 1 --save-every 1"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Copies of the pages and of the studies' files, to write to."""
    shutil.copytree(study.ROOT / "docs", tmp_path / "docs")
    shutil.copytree(study.RESULTS, tmp_path / "tiny" / "studies")
    for page in ("README.md", "tiny/README.md"):
        shutil.copy(study.ROOT / page, tmp_path / page)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "tiny" / "studies")
    return sorted(tmp_path.glob("**/*.md"))


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_command_line_is_one_of_its_module(name, aside, tmp_path):
    (tmp_path / "tiny").symlink_to(study.ROOT / "tiny")
    study.write_inputs(study.IN_DOMAIN)
    evaluate.check(tyro.cli(evaluate.Config, args=shlex.split(study.MEASURED.get(name, study.IN_DOMAIN))))
    for module_name, flags, seeds in study.STUDIES[name].values():
        module = importlib.import_module(module_name)
        cfg = tyro.cli(type(module.PRESETS["tiny"]), args=shlex.split(flags), default=module.PRESETS["tiny"])
        module.check(replace(cfg, data=None))
        assert len(set(seeds)) == len(seeds) > 0 and (cfg.data is None or cfg.data.parent == study.WORK)
        assert name not in ("methods", "guard") or cfg.steps % cfg.eval_every == 0  # else nothing chooses the best checkpoint


def test_a_study_that_is_stopped_goes_on_and_repeats_nothing(few_clips, aside, tmp_path, monkeypatch):
    """Two runs of two steps; the second is stopped after its first step."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setitem(study.STUDIES, "short", {"two seeds": ("train", SHORT, (0, 1)), "one": ("train", SHORT, (1,))})
    monkeypatch.setitem(study.MEASURED, "short", f"{study.IN_DOMAIN} --count 2 --num-steps 2")
    steps = []

    def stop_at_the_last_step(*args, edit_rewards=train.edit_rewards):
        steps.append(args)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return edit_rewards(*args)

    monkeypatch.setattr(train, "edit_rewards", stop_at_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        study.run_study("short")
    study.run_study("short")
    _, second = sorted(study.WORK.glob("train*"))
    assert len(steps) == 5 and len((second / "metrics.jsonl").read_text().splitlines()) == 2
    written = {path: path.stat().st_mtime_ns for path in study.WORK.rglob("*")}
    study.run_study("short")
    assert len(steps) == 5 and {path: path.stat().st_mtime_ns for path in study.WORK.rglob("*")} == written
    report = json.loads((tmp_path / "short.json").read_text())
    base, tuned, alone = report["rows"]
    assert [row["label"] for row in report["rows"]] == ["base", "two seeds", "one"] and report["reward"] == "HPStiny"
    gain = tuned["measures"]["reward_mean"] - base["measures"]["reward_mean"]
    assert tuned["differences"]["reward"][0] == pytest.approx(gain) and tuned["seeds"] == 2 and alone["seeds"] == 1


def test_seeds_are_pooled_with_their_spread_and_the_wider_error_is_shown():
    def row(gain, error):
        return {"set": "a", "measures": {"reward_mean": 0.5 + gain, "n": 4}, "differences": {"reward": (gain, error)}}

    pooled = over_seeds("both", [row(0.2, 0.04), row(0.5, 0.06)])
    assert pooled["differences"]["reward"] == pytest.approx((0.35, 0.05)) and pooled["label"] == "both"
    assert pooled["measures"] == pytest.approx({"reward_mean": 0.85, "n": 4}) and pooled["seeds"] == 2
    assert pooled["spread"]["reward"] == pytest.approx(0.3 / 2 ** 0.5)
    shown, = study.read_rows({"rows": [pooled | {"base_std": 0.7}]})
    assert study.filled(study.SUMMARY["HPStiny"], shown) == "0.50 → 0.85 (+0.350 ± 0.150)"  # over seeds it is wider than 0.05
    assert study.filled(study.SUMMARY["gain in base std"], shown) == "0.50"
    assert study.filled("{measures[n]:.0f} ± {spread[n]:.2f}", shown) == "4" and study.filled("{turned:d}", shown) == ""


def test_the_pages_have_the_tables_that_the_files_give(pages):
    before = [page.read_text() for page in pages]
    study.write_report()
    assert [page.read_text() for page in pages] == before
    assert all(iio.imread(study.ROOT / "docs" / f"{name}.png").ndim == 3 for name in study.PICTURES)
    shutil.copy(study.RESULTS / "rank.json", study.RESULTS / "nowhere.json")
    with pytest.raises(ValueError, match="no page has the marker <!-- study nowhere -->"):
        study.write_report()


def test_the_clips_that_studies_read_are_written_once(aside, monkeypatch):
    scene = world.scenes("in_domain")[0]
    monkeypatch.setattr(world, "scenes", lambda name: [scene])
    for name in ("clips-flawed", "clips-clean", "own-videos", "own-videos"):
        study.write_inputs(f"--data {study.WORK}/{name} --steps 3")
        assert [clip.caption for clip in read_list(study.WORK / name)] == [scene.caption] * 2
    assert len({path.read_bytes() for path in study.WORK.glob("*/*.mp4")}) == 5  # one of the flawed has none, by chance


def test_the_share_of_left_is_the_judges_own_word():
    moving = torch.stack([world.make_clip(world.Scene("red", "square", way), 5, {})[0] for way in ("left", "right", "up")])
    assert judge.left(moving, ["a red square moving right"] * 3).tolist() == [[1], [0], [0]]


@pytest.mark.parametrize("name", ["study", "build"])
def test_started_as_a_file_it_names_the_new_form(name):
    ended = subprocess.run([sys.executable, study.ROOT / "tiny" / f"{name}.py"], capture_output=True, text=True)
    assert ended.returncode == 2 and f"python -m tiny.{name}" in ended.stderr and ended.stderr.count("\n") == 1
