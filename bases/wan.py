"""
Wan 2.1 (arXiv:2503.20314): a transformer trained as a rectified flow, and a causal video autoencoder.

    python train.py wan --data clips.txt --prompts animals=animals.txt

Its networks are diffusers' WanTransformer3DModel and AutoencoderKLWan, its text tower is transformers' UMT5 encoder.

Against ModelScopeT2V: (1) z_t = (1 - sigma) z_0 + sigma eps, and the network tells the velocity v = eps - z_0; (2) a latent holds
four frames, the first one holds one, so a clip has 4k + 1 frames; (3) its autoencoder takes the posterior's mode, and reads and
writes latents in order, each with what it remembers of those before; (4) a caption has 512 tokens, those after its end are zeros,
which the network attends to.

Traps: noise levels are shifted, once here. diffusers' Euler scheduler shifts them twice at the clean end, so that the last step
starts at sigma = .009 whatever D is, and one step of gradient does next to nothing: `published=True` gives its levels. Published
folders name UniPC, a multistep sampler: its shift is read, and the one-step rule of sampler.py is used. tau = .6 of ModelScopeT2V
leaves as much of a clip as tau = .4 does here.

Letters: B clips, C latent channels, F frames, f latents in time, h and w latent rows and columns, N text tokens, E their width.
"""
import html
import re
from functools import partial
from pathlib import Path

import ftfy
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from bases.diffusers_base import DiffusersBase, decode_in_order, find_folders, frozen, load_parts, read_part
from model import load_text_encoder
from sampler import Levels
from support.files import read_json
from support.settings import BASES, TINY

SETTINGS = BASES["wan"]
SHIFT = 3.  # of the noise levels, towards noise (the hub's scheduler, for 480p; 5 for 720p)
TRAIN_STEPS = 1000  # the network is told 1000 sigma
MAX_TOKENS = 512
# Constructor arguments of network, autoencoder and text tower, where the classes have others.
SMALL = (dict(num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=48, num_layers=2),
         dict(base_dim=4), dict(d_model=32, d_kv=8, d_ff=64, num_heads=4))
PUBLISHED = (dict(num_attention_heads=12, ffn_dim=8960, num_layers=30), {}, dict(d_model=4096, d_ff=10240, num_heads=64))


def shifted(u, shift):
    """sigma of u in [0, 1]: more of the levels are noisy ones, as more pixels need it (SD3, arXiv:2403.03206, Eq. (23))."""
    return shift * u / (1 + (shift - 1) * u)


def levels(num_steps, shape=None, published=False, shift=SHIFT):
    """sigma from 0 to 1 over i = 0..D. published: diffusers' FlowMatchEulerDiscreteScheduler. shape is for other bases."""
    u = [i / num_steps for i in range(num_steps + 1)]
    if published:  # 1 at the noisy end, also where there is one step alone
        least = shifted(1 / TRAIN_STEPS, shift)
        u = [0., *torch.linspace(1, least, num_steps, dtype=torch.float64).tolist()[::-1]]
    sigma = [shifted(v, shift) for v in u]
    return Levels([TRAIN_STEPS * s for s in sigma], [1 - s for s in sigma], sigma)


class Wan(DiffusersBase):
    """The base as train.py and all methods know it; `load` and `random` make one, frozen."""
    kind = "wan"
    default_frames, default_size, fps = SETTINGS["frames"], SETTINGS["size"], SETTINGS["fps"]
    guidance = SETTINGS["guidance"]
    max_tokens = MAX_TOKENS

    def __init__(self, *parts, name, folder=None, shift=SHIFT):
        super().__init__(*parts, name, folder)
        self.shift = shift

    def latent_shape(self, frames, height, width):
        """(C, f, h, w) of a clip's latents. ValueError unless it has 4k + 1 frames, and rows and columns in sixteens."""
        if frames < 1 or frames % 4 != 1:
            raise ValueError(f"frames = {frames}: {self.name} makes 4k + 1 frames: 1, 5, 9, 13, 17, ...")
        self.check_size(height, width)
        return self.vae.config.z_dim, (frames - 1) // 4 + 1, height // 8, width // 8

    def levels(self, num_steps, shape=None, published=False):
        return levels(num_steps, shape, published, self.shift)

    def level(self, u):
        """Training levels of u (B,) in [0, 1): t (B,), alpha, sigma (B,1,1,1,1). Ours: theirs is not published."""
        sigma = shifted(u, self.shift).view(-1, 1, 1, 1, 1)
        return TRAIN_STEPS * sigma.flatten(), 1 - sigma, sigma

    def predict(self, z_t, level, text):
        """z_0 and eps in z_t (B,C,f,h,w) at level (t, alpha, sigma), in z_t's dtype; text (B,N,E)."""
        t, alpha, sigma = level
        t = torch.as_tensor(t, dtype=torch.float32, device=z_t.device).expand(len(z_t))          # (B,)
        v = self.network(z_t.to(self.dtype), t, text.to(self.dtype), return_dict=False)[0].to(z_t.dtype)
        return z_t - sigma * v, z_t + alpha * v                                                 # (B, C, f, h, w)

    def error(self, z_0, eps, z, noise, level):
        """The loss that such a network is trained by, (B,), of what `predict` says: the mean square error of v."""
        return ((eps - z_0) - (noise - z)).square().flatten(1).mean(dim=1)

    def clean(self, caption):
        return clean(caption)

    def encode_caption(self, caption):
        """(1, N, E): tokens after a caption's end are zeros."""
        tokens = self.tokens(caption)
        features = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return features * tokens.attention_mask[..., None].to(features.dtype)

    def draw_latents(self, moments, generator):
        """z (C, f, h, w), of what `encode` gives: these are the latents already."""
        return moments.float()

    @torch.no_grad()
    def encode(self, frames):
        """Frames (F, 3, H, W) in [-1, 1] -> the latents z (1, C, f, h, w): the posterior's mode, as the authors take it."""
        self.latent_shape(len(frames), *frames.shape[-2:])
        video = frames.to(self.device, self.vae.dtype).transpose(0, 1)[None]                    # (1, 3, F, H, W)
        z = self.vae.encode(video).latent_dist.mode()
        mean, std = statistics(self.vae, z)
        return (z - mean) / std

    def decode_clip(self, z, index):
        """Frames index [S] of z (1,C,f,h,w) -> (S,3,H,W), about [-1, 1]."""
        return decode_clip(self.vae, to_vae(self.vae, z), index, self.latent_context)


class TinyWan(Wan):
    """The same in the tiny world (tiny/flow.py), whose captions its small CLIP reads."""
    default_size, fps = TINY["tiny-wan"]["size"], TINY["tiny-wan"]["fps"]
    guidance = TINY["tiny-wan"]["guidance"]

    def latent_shape(self, frames, height, width):
        """(C, f, h, w) of a clip's latents. ValueError unless it has 4k + 1 frames, and rows and columns in eights."""
        if frames < 1 or frames % 4 != 1 or height < 8 or width < 8 or height % 8 or width % 8:
            raise ValueError(f"frames = {frames}, size = {height}x{width}: {self.name} makes 4k + 1 frames, of sizes "
                             "that are multiples of 8")
        return self.vae.config.z_dim, (frames - 1) // 4 + 1, height // 4, width // 4

    def encode_caption(self, caption):
        """(1, N, E)."""
        return self.text_encoder([caption])

    def is_cut(self, caption):
        """Whether a caption is longer than the text encoder reads."""
        return len(self.text_encoder.tokenizer.encode(caption)) > self.text_encoder.config.context_length - 2


def statistics(vae, z):
    """The mean and the deviation of each channel of the autoencoder's latents, as z (B,C,f,h,w): the network's have 0 and 1."""
    config = vae.config
    return [torch.tensor(v, dtype=z.dtype, device=z.device).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)]


def to_vae(vae, z):
    """Latents as the autoencoder has them, of z as the network has them."""
    mean, std = statistics(vae, z)
    return (z * std + mean).to(vae.dtype)


def decode_clip(vae, latents, index, context):
    """Frames index [S] of latents (1,C,f,h,w), in one pass up to the last that is needed: (S, 3, H, W) about [-1, 1]."""
    def decode_latent(latent, j, *memory):
        memory = list(memory)
        return vae.decoder(latent, feat_cache=memory, feat_idx=[0], first_chunk=j == 0), *memory

    latents = vae.post_quant_conv(latents)
    latent_of = [(i + 3) // 4 for i in index]  # 0, then 1 1 1 1, 2 2 2 2, ...
    memory = [None] * vae._cached_conv_counts["decoder"]
    frames = decode_in_order(decode_latent, latents.split(1, dim=2), latent_of, context, memory)
    return torch.stack([frames[j][(i + 3) % 4 if i else 0] for i, j in zip(index, latent_of)])


def clean(caption):
    """A caption as the text tower was trained on it."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text).strip()


def load(base, folder, vae, text_encoder, dtype, device):
    """Of a diffusers folder, as WanPipeline.save_pretrained writes it. See model.load_base. A base without text tower loads."""
    tower = Path(text_encoder or folder / "text_encoder")
    if (tower / "words.txt").is_file():
        network = read_part(WanTransformer3DModel, folder / "transformer", device, torch_dtype=dtype)
        autoencoder = read_part(AutoencoderKLWan, Path(vae or folder / "vae"), device, torch_dtype=torch.float32)
        return TinyWan(network, autoencoder, None, frozen(load_text_encoder(tower), device), name=base, folder=folder)
    folders = find_folders(base, folder, vae, text_encoder)
    shift = read_shift(folder / "scheduler/scheduler_config.json")
    parts = load_parts(folders, (WanTransformer3DModel, AutoencoderKLWan, UMT5EncoderModel), dtype, device)
    return Wan(*parts, name=base, folder=folder, shift=shift)


def read_shift(path):
    """The shift of a published scheduler's config. ValueError for one that was made for another prediction."""
    config = read_json(path) if path.is_file() else {}
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise ValueError(f"{path}: prediction_type {prediction!r}; Wan's is flow_prediction")
    return float(config.get("flow_shift", config.get("shift", SHIFT)))


def random(base, seed, dtype, device, sizes=SMALL):
    """Seeded random weights at small width, in Wan's classes, to try a pipeline without a download. See model.load_base."""
    of_network, of_vae, of_text = sizes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        network = WanTransformer3DModel(**of_network)
        vae = AutoencoderKLWan(**of_vae)
        text = UMT5EncoderModel(UMT5Config(vocab_size=384, num_layers=1, **of_text))
    network = network if dtype == torch.float32 else network.to(dtype)
    return Wan(frozen(network, device), frozen(vae, device), ByT5Tokenizer(), frozen(text, device), name=base)


published = partial(random, sizes=PUBLISHED)  # to count and time a step; of the text tower, which no step runs, one layer of 24
