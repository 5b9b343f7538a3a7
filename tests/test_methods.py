"""methods/: what must be exactly true of each, and that each runs, resumes and shares its work. Formulas are worked out here."""
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import CAPTIONS, ONCE, ROOT, apart, assert_same_run, docs_example, gradient, inputs, metrics, refused, write_footage
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from test_ranks import two_ranks

import lora
import sampler
import train
from formats.tensors import fingerprint
from methods import adjoint, common, ddpo, dpo, draft, nft, refl, rwr, vader
from model import load_base
from support import ranks as processes, run as run_folder, settings
from tiny import clips

METHODS = {"draft": draft, "refl": refl, "vader": vader, "ddpo": ddpo, "rwr": rwr, "dpo": dpo, "nft": nft, "adjoint": adjoint}
SHORT = ["--device", "cpu", "--batch-size", "2", "--num-steps", "2", "--frames", "4", "--segments", "2", "--eval-every", "0"]
MORE = {"ddpo": ["--updates", "2"], "rwr": ["--rounds", "2", "--videos", "4"], "dpo": ["--rounds", "2", "--pairs", "2"],
        "nft": ["--updates", "2", "--group", "2"], "adjoint": ["--steps-learned", "1"]}
pytestmark = pytest.mark.usefixtures("aside")
KEYS = [(0, 0, 0, "chain"), (0, 0, 1, "chain")]  # of the fresh noise of two videos


@pytest.fixture(autouse=True, scope="module")
def few_captions():
    """Six in each set: a run encodes all that it may train on."""
    few = {name: captions[:6] for name, captions in clips.prompt_sets().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "prompt_sets", lambda: few)
        yield


def config(module, **changes):
    return module.Config(**(dict(frames=4, segments=2, batch_size=2, num_steps=4, guidance=3.) | changes))


def of(module, cfg, base, reward):
    """The method as train.train takes it, with this folder for what it keeps."""
    return module.method(cfg, base, reward, Path())


# ------------------------------------------------ The stochastic step ------------------------------------------------

@pytest.mark.parametrize("eta", [1., .5])
def test_the_stochastic_step_is_diffusers(eta):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = sampler.alpha_bars()  # its own is float32
    scheduler.final_alpha_cumprod = sampler.alpha_bars()[0]
    z_t, eps, fresh = torch.randn(3, 2, 4, 3, 5, 5, dtype=torch.float64)
    levels = sampler.ddim_levels(20, sampler.alpha_bars())
    for i in range(20, 0, -1):
        z_0 = (z_t - levels.sigma[i] * eps) / levels.alpha[i]
        mean, std = sampler.step(z_0, eps, levels, i, eta)
        theirs = scheduler.step(eps, levels.t[i], z_t, eta=eta, variance_noise=fresh).prev_sample
        torch.testing.assert_close(mean + std * fresh, theirs, rtol=1e-6, atol=1e-6)
        assert std > 0


# ------------------------------------------------------ DRaFT-K ------------------------------------------------------

@pytest.mark.parametrize("K", [1, 2, 4])
def test_drafts_gradient_is_that_of_the_chain_cut_by_hand(parts, K):
    base, reward, uncond = parts
    noise, text, g, captions = inputs(base)
    cfg = config(draft, grad_steps=K)
    R, logged = draft.draft_rewards(base, reward, uncond, (noise, text, g, captions, [[*range(1, K + 1)]] * 2), cfg)

    # Ordinary backpropagation through all four steps, cut before the last K: with K = D it is not cut at all.
    z, levels = noise, base.levels(4)
    for i in (4, 3, 2, 1):
        z = z.detach() if i == K else z
        z, _ = sampler.step(*sampler.guided(base.predict, z, levels, i, text, uncond, cfg.guidance), levels, i)
    scores = train.score_frames(reward, train.decode_chosen(base, z, g), captions)
    by_hand = (scores * torch.exp(-1. * (g - 2).abs())).mean(dim=1)
    torch.testing.assert_close(R, by_hand, rtol=0, atol=1e-5)
    torch.testing.assert_close(logged["reward"], scores.detach().mean(dim=1), rtol=0, atol=1e-5)
    assert apart(gradient(base, R), gradient(base, by_hand)) < 1e-3


def test_the_edit_from_tau_1_of_an_empty_clip_is_draft(parts):
    """z = 0 and eps / sqrt(1 - abar[951]): the edit then starts from the noise itself."""
    base, reward, uncond = parts
    noise, text, g, captions = inputs(base)
    cfg = config(draft)
    R, _ = draft.draft_rewards(base, reward, uncond, (noise, text, g, captions, [[1], [1]]), cfg)
    eps = noise / (1 - sampler.alpha_bars()[751].item()) ** .5
    edit, _ = train.edit_rewards(base, reward, uncond, (torch.zeros_like(noise), eps, text, g, captions), cfg)
    assert cfg.tau == 1.
    torch.testing.assert_close(R, edit, rtol=0, atol=1e-5)
    assert apart(gradient(base, R), gradient(base, edit)) < 1e-3


def test_the_random_cut_takes_every_k_and_random_steps_any_of_the_chain_the_same_for_all_ranks():
    cfg = config(draft, truncate="random", grad_steps=4)
    drawn = [len(draft.chosen_steps(step, cfg)) for step in range(60)]
    assert set(drawn) == {1, 2, 3, 4} and drawn == [len(draft.chosen_steps(step, cfg)) for step in range(60)]
    assert {len(draft.chosen_steps(step, replace(cfg, truncate="fixed"))) for step in range(9)} == {4}
    drawn = [draft.chosen_steps(step, config(draft, detach_input=True, grad_at="random", grad_steps=2)) for step in range(40)]
    assert {*sum(drawn, [])} == {1, 2, 3, 4} and all(len({*steps}) == 2 for steps in drawn)


def test_drtunes_gradient_is_the_sum_by_hand_with_the_networks_input_detached(parts):
    """z_prev = c z_t + d eps(z_t) at each step, with DDIM's own c and d; only the chosen eps have a gradient, times later c."""
    base, reward, uncond = parts
    noise, text, g, captions = inputs(base)
    cfg = config(draft, detach_input=True, grad_at="uniform", grad_steps=2)
    assert draft.chosen_steps(0, cfg) == [4, 2]
    R, _ = draft.draft_rewards(base, reward, uncond, (noise, text, g, captions, [[4, 2]] * 2), cfg)
    z, levels, ahead, total = noise, base.levels(4), [], 0.
    for i in (4, 3, 2, 1):
        _, eps = sampler.guided(base.predict, z.detach(), levels, i, text, uncond, cfg.guidance)
        c = levels.alpha[i - 1] / levels.alpha[i]
        d = levels.sigma[i - 1] - c * levels.sigma[i]
        ahead = [(c * factor, chosen) for factor, chosen in ahead] + ([(d, eps)] if i in (4, 2) else [])
        z = (c * z + d * eps).detach()
    for factor, eps in ahead:
        total = total + factor * (eps - eps.detach())
    scores = train.score_frames(reward, train.decode_chosen(base, z + total, g), captions)
    by_hand = (scores * torch.exp(-1. * (g - 2).abs())).mean(dim=1)
    torch.testing.assert_close(R, by_hand, rtol=0, atol=1e-5)
    assert apart(gradient(base, R), gradient(base, by_hand)) < 1e-3
    assert all(p.requires_grad for p in lora.parameters(base.network))


def test_detaching_what_the_last_step_alone_reads_changes_nothing(parts):
    base, reward, uncond = parts
    batch = *inputs(base), [[1], [1]]
    plain, _ = draft.draft_rewards(base, reward, uncond, batch, config(draft))
    detached, _ = draft.draft_rewards(base, reward, uncond, batch, config(draft, detach_input=True))
    assert apart(gradient(base, detached), gradient(base, plain)) < 1e-4


# -------------------------------------------------------- ReFL --------------------------------------------------------

def test_refls_prediction_at_the_last_step_and_the_chains_end(parts):
    """sqrt(abar[0]) z_0 + sqrt(1 - abar[0]) eps is where the chain ends: abar[0] = .99915, not 1."""
    base, _, uncond = parts
    noise, text, *_ = inputs(base)
    cfg, seen = config(refl), []

    def spy(z, level, text):
        z_0, eps = base.predict(z, level, text)
        seen.append(eps)
        return z_0, eps
    spied = types.SimpleNamespace(chain_predict=lambda interval: spy, levels=base.levels, default_size=32)
    z_0 = refl.guess_z_0(spied, noise, text, uncond, 1, cfg)
    end = sampler.sample(base.predict, noise, text, uncond, base.levels(4), cfg.guidance)
    eps_c, eps_u = seen[-1].chunk(2)
    a = sampler.alpha_bars()[0].item()
    # The chain's eps of step 1 predicts z_0 from abar[1]; put back to abar[0] it gives the end of the chain.
    torch.testing.assert_close(a**.5 * z_0 + (1 - a) ** .5 * (eps_u + cfg.guidance * (eps_c - eps_u)), end, rtol=0, atol=1e-4)
    assert [eps.requires_grad for eps in seen] == [False, False, False, True]


def test_refl_stops_late_and_all_videos_of_a_step_together(parts, monkeypatch):
    base, reward, uncond = parts
    cfg = config(refl, num_steps=40)
    drawn = [of(refl, cfg, base, reward).draw(step)[4] for step in range(60)]
    assert all(m[0] == m[1] for m in drawn) and {m[0] for m in drawn} == set(range(1, 11))  # the last 10 of 40
    method = of(refl, replace(cfg, num_steps=4, late=1.), base, reward)
    assert {method.draw(step)[4][0] for step in range(40)} == {1, 2, 3, 4}
    R, logged = method.score(method.draw(0))
    assert R.requires_grad and not logged["reward"].requires_grad and gradient(base, R).abs().max() > 0


# -------------------------------------------------------- VADER --------------------------------------------------------

def test_vader_without_fresh_noise_is_draft_at_lambda_0(parts):
    base, reward, uncond = parts
    batch = inputs(base)
    R, _ = vader.vader_rewards(base, reward, uncond, (*batch, KEYS), config(vader, eta=0.))
    expected, _ = draft.draft_rewards(base, reward, uncond, (*batch, [[1], [1]]), config(draft, lambda_tar=0.))
    assert torch.equal(R, expected) and torch.equal(gradient(base, R), gradient(base, expected))
    weighted, _ = vader.vader_rewards(base, reward, uncond, (*batch, KEYS), config(vader, eta=0., lambda_tar=1.))
    expected, _ = draft.draft_rewards(base, reward, uncond, (*batch, [[1], [1]]), config(draft))
    assert torch.equal(weighted, expected)  # the comparison has it both ways


def test_vaders_fresh_noise_is_a_videos_own(parts):
    base, reward, uncond = parts
    noise, text, g, captions = inputs(base)

    def plain(of=slice(None), eta=1., keys=KEYS):
        batch = noise[of], text[of], g[of], captions[of], keys[of]
        return vader.vader_rewards(base, reward, uncond, batch, config(vader, eta=eta))[1]["reward"]
    assert torch.equal(plain(), plain()) and (plain() - plain(eta=0.)).abs().min() > 1e-4
    torch.testing.assert_close(plain(slice(1, 2)), plain()[1:], rtol=0, atol=1e-5)
    assert abs(plain(keys=[KEYS[1]] * 2)[0] - plain()[0]) > 1e-4  # another video's noise


def test_noise_for_a_chain_at_once_is_that_of_its_steps():
    one, two = [[torch.Generator().manual_seed(seed) for seed in (1, 2)] for _ in range(2)]
    noise = common.fresh_noise(torch.empty(2, 3, 5, dtype=torch.float64), one, 4)
    steps = [torch.stack([torch.randn(3, 5, generator=generator) for generator in two]) for _ in range(4)]
    assert torch.equal(noise, torch.stack(steps).double())


def test_vader_scores_random_frames_or_all_in_order(parts):
    base, reward, uncond = parts
    seen = []

    def video_reward(frames, captions):
        seen.append(frames)
        return frames.mean(dim=(2, 3, 4))
    for n in (0, 1, 3):
        method = of(vader, config(vader, frames_scored=n), base, video_reward)
        batches = [method.draw(step) for step in range(12)]
        chosen = {tuple(row) for batch in batches for row in batch[2].tolist()}
        assert all(list(row) == sorted(set(row)) and len(row) == (n or 4) for row in chosen)
        assert chosen == {(0, 1, 2, 3)} if n == 0 else len(chosen) > 2
        method.score(batches[0])
        assert seen[-1].shape[:2] == (2, n or 4)


# -------------------------------------------------------- DDPO --------------------------------------------------------

def test_log_p_is_the_normals_mean_over_elements_of_each_video():
    mean, z = torch.randn(2, 3, 4, 2, 2, 2)
    for std in (.3, torch.tensor(.3, dtype=torch.float64)):
        expected = torch.distributions.Normal(mean, .3).log_prob(z).flatten(1).mean(dim=1)
        log_p = ddpo.log_prob(z, mean, std)
        assert log_p.shape == (3,) and log_p.dtype == torch.float32  # (3,): never a mean over the batch
        torch.testing.assert_close(log_p, expected, rtol=1e-6, atol=1e-6)
    # kvablack's formula by hand: two elements 0.5 and -1 away, std 0.5, are -1/2 and -2, less log 0.5 and log sqrt(2 pi).
    by_hand = (-.5 - 2) / 2 - math.log(.5) - math.log(math.sqrt(2 * math.pi))
    assert ddpo.log_prob(torch.tensor([[.5, -1.]]), torch.zeros(1, 2), .5).item() == pytest.approx(by_hand, abs=1e-6)
    half = ddpo.log_prob(z.bfloat16(), mean.bfloat16(), .3)
    assert half.dtype == torch.float32  # a ratio in bfloat16 would not be 1 before any update
    assert not ddpo.log_prob(z.requires_grad_(), mean, .3).requires_grad  # what was sampled is data


def test_ppo_by_hand():
    """Three videos: inside the range, above it with A > 0, below it with A > 0."""
    new = torch.log(torch.tensor([1.00005, 1.001, .999])).requires_grad_()
    A = torch.tensor([2., 1., 1.])
    loss = ddpo.ppo_loss(new, torch.zeros(3), A)
    assert loss.item() == pytest.approx((-2 * 1.00005 - 1 * 1.0001 - 1 * .999) / 3, abs=1e-6)
    loss.backward()
    # Clipped only where it would gain by going on: above with A > 0, below with A < 0.
    torch.testing.assert_close(new.grad, torch.tensor([-2 * 1.00005, 0., -.999]) / 3, rtol=1e-4, atol=1e-7)
    new.grad = None
    ddpo.ppo_loss(new, torch.zeros(3), -A).backward()
    torch.testing.assert_close(new.grad, torch.tensor([2 * 1.00005, 1.001, 0.]) / 3, rtol=1e-4, atol=1e-7)
    new.grad = None
    ddpo.ppo_loss(new, torch.zeros(3), A, clip_range=.1).backward()
    assert (new.grad != 0).all()


def test_advantages_by_hand():
    rewards, prompts = torch.tensor([1., 2., 3., 6.]), ["a", "a", "b", "b"]
    # No prompt has 16 rewards yet: over the batch, mean 3, std sqrt(3.5) (the population's).
    torch.testing.assert_close(ddpo.advantages(rewards, prompts), (rewards - 3) / 3.5**.5, rtol=1e-5, atol=1e-5)
    # Groups: a has mean 1.5 and std 0.5, b has mean 4.5 and std 1.5; each group's sum is 0.
    torch.testing.assert_close(ddpo.advantages(rewards, prompts, group=2), torch.tensor([-1., 1, -1, 1]), rtol=1e-5, atol=1e-5)
    # "a" has 14 earlier rewards: with these two it is judged by its own 16; "b" by the batch.
    last = {"a": [0., 1.] * 7, "b": [9.] * 3}
    own = torch.tensor([*last["a"], 1., 2.])
    A = ddpo.advantages(rewards, prompts, last)
    torch.testing.assert_close(A[:2], (rewards[:2] - own.mean()) / own.std(correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A[2:], (rewards[2:] - 3) / 3.5**.5, rtol=1e-4, atol=1e-4)
    # Only the last 16 count, and nothing counts for more than 5.
    assert torch.equal(ddpo.advantages(rewards, prompts, last | {"a": [99.] * 9 + last["a"]}), A)
    assert ddpo.advantages(torch.tensor([0.] * 99 + [1]), [*map(str, range(100))]).max() == 5
    assert ddpo.advantages(torch.ones(4), prompts).abs().max() < 1e-3  # equal rewards teach nothing


def update(parts, path, old, A, **changes):
    """DDPO's method with a round of one batch, of these chains, log p and advantages, and its settings."""
    base, reward, _ = parts
    cfg = config(ddpo, updates=1, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpo, "sample_path", lambda *args: (path, old))
        patch.setattr(ddpo, "advantages", lambda *args: A)
        method = of(ddpo, cfg, base, reward)
        return method, method.draw(0), cfg


@pytest.fixture(scope="module")
def sampled(parts, tmp_path_factory):
    """The captions, chains and log p of DDPO's first batch of two videos."""
    base, reward, _ = parts
    cfg, seen = config(ddpo, updates=1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sampled"))  # for the rewards that a round leaves behind
        real = ddpo.sample_path
        patch.setattr(ddpo, "sample_path", lambda *args: seen.append((args[2], *real(*args))) or seen[-1][1:])
        of(ddpo, cfg, base, reward).draw(0)
    return seen[0]


def test_the_ratio_is_1_before_the_first_update(parts, sampled):
    base, _, uncond = parts
    text, path, old = sampled
    cfg = config(ddpo)
    for i in range(4, 0, -1):
        mean, std = common.policy(base, path[:, 4 - i], i, text, uncond, cfg)  # with gradient, as in learning
        ratio = torch.exp(ddpo.log_prob(path[:, 5 - i], mean, std) - old[:, 4 - i])
        assert (ratio - 1).abs().max() < 1e-6


def test_the_first_gradient_is_that_of_reinforce(parts, sampled):
    base, _, uncond = parts
    text, path, old = sampled
    A = torch.tensor([1., -.5])

    def learned(number=0, **changes):
        """The gradient and value of the loss, as train.train adds it up."""
        method, batch, cfg = update(parts, path, old, A, **changes)
        total = sum(method.score(part)[0].sum() for part in train.split_batch(batch, number))
        return gradient(base, -total / cfg.batch_size), -total.item() / cfg.batch_size
    grad, loss = learned()
    total = 0.
    for i in range(4, 0, -1):
        mean, std = common.policy(base, path[:, 4 - i], i, text, uncond, config(ddpo))
        total = total + (A * ddpo.log_prob(path[:, 5 - i], mean, std)).sum() / (2 * 4)
    assert apart(grad, -gradient(base, total)) < 1e-3
    assert loss == pytest.approx(-.5 / 2, abs=1e-5)
    for number in (1, 3):  # in parts, which may hold several chain steps
        assert apart(learned(number)[0], grad) < 1e-3
    # Half of the steps: others in another step, and an estimate of the same mean.
    half = config(ddpo, timestep_fraction=.5)
    chosen = [ddpo.pairs((path, path, old, A, CAPTIONS, KEYS, A), step, half)[-1] for step in range(9)]
    assert {len(steps) for steps in chosen} == {2 * 2} and set(sum(chosen, [])) == {1, 2, 3, 4}
    assert learned(timestep_fraction=.5)[1] == pytest.approx(-.25, abs=1e-5)


def test_the_policys_gradient_is_that_of_the_expected_reward():
    """A million videos of one number, a model of one weight: log p leads where the gradient through the chain leads."""
    number, D, g = 1_000_000, 4, torch.Generator().manual_seed(0)
    theta, text, cfg = torch.tensor(.3, requires_grad=True), torch.zeros(number, 1, 1), ddpo.Config(num_steps=4, guidance=1.)
    def predict(z_t, level, text):
        eps = theta * z_t + .1
        return (z_t - level[2] * eps) / level[1], eps
    base = types.SimpleNamespace(predict=predict, default_size=32,
                                 levels=lambda D, shape: sampler.ddim_levels(D, sampler.alpha_bars()))
    path = [torch.randn(number, 1, 1, 1, 1, generator=g)]
    for i in range(D, 0, -1):
        mean, std = common.policy(base, path[-1], i, text, text[:1], cfg)
        path.append(mean + std * torch.randn(path[0].shape, generator=g))
    R = -(path[-1].flatten() - 1) ** 2
    expected, = torch.autograd.grad(R.mean(), theta)
    A, found = (R - R.mean()).detach(), 0.
    for i in range(D, 0, -1):
        mean, std = common.policy(base, path[D - i].detach(), i, text, text[:1], cfg)
        log_p = ddpo.log_prob(path[D - i + 1], mean, std)
        found -= torch.autograd.grad(ddpo.ppo_loss(log_p, log_p.detach(), A), theta)[0].item()
    assert found == pytest.approx(expected.item(), rel=.1)


def test_a_group_shares_a_prompt_and_not_its_noise(parts):
    base, *_ = parts
    cfg = config(ddpo, batch_size=4, group=2, clips_at_once=0)
    seen = []

    def brightness(frames, captions):
        seen.append(captions)
        return frames.mean(dim=(2, 3, 4))
    method = of(ddpo, cfg, base, brightness)
    batches = [method.draw(step) for step in (0, 1)]
    line = json.loads(Path("rewards.jsonl").read_text())
    assert len(seen) == 2 and line["step"] == 0 and line["prompts"] == [*seen[0], *seen[1]] and len(line["rewards"]) == 8
    assert method.stop_every == 2
    for z_t, z_prev, old, A, plain, captions, steps in batches:
        assert len(z_t) == len(z_prev) == len(old) == len(plain) == len(captions) == 4 * 4  # each chain step with each video
        assert sorted(steps) == [i for i in (1, 2, 3, 4) for _ in range(4)]
        assert not torch.equal(z_t[0], z_t[1])
        torch.testing.assert_close(A.view(4, 2, 2).sum(dim=2), torch.zeros(4, 2), rtol=0, atol=1e-3)  # the group's own mean
    for captions in seen:
        assert captions[0] == captions[1] != captions[2] == captions[3]


def test_a_round_is_sampled_in_the_parts_that_fit_into_memory(parts, monkeypatch):
    base, reward, _ = parts
    rows, predict = [], base.predict
    monkeypatch.setattr(base, "predict", lambda z_t, *more: rows.append(len(z_t)) or predict(z_t, *more), raising=False)

    def sampled(clips_at_once):
        rows.clear()
        return of(ddpo, config(ddpo, batch_size=3, updates=1, num_steps=2, clips_at_once=clips_at_once), base, reward).draw(0)
    whole, seen = sampled(0), [*rows]
    in_parts, of_two = sampled(2), [*rows]
    assert seen == [6, 6] and of_two == [4, 4, 2, 2]  # guidance doubles
    torch.testing.assert_close(in_parts[:2], whole[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_parts[2:5], whole[2:5], rtol=1e-4, atol=1e-4)
    assert in_parts[5:] == whole[5:]


# -------------------------------------------------------- RWR --------------------------------------------------------

def test_reward_weights_by_hand():
    rewards = torch.tensor([.25, .26, .27, .28])
    w = rwr.reward_weights(rewards, 1.)
    r = (rewards.double() - .265) / (.0005 / 4) ** .5  # the population's standard deviation
    torch.testing.assert_close(w, (4 * r.exp() / r.exp().sum()).float(), rtol=1e-4, atol=1e-5)
    assert w.sum().item() == pytest.approx(4) and w.max() > 2  # raw rewards would all weigh 1
    torch.testing.assert_close(rwr.reward_weights(10 * rewards + 3, 1.), w, rtol=1e-3, atol=1e-4)
    assert rwr.reward_weights(rewards, .1).max() > 3.9 and rwr.reward_weights(rewards, 100.).max() < 1.02
    assert torch.equal(rwr.reward_weights(torch.full((5,), .3), .5), torch.ones(5))


def test_rwr_with_equal_rewards_is_the_plain_denoising_loss(parts):
    base, reward, _ = parts
    score = of(rwr, config(rwr), base, reward).score
    z, eps = inputs(base)[0], inputs(base, 1)[0]
    text, t = base.encode_text(CAPTIONS), torch.tensor([951, 51])
    u = t / 1000 + .0005
    R, _ = score((z, eps, text, torch.ones(2), torch.zeros(2), u))
    plain_loss = []
    for b in (0, 1):  # Eq. (1), one video at a time
        a = sampler.alpha_bars()[t[b]].item()
        z_t = a**.5 * z[b:b + 1] + (1 - a) ** .5 * eps[b:b + 1]
        plain_loss.append((base.network(z_t, t[b:b + 1], text[b:b + 1]) - eps[b:b + 1]).square().mean())
    torch.testing.assert_close(-R, torch.stack(plain_loss), rtol=1e-4, atol=1e-5)
    weighted, _ = score((z, eps, text, torch.tensor([0., 2.]), torch.zeros(2), u))
    torch.testing.assert_close(weighted, R * torch.tensor([0., 2.]), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------- DPO --------------------------------------------------------

def test_the_dpo_loss_by_hand():
    """diffusers: -log sigmoid of -1/2 beta times (model's difference of winner and loser, less the reference's)."""
    e_w, e_l, ref_w, ref_l = torch.tensor([[.101, .2], [.103, .2], [.102, .2], [.1025, .2]])
    inside = ((.101 - .103) - (.102 - .1025)) * -.5 * 5000  # of the first pair: 3.75
    expected = (math.log(1 + math.exp(-inside)) + math.log(2)) / 2
    assert dpo.dpo_loss(e_w, e_l, ref_w, ref_l).item() == pytest.approx(expected, abs=1e-3)
    assert dpo.dpo_loss(e_w, e_l, ref_w, ref_l, beta=2500.).item() == pytest.approx(
        (math.log(1 + math.exp(-inside / 2)) + math.log(2)) / 2, abs=1e-3)


def test_the_dpo_loss_starts_at_ln_2_falls_for_the_winner_and_has_a_mirror():
    e_w, e_l = torch.tensor([[.1, .3], [.2, .1]])
    assert dpo.dpo_loss(e_w, e_l, e_w, e_l).item() == pytest.approx(math.log(2), abs=1e-7)
    better = dpo.dpo_loss(e_w - 1e-4, e_l, e_w, e_l)
    assert better < math.log(2) < dpo.dpo_loss(e_w, e_l - 1e-4, e_w, e_l)
    # -log sigmoid(x) and -log sigmoid(-x) = 1 - sigmoid(x): winner and loser exchanged.
    worse = dpo.dpo_loss(e_l, e_w - 1e-4, e_l, e_w)
    assert math.exp(-better.item()) + math.exp(-worse.item()) == pytest.approx(1, abs=1e-6)


def test_winner_and_loser_share_prompt_t_and_noise(parts):
    base, *_ = parts
    (z_w, text, *_), (z_l, *_), (eps, *_) = inputs(base), inputs(base, 1), inputs(base, 2)
    t, seen = torch.tensor([100, 700]), []

    def predict(*args):
        seen.append(args)
        return args[0], torch.zeros_like(args[0])
    silent = types.SimpleNamespace(predict=predict, level=base.level, error=base.error)
    e_w, e_l = dpo.pair_errors(silent, z_w, z_l, eps, t / 1000 + .0005, text)
    z_t, (both_t, *_), both_text = seen[0]
    assert both_t.tolist() == [100, 700, 100, 700] and torch.equal(*both_text.chunk(2))
    a = sampler.alpha_bars()[t].float().view(2, 1, 1, 1, 1)
    for noised, z in zip(z_t.chunk(2), (z_w, z_l)):
        torch.testing.assert_close((noised - a.sqrt() * z) / (1 - a).sqrt(), eps, rtol=0, atol=1e-4)
    assert torch.equal(e_w, e_l)  # of a denoiser that answers 0, the error is the noise's own
    torch.testing.assert_close(e_w, eps.square().flatten(1).mean(dim=1))


def test_pairs_are_two_videos_of_one_prompt_and_the_reward_decides(parts, monkeypatch):
    base, _, _ = parts
    made = []
    monkeypatch.setattr(common, "sample", lambda *args: made.append((args[1:3], strengths(base), sampler.sample(*args)))
                        or made[-1][-1])
    cfg = config(dpo, pairs=4, lambda_tar=0.)
    prompts = [*CAPTIONS, "a blue ring moving up", "a cyan cross moving left"]
    videos = common.Videos(cfg, base, lambda _: torch.tensor([0, 2]), prompts)

    def brightness(frames, captions):
        return frames.mean(dim=(2, 3, 4)) * 1e3  # (B, S)
    share = videos.share(0, 4)
    part = dpo.sample_pairs(base, brightness, videos, share, 0, cfg)
    ((noise, text), strength, z), ((other_noise, other_text), other_strength, other_z) = made
    assert torch.equal(text, other_text) and strength == other_strength == {0.} and strengths(base) == {1.}
    assert all(not torch.equal(a, b) for a, b in zip(noise, other_noise))
    assert torch.equal(text, base.encode_text([prompts[i] for _, i in share]))
    for i in range(4):
        pair = {fingerprint({"z": v[i]}) for v in (part["winner"], part["loser"])}
        assert pair == {fingerprint({"z": v[i]}) for v in (z, other_z)} and len(pair) == 2
    # All frames, to be sure: brighter over the two scored frames is nearly always brighter over all four.
    bright = [base.decode_frames(part[k]).mean(dim=(1, 2, 3, 4)) for k in ("winner", "loser")]
    assert (bright[0] > bright[1]).float().mean() >= .75
    made.clear()
    dpo.sample_pairs(base, brightness, videos, share, 1, cfg)  # later rounds: from the model as it stands
    assert made[0][1] == {1.}


def strengths(base):
    return {layer.strength for layer in lora.layers(base.network).values()}


def test_dpos_reference_is_the_base(parts):
    """At step 0 the adapters add nothing, so the loss is ln 2 and moves the adapters only."""
    base, reward, _ = parts
    score = of(dpo, config(dpo), base, reward).score
    (z_w, text, *_), (z_l, *_), (eps, *_) = inputs(base), inputs(base, 1), inputs(base, 2)
    u = torch.tensor([.1, .7])
    R, _ = score((z_w, z_l, eps, u, text, torch.zeros(2)))
    assert abs(R.mean().item() + math.log(2)) > 1e-3 and strengths(base) == {1.}  # these adapters do something
    before = [layer.lora_B.detach().clone() for layer in lora.layers(base.network).values()]
    with torch.no_grad():
        for layer in lora.layers(base.network).values():
            layer.lora_B.zero_()
    R, _ = score((z_w, z_l, eps, u, text, torch.zeros(2)))
    assert R.tolist() == pytest.approx([-math.log(2)] * 2, abs=1e-4) and gradient(base, R).abs().max() > 0
    with torch.no_grad():
        for layer, B in zip(lora.layers(base.network).values(), before):
            layer.lora_B.copy_(B)


# ------------------------------------------- Whole runs: stopped, resumed, shared -------------------------------------------

def run(name, *argv):
    return train.main([*map(str, argv)], METHODS[name])


@pytest.mark.parametrize("module", [*(f"methods.{name}" for name in (*METHODS, "onestep")), "tiny.study", "tiny.build"])
def test_started_as_a_file_it_names_the_new_form(module):
    ended = subprocess.run([sys.executable, ROOT / f"{module.replace('.', '/')}.py"], capture_output=True, text=True)
    assert ended.returncode == 2 and f"python -m {module}" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_mix_with_a_video_reward_trains_by_every_method(name):
    """Image rewards see the method's own frames, video rewards whole clips in order; both are logged beside their sum."""
    Path("mine.py").write_text("red = lambda frames, captions: frames[:, :, 0].mean((2, 3))\n"
                               "last = lambda frames, captions: frames[:, -1:].mean((2, 3, 4))\nlast.num_frames = 4\n")
    flags = [*SHORT, *ONCE[name], "--steps", 1, "--reward", "mine.py:red"]
    assert run(name, *flags, "--reward", "mine.py:last=10", "--out", "mixed") == 0
    mixed, = metrics("mixed")
    assert mixed["reward"] > 2  # red alone is at most 1
    if name in ("draft", "refl", "vader"):  # the first step's videos are the same
        assert run(name, *flags, "--out", "alone") == 0
        assert mixed["mine:red"] == pytest.approx(metrics("alone")[0]["reward"], abs=1e-6)
        assert mixed["reward"] == pytest.approx(mixed["mine:red"] + 10 * mixed["mine:last"], abs=1e-5)


def stop_after(patch, step):
    """Sends this process a signal as soon as the metrics of a step are written."""
    real = run_folder.Run.log_step

    def log_step(self, at, *args):
        real(self, at, *args)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
    patch.setattr(run_folder.Run, "log_step", log_step)


# The others are stopped and go on in the same way; three of those with rounds are killed below.
@pytest.mark.parametrize("name", [name if name == "draft" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(name, monkeypatch, capsys):
    """The signal comes after the first step and is seen in the second, in the middle of a round where there are rounds."""
    steps, saved_at, more = {"ddpo": (6, 3, ["--updates", 3]), "rwr": (4, 2, ["--rounds", 1, "--videos", 2]),
                             "dpo": (4, 2, ["--rounds", 1, "--pairs", 2]), "nft": (4, 2, ["--group", 2]),
                             "adjoint": (3, 2, ["--steps-learned", 1])}.get(name, (3, 2, []))
    flags = [*SHORT, *more, "--steps", steps, "--save-every", 6, "--lr", "1e-3", "--warmup", 0]
    bases = []
    real = train.load_base
    monkeypatch.setattr(train, "load_base", lambda *args: bases.append(real(*args)) or bases[-1])
    assert run(name, *flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert run(name, *flags, "--out", "run") == 143
    assert "stopped; to go on: the same command with --resume run" in capsys.readouterr().out
    assert torch.load("run/state.pt", weights_only=True)["step"] == saved_at
    assert run(name, "--resume", "run") == 0
    assert_same_run("run", "whole")
    assert [line["step"] for line in metrics("run")] == [*range(1, steps + 1)]
    # It has learned something, and the frozen base has not.
    assert any(v.any() for k, v in load_file("run/lora.safetensors").items() if "lora_B" in k)
    fresh = load_base("tiny")
    assert lora.base_fingerprint(bases[-1].network) == fingerprint(fresh.network.state_dict())
    lora.set_scale(bases[-1].network, 0.)
    noise, text, *_ = inputs(fresh)
    with torch.no_grad():
        assert torch.equal(*(base.predict(noise, (9, .9, .4), text)[1] for base in (bases[-1], fresh)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpo", "dpo", "rwr"])
def test_killed_in_the_middle_of_a_round(name, monkeypatch):
    """The second. RWR and DPO go on within it, with the videos it has; DDPO at its start, without the rewards it had then."""
    more = {"rwr": ["--rounds", 2, "--videos", 2, "--save-every", 3], "dpo": ["--rounds", 2, "--pairs", 2, "--save-every", 3],
            "ddpo": ["--updates", 2, "--save-every", 2]}[name]
    flags = [*SHORT, *more, "--steps", 4, "--lr", "1e-3", "--warmup", 0]
    assert run(name, *flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        real = run_folder.Run.log_step
        patch.setattr(run_folder.Run, "log_step", lambda self, at, *args: sys.exit(9) if at == 4 else real(self, at, *args))
        with pytest.raises(SystemExit):
            run(name, *flags, "--out", "run")
    assert torch.load("run/state.pt", weights_only=True)["step"] == more[-1] and metrics("run")[-1]["step"] == 3
    assert run(name, "--resume", "run") == 0
    assert_same_run("run", "whole")


def test_a_signal_while_a_round_is_sampled_leaves_no_round(monkeypatch):
    real = common.sample

    def sample(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    flags = [*SHORT, *MORE["dpo"], "--steps", 2, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "sample", sample)
        assert run("dpo", *flags) == 130
    assert not list(Path("run").glob("round*")) and not list(Path("run").glob(".*"))
    assert run("dpo", "--resume", "run") == 0 and Path("run/round_001.safetensors").is_file()


def test_a_new_run_in_an_old_folder_takes_nothing_of_the_old_rounds():
    flags = [*SHORT, "--rounds", 2, "--pairs", 2, "--steps", 2]
    assert run("dpo", *flags, "--out", "run") == 0
    first = load_file("run/round_000.safetensors")
    assert run("dpo", *flags, "--out", "run", "--overwrite", "--seed", 1) == 0
    assert not torch.equal(load_file("run/round_000.safetensors")["winner"], first["winner"])
    refused("steps = 4: a run of several rounds keeps its steps", run, "dpo", "--resume", "run", "--steps", 4)
    Path("old").mkdir()
    Path("old/rewards.jsonl").write_text("x")
    run_folder.clear(Path("old"))
    assert not list(Path("old").iterdir())


@pytest.mark.parametrize("name", ["draft", "refl", "vader"])
def test_a_batch_is_the_same_on_one_rank_and_on_two(parts, monkeypatch, name):
    base, reward, _ = parts
    module = METHODS[name]
    draw = of(module, config(module, batch_size=4), base, reward).draw
    whole, shares = draw(3), []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank_and_size", lambda rank=rank: (rank, 2))
        shares.append(draw(3))
    for item, *parts_of_it in zip(whole, *shares):
        if isinstance(item, torch.Tensor):
            assert torch.equal(item, torch.cat(parts_of_it))
        else:
            assert item == sum(parts_of_it, [])
    assert len({fingerprint({"z": z}) for z in whole[0]}) == 4  # and all of them differ


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_real_ranks_give_what_one_gives(name):
    flags = [*map(str, [*SHORT, *MORE.get(name, []), "--steps", 2, "--batch-size", 4, "--lr", "1e-3", "--warmup", 0])]
    assert run(name, *flags, "--out", "one") == 0
    shared = [*flags, "--out", "two"]
    ended, _ = two_ranks(lambda rank: processes.run_script("train.py", lambda: train.main(shared, METHODS[name])))
    assert [status for status, _, _ in ended] == [0, 0], ended
    for a, b in zip(metrics("one"), metrics("two"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5) and a["loss"] == pytest.approx(b["loss"], abs=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
    one, two = load_file("one/lora.safetensors"), load_file("two/lora.safetensors")
    # Adam's first steps are lr for the smallest gradient: where rounding decides the sign, single weights differ by 2 lr.
    differing = [((one[k] - two[k]).abs() > 2e-4).float().mean().item() for k in one]
    assert max(differing) < .2 and sum(differing) / len(differing) < .02
    for file in Path("one").glob("round_*.safetensors"):
        x, y = load_file(file), load_file(Path("two", file.name))
        assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-2) for k in x)


# ------------------------------------------------- Settings -------------------------------------------------

@pytest.mark.parametrize("name, flags", [
    ("draft", ["--truncate", "random", "--grad-steps", "2", "--guidance", "1", "--lambda-tar", "0", "--low-memory",
               "--cache-interval", "2"]),
    ("draft", ["--detach-input", "--grad-at", "random", "--grad-steps", "1", "--checkpoint-activations"]),
    ("refl", ["--late", "1", "--cache-interval", "2", "--decode-chunk", "1", "--checkpoint-activations"]),
    ("vader", ["--eta", "0.5", "--frames-scored", "3", "--grad-steps", "2", "--lambda-tar", "1", "--clips-at-once", "1",
               "--cache-interval", "3"]),
    ("ddpo", ["--updates", "1", "--group", "2", "--clip-range", "0.1", "--timestep-fraction", "0.5", "--clips-at-once", "1"]),
    ("rwr", ["--rounds", "1", "--videos", "3", "--temperature", "0.5", "--offset-noise", "0.1", "--clips-at-once", "1"]),
    ("rwr", ["--data", "clips.txt", "--size", "32", "--workers", "0", "--no-cache", "--offset-noise", "0.1"]),
    ("dpo", ["--rounds", "1", "--pairs", "3", "--beta", "100", "--clips-at-once", "1", "--checkpoint-activations"]),
    ("nft", ["--updates", "1", "--group", "2", "--beta", "0.1", "--kl", "0", "--timestep-fraction", "1", "--clips-at-once", "1",
             "--sampling-guidance", "2"]),
    ("adjoint", ["--reward-scale", "10", "--steps-learned", "1", "--clips-at-once", "1", "--checkpoint-activations"]),
], ids=lambda v: v if isinstance(v, str) else v[0])
def test_every_option_runs(name, flags):
    write_footage(2)
    Path("prompts.txt").write_text("a blue ring moving up\nx.mp4|||a green square moving left|||16\na red cross moving right\n")
    if "--data" not in flags:
        flags = [*flags, "--prompts-train", "prompts.txt"]
    assert run(name, *SHORT, *flags, "--steps", 1, "--rank", 2, "--seed", 3, "--out", "run") == 0
    config = json.loads(Path("run/config.json").read_text())
    for flag, value in zip(flags, [*flags[1:], ""]):
        if flag.startswith("--") and not value.startswith("--") and value:
            recorded = str(config[flag[2:].replace("-", "_")]).removesuffix(".0")
            assert recorded == value or Path(recorded).name == value  # paths are recorded whole
    assert all(math.isfinite(line[k]) for line in metrics("run") for k in ("reward", "loss", "grad_norm"))
    if name in ("rwr", "dpo") and "--data" not in flags:
        assert load_file("run/round_000.safetensors")["prompt"].max() < 3  # of the file's three


@pytest.mark.parametrize("name", ["ddpo", "rwr", "dpo", "nft"])
def test_videos_that_are_compared_are_scored_on_the_same_frames(parts, monkeypatch, name):
    """TAR's weights depend on the frames: by frames of their own, videos that are all alike would get different R."""
    base, _, _ = parts
    found, video_rewards = [], train.video_rewards
    monkeypatch.setattr(train, "video_rewards", lambda *args: found.append(video_rewards(*args)) or found[-1])

    def alike(frames, captions):
        return torch.ones(frames.shape[:2])
    more = {"ddpo": {}, "rwr": {"videos": 4, "rounds": 1}, "dpo": {"pairs": 2}, "nft": {"group": 2}}[name]
    of(METHODS[name], config(METHODS[name], frames=16, num_steps=1, **more), base, alike).draw(0)
    R = torch.cat([R for R, _ in found])
    assert len(R) == 4 and (R == R[0]).all()


def test_rwr_weights_real_clips_by_their_own_reward(parts, monkeypatch):
    base, reward, _ = parts
    write_footage(2)
    cfg = config(rwr, data=Path("clips.txt"), size=32, cache=False, workers=0)
    z, eps, text, w, plain, t = of(rwr, cfg, base, reward).draw(0)
    batch = train.draw_batch(train.read_clips(cfg, base), 0, cfg, base)
    assert torch.equal(z, batch[0]) and torch.equal(eps, batch[1])
    g = torch.tensor([[0, 2], [0, 2]])  # the first frames of the two segments
    scores = train.score_frames(reward, train.decode_chosen(base, z, g), batch[4])
    torch.testing.assert_close(w, (scores * torch.exp(-(g - 2).abs())).mean(dim=1), rtol=1e-5, atol=1e-5)
    assert not w.requires_grad and t.shape == (2,)


def test_an_evaluation_before_and_after(plain, capsys):
    flags = [*SHORT, "--eval-every", 1, "--eval-count", 1, "--steps", 1, "--reward", "hpsv2", "--reward", "removal:watermark=0.5"]
    assert run("vader", *flags, "--out", "run") == 0
    assert [("eval" in line, line["step"]) for line in metrics("run")] == [(True, 0), (False, 1), (True, 1)]
    out = capsys.readouterr().out
    assert "before and after 1 steps" in out
    for name, line in zip(("reward_mean", "HPStiny", "removal:watermark"), out.split("over prompts):\n")[1].splitlines()):
        before, after = [each["eval"]["in_domain"][name] for each in metrics("run") if "eval" in each]
        assert f" {before:.4f} -> {after:.4f}   {after - before:+.4f} ± " in line and len(line) < 100


@pytest.mark.parametrize("name", METHODS)
def test_the_modelscope_preset_on_a_reduced_structure(name, capsys):
    Path("prompts.txt").write_text("a cat walking\na dog running\n")
    flags = ["--base", "random:32", "--reward-weights", "random:32", *SHORT, *ONCE[name], "--size", 32, "--steps", 1]
    refused("no prompts to train on: --prompts-train FILE must name some", run, name, "modelscope", *flags)
    if name in ("draft", "dpo"):  # the others differ in nothing that matters here
        assert run(name, "modelscope", *flags, "--prompts-train", "prompts.txt") == 0
        assert "HPSrandom" in capsys.readouterr().err  # never to be taken for a score
    preset = METHODS[name].PRESETS["modelscope"]
    METHODS[name].check(replace(preset, prompts_train=Path("prompts.txt"), prompts=("a=prompts.txt",)))
    assert (preset.preset, preset.base, preset.steps) == ("modelscope", "ali-vilab/text-to-video-ms-1.7b", 20_000)


@pytest.mark.parametrize("name, argv, message", [
    ("draft", "--truncate all", "truncate 'all': must be fixed or random"),
    ("draft", "--grad-at first", "grad_at 'first': must be last, or with detach_input uniform or random"),
    ("draft", "--detach-input --cache-interval 2", "detach_input: cannot be had with a cache_interval above 1"),
    ("draft", "--prompts-train nowhere.txt", "nowhere.txt: not a text file"),
    ("refl", "--late nan", "late = nan: must be above 0 and at most 1"), ("vader", "--eta 1.5", "eta = 1.5: must be from 0 to 1"),
    ("vader", "--frames-scored 17", "frames_scored = 17: must be from 0 to 16"),
    ("ddpo", "--group 3", "batch_size = 8: must be a multiple of 3, group"),
    ("ddpo", "--updates 3", "steps = 40: must be a multiple of 3, the updates of a round"),
    ("ddpo", "--save-every 5", "save_every = 5: must be a multiple of 2"),
    ("ddpo", "--updates 0", "updates = 0: must be at least 1"),
    ("ddpo", "--clip-range 0", "clip_range = 0.0: must be a finite number above 0"),
    ("ddpo", "--timestep-fraction 2", "timestep_fraction = 2.0: must be at most 1"),
    ("rwr", "--temperature 0", "temperature = 0.0: must be a finite number above 0"),
    ("rwr", "--rounds 3", "steps = 40: must be a multiple of 3, the rounds"),
    ("dpo", "--beta 0", "beta = 0.0: must be a finite number above 0"), ("nft", "--group 1", "group = 1: must be at least 2"),
    ("nft", "--beta 0", "beta = 0.0: must be a finite number above 0"), ("nft", "--kl -1", "kl = -1.0: must be at least 0"),
    ("adjoint", "--reward-scale -1", "reward_scale = -1.0: must be at least 0"),
    ("adjoint", "--steps-learned 20", "steps_learned = 20: must be below num_steps = 20")])
def test_what_is_refused_is_refused_in_one_line_and_writes_nothing(name, argv, message):
    refused(re.escape(message), run, name, "--device", "cpu", *argv.split(), "--out", "run")
    assert not Path("run").exists()


@pytest.mark.parametrize("flag", ["--tau", "--data", "--cache-dir", "--offset-noise"])
def test_settings_of_clips_are_no_settings_of_prompts(flag, capsys):
    with pytest.raises(SystemExit):
        run("draft", flag, "1")
    assert f"Unrecognized options: {flag}" in capsys.readouterr().err


def test_a_run_of_one_method_is_not_continued_by_another():
    assert run("draft", *SHORT, "--steps", 1, "--out", "run") == 0
    for name in ("refl", "dpo"):
        refused("run/config.json: .*; not known or missing: detach_input, grad_at, trunc", run, name,
                "--resume", "run")
    Path("run/config.json").write_text(json.dumps(settings.to_record(train.Config())))
    refused("not the settings of this method or version; not known or missing: prompts_train", run, "refl", "--resume", "run")
    for module in METHODS.values():
        assert {f.name for f in fields(train.Config)} < {f.name for f in fields(module.Config)}


def test_the_docs_method_of_ones_own_runs(monkeypatch):
    example = docs_example("methods.md", "")
    assert len(example.splitlines()) <= 45
    Path("own.py").write_text(example)
    spec = importlib.util.spec_from_file_location("own", "own.py")
    own = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own", own)
    spec.loader.exec_module(own)
    assert train.main([*SHORT, "--steps", "2", "--tau", "0.5", "--out", "run"], own) == 0
    assert any(v.any() for k, v in load_file("run/lora.safetensors").items() if "lora_B" in k)
    Path("prompts.txt").write_text("a cat\n")
    full_size = settings.parse(["modelscope", "--prompts-train", "prompts.txt", "--eval-every", "0"], own.PRESETS, "")
    own.check(full_size)
    assert (full_size.base, full_size.tau) == (train.PRESETS["modelscope"].base, .6)
