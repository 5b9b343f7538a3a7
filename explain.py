"""
One training step in pictures: what train.py does to a clip, taken apart on a page.

    python explain.py                                  # the tiny world
    python explain.py --step 7 --tau 0.3 --lora out/tiny/lora.safetensors
    python explain.py modelscope --data clips.txt      # any base and clip, with train.py's own flags

Writes explain.html, which opens from disk, and explain.png, its main strip. Every number comes from the functions that train;
train.train itself takes the step.

Letters: F frames, S segments, H and W pixels.
"""
import support.threads  # noqa: F401  before torch is loaded
import inspect
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tyro.conf import Fixed, Suppress

import lora
import train
from model import decode_frames, load_base
from pages.html import Clips, heat, picture_uri, write_page
from pages.step import draw_step, gradient_shares
from reward import Rewards, aggregate, load_rewards, segment_edges, tar_weights
from sampler import add_noise, alpha_bars, ddim_step, edit, edit_steps, guided_eps, noise_step
from support import settings
from support.files import check_folder
from support.pictures import versions
from support.ranks import pick_device, pick_dtype, run_script, sample_generator
from support.videos import to_pixels

CLIPS = 12  # of the tiny world's: encoding all 192 would take longer than all the rest
TAUS = (.1, .3, .6, 1.)
GRAD_STEPS = (1, 2, 4, 8)
LAMBDAS = (0., .5, 1., 2.)
SEGMENTS = (1, 2, 4, 8, 16)
PANELS = {  # a fragment of the step's source: the panel that shows it
    "draw(step)": "clip", "= edit(": "chain", "score_frames(": "reward", "tar_weights(": "reward", "aggregate(": "reward",
    "loss = ": "reward", ".backward()": "pixels", "clip_grad_norm_": "unet", "optimizer.step()": "after"}


@dataclass(frozen=True)
class Config(train.Config):
    """Take one training step apart, on one clip. Flags of train.py mean the same; those that concern a whole run (its length,
    evaluation, saving) change nothing here."""
    step: int = 0
    """with the seed it decides clip, noise, frames and warm-up; a run takes more clips a step, so its step so numbered differs"""
    lora: Path | None = None
    """adapters to start from; default fresh ones, as a run starts"""
    cache_interval: Suppress[Fixed[int]] = 1
    max_mb: float = 8.
    """largest size of the page; clips of large videos are compressed until it fits"""


PRESETS = {name: Config(**vars(preset)) for name, preset in train.PRESETS.items()}


@torch.no_grad()
def guess_clips(denoiser, z, eps, text, uncond, cfg):
    """What the model thinks the clip is at each step of an edit, from the noise it sees there: [(t, z_0)]."""
    # With abar = 1 in front of the schedule, ddim_step takes the noise out and puts none back.
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars()])
    guesses = []

    def listening(z_t, t, texts):
        both = denoiser(z_t, t, texts)
        z_t = z_t.chunk(2)[0]
        step = int(t[0])
        noise = guided_eps(lambda *_: both, z_t, step, text, uncond, cfg.guidance)
        guesses.append((step, ddim_step(z_t, noise, step + 1, 0, alpha_bar)))
        return both

    edit(listening, z, eps, text, uncond, cfg.tau, cfg.num_steps, cfg.guidance)
    return guesses


class Setup:
    """What train.py loads for a run, one step's batch of one clip, and what the page asks of them."""

    def __init__(self, cfg):
        device = pick_device(cfg.device)
        dtype = pick_dtype(cfg.dtype, device)
        self.base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
        self.cfg = cfg if cfg.guidance is not None else replace(cfg, guidance=self.base.guidance)
        if cfg.lora:
            self.parameters = lora.load(self.base.unet, cfg.lora)
        else:
            self.parameters = lora.load_beside(self.base.unet, self.base.unet_file, cfg.rank) or lora.inject(
                self.base.unet, cfg.rank, generator=sample_generator(cfg.seed, "lora"))
        self.reward = load_rewards(cfg, self.base.folder, dtype, device)
        if isinstance(self.reward, Rewards) or self.reward.num_frames:
            raise ValueError(f"reward {self.reward.name}: the page needs a single reward, of frames")
        if cfg.data:
            self.dataset = train.read_clips(cfg, self.base)
        else:
            self.dataset = self.base.world.clips(self.base, cfg.frames, cfg.size or self.base.default_size, CLIPS)
        self.uncond = self.base.encode_text([""])
        self.batch = self.draw(cfg.segments)
        self.z, self.eps, self.text, self.g, self.captions = self.batch
        self.clips = Clips()

    def draw(self, segments):
        """The step's batch; with other segments the same clip and noise, and other frames of it."""
        cfg = replace(self.cfg, segments=segments)
        return train.draw_batch(self.dataset, cfg.step, cfg, self.base.vae.config.scale, self.base.device)

    @torch.no_grad()
    def pixels(self, z):
        """The frames of latents, (F, H, W, 3) uint8."""
        return to_pixels(decode_frames(self.base.vae, z)[0])

    def show(self, z):
        """The number of a clip on the page."""
        return self.clips.add(self.pixels(z))

    @torch.no_grad()
    def edit(self, tau):
        """The clip noised to t_noi, its edit, and numbers of them, R of Eq. (8) among these."""
        cfg = self.cfg
        t_noi = noise_step(tau, cfg.num_steps)
        noised = add_noise(self.z, self.eps, t_noi, alpha_bars())
        z_0 = edit(self.base.denoiser, self.z, self.eps, self.text, self.uncond, tau, cfg.num_steps, cfg.guidance)
        R, logged = train.video_rewards(self.base, self.reward, z_0, self.g, self.captions, cfg)
        steps = edit_steps(tau, cfg.num_steps)
        return noised, z_0, {"tau": tau, "t": t_noi, "steps": steps, "R": R.item(), "reward": logged["reward"].item()}

    def train_one_step(self):
        """train.train itself, for one step, which moves the adapters: the numbers that it logs."""
        logged = []
        run = SimpleNamespace(steps=lambda optimizer: [self.cfg.step], stop=lambda: False,
                              finish_step=lambda step, numbers, finite, stopping: logged.append(numbers))
        method = train.Method(lambda step: self.batch, lambda part: train.edit_rewards(
            self.base, self.reward, self.uncond, self.batch, self.cfg))
        train.train(self.cfg, self.parameters, method, run)
        return logged[0]

    def gradient(self, grad_steps):
        """For this K: the adapters' gradient, and what the page says of it but for the cosine."""
        self.base.unet.zero_grad()
        started = time.perf_counter()
        cfg = replace(self.cfg, grad_steps=grad_steps)
        R, _ = train.edit_rewards(self.base, self.reward, self.uncond, self.batch, cfg)
        (-R.mean()).backward()                                                # Eq. (9)
        seconds = time.perf_counter() - started
        squares = {}
        for path, layer in lora.layers(self.base.unet).items():
            squares[path] = sum(p.grad.square().sum().item() for p in (layer.lora_A, layer.lora_B))
        gradient = torch.cat([p.grad.flatten() for p in self.parameters])
        blocks, projections = gradient_shares(squares)
        norm = gradient.norm().item()
        return gradient, {"norm": norm, "seconds": seconds, "blocks": blocks, "projections": projections}

    def scored(self, z_0, segments):
        """Frames of an edit drawn with S segments, their rewards, and for each lambda f, R and the length of R's gradient on each
        frame's pixels; and that gradient as pictures (S, H, W, 3)."""
        g = self.draw(segments)[3]
        with torch.no_grad():
            frames = decode_frames(self.base.vae, z_0, g)                     # (1, S, 3, H, W)
        r = self.reward(frames.requires_grad_(), self.captions)               # Eq. (6)
        [gradient] = torch.autograd.grad(r.sum(), frames)
        lengths = gradient[0].flatten(1).norm(dim=1).cpu()
        lambdas = {}
        for lambda_tar in sorted({*LAMBDAS, self.cfg.lambda_tar}):
            f = tar_weights(g, self.cfg.frames, lambda_tar).cpu()             # Eq. (7)
            R = aggregate(r, f)                                               # Eq. (8)
            # R is a sum of f r / S, so weights make a frame's gradient longer or shorter, and that is all.
            norms = f[0] * lengths / segments
            lambdas[f"{lambda_tar:g}"] = {"f": f[0].tolist(), "R": R.item(), "norms": norms.tolist()}
        heats = np.stack([heat(part.norm(dim=0).cpu().numpy()) for part in gradient[0]])
        return {"edges": segment_edges(self.cfg.frames, segments), "g": g[0].tolist(), "r": r[0].tolist(),
                "heats": [picture_uri(picture) for picture in heats], "lambdas": lambdas}, heats


def source_lines():
    """The step's source as it stands in train.py: [(line, the panel that shows it, or "")]."""
    loop = inspect.getsource(train.train)
    parts = [loop[loop.index("        # 1. The gradient"):loop.index("        # 4. Log")].rstrip(),
             inspect.getsource(train.edit_rewards), inspect.getsource(train.video_rewards)]
    lines = []
    for line in "\n\n".join(parts).splitlines():
        lines.append((line, next((panel for words, panel in PANELS.items() if words in line), "")))
    return lines


def explain(setup):
    """Everything that pages/templates/explain.html shows, and what the strip shows."""
    started = time.perf_counter()
    cfg = setup.cfg

    # What the step would be with other tau, K, S and lambda; nothing here changes the adapters.
    taus = []
    for tau in sorted({t for t in TAUS if round(t * cfg.num_steps)} | {cfg.tau}):
        noised, z_0, found = setup.edit(tau)
        taus.append(found | {"noised": setup.show(noised), "edit": setup.show(z_0)})
        if tau == cfg.tau:
            z_noi, edited = noised, z_0
            here = taus[-1]
    first = here["steps"]
    sweep = {}
    for K in sorted({k for k in GRAD_STEPS if k <= first} | {cfg.grad_steps}):
        gradient, found = setup.gradient(K)
        if not sweep:
            smallest = gradient
        sweep[K] = found | {"cosine": torch.cosine_similarity(gradient, smallest, dim=0).item()}
    states = {}
    for segments in sorted({S for S in SEGMENTS if S <= cfg.frames} | {cfg.segments}):
        states[segments], pictures = setup.scored(edited, segments)
        if segments == cfg.segments:
            heats = pictures
    guesses = guess_clips(setup.base.denoiser, setup.z, setup.eps, setup.text, setup.uncond, cfg)

    # The step itself, which moves the adapters.
    numbers = setup.train_one_step()
    page = {"cfg": cfg, "caption": setup.captions[0], "reward": setup.reward.name, "versions": versions(), "numbers": numbers,
            "abar": alpha_bars()[here["t"]].item(), "real": setup.show(setup.z), "source": source_lines(),
            "guesses": [{"i": first - n, "t": t, "clip": setup.show(z)} for n, (t, z) in enumerate(guesses)],
            "pictures": [picture_uri(picture) for picture in setup.pixels(edited)], "here": here, "taus": taus, "sweep": sweep,
            "states": states, "after": setup.edit(cfg.tau)[2], "seconds": time.perf_counter() - started}

    # The strip: the frames that were drawn, from the real clip to the gradient.
    latents = [("real clip", "z", setup.z), ("noised", f"t = {here['t']}, Eq. 5", z_noi)]
    for n in sorted({0, first // 3, 2 * first // 3}):
        latents.append((f"guess, step {first - n}", f"t = {guesses[n][0]}", guesses[n][1]))
    latents.append(("the edit", "$z_0$", edited))
    mine = states[cfg.segments]
    columns = [(title, below, setup.pixels(z)[mine["g"]]) for title, below, z in latents]
    columns.append(("gradient of R", "on these pixels", heats))
    weighted = mine["lambdas"][f"{cfg.lambda_tar:g}"]
    return page, {"columns": columns, "g": mine["g"], "r": mine["r"], "f": weighted["f"], "R": weighted["R"],
                  "caption": page["caption"], "reward": page["reward"]}


def main(cfg):
    """Take the step apart, and write the page and the strip."""
    out = cfg.out or Path("out/explain")
    cfg = replace(cfg, batch_size=1, eval_every=0, early_stop=False, watch=(), out=None)
    settings.check_at_least(cfg, step=0)
    settings.check_positive(cfg, "max_mb")
    train.check(cfg)
    check_folder(out)
    setup = Setup(cfg)
    page, strip = explain(setup)
    size = write_page(out / "explain.html", "explain.html", cfg.max_mb, fps=cfg.fps,
                      title="One training step, taken apart", clips=setup.clips.pack(cfg.max_mb * .8), **page)
    draw_step(out / "explain.png", **strip)
    print(f"written: {out}/explain.html ({size:.1f} MB), explain.png; computed in {page['seconds']:.0f} s")


if __name__ == "__main__":
    run_script("explain.py", lambda: main(settings.parse(sys.argv[1:], PRESETS, __doc__)),
               refused=(RuntimeError, OSError))
