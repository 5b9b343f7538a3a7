"""
The diffusion schedule, tau-noising, and DDIM chains: from pure noise, or from a real clip with a truncated gradient.

Paper: InstructVideo (arXiv:2312.12490), Secs. 3.1, 3.2.1 and 3.3, Eqs. (3)-(5).

| symbol    | here           | meaning                                                                 |
|-----------|----------------|-------------------------------------------------------------------------|
| T         | len(alpha_bar) | steps of the training process, 1000                                     |
| D         | num_steps      | steps of the DDIM chain, 20                                             |
| d(i)      | ddpm_step      | the training step that chain step i = D..1 starts from, Eq. (3)         |
| tau       | tau            | how much of the chain an edit runs through, 0.6                         |
| t_noi     | noise_step     | d(tau D), where a real clip is noised to, Eq. (4)                       |
| abar_t    | alpha_bar[t]   | share of signal power left at step t; t is a 0-based index              |
| K         | grad_steps     | last steps of the chain that carry gradient, 1                          |

Ours differs from the official code: (1) tau D is rounded, not truncated (0.57 x 100 is 56.99999 in floating point); (2) the
steps before the last K build no graph, so memory does not grow with D; (3) nothing here switches a model to training mode:
the official chain runs with dropout on. Knows nothing of the model but eps_model(z_t, t, text) -> eps.

Letters: B clips, C latent channels, F frames, H and W latent rows and columns, N text tokens.
"""
import math

import torch

GUIDANCE = 3.0  # what the official code trains and evaluates with (modules/config.py:74); ModelScopeT2V's own demo uses 9.0


def alpha_bars(num_train_steps=1000, beta_start=0.00085, beta_end=0.012):
    """
    The "scaled linear" schedule: betas are squares of evenly spaced roots. Returns abar (T,) in float64, on the CPU.

    Source: Stable Diffusion's schedule, as in diffusion_ddim.py and the published scheduler_config.json.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def ddpm_step(i, num_steps, num_train_steps=1000):
    """
    Eq. (3): d(i) = (T / D)(i - 1) + 1, the training step of chain step i in 1..D; floor(T / D) if D does not divide T.

    Raises ValueError outside 1..D, and for D >= T: d(D) would reach T, or all steps would be one.
    """
    if not 1 <= num_steps < num_train_steps:
        raise ValueError(f"num_steps = {num_steps}: allowed is 1 to {num_train_steps - 1}")
    if not 1 <= i <= num_steps:
        raise ValueError(f"chain step i = {i}: allowed is 1 to num_steps = {num_steps}")
    return num_train_steps // num_steps * (i - 1) + 1


def edit_steps(tau, num_steps):
    """tau D, rounded: how many chain steps an edit runs. tau in (0, 1], at least one step, else ValueError."""
    if not (math.isfinite(tau) and 0 < tau <= 1):
        raise ValueError(f"tau = {tau}: allowed is above 0 and up to 1")
    n = round(tau * num_steps)
    if n < 1:
        raise ValueError(f"tau = {tau} of num_steps = {num_steps} rounds to no step at all: allowed is tau * num_steps > 0.5")
    return n


def noise_step(tau, num_steps, num_train_steps=1000):
    """Eq. (4): t_noi = d(tau D). tau = 0.6, D = 20: d(12) = 551. Same errors as edit_steps and ddpm_step."""
    return ddpm_step(edit_steps(tau, num_steps), num_steps, num_train_steps)


def check_edit(tau, num_steps, grad_steps, num_train_steps=1000):
    """(tau D, t_noi) of an edit. ValueError as noise_step, or if the K = grad_steps steps with gradient are not 1..tau D."""
    first, t_noi = edit_steps(tau, num_steps), noise_step(tau, num_steps, num_train_steps)
    if not 1 <= grad_steps <= first:
        raise ValueError(f"grad_steps = {grad_steps}: allowed is 1 to {first}, the steps that tau = {tau} leaves of {num_steps}")
    return first, t_noi


def add_noise(z, eps, t, alpha_bar):
    """
    Eq. (5): z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.

    z and eps (B, ...), t an int or (B,). The roots are taken in float64 on the CPU; the result has z's dtype and device.
    """
    a = alpha_bar[torch.as_tensor(t, device="cpu")].reshape(-1, *[1] * (z.dim() - 1))     # (B or 1, 1, 1, 1, 1)
    return a.sqrt().to(z) * z + (1 - a).sqrt().to(z) * eps.to(z)


def guided_eps(eps_model, z_t, t, text, uncond, guidance):
    """
    Classifier-free guidance (arXiv:2207.12598): eps_u + w (eps_c - eps_u), both branches in one call on a doubled batch.

    z_t (B,C,F,H,W), t int, text (B,N,E), uncond (1,N,E) or (B,N,E) -> (B,C,F,H,W).
    """
    B = len(z_t)
    steps = torch.full((2 * B,), t, device=z_t.device)
    eps_c, eps_u = eps_model(torch.cat([z_t, z_t]), steps, torch.cat([text, uncond.expand(B, -1, -1)])).chunk(2)
    return eps_u + guidance * (eps_c - eps_u)                                             # (B, C, F, H, W)


def ddim_step(z_t, eps, t, t_prev, alpha_bar):
    """
    One deterministic DDIM step, z_t -> z_{t_prev}. DDIM (arXiv:2010.02502), Eq. (12) with sigma = 0.

    The last step goes to abar[0], not to 1: t_prev is clamped at 0 (diffusion_ddim.py:583).
    """
    a, a_prev = (float(alpha_bar[max(s, 0)]) for s in (t, t_prev))  # Python floats: float64 arithmetic on any device
    z_0 = (z_t - (1 - a) ** 0.5 * eps) / a**0.5
    return a_prev**0.5 * z_0 + (1 - a_prev) ** 0.5 * eps                                  # (B, C, F, H, W)


def chain(eps_model, z, text, uncond, first, num_steps, guidance, alpha_bar, grad_steps):
    """Chain steps i = first..1 from z at training step d(first) down to z_0; gradient through the last grad_steps only."""
    stride = len(alpha_bar) // num_steps
    with_grad = torch.is_grad_enabled()
    for i in range(first, 0, -1):
        t = ddpm_step(i, num_steps, len(alpha_bar))
        with torch.set_grad_enabled(with_grad and i <= grad_steps):
            eps = guided_eps(eps_model, z, t, text, uncond, guidance)
            z = ddim_step(z, eps, t, t - stride, alpha_bar)
    return z


@torch.no_grad()
def sample(eps_model, noise, text, uncond, num_steps=20, guidance=GUIDANCE, alpha_bar=None):
    """
    Text to video: all D steps from pure noise, no gradient.

    noise (B,C,F,H,W), text (B,N,E), uncond (1,N,E) or (B,N,E) -> z_0 (B,C,F,H,W), scaled latents.
    """
    alpha_bar = alpha_bars() if alpha_bar is None else alpha_bar
    ddpm_step(num_steps, num_steps, len(alpha_bar))  # refuse a D that is too large before any work
    return chain(eps_model, noise, text, uncond, num_steps, num_steps, guidance, alpha_bar, grad_steps=0)


def edit(eps_model, z, eps, text, uncond, tau=0.6, num_steps=20, guidance=GUIDANCE, grad_steps=1, alpha_bar=None):
    """
    The paper's reward fine-tuning as editing (Sec. 3.2.1): noise a clip to t_noi, denoise it back in tau D steps.

    z (B,C,F,H,W) scaled latents of real clips, eps (B,C,F,H,W) noise, text (B,N,E), uncond (1,N,E) or (B,N,E) -> z_0.
    The last K = grad_steps steps carry gradient, in both guidance branches (Sec. 3.3); the others build no graph.
    Raises ValueError for tau or num_steps as noise_step does, and for K outside 1..tau D.
    """
    alpha_bar = alpha_bars() if alpha_bar is None else alpha_bar
    first, t_noi = check_edit(tau, num_steps, grad_steps, len(alpha_bar))
    z_noi = add_noise(z, eps, t_noi, alpha_bar)                                           # Eq. (5)
    return chain(eps_model, z_noi, text, uncond, first, num_steps, guidance, alpha_bar, grad_steps)
