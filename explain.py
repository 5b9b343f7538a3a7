"""
One training step in pictures: what train.py does to a clip, taken apart on a page.

    python explain.py                                  # the tiny world
    python explain.py --step 7 --tau 0.3 --lora out/tiny/lora.safetensors
    python explain.py --base BASE --data clips.txt     # any base and clip

Writes explain.html, which opens from disk, and explain.png, its main strip. Every number comes from the functions that train:
train.train takes one step, with wrappers around the network and the reward that note what passes through.

Letters: F frames, S segments, H and W pixels.
"""
import inspect
import re
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import tyro

import lora
import train
from model import decode_frames, load_base
from reward import aggregate, load_reward, segment_edges, tar_weights
from sampler import GUIDANCE, add_noise, alpha_bars, ddim_step, edit, edit_steps, guided_eps, noise_step
from support.files import check_folder
from support.pages import Clips, heat, picture_uri, write_page
from support.processes import pick_device, pick_dtype, run_script
from support.reports import versions
from support.seeds import sample_generator
from support.settings import RewardSettings, check_at_least
from support.step_pictures import draw_step, unet_table
from support.videos import to_pixels
from tiny.clips import tiny_clips

CLIPS = 12  # of the tiny world's: encoding all 192 would take longer than all the rest
TAUS, GRAD_STEPS, LAMBDAS, SEGMENTS = (.1, .3, .6, 1.), (1, 2, 4, 8), (0., .5, 1., 2.), (1, 2, 4, 8, 16)
PANELS = {  # a fragment of the step's source: the panel that shows it
    "draw(step)": "clip", "= edit(": "chain", "score_frames(": "reward", "tar_weights(": "reward", "aggregate(": "reward",
    "loss = ": "reward", "loss.backward()": "pixels", "clip_grad_norm_": "unet", "optimizer.step()": "after"}


@dataclass(frozen=True)
class Config(RewardSettings):
    """Take one training step apart. Flags that train.py has too mean the same."""
    lora: Path | None = None
    """adapters to start from; default fresh ones, as a run starts"""
    data: Path | None = None
    """clips and captions, as in train.py; the tiny world draws its own"""
    data_root: Path | None = None
    """folder that the list's paths start from; default the list's own"""
    frames: int = 16
    """F (paper, Sec. 3.3)"""
    size: int | None = None
    """pixel rows and columns of a clip; default what the base was trained on"""
    fps: int = 8
    """frames a second that clips are read and shown at (official configuration)"""
    step: int = 0
    """which step of a run with this seed and batches of one clip: it decides clip, noise and frames"""
    seed: int = 0
    """all randomness follows from it and the step"""
    tau: float = 0.6
    """how far the clip is noised, as a share of the chain (paper, Sec. 4.2)"""
    num_steps: int = 20
    """D, DDIM steps of the whole chain (paper, Sec. 3.3)"""
    grad_steps: int = 1
    """K, last steps that carry gradient (paper, Sec. 3.3)"""
    segments: int = 4
    """S, frames scored, one of each segment (paper, Sec. 3.3)"""
    lambda_tar: float = 1.0
    """how fast weights fall off from the centre, Eq. (7) (paper, Sec. 3.2.2)"""
    guidance: float = GUIDANCE
    """classifier-free guidance scale"""
    out: Path = Path("out/explain")
    """folder of explain.html and explain.png; those are replaced"""
    max_mb: float = 8.
    """largest size of the page; clips of large videos are compressed until it fits"""


# ----------------------------------------------------------------------------------------------
# Listening to a step

class Recorder:
    """Stands for a base in train.edit_rewards: the same networks, and a note of what passes through the denoiser."""

    def __init__(self, base):
        self.base, self.vae, self.calls = base, base.vae, []

    def denoiser(self, z_t, t, text):
        eps = self.base.denoiser(z_t, t, text)
        self.calls.append((z_t.detach().chunk(2)[0], int(t[0]), eps.detach()))
        return eps

    def guesses(self, guidance):
        """[(t, z_0)]: what the model thinks the clip is at each chain step, from the noise that it saw there."""
        # With abar = 1 in front of the schedule, ddim_step takes the noise out and puts none back.
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars()])
        found = []
        for z_t, t, both in self.calls:
            text = torch.zeros(len(z_t), 1, 1)  # what is played back has read its text already
            eps = guided_eps(lambda *unused, both=both: both, z_t, t, text, text, guidance)
            found.append((t, ddim_step(z_t, eps, t + 1, 0, alpha_bar)))
        return found


class OneStep:
    """What train.train asks of a run folder, for a single step that nothing is kept of."""

    def __init__(self, step):
        self.step, self.numbers = step, None

    def steps(self, optimizer):
        yield self.step

    def stop(self):
        return False

    def finish_step(self, step, numbers, finite, stopping):
        self.numbers = numbers
        return False


# ----------------------------------------------------------------------------------------------
# What the page shows

class Lab:
    """A base, a reward, adapters and one step's batch of one clip, and what can be asked about them."""

    def __init__(self, cfg):
        shared = {f.name: getattr(cfg, f.name) for f in fields(train.Config) if hasattr(cfg, f.name)}
        self.cfg, self.step, self.clips = replace(train.Config(**shared), batch_size=1, out=None), cfg.step, Clips()
        train.check(self.cfg)
        device = pick_device(cfg.device)
        dtype = pick_dtype(cfg.dtype, device)
        self.base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
        self.parameters = lora.load(self.base.unet, cfg.lora) if cfg.lora else lora.load_or_inject(
            self.base.unet, self.base.unet_file, self.cfg.rank, sample_generator(cfg.seed, "lora"))
        self.reward = load_reward(cfg.reward, cfg.reward_weights, self.base.folder, dtype, device)
        self.dataset = train.read_clips(self.cfg, self.base) if cfg.data else tiny_clips(self.base, dtype, CLIPS)
        self.uncond = self.base.encode_text([""])
        self.z, self.eps, self.text, self.g, self.captions = self.batch = self.draw(self.cfg)

    def draw(self, cfg):
        """The step's batch; with other segments the same clip and noise, and other frames of it."""
        return train.draw_batch(self.dataset, self.step, cfg, self.base.vae.config.scale, self.base.device)

    @torch.no_grad()
    def pixels(self, z):
        """The frames of latents, (F, H, W, 3) uint8."""
        return to_pixels(decode_frames(self.base.vae, z)[0])

    def show(self, z):
        """The number of a clip on the page."""
        return self.clips.add(self.pixels(z))

    def watched(self, seen):
        """The reward, noting the frames that it is shown, whose gradient is then kept."""
        def score(frames, captions):
            frames.retain_grad()
            seen.append(frames)
            return self.reward(frames, captions)
        return score

    @torch.no_grad()
    def edit(self, tau):
        """The clip noised to t_noi, and its edit."""
        noised = add_noise(self.z, self.eps, noise_step(tau, self.cfg.num_steps), alpha_bars())
        return noised, edit(self.base.denoiser, self.z, self.eps, self.text, self.uncond, tau, self.cfg.num_steps,
                            self.cfg.guidance)

    def train_one_step(self):
        """train.train itself for one step: (its numbers, what passed the network, the frames that were scored)."""
        recorder, seen, run = Recorder(self.base), [], OneStep(self.step)
        score = self.watched(seen)
        train.train(self.cfg, self.parameters, lambda step: self.batch,
                    lambda part: train.edit_rewards(recorder, score, self.uncond, part, self.cfg), run)
        return run.numbers, recorder, seen[0]

    def measure(self, **changes):
        """R and the plain mean reward of the step's batch, with other settings or adapters than it had."""
        with torch.no_grad():
            R, mean = train.edit_rewards(self.base, self.reward, self.uncond, self.batch, replace(self.cfg, **changes))
        return {"R": R.item(), "reward": mean.item()}

    def gradient(self, grad_steps):
        """The adapters' gradient for this K: flat, the share of each projection {path: squared norm}, and seconds."""
        torch.nn.Module.zero_grad(self.base.unet)
        started = time.perf_counter()
        R, _ = train.edit_rewards(self.base, self.reward, self.uncond, self.batch, replace(self.cfg, grad_steps=grad_steps))
        (-R.mean()).backward()                                                                    # Eq. (9)
        squares = {path: sum(p.grad.square().sum().item() for p in layer.parameters() if p.grad is not None)
                   for path, layer in lora.layers(self.base.unet).items()}
        return torch.cat([p.grad.flatten() for p in self.parameters]), squares, time.perf_counter() - started

    def scored(self, z_0, segments):
        """Frames drawn with S segments, their rewards, and for each lambda f, R and the gradient of R on the pixels."""
        g, seen, lambdas = self.draw(replace(self.cfg, segments=segments))[3], [], {}
        r = train.score_frames(self.base.vae, self.watched(seen), z_0.requires_grad_(), g, self.captions)      # Eq. (6)
        for lambda_tar in sorted({*LAMBDAS, self.cfg.lambda_tar}):
            f = tar_weights(g, self.cfg.frames, lambda_tar)                                                    # Eq. (7)
            R = aggregate(r, f)                                                                                # Eq. (8)
            [gradient] = torch.autograd.grad(R.sum(), seen[0], retain_graph=True)             # (1, S, 3, H, W)
            norms = gradient[0].flatten(1).norm(dim=1)
            lambdas[f"{lambda_tar:g}"] = {"f": f[0].tolist(), "R": R.item(), "norms": norms.tolist()}
            if lambda_tar == 0:  # other lambdas only scale a frame's gradient
                heats = [picture_uri(heat(map.norm(dim=0).cpu().numpy())) for map in gradient[0]]
        return {"edges": segment_edges(self.cfg.frames, segments), "g": g[0].tolist(), "r": r[0].tolist(), "heats": heats,
                "lambdas": lambdas}


def source_lines():
    """The step's source as it stands in train.py: [(line, the panel that shows it, or "")]."""
    loop = inspect.getsource(train.train)
    loop = loop[loop.index("        # 1. The gradient"):loop.index("        # 4. Log")].rstrip()
    text = loop + "\n\n" + re.sub(r'""".*?"""\n\s*', "", inspect.getsource(train.edit_rewards), count=1, flags=re.DOTALL)
    return [(line, next((panel for words, panel in PANELS.items() if words in line), "")) for line in text.splitlines()]


def explain(lab, max_mb):
    """Everything that the page shows, by its name in support/templates/explain.html, and the rows of the strip."""
    cfg, started = lab.cfg, time.perf_counter()
    first, T_noi = edit_steps(cfg.tau, cfg.num_steps), noise_step(cfg.tau, cfg.num_steps)

    # 1. What does not change the adapters: other K, tau, S and lambda.
    sweep = {}
    for K in sorted({k for k in GRAD_STEPS if k <= first} | {cfg.grad_steps}):
        flat, squares, seconds = lab.gradient(K)
        blocks, projections = unet_table(squares)
        one = flat if not sweep else one
        sweep[K] = {"norm": flat.norm().item(), "cosine": torch.cosine_similarity(flat, one, dim=0).item(), "seconds": seconds,
                    "blocks": blocks, "projections": projections}
    taus, before = [], lab.measure()
    for tau in sorted({*TAUS, cfg.tau}):
        noised, z_0 = lab.edit(tau)
        taus.append({"tau": tau, "t": noise_step(tau, cfg.num_steps), "steps": edit_steps(tau, cfg.num_steps),
                     "noised": lab.show(noised), "edit": lab.show(z_0), "mine": tau == cfg.tau} | lab.measure(tau=tau, grad_steps=1))
    noised, z_0 = lab.edit(cfg.tau)
    states = {S: lab.scored(z_0, S) for S in sorted({*SEGMENTS, cfg.segments}) if S <= cfg.frames}

    # 2. The step itself.
    numbers, recorder, frames = lab.train_one_step()
    guesses = [{"i": first - n, "t": t, "clip": lab.show(z), "z": z, "gradient": first - n <= cfg.grad_steps}
               for n, (t, z) in enumerate(recorder.guesses(cfg.guidance))]
    abar = alpha_bars()[T_noi].item()
    page = {"cfg": cfg, "step": lab.step, "caption": lab.captions[0], "reward": lab.reward.name, "versions": versions(),
            "t_noi": T_noi, "first": first, "signal": abar ** .5, "noise": (1 - abar) ** .5, "source": source_lines(),
            "real": lab.show(lab.z), "noised": lab.show(noised), "edit": lab.show(z_0), "guesses": guesses, "states": states,
            "pictures": [picture_uri(picture) for picture in lab.pixels(z_0)], "sweep": sweep, "taus": taus,
            "numbers": numbers, "before": before, "after": lab.measure()}
    # 3. The strip: the frames that were drawn, from the real clip to the gradient.
    columns = [("real clip", "z", lab.pixels(lab.z)), ("noised", f"t = {T_noi}, Eq. 5", lab.pixels(noised))]
    for n in sorted({0, first // 3, 2 * first // 3}):
        columns.append((f"guess at step {first - n}", f"t = {guesses[n]['t']}", lab.pixels(guesses[n]["z"])))
    columns.append(("the edit", "z_0", lab.pixels(z_0)))
    drawn = lab.g[0].tolist()
    columns = [(title, below, pixels[drawn]) for title, below, pixels in columns]
    heats = np.stack([heat(gradient.norm(dim=0).cpu().numpy()) for gradient in frames.grad[0]])
    columns.append(("gradient of R", "on these pixels", heats))
    mine = states[cfg.segments]
    strip = {"columns": columns, "g": drawn, "r": mine["r"], **mine["lambdas"][f"{cfg.lambda_tar:g}"], "caption": page["caption"]}
    return page | {"clips": lab.clips.pack(max_mb), "seconds": time.perf_counter() - started}, strip


def main(cfg):
    """Take the step apart, and write the page and the strip."""
    check_at_least(cfg, step=0)
    check_folder(cfg.out)
    page, strip = explain(Lab(cfg), cfg.max_mb - .5)
    size = write_page(cfg.out / "explain.html", "explain.html", cfg.max_mb, title="One training step, taken apart",
                      fps=cfg.fps, **page)
    draw_step(cfg.out / "explain.png", reward=page["reward"], **strip)
    print(f"written: {cfg.out}/explain.html ({size:.1f} MB), explain.png, in {page['seconds']:.0f} s")


if __name__ == "__main__":
    run_script("explain.py", lambda: main(tyro.cli(Config, description=__doc__)), refused=(RuntimeError, OSError))
