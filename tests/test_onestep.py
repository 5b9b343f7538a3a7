"""methods/onestep.py: one network call in the place of a chain."""
from pathlib import Path

import pytest
import torch
from conftest import apart, assert_same_run, gradient, inputs, metrics, refused

import sampler
import train
from methods import onestep

SHORT = ["--device", "cpu", "--batch-size", "2", "--frames", "4", "--num-steps", "4", "--eval-every", "0",
         "--lr", "1e-3", "--warmup", "0"]
pytestmark = pytest.mark.usefixtures("aside", "short_clips")


def config(**changes):
    return onestep.Config(**(dict(frames=4, segments=2, num_steps=20, guidance=2.) | changes))


def rewards(parts, steps, cfg, rows=slice(None)):
    base, reward, uncond = parts
    z, *others = inputs(base)
    part = [item[rows] for item in (z, inputs(base, 1)[0], *others, steps)]
    return onestep.onestep_rewards(base, reward, uncond, part, cfg)[0]


def test_each_clip_has_a_noise_level_of_its_own(parts):
    steps, cfg = [2, 11], config()
    together = rewards(parts, steps, cfg)
    alone = torch.cat([rewards(parts, steps, cfg, slice(b, b + 1)) for b in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert apart(gradient(parts[0], together), gradient(parts[0], alone)) < 1e-3
    assert (together - rewards(parts, [2, 2], cfg))[1].abs() > 1e-4  # and it matters which


def test_from_the_last_chain_step_it_is_the_edit_but_for_the_noise_that_an_edit_leaves(parts):
    """An edit of tau D = 1 makes the same call, and mixes its z_0 with the last noise: abar[0] is .99915, not 1."""
    base, reward, uncond = parts
    (z, text, g, captions), (eps, *_) = inputs(base), inputs(base, 1)
    levels, seen = base.levels(20), []

    def predict(*args):
        seen.append(base.predict(*args))
        return seen[-1]
    end = sampler.edit(predict, z, eps, text, uncond, levels, tau=.05, guidance=1.)
    z_0, guess = seen[0]
    torch.testing.assert_close(levels.alpha[0] * z_0 + levels.sigma[0] * guess, end, rtol=0, atol=1e-6)
    by_hand, _ = train.video_rewards(base, reward, z_0, g, captions, config())
    ours = rewards(parts, [1, 1], config(guidance=1.))
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-5)
    assert apart(gradient(base, ours), gradient(base, by_hand)) < 1e-3


@pytest.mark.parametrize("guidance, rows", [(2., 4), (1., 2)])
def test_one_call_and_without_guidance_one_branch(parts, guidance, rows):
    base, seen = parts[0], []
    hook = base.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    rewards(parts, [5, 6], config(guidance=guidance))
    hook.remove()
    assert seen == [rows]


def test_levels_are_drawn_from_their_range_for_each_clip_and_step(parts):
    base, reward, _ = parts
    cfg = config(batch_size=3, tau_low=.3, tau_high=.5)
    draw = onestep.method(cfg, base, reward, Path()).draw
    drawn = [draw(step)[-1] for step in range(12)]
    assert set(sum(drawn, [])) == {6, 7, 8, 9, 10} and len({*map(tuple, drawn)}) > 6
    assert draw(3)[-1] == drawn[3] and torch.equal(draw(3)[0], draw(3)[0])


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been():
    assert train.main([*SHORT, "--steps", "3", "--out", "whole"], onestep) == 0
    assert train.main([*SHORT, "--steps", "1", "--out", "run"], onestep) == 0
    assert train.main(["--resume", "run", "--steps", "3"], onestep) == 0
    assert_same_run("run", "whole")
    assert all(line["grad_norm"] > 0 for line in metrics("whole"))


@pytest.mark.parametrize("changes, message", [
    (dict(tau_low=.6, tau_high=.4), "tau_low = 0.6: must be at most tau_high = 0.4"), (dict(tau_high=1.2), "tau = 1.2: must be"),
    (dict(tau_low=.01), "rounds to no step at all")])
def test_ranges_that_are_none_are_refused(changes, message):
    refused(message, onestep.check, config(**changes))
