"""What may be watched, the guard's verdict on it, and what a run makes of that."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import metrics, refused, run, same_tensors

import train
from formats.reward_names import requested_rewards
from support import run as run_folder, tables

SHORT = ["--device", "cpu", "--frames", "4", "--segments", "2", "--batch-size", "1", "--num-steps", "2", "--tau", "1",
         "--lr", ".01", "--eval-every", "1"]
pytestmark = pytest.mark.usefixtures("aside", "short_clips")


def test_what_names_mean():
    assert tables.pixel_names(("pixels", "judge", "flicker")) == tables.PIXELS[:5]
    assert tables.watched_names(("judge", "diversity", "motion")) == ["pixel_motion", "pixel_diversity", "judge"]
    assert list(tables.LIMITS) == tables.watched_names(tables.PIXELS)  # the guard has a limit for each


@pytest.mark.parametrize(("check", "message"), [
    (lambda: requested_rewards(train.Config(reward=("motion",))), "reward 'motion': must be one of hpsv2"),  # never optimised
    (lambda: train.check(train.Config(early_stop=True)), "early_stop: needs --watch"),
    (lambda: train.check(train.Config(early_stop=True, watch=("motion",), eval_every=0)), "needs --watch, and evaluations"),
    (lambda: tables.check_watched(("diversity",), {"a": ["x", "y"]}, None), "watch diversity: needs several videos of a prompt"),
    (lambda: tables.check_watched(("judge",), {"a": ["x"]}, None), "watch judge: only the tiny world has one")])
def test_what_cannot_be_watched_is_refused_in_a_line(check, message):
    refused(message, check)


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


N = 24
PROMPTS = {"one": [f"prompt {i}" for i in range(N // 2)], "two": [f"other {i}" for i in range(N // 2)]}
UP = [.3, .4, .5, .6, .7]


def tables_of(spread=.02, **means):
    """Tables of evaluations at steps 0, 10, ...: measures with these means at each, and noise of their own in each video."""
    g = torch.Generator().manual_seed(0)
    by_step = {}
    for i in range(len(means["reward"])):
        values = {k: v[i] + spread * torch.randn(N, generator=g, dtype=torch.float64) for k, v in means.items()}
        by_step[10 * i] = {"one": {k: v[:N // 2] for k, v in values.items()}, "two": {k: v[N // 2:] for k, v in values.items()}}
    return by_step


def turn_step(by_step, name="judge", prompts=PROMPTS):
    turn = tables.find_turn(by_step, prompts, [name])
    return turn and turn.step


def test_a_score_turns_when_it_is_below_its_best():
    by_step = tables_of(reward=UP, judge=[.7, .8, .9, .8, .6])
    turn = tables.find_turn(by_step, PROMPTS, ["judge"])
    [(name, since, (difference, error))] = turn.measures
    assert (turn.step, name, since) == (30, "judge", 20) and difference == pytest.approx(-.1, abs=4 * error) and error < .01
    assert turn.reward[0] == pytest.approx(.3, abs=.03)
    number = r"0\.\d{4} ± 0\.\d{4}"
    assert re.fullmatch(rf"turned at step 30: judge -{number} since step 20, while HPS was \+{number}", turn.words("HPS"))
    # What comes later does not change it, and without what is watched there is nothing to see.
    assert tables.find_turn({s: t for s, t in by_step.items() if s <= 30}, PROMPTS, ["judge"]) == turn
    assert turn_step({s: t for s, t in by_step.items() if s <= 20}) is None and turn_step({}) is None
    assert tables.find_turn(by_step, PROMPTS, []) is None


def test_no_verdict_within_the_error_nor_where_the_reward_does_not_rise():
    means = {"reward": UP, "judge": [.7, .8, .9, .87, .87]}
    assert turn_step(tables_of(**means)) == 30 and turn_step(tables_of(spread=.2, **means)) is None
    assert turn_step(tables_of(reward=UP[::-1], judge=UP[::-1])) is None
    assert turn_step(tables_of(spread=.05, reward=[.3] * 5, judge=UP[::-1])) is None

    # Videos of one prompt are no independent evidence.
    by_step = tables_of(reward=[.3, .5], judge=[.7, .67])
    for table in by_step.values():
        for of_set in table.values():  # all videos of a prompt move together: its noise no longer averages out
            of_set["judge"] = of_set["judge"][:2].repeat_interleave(6)
    few = {name: [f"{name} {i // 6}" for i in range(N // 2)] for name in PROMPTS}
    assert turn_step(by_step) == 10 and turn_step(by_step, prompts=few) is None
    assert turn_step(tables_of(reward=UP, judge=UP[::-1]), prompts={name: ["same"] * 12 for name in PROMPTS}) is None


@pytest.mark.parametrize(("name", "means", "step"), [
    ("motion", [.1, .3, .1, .06, .04], 40),       # against the first value, not the best: nobody knows which is
    ("motion", [.1, .2, .3, .4, .5], None),
    ("flicker", [.1, .12, .14, .16, .2], 30), ("flicker", [.1, .05, .01, .01, .01], None),
    ("consistency", [.9, .85, .82, .79, .7], 30), ("diversity", [.2, .15, .12, .08, .1], 30),
    ("saturation", [.4, .5, .58, .65, .7], 30), ("saturation", [.4, .3, .24, .15, .1], 30),
    ("sharpness", [.4, .5, .55, .5, .4], None)])
def test_measures_of_pixels_have_a_direction_and_a_limit(name, means, step):
    turn = tables.find_turn(tables_of(spread=.005, reward=UP, **{f"pixel_{name}": means}), PROMPTS, [f"pixel_{name}"])
    assert (turn and turn.step) == step and (turn is None or turn.measures[0][1] == 0)


def test_videos_whose_measure_is_not_known_are_left_out():
    by_step = tables_of(reward=UP, pixel_diversity=[.2, .2, .05, .05, .05])
    for set_name, step in (("one", 20), ("two", None)):  # a set none of whose prompts comes twice, then both
        for table in by_step.values():
            table[set_name]["pixel_diversity"][:] = torch.nan
        assert turn_step(by_step, "pixel_diversity") == step


def test_the_best_step_is_the_highest_reward_before_the_turn():
    rewards = {0: .3, 10: .5, 20: .4, 30: .6, 40: .6}
    assert tables.best_step(rewards, None) == 30 and tables.best_step(rewards, tables.Turn(30, [], (.3, .1))) == 10
    assert tables.best_step({0: -torch.inf, 10: .1}, None) == 10 and tables.best_step({0: -torch.inf}, None) is None


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
SAID = "turned at step 3: judge -0."


def test_the_guard_keeps_the_adapter_before_the_turn_and_ends_the_run(scripted, capsys):
    assert run(*WATCHED, "--steps", 4, "--out", "whole") == 0
    said = capsys.readouterr().out
    assert said.count(SAID) == 2 and "best.safetensors is step 2" in said  # when it is seen, and at the end
    assert "ended early" not in said

    # From its files alone, a run that is stopped at steps 2 and 3 decides the same.
    begin = [*WATCHED, "--out", "parts"]
    for steps, times in ((2, 0), (3, 2), (4, 1)):
        assert run(*begin, "--steps", steps) == 0
        said = capsys.readouterr().out
        assert said.count(SAID) == times and ("guard: nothing that is watched has turned" in said) == (times == 0)
        begin = ["--resume", "parts"]
        if steps == 2:
            Path("parts/lora.safetensors").rename("two.safetensors")
    for name in ("parts", "whole"):
        assert same_tensors(f"{name}/best.safetensors", "two.safetensors")
    assert same_tensors("parts/lora.safetensors", "whole/lora.safetensors")
    assert not same_tensors("whole/lora.safetensors", "two.safetensors")

    # Ended there: saved, and the same when it is continued; until it is told to go on.
    assert run(*WATCHED, "--steps", 4, "--early-stop", "--out", "early") == 0
    said = capsys.readouterr().out
    assert said.count(SAID) == 2 and "ended early; to go on: the same command with --resume early --no-early-stop" in said
    assert torch.load("early/state.pt", weights_only=True)["step"] == 3
    before = Path("early/metrics.jsonl").read_bytes()
    assert run("--resume", "early", "--steps", 5) == 0
    said = capsys.readouterr().out
    assert SAID in said and "ended early" in said and Path("early/metrics.jsonl").read_bytes() == before
    assert run("--resume", "early", "--steps", 4, "--no-early-stop") == 0
    for name in ("lora", "best"):
        assert same_tensors(f"early/{name}.safetensors", f"whole/{name}.safetensors")
