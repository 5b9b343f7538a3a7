"""
One training step in pictures: what train.py does to a clip, taken apart on a page.

    python explain.py                                  # the tiny world
    python explain.py --step 3 --tau 0.3 --lora out/tiny/lora.safetensors
    python explain.py modelscope --data clips.txt      # any base and clip, with train.py's own flags

Writes explain.html, which opens from disk, and explain.png, its main strip. Every number comes from the functions that train;
train.train itself takes the step.
"""
import support.threads  # noqa: F401  before torch is loaded
import inspect
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tyro.conf import Fixed, Suppress

import lora
import train
from formats.weights import preset_of
from model import load_base
from pages.html import heat, picture_uri, pixels_uri, write_page
from reward import aggregate, load_rewards, segment_edges, tar_weights
from sampler import add_noise, chain, edit, edit_steps, guided, step
from support import settings
from support.files import check_folder
from support.pictures import write_figure
from support.ranks import pick_device, pick_dtype, run_script, sample_generator
from support.videos import to_pixels

CLIPS = 12  # of the tiny world's: encoding all 192 would take longer than all the rest
TAUS = (.1, .3, .6, 1.)
GRAD_STEPS = (1, 2, 4, 8)
LAMBDAS = (0., .5, 1., 2.)
SEGMENTS = (1, 2, 4, 8, 16)
CODE = (  # what the page shows of the step's source, in the order in which it runs: function, first words, words after the end
    (train.train, "# 1. The gradient", "loss = "), (edit, "# 1. Noise", None), (chain, "for i in", "return z"),
    (train.edit_rewards, "# Noise", None), (train.video_rewards, "chunk = ", None), (train.train, "loss = ", "# 4. Log"))
REPEATS = 20  # how often the step is taken in the last but one panel, until its effect can be seen
PANELS = {  # words of the step's source: the panel that shows what the line does
    "draw(step)": "clip", "z_noi = ": "noise", "z, std = step(": "chain", "z_0 = edit(": "edit",
    "decode_chosen(": "reward", "score_frames(": "reward", "tar_weights(": "reward", "aggregate(": "reward", "loss = ": "reward",
    ".backward()": "pixels", "clip_grad_norm_": "adapters", "optimizer.step()": "after"}


@dataclass(frozen=True)
class Config(train.Config):
    """Take one training step apart, on one clip. Flags of train.py mean the same; those of a whole run change nothing here."""
    step: int = 5
    """with the seed it decides clip, noise, frames and warm-up: 5 is a pale, noisy clip, whose edit looks different; a run takes
    more clips a step, so its step of this number has others"""
    lora: Path | None = None  # adapters to start from; default fresh ones, as a run starts
    cache_interval: Suppress[Fixed[int]] = 1


PRESETS = {name: Config(**vars(preset)) for name, preset in train.PRESETS.items()}


@torch.no_grad()
def guess_clips(base, z, eps, text, uncond, cfg):
    """What the model thinks the clip is at each step of an edit, from the noise it sees there: [(t, z_0)]."""
    levels = settings.chain_levels(base, cfg)
    first = edit_steps(cfg.tau, cfg.num_steps)
    z_t = add_noise(z, eps, levels, first)
    guesses = []
    for i in range(first, 0, -1):
        z_0, noise = guided(base.predict, z_t, levels, i, text, uncond, cfg.guidance)
        guesses.append((levels.t[i], z_0))
        z_t, _ = step(z_0, noise, levels, i)
    return guesses


class Setup:
    """What train.py loads for a run, one step's batch of one clip, and what the page asks of them."""

    def __init__(self, cfg):
        device = pick_device(cfg.device)
        dtype = pick_dtype(cfg.dtype, device)
        self.base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
        self.rewards = load_rewards(cfg, self.base.folder, dtype, device)
        for _, reward in self.rewards.summed:
            if reward.num_frames:
                raise ValueError(f"reward {reward.name}: sees a clip as a whole; the page shows rewards of single frames")
        self.cfg = settings.fit_to_base(cfg, self.base)
        network, generator = self.base.network, sample_generator(cfg.seed, "lora")
        found = lora.load(network, cfg.lora) if cfg.lora else lora.load_beside(network, self.base.network_file, cfg)
        self.parameters = found or lora.inject(network, cfg.rank, cfg.lora_alpha, generator, cfg.lora_layers)
        if cfg.data:
            self.dataset = train.read_clips(cfg, self.base)
        else:
            self.dataset = self.base.world.clips(self.base, cfg.frames, cfg.size or self.base.default_size, CLIPS)
        self.batch = self.draw(cfg.segments)
        self.z, self.eps, self.text, self.g, self.captions = self.batch
        self.uncond = self.base.unconditional(self.text)

    def draw(self, segments):
        """The step's batch; with other segments the same clip and noise, and other frames of it."""
        cfg = replace(self.cfg, segments=segments)
        return train.draw_batch(self.dataset, cfg.step, cfg, self.base)

    @torch.no_grad()
    def pixels(self, z):
        """The frames of latents, (F, H, W, 3) uint8."""
        return to_pixels(self.base.decode_frames(z)[0])

    def show(self, z):
        """The clip of latents, as the page has it."""
        return pixels_uri(self.pixels(z), self.cfg.fps)

    @torch.no_grad()
    def edit(self, tau):
        """The clip noised to t_noi, its edit, and numbers of them, R of Eq. (8) among these."""
        levels = settings.chain_levels(self.base, self.cfg)
        first = edit_steps(tau, levels.num_steps)
        noised = add_noise(self.z, self.eps, levels, first)
        z_0 = edit(self.base.predict, self.z, self.eps, self.text, self.uncond, levels, tau, self.cfg.guidance)
        R, logged = train.video_rewards(self.base, self.rewards, z_0, self.g, self.captions, self.cfg)
        return noised, z_0, {"tau": tau, "t": levels.t[first], "alpha": levels.alpha[first], "sigma": levels.sigma[first],
                             "steps": first, "R": R.item(), "reward": logged["reward"].item(),
                             "noised": self.show(noised), "edit": self.show(z_0)}

    def train(self, repeats):
        """train.train itself, which moves the adapters, takes this one step so often: the numbers that it logs of each."""
        logged = []

        def finish_step(step, numbers, finite, stopping):
            logged.append(numbers)
            return True

        run = SimpleNamespace(steps=lambda optimizer: [self.cfg.step] * repeats, finish_step=finish_step)
        method = train.Method(lambda step: self.batch,
                              lambda batch: train.edit_rewards(self.base, self.rewards, self.uncond, batch, self.cfg))
        if self.cfg.anchor:
            method.score = lora.anchored(self.base, method.score, self.cfg.anchor)
        train.train(self.cfg, self.parameters, method, run)
        return logged

    def gradient(self, grad_steps):
        """The adapters' gradient for this K."""
        R, _ = train.edit_rewards(self.base, self.rewards, self.uncond, self.batch, replace(self.cfg, grad_steps=grad_steps))
        gradients = torch.autograd.grad(-R.mean(), self.parameters)           # Eq. (9)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def scored(self, z_0, segments):
        """For this S: the frames drawn of an edit, their rewards, for each lambda f, R and the length of R's gradient there, and
        that gradient as pictures; the pictures (S, H, W, 3) again, for the strip."""
        g = self.draw(segments)[3]
        with torch.no_grad():
            frames = self.base.decode_frames(z_0, g)                     # (1, S, 3, H, W)
        frames.requires_grad_()
        r = sum(weight * reward(frames, self.captions) for weight, reward in self.rewards.summed)     # Eq. (6): (1, S)
        [gradient] = torch.autograd.grad(r.sum(), frames)
        lengths = gradient[0].flatten(1).norm(dim=1).cpu()
        lambdas = {}
        for lambda_tar in sorted({*LAMBDAS, self.cfg.lambda_tar}):
            f = tar_weights(g, self.cfg.frames, lambda_tar).cpu()             # Eq. (7)
            R = aggregate(r.cpu(), f)                                         # Eq. (8)
            # R is a sum of f r / S, so weights make a frame's gradient longer or shorter, and that is all.
            norms = f[0] * lengths / segments
            lambdas[f"{lambda_tar:g}"] = {"f": f[0].tolist(), "R": R.item(), "norms": norms.tolist()}
        heats = np.stack([heat(frame.norm(dim=0).cpu().numpy()) for frame in gradient[0]])
        pictures = [picture_uri(picture) for picture in heats]
        edges = segment_edges(self.cfg.frames, segments)
        return {"edges": edges, "g": g[0].tolist(), "r": r[0].tolist(), "heats": pictures, "lambdas": lambdas}, heats


def source_parts():
    """The step's code in the order in which it runs: [(function, [(line, the panel that shows what it does, or "")])]."""
    parts = []
    for function, start, end in CODE:
        source = inspect.getsource(function)
        first = source.rindex("\n", 0, source.index(start)) + 1
        last = source.rindex("\n", 0, source.index(end)) if end else len(source)
        lines = []
        for line in textwrap.dedent(source[first:last]).rstrip().splitlines():
            lines.append((line, next((panel for words, panel in PANELS.items() if words in line), "")))
        parts.append((f"{function.__module__}.{function.__name__}", lines))
    return parts


def explain(setup):
    """Everything that pages/templates/explain.html shows, and what the strip shows."""
    cfg = setup.cfg

    # What the step would be with other tau, K, S and lambda; nothing here changes the adapters.
    edits = {tau: setup.edit(tau) for tau in sorted({*TAUS, cfg.tau}) if tau == cfg.tau or round(tau * cfg.num_steps)}
    z_noi, edited, here = edits[cfg.tau]
    gradients = {K: setup.gradient(K) for K in sorted({*GRAD_STEPS, cfg.grad_steps}) if K <= here["steps"]}
    smallest = gradients[min(gradients)]
    sweep = {K: {"norm": gradient.norm().item(), "cosine": torch.cosine_similarity(gradient, smallest, dim=0).item()}
             for K, gradient in gradients.items()}
    scored = {S: setup.scored(edited, S) for S in sorted({*SEGMENTS, cfg.segments}) if S <= cfg.frames}
    guesses = guess_clips(setup.base, setup.z, setup.eps, setup.text, setup.uncond, cfg)
    steps = [{"i": here["steps"] - n, "t": t, "clip": setup.show(z)} for n, (t, z) in enumerate(guesses)]

    # The step itself, which moves the adapters; and again, until its effect can be seen.
    logged = setup.train(REPEATS)
    _, last_edit, last = setup.edit(cfg.tau)
    page = {"cfg": cfg, "caption": setup.captions[0], "reward": setup.rewards.name, "numbers": logged[0], "after": logged[1],
            "real": setup.show(setup.z), "source": source_parts(), "guesses": steps, "repeats": REPEATS,
            "pictures": [picture_uri(picture) for picture in setup.pixels(edited)], "here": here, "sweep": sweep, "last": last,
            "taus": [numbers for *_, numbers in edits.values()], "states": {S: state for S, (state, _) in scored.items()}}

    # The strip: the frames that were drawn, from the real clip to what the step leads to.
    mine, heats = scored[cfg.segments]
    columns = []
    for title, below, z in (("real clip", "z", setup.z), ("noised", f"t = {here['t']:.4g}, Eq. 5", z_noi),
                            ("first guess", f"of {here['steps']} steps", guesses[0][1]), ("the edit", "$z_0$", edited),
                            ("the edit, after", f"{REPEATS} such steps", last_edit)):
        columns.append((title, below, setup.pixels(z)[mine["g"]]))
    columns.insert(4, ("gradient of R", "on these pixels", heats))
    weighted = mine["lambdas"][f"{cfg.lambda_tar:g}"]
    return page, {"columns": columns, "g": mine["g"], "r": mine["r"], "f": weighted["f"], "R": weighted["R"],
                  "caption": page["caption"], "reward": page["reward"]}


def draw_step(path, columns, g, r, f, R, caption, reward):
    """The strip: a row for each frame that was drawn, from the real clip to the gradient, then its reward and its weight.
    columns: [(title, line below it, pictures (S, H, W, 3))]; g, r, f: [S]; R: the video's reward."""
    from matplotlib.figure import Figure
    S, n = len(g), len(columns)
    height = 1.1 * S + 1.05                                                   # inches, words included
    figure = Figure(figsize=(1.16 * n + 2.7, height), facecolor="white")
    axes = figure.subplots(S, n + 2, squeeze=False, width_ratios=[1] * n + [1.05, 1.05])
    figure.subplots_adjust(wspace=.05, hspace=.05, left=.055, right=.985, top=1 - .62 / height, bottom=.46 / height)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, frame in zip(axes[:, 0], g):
        axis.set_ylabel(f"frame {frame}", fontsize=9)
    for cells, (title, below, pictures) in zip(axes.T, columns):
        cells[0].set_title(f"{title}\n{below}", fontsize=9)
        for axis, picture in zip(cells, pictures):
            axis.imshow(picture, interpolation="nearest")

    bars = [(f"reward $r$\n{reward}", r, "#2456c6"), ("weight $f_i$\nEq. 7", f, "#c2570c")]
    for cells, (title, values, color) in zip(axes.T[n:], bars):
        cells[0].set_title(title, fontsize=9)
        for axis, value in zip(cells, values):
            axis.barh([0], [value], height=.32, color=color)
            axis.set(xlim=(0, 1.05 * max(1e-9, *values)), ylim=(-.6, .6))
            axis.text(0, .26, f"{value:.3g}", fontsize=9)
    figure.text(.055, .17 / height, f"“{caption[:70]}”", fontsize=10, parse_math=False)
    formula = f"$R = \\frac{{1}}{{S}}\\sum_i f_i r_i = {R:.4f}$ (Eq. 8), loss $= -R$ (Eq. 9)"
    figure.text(.985, .17 / height, formula, fontsize=10, ha="right")
    write_figure(path, figure)


def main(cfg):
    """Take the step apart, and write the page and the strip."""
    out = cfg.out or Path("out/explain")
    cfg = replace(cfg, batch_size=1, eval_every=0, watch=(), out=None)
    settings.check_at_least(cfg, step=0)
    train.check(cfg)
    check_folder(out)
    setup = Setup(cfg)
    page, strip = explain(setup)
    size = write_page(out / "explain.html", "explain.html", title="One training step, taken apart", **page)
    draw_step(out / "explain.png", **strip)
    print(f"written: {out}/explain.html ({size:.1f} MB), explain.png")


if __name__ == "__main__":
    run_script("explain.py", lambda: main(settings.parse(sys.argv[1:], PRESETS, __doc__, preset_of)),
               refused=(RuntimeError, OSError))
