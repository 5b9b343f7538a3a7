"""Training with every reward on the tiny base: several at once, watched ones, the user's own; resumed, and on two ranks."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import two_ranks

import evaluate
import lora
import train
from model import load_base
from reward import load_rewards
from support import ranks as processes
from tests.conftest import metrics, refused, run, same_tensors
from tiny import clips

KINDS = ["hpsv2", "pickscore", "aesthetic", "imagereward", "yolos:book", "videomae:moving left", "vjepa", "action:left",
         "removal:watermark"]
SHORT = ["--device", "cpu", "--batch-size", "2", "--num-steps", "2", "--tau", "1", "--save-every", "1"]
MIXED = ["--reward", "hpsv2", "--reward", "aesthetic=0.5", "--reward", "videomae:moving left=2",
         "--reward-weights", "aesthetic=random", "--reward-weights", "videomae=random"]
pytestmark = pytest.mark.usefixtures("aside", "few_clips")


@pytest.fixture(scope="module")
def tiny():
    """(the base with fresh adapters, six clips)."""
    base = load_base("tiny")
    lora.inject(base.network, 4, generator=torch.Generator().manual_seed(0))
    return base, clips.clips(base, 16, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reward_trains_a_step(tiny, kind):
    base, dataset = tiny
    cfg = train.Config(reward=(kind,), reward_weights=("random:32",), batch_size=1, num_steps=2, tau=.5, segments=2,
                       guidance=3.)
    reward, parameters = load_rewards(cfg, None), lora.parameters(base.network)
    before = [p.detach().clone() for p in parameters]
    batch = train.draw_batch(dataset, 0, cfg, base)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    R, _ = train.edit_rewards(base, reward, base.encode_text([""]), batch, cfg)
    (-R.mean()).backward()
    optimizer.step()
    assert max((p - b).abs().max() for p, b in zip(parameters, before)) > 1e-4  # those that begin at zero have a gradient at once
    assert not any(p.grad is not None for p in reward.parameters())
    optimizer.zero_grad()
    with torch.no_grad():
        for p, b in zip(parameters, before):
            p.copy_(b)


def test_a_mixture_alone_is_the_plain_run_bit_for_bit():
    """--watch makes a mixture of the one reward: what is optimised must not notice."""
    Path("my_reward.py").write_text("def red(frames, captions):\n    return frames[:, :, 0].mean((2, 3))\n")
    flags = [*SHORT, "--steps", 2, "--eval-every", 0, "--out"]
    assert run(*flags, "plain") == run(*flags, "watched", "--watch", "my_reward.py:red") == 0
    assert metrics("plain") == metrics("watched") and metrics("plain")[0].keys() == {"step", "reward", "loss", "grad_norm"}
    assert same_tensors("plain/lora.safetensors", "watched/lora.safetensors")


def test_several_rewards_are_logged_resumed_and_shared_among_ranks(monkeypatch):
    Path("my_reward.py").write_text("def red(frames, captions):\n    return frames[:, :, 0].mean((2, 3))\n")
    Path("prompts.txt").write_text("a red circle moving left\n")
    flags = [*SHORT, *MIXED, "--watch", "my_reward.py:red", "--prompts", "mine=prompts.txt",
             "--eval-count", "1", "--eval-every"]
    assert run(*flags, 2, "--steps", 2, "--out", "whole") == 0
    first, one, two, last = metrics("whole")
    names = ["HPStiny", "aesthetic-random", "VideoMAE-random:moving left"]
    assert list(one) == ["step", "reward", *names, "loss", "grad_norm"]
    for line in (one, two):
        assert line["reward"] == pytest.approx(line[names[0]] + .5 * line[names[1]] + 2 * line[names[2]], abs=1e-6)
    for line in (first, last):
        for measured in line["eval"].values():
            assert measured.keys() >= {"reward_mean", *names, "my_reward:red", "watermark"}

    # Resumed elsewhere: the file of the user's own reward is still found.
    assert run(*flags, 2, "--steps", 1, "--out", "parts") == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("--resume", "../parts", "--steps", 2) == 0
    monkeypatch.chdir("..")
    assert metrics("parts")[-1]["eval"] == last["eval"] and metrics("parts")[-2] == two
    refused("reward would make it another run", run, "--resume", "parts", "--reward", "vjepa")

    ranks = [*flags, 0, "--steps", 2, "--out", "ranks"]
    ended, _ = two_ranks(lambda rank: processes.run_script("train.py", lambda: run(*ranks)))
    assert [status for status, _, _ in ended] == [0, 0], ended
    for ours, theirs in zip(metrics("ranks"), (one, two)):
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = load_file("ranks/lora.safetensors"), load_file("whole/lora.safetensors")
    assert max((ours[k] - theirs[k]).abs().max() for k in ours) < 1e-4


def test_a_column_for_each_reward():
    evaluate.main(evaluate.Config(reward=("hpsv2", "pickscore=.1"), watch=("vjepa",), count=1, num_steps=(2,), sheet=0,
                                  device="cpu", reward_weights=("pickscore=random", "vjepa=random")))
    shown = Path("out/evaluation/table.md").read_text()
    assert "| HPStiny + 0.1 PickScore-random ± std |" in shown
    assert all(f"| {name} " in shown for name in ("HPStiny", "PickScore-random", "VJEPA2-random"))
    measures = json.loads(Path("out/evaluation/table.json").read_text())["results"][0]["measures"]
    assert measures["reward_mean"] == pytest.approx(measures["HPStiny"] + .1 * measures["PickScore-random"])


def test_classes_are_known_with_the_weights_and_refused_with_nothing_written():
    """What names alone tell is refused before anything is loaded (tests/test_rewards.py)."""
    Path("clips.txt").write_text("a.mp4|||a cat\n")
    flags = ["tiny", *SHORT, "--eval-every", 0, "--out", "refused", "--reward"]
    refused("no class 'boook'", run, *flags, "yolos:boook", "--reward-weights", "random")
    refused("is for the tiny world alone: must be", run, *flags, "action:left", "--base", "random:32", "--data", "clips.txt")
    assert not Path("refused").exists()
