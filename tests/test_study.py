"""The studies of the tiny world: their command lines, a study that is stopped, the rows of several seeds, the pages' tables."""
import importlib
import json
import shlex
import shutil
from dataclasses import replace
from functools import partial

import imageio.v3 as iio
import pytest
import tyro
from conftest import refused

import evaluate
import train
from support.clips import read_list
from tiny import study, world

IN_DOMAIN = f"--prompts in_domain={study.WORK}/in_domain.txt"


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_command_line_is_one_of_its_module(name, aside, tmp_path):
    (tmp_path / "tiny").symlink_to(study.ROOT / "tiny")
    for planned in study.STUDIES[name]:
        study.write_inputs(f"{IN_DOMAIN} {planned['flags of evaluate.py']}")
        evaluate.check(tyro.cli(evaluate.Config, args=shlex.split(planned["flags of evaluate.py"])))
        module = importlib.import_module(planned["module"])
        cfg = tyro.cli(type(module.PRESETS["tiny"]), args=shlex.split(planned["flags"]), default=module.PRESETS["tiny"])
        module.check(replace(cfg, data=None))
        seeds = planned["seeds"].split()
        assert len(set(seeds)) == len(seeds) > 0 and (cfg.data is None or cfg.data.parent == study.WORK)
        assert name != "methods" or cfg.steps % cfg.eval_every == 0  # else nothing chooses the best checkpoint


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_and_repeats_nothing(few_clips, aside, tmp_path, monkeypatch):
    def planned(label, seeds):
        return {"label": label, "module": "train", "seeds": seeds, "flags of evaluate.py": f"{IN_DOMAIN} --count 2 --num-steps 2",
                "flags": "--steps 2 --batch-size 1 --num-steps 2 --tau 1 --save-every 1"}

    def times():
        return {path: path.stat().st_mtime_ns for path in study.WORK.rglob("*") if path.is_file()}

    def stop_in_the_last_step(*args, edit_rewards=train.edit_rewards):
        if len(list(study.WORK.glob("train*/state.pt"))) == 2:  # the second run has saved its first step
            raise KeyboardInterrupt
        return edit_rewards(*args)

    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setitem(study.STUDIES, "short", [planned("two seeds", "0 1"), planned("one", "1")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # the run said how to go on
        patch.setattr(train, "edit_rewards", stop_in_the_last_step)
        study.run_study("short")
    before = times()
    study.run_study("short")
    first, second = sorted(study.WORK.glob("train*"))
    assert {path.parents[1].name for path in study.WORK.rglob("table.json")} == {"evaluated"}  # never where an adapter lies
    after = times()
    assert all(after[path] == time for path, time in before.items() if first in path.parents)
    assert [json.loads(line)["step"] for line in (second / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    study.run_study("short")
    assert times() == after != before

    report = json.loads((tmp_path / "short.json").read_text())
    base, tuned, alone = report["rows"]
    assert [row["label"] for row in report["rows"]] == ["base", "two seeds", "one"] and report["reward"] == "HPStiny"
    gain = tuned["measures"]["reward_mean"] - base["measures"]["reward_mean"]
    assert tuned["differences"]["reward"][0] == pytest.approx(gain) and tuned["seeds"] == 2 and alone["seeds"] == 1


def test_seeds_are_pooled_with_their_spread_and_the_wider_error_is_shown():
    rows = [{"set": "a", "measures": {"reward_mean": 0.5 + gain, "n": 4}, "differences": {"reward": (gain, error)}}
            for gain, error in ((0.2, 0.04), (0.5, 0.06))]
    pooled = study.over_seeds("both", rows)
    assert pooled["differences"]["reward"] == pytest.approx((0.35, 0.05)) and pooled["label"] == "both"
    assert pooled["measures"] == pytest.approx({"reward_mean": 0.85, "n": 4}) and pooled["seeds"] == 2
    assert pooled["spread"]["reward"] == pytest.approx(0.3 / 2 ** 0.5)
    shown, = study.read_rows({"rows": [pooled]})
    assert study.filled(study.SUMMARY["HPStiny"], shown) == "0.50 → 0.85 (+0.350 ± 0.150)"  # over seeds it is wider than 0.05
    assert study.filled("{measures[n]:.0f} ± {spread[n]:.2f}", shown) == "4" and study.filled("{missing:d}", shown) == ""


def test_the_pages_have_the_tables_that_the_files_give(tmp_path, monkeypatch):
    shutil.copytree(study.ROOT / "docs", tmp_path / "docs")
    shutil.copytree(study.RESULTS, tmp_path / "studies")
    shutil.copy(study.ROOT / "README.md", tmp_path)
    before = {page: page.read_text() for page in tmp_path.glob("**/*.md")}
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "studies")
    study.write_report()
    assert {page: page.read_text() for page in before} == before
    assert all(iio.imread(study.ROOT / "docs" / f"{name}.png").ndim == 3 for name in study.PICTURES)
    shutil.copy(study.RESULTS / "rank.json", study.RESULTS / "nowhere.json")
    refused("no page has the marker <!-- study nowhere -->", study.write_report)


def test_the_clips_that_studies_read_are_written_once(aside, monkeypatch):
    scene = world.scenes("in_domain")[0]
    monkeypatch.setattr(world, "scenes", lambda name: [scene])
    monkeypatch.setattr(study, "generate", partial(study.generate, num_steps=2))
    for name in ("clips-flawed", "clips-clean", "own-videos", "own-videos"):
        study.write_inputs(f"--data {study.WORK}/{name} --steps 3")
        assert [clip.caption for clip in read_list(study.WORK / name)] == [scene.caption] * 2
    assert len({path.read_bytes() for path in study.WORK.glob("*/*.mp4")}) == 5  # one of the flawed has none, by chance
