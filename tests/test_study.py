"""The studies' script runs, compares with the base, shares its runs, and turns its files into tables and curves."""
import json
import sys
from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch

import train
from methods import rwr
from pages import runs as run_report
from support import run as run_folder
from support import tables
from tiny import lab, study, study_methods, study_report, study_tables


@pytest.fixture
def short(short_clips, monkeypatch, tmp_path):
    """Studies of one training step and two videos of four frames, with chains of four steps."""
    monkeypatch.setitem(train.PRESETS, "tiny", train.Config(steps=1, batch_size=1, num_steps=4, frames=4))
    for name in ("evaluate", "generate"):
        def in_short(*args, real=getattr(lab, name), **more):  # noqa: B008
            return real(*args, **more | {"num_steps": 4, "frames": 4})
        monkeypatch.setattr(lab, name, in_short)
    for module in (study, study_report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(name):
        monkeypatch.setattr(sys, "argv", ["study.py", name])
        study.run(study.Config(study=name, count=2, out=tmp_path / "studies"))
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
    runs = study.Config(study="rank").work
    assert {p.name for p in runs.iterdir()} == {"base", "rank-2", "default"}  # rank 4 is what holds by default
    stamp = (runs / "rank-2" / "lora.safetensors").stat().st_mtime_ns
    assert short("rank")["rows"][1] == tuned and (runs / "rank-2" / "lora.safetensors").stat().st_mtime_ns == stamp


def test_tau_is_compared_at_equal_steps_and_at_equal_time(short, monkeypatch):
    monkeypatch.setattr(study, "TAUS", (.3, .6))
    monkeypatch.setattr(study, "step_seconds", lambda configs: [.25 if cfg.tau == .3 else 1. for cfg in configs])
    base, few, longer, default = short("tau")["rows"]
    assert [r["label"] for r in (few, longer, default)] == ["tau = 0.3", "tau = 0.3, equal time: 4 steps", "tau = 0.6"]
    lines = run_folder.read_metrics(study.Config(study="tau").work / "tau-0.3-steps-4" / "metrics.jsonl")
    assert len(lines) == 4


def test_a_steps_time_grows_with_the_chain(short):
    """12 chain steps against 1, the last of each with gradient."""
    tiny = replace(train.PRESETS["tiny"], batch_size=1, num_steps=20)
    few, many = study.step_seconds([replace(tiny, tau=.05), replace(tiny, tau=.6)], repeats=2)
    assert many > 1.3 * few


def test_seeds_are_pooled_with_their_spread_and_an_error_over_prompts(short):
    """Two prompts of two videos each, two training seeds: by hand."""
    bench = lab.Lab(study.Config(study="headline", count=4))
    bench.prompts = {"in_domain": ["a", "a", "b", "b"]}
    tables = {None: [0., 0., 0., 0.], "one": [.1, .3, .1, .3], "two": [.3, .5, .5, .7]}
    bench.table = lambda run, name, num_steps: {"reward": torch.tensor(tables[run], dtype=torch.float64)}
    row = bench.seeds_row("all seeds", ["one", "two"])
    # Means over seeds .2 .4 .3 .5: mean .35, sums of deviations -.1 and .1; seeds gain .2 and .5.
    assert row["differences"]["reward"] == pytest.approx((.35, (2 * .02) ** .5 / 4))
    assert row["spread"]["reward"] == pytest.approx(.3 / 2 ** .5) and row["seeds"] == 2
    assert study_tables.widest_error(row, "reward") == pytest.approx(.15)  # over the seeds, wider than .05
    assert study_tables.widest_error(row | {"spread": None}, "reward") == pytest.approx(.05)


def test_the_sets_of_a_study_have_noise_of_their_own(short, monkeypatch):
    bench, seen = lab.Lab(study.Config(study="headline", count=2)), []
    monkeypatch.setattr(lab, "evaluate", lambda *a, seed, **more: seen.append(seed) or ({"reward": torch.zeros(2)}, None))
    for name in lab.SETS:
        bench.table(None, name)
    assert seen == [2_000_000, 2_000_002, 2_000_004]


def test_a_cut_short_run_is_continued(short, monkeypatch):
    bench = lab.Lab(study.Config(study="rank", count=1))
    real, given = train.main, []
    monkeypatch.setattr(train, "main", lambda argv: given.append(argv) or real(argv))
    run = bench.tune("--rank", "2")
    assert bench.tune("--rank", "2") == run and len(given) == 1
    (run / "done").unlink()
    assert bench.tune("--rank", "2") == run and given[1] == ["--resume", str(run)]


@pytest.mark.parametrize("name", [
    "headline", "chain", "short_chain", "deep_cache", "guidance", "quality", "too_long", "evolution"])
def test_the_other_studies_run(name, short, monkeypatch):
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(study, "RIVAL_SEEDS", (0,))
    monkeypatch.setattr(study, "GUIDANCES", (1., 3.))
    monkeypatch.setattr(study, "CHAINS", (2, 4))
    monkeypatch.setattr(study, "INTERVALS", (1, 2))
    monkeypatch.setattr(study, "SHOWN", 1)
    monkeypatch.setattr(study, "step_seconds",
                        lambda configs, **_: [.5 if cfg.num_steps == 2 else 1 / cfg.cache_interval for cfg in configs])
    monkeypatch.setattr(study, "TOO_LONG", ("--steps", "2"))
    monkeypatch.setattr(study, "WATCH", dict.fromkeys(study.WATCH, ("--eval-every", "2", "--eval-count", "1")))
    monkeypatch.setattr(lab, "evaluate", lambda model, reward, prompts, **settings: (
        {k: torch.rand(len(prompts), dtype=torch.float64) for k in ("reward", *study_tables.MEASURES)}, None))
    write = study.write_clips
    monkeypatch.setattr(study, "write_clips", lambda folder, kind: write(folder, kind, count=2))
    report = short(name)
    if name == "evolution":
        assert iio.imread("docs/evolution.png").shape[2] == 3
        assert len(iio.imread("docs/before_after.gif")) == 4
    elif name == "too_long":
        assert [r["step"] for r in report["rows"]] == [0, 2] and iio.imread("docs/too_long.png").ndim == 3
    else:
        labels = [r["label"] for r in report["rows"]]
        expected = {"headline": 10, "chain": 2, "short_chain": 2 + 3 * 2, "deep_cache": 3, "guidance": 3, "quality": 3}
        assert labels[0] == "base" and len(labels) == expected[name]
    if name == "deep_cache":
        assert labels[1:] == ["N = 1, 100% of the time", "N = 2, 50% of the time"]
        config = study.Config(study=name).work / "cache-interval-2" / "config.json"
        assert json.loads(config.read_text())["cache_interval"] == 2


def test_the_report_replaces_what_stands_between_its_markers(short, tmp_path, monkeypatch):
    monkeypatch.setitem(study.SWEEPS, "rank", {"rank 2": ["--rank", "2"]})
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    short("rank"), short("headline")
    pages = tmp_path / "README.md", tmp_path / "docs" / "any.md", tmp_path / "tiny" / "README.md"
    pages[1].parent.mkdir(exist_ok=True)
    pages[1].write_text("one\n<!-- study rank --><!-- end -->\ntwo\n")
    pages = pages[0], pages[2]
    pages[1].parent.mkdir()
    pages[0].write_text("intro\n<!-- study summary -->\nold\n<!-- end -->\nrest\n")
    pages[1].write_text("before\n<!-- study rank -->\nold\n<!-- end -->\n<!-- study headline --><!-- end -->\nafter\n")
    study_report.write_report(tmp_path / "studies")
    first, second = (page.read_text() for page in pages)
    assert "old" not in first and "| in_domain | 0." in first and "| all | 0." in first and first.endswith("<!-- end -->\nrest\n")
    assert "old" not in second and "| rank 2 | in_domain | 20 | 1.5 |" in second and second.endswith("<!-- end -->\nafter\n")
    assert iio.imread(tmp_path / "docs" / "studies.png").ndim == 3
    third = (tmp_path / "docs" / "any.md").read_text()
    assert third.startswith("one\n") and "| rank 2 |" in third and third.endswith("<!-- end -->\ntwo\n")
    pages[1].write_text("no markers")
    with pytest.raises(ValueError, match="no marker <!-- study headline -->"):
        study_report.write_report(tmp_path / "studies")


def test_methods_are_compared_at_equal_work_run_by_run(short, monkeypatch, tmp_path):
    monkeypatch.setattr(study_methods, "contenders", lambda: {
        "InstructVideo, own videos": (train, {"data": "own-videos"}), "RWR": (rwr, {"videos": 2})})
    monkeypatch.setattr(study_methods, "equal_steps", lambda module, cfg: 2)
    settings = {"GRID": (1e-3, 2e-3), "SEEDS": (0, 1), "LOOKS": 1, "LOOKED_AT": 2, "OWN_VIDEOS": 2,
                "MORE": {"RWR": (4e-3, {"videos": 4})}}
    for name, value in settings.items():
        monkeypatch.setattr(study_methods, name, value)

    def random_table(number):
        return {k: torch.rand(number, dtype=torch.float64) for k in ("reward", "pixel_diversity", *study_tables.MEASURES)}

    def tune(self, *flags, watch, module):
        """A run of two steps, as it would be left behind; its flags are those of the method."""
        train.settings.parse([*flags, *watch], module.PRESETS, "")
        run = self.cfg.work / f"run-{len(runs)}"
        run.mkdir(parents=True)
        lines = [{"step": step, "eval": {"in_domain": tables.summary(random_table(3))}} for step in (0, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "seconds": 1.5}]))
        runs.append((module, flags))
        return run

    runs = []
    monkeypatch.setattr(lab.Lab, "tune", tune)
    monkeypatch.setattr(lab.Lab, "model", lambda self, run, adapter="lora": self.base)
    monkeypatch.setattr(lab, "evaluate", lambda model, reward, prompts, **settings: (random_table(len(prompts)), None))
    report = short("methods")
    files = {file.name: json.loads(file.read_text()) for file in (tmp_path / "studies" / "methods").glob("*.json")}
    assert len(files) == len(runs) == 2 * (2 + 2) + 1 and "rwr-rate-0.001-seed-100.json" in files
    assert runs[-2] == (rwr, ("--videos", "2", "--steps", "2", "--lr", runs[-2][1][5], "--seed", "1"))
    assert runs[-1] == (rwr, ("--videos", "4", "--steps", "8", "--lr", "0.004", "--seed", "0"))  # tried again
    rows = [row for row in report["rows"] if row["label"] == "RWR"]
    assert [row["set"] for row in rows] == ["in_domain", "new", "other", "curve"] and rows[0]["seconds"] == [1.5, 1.5]
    best = max((1e-3, 2e-3), key=lambda rate: files[f"rwr-rate-{rate:g}-seed-100.json"]["curve"][-1]["measures"]["reward_mean"])
    assert rows[0]["rate"] == best and set(files[f"rwr-rate-{best:g}-seed-1.json"]["tables"]) == set(lab.SETS)
    own = files["instructvideo-own-videos-rate-0.001-seed-100.json"]["settings"]["data"]
    assert own.endswith("own-videos") and len(list((tmp_path / "out" / "studies" / "own-videos").glob("*.txt"))) == 2

    # What has a file is not made again, even where no run is left.
    assert [row for row in short("methods")["rows"] if row["label"] == "RWR"] == rows and len(runs) == 9
    shown = run_report.read_study(tmp_path / "studies" / "methods.json")["rows"]  # report.py shows all but the curves
    assert [row["label"] for row in shown[-3:]] == ["RWR, more"] * 3
    table = study_methods.as_table(report)
    assert "| RWR | " in table and "| RWR, more | " in table and len(table.splitlines()) == 2 + 2 + 4
    assert len(study_methods.as_summary(report).splitlines()) == 2 + 2
    study_methods.draw(report, tmp_path / "methods.png")
    assert iio.imread(tmp_path / "methods.png").ndim == 3


def test_every_method_has_about_the_same_work():
    for label, (module, changes) in study_methods.contenders().items():
        cfg = replace(module.PRESETS["tiny"], **changes)
        once, each = study_methods.passes(module, cfg)
        total = once + each * study_methods.equal_steps(module, cfg)
        assert abs(total / (2 * 40 * 112) - 1) < .06, label
