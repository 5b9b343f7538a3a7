"""Training with every reward on the tiny base: several at once, watched ones, the user's own; resumed, and on two ranks."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import two_ranks

from support import ranks as processes
from tests.conftest import metrics, refused, run, same_tensors

SHORT = ["--device", "cpu", "--batch-size", "2", "--num-steps", "2", "--tau", "1", "--save-every", "1"]
MIXED = ["--reward", "hpsv2", "--reward", "aesthetic=0.5", "--reward", "videomae:moving left=2",
         "--reward-weights", "aesthetic=random", "--reward-weights", "videomae=random"]
pytestmark = pytest.mark.usefixtures("aside", "few_clips")


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
    for ours, theirs in zip(metrics("ranks"), (one, two), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = load_file("ranks/lora.safetensors"), load_file("whole/lora.safetensors")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_classes_are_known_with_the_weights_and_refused_with_nothing_written():
    """What names alone tell is refused before anything is loaded (tests/test_rewards.py)."""
    Path("clips.txt").write_text("a.mp4|||a cat\n")
    flags = ["tiny", *SHORT, "--eval-every", 0, "--out", "refused", "--reward"]
    refused("no class 'boook'", run, *flags, "yolos:boook", "--reward-weights", "random")
    refused("is for the tiny world alone: must be", run, *flags, "action:left", "--base", "random:32", "--data", "clips.txt")
    assert not Path("refused").exists()
