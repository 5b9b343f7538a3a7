"""
Noise a clip part of the way, denoise it back, and let the gradient through the last step only.

Paper: InstructVideo (arXiv:2312.12490), Secs. 3.1 and 3.2.1, Eqs. (3)-(5).

Sampling a video from pure noise takes D network calls, and a reward's gradient through all of
them would take D times the memory. InstructVideo makes two cuts. It starts from a real clip that is
noised to t_noi = d(tau D): only tau D steps are left, and the result is near real video from the
start. And only the last K of these steps build a graph, so memory does not grow with D.

One step serves every base. A noised clip is z_t = alpha z_0 + sigma eps, whatever a network was
trained to say of it; said as a guess of z_0 and eps, the next cleaner level is mixed from the two,
z_prev = alpha_prev z_0 + sigma_prev eps. That line is DDIM for alpha^2 + sigma^2 = 1, rectified
flow's Euler step for alpha + sigma = 1, and EDM's for alpha = 1: bases differ in their Levels.

The symbols of the whole repository:

| symbol | in the code          | meaning                                            | paper      |
|--------|----------------------|----------------------------------------------------|------------|
| x, x^i | video, frames        | a video, and its i-th frame, in pixels             | Sec. 3.1   |
| z, z_t | z, z_t               | its latents, scaled; the same at noise level t     | Sec. 3.1   |
| c      | caption, text        | the caption, and its features                      | Sec. 3.1   |
| eps    | eps                  | Gaussian noise, or the network's guess of it       | Eq. (1)    |
| T      | num_train_steps      | noise levels that the base knows, 1000             | Sec. 3.1   |
| abar_t | alpha_bar[t]         | signal power left at level t = 0..T-1              | Eq. (5)    |
| -      | alpha, sigma         | how much of a clip, and of noise, is in z_t        | Eq. (5)    |
| D      | num_steps            | steps of the DDIM chain, 20                        | Sec. 3.3   |
| d(i)   | ddpm_step            | noise level that chain step i = D..1 starts from   | Eq. (3)    |
| tau    | tau                  | share of the chain that an edit runs through, 0.6  | Sec. 4.2   |
| t_noi  | noise_step           | d(tau D), the step that a clip is noised to        | Eq. (4)    |
| K      | grad_steps           | last steps of the chain that carry gradient, 1     | Sec. 3.3   |
| eta    | eta                  | share of fresh noise in a step, 0: deterministic   | -          |
| w      | guidance             | scale of classifier-free guidance, 3               | -          |
| F, S   | num_frames, segments | frames of a clip, 16; segments of it, 4            | Sec. 3.3   |
| g(i)   | g, index             | the frame drawn from segment i                     | Sec. 3.2.2 |
| r      | frame_scores         | the image reward of a frame                        | Eq. (2)    |
| f_i    | tar_weights          | its weight: the nearer to the centre, the larger   | Eq. (7)    |
| lambda | lambda_tar           | how fast that weight falls, 1                      | Eq. (7)    |
| R      | R                    | the video's reward; the loss is -R, Eq. (9)        | Eq. (8)    |

Ours differs from the official code: (1) tau D is rounded, not truncated (0.57 x 100 is 56.99999 in
floating point); (2) the steps before the last K build no graph; (3) nothing here turns dropout on,
as the official chain does. Of a model this file knows predict(z_t, level, text) -> z_0, eps alone.

Letters: B clips, C latent channels, F frames, H and W latent rows and columns, N tokens of width E.
"""
from dataclasses import dataclass

import torch

from support.ranks import map_tensors

GUIDANCE = 3.0  # what the official code trains and evaluates with (modules/config.py:74)


# ----------------------------------------------------------------------------------------------
# Which noise level is which

def alpha_bars(num_train_steps=1000, beta_start=0.00085, beta_end=0.012):
    """ModelScopeT2V's schedule, "scaled linear" (scheduler_config.json): abar (T,), float64."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0)                                 # (T,)


def ddpm_step(i, num_steps, num_train_steps=1000):
    """
    Eq. (3): d(i) = (T / D)(i - 1) + 1, the noise level of chain step i in 1..D.

    The network knows T = 1000 noise levels, the chain visits D of them, evenly spaced: 1, 51, ...,
    951 for D = 20. The spacing is floor(T / D). ValueError for i outside 1..D, and for D >= T.
    """
    if not 1 <= num_steps < num_train_steps:
        raise ValueError(f"num_steps = {num_steps}: must be from 1 to {num_train_steps - 1}")
    if not 1 <= i <= num_steps:
        raise ValueError(f"chain step i = {i}: must be from 1 to num_steps = {num_steps}")
    return num_train_steps // num_steps * (i - 1) + 1


def edit_steps(tau, num_steps):
    """tau D, rounded: the steps of an edit. ValueError unless 0 < tau <= 1, and for no step."""
    if not 0 < tau <= 1:
        raise ValueError(f"tau = {tau}: must be above 0 and at most 1")
    steps = round(tau * num_steps)
    if steps < 1:
        raise ValueError(f"tau = {tau} of num_steps = {num_steps} rounds to no step at all: "
                         "tau * num_steps must be above 0.5")
    return steps


def noise_step(tau, num_steps, num_train_steps=1000):
    """
    Eq. (4): t_noi = d(tau D), where a real clip is noised to. 551 for tau = 0.6, D = 20.

    A small tau leaves the model little to improve. A large one makes it invent most of the clip,
    which costs more steps. Errors as edit_steps and ddpm_step.
    """
    return ddpm_step(edit_steps(tau, num_steps), num_steps, num_train_steps)


def check_edit(tau, num_steps, grad_steps, num_train_steps=1000):
    """ValueError unless such an edit is possible: as noise_step, and K must be in 1..tau D."""
    steps = edit_steps(tau, num_steps)
    ddpm_step(steps, num_steps, num_train_steps)
    if not 1 <= grad_steps <= steps:
        raise ValueError(f"grad_steps = {grad_steps}: must be from 1 to {steps}, the steps that "
                         f"tau = {tau} leaves of {num_steps}")


@dataclass
class Levels:
    """
    What a chain passes through: chain step i = D..1 starts at entry i, and entry 0 is its end.

    t: what the network is told. alpha, sigma: z_t = alpha z_0 + sigma eps. fresh: deviation of a
    step's new noise at eta = 1, by default DDPM's. start: that of the noise a video is made from.
    first_guidance: w of the first frame, where a number w is that of the last (SVD).
    """
    t: list
    alpha: list
    sigma: list
    fresh: list | None = None
    start: float = 1.
    first_guidance: float | None = None

    def __post_init__(self):
        self.num_steps = len(self.t) - 1
        if self.fresh is None:  # DDIM (arXiv:2010.02502), Eq. (16)
            self.fresh = [0.]
            for a, a_prev, s, s_prev in zip(self.alpha[1:], self.alpha, self.sigma[1:], self.sigma):
                self.fresh.append(s_prev / s * (s**2 - (a / a_prev * s_prev) ** 2) ** 0.5)


def ddim_levels(num_steps, alpha_bar):
    """
    DDIM's levels: d(i) of Eq. (3). The last step goes to abar[0], not to 1, in the official code
    and in diffusers alike (diffusion_ddim.py:583). Floats keep float64 arithmetic on any device.
    """
    t = [ddpm_step(1, num_steps, len(alpha_bar)) - 1]  # 0, where the chain ends
    for i in range(1, num_steps + 1):
        t.append(ddpm_step(i, num_steps, len(alpha_bar)))
    return Levels(t, alpha_bar[t].sqrt().tolist(), (1 - alpha_bar[t]).sqrt().tolist())


# ----------------------------------------------------------------------------------------------
# One step there, one step back

def add_noise(z, eps, levels, i):
    """Eq. (5): z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps, a clip at the level of chain step i."""
    return levels.alpha[i] * z + levels.sigma[i] * eps.to(z)                  # (B, C, F, H, W)


def guided(predict, z_t, levels, i, text, uncond, guidance):
    """
    z_0 and eps in z_t by classifier-free guidance (arXiv:2207.12598): eps_u + w (eps_c - eps_u).

    Both guesses come from the same weights, in one call on a doubled batch. Videos are sampled with
    guidance, so the gradient of a sampled video goes through both; with one branch detached it
    would be the gradient of something else.

    z_t (B,C,F,H,W), text (B,N,E), uncond (1,N,E) or (B,N,E): the empty caption's; or dicts of such
    tensors. guidance: a number, or (F,). Where it is 1 only one branch is run. A level may have a
    number for each clip.
    """
    level = levels.t[i], levels.alpha[i], levels.sigma[i]
    if isinstance(guidance, (int, float)) and guidance == 1:
        return predict(z_t, level, text)
    if not torch.is_tensor(guidance) and levels.first_guidance is not None:
        guidance = torch.linspace(levels.first_guidance, guidance, z_t.shape[2])
    if torch.is_tensor(guidance):
        guidance = guidance.to(z_t).view(-1, 1, 1)                            # (F, 1, 1)

    both = map_tensors(lambda c, u: torch.cat([c, u.expand_as(c)]), text, uncond)  # (2B, N, E)
    level = tuple(torch.cat([v, v]) if torch.is_tensor(v) else v for v in level)
    z_0, eps = predict(torch.cat([z_t, z_t]), level, both)                    # (2B, C, F, H, W)
    (z_0_c, z_0_u), (eps_c, eps_u) = z_0.chunk(2), eps.chunk(2)
    return z_0_u + guidance * (z_0_c - z_0_u), eps_u + guidance * (eps_c - eps_u)


def step(z_0, eps, levels, i, eta=0.):
    """
    Chain step i, to level i - 1: z_prev ~ N(mean, std^2) (arXiv:2010.02502, Eq. (12)).

    As much noise as belongs to level i - 1, a part std of it fresh: with eta = 0 none (DDIM), with
    eta = 1 as much as DDPM has. z_0, eps (B,C,F,H,W) -> mean (B,C,F,H,W), std a float.
    """
    std = eta * levels.fresh[i]
    return levels.alpha[i - 1] * z_0 + (levels.sigma[i - 1] ** 2 - std**2) ** 0.5 * eps, std


# ----------------------------------------------------------------------------------------------
# The chain: from pure noise, or from a noised clip

def chain(predict, z, text, uncond, levels, first, guidance, grad_steps, eta=0., fresh=None,
          last=1):
    """
    Chain steps i = first..last, from z at level first, to z_0 for last = 1. Those i <= K carry
    gradient.

    Why truncate (Sec. 3.3)? For memory, and since gradients through long chains explode (DRaFT,
    arXiv:2309.17400). The last step alone moves z_0 little (dz_0 / deps is about -0.012 there), yet
    its gradient trains weights that all steps share, so it changes the earlier steps too.

    fresh: with eta > 0, the steps' new noise, in their order: an iterable of (B,C,F,H,W).
    """
    with_grad = torch.is_grad_enabled()
    fresh = iter(fresh if eta else ())

    for i in range(first, last - 1, -1):
        with torch.set_grad_enabled(with_grad and i <= grad_steps):
            z_0, eps = guided(predict, z, levels, i, text, uncond, guidance)
            z, std = step(z_0, eps, levels, i, eta)                           # (B, C, F, H, W)
            if std:
                z = z + std * next(fresh)
    return z


@torch.no_grad()
def sample(predict, noise, text, uncond, levels, guidance=GUIDANCE, eta=0., fresh=None):
    """
    Text to video: all D steps from pure noise, without gradient. This is how a model is used.

    noise (B,C,F,H,W), text (B,N,E), uncond (1,N,E) or (B,N,E) -> z_0 (B,C,F,H,W), scaled latents.
    """
    return chain(predict, levels.start * noise, text, uncond, levels, levels.num_steps, guidance,
                 0, eta, fresh)


def edit(predict, z, eps, text, uncond, levels, tau=0.6, guidance=GUIDANCE, grad_steps=1):
    """
    Reward fine-tuning as editing (Sec. 3.2.1): noise a real clip to t_noi, and denoise it.

    z (B,C,F,H,W) scaled latents of real clips, eps (B,C,F,H,W) noise, text (B,N,E), uncond (1,N,E)
    or (B,N,E) -> z_0 (B,C,F,H,W), with gradient through the last K = grad_steps steps.
    ValueError as check_edit, and for eps of another shape, which clips would share.
    """
    if eps.shape != z.shape:
        raise ValueError(f"eps has shape {list(eps.shape)}: must be {list(z.shape)}, that of z")
    check_edit(tau, levels.num_steps, grad_steps)

    # 1. Noise the clip part of the way, to level d(tau D).
    first = edit_steps(tau, levels.num_steps)                                 # Eq. (4)
    z_noi = add_noise(z, eps, levels, first)                                  # Eq. (5)

    # 2. Denoise it back, in the tau D steps that are left.
    return chain(predict, z_noi, text, uncond, levels, first, guidance, grad_steps)
