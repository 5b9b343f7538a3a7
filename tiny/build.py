"""
Rebuild, from nothing and seeded, every weight that ships in tiny/weights.

    python -m tiny.build                      # all stages, in order
    python -m tiny.build --stages judge       # one stage; it reads what earlier stages wrote

Stages: the autoencoder; a CLIP, whose text tower conditions the UNet; the text-to-video UNet, trained on Eq. (1) with caption
dropout, on frames and then on clips; the preference model, the CLIP fine-tuned the way HPSv2 was; the judge, which nothing ever
optimises; two small rewards, action and removal; and the gates, which say what all of these have learned. What was tried on the
way, and what it gave, is in tiny/README.md.

Letters: B clips or pictures, F frames, C channels, H and W rows and columns.
"""
import sys

if not __package__:
    print("build.py: start it from the folder of the repository as: python -m tiny.build", file=sys.stderr)
    sys.exit(2)

import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F_
import tyro
from safetensors.torch import load_file, save_file
from torch import nn

from formats.names import unet_to_diffusers, vae_to_diffusers
from model import (
    Autoencoder,
    TemporalConv,
    TemporalTransformer,
    UNet3D,
    UNetConfig,
    VAEConfig,
    load_text_encoder,
    load_unet,
    load_vae,
)
from rewards import action, removal
from sampler import add_noise, alpha_bars, edit, guided_eps, sample
from support.ranks import progress
from tiny import world
from tiny.judge import Judge, judge_clips, labels, load_judge

WEIGHTS = Path(__file__).resolve().parent / "weights"
STATE_EVERY = 250  # steps between two saved states of a training, if they are asked for
STAGES = {"vae": 0, "clip": 1, "unet": 2, "preference": 3, "judge": 4, "action": 6, "removal": 7, "gates": 5}  # and their seeds

VAE = VAEConfig(channels=(24, 48, 96), blocks_per_level=1, norm_groups=8)
UNET = UNetConfig(channels=(32, 64), blocks_per_level=1, attention_levels=(False, True), context_dim=64, head_dim=32,
                  stem_heads=1, norm_groups=8, sample_size=8)
CLIP = dict(embed_dim=64,
            vision_cfg=dict(image_size=world.SIZE, patch_size=8, width=64, layers=3, head_width=32),
            text_cfg=dict(context_length=world.CONTEXT_LENGTH, vocab_size=len(world.WORDS) + 4, width=64, heads=1, layers=3))
# The base's own guidance, written into its config. It is low because eps_c - eps_u points to what other shapes lack: guidance 3
# adds it three times, and squares become bow ties.
GUIDANCE = 1.5
MAX_WEIGHT = 100.  # of high noise in Eq. (1), where only the words can tell: 1 / abar_t up to this; see tiny/README.md
ATTACK = 5.  # against the action classifier: 0.02 of each of a clip's values, root mean square
LATENT_STD = 0.5  # see tiny/README.md: with unit variance, noise at t = 951 still shows the layout, and words go unread


@dataclass
class Config:
    """Rebuild the tiny world's weights."""
    stages: tuple[str, ...] = tuple(STAGES)
    out: Path = WEIGHTS
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 2
    """for the UNet; the other stages have too little to do for more than one"""
    vae_steps: int = 3000
    clip_steps: int = 2500
    image_steps: int = 3000
    unet_steps: int = 1900
    preference_steps: int = 2000
    judge_steps: int = 1200
    action_steps: int = 2600
    removal_steps: int = 1000
    gate_count: int = 96
    """videos of each prompt set that the base is judged by at the end"""
    clips: int = 6000
    """training clips of the UNet; the other stages draw as many or fewer"""
    states: Path | None = None
    """a folder outside the repository for the state of each training, from which the same command goes on after a stop; empty it
    before changing anything but the stages"""


def all_scenes():
    return world.scenes("in_domain") + world.scenes("new") + world.scenes("other")


def render(num_clips, seed, rates=world.FLAWS, scenes=None):
    """num_clips clips over all scenes, or some: (n, F, 3, H, W) float16 in [0, 1], their scenes, flaws. Clip i has seed + i."""
    scenes = scenes or all_scenes()
    chosen = [scenes[i % len(scenes)] for i in range(num_clips)]
    made = [world.make_clip(s, seed + i, rates=rates) for i, s in enumerate(progress(chosen, desc="drawing clips"))]
    return torch.stack([c for c, _ in made]).half(), chosen, [f for _, f in made]


def schedule(optimizer, step, steps, lr, warmup=100):
    """Linear warm-up, then a cosine to zero."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / warmup) * .5 * (1 + math.cos(math.pi * step / steps))


def fit(cfg, name, module, loss_of, steps, lr, ema_decay=0.):
    """The one training loop of this file: AdamW, clipped, averaged weights if asked. loss_of(step) -> loss, note."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0)
    average = copy.deepcopy(module) if ema_decay else module
    state = cfg.states / f"{name.replace(', ', '_').replace(' ', '_')}.pt" if cfg.states else None
    parts = {"module": module, "optimizer": optimizer, "average": average}
    first = load_state(state, parts, steps) if state and state.exists() else 0

    bar = progress(range(first, steps), name, steps, unit="step", initial=first)
    for step in bar:
        if state and step > first and step % STATE_EVERY == 0:
            save_state(state, parts, step, steps)
        schedule(optimizer, step, steps, lr)
        loss, note = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if ema_decay:  # short at first, so that the start is forgotten
            decay = min(ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for a, p in zip(average.parameters(), module.parameters()):
                    a.lerp_(p, 1 - decay)
        if step % 50 == 0:
            bar.set_postfix_str(note, refresh=False)
    if state and first < steps:
        save_state(state, parts, steps, steps)
    return average.eval()


def save_state(path, parts, step, steps):
    """All that a training needs to go on as if it had not stopped; written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**whole, "step": step, "steps": steps, "random": torch.get_rng_state()}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_state(path, parts, steps):
    """Put back what save_state wrote and say at which step to go on. ValueError if it was to be another number of steps."""
    found = torch.load(path, weights_only=True, map_location="cpu")
    if found["steps"] != steps:
        raise ValueError(f"{path} is of a training of {found['steps']} steps, not {steps}: remove it to start anew")
    for name, part in parts.items():
        part.load_state_dict(found[name])
    torch.set_rng_state(found["random"])
    return found["step"]


def save(folder, module, config, name):
    """Weights in fp16 with their config beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def save_clip(folder, clip):
    """The same for a CLIP, whose words come along: the context length, then the vocabulary."""
    save(folder, clip, CLIP, "open_clip_model.safetensors")
    (folder / "words.txt").write_text("\n".join([str(world.CONTEXT_LENGTH), *world.WORDS]) + "\n")


# ---------------------------------------------------------------------------------------------------------------------

def build_vae(cfg):
    """
    The autoencoder: squared and absolute error, the absolute error of the picture's steps, and a KL term that is small enough
    to leave the latents sharp. The steps between neighbours are what makes an edge straight; the other two hardly see it.
    """
    clips, _, _ = render(min(2500, cfg.clips), cfg.seed + 1_000_000)
    frames = clips.flatten(0, 1)                                                         # (n, 3, H, W)
    vae = Autoencoder(VAE).to(cfg.device)

    def loss_of(step):
        x = frames[torch.randint(len(frames), (16,))].to(cfg.device).float() * 2 - 1
        mean, logvar = vae.encode(x).chunk(2, dim=1)
        y = vae.decode(mean + torch.randn_like(mean) * (logvar / 2).exp())
        kl = .5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        mse = F_.mse_loss(y, x)
        edges = F_.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F_.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        loss = mse + .2 * F_.l1_loss(y, x) + .2 * edges + 1e-4 * kl
        return loss, f"{-10 * math.log10(mse.item() / 4):.1f} dB"

    vae = fit(cfg, "autoencoder", vae, loss_of, cfg.vae_steps, lr=2e-3, ema_decay=.998)
    with torch.no_grad():  # the scale that gives latents their standard deviation
        latents = torch.cat([vae.encode(x.to(cfg.device).float() * 2 - 1).chunk(2, dim=1)[0] for x in frames[:8000:8].split(250)])
    scale = round(LATENT_STD / latents.std().item(), 5)
    save(cfg.out / "vae", vae, vae_to_diffusers(replace(VAE, scale=scale)), "diffusion_pytorch_model.safetensors")


def build_clip(cfg):
    """A CLIP of open_clip's own class, trained contrastively on single frames and their captions."""
    clips, scenes, _ = render(min(4320, cfg.clips), cfg.seed + 2_000_000)
    captions = [s.caption for s in all_scenes()]
    n = len(captions)
    tokens = world.tokenizer()(captions).to(cfg.device)
    clip = open_clip.CLIP(**CLIP).to(cfg.device)

    def loss_of(step):  # one frame of each caption, so that no other row of the batch is a right answer too
        pick = torch.arange(n) + n * torch.randint(len(clips) // n, (n,))
        images = normalise(clips[pick, torch.randint(world.FRAMES, (n,))].to(cfg.device).float())
        image, text, logit_scale = clip(images, tokens)[:3]
        logits = logit_scale.clamp(max=100) * image @ text.T
        target = torch.arange(n, device=cfg.device)
        right = (logits.argmax(1) == target).float().mean().item()
        return (F_.cross_entropy(logits, target) + F_.cross_entropy(logits.T, target)) / 2, f"{right:.0%} of {n} captions"

    clip = fit(cfg, "CLIP", clip, loss_of, cfg.clip_steps, lr=1e-3)
    save_clip(cfg.out / "text_encoder", clip)


def normalise(images):
    """Frames in [0, 1] to what CLIP takes."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None]
                 for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (images - mean) / std


# ---------------------------------------------------------------------------------------------------------------------

def frozen(cfg):
    """The autoencoder and the text encoder that earlier stages wrote."""
    vae = load_vae(cfg.out / "vae").to(cfg.device)
    return vae, load_text_encoder(cfg.out / "text_encoder", world.tokenizer()).to(cfg.device)


@torch.no_grad()
def encode_clips(vae, clips, device):
    """(n, F, 3, H, W) in [0, 1] -> moments (n, 2C, F, h, w), float16."""
    out = []
    for part in progress(clips.split(8), desc="encoding clips"):
        moments = vae.encode(part.flatten(0, 1).to(device).float() * 2 - 1)
        out.append(moments.unflatten(0, part.shape[:2]).transpose(1, 2).half().cpu())
    return torch.cat(out)


def posterior(moments, scale):
    """A sample of the latents: moments (B, 2C, F, h, w) -> z (B, C, F, h, w)."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return scale * (mean + torch.randn_like(mean) * (logvar / 2).exp())


def start_as_identity(unet, constant=6.):
    """
    Weights with which the untrained UNet returns its input. At high noise eps is z_t but for a few hundredths, and only in those
    can the words tell anything; otherwise thousands of steps go into merely passing z_t on exactly enough.

    Each latent channel a travels over the last skip connection as a group of four, (a, -a, constant, -constant). The last
    GroupNorm subtracts a mean of 0 from it and divides it by nearly a constant, and silu(x) - silu(-x) = x.
    """
    width, block = unet.config.channels[0], unet.up_blocks[-1].resnets[-1]
    first, last, shortcut = unet.conv_in, unet.conv_out, block.conv_shortcut
    for layer in (block.conv2, last, *(m.proj_out for m in temporal_layers(unet) if hasattr(m, "proj_out"))):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for c in range(unet.config.in_channels):
            group = range(4 * c, 4 * c + 4)
            first.weight[group], shortcut.weight[group], shortcut.bias[group] = 0, 0, 0
            first.bias[group] = constant * torch.tensor([0., 0., 1., -1.], device=first.bias.device)
            for sign, channel in zip((1, -1), group):
                first.weight[channel, c, 1, 1] = sign
                last.weight[c, channel, 1, 1] = sign * ((1 + constant**2) / 2) ** .5
            for channel in group:  # the skip comes behind what comes from below
                shortcut.weight[channel, channel - width] = 1


def temporal_layers(unet):
    """The layers that look along time."""
    return [m for m in unet.modules() if isinstance(m, (TemporalConv, TemporalTransformer))]


def build_unet(cfg):
    """
    The text-to-video base, on Eq. (1) with captions dropped in a tenth of the clips: the spatial layers on single frames first,
    many captions and places for the price of one clip; then everything on clips, as ModelScopeT2V was (arXiv:2308.06571).
    """
    vae, text_encoder = frozen(cfg)
    clips, scenes, _ = render(cfg.clips, cfg.seed + 3_000_000)
    moments = encode_clips(vae, clips, cfg.device)                                       # (n, 2C, F, h, w)
    every = all_scenes()
    with torch.no_grad():  # (captions, N, C): the empty caption comes last
        text = text_encoder([s.caption for s in every] + [""])
    scene_of = torch.tensor([every.index(s) for s in scenes])
    unet, abar = UNet3D(UNET).to(cfg.device), alpha_bars()
    start_as_identity(unet)

    def loss_of(clip, frames=slice(None)):
        """Eq. (1), weighted, for some clips, of each all frames or one: (B,), (B,)."""
        B, chosen = len(clip), moments[clip, :, frames]
        z = posterior((chosen if chosen.ndim == 5 else chosen[:, :, None]).to(cfg.device), vae.config.scale)
        t = (len(abar) * (torch.randperm(B) + torch.rand(B)) / B).long()                 # one in each B-th of all steps
        caption = torch.where(torch.rand(B) < .1, len(every), scene_of[clip])
        eps = torch.randn_like(z)
        error = (unet(add_noise(z, eps, t, abar), t.to(cfg.device), text[caption.to(cfg.device)]) - eps).square()
        weight = (1 / abar[t]).clamp(max=MAX_WEIGHT).to(z)                               # (B,)
        loss = (weight * error.mean(dim=(1, 2, 3, 4))).mean()
        return loss, f"loss {loss:.3f}"

    def random(n, batch):
        return torch.randint(n, (batch,))

    for layer in temporal_layers(unet):
        layer.forward = lambda x, num_frames: x  # of the instance: hides the class's own until it is deleted
    unet = fit(cfg, "UNet, frames", unet, lambda step: loss_of(random(len(clips), 128), random(world.FRAMES, 128)),
               cfg.image_steps, lr=2e-3, ema_decay=.999)
    for layer in temporal_layers(unet):
        del layer.forward
    unet = fit(cfg, "UNet, clips", unet, lambda step: loss_of(random(len(clips), 16)), cfg.unet_steps, lr=1e-3, ema_decay=.999)
    save(cfg.out / "unet", unet, unet_to_diffusers(UNET) | {"guidance": GUIDANCE}, "diffusion_pytorch_model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------

# The simulated annotator's rule. An image's worth to a caption falls with each flaw, by its strength, and with each word
# that the image gets wrong; of two images the annotator takes A with probability sigmoid(worth A - worth B).
WORTH = {"watermark": -5., "blur": -4., "washout": -4., "noise": -4.}
WRONG_WORD = -5.
# How often a clip has each flaw in what the preference model and the judge learn from. The base's own clips (world.FLAWS) show
# blur and wash-out too seldom to learn what they cost.
FLAWS_TO_TELL = {"watermark": .55, "blur": .35, "washout": .35, "noise": .20}
PREFERENCE_SCALE = 10.  # worth in units of cosine; with HPSv2's 100, what flaws cost would drown in what captions differ by


def wrong_words(a, b):
    """In how many of colour, shape and direction two scenes differ."""
    return (a.colour != b.colour) + (a.shape != b.shape) + (a.direction != b.direction)


def worth(scene, flaws, asked):
    """The annotator's value of an image of `scene` with `flaws`, for a caption that asked for another scene or the same."""
    return sum(WORTH[f] * s for f, s in flaws.items()) + WRONG_WORD * wrong_words(scene, asked)


@torch.no_grad()
def through_vae(vae, clips, device):
    """Clips as the reward will see them: encoded and decoded, (n, F, 3, H, W) in [0, 1], float16."""
    out = []
    for part in progress(clips.split(8), desc="through the autoencoder"):
        x = part.flatten(0, 1).to(device).float() * 2 - 1
        x = vae.decode(vae.encode(x).chunk(2, dim=1)[0])
        out.append(x.add(1).div(2).clamp(0, 1).half().cpu().unflatten(0, part.shape[:2]))
    return torch.cat(out)


def base_clips(cfg, prompts, tau=None, clips=None):
    """Clips by the base: from pure noise, or (with tau) edits of given clips, whose content is known. As through_vae's."""
    vae, text_encoder = frozen(cfg)
    unet = load_unet(cfg.out / "unet").to(cfg.device)
    out = []
    with torch.no_grad():
        uncond = text_encoder([""])
        for start in progress(range(0, len(prompts), 12), desc="clips by the base"):
            text = text_encoder(prompts[start:start + 12])
            noise = torch.randn(len(text), 4, world.FRAMES, world.SIZE // 4, world.SIZE // 4).to(cfg.device)
            if tau is None:
                z = sample(unet, noise, text, uncond, guidance=GUIDANCE)
            else:
                moments = encode_clips(vae, clips[start:start + 12], cfg.device).to(cfg.device)
                z = posterior(moments, vae.config.scale)
                z = edit(unet, z, noise, text, uncond, tau=tau, guidance=GUIDANCE)
            out.append(decode_clips(vae, z))
    return torch.cat(out)


@torch.no_grad()
def guessed_clips(cfg, prompts, clips):
    """What the base takes given clips for when they are noised, at random t: its predicted z_0, blurred the more the noise."""
    vae, text_encoder = frozen(cfg)
    unet, alpha_bar, out = load_unet(cfg.out / "unet").to(cfg.device), alpha_bars(), []
    uncond = text_encoder([""])
    for start in progress(range(0, len(prompts), 8), desc="guesses of the base"):
        z = posterior(encode_clips(vae, clips[start:start + 8], cfg.device).to(cfg.device), vae.config.scale)
        t = torch.randint(100, len(alpha_bar), ()).item()
        z_t = add_noise(z, torch.randn_like(z), t, alpha_bar)
        eps = guided_eps(unet, z_t, t, text_encoder(prompts[start:start + 8]), uncond, GUIDANCE)
        a = float(alpha_bar[t])
        out.append(decode_clips(vae, (z_t - (1 - a) ** .5 * eps) / a ** .5))
    return torch.cat(out)


def decode_clips(vae, z):
    """z (B, C, F, h, w) -> (B, F, 3, H, W) in [0, 1], float16, on the CPU."""
    frames = vae.decode(z.transpose(1, 2).flatten(0, 1) / vae.config.scale)
    return frames.add(1).div(2).clamp(0, 1).half().cpu().unflatten(0, (len(z), world.FRAMES))


def build_preference(cfg):
    """HPSv2's recipe (arXiv:2306.09341, Sec. 4): a CLIP, a softmax over a pair of images, cross-entropy with the choice."""
    vae, _ = frozen(cfg)
    every = all_scenes()
    drawn, scenes, flaws = render(24 * len(every), cfg.seed + 4_000_000, FLAWS_TO_TELL)
    keep = torch.arange(len(drawn))
    pictures = drawn[keep, torch.randint(world.FRAMES, (len(drawn),))]                   # (n, 3, H, W)
    pictures = torch.cat([pictures, through_vae(vae, pictures[:, None], cfg.device)[:, 0]])
    of_scene = {s: [i for i in range(len(pictures)) if scenes[i % len(scenes)] == s] for s in every}
    samples = base_clips(cfg, [s.caption for s in every])                                # (captions, F, 3, H, W)

    model = open_clip.CLIP(**CLIP).to(cfg.device)
    model.load_state_dict({k: v.float() for k, v in load_file(cfg.out / "text_encoder/open_clip_model.safetensors").items()})
    with torch.no_grad():
        model.logit_scale.fill_(math.log(PREFERENCE_SCALE)).requires_grad_(False)
    tokens = world.tokenizer()([s.caption for s in every]).to(cfg.device)

    def one_of(options):
        return options[torch.randint(len(options), ()).item()]

    def near(scene):
        """A scene that differs in one word, so that every word of a caption comes to matter."""
        return one_of([s for s in every if wrong_words(s, scene) == 1])

    def pair():
        """Caption number, two images, and which one the annotator takes (0 or 1)."""
        c = torch.randint(len(every), ()).item()
        a_scene = every[c]
        b_scene = near(a_scene) if torch.rand(()) < .4 else a_scene
        if torch.rand(()) < .7:  # two drawn clips
            a, b = one_of(of_scene[a_scene]), one_of(of_scene[b_scene])
            images, fa, fb = [pictures[a], pictures[b]], flaws[a % len(flaws)], flaws[b % len(flaws)]
        else:  # two samples of the base; of the same one, the second is spoilt further
            frame, fa, fb = torch.randint(world.FRAMES, ()).item(), {}, {}
            images = [samples[every.index(s), frame] for s in (a_scene, b_scene)]
            if a_scene is b_scene:
                fb = {one_of(list(world.FLAWS)): .3 + .7 * torch.rand(()).item()}
                images[1] = world.add_flaws(images[1][None].float(), fb, None)[0].half()
        better = worth(b_scene, fb, every[c]) - worth(a_scene, fa, every[c])
        return c, torch.stack(images), float(torch.rand(()) < 1 / (1 + math.exp(-better))), better

    def loss_of(step):
        rows = [pair() for _ in range(48)]
        images = normalise(torch.cat([r[1] for r in rows]).to(cfg.device).float())
        choice = torch.tensor([int(r[2]) for r in rows], device=cfg.device)
        image, text, logit_scale = model(images, tokens[[r[0] for r in rows]])[:3]
        logits = logit_scale * (image.unflatten(0, (-1, 2)) * text[:, None]).sum(-1)   # (B, 2)
        right.append((logits.argmax(1) == choice).float().mean().item())
        ceiling.append(sum(int(r[3] > 0) == r[2] for r in rows) / len(rows))
        mean = [sum(v[-50:]) / len(v[-50:]) for v in (right, ceiling)]
        return F_.cross_entropy(logits, choice), f"agrees {mean[0]:.0%}, at best {mean[1]:.0%}"

    right, ceiling = [], []
    model = fit(cfg, "preference model", model, loss_of, cfg.preference_steps, lr=3e-4)
    save_clip(cfg.out / "reward", model)


def clips_in_motion(cfg, count, seed, crossed=True):
    """
    What to learn motion from: drawn clips, the same through the autoencoder, and the base's edits of a tenth, with their scenes.

    A quarter of the drawn clips do not move, and the trail of many points elsewhere or is missing, so the shape must be watched.
    crossed: whether stripes may have a trail across their way; they then move along the trail, and not as their scene says.
    """
    def horizontal(direction):
        return bool(world.DIRECTIONS[direction][0])

    vae, _ = frozen(cfg)
    every, g = all_scenes(), torch.Generator().manual_seed(cfg.seed + seed)
    seen = []  # (clip, scene)
    for i in progress(range(min(count, cfg.clips)), desc="drawing clips"):
        scene, trail = every[i % len(every)], None
        if torch.rand((), generator=g) < .25:
            scene = replace(scene, direction="")
        if torch.rand((), generator=g) < .4 or not scene.direction:
            trail = [*world.DIRECTIONS, ""][torch.randint(5, (), generator=g)]
        if not crossed and scene.shape == "stripes" and scene.direction and trail and (
                horizontal(scene.direction) != horizontal(trail)):
            trail = None
        clip, _ = world.make_clip(scene, cfg.seed + seed * 1_000_000 + i, trail=trail, rates=FLAWS_TO_TELL)
        seen.append((clip.half(), scene))
    clips = torch.stack([c for c, _ in seen])
    moving = [i for i, (_, s) in enumerate(seen) if s.direction][:count // 10]
    edits = base_clips(cfg, [seen[i][1].caption for i in moving], tau=.3, clips=clips[moving])
    scenes = [s for _, s in seen] * 2 + [seen[i][1] for i in moving]
    return torch.cat([clips, through_vae(vae, clips, cfg.device), edits]), scenes


def build_judge(cfg):
    """The judge, on other seeds than anything else here."""
    clips, scenes = clips_in_motion(cfg, 2880, seed=5)
    truth = labels(scenes)
    judge = Judge().to(cfg.device)

    def loss_of(step):
        pick = torch.randint(len(clips), (24,))
        logits = judge(clips[pick].to(cfg.device).float())
        target = [t[pick].to(cfg.device) for t in truth]
        right = [(a.argmax(1) == b).float().mean().item() for a, b in zip(logits, target)]
        loss = sum(F_.cross_entropy(a, b) for a, b in zip(logits, target))
        return loss, "colour {:.0%} shape {:.0%} direction {:.0%}".format(*right)

    judge = fit(cfg, "judge", judge, loss_of, cfg.judge_steps, lr=2e-3)
    save_tensors(cfg.out / "judge.safetensors", judge)


# ---------------------------------------------------------------------------------------------------------------------

def build_action(cfg):
    """
    The classifier of rewards/action.py: clips in motion, videos that the base makes of captions, which it follows, and guesses.

    Half of them are played backwards, where all that a single frame says of the direction is wrong; or it would read the trail
    of stripes, whose motion is small from frame to frame; and stripes come three times as often as other shapes. A fifth are
    slowed, below three fifths of their pace, and then do not count as moving: or a shape that hardly moves would satisfy the
    reward. More and more, five of eight clips are changed against it (adversarial training, arXiv:1706.06083): the gradient of
    a classifier that has not seen this leads to a pattern, not to motion.
    """
    clips, scenes = clips_in_motion(cfg, 1008, seed=9, crossed=False)
    asked = all_scenes() * 2
    moving = [i for i, scene in enumerate(scenes[:min(1008, cfg.clips)]) if scene.direction][:480]
    guesses = guessed_clips(cfg, [scenes[i].caption for i in moving], clips[moving])
    clips = torch.cat([clips, base_clips(cfg, [s.caption for s in asked]), guesses])
    scenes = scenes + asked + [scenes[i] for i in moving]
    often = torch.tensor([3. if scene.shape == "stripes" else 1. for scene in scenes])
    direction = labels(scenes)[2]
    turned, still = torch.tensor([1, 0, 3, 2, 4]), 4  # left and right, up and down, no motion
    classifier = action.Classifier().to(cfg.device)

    def loss_of(step):
        pick, backwards, slow = torch.multinomial(often, 32), torch.rand(32) < .5, torch.rand(32) < .2
        x, target = clips[pick].to(cfg.device).float(), direction[pick]
        x[backwards] = x[backwards].flip(1)
        x[slow] = slowed(x[slow], .6 * torch.rand(()).item())
        target = torch.where(backwards, turned[target], target).masked_fill(slow, still).to(cfg.device)
        strength = ATTACK * min(1., max(0., step / cfg.action_steps - .2) / .5)
        if strength:
            x = torch.cat([x[:12], attacked(classifier, x[12:], target[12:], strength)])
        logits = classifier(x)
        right = (logits.argmax(1) == target).float()
        return F_.cross_entropy(logits, target), f"direction {right[:12].mean():.0%}, changed clips {right[12:].mean():.0%}"

    classifier = fit(cfg, "action", classifier, loss_of, cfg.action_steps, lr=1e-3, ema_decay=.99)
    save_tensors(cfg.out / "action" / "model.safetensors", classifier)


def slowed(clips, pace):
    """Clips (B, F, 3, H, W) played at a share of their pace, around their middle; frames in between are blended."""
    middle = (clips.shape[1] - 1) / 2
    at = middle + pace * (torch.arange(clips.shape[1], device=clips.device) - middle)     # (F,)
    first = at.floor().long()
    part = (at - first)[:, None, None, None]
    return (1 - part) * clips[:, first] + part * clips[:, first + 1]


def attacked(classifier, clips, target, strength, steps=3):
    """Clips changed by at most `strength` (the L2 norm of all of a clip's pixels, 0 to 1) so that the classifier errs."""
    def size(d):
        return d.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1, 1)

    d = torch.randn_like(clips)
    d = d / size(d) * strength * torch.rand(len(clips), 1, 1, 1, 1, device=d.device)
    for _ in range(steps):
        d.requires_grad_()
        grad, = torch.autograd.grad(F_.cross_entropy(classifier((clips + d).clamp(0, 1)), target), d)
        d = d.detach() + grad / size(grad) * strength / 2
        d = d * (strength / size(d)).clamp(max=1)
    return (clips + d).clamp(0, 1).detach()


def build_removal(cfg):
    """
    The detector of rewards/removal.py: frames with a watermark and without one, drawn and through the autoencoder.

    Faint bands are among them, fainter than in any clip: or the reward would be content with one that is half gone.
    """
    vae, _ = frozen(cfg)
    drawn, _, _ = render(min(2880, cfg.clips), cfg.seed + 10_000_000, FLAWS_TO_TELL | {"watermark": 0.})
    frames = drawn[torch.arange(len(drawn)), torch.randint(world.FRAMES, (len(drawn),))].float()    # (n, 3, H, W)
    opacity = (.05 + .65 * torch.rand(len(frames), 1, 1, 1)) * world.watermark_band()               # (n, 1, H, W)
    frames = torch.cat([frames, frames + opacity * (.92 - frames)]).half()
    frames = torch.cat([frames, through_vae(vae, frames[:, None], cfg.device)[:, 0]])
    marked = torch.tensor([0., 1., 0., 1.]).repeat_interleave(len(drawn))
    detector = removal.Detector().to(cfg.device)

    def loss_of(step):
        pick = torch.randint(len(frames), (96,))
        logits, target = detector(frames[pick].to(cfg.device).float()), marked[pick].to(cfg.device)
        right = ((logits > 0) == (target > 0)).float().mean()
        return F_.binary_cross_entropy_with_logits(logits, target), f"watermark {right:.0%}"

    detector = fit(cfg, "removal", detector, loss_of, cfg.removal_steps, lr=2e-3, ema_decay=.99)
    save_tensors(cfg.out / "removal" / "model.safetensors", detector)


def save_tensors(path, module):
    """Weights in fp16, of a module whose own file says its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}, path)


# ---------------------------------------------------------------------------------------------------------------------

# Least shares of the base's videos, and least parts of what the autoencoder's copies of drawn clips reach on the same scenes.
GATES = {"colour": .95, "shape": .95, "direction": .80, "watermarked": .25, "action": .95}
GATES_OF_COPIES = {"fidelity": .90, "steadiness": .90, "sharpness": .75, "saturation": .80}
GATES_OF_REWARDS = {"fresh clips": {"action": .97}} | {
    f"through the autoencoder, {name}": {"removal": .95} for name in world.PROMPT_SETS}


def missed_gates(found):
    """What the measures of build_gates say against the base and the small rewards, one line per gate that is missed."""
    missed = [f"{of}: {k} {found[of][k]:.3f} < {v:.3f}" for of, least in GATES_OF_REWARDS.items() for k, v in least.items()
              if found[of][k] < v]
    for name in world.PROMPT_SETS:
        base, copies = found[f"base, {name}"], found[f"through the autoencoder, {name}"]
        least = GATES | {k: part * copies[k] for k, part in GATES_OF_COPIES.items()}
        missed += [f"{name}: {k} {base[k]:.3f} < {v:.3f}" for k, v in least.items() if base[k] < v]
    return missed


def build_gates(cfg):
    """
    gates.json: what the judge says of clips it never saw and of the base's videos; for how many clips the action reward says
    the caption's direction, and for how many frames the removal reward is right. Ends with 1 if a gate is missed.
    """
    judge, (vae, _) = load_judge(cfg.out / "judge.safetensors").to(cfg.device), frozen(cfg)
    classifier = action.load(cfg.out / "action", "left", torch.float32, cfg.device).classifier
    detector = removal.load(cfg.out / "removal", "watermark", torch.float32, cfg.device).detector
    every = all_scenes()

    @torch.no_grad()
    def learned(clips, scenes, flaws):
        """{reward: (B,)}: 1 where it is right; of removal, the share of a clip's frames."""
        parts = [part.to(cfg.device).float() for part in clips.split(48)]
        says = torch.cat([classifier(part).argmax(1).cpu() for part in parts])
        sees = torch.cat([detector(part.flatten(0, 1)).view(part.shape[:2]).cpu() for part in parts]) > 0    # (B, F)
        right = {"action": (says == labels(scenes)[2]).float()}
        if flaws:
            right["removal"] = (sees == torch.tensor(["watermark" in f for f in flaws])[:, None]).float().mean(dim=1)
        return right

    def measures(clips, scenes, flaws=()):
        captions = [s.caption for s in scenes]
        parts = zip(clips.split(48), [captions[i:i + 48] for i in range(0, len(captions), 48)])
        said = [judge_clips(judge, part.to(cfg.device).float(), words) for part, words in parts]
        means = {k: torch.cat([part[k] for part in said]) for k in said[0]} | learned(clips, scenes, flaws)  # {measure: (B,)}
        share = (means["watermark"] > .1).float().mean().item()
        return {k: round(v.mean().item(), 4) for k, v in means.items()} | {"watermarked": round(share, 4)}

    clips, scenes, flaws = render(3 * len(every), cfg.seed + 6_000_000)
    still = torch.stack([world.make_clip(replace(s, direction=""), cfg.seed + 7_000_000 + i, trail=s.direction)[0]
                         for i, s in enumerate(every)])  # their trails say that they move
    found = {"fresh clips": measures(clips, scenes, flaws), "still clips": {"static": measures(still, every)["static"]}}
    for name in world.PROMPT_SETS:
        clips, scenes, flaws = render(cfg.gate_count, cfg.seed + 8_000_000, scenes=world.scenes(name))
        found[f"through the autoencoder, {name}"] = measures(through_vae(vae, clips, cfg.device), scenes, flaws)
        found[f"base, {name}"] = measures(base_clips(cfg, [s.caption for s in scenes]), scenes)

    (cfg.out / "gates.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1), flush=True)
    if missed := missed_gates(found):
        write_manifest(cfg.out)  # for whoever wants to look at what came out
        sys.exit("build.py: gates missed: " + "; ".join(missed))


def main(cfg):
    """Build the chosen stages, then the manifest."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    for stage, number in STAGES.items():
        if stage in cfg.stages:
            torch.set_num_threads(cfg.threads if stage == "unet" else 1)
            torch.manual_seed(cfg.seed + number)  # each stage on its own, so that one can be rebuilt alone
            start = time.time()
            globals()[f"build_{stage}"](cfg)
            print(f"{stage}: {time.time() - start:.0f} s", flush=True)
    write_manifest(cfg.out)


def write_manifest(folder):
    """manifest.json: the SHA-256 of every file, which loading checks."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    digests = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "manifest.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, prog="python -m tiny.build"))
