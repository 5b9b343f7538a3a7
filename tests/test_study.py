"""The studies' script runs, compares with the base, and turns its files into the README's tables."""
import json
import sys

import pytest

from tiny import study


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Studies of one training step and one video."""
    def run(name, sweep):
        monkeypatch.setattr(sys, "argv", ["study.py", name])
        monkeypatch.setitem(study.SWEEPS, name, {k: [*v, "--steps", "1", "--batch-size", "1"] for k, v in sweep.items()})
        study.run(study.Config(name, count=1, out=tmp_path))
        return json.loads((tmp_path / f"{name}.json").read_text())
    return run


def test_a_sweep_compares_each_variant_with_the_base(short):
    report = short("rank", {"rank 2": ["--rank", "2"]})
    base, tuned = report["rows"]
    assert base["label"] == "base" and tuned["label"] == "rank 2" and tuned["set"] == "in_domain"
    gain, error = tuned["differences"]["reward"]
    assert gain == pytest.approx(tuned["measures"]["reward_mean"] - base["measures"]["reward_mean"]) and error == 0
    assert report["command"] == "python tiny/study.py rank" and report["training"]["tau"] == 0.6


def test_clips_of_two_qualities_are_written(tmp_path):
    flags = study.write_clips(tmp_path / "clean", "clean", count=2)
    assert flags == ["--data", str(tmp_path / "clean"), "--no-cache"]
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == ["0000.mp4", "0000.txt", "0001.mp4", "0001.txt"]


def test_the_report_replaces_what_stands_between_its_markers(short, tmp_path, monkeypatch):
    short("rank", {"rank 2": ["--rank", "2"]})
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- study rank -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    study.write_report(study.Config("report", out=tmp_path))
    text = readme.read_text()
    assert "old" not in text and "| rank 2 | in_domain | 20 | 3 |" in text and text.endswith("<!-- end -->\nafter\n")
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="no marker <!-- study rank -->"):
        study.write_report(study.Config("report", out=tmp_path))
