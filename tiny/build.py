"""
Rebuild every weight that ships in tiny/weights, from seeds alone.

    python -m tiny.build                      # all stages of the first base, in order
    python -m tiny.build --stages judge       # one stage; it reads what earlier stages wrote
    python -m tiny.build --base tiny-wan      # the second base, which reads the first one's text tower and judge

tiny/README.md says what the parts are.

Letters: B clips or pictures, F frames, C channels, H and W pixel rows and columns, h and w latent ones.
"""
import sys

if not __package__:
    print("start it as: python -m tiny.build", file=sys.stderr)
    sys.exit(2)

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F_
import tyro
from safetensors.torch import load_file
from torch import nn

import model
from bases.modelscope import Base
from formats.reward_model import clip_normalize
from formats.tensor_names import unet_to_diffusers, vae_to_diffusers
from formats.weights import SHIPPED
from rewards import action, removal
from sampler import Levels, edit, guided, sample
from support.files import read_json, write_json
from support.ranks import progress
from tiny import flow, world
from tiny.judge import DIRECTIONS, Judge, judge_clips, labels, load_judge
from tiny.pretraining import all_scenes, captions_of, fit, render, save, write_manifest

VAE = model.VAEConfig(channels=(24, 48, 96), blocks_per_level=1, norm_groups=8)
UNET = model.UNetConfig(channels=(32, 64), blocks_per_level=1, attention_levels=(False, True), context_dim=64, head_dim=32,
                        stem_heads=1, norm_groups=8, sample_size=8)
CLIP = dict(embed_dim=64, vision_cfg=dict(image_size=world.SIZE, patch_size=8, width=64, layers=3, head_width=32),
            text_cfg=dict(context_length=world.CONTEXT_LENGTH, vocab_size=world.TOKENIZER.vocab_size, width=64, heads=1,
                          layers=3))
LATENT_STD = 0.5  # see tiny/README.md: with unit variance, noise at t = 951 still shows the layout, and words go unread
MAX_WEIGHT = 100.  # of a noise level in Eq. (1), 1 / abar_t up to this: only at high noise do the words matter
NUM_STEPS = 20  # D, of videos by the base and of its edits
GUIDANCE = 1.5  # written into the base's config; eps_c - eps_u points to what other shapes lack: at 3 squares become bow ties
ATTACK = 5.  # on the action classifier: the L2 norm of a clip's change, a root mean square of 0.02
# What the simulated annotator takes off an image's worth: for a flaw, times its strength, and for each wrong word.
WORTH = {"watermark": -5., "blur": -4., "washout": -4., "noise": -4.}
WRONG_WORD = -5.
FLAWS_TO_TELL = {"watermark": .55, "blur": .35, "washout": .35, "noise": .20}  # world.FLAWS has too few to learn what they cost
PREFERENCE_SCALE = 10.  # worth in units of cosine; with HPSv2's 100, what flaws cost would drown in what captions differ by
# Least shares of the base's videos, and least parts of what the autoencoder's copies of drawn clips reach on the same scenes.
GATES = {"colour": .95, "shape": .95, "direction": .80, "watermarked": .25, "action": .95}
GATES_OF_COPIES = {"fidelity": .90, "steadiness": .90, "sharpness": .75, "saturation": .80}


def encode(base, clips):
    """Clips -> moments (B, 2C, F, h, w)."""
    return base.encode(clips.flatten(0, 1).float() * 2 - 1)[0].unflatten(1, clips.shape[:2]).transpose(0, 1)


def draw_latents(base, moments):
    """A fresh sample of the autoencoder's posterior, z (B, C, F, h, w), of moments in float16 as they are kept for training."""
    moments = moments.to(base.device).float()
    return model.sample_posterior(moments, torch.randn_like(moments.chunk(2, dim=1)[0]), base.vae.config.scale)


def to_latents(base, clips, mean=False):
    """Clips -> z (B, C, f, h, w), as the base's network is trained on them; mean: without noise."""
    if isinstance(base, flow.TinyWan):
        return flow.encode(base, clips)
    moments = encode(base, clips)
    return model.sample_posterior(moments, 0., base.vae.config.scale) if mean else draw_latents(base, moments.half())


def decode(base, z):
    """z (B, C, f, h, w) -> clips."""
    clips = flow.decode(base, z) if isinstance(base, flow.TinyWan) else base.decode_frames(z)
    return clips.clamp(0, 1).half().cpu()


@torch.no_grad()
def through_autoencoder(base, clips):
    """Clips encoded and decoded, since a reward only ever sees what the autoencoder decodes."""
    batches = progress(clips.split(8), desc="through the autoencoder")
    return torch.cat([decode(base, to_latents(base, batch, mean=True)) for batch in batches])


@torch.no_grad()
def base_clips(base, captions, clips=None):
    """Videos by the base, from pure noise, or as edits of given clips (Eqs. 3-5), whose content is known."""
    uncond, levels = base.encode_text([""]), base.levels(NUM_STEPS)
    shape = base.latent_shape(base.default_frames, world.SIZE, world.SIZE)
    videos = []
    for start in progress(range(0, len(captions), 12), desc="clips by the base"):
        text = base.encode_text(captions[start:start + 12])
        noise = torch.randn(len(text), *shape).to(base.device)
        if clips is None:
            z_0 = sample(base.predict, noise, text, uncond, levels, base.guidance)
        else:
            z = to_latents(base, clips[start:start + 12])
            z_0 = edit(base.predict, z, noise, text, uncond, levels, .3, base.guidance)
        videos.append(decode(base, z_0))
    return torch.cat(videos)


@torch.no_grad()
def guessed_clips(base, captions, clips):
    """The z_0 that the base predicts in one step from noised clips, at random t: the more noise, the more blurred."""
    uncond = base.encode_text([""])
    guesses = []
    for start in progress(range(0, len(captions), 8), desc="guesses of the base"):
        z = to_latents(base, clips[start:start + 8])
        t, alpha, sigma = base.level(torch.rand(1) * .9 + .1)
        z_t = alpha.to(z) * z + sigma.to(z) * torch.randn_like(z)
        levels = Levels([t.item()] * 2, [1., alpha.item()], [0., sigma.item()])  # a chain of one step
        text = base.encode_text(captions[start:start + 8])
        guesses.append(decode(base, guided(base.predict, z_t, levels, 1, text, uncond, base.guidance)[0]))
    return torch.cat(guesses)


def build_vae(cfg):
    """The autoencoder. Its loss has squared and absolute errors, the error of steps between neighbouring pixels (the others
    hardly see whether an edge is straight), and a KL term that is small enough to leave the latents sharp."""
    clips, _ = render(world.repeat(all_scenes(), min(2500, cfg.clips)), cfg.seed + 1_000_000)
    frames = clips.flatten(0, 1)                                                         # (n, 3, H, W)
    vae = model.Autoencoder(VAE).to(cfg.device)

    def loss_of(step):
        x = frames[torch.randint(len(frames), (16,))].to(cfg.device).float() * 2 - 1
        moments = vae.encode(x)
        mean, logvar = moments.chunk(2, dim=1)
        noise = torch.randn_like(mean)
        y = vae.decode(model.sample_posterior(moments[:, :, None], noise[:, :, None], scale=1.)[:, :, 0])
        edges = F_.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F_.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        kl = .5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F_.mse_loss(y, x) + .2 * F_.l1_loss(y, x) + .2 * edges + 1e-4 * kl

    vae = fit("autoencoder", vae, loss_of, min(3000, cfg.max_steps), lr=2e-3, ema_decay=.998)

    with torch.no_grad():
        mean, _ = vae.encode(frames[:8000:8].to(cfg.device).float() * 2 - 1).chunk(2, dim=1)
    scale = round(LATENT_STD / mean.std().item(), 5)  # gives latents their standard deviation
    save(cfg.out / "vae/diffusion_pytorch_model.safetensors", vae, vae_to_diffusers(replace(VAE, scale=scale)))


def build_clip(cfg):
    """A CLIP of open_clip's own class, trained contrastively on single frames and their captions."""
    clips, _ = render(world.repeat(all_scenes(), min(4320, cfg.clips)), cfg.seed + 2_000_000)
    tokens = world.TOKENIZER(captions_of(all_scenes())).to(cfg.device)                 # (n, N)
    n = len(tokens)
    clip_model = open_clip.CLIP(**CLIP).to(cfg.device)
    target = torch.arange(n, device=cfg.device)

    def loss_of(step):
        # One frame of each caption, so that no other row of the batch is a right answer too.
        rows = torch.arange(n) + n * torch.randint(len(clips) // n, (n,))
        frames = clips[rows, torch.randint(world.FRAMES, (n,))].to(cfg.device).float()
        image, text, logit_scale = clip_model(clip_normalize(frames), tokens)[:3]
        logits = logit_scale.clamp(max=100) * image @ text.T                             # (n, n)
        return (F_.cross_entropy(logits, target) + F_.cross_entropy(logits.T, target)) / 2

    trained = fit("CLIP", clip_model, loss_of, min(2500, cfg.max_steps), lr=1e-3)
    save(cfg.out / "text_encoder/open_clip_model.safetensors", trained, CLIP)


def build_unet(cfg):
    """The text-to-video UNet, on Eq. (1) with captions dropped in a tenth of the clips: the spatial layers on single frames
    first, which shows many captions for the price of one clip; then everything on clips, as ModelScopeT2V (arXiv:2308.06571)."""
    unet = model.UNet3D(UNET).to(cfg.device)
    start_as_identity(unet)
    text_encoder = model.load_text_encoder(cfg.out / "text_encoder").to(cfg.device)
    base = Base(unet, model.load_vae(cfg.out / "vae").to(cfg.device), text_encoder, "tiny")
    scenes = all_scenes()
    clips, _ = render(world.repeat(scenes, cfg.clips), cfg.seed + 3_000_000)
    batches = progress(clips.split(8), desc="encoding clips")
    moments = torch.cat([encode(base, batch).half().cpu() for batch in batches])         # (n, 2C, F, h, w)
    text = base.encode_text(captions_of(scenes) + [""])                                  # (captions, N, E)

    def loss_of(rows, batch):
        """Eq. (1), weighted by noise level, on a batch of moments (B, 2C, F, h, w) of the clips `rows`."""
        B = len(rows)
        z = draw_latents(base, batch)
        share = (torch.randperm(B) + torch.rand(B)) / B                                  # one in each B-th of 0..1
        t, alpha, sigma = [v.to(cfg.device) for v in base.level(share)]
        caption = torch.where(torch.rand(B) < .1, len(scenes), rows % len(scenes))       # the last one is empty
        eps = torch.randn_like(z)
        guess = unet(alpha * z + sigma * eps, t, text[caption.to(cfg.device)])
        error = (guess - eps).square().mean(dim=(1, 2, 3, 4))                            # (B,)
        weight = (1 / alpha.flatten() ** 2).clamp(max=MAX_WEIGHT)                        # (B,)
        return (weight * error).mean()

    def frames_loss(step):
        rows = torch.randint(len(clips), (128,))
        return loss_of(rows, moments[rows, :, torch.randint(world.FRAMES, (128,)), None])

    def clips_loss(step):
        rows = torch.randint(len(clips), (16,))
        return loss_of(rows, moments[rows])

    # An attribute of the layer itself hides its class's forward: single frames skip the layers that look along time.
    for layer in temporal_layers(unet):
        layer.forward = lambda x, num_frames: x
    unet = fit("UNet, frames", unet, frames_loss, min(3000, cfg.max_steps), lr=2e-3, ema_decay=.999)
    for layer in temporal_layers(unet):
        del layer.forward
    unet = fit("UNet, clips", unet, clips_loss, min(1900, cfg.max_steps), lr=1e-3, ema_decay=.999)
    save(cfg.out / "unet/diffusion_pytorch_model.safetensors", unet, unet_to_diffusers(UNET) | {"guidance": GUIDANCE})


def temporal_layers(unet):
    """The layers that look along time."""
    return [module for module in unet.modules() if isinstance(module, (model.TemporalConv, model.TemporalTransformer))]


def start_as_identity(unet, constant=6.):
    """Weights with which the untrained UNet returns its input. At high noise eps is z_t but for a few hundredths, and only in
    those can the words tell anything; otherwise thousands of steps go into merely passing z_t on exactly enough.
    Each latent channel a travels over the last skip connection as a group of four, (a, -a, constant, -constant). The last
    GroupNorm subtracts a mean of 0 from it and divides it by nearly a constant, and silu(x) - silu(-x) = x."""
    last_block = unet.up_blocks[-1].resnets[-1]
    shortcut = last_block.conv_shortcut
    projections = [layer.proj_out for layer in temporal_layers(unet) if hasattr(layer, "proj_out")]
    for layer in (last_block.conv2, unet.conv_out, *projections):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    signs = torch.tensor([1., -1., 0., 0.])
    with torch.no_grad():
        for c in range(unet.config.in_channels):
            group = torch.arange(4 * c, 4 * c + 4)
            unet.conv_in.weight[group] = 0
            unet.conv_in.weight[group, c, 1, 1] = signs
            unet.conv_in.bias[group] = torch.tensor([0., 0., constant, -constant])
            unet.conv_out.weight[c, group, 1, 1] = signs * ((1 + constant**2) / 2) ** .5
            shortcut.weight[group] = 0
            shortcut.bias[group] = 0
            shortcut.weight[group, group - unet.config.channels[0]] = 1  # the skip comes behind the channels from below


def wrong_words(a, b):
    """In how many of colour, shape and direction two scenes differ."""
    return (a.colour != b.colour) + (a.shape != b.shape) + (a.direction != b.direction)


def worth(flaws):
    """What flaws {flaw: strength} take off an image's worth, a number below 0."""
    return sum(WORTH[name] * strength for name, strength in flaws.items())


def pick(options):
    """One of the options, at random."""
    return options[torch.randint(len(options), ()).item()]


def build_preference(cfg):
    """HPSv2's recipe (arXiv:2306.09341, Sec. 4): a CLIP, a softmax over a pair of images, cross-entropy with the choice of a
    simulated annotator, who takes the second with probability sigmoid(its worth - the worth of the first)."""
    base = model.load_base(str(cfg.out), device=cfg.device)
    scenes = all_scenes()
    captions = captions_of(scenes)
    times = min(24 if cfg.base == "tiny" else 12, max(1, cfg.clips // len(scenes)))  # the second autoencoder takes whole clips
    clips, flaws = render(times * scenes, cfg.seed + 4_000_000, FLAWS_TO_TELL, frames=base.default_frames)
    drawn, picked = torch.arange(len(clips)), torch.randint(clips.shape[1], (len(clips),))
    pictures = clips[drawn, picked]                                                      # (n, 3, H, W)
    if cfg.base == "tiny":
        copies = through_autoencoder(base, pictures[:, None])[:, 0]
    else:  # whose autoencoder makes of a frame what the frames before it let it
        copies = through_autoencoder(base, clips)[drawn, picked]
    pictures = torch.cat([pictures, copies])
    samples = base_clips(base, captions)                                                 # (captions, F, 3, H, W)

    def pair():
        """Number of the caption, two images (2, 3, H, W), the annotator's choice (0 or 1)."""
        asked = pick(range(len(scenes)))
        other = asked
        if torch.rand(()) < .4:  # another scene, which differs in one word, so that every word of a caption comes to matter
            other = pick([i for i, scene in enumerate(scenes) if wrong_words(scene, scenes[asked]) == 1])
        if torch.rand(()) < .7:  # pictures of drawn clips, where all scenes come in turn
            first = pick(range(asked, len(pictures), len(scenes)))
            second = pick(range(other, len(pictures), len(scenes)))
            images = pictures[[first, second]]
            first_flaws = flaws[first % len(flaws)]
            second_flaws = flaws[second % len(flaws)]
        else:  # samples of the base; if it is twice the same one, the second is spoilt further
            images = samples[[asked, other], pick(range(samples.shape[1]))]
            first_flaws, second_flaws = {}, {}
            if other == asked:
                flaw = pick(list(world.FLAWS))
                second_flaws[flaw] = .3 + .7 * torch.rand(()).item()
                images[1] = world.add_flaws(images[1:].float(), second_flaws, None)[0]
        gain = worth(second_flaws) + WRONG_WORD * wrong_words(scenes[other], scenes[asked]) - worth(first_flaws)
        return asked, images, int(torch.rand(()) < 1 / (1 + math.exp(-gain)))

    tokens = world.TOKENIZER(captions).to(cfg.device)
    clip_model = open_clip.CLIP(**CLIP).to(cfg.device)
    clip_model.load_state_dict(load_file(cfg.out / "text_encoder/open_clip_model.safetensors"))
    clip_model.logit_scale.requires_grad_(False).fill_(math.log(PREFERENCE_SCALE))

    def loss_of(step):
        asked, images, choices = zip(*[pair() for _ in range(48)])
        images = clip_normalize(torch.cat(images).to(cfg.device).float())
        image, text, logit_scale = clip_model(images, tokens[list(asked)])[:3]
        logits = logit_scale * (image.unflatten(0, (-1, 2)) * text[:, None]).sum(-1)     # (B, 2)
        return F_.cross_entropy(logits, torch.tensor(choices, device=cfg.device))

    trained = fit("preference model", clip_model, loss_of, min(2000, cfg.max_steps), lr=3e-4)
    save(cfg.out / "reward/open_clip_model.safetensors", trained, CLIP)


def take_moving(scenes, clips, count):
    """The first `count` scenes that move, and their clips; the clips are of the scenes in order, and more may follow."""
    numbers = [i for i, scene in enumerate(scenes) if scene.direction][:count]
    return [scenes[i] for i in numbers], clips[numbers]


def clips_in_motion(cfg, base, count, seed, crossed=True):
    """What to learn motion from -> clips, scenes: drawn clips, the same through the autoencoder, and the base's edits of a tenth.
    A quarter of the drawn clips do not move, and many a trail points elsewhere or is missing, so the shape must be watched.
    crossed: whether stripes may have a trail across their way; they then move along the trail, and not as their scene says."""
    generator = torch.Generator().manual_seed(cfg.seed + seed)
    scenes = []
    trails = []
    for scene in world.repeat(all_scenes(), min(count, cfg.clips)):
        if torch.rand((), generator=generator) < .25:
            scene = replace(scene, direction="")
        trail = None
        if torch.rand((), generator=generator) < .4 or not scene.direction:
            trail = DIRECTIONS[torch.randint(5, (), generator=generator)]
        across = (trail in ("left", "right")) != (scene.direction in ("left", "right"))
        if scene.shape == "stripes" and scene.direction and trail and across and not crossed:
            trail = None
        scenes.append(scene)
        trails.append(trail)

    clips, _ = render(scenes, cfg.seed + seed * 1_000_000, FLAWS_TO_TELL, trails)
    edited_scenes, edited_clips = take_moving(scenes, clips, count // 10)
    edits = base_clips(base, captions_of(edited_scenes), edited_clips)
    return torch.cat([clips, through_autoencoder(base, clips), edits]), scenes + scenes + edited_scenes


def build_judge(cfg):
    """The judge, on other seeds than anything else here."""
    base = model.load_base(str(cfg.out), device=cfg.device)
    clips, scenes = clips_in_motion(cfg, base, 2880, seed=5)
    targets = labels(scenes).to(cfg.device)                                              # (3, n)
    judge = Judge().to(cfg.device)

    def loss_of(step):
        rows = torch.randint(len(clips), (24,))
        logits = judge(clips[rows].to(cfg.device).float())  # of colour, shape and direction
        return sum(map(F_.cross_entropy, logits, targets[:, rows]))

    save(cfg.out / "judge.safetensors", fit("judge", judge, loss_of, min(1200, cfg.max_steps), lr=2e-3))


def build_action(cfg):
    """The classifier of rewards/action.py: clips in motion, videos by the base, which follow their captions, and guesses. Half
    are played backwards, and a fifth slowed, which count as not moving (tiny/README.md says why). Five of eight are changed
    against it, ever more (adversarial training, arXiv:1706.06083), or its gradient would lead to a pattern, not to motion."""
    base = model.load_base(str(cfg.out), device=cfg.device)
    clips, scenes = clips_in_motion(cfg, base, 1008, seed=9, crossed=False)
    noised_scenes, noised_clips = take_moving(scenes[:min(1008, cfg.clips)], clips, 480)
    guesses = guessed_clips(base, captions_of(noised_scenes), noised_clips)
    twice = all_scenes() + all_scenes()
    clips = torch.cat([clips, base_clips(base, captions_of(twice)), guesses])
    scenes = scenes + twice + noised_scenes
    how_often = torch.tensor([3. if scene.shape == "stripes" else 1. for scene in scenes])  # as their motion is small
    direction = labels(scenes)[2]
    turned = torch.tensor([1, 0, 3, 2, 4])  # right for left, down for up
    classifier = action.Classifier().to(cfg.device)
    steps = min(2600, cfg.max_steps)

    def loss_of(step):
        rows = torch.multinomial(how_often, 32)
        backwards = torch.rand(32) < .5
        slow = torch.rand(32) < .2
        x = clips[rows].to(cfg.device).float()
        x[backwards] = x[backwards].flip(1)
        x[slow] = slowed(x[slow], .6 * torch.rand(()).item())
        target = torch.where(backwards, turned[direction[rows]], direction[rows])
        target = target.masked_fill(slow, DIRECTIONS.index("")).to(cfg.device)

        # None is attacked in the first fifth of the steps; the attack then grows and is whole after seven tenths.
        strength = ATTACK * min(1., max(0., step / steps - .2) / .5)
        if strength:
            x = torch.cat([x[:12], attacked(classifier, x[12:], target[12:], strength)])
        return F_.cross_entropy(classifier(x), target)

    save(cfg.out / "action/model.safetensors", fit("action", classifier, loss_of, steps, 1e-3, ema_decay=.99))


def slowed(clips, pace):
    """Clips (B, F, 3, H, W) played at a share of their pace, around their middle; frames in between are blended."""
    middle = (clips.shape[1] - 1) / 2
    time_in_clip = middle + pace * (torch.arange(clips.shape[1], device=clips.device) - middle)     # (F,), in frames
    before = time_in_clip.floor().long()
    share = (time_in_clip - before)[:, None, None, None]
    return (1 - share) * clips[:, before] + share * clips[:, before + 1]


def norm_of(change):
    """The L2 norm over all pixels of each clip, (B, 1, 1, 1, 1)."""
    return change.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1, 1)


def attacked(classifier, clips, target, strength, steps=3):
    """Clips changed by at most `strength`, an L2 norm, so that the classifier errs."""
    change = torch.randn_like(clips)
    change = change / norm_of(change) * strength * torch.rand(len(clips), 1, 1, 1, 1, device=clips.device)
    for _ in range(steps):
        change.requires_grad_()
        loss = F_.cross_entropy(classifier((clips + change).clamp(0, 1)), target)
        grad, = torch.autograd.grad(loss, change)
        change = change.detach() + grad / norm_of(grad) * strength / 2
        change = change * (strength / norm_of(change)).clamp(max=1)
    return (clips + change).clamp(0, 1).detach()


def build_removal(cfg):
    """The detector of rewards/removal.py: frames with a watermark and without one, drawn and through the autoencoder.
    Some bands are fainter than in any clip: otherwise the reward would be content with one that is half gone."""
    scenes = world.repeat(all_scenes(), min(2880, cfg.clips))
    clips, _ = render(scenes, cfg.seed + 10_000_000, FLAWS_TO_TELL | {"watermark": 0.})
    n = len(clips)
    plain = clips[torch.arange(n), torch.randint(world.FRAMES, (n,))].float()            # (n, 3, H, W)
    frames = torch.cat([plain, world.add_watermark(plain, .05 + .65 * torch.rand(n, 1, 1, 1))]).half()
    base = model.load_base(str(cfg.out), device=cfg.device)
    frames = torch.cat([frames, through_autoencoder(base, frames[:, None])[:, 0]])
    marked = torch.tensor([0., 1., 0., 1.]).repeat_interleave(n)
    detector = removal.Detector().to(cfg.device)

    def loss_of(step):
        rows = torch.randint(len(frames), (96,))
        logits = detector(frames[rows].to(cfg.device).float())
        return F_.binary_cross_entropy_with_logits(logits, marked[rows].to(cfg.device))

    save(cfg.out / "removal/model.safetensors", fit("removal", detector, loss_of, min(1000, cfg.max_steps), 2e-3, ema_decay=.99))


def missed_gates(found):
    """What the measures of build_gates say against the base and the small rewards, one line per gate that is missed."""
    gates = [("fresh clips", "action", .97)]  # what was measured, the measure, its least value
    for name in world.PROMPT_SETS:
        copies = f"through the autoencoder, {name}"
        gates.append((copies, "removal", .95))
        gates += [(f"base, {name}", measure, least) for measure, least in GATES.items()]
        gates += [(f"base, {name}", measure, part * found[copies][measure]) for measure, part in GATES_OF_COPIES.items()]
    return [f"{what}: {measure} {found[what][measure]:.3f} < {least:.3f}"
            for what, measure, least in gates if found[what][measure] < least]


def build_gates(cfg):
    """gates.json: the mean of each measure, over clips that no training has seen and over the base's videos.
    Beside the judge's own: watermarked, the share of clips with a clear band; action, of clips whose direction the reward's
    classifier names; removal, where flaws are known, of frames for which its detector is right."""
    base = model.load_base(str(cfg.out), device=cfg.device)
    judge = load_judge(cfg.first / "judge.safetensors").to(cfg.device)
    classifier = action.load(cfg.first / "action", "left", torch.float32, cfg.device).classifier
    detector = removal.load(cfg.first / "removal", "watermark", torch.float32, cfg.device).detector

    @torch.no_grad()
    def means(clips, scenes, flaws=None):
        clips = clips[:, :world.FRAMES].to(cfg.device).float()
        measures = judge_clips(judge, clips, captions_of(scenes))                        # {measure: (B,)}
        measures["action"] = classifier(clips).argmax(1).cpu() == labels(scenes)[2]
        if flaws:
            marked = torch.tensor(["watermark" in strengths for strengths in flaws])     # (B,)
            seen = torch.stack([detector(clip) for clip in clips]).cpu() > 0             # (B, F)
            measures["removal"] = (seen == marked[:, None]).float().mean(dim=1)
        measures["watermarked"] = measures["watermark"] > .1
        return {name: round(values.float().mean().item(), 4) for name, values in measures.items()}

    scenes = all_scenes()
    clips, flaws = render(3 * scenes, cfg.seed + 6_000_000)
    found = {"fresh clips": means(clips, 3 * scenes, flaws)}
    trails = [scene.direction for scene in scenes]  # which say that the still clips move
    clips, _ = render([replace(scene, direction="") for scene in scenes], cfg.seed + 7_000_000, trails=trails)
    found["still clips"] = {"static": means(clips, scenes)["static"]}
    for name in world.PROMPT_SETS:
        scenes = world.repeat(world.scenes(name), cfg.gate_count)
        clips, flaws = render(scenes, cfg.seed + 8_000_000, frames=base.default_frames)
        found[f"through the autoencoder, {name}"] = means(through_autoencoder(base, clips), scenes, flaws)
        found[f"base, {name}"] = means(base_clips(base, captions_of(scenes)), scenes)
    write_json(cfg.out / "gates.json", found)
    print((cfg.out / "gates.json").read_text(), end="", flush=True)


STAGES = {
    "tiny": {"vae": (build_vae, 0), "clip": (build_clip, 1), "unet": (build_unet, 2), "preference": (build_preference, 3),
             "judge": (build_judge, 4), "action": (build_action, 6), "removal": (build_removal, 7), "gates": (build_gates, 5)},
    "tiny-wan": {"vae": (flow.build_vae, 0), "transformer": (flow.build_transformer, 2), "preference": (build_preference, 3),
                 "gates": (build_gates, 5)}}


@dataclass
class Config:
    """Rebuild the tiny world's weights."""
    base: Literal[(*STAGES,)] = "tiny"
    stages: tuple[Literal[(*(STAGES["tiny"] | STAGES["tiny-wan"]),)], ...] = ()  # default all of the base's
    out: Path | None = None  # default where they ship
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 2  # for tiny's UNet; the other stages have too little to do for more, and tiny-wan was built on one
    max_steps: int = 10_000  # at most so many of each training; fewer are for a trial
    gate_count: int = 96  # videos of each prompt set that the base is judged by at the end
    clips: int = 6000  # training clips of the network; the other stages draw as many or fewer

    @property
    def first(self):
        """Where the first base's weights are: the second reads their text tower and their judge."""
        return self.out if self.base == "tiny" else SHIPPED["tiny"]


def main(cfg):
    """Build the chosen stages."""
    cfg = replace(cfg, out=cfg.out or SHIPPED[cfg.base])
    cfg.out.mkdir(parents=True, exist_ok=True)
    stages = STAGES[cfg.base]
    if foreign := set(cfg.stages).difference(stages):
        sys.exit(f"build.py: stages {', '.join(sorted(foreign))}: {cfg.base} has {', '.join(stages)}")
    for stage in stages:
        if stage in (cfg.stages or stages):
            build_stage, seed = stages[stage]
            write_manifest(cfg.out)  # of what earlier stages wrote, since loading the base checks it
            torch.set_num_threads(cfg.threads if stage == "unet" else 1)
            torch.manual_seed(cfg.seed + seed)
            build_stage(cfg)
    write_manifest(cfg.out)
    if "gates" in (cfg.stages or stages) and (missed := missed_gates(read_json(cfg.out / "gates.json"))):
        sys.exit("build.py: gates missed: " + "; ".join(missed))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, prog="python -m tiny.build"))
