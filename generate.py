"""
Text to video: the base, or the base with a LoRA, from seeded noise.

    python generate.py --prompt "a red circle moving left" --lora out/tiny/lora.safetensors
    python generate.py --base ali-vilab/text-to-video-ms-1.7b --prompts prompts.txt --guidance 9

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.1; ModelScopeT2V (arXiv:2308.06571).
Noise belongs to the prompt and its seed: video 7 is the same in any batch, on any number of ranks.

Letters: B videos, C channels, F frames, h and w latent rows and columns, H and W pixels.
"""
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import av
import imageio.v3 as iio
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import lora
from data import sample_generator
from model import Base, decode_frames, join_ranks, load_base, pick_dtype, rank_and_size, run_script, write_whole
from sampler import GUIDANCE, ddpm_step, sample


@torch.no_grad()
def generate(base: Base, prompts, seeds, num_steps=20, guidance=GUIDANCE, frames=16, height=32, width=32, batch_size=8,
             bar=None) -> Iterable[tuple[int, torch.Tensor]]:
    """
    Latents from pure noise, one by one: yields (index, z_0 (C, F, h, w)), scaled, in order.

    prompts [n], seeds [n] whole numbers: video i depends on (prompts[i], seeds[i]) only. Sizes are multiples of the
    autoencoder's downscale, else ValueError. bar: a tqdm to move on, or any function called after each batch with its size.
    """
    h, w = latent_size(base, height, width)
    uncond = base.encode_text([""])                                                       # (1, N, E)
    for start in range(0, len(prompts), batch_size):
        part = range(start, min(start + batch_size, len(prompts)))
        shape = (base.vae.config.latent_channels, frames, h, w)
        noise = torch.stack([torch.randn(shape, generator=sample_generator(seeds[i], "generate")) for i in part])
        text = base.encode_text([prompts[i] for i in part])                               # (B, N, E)
        z_0 = sample(base.denoiser, noise.to(base.device), text, uncond, num_steps, guidance)   # (B, C, F, h, w)
        if bar:
            bar(len(part))
        yield from zip(part, z_0)


def latent_size(base, height, width):
    """Pixels to latent rows and columns; ValueError unless they divide."""
    f = base.vae.config.downscale
    if height < f or width < f or height % f or width % f:
        raise ValueError(f"height {height} and width {width}: allowed are positive multiples of {f}")
    return height // f, width // f


def video_name(index, prompt):
    """A file name that is safe anywhere, whatever the prompt: its number, then letters and digits of it."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{index:04d}-{words}" if words else f"{index:04d}"


def to_pixels(video):
    """(F, 3, H, W) in [0, 1] -> (F, H, W, 3) uint8, as files have it."""
    return video.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def gather(mine):
    """What every rank has, on rank 0 and in order of rank, without the Nones; nothing on the others."""
    rank, size = rank_and_size()
    if size == 1:
        return [mine]
    all_of_them = [None] * size if rank == 0 else None
    dist.gather_object(mine, all_of_them)
    return [v for v in all_of_them or [] if v is not None]


def write_video(path, pixels, fps):
    """Save pixels (F, H, W, 3), uint8, as .mp4 or .gif."""
    with write_whole(path) as hidden:
        if path.suffix == ".gif":
            iio.imwrite(hidden, pixels, extension=".gif", duration=round(1000 / fps), loop=0)
        else:  # small pictures are enlarged, so that players show more than a dot; odd sizes do not exist in yuv420p
            zoom = max(1, 256 // max(pixels.shape[1:3]))
            pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
            pixels = pixels[:, :pixels.shape[1] // 2 * 2, :pixels.shape[2] // 2 * 2]
            with av.open(str(hidden), "w", format="mp4") as file:  # imageio would collect garbage after each, for 0.2 s
                stream = file.add_stream("libx264", rate=fps)
                stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
                for picture in pixels:
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                file.mux(stream.encode())


def read_prompts(path):
    """
    Prompts from a text file: one a line, or the official list form `video|||caption|||frames`, whose caption is taken.

    Blank lines are left out. ValueError: no such file, not text, or no prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {path}: cannot be read ({error})") from None
    prompts = [(line.split("|||")[1] if "|||" in line else line).strip() for line in lines if line.strip()]
    if not prompts or not all(prompts):
        raise ValueError(f"prompts {path}: expected one prompt a line, found {'an empty one' if prompts else 'none'}")
    return prompts


@dataclass
class Config:
    """Generate videos from prompts."""
    prompt: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """what to show; repeat the flag for more videos"""
    prompts: Path | None = None
    """a file of prompts, one a line or in the official list form"""
    base: str = "tiny"
    """the text-to-video model: tiny, a folder, a file, a hub id, or random"""
    vae: str | None = None
    """another autoencoder than the base's"""
    text_encoder: str | None = None
    """another text encoder than the base's"""
    lora: Path | None = None
    """an adapter from train.py, or any other form that lora.py reads"""
    lora_scale: float = 1.0
    """strength of the adapter: 0 is the base, 1 as trained"""
    num_steps: int = 20
    """D, DDIM steps (paper, Sec. 4.1; 50 in its Table A.1)"""
    guidance: float = GUIDANCE
    """classifier-free guidance scale (official code: modules/config.py:74)"""
    frames: int = 16
    """frames of a video (paper, Sec. 4.1)"""
    height: int | None = None
    """pixels; default 32 for the tiny world, 256 otherwise (paper, Sec. 4.1)"""
    width: int | None = None
    """pixels; default as height"""
    fps: int = 8
    """frames a second of the file (official code: 8)"""
    seed: int = 0
    """video i has seed + i"""
    batch_size: int = 4
    """videos at a time; changes time and memory, not the videos"""
    gif: bool = False
    """also write each video as .gif"""
    out: Path = Path("out/videos")
    """folder of the videos; files of the same name are replaced"""
    device: str | None = None
    """cuda, mps or cpu; default the first of these that is there"""
    dtype: str | None = None
    """float32, bfloat16 or float16 of the frozen weights; default bfloat16 on cuda, else float32"""


def check_folder(path):
    """ValueError if files cannot go into this folder, there or not yet, because it or one above it is a file."""
    if not next(p for p in (path, *path.absolute().parents) if p.exists()).is_dir():
        raise ValueError(f"out {path}: is a file, or inside one; allowed is a folder, there or not")


def check(cfg):
    """All that can be known before anything is loaded or written."""
    prompts = [*cfg.prompt, *(read_prompts(cfg.prompts) if cfg.prompts else [])]
    if not prompts or not all(p.strip() for p in prompts):
        raise ValueError("no prompt given: allowed are --prompt TEXT and --prompts FILE, and no empty ones")
    for name in ("frames", "height", "width", "fps", "batch_size"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is 1 and above")
    ddpm_step(cfg.num_steps, cfg.num_steps)
    check_folder(cfg.out)
    for name in ("guidance", "lora_scale"):
        if not abs(getattr(cfg, name)) < float("inf"):
            raise ValueError(f"{name} = {getattr(cfg, name)}: allowed is any finite number")
    return prompts


def main(cfg):
    """Load, generate, write."""
    device = join_ranks(cfg.device)
    prompts, (rank, size) = check(cfg), rank_and_size()
    base = load_base(cfg.base, cfg.vae, cfg.text_encoder, dtype=pick_dtype(cfg.dtype, device), device=device)
    own = lora.load_beside(base.unet, base.unet_file)  # a fine-tuned official file brings its adapters along
    if cfg.lora:
        lora.load(base.unet, cfg.lora)
    if own or cfg.lora:
        lora.set_scale(base.unet, cfg.lora_scale)
    height = cfg.height or base.default_size
    width = cfg.width or height
    latent_size(base, height, width)
    if rank == 0:
        for prompt in base.cut_captions(prompts):
            print(f"longer than the text encoder reads, its end is not seen: {prompt!r}")
        cfg.out.mkdir(parents=True, exist_ok=True)
    own = range(rank, len(prompts), size)
    with tqdm(total=len(own), desc="generating", unit="video", disable=rank > 0) as bar:
        made = generate(base, [prompts[i] for i in own], [cfg.seed + i for i in own], cfg.num_steps, cfg.guidance, cfg.frames,
                        height, width, cfg.batch_size, bar.update)
        for start in range(0, len(prompts), size):  # one video of every rank at a time, which rank 0 writes
            z_0 = next((z_0 for _, z_0 in made), None)                                    # (C, F, h, w)
            mine = None if z_0 is None else to_pixels(decode_frames(base.vae, z_0[None])[0])
            for i, pixels in enumerate(gather(mine), start):
                for suffix in (".mp4", ".gif") if cfg.gif else (".mp4",):
                    path = cfg.out / (video_name(i, prompts[i]) + suffix)
                    write_video(path, pixels, cfg.fps)
                    tqdm.write(str(path))


if __name__ == "__main__":
    run_script("generate.py", lambda: main(tyro.cli(Config, description=__doc__)))
