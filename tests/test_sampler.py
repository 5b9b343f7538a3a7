"""sampler.py: Eqs. (3)-(5) by hand-written numbers, DDIM against diffusers' scheduler, the gradient of edit() by hand."""
import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import sampler
from model import UNet3D, UNetConfig
from sampler import Levels, add_noise, alpha_bars, check_edit, ddim_levels, ddpm_step, edit_steps, guided, noise_step, step
from tests.conftest import randn, refused


class Denoiser(nn.Module):
    """The cheapest eps(z_t, t, text) that depends on everything it is given; notes how it is called."""
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1, dtype=torch.float64)
        self.read = nn.Linear(6, 4, dtype=torch.float64)
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=i) / 10
        self.calls = []

    def forward(self, z_t, t, text):
        self.calls.append((z_t.shape, t.clone(), torch.is_grad_enabled()))
        h = self.read(text.tanh().mean(1)) * (t[:, None] / 1000).cos().to(text)                   # (2B, C)
        return (self.conv(z_t) + h[:, :, None, None, None]).tanh()                                # (2B, C, F, H, W)


class Guess:
    """predict(z_t, level, text) -> z_0, eps, as a base has it, of a network that guesses eps."""
    def __init__(self, network):
        self.network = network

    def __call__(self, z_t, level, text):
        t, alpha, sigma = level
        eps = self.network(z_t, torch.full((len(z_t),), t), text)
        return (z_t - sigma * eps) / alpha, eps


def levels(D=20):
    return ddim_levels(D, alpha_bars())


def sample(network, z, text, uncond, num_steps=20, guidance=3.):
    return sampler.sample(Guess(network), z, text, uncond, levels(num_steps), guidance)


def edit(network, z, eps, text, uncond, tau=.6, num_steps=20, guidance=3., grad_steps=1):
    return sampler.edit(Guess(network), z, eps, text, uncond, levels(num_steps), tau, guidance, grad_steps)


def inputs(B=2, F=3, H=4, W=5, N=7, E=6):
    """z, eps (B, C, F, H, W), text (B, N, E), uncond (1, N, E)."""
    return (randn(B, 4, F, H, W, seed=10), randn(B, 4, F, H, W, seed=11), randn(B, N, E, seed=12), randn(1, N, E, seed=13))


# ---- Eq. (3): d(i) ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("D", "steps"), [
    (20, [1, 51, 101, 151, 201, 251, 301, 351, 401, 451, 501, 551, 601, 651, 701, 751, 801, 851, 901, 951]),
    (50, list(range(1, 1000, 20))), (7, [1, 143, 285, 427, 569, 711, 853]), (1, [1]),
    (3, [1, 334, 667]),                                # T / D = 333.3 is rounded down
    (600, list(range(1, 601))), (999, list(range(1, 1000)))])  # floor(1000 / 600) = 1
def test_ddpm_steps_by_hand(D, steps):
    assert [ddpm_step(i, D) for i in range(1, D + 1)] == steps
    assert [ddpm_step(i, 4, num_train_steps=100) for i in (1, 2, 3, 4)] == [1, 26, 51, 76]  # of another training length


@pytest.mark.parametrize(("i", "D"), [
    (0, 20), (-1, 20), (21, 20), (1, 0), (1, -5), (1, 1000), (999, 1000), (1000, 1000), (1, 2000)])
def test_ddpm_step_outside_the_chain_is_refused(i, D):
    refused("must be from 1 to", ddpm_step, i, D)


# ---- Eq. (4): t_noi = d(tau D) ---------------------------------------------------------------------------

@pytest.mark.parametrize(("tau", "D", "n", "t_noi"), [
    (0.6, 20, 12, 551),                                # the paper's
    (1.0, 20, 20, 951),
    (0.05, 20, 1, 1),
    (0.6, 50, 30, 581),
    (0.57, 100, 57, 561),                              # 0.57 * 100 is 56.99999999999999
    (0.29, 100, 29, 281),                              # so is 28.999999999999996
    (0.33, 10, 3, 201),
    (0.37, 10, 4, 301),                                # rounded to the nearest, not down
])
def test_noise_step_by_hand(tau, D, n, t_noi):
    assert edit_steps(tau, D) == n and noise_step(tau, D) == t_noi


@pytest.mark.parametrize(("tau", "D", "what"), [
    (0, 20, "tau = 0: must be above 0 and at most 1"), (-0.5, 20, "must be above 0"), (1.01, 20, "at most 1"),
    (math.nan, 20, "tau = nan"), (math.inf, 20, "tau = inf"), (0.02, 20, "rounds to no step"),  # 0.4 of a step
    (0.6, 1000, "num_steps = 1000: must be from 1 to 999"), (0.6, 5000, "num_steps = 5000")])
def test_noise_step_out_of_range_is_refused(tau, D, what):
    z, eps, text, uncond = inputs()
    for call in (lambda: noise_step(tau, D), lambda: edit(None, z, eps, text, uncond, tau, D)):  # before any work: no model
        refused(what, call)
    refused("rounds to no step", noise_step, 0.6, 0)


# ---- abar and Eq. (5) ------------------------------------------------------------------------------------

def scheduler(**settings):
    """diffusers' DDIM as the published scheduler_config.json sets it up."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading", **settings)


def test_alpha_bars_are_the_scaled_linear_schedule():
    a = alpha_bars()
    assert a.shape == (1000,) and a.dtype == torch.float64 and a.device.type == "cpu"
    assert a[0].item() == pytest.approx(1 - 0.00085, abs=1e-15)
    assert (a[1:] < a[:-1]).all() and 0 < a[-1] < 0.005                                           # almost pure noise at T
    torch.testing.assert_close(a, scheduler().alphas_cumprod.double(), rtol=1e-4, atol=1e-6)      # theirs is a float32 product
    torch.testing.assert_close(alpha_bars(100, 0.001, 0.02), DDIMScheduler(
        100, 0.001, 0.02, "scaled_linear").alphas_cumprod.double(), rtol=1e-5, atol=1e-6)


def test_add_noise_is_eq_5():
    z, eps, _, _ = inputs()
    for i, t in ((0, 0), (1, 1), (12, 551), (20, 951)):
        a = alpha_bars()[t].item()
        by_hand = math.sqrt(a) * z + math.sqrt(1 - a) * eps
        torch.testing.assert_close(add_noise(z, eps, levels(), i), by_hand, rtol=1e-14, atol=1e-14)
    theirs = scheduler().add_noise(z, eps, torch.tensor([551]))
    torch.testing.assert_close(add_noise(z, eps, levels(), 12), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_add_noise_keeps_dtype_and_device(dtype):
    z, eps, _, _ = inputs()
    out = add_noise(z.to(dtype), eps, levels(), 12)                                               # eps is float64 throughout
    assert out.dtype == dtype and out.device == z.device and out.shape == z.shape
    torch.testing.assert_close(out.double(), add_noise(z, eps, levels(), 12), rtol=0, atol=0.05)
    assert add_noise(z.to("meta", dtype), eps.to("meta"), levels(), 12).device.type == "meta"


# ---- One step, which is DDIM's, Euler's of a rectified flow and Euler's of EDM ---------------------------

@pytest.mark.parametrize("D", [20, 50, 7, 1])
def test_a_step_with_the_true_noise_stays_on_the_path(D):
    # Of the true z_0 and eps, a step makes what Eq. (5) makes at the next level.
    z, eps, _, _ = inputs()
    for i in range(D, 0, -1):
        mean, std = step(z, eps, levels(D), i)
        assert std == 0
        torch.testing.assert_close(mean, add_noise(z, eps, levels(D), i - 1), rtol=1e-12, atol=1e-12)


def test_levels_are_eq_3_and_end_at_abar_0_not_at_1():
    L = levels(20)
    assert L.t == [0, *(ddpm_step(i, 20) for i in range(1, 21))] and L.num_steps == 20 and L.start == 1
    for t, alpha, sigma in zip(L.t, L.alpha, L.sigma):
        assert alpha**2 == pytest.approx(alpha_bars()[t].item(), rel=1e-14) and alpha**2 + sigma**2 == pytest.approx(1, rel=1e-14)
    assert L.sigma[0] == pytest.approx(math.sqrt(.00085))  # some noise is left
    assert levels(7).t[:3] == [0, 1, 143] and levels(600).t[:3] == [0, 1, 2]


@pytest.mark.parametrize("eta", [0., .5, 1.])
def test_the_new_noise_is_ddims(eta):
    L, (z, eps, _, _) = levels(20), inputs()
    for i in (1, 2, 12, 20):
        a, a_prev = L.alpha[i] ** 2, L.alpha[i - 1] ** 2
        mean, std = step(z, eps, L, i, eta)
        by_hand = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)             # DDIM, Eq. (16)
        assert std == pytest.approx(by_hand, rel=1e-9)
        torch.testing.assert_close(mean, math.sqrt(a_prev) * z + math.sqrt(1 - a_prev - by_hand**2) * eps)


def test_the_same_step_is_eulers_of_a_rectified_flow_and_of_edm():
    z_t, v, _, _ = inputs()
    flow = Levels([300, 700], [.7, .3], [.3, .7])                       # z_t = (1 - s) z_0 + s eps, and v = eps - z_0
    mean, _ = step(z_t - .7 * v, z_t + .3 * v, flow, 1)
    torch.testing.assert_close(mean, z_t + (.3 - .7) * v, rtol=1e-12, atol=1e-12)
    edm, z_0 = Levels([0, 1], [1., 1.], [2., 5.]), v                    # z_t = z_0 + s eps, and dz / ds = (z_t - z_0) / s
    mean, _ = step(z_0, (z_t - z_0) / 5, edm, 1)
    torch.testing.assert_close(mean, z_t + (2 - 5) * (z_t - z_0) / 5, rtol=1e-12, atol=1e-12)
    # A chain that ends without noise ends at z_0, with nothing new in its last step, from any signal, even none.
    ending = Levels([0, 500, 1000], [1., .5, 0.], [0., .5, 1.])
    assert ending.fresh == [0., 0., .5] and torch.equal(step(z_0, v, ending, 1, eta=1.)[0], z_0)


def test_new_noise_comes_in_at_each_step():
    L, (z, _, text, uncond) = levels(4), inputs()
    noises, seen = [randn(*z.shape, seed=40 + k) for k in range(4)], []
    ours = sampler.sample(Guess(Denoiser()), z, text, uncond, L, 2., eta=.7, fresh=noises)
    for i, noise in zip((4, 3, 2, 1), noises):
        mean, std = step(*guided(Guess(Denoiser()), z, L, i, text, uncond, 2.), L, i, .7)
        z = mean + std * noise
        seen.append(std)
    assert torch.equal(ours, z) and min(seen) > 0


def test_a_video_starts_as_loud_as_its_levels_say():
    z, _, text, uncond = inputs()
    loud = Levels([0, 1], [1., 1.], [0., 700.], start=700.)
    seen = []
    sampler.sample(lambda z_t, level, text: (seen.append((z_t, level)) or z_t, z_t), z, text, uncond, loud)
    assert torch.equal(seen[0][0], torch.cat([700 * z, 700 * z])) and seen[0][1] == (1, 1., 700.)


def diffusers_chain(model, z, text, uncond, D, guidance, first=None):
    """The chain as a diffusers pipeline writes it: two separate calls, their scheduler's steps."""
    theirs = scheduler()
    theirs.set_timesteps(D)
    with torch.no_grad():
        for t in theirs.timesteps[-(first or D):]:
            steps = t.repeat(len(z))
            eps_u, eps_c = model(z, steps, uncond.expand(len(z), -1, -1)), model(z, steps, text)
            z = theirs.step(eps_u + guidance * (eps_c - eps_u), t, z).prev_sample
    return z


@pytest.mark.parametrize(("D", "guidance"), [(5, 9.0), (20, 3.0), (7, 3.0), (1, 2.0), (600, 1.5)])
def test_sample_matches_diffusers(D, guidance):
    z, _, text, uncond = inputs()
    ours = sample(Denoiser(), z, text, uncond, num_steps=D, guidance=guidance)
    theirs = diffusers_chain(Denoiser(), z, text, uncond, D, guidance)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def small_unet(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet3D(UNetConfig(channels=(8, 16), blocks_per_level=1, attention_levels=(True, False), context_dim=6,
                                 head_dim=4, stem_heads=2, norm_groups=4))
        for p in unet.parameters():  # the published initialisation has zeros that would hide parts of the network
            nn.init.normal_(p, std=0.15)
    return unet.to(dtype)


def test_sample_and_edit_match_diffusers_on_the_unet():
    unet, (z, eps, text, uncond) = small_unet(), inputs()
    theirs = diffusers_chain(unet, z, text, uncond, 5, 9.0)
    torch.testing.assert_close(sample(unet, z, text, uncond, num_steps=5, guidance=9.0), theirs,
                               rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    z_noi = scheduler().add_noise(z, eps, torch.tensor([401]))                                    # d(3), D = 5
    theirs = diffusers_chain(unet, z_noi, text, uncond, 5, 3.0, first=3)
    torch.testing.assert_close(edit(unet, z, eps, text, uncond, tau=0.6, num_steps=5, guidance=3.0).detach(), theirs,
                               rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


# ---- Classifier-free guidance ----------------------------------------------------------------------------

def test_both_branches_in_one_call_on_a_doubled_batch():
    model, (z, eps, text, uncond) = Denoiser(), inputs(B=3)
    edit(model, z, eps, text, uncond, tau=0.6, num_steps=20)
    assert len(model.calls) == 12                                                                 # tau D calls
    for i, (shape, t, _) in zip(range(12, 0, -1), model.calls):
        assert shape == (6, *z.shape[1:])
        assert t.tolist() == [ddpm_step(i, 20)] * 6 and t.dtype == torch.int64
    model.calls.clear()
    sample(model, z, text, uncond, num_steps=5)
    assert [t[0].item() for _, t, _ in model.calls] == [801, 601, 401, 201, 1]


def test_guidance_extrapolates_from_unconditional_to_conditional():
    model, (z, _, text, uncond) = Denoiser(), inputs()
    t = torch.full((2,), 551)
    eps_c, eps_u = model(z, t, text), model(z, t, uncond.expand(2, -1, -1))
    for w, expected in ((0.0, eps_u), (1.0, eps_c), (3.0, 3 * eps_c - 2 * eps_u)):
        z_0, eps = guided(Guess(model), z, levels(), 12, text, uncond, w)
        torch.testing.assert_close(eps, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(add_noise(z_0, eps, levels(), 12), z, rtol=1e-12, atol=1e-12)  # both say the same


def test_guidance_1_is_the_conditional_chain():
    z, _, text, uncond = inputs()
    ours = sample(Denoiser(), z, text, uncond, num_steps=10, guidance=1.0)
    torch.testing.assert_close(ours, sample(Denoiser(), z, text, text, num_steps=10, guidance=7.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, sample(Denoiser(), z, text, 0 * uncond, num_steps=10, guidance=1.0), rtol=1e-12, atol=1e-12)


def test_uncond_may_be_shared_or_one_per_clip():
    z, eps, text, uncond = inputs(B=3)
    each = uncond.repeat(3, 1, 1)
    assert torch.equal(sample(Denoiser(), z, text, uncond, num_steps=4), sample(Denoiser(), z, text, each, num_steps=4))
    assert torch.equal(edit(Denoiser(), z, eps, text, uncond, num_steps=4), edit(Denoiser(), z, eps, text, each, num_steps=4))
    # And a clip's own is the one it gets.
    own = randn(3, 7, 6, seed=20)
    alone = edit(Denoiser(), z[1:2], eps[1:2], text[1:2], own[1:2], num_steps=4)
    torch.testing.assert_close(edit(Denoiser(), z, eps, text, own, num_steps=4)[1:2], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Denoiser, small_unet])
def test_a_clip_does_not_depend_on_its_neighbours(make):
    model, (z, eps, text, uncond) = make(), inputs(B=3)
    together = edit(model, z, eps, text, uncond, num_steps=5)
    for b in range(3):
        alone = edit(model, z[b:b + 1], eps[b:b + 1], text[b:b + 1], uncond, num_steps=5)
        torch.testing.assert_close(together[b:b + 1], alone, rtol=1e-10, atol=1e-10)


# ---- The gradient of an edit: through the last K steps, and through no other (Sec. 3.3) ------------------

def chain_by_hand(model, z, eps, text, uncond, tau, D, guidance, K):
    """The same chain run entirely with gradient, and cut before its last K steps, by noise alone."""
    abar, n = alpha_bars(), round(tau * D)
    a = abar[1000 // D * (n - 1) + 1]
    z_t = a.sqrt() * z + (1 - a).sqrt() * eps
    for i in range(n, 0, -1):
        t = 1000 // D * (i - 1) + 1
        if i == K:
            z_t = z_t.detach()
        both = model(torch.cat([z_t, z_t]), torch.tensor([t] * 2 * len(z)), torch.cat([text, uncond.repeat(len(z), 1, 1)]))
        eps_c, eps_u = both[:len(z)], both[len(z):]
        e = eps_u + guidance * (eps_c - eps_u)
        a, a_prev = abar[t].item(), abar[max(t - 1000 // D, 0)].item()
        z_t = a_prev**0.5 * ((z_t - (1 - a)**0.5 * e) / a**0.5) + (1 - a_prev)**0.5 * e
    return z_t


def gradients(model, z_0):
    """The gradient of a random projection of z_0 in every parameter."""
    return torch.autograd.grad((z_0 * randn(*z_0.shape, seed=30)).sum(), list(model.parameters()), retain_graph=True)


@pytest.mark.parametrize("make", [Denoiser, small_unet])
@pytest.mark.parametrize(("tau", "D", "K"), [(0.6, 5, 1), (0.6, 5, 2), (1.0, 4, 3), (0.75, 4, 3)])
def test_edit_is_the_full_chain_cut_by_hand(make, tau, D, K):
    model, data = make(), inputs()
    ours = edit(model, *data, tau=tau, num_steps=D, guidance=3.0, grad_steps=K)
    theirs = chain_by_hand(model, *data, tau, D, 3.0, K)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(model, ours), gradients(model, theirs)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        assert a.abs().sum() > 0


def test_all_steps_with_gradient_is_the_full_gradient():
    model, data = Denoiser(), inputs()
    data[0].requires_grad_()
    z_0 = edit(model, *data, tau=0.6, num_steps=5, grad_steps=3)
    full = chain_by_hand(model, *data, 0.6, 5, 3.0, K=None)
    for a, b in zip(gradients(model, z_0), gradients(model, full)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # The whole way back to the clip is open, and closed with one step less.
    assert torch.autograd.grad(z_0.sum(), data[0])[0].abs().sum() > 0
    z_0 = edit(model, *data, tau=0.6, num_steps=5, grad_steps=2)
    assert torch.autograd.grad(z_0.sum(), data[0], allow_unused=True) == (None,)


def test_K_changes_the_gradient_and_not_the_clip():
    model, data = Denoiser(), inputs()
    edits = [edit(model, *data, num_steps=5, grad_steps=K) for K in (1, 2, 3)]
    assert torch.equal(edits[0], edits[1]) and torch.equal(edits[0], edits[2])
    weights = [gradients(model, z_0)[0] for z_0 in edits]
    assert not torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[1], weights[2])


def test_both_guidance_branches_carry_gradient():
    model, (z, eps, text, uncond) = Denoiser(), inputs()
    text.requires_grad_(), uncond.requires_grad_()
    edit(model, z, eps, text, uncond, num_steps=5).sum().backward()
    assert (text.grad != 0).all() and (uncond.grad != 0).all()


@pytest.mark.parametrize("K", [0, -1, 4, 20])
def test_K_outside_the_edit_is_refused(K):
    for call in (lambda: check_edit(0.6, 5, K), lambda: edit(None, *inputs(), tau=0.6, num_steps=5, grad_steps=K)):
        refused(f"grad_steps = {K}: must be from 1 to 3", call)


def saved_tensors(run, *args, **settings):
    """How many tensors autograd keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        run(*args, **settings)
    return len(kept)


def test_the_graph_does_not_grow_with_the_chain():
    model, data = small_unet(torch.float32), [x.float() for x in inputs(B=1, F=2, H=2, W=2)]
    kept = [saved_tensors(edit, model, *data, tau=tau, num_steps=D) for tau, D in ((0.6, 5), (0.6, 20), (1.0, 20), (0.6, 50))]
    assert len(set(kept)) == 1 and kept[0] > 100
    twice = saved_tensors(edit, model, *data, num_steps=5, grad_steps=2)                          # it grows with K alone
    assert 1.9 * kept[0] < twice < 2.1 * kept[0]


def test_only_the_last_K_steps_run_with_gradient():
    model = Denoiser()
    edit(model, *inputs(), num_steps=20, grad_steps=2)
    assert [grad for _, _, grad in model.calls] == [False] * 10 + [True] * 2
    model.calls.clear()
    with torch.no_grad():  # an evaluation of edits asks for no gradient at all
        assert not edit(model, *inputs(), num_steps=5).requires_grad
    assert not any(grad for _, _, grad in model.calls)


def test_sample_builds_no_graph():
    model, (z, _, text, uncond) = Denoiser(), inputs()
    text.requires_grad_()
    assert not sample(model, z, text, uncond, num_steps=5).requires_grad
    assert saved_tensors(sample, model, z, text, uncond, num_steps=5) == 0
    assert torch.is_grad_enabled()


def test_the_levels_are_an_argument():
    z, eps, text, uncond = inputs()
    other, model = ddim_levels(4, alpha_bars(100, 0.001, 0.02)), Denoiser()
    sampler.sample(Guess(model), z, text, uncond, other)
    sampler.edit(Guess(model), z, eps, text, uncond, other, tau=0.5)
    assert [t[0].item() for _, t, _ in model.calls] == [76, 51, 26, 1, 26, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chains_keep_the_dtype(dtype):
    z, eps, text, uncond = (x.to(dtype) for x in inputs())
    model = Denoiser().to(dtype)
    assert sample(model, z, text, uncond, num_steps=2).dtype == dtype
    z_0 = edit(model, z, eps, text, uncond, num_steps=5)
    assert z_0.dtype == dtype and z_0.requires_grad


def test_noise_of_another_batch_size_is_refused_not_shared():
    z = torch.zeros(2, 1, 1, 2, 2)
    for shape in ((1, 1, 1, 2, 2), (3, 1, 1, 2, 2), (2, 1, 1, 2, 1)):
        refused(r"eps has shape \[.*\]: must be \[2, 1, 1, 2, 2\], that of z", edit, None, z, torch.zeros(shape),
                torch.zeros(2, 1, 1), torch.zeros(1, 1, 1))
