"""DeepCache: which calls of a chain compute the UNet's inner levels, what the others take instead, and what stays behind."""
from dataclasses import replace

import pytest
import torch

import train
from bases.deep_cache import DeepCache
from methods import draft, refl, vader
from tests.conftest import gradient, inputs


@torch.no_grad()
def test_every_nth_call_is_exact_and_the_others_see_the_new_z_in_the_outermost_level_alone(parts):
    base, seen = parts[0], []
    hook = base.network.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    cached, level = base.chain_predict(2), (501, .5, .8)
    for i in range(4):
        z, text, *_ = inputs(base, seed=i)
        same = torch.equal(cached(z, level, text)[1], base.predict(z, level, text)[1])
        assert same == (i % 2 == 0), i
    hook.remove()
    # What reaches the way up's last level: from below, as it was; beside it, what the way down kept, new.
    kept, exact, (below, beside) = seen[0], seen[3], seen[2].split(base.network.config.channels[::-1], dim=1)
    assert torch.equal(below, kept[:, :below.shape[1]]) and not torch.equal(below, exact[:, :below.shape[1]])
    assert torch.equal(beside, exact[:, below.shape[1]:])


def test_with_gradient_it_is_exact_and_nothing_stays_behind(parts):
    base, level = parts[0], (1, .9, .1)
    (z, text, *_), cached, names = inputs(base), DeepCache(base, 2), [name for name, _ in base.network.named_modules()]
    with torch.no_grad():
        cached(inputs(base, seed=1)[0], level, text)
        cached(z, level, text)
        with pytest.raises(RuntimeError):
            cached(z, level, text[..., :-1])
    torch.testing.assert_close(cached(z, level, text)[1], base.predict(z, level, text)[1], rtol=0, atol=0)
    assert not cached.middle.output.requires_grad
    assert [name for name, _ in base.network.named_modules()] == names
    assert not any(module._forward_hooks for module in base.network.modules())
    assert base.chain_predict(1) == base.predict


def refl_rewards(base, reward, uncond, batch, cfg):
    noise, text, g, captions, m = batch
    return train.video_rewards(base, reward, refl.guess_z_0(base, noise, text, uncond, m[0], cfg), g, captions, cfg)


@pytest.mark.parametrize(("step", "config", "last"), [
    (train.edit_rewards, train.Config(tau=1.), None), (draft.draft_rewards, draft.Config(), [[1], [1]]),
    (refl_rewards, refl.Config(), [1, 1]), (vader.vader_rewards, vader.Config(), [(0, 0, 0, "chain"), (0, 0, 1, "chain")])],
    ids=["InstructVideo", "draft", "refl", "vader"])
def test_a_step_saves_calls_and_the_fewer_the_nearer_is_its_gradient(parts, step, config, last):
    """Of the five calls without gradient N = 2 computes the inner levels in the first, third and fifth."""
    base, reward, uncond = parts
    noise, *others = inputs(base)
    batch = (noise, *others, last) if last else (torch.zeros_like(noise), noise, *others)
    calls, found = [], []
    hook = base.network.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(None))
    for interval, number in ((1, 6), (2, 4), (6, 2)):
        cfg = replace(config, frames=4, segments=2, num_steps=6, guidance=1.5, cache_interval=interval)
        calls.clear()
        R, _ = step(base, reward, uncond, batch, cfg)
        assert len(calls) == number
        found.append(gradient(base, R))
    hook.remove()
    # A chain of six steps goes far in each.
    two, six = (torch.cosine_similarity(grad, found[0], dim=0) for grad in found[1:])
    assert .7 < two < .99999 and six < two


def test_a_whole_run_in_parts_and_with_little_memory_serves_from_the_cache(short_clips, aside, monkeypatch):
    """Two clips one by one, each with three calls without gradient, of which the second is served; the last call runs twice."""
    calls, real = [], train.load_base

    def watched(*args):
        base = real(*args)
        base.network.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append(None))
        return base
    monkeypatch.setattr(train, "load_base", watched)
    flags = ["--device", "cpu", "--frames", "4", "--segments", "2", "--batch-size", "2", "--num-steps", "4", "--tau", "1",
             "--steps", "1", "--eval-every", "0", "--clips-at-once", "1", "--low-memory"]
    assert train.main([*flags, "--cache-interval", "2", "--out", "cached"]) == 0 and len(calls) == 2 * (2 + 2)  # exact: 3 + 2
