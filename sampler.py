"""
Noise a clip part of the way, denoise it back, and let the gradient through the last step only.

Paper: InstructVideo (arXiv:2312.12490), Secs. 3.1 and 3.2.1, Eqs. (3)-(5).

Sampling a video from pure noise takes D network calls, and a reward's gradient through all of
them would take D times the memory. InstructVideo makes two cuts. It starts from a real clip that is
noised to t_noi = d(tau D): only tau D steps are left, and the result is near real video from the
start. And only the last K of these steps build a graph, so memory does not grow with D.

The symbols of the whole repository:

| symbol | in the code          | meaning                                            | paper      |
|--------|----------------------|----------------------------------------------------|------------|
| x, x^i | video, frames        | a video, and its i-th frame, in pixels             | Sec. 3.1   |
| z, z_t | z, z_t               | its latents, scaled; the same at noise level t   | Sec. 3.1   |
| c      | caption, text        | the caption, and its features                      | Sec. 3.1   |
| eps    | eps                  | Gaussian noise, or the network's guess of it       | Eq. (1)    |
| T      | num_train_steps      | noise levels that the base knows, 1000             | Sec. 3.1   |
| abar_t | alpha_bar[t]         | signal power left at level t = 0..T-1              | Eq. (5)    |
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
as the official chain does. Of the model this file knows eps_model(z_t, t, text) -> eps alone.

Letters: B clips, C latent channels, F frames, H and W latent rows and columns, N tokens of width E.
"""
import math

import torch

GUIDANCE = 3.0  # what the official code trains and evaluates with (modules/config.py:74)


# ----------------------------------------------------------------------------------------------
# Which noise level is which

def alpha_bars(num_train_steps=1000, beta_start=0.00085, beta_end=0.012):
    """
    The noise schedule that the base was trained with: abar (T,), float64, on the CPU.

    "Scaled linear": the betas are squares of evenly spaced roots (diffusion_ddim.py, and the
    published scheduler_config.json).
    """
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=torch.float64)
    return torch.cumprod(1 - roots**2, dim=0)                                 # (T,)


def ddpm_step(i, num_steps, num_train_steps=1000):
    """
    Eq. (3): d(i) = (T / D)(i - 1) + 1, the noise level of chain step i in 1..D.

    The network knows T = 1000 noise levels, the chain visits D of them, evenly spaced: 1, 51, ...,
    951 for D = 20. Where D does not divide T the spacing is floor(T / D).
    ValueError for i outside 1..D, and for D >= T, where all steps would be one.
    """
    if not 1 <= num_steps < num_train_steps:
        raise ValueError(f"num_steps = {num_steps}: must be from 1 to {num_train_steps - 1}")
    if not 1 <= i <= num_steps:
        raise ValueError(f"chain step i = {i}: must be from 1 to num_steps = {num_steps}")
    return num_train_steps // num_steps * (i - 1) + 1


def edit_steps(tau, num_steps):
    """tau D, rounded: the steps of an edit. ValueError unless 0 < tau <= 1, and for no step."""
    if not (math.isfinite(tau) and 0 < tau <= 1):
        raise ValueError(f"tau = {tau}: must be above 0 and at most 1")
    steps = round(tau * num_steps)
    if steps < 1:
        raise ValueError(f"tau = {tau} of num_steps = {num_steps} rounds to no step at all: "
                         "tau * num_steps must be above 0.5")
    return steps


def noise_step(tau, num_steps, num_train_steps=1000):
    """
    Eq. (4): t_noi = d(tau D), where a real clip is noised to. 551 for tau = 0.6, D = 20.

    A small tau leaves most of the clip, so there is little for the model to improve. A large one
    makes the model invent most of it, which costs more steps. Errors as edit_steps and ddpm_step.
    """
    return ddpm_step(edit_steps(tau, num_steps), num_steps, num_train_steps)


def check_edit(tau, num_steps, grad_steps, num_train_steps=1000):
    """ValueError unless such an edit is possible: as noise_step, and K must be in 1..tau D."""
    steps = edit_steps(tau, num_steps)
    ddpm_step(steps, num_steps, num_train_steps)
    if not 1 <= grad_steps <= steps:
        raise ValueError(f"grad_steps = {grad_steps}: must be from 1 to {steps}, the steps that "
                         f"tau = {tau} leaves of {num_steps}")


# ----------------------------------------------------------------------------------------------
# One step there, one step back

def add_noise(z, eps, t, alpha_bar):
    """
    Eq. (5): z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps, a clip as it looks at noise level t.

    z and eps (B, ...), t an int or (B,). The result has z's dtype and device.
    """
    # The roots are taken in float64 on the CPU, since some devices have no float64.
    a = alpha_bar[torch.as_tensor(t, device="cpu")]
    a = a.reshape(-1, *[1] * (z.dim() - 1))                                   # (B or 1, 1, ..., 1)
    return a.sqrt().to(z) * z + (1 - a).sqrt().to(z) * eps.to(z)              # (B, ...)


def guided_eps(eps_model, z_t, t, text, uncond, guidance):
    """
    Classifier-free guidance (arXiv:2207.12598): eps_u + w (eps_c - eps_u), the noise in z_t.

    Both guesses come from the same weights, in one call on a doubled batch. Videos are sampled with
    guidance, so the gradient of a sampled video goes through both; with one branch detached it
    would be the gradient of something else.

    z_t (B,C,F,H,W), t an int, text (B,N,E), uncond (1,N,E) or (B,N,E): the empty caption's.
    """
    B = len(z_t)
    t_batch = torch.full((2 * B,), t, device=z_t.device)                      # (2B,)
    both = torch.cat([text, uncond.expand(B, -1, -1)])                        # (2B, N, E)
    eps_c, eps_u = eps_model(torch.cat([z_t, z_t]), t_batch, both).chunk(2)
    return eps_u + guidance * (eps_c - eps_u)                                 # (B, C, F, H, W)


def ddim_mean_std(z_t, eps, t, t_prev, alpha_bar, eta):
    """
    One stochastic DDIM step: z_{t_prev} ~ N(mean, std^2) (arXiv:2010.02502, Eqs. (12) and (16)).

    Take out the noise to see z_0, then put back as much as belongs to t_prev, a part std of it
    fresh. eta = 0 has none (DDIM), eta = 1 as much as DDPM. The last step goes to abar[0], not to
    1, in the official code and in diffusers alike (diffusion_ddim.py:583).

    z_t, eps (B,C,F,H,W), t > t_prev ints -> mean (B,C,F,H,W), std a float.
    """
    # Python floats keep float64 arithmetic on any device.
    a, a_prev = float(alpha_bar[t]), float(alpha_bar[max(t_prev, 0)])
    std = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
    z_0 = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
    return a_prev**0.5 * z_0 + (1 - a_prev - std**2) ** 0.5 * eps, std


def ddim_step(z_t, eps, t, t_prev, alpha_bar):
    """One deterministic DDIM step, z_t -> z_{t_prev}: the mean for eta = 0, which has std 0."""
    return ddim_mean_std(z_t, eps, t, t_prev, alpha_bar, eta=0.)[0]           # (B, C, F, H, W)


# ----------------------------------------------------------------------------------------------
# The chain: from pure noise, or from a noised clip

def chain(eps_model, z, text, uncond, first, num_steps, guidance, alpha_bar, grad_steps):
    """
    Chain steps i = first..1, from z at noise level d(first) to z_0. Only i <= K carry gradient.

    Why truncate (Sec. 3.3)? Each step with gradient keeps all activations of a network call, and
    gradients through long chains explode (DRaFT, arXiv:2309.17400). The last step alone moves z_0
    little (dz_0 / deps is about -0.012 there), yet its gradient trains weights that all steps
    share, so what is learned there changes the earlier steps too.
    """
    stride = len(alpha_bar) // num_steps
    with_grad = torch.is_grad_enabled()

    for i in range(first, 0, -1):
        t = ddpm_step(i, num_steps, len(alpha_bar))                           # Eq. (3)
        with torch.set_grad_enabled(with_grad and i <= grad_steps):
            eps = guided_eps(eps_model, z, t, text, uncond, guidance)
            z = ddim_step(z, eps, t, t - stride, alpha_bar)                   # (B, C, F, H, W)
    return z


@torch.no_grad()
def sample(eps_model, noise, text, uncond, num_steps=20, guidance=GUIDANCE, alpha_bar=None):
    """
    Text to video: all D steps from pure noise, without gradient. This is how a model is used.

    noise (B,C,F,H,W), text (B,N,E), uncond (1,N,E) or (B,N,E) -> z_0 (B,C,F,H,W), scaled latents.
    """
    alpha_bar = alpha_bars() if alpha_bar is None else alpha_bar
    ddpm_step(num_steps, num_steps, len(alpha_bar))  # refuses a D that is too large before any work

    return chain(eps_model, noise, text, uncond, num_steps, num_steps, guidance, alpha_bar, 0)


def edit(eps_model, z, eps, text, uncond, tau=0.6, num_steps=20, guidance=GUIDANCE, grad_steps=1,
         alpha_bar=None):
    """
    Reward fine-tuning as editing (Sec. 3.2.1): noise a real clip to t_noi, and denoise it.

    Why edit? It takes tau D steps instead of D, and the result is near real video from the start,
    also while the model is still poor. This is how a model is trained.

    z (B,C,F,H,W) scaled latents of real clips, eps (B,C,F,H,W) noise, text (B,N,E), uncond (1,N,E)
    or (B,N,E) -> z_0 (B,C,F,H,W), with gradient through the last K = grad_steps steps.
    ValueError as check_edit, and for eps of another shape, which clips would share.
    """
    if eps.shape != z.shape:
        raise ValueError(f"eps has shape {list(eps.shape)}: must be {list(z.shape)}, that of z")
    alpha_bar = alpha_bars() if alpha_bar is None else alpha_bar
    check_edit(tau, num_steps, grad_steps, len(alpha_bar))

    # 1. Noise the clip part of the way.
    t_noi = noise_step(tau, num_steps, len(alpha_bar))                        # Eq. (4)
    z_noi = add_noise(z, eps, t_noi, alpha_bar)                               # Eq. (5)

    # 2. Denoise it back, in the tau D steps that are left.
    first = edit_steps(tau, num_steps)
    return chain(eps_model, z_noi, text, uncond, first, num_steps, guidance, alpha_bar, grad_steps)
