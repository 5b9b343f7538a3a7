"""
Reward fine-tuning by editing: InstructVideo's step, and the loop around it.

    python train.py                               # the tiny world, on two CPU cores, in minutes
    python train.py modelscope --data clips.txt --prompts animals=animals.txt
    torchrun --nproc_per_node=4 train.py modelscope --data clips.txt --prompts animals=animals.txt

Paper: InstructVideo (arXiv:2312.12490), Secs. 3.2 and 3.3; Fig. 2 shows the step as a picture. A
step takes real clips and their captions, noises them part of the way, denoises them back with
gradient through the last step only, scores one frame of each segment, and follows the gradient of
the scores into a LoRA. The symbols are explained in sampler.py.

Ours differs from the official trainer (tools/train/train_t2v_instructvideo_entrance.py):
(1) frames are picked before they are decoded; (2) clips are shuffled, ranks see different ones;
(3) the model is in eval mode, the reward frozen; (4) gradients are clipped, steps that are not
finite are skipped; (5) no EMA; (6) a run can be interrupted and continued at any step.

Letters: B clips, F frames, S segments, C channels, h and w latent rows and columns, N text tokens,
E their width.
"""
import math
import sys
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

import lora
from bases.deep_cache import denoiser
from data import ClipConfig, batch_indices, encode_clips, read_list, sample_posterior
from evaluate import EVAL_SEED, evaluate, prompt_sets, tiny_judge
from formats import exact_scores
from formats.mixture import watched_names
from formats.tensors import fingerprint
from formats.weights import HUB_BASE
from model import decode_frames, load_base
from reward import Mixture, aggregate, load_rewards, segment_edges, segment_frames, tar_weights
from sampler import GUIDANCE, check_edit, edit
from support import ranks as processes
from support import run as run_folder
from support import settings
from support.ranks import add_over_ranks, rank_and_size, sample_generator
from support.tables import add_means

# ----------------------------------------------------------------------------------------------
# The step


def edit_rewards(base, reward, uncond, batch, cfg):
    """
    The method, from clips to what is maximised: Eq. (2), the reward of generated videos.

    batch: as draw_batch's; uncond (1, N, E). Returns R (B,) of Eq. (8), with gradient, and what the
    log shows, without: {"reward": (B,)}, the plain mean of the frame scores, a Mixture's parts too.
    """
    z, eps, text, g, captions = batch

    # Noise the real clip part of the way, and denoise it back (Eqs. 3-5). Score it (Eqs. 6-8).
    z_0 = edit(denoiser(base, cfg.cache_interval), z, eps, text, uncond, cfg.tau, cfg.num_steps,
               cfg.guidance, cfg.grad_steps)                                  # (B, C, F, h, w)
    return video_rewards(base, reward, z_0, g, captions, cfg)


def video_rewards(base, reward, z_0, g, captions, cfg):
    """SegVR and TAR: z_0 (B, C, F, h, w), g (B, S) -> as above. Other methods share this."""
    # 1. Frames near the centre count more (Eq. 7).
    f = tar_weights(g, z_0.shape[2], cfg.lambda_tar)                          # (B, S)
    chunk = 1 if cfg.low_memory else cfg.decode_chunk
    if isinstance(reward, Mixture):  # several rewards, or of whole clips: steps 2 and 3 for each
        return reward.of_edits(decode_frames, base.vae, z_0, captions, g, f, aggregate, chunk)

    # 2. Score one frame of each segment (Eq. 6). Only these frames are decoded.
    frame_scores = score_frames(base.vae, reward, z_0, g, captions, chunk)    # (B, S)

    # 3. Average the weighted scores (Eq. 8).
    R = aggregate(frame_scores, f)                                            # (B,)
    return R, {"reward": frame_scores.detach().mean(dim=1)}                   # (B,), (B,)


def score_frames(vae, reward, z_0, g, captions, chunk=0):
    """
    r(x^g(i), c): decode the chosen frames of z_0 (B, C, F, h, w), g (B, S), score them -> (B, S).

    chunk: so many frames of each clip at a time, recomputed in the backward pass; 0 is all at once.
    """
    def score(z_0, g):
        return reward(decode_frames(vae, z_0, g), captions)                   # (B, S)

    if not chunk:
        return score(z_0, g)
    parts = [checkpoint(score, z_0, part, use_reentrant=False) for part in g.split(chunk, dim=1)]
    return torch.cat(parts, dim=1)                                            # (B, S)


# ----------------------------------------------------------------------------------------------
# The loop

def train(cfg, parameters, draw, score, run):
    """
    Maximise R over `parameters`, from wherever `run` stands to cfg.steps.

    The method is two functions. draw(step) -> this rank's share of a step's batch, a tuple whose
    items have an entry per video. score(batch) -> R (B,), with gradient, and what to log,
    {"reward": (B,), more: (B,)}. Returns False if a signal ended the run early, saved.
    """
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=0)
    loss_scale = 4096. if cfg.dtype == "float16" else 1.  # there, half of the gradient would be 0

    for step in run.steps(optimizer):
        # 1. The gradient of -R, in parts that fit into memory.
        batch = draw(step)
        total_loss, means = 0., {}
        optimizer.zero_grad(set_to_none=False)
        for part in split_batch(batch, cfg.clips_at_once):
            R, logged = score(part)                                           # (B,), {}
            loss = -R.sum() / cfg.batch_size                                  # Eq. (9), its share
            (loss_scale * loss).backward()
            total_loss += loss.item()
            add_means(means, logged, cfg.batch_size)

        # 2. Sum over the ranks. If one rank was told to stop, all of them stop.
        sums = [total_loss, float(run.stop()), *means.values()]
        total_loss, stopping, *sums = add_over_ranks(parameters, sums, loss_scale)

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
        split.append([item[start:start + part_size] for item in batch])
    return split


def draw_batch(dataset, step, cfg, scale, device):
    """
    This rank's share of a step's batch: z, eps (B, C, F, h, w), text (B, N, E), g (B, S), captions.

    A clip's window, noise and frames come from its own generator, seeded by (seed, step, position),
    so the batch is the same on any number of ranks and after resuming. scale: the autoencoder's.
    """
    z, eps, text, g, captions = [], [], [], [], []
    for position, clip in batch_indices(step, cfg.batch_size, len(dataset), cfg.seed,
                                        *rank_and_size()):
        generator = sample_generator(cfg.seed, step, position)
        moments, words, caption = dataset.get(clip, generator)                # (2C, F, h, w), ...
        C, F, h, w = len(moments) // 2, *moments.shape[1:]
        posterior_noise = torch.randn(C, F, h, w, generator=generator)        # for z
        white = torch.randn(C, F, h, w, generator=generator)                  # for eps
        offset = torch.randn(C, F, 1, 1, generator=generator)  # one per frame and channel

        z.append(sample_posterior(moments, posterior_noise, scale))           # (C, F, h, w)
        eps.append(white + cfg.offset_noise * offset)                         # (C, F, h, w)
        text.append(words)                                                    # (N, E)
        g.append(segment_frames(F, cfg.segments, 1, generator)[0])            # (S,)
        captions.append(caption)
    tensors = [torch.stack(v).to(device, non_blocking=True) for v in (z, eps, text, g)]
    return *tensors, captions


# ----------------------------------------------------------------------------------------------
# Settings. What every run has (model, clips, run folder) is in support/settings.py.

@dataclass(frozen=True)
class Config(settings.TrainingSettings):
    """Fine-tune a text-to-video model on rewards of its frames or clips.

    `train.py modelscope` has the paper's defaults, these are the tiny world's."""
    frames: int = 16
    """F (paper, Sec. 3.3)"""
    size: int | None = None
    """pixel rows and columns of a clip; default what the base was trained on, 256 for ModelScopeT2V
    (paper, Sec. 3.3)"""
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
    """classifier-free guidance scale, in training and evaluation alike; default the base's own, 3
    if it has none (official code: modules/config.py:74)"""
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


PRESETS = {
    "tiny": Config(),
    "modelscope": Config(
        preset="modelscope", base=HUB_BASE, offset_noise=0.1, steps=20_000, batch_size=8, lr=1e-5,
        eval_every=1000, eval_count=0, save_every=500, clips_at_once=1, guidance=GUIDANCE)}


def check(cfg, needs_clips=True):
    """All that can be known before anything is loaded or written; ValueError in one line."""
    # Each number by itself.
    settings.check_training(cfg, world_size=rank_and_size()[1])
    settings.check_at_least(cfg, frames=1, size=1, fps=1, rank=1, warmup=0, offset_noise=0)
    settings.check_positive(cfg, "lr", "clip_grad")
    settings.check_finite(cfg, "guidance", "offset_noise")

    # What the method's own functions ask of them.
    check_edit(cfg.tau, cfg.num_steps, cfg.grad_steps)
    segment_edges(cfg.frames, cfg.segments)  # raises for more segments than frames
    tar_weights(torch.zeros(1, 1), cfg.frames, cfg.lambda_tar)  # raises for a bad lambda

    # What it takes to begin: clips.
    if needs_clips:
        settings.check_clips(cfg)
    if cfg.tensorboard:
        run_folder.tensorboard_writer()


# ----------------------------------------------------------------------------------------------
# Setting up

def instruct_video(cfg, base, reward):
    """The method as the two functions that `train` takes, on the clips of --data or tiny's own."""
    dataset = read_clips(cfg, base)
    uncond = base.encode_text([""])                                           # (1, N, E)

    def draw(step):
        return draw_batch(dataset, step, cfg, base.vae.config.scale, base.device)

    def score(batch):
        return edit_rewards(base, reward, uncond, batch, cfg)

    draw.data = dataset.description  # continued, a run must have the same clips
    return draw, score


def read_clips(cfg, base):
    """The clips to edit: those of --data, encoded now or read from the cache; else tiny's own."""
    dtype = base.vae.quant_conv.weight.dtype  # float32: what is made once may cost more
    if not cfg.data:
        from tiny.clips import tiny_clips
        return tiny_clips(base, dtype)

    def encode(frames):
        return base.vae.encode(frames.to(base.device, dtype))                 # (F, 2C, h, w)

    def encode_text(captions):
        base.texts.clear()  # the dataset keeps these, thousands maybe, off the accelerator
        return base.encode_text(captions)                                     # (B, N, E)

    pixels = cfg.size or base.default_size
    base.latent_size(pixels, pixels)  # refuses a size that the autoencoder cannot halve
    clip_config = ClipConfig(num_frames=cfg.frames, fps=cfg.fps, height=pixels, width=pixels)

    # What is cached belongs to these weights in this precision.
    vae_name = f"{fingerprint(base.vae.state_dict())} {dtype}"
    text_name = f"{fingerprint(base.text_encoder.state_dict())} {dtype}"
    cache_dir = cfg.cache_dir if cfg.cache else None
    clips = processes.on_rank_0(lambda: read_list(cfg.data, cfg.data_root))
    return encode_clips(clips, clip_config, encode, encode_text, vae_name, text_name, cache_dir,
                        cfg.workers, cfg.max_skip)


def open_run(cfg, folder, resumed, base, reward, prompts, judge, draw, stop):
    """The run folder's Run, with functions that save the adapters and evaluate them."""
    def save_adapter(path):
        lora.save(base.unet, path, base=cfg.base)

    @exact_scores.scoring_exactly(reward, lambda: load_rewards(cfg, base.folder))
    def evaluate_prompts(captions, first, keep, move_on):
        return evaluate(base, reward, captions, seed=EVAL_SEED + first, num_steps=cfg.num_steps,
                        guidance=cfg.guidance, segments=cfg.segments, frames=cfg.frames,
                        height=cfg.size, width=cfg.size, judge=judge, keep=keep, move_on=move_on,
                        batch_size=min(cfg.clips_at_once or cfg.batch_size, 8))

    return run_folder.Run(
        cfg, folder, adapters=lora.adapter_state(base.unet), save_adapter=save_adapter,
        prompts=prompts, evaluate=evaluate_prompts, reward_name=reward.name, stop=stop,
        watched=watched_names(cfg, reward), resumed=resumed, data=getattr(draw, "data", None))


def main(argv, presets=PRESETS, description=__doc__, check=check, method=instruct_video, loop=train,
         script="train.py"):
    """
    Everything from the command line to the last line printed; returns the exit status.

    Another method brings presets, check(cfg), method(cfg, base, reward) -> draw, score, and maybe
    a loop of its own, which decides what these two are.
    """
    cfg = settings.parse(argv, presets, description)
    device = processes.join_ranks(cfg.device)
    check(cfg)
    folder, resumed = processes.on_rank_0(lambda: run_folder.choose_folder(cfg))

    # 1. What is frozen, and the adapters.
    dtype = processes.pick_dtype(cfg.dtype, device)
    base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype, device, cfg.seed)
    guidance = settings.first_given(cfg.guidance, base.guidance, GUIDANCE)
    cfg = replace(cfg, guidance=guidance)  # recorded with the run
    prompts = prompt_sets(base, cfg.prompts, cfg.eval_count) if cfg.eval_every else {}
    size = cfg.size or base.default_size
    judge = tiny_judge(cfg, base, prompts, size, size)
    parameters = lora.load_or_inject(base.unet, base.unet_file, cfg.rank,
                                     sample_generator(cfg.seed, "lora"))
    reward = load_rewards(cfg, base.folder, dtype, device)

    # 2. Clips and captions go through the encoders once, which then may leave the accelerator.
    draw, score = method(cfg, base, reward)
    for captions in (*prompts.values(), [""]):
        base.encode_text(captions)
    base.release_encoders()
    base.unet.checkpoint_activations(cfg.checkpoint_activations or cfg.low_memory)
    if cfg.compile:
        base.unet.compile()

    # 3. Train.
    run_folder.make_room(folder, resumed)
    with processes.catch_signals() as caught:
        run = open_run(cfg, folder, resumed, base, reward, prompts, judge, draw,
                       lambda: bool(caught))
        return run_folder.train_and_report(
            run, lambda: loop(cfg, parameters, draw, score, run), caught, script)


if __name__ == "__main__":
    processes.run_script("train.py", lambda: main(sys.argv[1:]),
               refused=(RuntimeError, OSError, SafetensorError))
