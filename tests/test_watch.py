"""What may be watched, and which adapter a run keeps by it."""
import json
from pathlib import Path

import pytest
import torch
from conftest import metrics, refused, run, same_tensors

import train
from support import run as run_folder, tables

SHORT = ["--device", "cpu", "--frames", "4", "--segments", "2", "--batch-size", "1", "--num-steps", "2", "--tau", "1",
         "--lr", ".01", "--eval-every", "1"]
pytestmark = pytest.mark.usefixtures("aside", "short_clips")


def test_what_names_mean():
    assert tables.pixel_names(("pixels", "judge", "flicker")) == tables.PIXELS[:5]
    assert tables.watched_names(("judge", "diversity", "motion")) == ["pixel_motion", "pixel_diversity", "judge"]


def test_the_judge_is_the_tiny_worlds_alone():
    refused("watch judge: only the tiny world has one", tables.check_watched, ("judge",), {"a": ["x"]}, None)


def test_everything_watched_is_measured(plain):
    """On a real evaluation: 3 videos of 2 prompts, so one prompt has two; in the log and for each video."""
    Path("prompts.txt").write_text("a red circle moving left\na green square moving up\n")
    flags = ["--prompts", "a=prompts.txt", "--watch", "pixels", "--watch", "diversity"]
    assert run(*SHORT, *flags, "--eval-count", 3, "--steps", 1, "--out", "run") == 0
    names = [f"pixel_{name}" for name in tables.PIXELS]
    before, step, after = metrics("run")
    for line in (before, after):  # the tiny world's judge takes all prompts that are of its world
        assert line["eval"]["a"].keys() > {"reward_mean", "reward_std", "n", "watermark", "fidelity", *names}
        assert all(0 < line["eval"]["a"][name] < 1 for name in names)
    assert step.keys() == {"step", "reward", "loss", "grad_norm"}  # a step measures none of them
    table = json.loads(Path("run/samples/step_000001.json").read_text())["a"]
    assert table["pixel_diversity"][1] is None and table["pixel_diversity"][0] == table["pixel_diversity"][2] > 0


def test_the_first_score_that_is_watched_decides_and_else_the_reward():
    names = tables.watched_names(("pixels", "judge"), [])
    assert tables.deciding(names) == "judge" and tables.deciding(["HPSv2.1", *names]) == "HPSv2.1"
    assert tables.deciding(names[:5]) == tables.deciding([]) == "reward"  # of pixels nobody knows the best value


def test_the_best_step_has_the_highest_mean_over_its_sets():
    def evaluation(*values):
        return {f"set {i}": {"reward": torch.tensor([value - .1, value + .1])} for i, value in enumerate(values)}
    by_step = {0: evaluation(.3, .3), 10: evaluation(.9, .2), 20: evaluation(.5, .7), 30: evaluation(.6, .5)}
    assert tables.best_step(by_step, "reward") == 20
    by_step[40] = evaluation(.7, .6)
    assert tables.best_step(by_step, "reward") == 40
    by_step[50] = evaluation(torch.nan, 9.)
    assert tables.best_step(by_step, "reward") == 40
    assert tables.best_step({}, "reward") is None and tables.best_step({50: by_step[50]}, "reward") is None
    same = {step: evaluation(.5) for step in (0, 10, 20)}
    assert tables.best_step(same, "reward") == 0


@pytest.fixture
def scripted(plain, monkeypatch):
    """Evaluations with these numbers at steps 0 to 4: the reward rises, fidelity falls at step 3."""
    fidelity = [.6, .8, .9, .3, .2]
    measure = run_folder.Evaluations.measure
    looked_at = []
    monkeypatch.setattr(run_folder.Evaluations, "measure", lambda self, step: looked_at.append(step) or measure(self, step))

    def scripted_evaluate(base, rewards, prompts, **settings):
        step = looked_at[-1]
        g = torch.Generator().manual_seed(step)
        noise = .01 * torch.randn(len(prompts), generator=g, dtype=torch.float64)
        table = {"reward": .3 + .1 * step + noise, "fidelity": fidelity[step] + noise}
        for name in ("colour", "shape", "direction", "motion", "watermark"):
            table[name] = torch.full((len(prompts),), .5, dtype=torch.float64)
        return table, torch.zeros(len(prompts), 4, 3, 32, 32)
    monkeypatch.setattr(train, "evaluate", scripted_evaluate)


WATCHED = [*SHORT, "--eval-count", 4, "--watch", "judge"]
SAID = "best.safetensors is step {}, where judge is highest, since it is watched"


def test_a_run_keeps_the_adapter_where_what_is_watched_was_highest(scripted, capsys):
    assert run(*WATCHED, "--steps", 4, "--out", "whole") == 0
    assert SAID.format(2) in capsys.readouterr().out

    # From its files alone, a run that is stopped at step 2 decides the same.
    begin = [*WATCHED, "--out", "parts"]
    for steps in (2, 4):
        assert run(*begin, "--steps", steps) == 0
        assert SAID.format(2) in capsys.readouterr().out
        begin = ["--resume", "parts"]
        if steps == 2:
            Path("parts/lora.safetensors").rename("two.safetensors")
    for name in ("parts", "whole"):
        assert same_tensors(f"{name}/best.safetensors", "two.safetensors")
    assert same_tensors("parts/lora.safetensors", "whole/lora.safetensors")
    assert not same_tensors("whole/lora.safetensors", "two.safetensors")

    # Without it, the reward decides, which rises to the end.
    assert run(*SHORT, "--eval-count", 4, "--steps", 1, "--out", "plain") == 0
    assert "best.safetensors" not in capsys.readouterr().out
    assert same_tensors("plain/best.safetensors", "plain/lora.safetensors")
