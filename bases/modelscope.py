"""
ModelScopeT2V (arXiv:2308.06571), the paper's base, and the first example of what a base is asked for.

Its network, autoencoder and text tower are in model.py. What train.py and the methods ask is here, and the same for every file
of this folder: noise levels, z_0 and eps in a noised clip, clips to latents and back, captions to features. docs/bases.md lists
what a base must have, and shows how to add one.

Letters: B clips, C latent channels, F frames, h and w latent rows and columns, N text tokens, E their width.
"""
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bases.deep_cache import DeepCache
from formats.tensors import fingerprint, read_config
from formats.weights import PARTS, find_part
from model import (
    Autoencoder,
    TextConfig,
    TextEncoder,
    UNet3D,
    UNetConfig,
    VAEConfig,
    decode_frames,
    load_text_encoder,
    load_unet,
    load_vae,
    sample_posterior,
)
from sampler import GUIDANCE, alpha_bars, ddim_levels
from support.files import read_json
from support.ranks import map_tensors, move_to


@dataclass
class Base:
    """The three parts of a text-to-video model; model.load_base returns them frozen."""
    network: UNet3D
    vae: Autoencoder
    text_encoder: TextEncoder
    name: str                                                       # as the user gave it
    folder: Path | None = None                                      # where it lies, if anywhere
    network_file: Path | None = None                                # a file may hold LoRA tensors
    kind = "modelscope"                                             # the preset that is its own
    default_frames = 16
    guidance: float = GUIDANCE                                      # w
    world: object = None                                            # tiny.clips, the tiny base's
    texts: dict = field(default_factory=dict)                       # {caption: its features}, on the CPU

    @property
    def device(self):
        return self.network.conv_in.weight.device

    @property
    def dtype(self):
        return self.network.conv_in.weight.dtype

    # ------------------------------------------------------------------------------------------------------------------------
    # The chain

    @property
    def default_size(self):
        """Pixel rows and columns of the clips that the UNet was trained on."""
        return self.network.config.sample_size * self.vae.config.downscale

    def latent_shape(self, frames, height, width):
        """(C, f, h, w) of a clip's latents. ValueError unless its rows and columns divide."""
        downscale = self.vae.config.downscale
        h, w = height // downscale, width // downscale
        if min(h, w) < 1 or (height, width) != (h * downscale, w * downscale):
            raise ValueError(f"height {height} and width {width}: must be multiples of {downscale}")
        return self.vae.config.latent_channels, frames, h, w

    def levels(self, num_steps, shape=None, published=False):
        """The noise levels of a chain of D steps: DDIM's (Eq. (3)). Other bases need the rest."""
        return ddim_levels(num_steps, alpha_bars())

    def level(self, u):
        """Training levels of u (B,) in [0, 1): t (B,), alpha, sigma (B,1,1,1,1)."""
        t = (len(alpha_bars()) * u).long()
        alpha_bar = alpha_bars()[t].view(-1, 1, 1, 1, 1).float()
        return t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def predict(self, z_t, level, text):
        """
        z_0 and eps in z_t (B,C,F,h,w) at level (t, alpha, sigma): numbers, or as `level` has them. text (B,N,E).

        In z_t's dtype, whatever the UNet's: the schedule stays exact.
        """
        t, alpha, sigma = level
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))                               # (B,)
        eps = self.network(z_t.to(self.dtype), t, text.to(self.dtype)).to(z_t.dtype)
        return (z_t - sigma * eps) / alpha, eps                                                  # (B, C, F, h, w)

    def error(self, z_0, eps, z, noise, level):
        """The loss that the UNet was trained by, Eq. (1), (B,), of what `predict` says."""
        return (eps - noise).square().flatten(1).mean(dim=1)

    def chain_predict(self, interval):
        """`predict` for one chain; an interval N above 1 is DeepCache's."""
        if interval == 1 or len(self.network.up_blocks) == 1:
            return self.predict
        return DeepCache(self, interval)

    def checkpoint_activations(self, on=True):
        """Keep the inputs of blocks only, and recompute the rest in the backward pass."""
        self.network.checkpoint_activations(on)

    # ------------------------------------------------------------------------------------------------------------------------
    # Captions and pixels

    @torch.no_grad()
    def encode_text(self, captions):
        """Captions [B] -> (B, N, E), or a dict of such, each encoded once, whatever the batch, and kept on the CPU: there may be
        many. Other bases have the same."""
        for caption in captions:
            if caption not in self.texts:
                self.texts[caption] = map_tensors(lambda t: t[0].cpu(), self.encode_captions([caption]))
        return map_tensors(lambda *items: torch.stack(items).to(self.device), *[self.texts[caption] for caption in captions])

    @torch.no_grad()
    def encode_captions(self, captions):
        """The same, not kept: a data set has thousands, off the accelerator."""
        return torch.cat([self.text_encoder([caption]) for caption in captions])

    def is_cut(self, caption):
        """Whether a caption is longer than the text encoder reads."""
        longest = self.text_encoder.config.context_length - 2  # less the start and the end token
        return len(self.text_encoder.tokenizer.encode(caption)) > longest

    def unconditional(self, text=None):
        """The empty caption's features, (1, N, E)."""
        return self.encode_text([""])

    @torch.no_grad()
    def encode(self, frames):
        """Frames (F, 3, H, W) in [-1, 1] -> moments (1, 2C, F, h, w), in the encoder's precision."""
        moments = self.vae.encode(frames.to(self.device, self.vae.quant_conv.weight.dtype))
        return moments.transpose(0, 1)[None]

    def draw_latents(self, moments, generator):
        """z (C, F, h, w) of moments (2C, F, h, w): a sample, since the UNet was trained on samples."""
        noise = torch.randn(moments.chunk(2)[0].shape, generator=generator)
        return sample_posterior(moments, noise, self.vae.config.scale)

    def decode_frames(self, z, index=None):
        """Frames index (B, S), or all, of z (B,C,F,h,w) -> (B,S,3,H,W), about [0, 1], not clamped."""
        return decode_frames(self.vae, z, index)

    def fingerprints(self):
        """Of the autoencoder, and of the text tower: their weights and precision."""
        dtype = self.vae.quant_conv.weight.dtype
        return [f"{fingerprint(part.state_dict())} {dtype}" for part in (self.vae, self.text_encoder)]

    def release_encoders(self):
        """Free accelerator memory, once every caption and clip has been encoded, and here the empty caption too."""
        self.unconditional()
        self.text_encoder.to("cpu")
        self.vae.encoder.to("cpu")


def load(base, folder, vae, text_encoder, dtype, device):
    """See model.load_base. base: as the user gave it; folder: what it is here."""
    folder, paths = find_parts(base, folder, {"vae": vae, "text_encoder": text_encoder})
    # Each part leaves the host's memory before the next is read.
    network = move_to(load_unet(paths["unet"], dtype=dtype), device)
    autoencoder = move_to(load_vae(paths["vae"]), device)
    text = load_text_encoder(paths["text_encoder"])
    expect_fitting(network.config, autoencoder.config, text.config, paths)
    guidance = read_config(paths["unet"], own_guidance) or GUIDANCE
    file = paths["unet"] if paths["unet"].is_file() else None
    made = Base(network, autoencoder, move_to(text, device), base, folder, file, guidance)
    return in_precision(made, dtype)


def own_guidance(content):
    """The guidance scale that a UNet's config.json (a dict) recommends, or None; an exception if it is no number."""
    scale = content.get("guidance")
    if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
        raise ValueError(f"expected a number as guidance, found {scale!r}")
    return scale


def find_parts(base, folder, given):
    """
    (folder, {part: its file or folder}) of a base; a file is a UNet with its other parts beside it. given: {part: a path to take
    instead, or None}. A base that does not predict noise is refused, since it would be trained as if it did.
    """
    scheduler = find_part(folder, ["scheduler/scheduler_config.json"])
    predicted = read_json(scheduler).get("prediction_type", "epsilon") if scheduler else "epsilon"
    if predicted != "epsilon":
        raise ValueError(f"{scheduler}: prediction_type is {predicted!r}: must be 'epsilon', for which this code samples")

    paths = {part: Path(path) for part, path in given.items() if path}
    if folder.is_file():
        paths["unet"] = folder
        folder = folder.parent
    for part, names in PARTS.items():
        paths[part] = paths.get(part) or find_part(folder, names)
        if paths[part] is None:
            flag = "" if part == "unet" else f", or --{part.replace('_', '-')}"
            raise ValueError(f"{base}: no {part} found in {folder}; expected one of {', '.join(names)}{flag}")
    return folder, paths


def expect_fitting(unet, vae, text, paths):
    """ValueError, naming the files, unless a UNet takes the latents and text features that the other parts, if there, make."""
    width = text.width if text else unet.context_dim
    if (unet.in_channels, unet.out_channels, unet.context_dim) != (vae.latent_channels, vae.latent_channels, width):
        raise ValueError(f"{paths['unet']}: the UNet takes {unet.in_channels} and gives {unet.out_channels} latent channels, "
                         f"text of width {unet.context_dim}; {paths['vae']} has {vae.latent_channels}, "
                         f"{paths['text_encoder']} {width}")


def random_sizes(spec):
    """Settings of UNet, autoencoder and text tower for "random" (none: full size) or "random:W" (multiples of W channels)."""
    width = spec.partition(":")[2] or "320"
    w = int(width) if width.isdigit() else 0
    if w % 32 or not 32 <= w <= 2**12:
        raise ValueError(f"base {spec!r}: must be random, or random:W with W a multiple of 32, at most 4096")
    if w == 320:
        return {}, {}, {}
    unet = dict(channels=(w, 2 * w, 4 * w, 4 * w), context_dim=64, head_dim=32 if w % 64 else 64, sample_size=8)
    v = max(32, w * 2 // 5 // 32 * 32)
    return unet, dict(channels=(v, 2 * v, 4 * v, 4 * v), blocks_per_level=1), dict(width=64, heads=1, layers=2)


def random(spec, seed, dtype, device):
    """Seeded random weights, to time and try the pipeline without a download. See model.load_base."""
    unet, vae, text = random_sizes(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        parts = [UNet3D(UNetConfig(**unet)), Autoencoder(VAEConfig(**vae)), TextEncoder(TextConfig(**text))]
    made = Base(*[move_to(part.eval().requires_grad_(False), device) for part in parts], spec)
    return in_precision(made, dtype)


def in_precision(base, dtype):
    """What runs in every step gets the dtype. The encoders stay float32: they run once, what they make is kept."""
    for part in (base.network, base.vae.decoder, base.vae.post_quant_conv):
        part.to(dtype)
    return base
