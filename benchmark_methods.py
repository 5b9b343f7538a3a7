"""
What an optimizer step of each method costs per video, at the preset modelscope's settings: work and peak memory, counted.

    python benchmark.py --base random --device meta --methods      # full size, two minutes of one core: no weights, no times

Each method's own functions run on the meta device, whose tensors have sizes and no memory, one video (DPO: one pair) at once. A
method is a list of parts, each with how often it is run for one video of an optimizer step. This is where they are divided:

| method                      | parts, and how often for each video of an optimizer step                                       |
|-----------------------------|------------------------------------------------------------------------------------------------|
| InstructVideo, draft, vader | the step, once                                                                                 |
| refl                        | the step with its first and its last m, half of each, which is the mean over all               |
| ddpo                        | sampling and scoring once, as a round has a video for each that its steps learn from; learning |
|                             | from one chain step, --timestep-fraction x D times                                             |
| rwr                         | sampling and scoring, rounds x videos / (steps x batch size) times; learning once              |
| dpo                         | sampling and scoring a pair, rounds x pairs / (steps x batch size) times, learning from it     |
|                             | once; half of both, as a pair is two videos                                                    |

Text is encoded once a caption, not once a step, and not counted.
"""
import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train
from methods import ddpo, dpo, draft, refl, rwr, vader
from support.memory import measure_peak

CAPTION = "a red circle moving left"


class Zeros(TorchDispatchMode):
    """What a program reads off a tensor without memory, such as a loss to log or rewards to compare, is 0."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        if function is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of each method: [(times for each video of an optimizer step, run)]. If run() returns rewards (B,), with gradient,
# their backward pass belongs to the part.

def video(base, cfg):
    """Latents and noise (1, C, F, h, w), text (1, N, E) of one video, and t (1,); no numbers."""
    pixels = cfg.size or base.default_size
    shape = (1, base.vae.config.latent_channels, cfg.frames, *base.latent_size(pixels, pixels))
    z, eps = (torch.empty(shape, device=base.device) for _ in range(2))
    return z, eps, base.encode_text([CAPTION]), torch.zeros(1, dtype=torch.int64, device=base.device)


def instruct_video(base, reward, cfg):
    """Edits of a clip."""
    z, eps, text, _ = video(base, cfg)
    uncond, g = base.encode_text([""]), torch.zeros(1, cfg.segments, dtype=torch.int64, device=base.device)
    return [(1, lambda: train.edit_rewards(base, reward, uncond, (z, eps, text, g, [CAPTION]), cfg)[0])]


def rewards_of_noise(method, base, reward, cfg):
    """DRaFT and VADER: a batch from noise, as train.train takes it."""
    draw, score = method(replace(cfg, batch_size=1), base, reward)
    return [(1, lambda: score(draw(0))[0])]


def refl_parts(base, reward, cfg):
    """The mean over m, where the chain stops: as each m saves the same, that of the first and the last."""
    draw, score = refl.method(replace(cfg, batch_size=1), base, reward)
    drawn = [draw(step)[-1][0] for step in range(100)]
    return [(1 / 2, lambda m=m: score([*draw(0)[:-1], [m]])[0]) for m in (min(drawn), max(drawn))]


def ddpo_parts(base, reward, cfg):
    """A round of one video, and learning from one step of its chain, which stands for all that are learned from."""
    one = replace(cfg, batch_size=1, updates=1, timestep_fraction=1 / cfg.num_steps)
    sample, backward = ddpo.method(one, base, reward)
    history = SimpleNamespace(last={}, add=lambda *args: None)
    [batch] = sample(0, history)
    return [(1, lambda: sample(0, history)),
            (round(cfg.timestep_fraction * cfg.num_steps), lambda: backward(batch, 0))]


def rwr_parts(base, reward, cfg):
    """Rounds of sampled videos; --data has none."""
    one = replace(cfg, batch_size=1, videos=1)
    z, eps, text, t = video(base, cfg)
    score, number = rwr.method(one, base, reward)[1], torch.empty(1, device=base.device)
    return [(cfg.rounds * cfg.videos / (cfg.steps * cfg.batch_size),
             lambda: [*rwr.sample_videos(base, reward, [CAPTION], 0, one)]),
            (1, lambda: score((z, eps, text, number, number, t))[0])]


def dpo_parts(base, reward, cfg):
    """Half of what a pair takes."""
    one = replace(cfg, batch_size=1, pairs=1)
    z, eps, text, t = video(base, cfg)
    score, number = dpo.method(one, base, reward)[1], torch.empty(1, device=base.device)
    return [(cfg.rounds * cfg.pairs / (cfg.steps * cfg.batch_size) / 2,
             lambda: [*dpo.sample_pairs(base, reward, [CAPTION], 0, one)]),
            (1 / 2, lambda: score((z, z, eps, t, text, number))[0])]


METHODS = {
    "InstructVideo": (train.PRESETS, instruct_video),
    "draft": (draft.PRESETS, lambda *args: rewards_of_noise(draft.method, *args)),
    "refl": (refl.PRESETS, refl_parts),
    "vader": (vader.PRESETS, lambda *args: rewards_of_noise(vader.method, *args)),
    "ddpo": (ddpo.PRESETS, ddpo_parts),
    "rwr": (rwr.PRESETS, rwr_parts),
    "dpo": (dpo.PRESETS, dpo_parts)}


# ---------------------------------------------------------------------------------------------------------------------
# Counting

def count_part(run, meter):
    """(TFLOP, calls) of a part and its backward pass; calls as Meter has them."""
    with FlopCounterMode(display=False) as counter, Zeros():
        meter.start(lambda: counter.get_total_flops() + meter.extra)
        R = run()
        meter.enter("backward")
        if isinstance(R, torch.Tensor):
            R.sum().backward()
        meter.enter("end")
    return sum(meter.split().values()) / 1e12, meter.calls


def peak_of_part(run, modules):
    """support.memory.Peak of a part."""
    def forward():
        with Zeros():
            R = run()
        return R if isinstance(R, torch.Tensor) else torch.zeros(())
    return measure_peak(forward, modules)


def count_methods(base, reward, meter, tau, settings):
    """
    {method: what an optimizer step takes for each video}: passes of one video through the denoiser, without and with gradient
    (guidance takes two), frames decoded and scored, TFLOP, and the peak in GiB as Peak.in_gib.

    base and reward on meta, with adapters; decoder and reward announce their calls to `meter` (benchmark.Meter). tau is
    InstructVideo's; settings are put in the place of every preset's.
    """
    base.encode_text(["", CAPTION])
    reward.text_features([CAPTION])
    watched, modules, found = copy.copy(base), [base.unet, base.vae.decoder, reward], {}
    watched.denoiser = meter.watch(base.denoiser)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text(CAPTION + "\n")
        for name, (presets, parts) in METHODS.items():
            own = {"tau": tau} if name == "InstructVideo" else {"prompts_train": prompts}
            cfg = replace(presets["modelscope"], **settings, **own)
            row = {"without_gradient": 0., "with_gradient": 0., "frames": 0., "tflop": 0.}
            with Zeros():
                to_count = parts(watched, reward, cfg)
            for times, run in to_count:
                tflop, calls = count_part(run, meter)
                values = calls["chain"], calls["last step"], calls["decode"], tflop
                row = {key: row[key] + times * value for key, value in zip(row, values)}

            # Chain steps leave nothing behind but their last, so one step is as good as all.
            with Zeros():
                to_measure = parts(base, reward, replace(cfg, num_steps=1, tau=1.))
            peaks = [peak_of_part(run, modules) for _, run in to_measure]
            found[name] = row | {"peak_gib": max(peaks, key=lambda peak: peak.total).in_gib()}
    return found


def table(rows):
    """The same as lines of a table in Markdown."""
    head = "| per video of a step | passes without, with gradient | frames | TFLOP | against InstructVideo | peak GiB |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        ratio = row["tflop"] / rows["InstructVideo"]["tflop"]
        lines.append(f"| {name} | {row['without_gradient']:.3g}, {row['with_gradient']:.3g} | {row['frames']:.3g} | "
                     f"{row['tflop']:.1f} | {ratio:.2f} | {row['peak_gib']['total']:.1f} |")
    return lines
