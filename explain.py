"""
One training step in pictures: what train.py does to a clip, taken apart on a page.

    python explain.py                                  # the tiny world
    python explain.py --step 7 --tau 0.3 --lora out/tiny/lora.safetensors
    python explain.py modelscope --data clips.txt      # any base and clip, with train.py's own flags

Writes explain.html, which opens from disk, and explain.png, its main strip. Every number comes from the
functions that train: train.train takes one step, with wrappers around the network and the reward that
note what passes through.

Letters: F frames, S segments, H and W pixels.
"""
import inspect
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tyro.conf import Fixed, Suppress

import lora
import train
from model import decode_frames, load_base
from pages.html import Clips, heat, picture_uri, write_page
from reward import aggregate, load_rewards, segment_edges, tar_weights
from sampler import GUIDANCE, add_noise, alpha_bars, ddim_step, edit, edit_steps, guided_eps, noise_step
from support import settings
from support.files import check_folder, write_whole
from support.pictures import versions
from support.ranks import pick_device, pick_dtype, run_script, sample_generator
from support.videos import to_pixels
from tiny.clips import tiny_clips

CLIPS = 12  # of the tiny world's: encoding all 192 would take longer than all the rest
TAUS, GRAD_STEPS, LAMBDAS, SEGMENTS = (.1, .3, .6, 1.), (1, 2, 4, 8), (0., .5, 1., 2.), (1, 2, 4, 8, 16)
PANELS = {  # a fragment of the step's source: the panel that shows it
    "draw(step)": "clip", "= edit(": "chain", "score_frames(": "reward", "tar_weights(": "reward",
    "aggregate(": "reward", "loss = ": "reward", ".backward()": "pixels", "clip_grad_norm_": "unet",
    "optimizer.step()": "after"}


@dataclass(frozen=True)
class Config(train.Config):
    """Take one training step apart, on one clip. Flags of train.py mean the same; those that concern a
    whole run (its length, evaluation, saving) change nothing here."""
    step: int = 0
    """with the seed it decides the clip, its noise, its frames and the warm-up; a run takes more clips a
    step, so its step of this number has others"""
    lora: Path | None = None
    """adapters to start from; default fresh ones, as a run starts"""
    cache_interval: Suppress[Fixed[int]] = 1
    max_mb: float = 8.
    """largest size of the page; clips of large videos are compressed until it fits"""


PRESETS = {name: Config(**vars(preset)) for name, preset in train.PRESETS.items()}


# ----------------------------------------------------------------------------------------------
# Listening to a step

class Recorder:
    """Stands for a base in train.edit_rewards: the same networks, and a note of what the denoiser saw."""

    def __init__(self, base):
        self.base, self.vae, self.calls = base, base.vae, []

    def denoiser(self, z_t, t, text):
        eps = self.base.denoiser(z_t, t, text)
        self.calls.append((z_t.detach().chunk(2)[0], int(t[0]), eps.detach()))
        return eps

    def guesses(self, guidance):
        """[(t, z_0)]: what the model thinks the clip is at each chain step, from the noise it saw there."""
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


class Lab:
    """A base, a reward, adapters and one step's batch of one clip, and what can be asked about them."""

    def __init__(self, cfg):
        self.clips, device = Clips(), pick_device(cfg.device)
        dtype = pick_dtype(cfg.dtype, device)
        self.base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
        unet, guidance = self.base.unet, settings.first_given(cfg.guidance, self.base.guidance, GUIDANCE)
        self.cfg = cfg = replace(cfg, guidance=guidance)
        self.parameters = lora.load(unet, cfg.lora) if cfg.lora else lora.load_or_inject(
            unet, self.base.unet_file, cfg.rank, sample_generator(cfg.seed, "lora"))
        self.reward = load_rewards(cfg, self.base.folder, dtype, device)
        self.dataset = train.read_clips(cfg, self.base) if cfg.data else tiny_clips(self.base, dtype, CLIPS)
        self.uncond = self.base.encode_text([""])
        self.z, self.eps, self.text, self.g, self.captions = self.batch = self.draw(cfg)

    def draw(self, cfg):
        """The step's batch; with other segments the same clip and noise, and other frames of it."""
        return train.draw_batch(self.dataset, cfg.step, cfg, self.base.vae.config.scale, self.base.device)

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
        cfg = self.cfg
        noised = add_noise(self.z, self.eps, noise_step(tau, cfg.num_steps), alpha_bars())
        return noised, edit(self.base.denoiser, self.z, self.eps, self.text, self.uncond, tau, cfg.num_steps,
                            cfg.guidance)

    @torch.no_grad()
    def value(self, z_0):
        """R of an edit, and the plain mean reward of its frames."""
        R, logged = train.video_rewards(self.base, self.reward, z_0, self.g, self.captions, self.cfg)
        return {"R": R.item(), "reward": logged["reward"].item()}

    def rewards(self, base=None, reward=None, **changes):
        """train.edit_rewards of the step's batch: R (1,), and what the log shows."""
        return train.edit_rewards(base or self.base, reward or self.reward, self.uncond, self.batch,
                                  replace(self.cfg, **changes))

    def train_one_step(self):
        """train.train itself, for one step: its numbers, what passed the network, the frames scored."""
        recorder, seen, run = Recorder(self.base), [], OneStep(self.cfg.step)
        train.train(self.cfg, self.parameters, lambda step: self.batch,
                    lambda part: self.rewards(recorder, self.watched(seen)), run)
        return run.numbers, recorder, seen[0]

    def gradient(self, grad_steps):
        """For this K: the adapters' gradient, {path of a projection: its squared norm}, and seconds."""
        self.base.unet.zero_grad()
        started = time.perf_counter()
        R, _ = self.rewards(grad_steps=grad_steps)
        (-R.mean()).backward()                                                # Eq. (9)
        squares = {}
        for path, layer in lora.layers(self.base.unet).items():
            squares[path] = sum(p.grad.square().sum().item() for p in (layer.lora_A, layer.lora_B))
        return torch.cat([p.grad.flatten() for p in self.parameters]), squares, time.perf_counter() - started

    def scored(self, z_0, segments):
        """Frames drawn with S segments, their rewards; for each lambda f, R and R's gradient on pixels."""
        g, seen, lambdas = self.draw(replace(self.cfg, segments=segments))[3], [], {}
        z_0 = z_0.clone().requires_grad_()
        r = train.score_frames(self.base.vae, self.watched(seen), z_0, g, self.captions)      # Eq. (6)
        for lambda_tar in sorted({*LAMBDAS, self.cfg.lambda_tar}):
            f = tar_weights(g, self.cfg.frames, lambda_tar)                                   # Eq. (7)
            R = aggregate(r, f)                                                               # Eq. (8)
            [gradient] = torch.autograd.grad(R.sum(), seen[0], retain_graph=True)  # (1, S, 3, H, W)
            norms = gradient[0].flatten(1).norm(dim=1)
            lambdas[f"{lambda_tar:g}"] = {"f": f[0].tolist(), "R": R.item(), "norms": norms.tolist()}
            if lambda_tar == 0:  # the others only scale a frame's gradient
                heats = [picture_uri(heat_map(part)) for part in gradient[0]]
        return {"edges": segment_edges(self.cfg.frames, segments), "g": g[0].tolist(), "r": r[0].tolist(),
                "heats": heats, "lambdas": lambdas}


# ----------------------------------------------------------------------------------------------
# The page

def heat_map(gradient):
    """The gradient on a frame (3, H, W) as colours: the length over the three channels at each pixel."""
    return heat(gradient.norm(dim=0).cpu().numpy())


def source_lines():
    """The step's source as it stands in train.py: [(line, the panel that shows it, or "")]."""
    loop = inspect.getsource(train.train)
    loop = loop[loop.index("        # 1. The gradient"):loop.index("        # 4. Log")].rstrip()
    functions = [re.sub(r'""".*?"""\n\s*', "", inspect.getsource(f), count=1, flags=re.DOTALL)
                 for f in (train.edit_rewards, train.video_rewards)]
    lines = "\n\n".join([loop, *functions]).splitlines()
    return [(line, next((panel for words, panel in PANELS.items() if words in line), "")) for line in lines]


def other_settings(lab):
    """What the step would be with other K, tau, S and lambda; nothing here changes the adapters."""
    cfg, sweep, taus = lab.cfg, {}, []
    for K in sorted({k for k in GRAD_STEPS if k <= edit_steps(cfg.tau, cfg.num_steps)} | {cfg.grad_steps}):
        gradient, squares, seconds = lab.gradient(K)
        if not sweep:
            smallest = gradient
        blocks, projections = unet_table(squares)
        cosine = torch.cosine_similarity(gradient, smallest, dim=0).item()
        sweep[K] = {"norm": gradient.norm().item(), "cosine": cosine, "seconds": seconds, "blocks": blocks,
                    "projections": projections}
    for tau in sorted({t for t in TAUS if round(t * cfg.num_steps)} | {cfg.tau}):
        noised, z_0 = lab.edit(tau)
        taus.append({"tau": tau, "t": noise_step(tau, cfg.num_steps), "steps": edit_steps(tau, cfg.num_steps),
                     "noised": lab.show(noised), "edit": lab.show(z_0), **lab.value(z_0)})
        if tau == cfg.tau:
            mine = z_0
    segments = sorted({S for S in SEGMENTS if S <= cfg.frames} | {cfg.segments})
    return {"sweep": sweep, "taus": taus, "states": {S: lab.scored(mine, S) for S in segments}}


def explain(lab):
    """Everything that pages/templates/explain.html shows, and what the strip shows."""
    cfg, started, first = lab.cfg, time.perf_counter(), edit_steps(lab.cfg.tau, lab.cfg.num_steps)
    others, (noised, z_0) = other_settings(lab), lab.edit(cfg.tau)
    t_noi = noise_step(cfg.tau, cfg.num_steps)
    abar = alpha_bars()[t_noi].item()

    # The step itself, which moves the adapters.
    numbers, recorder, frames = lab.train_one_step()
    found = recorder.guesses(cfg.guidance)
    guesses = [{"i": first - n, "t": t, "clip": lab.show(z), "gradient": first - n <= cfg.grad_steps}
               for n, (t, z) in enumerate(found)]
    page = {"cfg": cfg, "caption": lab.captions[0], "reward": lab.reward.name, "versions": versions(),
            "t_noi": t_noi, "first": first, "signal": abar ** .5, "noise": (1 - abar) ** .5,
            "real": lab.show(lab.z), "noised": lab.show(noised), "edit": lab.show(z_0), "guesses": guesses,
            "pictures": [picture_uri(picture) for picture in lab.pixels(z_0)], "source": source_lines(),
            "numbers": numbers, "before": lab.value(z_0), "after": lab.value(lab.edit(cfg.tau)[1]), **others}

    # The strip: the frames that were drawn, from the real clip to the gradient.
    columns = [("real clip", "z", lab.pixels(lab.z)), ("noised", f"t = {t_noi}, Eq. 5", lab.pixels(noised))]
    for n in sorted({0, first // 3, 2 * first // 3}):
        columns.append((f"guess, step {first - n}", f"t = {found[n][0]}", lab.pixels(found[n][1])))
    columns.append(("the edit", "$z_0$", lab.pixels(z_0)))
    drawn, mine = lab.g[0].tolist(), others["states"][cfg.segments]
    columns = [(title, below, pixels[drawn]) for title, below, pixels in columns]
    heats = np.stack([heat_map(gradient) for gradient in frames.grad[0]])
    columns.append(("gradient of R", "on these pixels", heats))
    strip = {"columns": columns, "g": drawn, "r": mine["r"], "caption": page["caption"],
             "reward": page["reward"], **mine["lambdas"][f"{cfg.lambda_tar:g}"]}
    return page | {"seconds": time.perf_counter() - started}, strip


def main(cfg):
    """Take the step apart, and write the page and the strip."""
    cfg, out = replace(cfg, batch_size=1, eval_every=0, early_stop=False, out=None), cfg.out or Path("out/explain")
    settings.check_at_least(cfg, step=0)
    settings.check_positive(cfg, "max_mb")
    train.check(cfg)
    check_folder(out)
    lab = Lab(cfg)
    page, strip = explain(lab)
    size = write_page(out / "explain.html", "explain.html", cfg.max_mb, fps=cfg.fps,
                      title="One training step, taken apart", clips=lab.clips.pack(cfg.max_mb * .8), **page)
    draw_step(out / "explain.png", **strip)
    print(f"written: {out}/explain.html ({size:.1f} MB), explain.png; computed in {page['seconds']:.0f} s")


if __name__ == "__main__":
    run_script("explain.py", lambda: main(settings.parse(sys.argv[1:], PRESETS, __doc__)),
               refused=(RuntimeError, OSError))


# ---------------------------------------------------------------------------------------------------------------------
# What explain.py draws: where in the network a gradient is large, and the strip of one training step.

KINDS = ("within a frame", "to the caption", "across frames")


def block_and_kind(path):
    """Where a projection stands, in words: (block of the UNet, kind of attention)."""
    side, level = re.match(r"(transformer_in|mid|down|up)(?:_blocks?)?\.?(\d+)?", path).groups()
    block = "entrance" if side == "transformer_in" else "middle" if side == "mid" else f"{side} {level}"
    if "temp_attentions" in path or side == "transformer_in":
        return block, KINDS[2]  # there both attentions run over the frames
    return block, KINDS[0] if "attn1" in path else KINDS[1]


def unet_table(squares):
    """Shares of the squared gradient norm: {block: {kind: share}}, and {q, k, v, out: share}."""
    total, blocks, projections = sum(squares.values()) or 1., {}, {}
    for path, square in squares.items():
        block, kind = block_and_kind(path)
        row = blocks.setdefault(block, dict.fromkeys(KINDS, 0.))
        row[kind] += square / total
        name = path.split("to_")[1].split(".")[0]
        projections[name] = projections.get(name, 0.) + square / total
    return blocks, projections


def draw_step(path, columns, g, r, f, R, norms, caption, reward):
    """
    The strip: a row for each frame that was drawn, from the real clip to the gradient, then its reward and
    its weight.

    columns: [(title, line below it, pictures (S, H, W, 3))]; g, r, f, norms: [S]; R: the video's reward.
    """
    from matplotlib.figure import Figure
    S, n = len(g), len(columns)
    height = 1.1 * S + 1.05                                                   # inches, words included
    figure = Figure(figsize=(1.16 * n + 2.7, height), facecolor="white")
    grid = figure.add_gridspec(S, n + 2, width_ratios=[1] * n + [1.05, 1.05], wspace=.05, hspace=.05,
                               left=.055, right=.985, top=1 - .62 / height, bottom=.46 / height)
    for c, (title, below, pictures) in enumerate(columns):
        for s in range(S):
            axis = figure.add_subplot(grid[s, c])
            axis.imshow(pictures[s], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if s == 0:
                axis.set_title(f"{title}\n{below}", fontsize=9)
            if c == 0:
                axis.set_ylabel(f"frame {g[s]}", fontsize=9)

    bars = [(f"reward $r$\n{reward}", r, "#2456c6"), ("weight $f_i$\nEq. 7", f, "#c2570c")]
    for c, (title, values, color) in enumerate(bars):
        for s in range(S):
            axis = figure.add_subplot(grid[s, n + c])
            axis.barh([0], [values[s]], height=.32, color=color)
            axis.set(xlim=(0, 1.05 * max(1e-9, *values)), ylim=(-.6, .6), xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.text(0, .26, f"{values[s]:.3g}", fontsize=9)
            if s == 0:
                axis.set_title(title, fontsize=9)
    figure.text(.055, .17 / height, f"“{caption[:70]}”", fontsize=10, parse_math=False)
    formula = f"$R = \\frac{{1}}{{S}}\\sum_i f_i r_i = {R:.4f}$ (Eq. 8), loss $= -R$ (Eq. 9)"
    figure.text(.985, .17 / height, formula, fontsize=10, ha="right")
    with write_whole(path) as hidden:
        figure.savefig(hidden, dpi=110, format="png")
