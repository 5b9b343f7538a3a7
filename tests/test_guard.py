"""What is watched: measures of pixels and the judge's score; the guard's verdict; and what a run makes of it."""
import json
import re
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import reward
import train
from formats.reward_names import requested_rewards
from support import run as run_folder, tables as guard, tables as watch
from support.tables import paired, summary
from tiny import judge

SHORT = ["--device", "cpu", "--frames", "4", "--segments", "2", "--batch-size", "1", "--num-steps", "2", "--tau", "1",
         "--lr", ".01", "--eval-every", "1"]
JUDGED = {"watermark", "sharpness", "saturation", "noise", "motion", "fidelity", "steadiness", "colour", "shape", "direction",
          "static"}
pytestmark = pytest.mark.usefixtures("aside", "short_clips")


# ------------------------------------------------- measures of pixels ----------------------------------------------

def measures(*frames):
    """Of one clip of these frames, each (3, H, W) or a grey value."""
    frames = [f if torch.is_tensor(f) else torch.full((3, 8, 8), f) for f in frames]
    found = watch.pixel_measures(torch.stack(frames)[None], watch.PIXELS[:5])
    return {name.removeprefix("pixel_"): value.item() for name, value in found.items()}


def test_motion_flicker_and_consistency_of_known_clips():
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(3, 8, 8)
    still = measures(board, board, board)
    assert (still["motion"], still["flicker"]) == (0, 0) and still["consistency"] == pytest.approx(1)
    there_and_back = measures(board, 1 - board, board)
    assert (there_and_back["motion"], there_and_back["flicker"]) == (1, 2)
    assert there_and_back["consistency"] == pytest.approx(-1, abs=.01)
    fade = measures(0., .25, .5)  # changes, but steadily
    assert fade["motion"] == pytest.approx(.25) and fade["flicker"] == 0 and fade["consistency"] == 1
    assert measures(board, .5 + .5 * (board - .5))["consistency"] == pytest.approx(.8, abs=.01)  # paler: 2 c / (1 + c^2)


def test_sharpness_and_saturation_of_known_frames():
    edge = torch.zeros(3, 8, 8)
    edge[:, :, 4:] = .6
    red = torch.full((3, 8, 8), .1)
    red[0, :2] = .8
    assert measures(edge, edge)["sharpness"] == pytest.approx(.6) and measures(edge, edge)["saturation"] == 0
    assert measures(red, red)["saturation"] == pytest.approx(.7) and measures(red, red)["sharpness"] == 0


def test_the_judge_has_the_same_sharpness_and_saturation():
    """Sharpness off the watermark's band, as the judge takes it; and of any size, which torch.quantile refuses."""
    g = torch.Generator().manual_seed(0)
    clip = torch.rand(2, 16, 3, 32, 32, generator=g)
    found, ours = judge.pixel_measures(clip), watch.pixel_measures(clip, ("sharpness", "saturation"))
    assert torch.equal(found["saturation"], ours["pixel_saturation"])
    off_band = torch.cat([clip[..., :13, :], clip[..., 20:, :]], dim=-2)
    assert torch.equal(found["sharpness"], watch.sharpness(off_band))
    steepest = off_band.diff(dim=-1).abs().amax(dim=2).flatten(1).quantile(.99, dim=1)
    torch.testing.assert_close(found["sharpness"], steepest)
    vivid = (clip.amax(dim=2) - clip.amin(dim=2)).flatten(1).quantile(.9, dim=1)
    torch.testing.assert_close(found["saturation"], vivid)
    values = torch.rand(3, 101, generator=g)
    for q in (0., .333, .9, .99, 1.):
        torch.testing.assert_close(watch.quantile(values, q), values.quantile(q, dim=1))


def test_diversity_is_among_the_videos_of_a_prompt():
    base = torch.rand(1, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    clips_ = torch.cat([base, base + .25, base, base + .5])
    copies = watch.pixel_measures(clips_, ["diversity"])["pixel_diversity"]
    assert copies.shape == (4, 3, *watch.SMALL)
    rows = [{"reward": 0., "pixel_diversity": copy} for copy in copies.split(1)]
    table = watch.as_table(rows, ["a", "b", "a", "b"])
    torch.testing.assert_close(table["pixel_diversity"], torch.tensor([0, .25, 0, .25], dtype=torch.float64))
    table = watch.as_table(rows, ["a", "a", "b", "a"])["pixel_diversity"]
    torch.testing.assert_close(table[[0, 1, 3]], torch.tensor([.375, .25, .375], dtype=torch.float64))
    assert table[2].isnan() and summary({"reward": table, "pixel_diversity": table})["pixel_diversity"] == pytest.approx(1 / 3)


def test_the_judges_score_is_the_mean_of_six():
    base = {"motion": torch.tensor([.2, .6])}
    table = {"colour": [1., 0.], "shape": [1., 1.], "direction": [0., 1.], "fidelity": [.9, .5], "watermark": [.1, .3],
             "motion": [.1, .8]}  # motion kept: a quarter, and all of it
    table = {k: torch.tensor(v) for k, v in table.items()}
    watch.add_judge(("hpsv2",), table, base)
    assert "judge" not in table
    watch.add_judge(("judge",), table, base)
    torch.testing.assert_close(table["judge"], torch.tensor([(1 + 1 + 0 + .9 + .9 + .25) / 6, (0 + 1 + 1 + .5 + .7 + 1) / 6]))


# ------------------------------------------------- what may be watched ---------------------------------------------

def setting(*watched, **more):
    return types.SimpleNamespace(**({"reward": (), "reward_weights": (), "watch": watched, "frames": 16} | more))


def test_what_names_mean(monkeypatch):
    monkeypatch.setattr(reward, "load_reward", lambda *args: Bright())
    found = reward.load_rewards(setting("pixels", "judge", "flicker"), None)
    assert found.pixels == watch.PIXELS[:5] and found.name == "bright"
    assert watch.watched_names(("judge", "diversity", "motion")) == ["pixel_motion", "pixel_diversity", "judge"]
    assert isinstance(reward.load_rewards(setting(), None), Bright)  # nothing to measure beside it


class Bright(torch.nn.Module):
    name, num_frames = "bright", None

    def forward(self, frames, captions):
        return frames.mean(dim=(2, 3, 4))


def test_an_unknown_name_is_refused_with_those_that_are_allowed():
    allowed = "watch 'blur': must be one of motion, .*diversity, pixels .*, judge; or a reward"
    with pytest.raises(ValueError, match=allowed) as error:
        requested_rewards(setting("motion", "blur"))
    assert "\n" not in str(error.value) and "pickscore" in str(error.value)
    with pytest.raises(ValueError, match="reward 'motion': must be one of hpsv2"):  # never optimised
        requested_rewards(setting(reward=("motion",)))
    with pytest.raises(ValueError, match="official_hps: checks hpsv2 or hpsv2.1 alone"):
        evaluate.check(evaluate.Config(watch=("motion",), official_hps=True))


@pytest.mark.parametrize(("flags", "message"), [
    (["--watch", "diversity"], "watch diversity: needs several videos of a prompt, and no set has any"),
    (["--watch", "judge", "--prompts", "a=prompts.txt"], "watch judge: only the tiny world has one"),
    (["--early-stop"], "early_stop: needs --watch"),
    (["--early-stop", "--watch", "motion", "--eval-every", "0"], "early_stop: needs --watch, and evaluations")])
def test_what_cannot_be_watched_is_refused_with_nothing_written(flags, message):
    Path("prompts.txt").write_text("a red panda\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        train.main([*SHORT, "--eval-count", "1", *flags, "--out", "refused"])
    assert "\n" not in str(error.value) and not Path("refused").exists()


def test_everything_watched_is_measured(monkeypatch):
    """On a real evaluation: 3 videos of 2 prompts, so one prompt has two; in the log and for each video."""
    for writer in ("write_video", "write_comparison_gif"):
        monkeypatch.setattr(run_folder, writer, lambda *args: None)
    monkeypatch.setattr(run_folder, "read_video", lambda path: None)
    Path("prompts.txt").write_text("a red circle moving left\na green square moving up\n")
    flags = ["--prompts", "a=prompts.txt", "--watch", "pixels", "--watch", "diversity"]
    assert train.main([*SHORT, *flags, "--eval-count", "3", "--steps", "1", "--out", "run"]) == 0
    names = [f"pixel_{name}" for name in watch.PIXELS]
    lines = [json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval" in line:
            # The tiny world's judge takes all prompts that are of its world.
            assert line["eval"]["a"].keys() == {"reward_mean", "reward_std", "n", *names, *JUDGED}
            assert all(0 < line["eval"]["a"][name] < 1 for name in names)
    assert lines[1].keys() == {"step", "reward", "loss", "grad_norm", "seconds"}  # a step measures none of them
    table = json.loads(Path("run/samples/step_000001.json").read_text())["a"]
    assert table["pixel_diversity"][1] is None and table["pixel_diversity"][0] == table["pixel_diversity"][2] > 0
    assert json.loads(Path("run/run.json").read_text())["watched"] == names


# ------------------------------------------------- errors and verdicts ---------------------------------------------

def test_errors_of_paired_differences_are_clustered():
    g = torch.Generator().manual_seed(0)
    before, after = ({"reward": torch.randn(12, generator=g, dtype=torch.float64)} for _ in range(2))
    d = after["reward"] - before["reward"]
    mean, error = paired(before, after)
    assert (mean, error) == pytest.approx((d.mean().item(), d.std().item() / 12 ** .5))
    assert paired(before, after, clusters=list("abcdefghijkl")) == pytest.approx((mean, error))
    groups = d.reshape(4, 3).mean(dim=1)  # of equal sizes, so it is the error of the groups' means
    found = paired(before, after, clusters=[i // 3 for i in range(12)])
    assert found == pytest.approx((mean, groups.std().item() / 2))
    assert paired(before, after, clusters=["a"] * 12)[1] != paired(before, after, clusters=["a"] * 12)[1]  # nan


N = 24
PROMPTS = {"one": [f"prompt {i}" for i in range(N // 2)], "two": [f"other {i}" for i in range(N // 2)]}


def tables_of(spread=.02, **means):
    """Tables of evaluations at steps 0, 10, ...: measures with these means at each, and noise of their own in each video."""
    g, found = torch.Generator().manual_seed(0), {}
    for i in range(len(means["reward"])):
        values = {k: v[i] + spread * torch.randn(N, generator=g, dtype=torch.float64) for k, v in means.items()}
        found[10 * i] = {"one": {k: v[:N // 2] for k, v in values.items()}, "two": {k: v[N // 2:] for k, v in values.items()}}
    return found


UP = [.3, .4, .5, .6, .7]


def test_a_score_turns_when_it_is_below_its_best():
    tables = tables_of(reward=UP, judge=[.7, .8, .9, .8, .6])
    turn = guard.find_turn(tables, PROMPTS, ["judge"])
    [(name, since, (difference, error))] = turn.measures
    assert (turn.step, name, since) == (30, "judge", 20) and difference == pytest.approx(-.1, abs=4 * error) and error < .01
    assert turn.reward[0] == pytest.approx(.3, abs=.03)
    number = r"0\.\d{4} ± 0\.\d{4}"
    assert re.fullmatch(rf"turned at step 30: judge -{number} since step 20, while HPS was \+{number}", turn.words("HPS"))
    # What comes later does not change it, and without what is watched there is nothing to see.
    assert guard.find_turn({s: t for s, t in tables.items() if s <= 30}, PROMPTS, ["judge"]) == turn
    assert guard.find_turn({s: t for s, t in tables.items() if s <= 20}, PROMPTS, ["judge"]) is None
    assert guard.find_turn(tables, PROMPTS, []) is None and guard.find_turn({}, PROMPTS, ["judge"]) is None


def test_no_verdict_within_the_error():
    means = {"reward": UP, "judge": [.7, .8, .9, .87, .87]}
    assert guard.find_turn(tables_of(**means), PROMPTS, ["judge"]).step == 30
    assert guard.find_turn(tables_of(spread=.2, **means), PROMPTS, ["judge"]) is None


def test_videos_of_one_prompt_are_no_independent_evidence():
    tables = tables_of(spread=.02, reward=[.3, .5], judge=[.7, .67])
    assert guard.find_turn(tables, PROMPTS, ["judge"]).step == 10
    for table in tables.values():
        for measures_ in table.values():  # all videos of a prompt move together: its noise no longer averages out
            measures_["judge"] = measures_["judge"][:2].repeat_interleave(6)
    few = {name: [f"{name} {i // 6}" for i in range(N // 2)] for name in PROMPTS}
    alone = guard.find_turn(tables, PROMPTS, ["judge"])
    assert alone is not None and guard.find_turn(tables, few, ["judge"]) is None
    assert guard.find_turn(tables_of(reward=UP, judge=UP[::-1]), {name: ["same"] * 12 for name in PROMPTS}, ["judge"]) is None


def test_a_reward_that_does_not_rise_is_no_matter_for_the_guard():
    assert guard.find_turn(tables_of(reward=UP[::-1], judge=UP[::-1]), PROMPTS, ["judge"]) is None
    assert guard.find_turn(tables_of(spread=.05, reward=[.3] * 5, judge=UP[::-1]), PROMPTS, ["judge"]) is None


@pytest.mark.parametrize(("name", "means", "step"), [
    ("motion", [.1, .3, .1, .06, .04], 40),       # against the first value, not the best: nobody knows which is
    ("motion", [.1, .2, .3, .4, .5], None),
    ("flicker", [.1, .12, .14, .16, .2], 30), ("flicker", [.1, .05, .01, .01, .01], None),
    ("consistency", [.9, .85, .82, .79, .7], 30), ("diversity", [.2, .15, .12, .08, .1], 30),
    ("saturation", [.4, .5, .58, .65, .7], 30), ("saturation", [.4, .3, .24, .15, .1], 30),
    ("sharpness", [.4, .5, .55, .5, .4], None)])
def test_measures_of_pixels_have_a_direction_and_a_limit(name, means, step):
    turn = guard.find_turn(tables_of(spread=.005, reward=UP, **{f"pixel_{name}": means}), PROMPTS, [f"pixel_{name}"])
    assert (turn and turn.step) == step and (turn is None or turn.measures[0][1] == 0)


def test_every_measure_of_pixels_has_a_limit():
    assert list(guard.LIMITS) == watch.watched_names(watch.PIXELS)


def test_videos_whose_measure_is_not_known_are_left_out():
    tables = tables_of(reward=UP, pixel_diversity=[.2, .2, .05, .05, .05])
    for step in tables:
        tables[step]["one"]["pixel_diversity"][:] = torch.nan  # none of this set's prompts comes twice
    assert guard.find_turn(tables, PROMPTS, ["pixel_diversity"]).step == 20
    for step in tables:
        tables[step]["two"]["pixel_diversity"][:] = torch.nan
    assert guard.find_turn(tables, PROMPTS, ["pixel_diversity"]) is None


def test_the_best_step_is_the_highest_reward_before_the_turn():
    rewards = {0: .3, 10: .5, 20: .4, 30: .6, 40: .6}
    turn = guard.Turn(30, [], (.3, .1))
    assert guard.best_step(rewards, None) == 30 and guard.best_step(rewards, turn) == 10
    assert guard.best_step({0: -torch.inf, 10: .1}, None) == 10 and guard.best_step({0: -torch.inf}, None) is None


# ------------------------------------------------- a run ------------------------------------------------------------

FIDELITY = [.6, .8, .9, .3, .2]  # at steps 0 to 4: it turns at step 3


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations with numbers as scripted: the reward rises, fidelity does as above; without pictures."""
    def show(self, step, tables, videos):
        numbers = {s: {k: v.tolist() for k, v in t.items()} for s, t in tables.items()}
        run_folder.write_text(run_folder.sample_file(self.folder, step, ".json"), json.dumps(numbers))
    monkeypatch.setattr(run_folder.Evaluations, "show", show)
    monkeypatch.setattr(run_folder.Evaluations, "draw_comparison", lambda *args: None)
    monkeypatch.setattr(run_folder, "draw_curves", lambda lines, name, path, *watched: path.touch())
    look, at = run_folder.Evaluations.look, []
    monkeypatch.setattr(run_folder.Evaluations, "look", lambda self, step: at.append(step) or look(self, step))

    def evaluate(base, reward, prompts, **settings):
        g = torch.Generator().manual_seed(at[-1])
        noise = .01 * torch.randn(len(prompts), generator=g, dtype=torch.float64)
        table = {"reward": .3 + .1 * at[-1] + noise, "fidelity": FIDELITY[at[-1]] + noise}
        for name in ("colour", "shape", "direction", "motion", "watermark"):
            table[name] = torch.full((len(prompts),), .5, dtype=torch.float64)
        return table, None
    monkeypatch.setattr(train, "evaluate", evaluate)


def run(*argv):
    return train.main([*map(str, argv)])



def same(a, b):
    a, b = load_file(a), load_file(b)
    return all(torch.equal(a[k], b[k]) for k in a | b)


WATCHED = [*SHORT, "--eval-count", 4, "--watch", "judge"]
SAID = "turned at step 3: judge -0."


def test_the_guard_tells_keeps_the_adapter_before_the_turn_and_ends_the_run(scripted, capsys):
    assert run(*WATCHED, "--steps", 2, "--out", "two") == 0
    assert "guard: nothing that is watched has turned; best.safetensors is step 2" in capsys.readouterr().out
    assert run(*WATCHED, "--steps", 4, "--out", "whole") == 0
    said = capsys.readouterr().out
    assert said.count(SAID) == 2 and "best.safetensors is step 2" in said  # when it is seen, and at the end
    assert "ended early" not in said
    assert same("whole/best.safetensors", "two/lora.safetensors") and not same("whole/lora.safetensors", "two/lora.safetensors")

    # Ended there: saved, and the same when it is continued; until it is told to go on.
    assert run(*WATCHED, "--steps", 4, "--early-stop", "--out", "early") == 0
    said = capsys.readouterr().out
    assert said.count(SAID) == 2 and "ended early; to go on: the same command with --resume early --no-early-stop" in said
    assert torch.load("early/state.pt", weights_only=True)["step"] == 3
    assert same("early/best.safetensors", "two/lora.safetensors")
    metrics = Path("early/metrics.jsonl").read_bytes()
    assert run("--resume", "early", "--steps", 5) == 0
    said = capsys.readouterr().out
    assert SAID in said and "ended early" in said and Path("early/metrics.jsonl").read_bytes() == metrics
    assert run("--resume", "early", "--steps", 4, "--no-early-stop") == 0
    assert same("early/lora.safetensors", "whole/lora.safetensors") and same("early/best.safetensors", "two/lora.safetensors")


def test_a_continued_run_decides_the_same(scripted, capsys):
    """From the tables on disk alone: it is stopped at every step."""
    for steps in (1, 2, 3, 4):
        begin = ["--resume", "parts"] if steps > 1 else [*WATCHED, "--out", "parts"]
        assert run(*begin, "--steps", steps) == 0
    assert capsys.readouterr().out.count(SAID) == 3  # seen at step 3, at the end of that part and of the next
    assert run(*WATCHED, "--steps", 2, "--out", "two") == 0
    assert same("parts/best.safetensors", "two/lora.safetensors")


def test_without_watching_the_highest_reward_is_kept(scripted, capsys):
    assert run(*SHORT, "--eval-count", 4, "--steps", 4, "--out", "plain") == 0
    assert same("plain/best.safetensors", "plain/lora.safetensors") and "guard" not in capsys.readouterr().out
