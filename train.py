"""
Reward fine-tuning by editing: InstructVideo's step, and the loop around it.

    python train.py                               # the tiny world, on two CPU cores, in minutes
    python train.py modelscope --data clips.txt --prompts animals=animals.txt
    torchrun --nproc_per_node=4 train.py modelscope --data clips.txt --prompts a=a.txt --out RUN

Paper: InstructVideo (arXiv:2312.12490), Secs. 3.2 and 3.3; Fig. 2 shows the step as a picture. A
step takes real clips and their captions, noises them part of the way, denoises them back with
gradient through the last step only, scores one frame of each segment, and follows the gradient of
the scores into a LoRA. The symbols are explained in sampler.py.

Ours differs from the official trainer (tools/train/train_t2v_instructvideo_entrance.py), besides
what reward.py and data.py list: (1) the model is in eval mode; (2) gradients are clipped, steps
that are not finite are skipped; (3) no EMA; (4) a run can be interrupted and continued at any step.

Letters: B clips, F frames, S segments, C channels, h, w latent rows, columns, N tokens of width E.
"""
import support.threads  # noqa: F401  before torch is loaded
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

import lora
from data import ClipConfig, batch_indices, encode_clips
from evaluate import evaluate, prompt_sets
from formats.known_rewards import requested_rewards
from formats.reward_model import frames_of
from formats.weights import HUB_BASES, preset_of
from model import load_base
from reward import aggregate, as_rewards, load_rewards, segment_edges, segment_frames, tar_weights
from sampler import check_edit, edit
from support import ranks, run as run_folder, settings
from support.clips import read_list
from support.tables import add_means, check_watched

# ----------------------------------------------------------------------------------------------
# The step


def edit_rewards(base, rewards, uncond, batch, cfg):
    """
    The method, from clips to what is maximised: Eq. (2), the reward of generated videos.

    batch: as draw_batch's; uncond (1, N, E). Returns R (B,) of Eq. (8), with gradient, and what the
    log shows, without: {"reward": (B,)}, the plain mean of the frame scores, several rewards' too.
    """
    z, eps, text, g, captions = batch

    # Noise the real clip part of the way, and denoise it back (Eqs. 3-5). Score it (Eqs. 6-8).
    z_0 = edit(base.chain_predict(cfg.cache_interval), z, eps, text, uncond,
               settings.chain_levels(base, cfg), cfg.tau, cfg.guidance, cfg.grad_steps)
    return video_rewards(base, rewards, z_0, g, captions, cfg)


def video_rewards(base, rewards, z_0, g, captions, cfg):
    """SegVR and TAR: z_0 (B, C, F, h, w), g (B, S) -> as above. Other methods share this."""
    chunk = 1 if cfg.low_memory else cfg.decode_chunk
    summed, F = as_rewards(rewards).summed, cfg.frames
    R, logged, decoded = 0., {"reward": 0.}, {}
    for weight, reward in summed:
        # 1. Decode one frame of each segment, once for all rewards. A video reward has its own.
        wanted = frames_of(reward, F)
        index = torch.tensor(wanted).expand(len(g), -1) if wanted else g      # (B, S)
        if wanted not in decoded:
            decoded[wanted] = decode_chosen(base, z_0, index, chunk)          # (B, S, 3, H, W)

        # 2. Score them (Eq. 6). Frames near the centre count more (Eq. 7).
        frame_scores = score_frames(reward, decoded[wanted], captions, chunk)         # (B, S)
        f = torch.ones(len(g), 1) if wanted else tar_weights(g, F, cfg.lambda_tar)    # (B, S)

        # 3. Average the weighted scores (Eq. 8). Several rewards are added up.
        R = R + weight * aggregate(frame_scores, f)                           # (B,)
        mean_scores = frame_scores.detach().mean(dim=1)                       # (B,)
        logged["reward"] = logged["reward"] + weight * mean_scores
        if len(summed) > 1:
            logged[reward.name] = mean_scores
    return R, logged                                                          # (B,), {name: (B,)}


def decode_chosen(base, z_0, g, chunk=0):
    """The frames x^g(i) alone: z_0 (B, C, f, h, w), g (B, S) -> (B, S, 3, H, W).
    chunk: so many of each clip at a time, recomputed in the backward pass; 0 is all at once."""
    frames = []
    for part in g.split(chunk, dim=1) if chunk else ():
        frames.append(checkpoint(base.decode_frames, z_0, part, use_reentrant=False))
    return torch.cat(frames, dim=1) if chunk else base.decode_frames(z_0, g)


def score_frames(reward, frames, captions, chunk=0):
    """r(x^g(i), c): frames (B, S, 3, H, W) -> (B, S); a video reward sees all at once -> (B, 1)."""
    if not chunk or getattr(reward, "num_frames", None):
        return reward(frames, captions)

    scores = []
    for part in frames.split(chunk, dim=1):
        scores.append(checkpoint(reward, part, captions, use_reentrant=False))
    return torch.cat(scores, dim=1)                                           # (B, S)


# ----------------------------------------------------------------------------------------------
# The loop

@dataclass
class Method:
    """What a method gives to the loop."""
    draw: Callable       # step -> this rank's share of its batch, a tuple with an entry per video
    score: Callable      # batch -> R (B,), with gradient, and {"reward": (B,), more: (B,)} to log
    data: object = None  # what the clips or prompts are: continued, a run must have the same
    stop_every: int = 1  # a signal ends a run after a multiple of so many steps only


def train(cfg, parameters, method, run):
    """Maximise R over `parameters`, from where `run` stands to cfg.steps; whether it got there."""
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0)
    loss_scale = 4096. if cfg.dtype == "float16" else 1.  # there, half of the gradient would be 0

    for step in run.steps(optimizer):
        # 1. The gradient of -R, in parts that fit into memory.
        batch = method.draw(step)
        total_loss, means = 0., {}
        optimizer.zero_grad(set_to_none=False)
        for part in split_batch(batch, cfg.clips_at_once):
            R, logged = method.score(part)                                    # (B,), {}
            loss = -R.sum() / cfg.batch_size                                  # Eq. (9), its share
            (loss_scale * loss).backward()
            total_loss += loss.item()
            add_means(means, logged, cfg.batch_size)

        # 2. Sum over the ranks. If one rank was told to stop, all of them stop.
        sums = [total_loss, float(ranks.signalled() > 0), *means.values()]
        total_loss, stopping, *sums = ranks.add_over_ranks(parameters, sums, loss_scale)

        # 3. Take the step, unless the loss or the gradient is not finite.
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_grad).item()
        finite = math.isfinite(total_loss) and math.isfinite(grad_norm)
        if finite:
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1., (step + 1) / max(cfg.warmup, 1))
            optimizer.step()

        # 4. Log, save and evaluate.
        numbers = dict(zip(means, sums)) | {"loss": total_loss, "grad_norm": grad_norm}
        if not run.finish_step(step + 1, numbers, finite, stopping):
            return False
    return True


def split_batch(batch, part_size):
    """A batch in parts of so many videos, or fewer at its end; 0 is all of them."""
    part_size = part_size or len(batch[0])
    split = []
    for start in range(0, len(batch[0]), part_size):
        split.append([ranks.take(item, slice(start, start + part_size)) for item in batch])
    return split


def draw_batch(dataset, step, cfg, base):
    """
    This rank's share of a step's batch: z, eps (B, C, F, h, w), text (B, N, E), g (B, S), captions.

    A clip's window, noise and frames come from its own generator, seeded by (seed, step, position),
    so the batch is the same on any number of ranks and after resuming.
    """
    z, eps, text, g, captions = [], [], [], [], []
    for position, clip in batch_indices(step, cfg.batch_size, len(dataset), cfg.seed,
                                        *ranks.rank_and_size()):
        generator = ranks.sample_generator(cfg.seed, step, position)
        moments, words, caption = dataset.get(clip, generator)                # (2C, F, h, w), ...
        z.append(base.draw_latents(moments, generator))                       # (C, f, h, w)
        C, f, h, w = z[-1].shape
        white = torch.randn(C, f, h, w, generator=generator)
        offset = torch.randn(C, f, 1, 1, generator=generator)  # one per latent frame and channel
        eps.append(white + cfg.offset_noise * offset)                         # (C, f, h, w)
        text.append(words)                                                    # (N, E)
        g.append(segment_frames(cfg.frames, cfg.segments, 1, generator)[0])   # (S,)
        captions.append(caption)
    return *(ranks.stack(v, base.device) for v in (z, eps, text, g)), captions


# ----------------------------------------------------------------------------------------------
# Settings. What every run has (model, clips, run folder) is in support/settings.py.

@dataclass(frozen=True)
class Config(settings.TrainingSettings):
    """Fine-tune a text-to-video model on rewards of its frames or clips.

    `train.py modelscope` has the paper's defaults, these are the tiny world's."""
    frames: int = 16
    """F (paper, Sec. 3.3)"""
    size: int | str | None = None
    """pixel rows and columns of a clip, 256 or 480x832; default what the base was trained on, 256
    for ModelScopeT2V (paper, Sec. 3.3)"""
    fps: int = 8
    """frames a second that clips are read at (official configuration)"""

    tau: float = 0.6
    """how far clips are noised, as a share of the chain (paper, Sec. 4.2)"""
    num_steps: int = 20
    """D, DDIM steps of the whole chain (paper, Sec. 3.3)"""
    grad_steps: int = 1
    """K, last steps that carry gradient (paper, Sec. 3.3)"""
    cache_interval: int = 1
    """N: all of the UNet runs in every N-th step without gradient (DeepCache); faster, not exact"""
    segments: int = 4
    """S, frames scored, one of each segment (paper, Sec. 3.3); dense scoring is S = F"""
    lambda_tar: float = 1.0
    """how fast weights fall off from the centre, Eq. (7) (paper, Sec. 3.2.2); 0: plain mean"""
    guidance: float | None = None
    """classifier-free guidance scale, in evaluation too; default the base's, else 3 (official)"""
    offset_noise: float = 0.0
    """strength of an extra offset per frame and channel (official 0.1; not in Eq. (5))"""

    rank: int = 4
    """of the LoRA (paper, Appendix C)"""
    steps: int = 40
    """optimizer steps (paper, Sec. 3.3: 20,000)"""
    batch_size: int = 4
    """clips a step, over all ranks (paper, Sec. 3.3: 8)"""
    lr: float = 2e-3
    """step size of AdamW without weight decay (paper, Sec. 3.3: 1e-5, for 20,000 steps)"""
    warmup: int = 10
    """first steps, over which lr rises (official configuration)"""
    clip_grad: float = 1.0
    """largest norm of a step's gradient (ours: neither paper nor official code clips)"""
    seed: int = 0
    """all randomness follows from it, the step and the position in the batch"""


FULL_SIZE = dict(steps=20_000, batch_size=8, lr=1e-5, eval_every=1000, eval_count=0, save_every=500,
                 clips_at_once=1)
PRESETS = {name: Config(preset=name, base=name, **own) for name, own in settings.TINY.items()}
for name, of_base in settings.BASES.items():
    PRESETS[name] = Config(preset=name, base=HUB_BASES[name], **FULL_SIZE | of_base)


def check(cfg, needs_clips=True):
    """All that can be known before anything is loaded or written; ValueError in one line."""
    settings.check_training(cfg, world_size=ranks.rank_and_size()[1])
    requested_rewards(cfg)

    check_edit(cfg.tau, cfg.num_steps, cfg.grad_steps)
    segment_edges(cfg.frames, cfg.segments)  # raises for more segments than frames
    if needs_clips and cfg.data is None and cfg.base not in settings.TINY:
        raise ValueError("no clips: --data LIST must name some (only the tiny world draws its own)")


# ----------------------------------------------------------------------------------------------
# Setting up

def method(cfg, base, rewards, folder):
    """InstructVideo as the loop takes it, on the clips of --data or the base's own."""
    dataset = read_clips(cfg, base)

    def draw(step):
        return draw_batch(dataset, step, cfg, base)

    def score(batch):
        return edit_rewards(base, rewards, base.unconditional(batch[2]), batch, cfg)

    return Method(draw, score, dataset.description)


def read_clips(cfg, base):
    """The clips to edit: those of --data, encoded now or read from the cache, or the base's own."""
    frames, height, width = settings.clip_shape(base, cfg)
    base.latent_shape(frames, height, width)  # refuses a size that has no latents
    if not cfg.data:
        return base.world.clips(base, frames, cfg.size or base.default_size)

    base.unconditional()  # refuses a base without a text tower before clips are encoded
    clips = ranks.on_rank_0(lambda: read_list(cfg.data, cfg.data_root))
    return encode_clips(clips, ClipConfig(frames, cfg.fps, height, width), base,
                        cfg.cache_dir if cfg.cache else None, cfg.workers, cfg.max_skip)


def plan_evaluations(cfg, folder, base, rewards):
    """What is looked at while a run trains, with functions that score videos and save adapters."""
    prompts = prompt_sets(base, cfg.prompts, cfg.eval_count) if cfg.eval_every else {}
    shape = settings.clip_shape(base, cfg)                                    # (F, H, W)
    judge = base.world and base.world.judge(base, *shape, prompts)
    if cfg.watch:
        check_watched(cfg.watch, prompts, judge)

    # Evaluations score in float32, since best.safetensors is chosen by these scores and bfloat16
    # costs 0.002 of HPSv2. What only they need waits on the CPU.
    exact, waits_on = rewards, base.device
    if cfg.eval_every and base.dtype != torch.float32:
        exact, waits_on = load_rewards(cfg, base.folder), "cpu"

    def evaluate_set(captions, **more):
        # Eight videos take less memory than one clip with gradient, unless a flag saves that.
        saves_memory = cfg.checkpoint_activations or cfg.low_memory
        batch_size = min((saves_memory and cfg.clips_at_once) or cfg.batch_size, 8)
        exact.to(base.device)
        measured = evaluate(base, exact, captions, num_steps=cfg.num_steps, guidance=cfg.guidance,
                            segments=cfg.segments, shape=shape, batch_size=batch_size,
                            judge=judge, **more)
        exact.to(waits_on)
        return measured

    save_adapter = partial(lora.save, base.network, base=cfg.base)
    return run_folder.Evaluations(cfg, folder, prompts, evaluate_set, save_adapter, exact)


def main(argv, module=sys.modules[__name__]):
    """A run of a method, from the command line to the last line printed; returns the exit status.
    module: its PRESETS, check(cfg) and method(cfg, base, rewards, folder)."""
    cfg = settings.parse(argv, module.PRESETS, module.__doc__, preset_of)
    module.check(cfg)
    device = ranks.join_ranks(cfg.device)
    with ExitStack() as held:
        folder, resumed = ranks.on_rank_0(lambda: held.enter_context(run_folder.take_folder(cfg)))

        # 1. What is frozen, and the adapters.
        dtype = ranks.pick_dtype(cfg.dtype, device)
        base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
        cfg = settings.fit_to_base(cfg, base)  # refuses what the base cannot do
        of_video = replace(cfg, frames=base.parts * (cfg.frames - 1) + 1)  # parts share their ends
        parameters = lora.load_beside(base.network, base.network_file, cfg)
        generator = ranks.sample_generator(cfg.seed, "lora")
        parameters = parameters or lora.inject(base.network, cfg.rank, cfg.lora_alpha, generator,
                                               cfg.lora_layers)
        rewards = load_rewards(of_video, base.folder, dtype, device)
        evaluations = plan_evaluations(of_video, folder, base, rewards)

        # 2. Clips and captions go through the encoders once, which then may leave the accelerator.
        method = module.method(of_video, base, rewards, folder)
        if cfg.anchor:
            method.score = lora.anchored(base, method.score, cfg.anchor)
        for captions in evaluations.prompts.values():
            base.encode_text(captions)
        base.release_encoders()
        base.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
        if cfg.save_on_cpu:
            held.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"))
        if cfg.compile:
            base.network.compile()

        # 3. Train.
        run = run_folder.Run(cfg, folder, resumed, lora.adapter_state(base.network), evaluations,
                             method)
        return run_folder.train_and_report(run, lambda: train(cfg, parameters, method, run))


def start(module):
    """Run a method as a script: train.py itself, or `python -m methods.NAME`."""
    ranks.run_script(module.__spec__.name if module.__spec__ else "train.py",
                     lambda: main(sys.argv[1:], module), (RuntimeError, OSError, SafetensorError))


if __name__ == "__main__":
    start(sys.modules[__name__])
