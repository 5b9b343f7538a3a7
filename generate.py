"""
Text to video: the base, or the base with a LoRA, from seeded noise.

    python generate.py --prompt "a red circle moving left" --lora out/tiny/lora.safetensors
    python generate.py --base ali-vilab/text-to-video-ms-1.7b --prompts prompts.txt --guidance 9
    python generate.py --base SVD --image cat.png --prompt "a cat" --continue 3   # four parts

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.1; ModelScopeT2V (arXiv:2308.06571).
Noise belongs to the prompt and its seed, so video 7 is the same, to rounding, in any batch and on
any number of ranks, and two models can be compared on the same noise. A base that starts from a
picture can go on from a video's last frame (--continue; VADER, arXiv:2407.08737, Fig. 9).

Letters: B videos, C channels, F frames, h and w latent rows and columns, H and W pixels.
"""
import support.threads  # noqa: F401  before torch is loaded
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

import lora
from formats import vbench
from model import load_base
from sampler import ddpm_step, sample
from support import ranks
from support.clips import Prompt, fit_prompts, read_prompts
from support.files import check_exists, check_folder, write_text
from support.settings import ModelSettings, check_at_least, rows_columns
from support.videos import to_pixels, video_name, write_video


@torch.no_grad()
def generate(base, prompts, seeds, num_steps=20, guidance=None, frames=16, height=32,
             width=32, batch_size=8, move_on=None) -> Iterable[tuple[int, torch.Tensor]]:
    """
    Latents of videos, one by one: yields (index, z_0 (C, F, h, w)), scaled, in order.

    prompts [n], seeds [n]: video i depends on (prompts[i], seeds[i]) only. frames (of all
    base.parts parts), height and width: as base.latent_shape allows, else ValueError. guidance:
    default the base's own. move_on: called after each batch with its size.
    """
    num_parts = getattr(base, "parts", 1)
    shape = base.latent_shape(frames, height, width)                          # (C, f, h, w)
    guidance = base.guidance if guidance is None else guidance
    levels = base.levels(num_steps, (frames, height, width))

    for start in range(0, len(prompts), batch_size):
        batch = range(start, min(start + batch_size, len(prompts)))

        # 1. Each video's noise is drawn for itself, on the CPU: the same on every device.
        noise = []
        for i in batch:
            generator = ranks.sample_generator(seeds[i], "generate")
            noise.append(ranks.start_noise(shape, generator, num_parts))      # (C, F, h, w)
        noise = torch.stack(noise).to(base.device)                            # (B, C, F, h, w)

        # 2. The whole chain, for a batch at once. A next part starts from the last frame so far.
        text = base.encode_text([prompts[i] for i in batch])                  # (B, N, E)
        made = []
        for noise_of_part in noise.chunk(num_parts, dim=2):
            text = base.next_text(made[-1]) if made else text
            uncond = base.unconditional(text)                                 # (1 or B, N, E)
            made.append(sample(base.predict, noise_of_part, text, uncond, levels, guidance))
        if move_on:
            move_on(len(batch))
        yield from zip(batch, torch.cat(made, dim=2))                         # (C, F, h, w) each


@dataclass(frozen=True)
class Config(ModelSettings):
    """Generate videos from prompts."""
    prompt: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """what to show; repeat the flag for more videos"""
    prompts: Path | None = None
    """a file of prompts, one a line or in the official list form; lines that begin with # are
    comments, and a prompt that begins with # has a backslash before it"""
    image: Path | None = None
    """the picture that begins to move, for each --prompt of an image-to-video base; in a file of
    prompts each line has its own: picture.png|||caption"""
    lora: Path | None = None
    """an adapter from train.py, or any other form that lora.py reads"""
    lora_scale: float = 1.0
    """strength of the adapter: 0 is the base, 1 as trained"""
    num_steps: int = 20
    """D, DDIM steps (paper, Sec. 3.3; 50 in its Table A.1)"""
    guidance: float | None = None
    """classifier-free guidance scale; default the base's own, else 3 (official code)"""
    frames: int | None = None
    """frames of a video; default what the base was trained on, 16 (paper, Sec. 3.3)"""
    continue_: Annotated[int, tyro.conf.arg(name="continue")] = 0
    """parts of as many frames to add, each from the last frame before it; image-to-video alone"""
    size: int | str | None = None
    """pixel rows and columns, 256 or 480x832; default what the base was trained on, 256 for
    ModelScopeT2V (paper, Sec. 3.3)"""
    fps: int | None = None
    """frames a second of the file, told to some networks; default the base's, else 8 (official)"""
    seed: int = 0
    """video i has seed + i"""
    batch_size: int = 4
    """videos at a time; changes time and memory, not the videos"""
    gif: bool = False
    """also write each video as .gif"""
    vbench: bool = False
    """write videos as VBench reads them, with its lists beside them, and print its command"""
    per_prompt: int = 5
    """with --vbench: videos of each prompt, each with a seed of its own (VBench's suite: 5)"""
    out: Path = Path("out/videos")
    """folder of the videos, each with its prompt in a .txt beside it, as train.py --data takes it;
    files of the same name are replaced"""


def check(cfg):
    """{seed of a video: (its file, its prompt)}. ValueError for what is known to be wrong now."""
    prompts = list(cfg.prompt)
    if cfg.image and not cfg.prompt:
        raise ValueError("image: goes with --prompt; lines of --prompts have pictures of their own")
    if cfg.image:
        prompts = [Prompt(caption, cfg.image, f"{cfg.image}|||{caption}") for caption in prompts]
    if cfg.prompts:
        prompts += read_prompts(cfg.prompts)

    if not prompts or not all(p.strip() for p in prompts):
        raise ValueError("no prompt given, or an empty one: name some by --prompt or --prompts")

    check_at_least(cfg, continue_=0, frames=min(2, 1 + cfg.continue_), fps=1, batch_size=1,
                   per_prompt=1, guidance=-math.inf, lora_scale=-math.inf)
    rows_columns(cfg.size)
    ddpm_step(cfg.num_steps, cfg.num_steps)  # refuses a D that the schedule has not
    check_folder(cfg.out)
    check_exists(cfg.lora)
    check_exists(cfg.image)
    if cfg.vbench and cfg.gif:
        raise ValueError("vbench: its folder has files of one kind; leave gif or vbench out")
    if cfg.vbench:
        return vbench.plan_files(prompts, cfg.seed, cfg.per_prompt, cfg.out)
    return {cfg.seed + i: (video_name(i, p), p) for i, p in enumerate(prompts)}


def load_model(cfg, device):
    """The base with the adapters of --lora or of its own file, and whether there are any."""
    dtype = ranks.pick_dtype(cfg.dtype, device)
    base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype=dtype, device=device)

    # A fine-tuned official file brings its adapters along; --lora replaces them.
    adapted = lora.load_beside(base.network, base.network_file)
    if cfg.lora:
        adapted = lora.load(base.network, cfg.lora)
    return base, bool(adapted)


def write_all(made, base, files, cfg):
    """Decode what this rank makes; rank 0 writes one video of every rank at a time."""
    world_size = ranks.rank_and_size()[1]
    suffixes = (".mp4", ".gif") if cfg.gif else (".mp4",)
    for start in range(0, len(files), world_size):
        # One video of each rank, while it has any left.
        _, z_0 = next(made, (None, None))                                     # (C, F, h, w)
        pixels = None
        if z_0 is not None:
            pixels = to_pixels(base.decode_frames(z_0[None])[0])              # (F, H, W, 3)

        made_now = [video for video in ranks.all_gather(pixels) if video is not None]
        for i, video in enumerate(made_now if ranks.is_main_process() else (), start):
            name, prompt = files[cfg.seed + i]
            for suffix in suffixes:
                path = cfg.out / (name + suffix)
                write_video(path, video, base.fps)
                tqdm.write(str(path))
            if not cfg.vbench:
                # With its caption beside each video, the folder is what train.py takes as --data.
                write_text(path.with_suffix(".txt"), prompt + "\n")


def main(cfg):
    """Load, generate, write."""
    files = check(cfg)
    device = ranks.join_ranks(cfg.device)
    rank, world_size = ranks.rank_and_size()

    # 1. The model. The size of a video is its own, unless asked.
    base, adapted = load_model(cfg, device)
    base.fps = cfg.fps or getattr(base, "fps", 8)  # some networks are told it
    if (cfg.image or cfg.continue_) and not hasattr(base, "condition"):
        named = "image" if cfg.image else "continue"
        raise ValueError(f"{named}: {base.name} starts from no picture")
    if adapted:
        lora.set_scale(base.network, cfg.lora_scale)
    height, width = rows_columns(cfg.size, base.default_size)
    base.parts = 1 + cfg.continue_
    frames = base.parts * ((cfg.frames or base.default_frames) - 1) + 1  # parts share their ends

    # 2. The ranks take turns, in the order of seeds: rank r makes videos r, r + world_size, ...
    prompts = fit_prompts([prompt for _, prompt in files.values()], base)
    mine = range(rank, len(prompts), world_size)
    with ranks.progress(None, "generating", len(prompts), unit="videos", shared=True) as bar:
        made = generate(base, [prompts[i] for i in mine], [cfg.seed + i for i in mine],
                        cfg.num_steps, cfg.guidance, frames, height, width, cfg.batch_size,
                        bar.update)
        write_all(made, base, files, cfg)
    if cfg.vbench and rank == 0:
        vbench.finish(vbench.Folder(cfg.out, files, base.fps))


if __name__ == "__main__":
    ranks.run_script("generate.py", lambda: main(tyro.cli(Config, description=__doc__)))
