"""The studies' script runs, compares with the base, shares its runs, and turns its files into tables and curves."""
import json
import sys

import imageio.v3 as iio
import pytest
import torch

import train
from support import run_folder
from tiny import study


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Studies of one training step and two videos."""
    monkeypatch.setitem(train.PRESETS, "tiny", train.Config(steps=1, batch_size=1))
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(name):
        monkeypatch.setattr(sys, "argv", ["study.py", name])
        study.run(study.Config(name, count=2, out=tmp_path / "studies"))
        file = tmp_path / "studies" / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None
    return run


def test_a_sweep_compares_each_variant_with_the_base(short, monkeypatch):
    monkeypatch.setitem(study.SWEEPS, "rank", {"rank 2": ["--rank", "2"], "rank 4": ["--rank", "4"]})
    report = short("rank")
    base, tuned, default = report["rows"]
    assert base["label"] == "base" and tuned["label"] == "rank 2" and tuned["set"] == "in_domain"
    gain, error = tuned["differences"]["reward"]
    assert gain == pytest.approx(tuned["measures"]["reward_mean"] - base["measures"]["reward_mean"]) and error > 0
    assert report["command"] == "python tiny/study.py rank" and report["training"]["tau"] == 0.6
    runs = study.Config("rank").work
    assert {p.name for p in runs.iterdir()} == {"base", "rank-2", "default"}  # rank 4 is what holds by default
    stamp = (runs / "rank-2" / "lora.safetensors").stat().st_mtime_ns
    assert short("rank")["rows"][1] == tuned and (runs / "rank-2" / "lora.safetensors").stat().st_mtime_ns == stamp


def test_tau_is_compared_at_equal_steps_and_at_equal_time(short, monkeypatch):
    monkeypatch.setattr(study, "TAUS", (.1, .6))
    monkeypatch.setattr(study, "seconds_per_step", lambda run: .25 if "0.1" in run.name else 1.)
    base, few, longer, default = short("tau")["rows"]
    assert [r["label"] for r in (few, longer, default)] == ["tau = 0.1", "tau = 0.1, equal time: 4 steps", "tau = 0.6"]
    assert few["seconds_per_step"] == .25
    lines = run_folder.read_metrics(study.Config("tau").work / "tau-0.1-steps-4" / "metrics.jsonl")
    assert len(lines) == 4


def test_seeds_are_pooled_before_they_are_compared():
    one, two = ({"reward": torch.tensor(v)} for v in ([1., 2.], [3., 6.]))
    assert study.pool([one, two])["reward"].tolist() == [2., 4.]
    assert study.join([one, two])["reward"].tolist() == [1., 2., 3., 6.]


def test_a_cut_short_run_is_continued(short, monkeypatch):
    lab = study.Lab(study.Config("rank", count=1))
    real, given = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: given.append(argv) or real(argv))
    run = lab.tune("--rank", "2")
    assert lab.tune("--rank", "2") == run and len(given) == 1
    (run / "done").unlink()
    assert lab.tune("--rank", "2") == run and given[1] == ["--resume", str(run)]


@pytest.mark.parametrize("name", ["headline", "chain", "guidance", "quality", "too_long", "evolution"])
def test_the_other_studies_run(name, short, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "GUIDANCES", (1., 3.))
    monkeypatch.setattr(study, "TOO_LONG", ("--steps", "2"))
    monkeypatch.setattr(study, "WATCH", dict.fromkeys(study.WATCH, ("--eval-every", "2", "--eval-count", "1")))
    monkeypatch.setattr(study, "evaluate", lambda model, reward, prompts, **settings: (
        {k: torch.rand(len(prompts), dtype=torch.float64) for k in ("reward", *study.MEASURES)}, None))
    write = study.write_clips
    monkeypatch.setattr(study, "write_clips", lambda folder, kind: write(folder, kind, count=2))
    report = short(name)
    if name == "evolution":
        assert iio.imread("docs/evolution.png").shape[2] == 3
    elif name == "too_long":
        assert [r["step"] for r in report["rows"]] == [0, 2] and iio.imread("docs/too_long.png").ndim == 3
    else:
        labels = [r["label"] for r in report["rows"]]
        assert labels[0] == "base" and len(labels) == {"headline": 10, "chain": 2, "guidance": 3, "quality": 3}[name]


def test_the_report_replaces_what_stands_between_its_markers(short, tmp_path, monkeypatch):
    monkeypatch.setitem(study.SWEEPS, "rank", {"rank 2": ["--rank", "2"]})
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    short("rank"), short("headline")
    pages = tmp_path / "README.md", tmp_path / "tiny" / "README.md"
    pages[1].parent.mkdir()
    pages[0].write_text("intro\n<!-- study summary -->\nold\n<!-- end -->\nrest\n")
    pages[1].write_text("before\n<!-- study rank -->\nold\n<!-- end -->\n<!-- study headline --><!-- end -->\nafter\n")
    study.write_report(study.Config("report", out=tmp_path / "studies"))
    first, second = (page.read_text() for page in pages)
    assert "old" not in first and "| in_domain | 0." in first and "| all | 0." in first and first.endswith("<!-- end -->\nrest\n")
    assert "old" not in second and "| rank 2 | in_domain | 20 | 1.5 |" in second and second.endswith("<!-- end -->\nafter\n")
    assert iio.imread(tmp_path / "docs" / "studies.png").ndim == 3
    pages[1].write_text("no markers")
    with pytest.raises(ValueError, match="no marker <!-- study headline -->"):
        study.write_report(study.Config("report", out=tmp_path / "studies"))
