"""methods/nft.py and methods/adjoint.py: what must be exactly true of them. That they run, test_methods.py sees."""
import pytest
import torch
from conftest import CAPTIONS, apart, gradient, tuned_base

import lora
import sampler
import train
from formats.tensors import fingerprint
from methods import adjoint, common, nft
from model import load_base
from reward import load_reward
from support.ranks import sample_generator


@pytest.fixture(scope="module")
def tuned():
    """(base whose adapters do something, z and eps of two videos of four frames, text, the adapters)."""
    base, g = tuned_base(std=.05), torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 2, *base.latent_shape(4, 32, 32), generator=g)
    return base, z, eps, base.encode_text(CAPTIONS), nft.swap_adapters(base.network, {})


def config(**changes):
    return nft.Config(**(dict(frames=4, segments=2, num_steps=20, kl=0.) | changes))


@pytest.mark.parametrize("beta", [.1, 1.])
def test_where_a_round_begins_the_gradient_is_the_denoising_loss_weighted_by_the_advantage(tuned, beta):
    base, z, eps, text, old = tuned
    A, steps = torch.tensor([2., -1.]), [5, 14]
    R = nft.nft_rewards(base, old, (z, eps, A / 10 + .5, steps, text), config(beta=beta))
    by_hand = 0.
    for b, i in enumerate(steps):
        levels = base.levels(20)
        z_t = sampler.add_noise(z[b:b + 1], eps[b:b + 1], levels, i)
        off = base.predict(z_t, (levels.t[i], levels.alpha[i], levels.sigma[i]), text[b:b + 1])[0] - z[b:b + 1]
        by_hand = by_hand - A[b] * off.square().mean() / off.detach().abs().mean()
    assert apart(gradient(base, R), gradient(base, by_hand)) < 1e-3


def test_r_compares_the_videos_of_a_prompt_by_the_deviation_of_all():
    rewards = torch.tensor([1., 3., 10., 10.])
    std = rewards.std(correction=0) + 1e-4
    expected = torch.stack([-1 / std, 1 / std, 0 * std, 0 * std]) / 10 + .5
    torch.testing.assert_close(nft.optimality(rewards, 2), expected)
    far = nft.optimality(torch.tensor([0.] * 99 + [100.]), 100)
    assert far.max() == 1. and far.min() > .4  # 9.9 deviations are limited to 5
    assert nft.optimality(torch.tensor([.7, .7]), 2).tolist() == [.5, .5]  # a deviation of 0


def test_the_mixtures_step_from_the_old_model_to_the_new_one_and_against_it():
    z, z_0, old = torch.randn(3, 2, 4, 2, 2, 2)
    good = nft.nft_loss(z_0, old, z, torch.ones(2), beta=1.)
    torch.testing.assert_close(good, nft.scaled_error(z_0, z))
    bad = nft.nft_loss(2 * old - z_0, old, z, torch.zeros(2), beta=1.)  # mirrored, it is the other one
    torch.testing.assert_close(bad, good)


def test_the_old_model_and_the_base_are_only_asked(tuned):
    """And the distance to the base is the base's own error, between what the two predict."""
    base, z, eps, text, old = tuned
    before, other = fingerprint(lora.adapter_state(base.network)), {}
    for name, tensor in old.items():
        other[name] = 2 * tensor
    batch = z, eps, torch.tensor([1., 0.]), [5, 14], text
    R, far = nft.nft_rewards(base, other, batch, config()), nft.nft_rewards(base, other, batch, config(kl=10.))
    assert fingerprint(lora.adapter_state(base.network)) == before
    assert not torch.equal(R, nft.nft_rewards(base, old, batch, config()))
    assert {layer.strength for layer in lora.layers(base.network).values()} == {1.}
    levels = base.levels(20)
    for b, i in enumerate(batch[3]):
        z_t, level = sampler.add_noise(z[b:b + 1], eps[b:b + 1], levels, i), (levels.t[i], levels.alpha[i], levels.sigma[i])
        _, guess = base.predict(z_t, level, text[b:b + 1])
        lora.set_scale(base.network, 0.)
        _, by_base = base.predict(z_t, level, text[b:b + 1])
        lora.set_scale(base.network, 1.)
        assert (R - far)[b].item() == pytest.approx(10 * (guess - by_base).square().mean().item(), rel=1e-3)


@pytest.fixture(scope="module")
def fresh():
    """(base whose adapters do nothing yet, reward, the batch of two videos of four frames, config of four steps)."""
    base, g = load_base("tiny"), torch.Generator().manual_seed(0)
    lora.inject(base.network, 4, generator=g)
    noise = torch.randn(2, *base.latent_shape(4, 32, 32), generator=g)
    keys = [(0, 0, b, "chain") for b in range(2)]
    batch = noise, base.encode_text(CAPTIONS), torch.tensor([[0, 2], [1, 3]]), CAPTIONS, keys
    cfg = adjoint.Config(frames=4, segments=2, num_steps=4, guidance=1., reward_scale=7., steps_learned=3)
    return base, load_reward(base_folder=base.folder), batch, cfg


def reward_after(base, reward, batch, cfg, z, first):
    """R of what the chain makes of z from step `first` on, with gradient through all of it and the noise of sample_path."""
    _, text, g, captions, keys = batch
    generators = [sample_generator(*key) for key in keys]
    new = [torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]) for _ in range(cfg.num_steps)]
    z_0 = sampler.chain(base.predict, z, text, None, base.levels(cfg.num_steps), first, 1., cfg.num_steps, 1.,
                        new[cfg.num_steps - first:])
    return train.video_rewards(base, reward, z_0, g, captions, cfg)[0]


def test_the_adjoint_is_backpropagation_through_the_bases_chain(fresh):
    base, reward, batch, cfg = fresh
    noise, text, _, _, keys = batch
    path, _ = common.sample_path(base, noise, text, None, keys, cfg)
    a = through_chain(base, reward, batch, cfg, path[4], 0)
    found = adjoint.adjoints(base, path, a, text, cfg)
    for i in range(1, 5):
        assert apart(found[i][1], through_chain(base, reward, batch, cfg, path[4 - (i - 1)], i - 1)) < 1e-3, i


def through_chain(base, reward, batch, cfg, z, first):
    """-lambda dR/dz, z being where chain step `first` starts."""
    z = z.detach().requires_grad_()
    R = reward_after(base, reward, batch, cfg, z, first)
    return torch.autograd.grad(-cfg.reward_scale * R.sum(), z)[0]


def test_at_the_base_the_losses_of_all_steps_have_the_rewards_own_gradient(fresh):
    base, reward, batch, cfg = fresh
    noise, text, _, _, keys = batch
    path, _ = common.sample_path(base, noise, text, None, keys, cfg)
    found = adjoint.adjoints(base, path, through_chain(base, reward, batch, cfg, path[4], 0), text, cfg)
    loss = 0.
    for i, (base_mean, a) in found.items():
        mean, std = common.policy(base, path[4 - i], i, text, None, cfg)
        of_step = adjoint.adjoint_loss(mean, base_mean, std, a)
        torch.testing.assert_close(of_step, (std * a).square().flatten(1).sum(1), rtol=1e-3, atol=0)  # no control yet
        loss = loss + of_step
    whole = reward_after(base, reward, batch, cfg, noise, 4)
    assert apart(gradient(base, loss / 2), gradient(base, -cfg.reward_scale * whole)) < 1e-3


def test_without_a_reward_the_base_is_the_optimum():
    base = tuned_base(std=.05)
    z, text = torch.randn(2, *base.latent_shape(4, 32, 32)), base.encode_text(CAPTIONS)
    cfg = adjoint.Config(frames=4, segments=2, num_steps=4)
    before = fingerprint(lora.adapter_state(base.network))
    found = adjoint.adjoints(base, [z] * 5, torch.zeros_like(z), text, cfg)
    for i, (base_mean, a) in found.items():
        lora.set_scale(base.network, 0.)
        mean, std = common.policy(base, z, i, text, None, cfg)
        lora.set_scale(base.network, 1.)
        assert not a.any() and adjoint.adjoint_loss(mean, base_mean, std, a).max() < 1e-6
        tuned, _ = common.policy(base, z, i, text, None, cfg)
        assert adjoint.adjoint_loss(tuned, base_mean, std, a).min() > 1e-3
    assert fingerprint(lora.adapter_state(base.network)) == before


def test_half_of_the_steps_are_noisy_and_none_is_without_noise():
    cfg, without_last = adjoint.Config(num_steps=20, steps_learned=4), [0., 0.] + [1.] * 19
    drawn = [adjoint.chosen_steps(step, without_last, cfg) for step in range(30)]
    for steps in drawn:
        assert len({*steps}) == 4 and sum(i > 8 for i in steps) == 2
    assert {*sum(drawn, [])} == {*range(2, 21)}
