"""
Stable Video Diffusion (arXiv:2311.15127): a picture begins to move. A UNet with layers along time, trained as EDM says.

    python train.py svd --data clips.txt --prompts pictures=pictures.txt
    python generate.py --base stabilityai/stable-video-diffusion-img2vid --image cat.png --prompt "a cat" --frames 14 --fps 7

Its networks are diffusers' UNetSpatioTemporalConditionModel and AutoencoderKLTemporalDecoder; transformers' CLIP reads pictures.

Against ModelScopeT2V: (1) it is told a picture, captions are for rewards; a prompt is a line `picture.png|||caption`, a clip has
its first frame; (2) EDM (arXiv:2206.00364): z_t = z_0 + sigma eps, sigma from .002 to 700; the network sees z_t at unit
variance and tells v; (3) guidance rises from 1 in the first frame to w in the last; (4) the decoder mixes frames.

Traps: the picture's latents are the posterior's mode, not scaled as z. The network is told fps - 1. Attention to the picture has
one key, whose softmax is 1 whatever the query is: attn2's to_q and to_k get no adapters. The last step of a chain moves z_0 six
times less than DDIM's does, so three steps carry gradient by default: together .025 of z_0 per unit of v, twice ModelScopeT2V's
last one. tau = .36 leaves as much of a clip as .6 does there.

Letters: B clips, C latent channels, F frames, S wanted ones, n of a window, h and w latent rows and columns, E width of CLIP's.
"""
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F_
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from bases import modelscope
from bases.diffusers_base import DiffusersBase, check_weights, read_part
from formats.reward_model import clip_normalize
from formats.tensors import fingerprint
from model import sample_posterior
from sampler import Levels
from support.files import read_json
from support.ranks import map_tensors, sample_generator, stack
from support.settings import BASES
from support.videos import read_picture

SETTINGS = BASES["svd"]
SIGMAS, RHO = (.002, 700.), 7.  # least and largest of a chain, and how evenly those between are spaced (EDM, Eq. (5))
MOTION, STRENGTH = 127, .02     # how much moves, from 1 to 255; noise on the picture's pixels (diffusers' pipeline)
P_MEAN, P_STD = .7, 1.6         # of ln sigma in training (as other trainers of it have them; its own code does not say)
DEAD = (r"attn2\.to_[qk]$", "attn2's to_q and to_k get no adapters: with one picture, one key, their gradient would always be 0")
PARTS = {"unet": UNetSpatioTemporalConditionModel, "vae": AutoencoderKLTemporalDecoder,
         "image_encoder": CLIPVisionModelWithProjection}
KINDS = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal", "UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
SMALL = (dict(block_out_channels=(32, 64), num_attention_heads=(2, 4), cross_attention_dim=16, layers_per_block=1,
              addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, down_block_types=KINDS[:2],
              up_block_types=KINDS[2:]),
         dict(block_out_channels=(32,) * 4, layers_per_block=1),
         dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=32, projection_dim=16))
PUBLISHED = ({}, dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2),  # arguments, where the classes have others
             dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14,
                  projection_dim=1024, hidden_act="gelu"))


def levels(num_steps, shape=None, published=False, sigmas=SIGMAS):
    """EDM's, Eq. (5), and 0, where the chain ends. These are the published ones; shape is for other bases."""
    low, high = [sigma ** (1 / RHO) for sigma in sigmas]
    sigma = [(high + k / max(num_steps - 1, 1) * (low - high)) ** RHO for k in range(num_steps)] + [0.]
    t = [math.log(s) / 4 for s in sigma[:-1]] + [0.]
    return Levels(t[::-1], [1.] * len(sigma), sigma[::-1], start=(sigma[0] ** 2 + 1) ** .5, first_guidance=1.)


class SVD:
    """The base as train.py and all methods know it; `load` and `random` make one, frozen."""
    kind = "svd"
    default_frames = SETTINGS["frames"]
    default_size, guidance = SETTINGS["size"], SETTINGS["guidance"]
    world = network_file = None  # no clips of its own, and no adapters beside its weights
    latent_context = 2           # frames on each side with which a wanted one is decoded
    fps = SETTINGS["fps"]        # of prompts' videos, set by the scripts; a training clip has its own
    parts = 1                    # of a video, set by the scripts: each next one starts from the last frame of the one before

    def __init__(self, network, vae, image_encoder, name, folder=None, sigmas=SIGMAS):
        self.network, self.vae, self.image_encoder = network, vae, image_encoder
        self.name, self.folder, self.sigmas = name, folder, sigmas
        network.no_adapters = DEAD
        self.size, self.pictures = None, {}  # (H, W) of the videos to come; {(picture, size, fps): what is told of it}

    device, dtype = modelscope.Base.device, modelscope.Base.dtype  # this UNet, too, begins with conv_in

    def latent_shape(self, frames, height, width):
        """(C, f, h, w) of a clip's latents; ValueError unless its rows and columns divide. Asked before prompts are encoded:
        their pictures are then fitted to this size. The latents of parts follow each other."""
        downscale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        h, w = height // downscale, width // downscale
        if min(frames, h, w) < 1 or (height, width) != (h * downscale, w * downscale):
            raise ValueError(f"frames {frames}, height {height} and width {width}: must be at least 1, and multiples of "
                             f"{downscale}")
        self.size = height, width
        return self.vae.config.latent_channels, frames + self.parts - 1, h, w

    def levels(self, num_steps, shape=None, published=False):
        return levels(num_steps, shape, published, self.sigmas)

    def level(self, u):
        """Training levels of u (B,) in [0, 1): t (B,), alpha, sigma (B,1,1,1,1); ln sigma is normal."""
        sigma = torch.exp(P_MEAN + P_STD * torch.special.ndtri(u)).clamp(*self.sigmas)
        return sigma.log() / 4, torch.ones_like(sigma).view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1)

    def predict(self, z_t, level, text):
        """z_0 and eps in z_t (B,C,F,h,w) at level (t, alpha, sigma), in z_t's dtype; text as `condition` makes it."""
        t, _, sigma = level
        scale = (sigma**2 + 1) ** .5
        image = text["image"][:, :, None].expand(-1, -1, z_t.shape[2], -1, -1)                  # (B, C, F, h, w)
        x = torch.cat([z_t / scale, image.to(z_t)], dim=1).transpose(1, 2)                      # (B, F, 2C, h, w)
        t = torch.as_tensor(t, dtype=torch.float32, device=z_t.device).expand(len(z_t))         # (B,)
        v = self.network(x.to(self.dtype), t, text["clip"].to(self.dtype), text["ids"], return_dict=False)[0]
        v = v.transpose(1, 2).to(z_t.dtype)                                                     # (B, C, F, h, w)
        return z_t / scale**2 - sigma / scale * v, sigma / scale**2 * z_t + v / scale

    def error(self, z_0, eps, z, noise, level):
        """The loss that the UNet was trained by, (B,), of what `predict` says: the mean square error of v, by EDM's weights."""
        return ((z_0 - z).square() * (1 + 1 / level[2] ** 2)).flatten(1).mean(dim=1)

    chain_predict, checkpoint_activations = DiffusersBase.chain_predict, DiffusersBase.checkpoint_activations

    def condition(self, images, fps=None, motion=MOTION, strength=STRENGTH, noise=None):
        """
        What the network is told of pictures (B,3,H,W) in [-1, 1] that begin to move: {"clip": (B,1,E), "image": (B,C,h,w), "ids":
        (B,3)}. noise (B,3,H,W): what `strength` of is added before the autoencoder; default the same for every picture.
        """
        images = images.to(self.image_encoder.device, torch.float32)
        if noise is None:
            noise = torch.randn(images.shape[1:], generator=sample_generator(0, "picture"))
        clip = self.image_encoder(clip_pixels(images, self.image_encoder.config.image_size)).image_embeds[:, None]
        image = self.vae.encode(images + strength * noise.to(images)).latent_dist.mode()        # (B, C, h, w), not scaled
        ids = torch.tensor([(fps or self.fps) - 1, motion, strength], dtype=torch.float32, device=images.device)
        return {"clip": clip, "image": image, "ids": ids.expand(len(images), -1)}

    def encode_text(self, prompts):
        """What is told of prompts with pictures [B], each read once and kept: as `condition` makes it."""
        for prompt in prompts:
            if (prompt.picture, self.size, self.fps) not in self.pictures:
                picture = read_picture(prompt.picture, *self.size)[None] / 127.5 - 1            # (1, 3, H, W)
                told = map_tensors(lambda t: t[0].cpu(), self.condition(picture))
                self.pictures[prompt.picture, self.size, self.fps] = told
        return stack([self.pictures[prompt.picture, self.size, self.fps] for prompt in prompts], self.device)

    def unconditional(self, text=None):
        """No picture, but the rate and the motion that `text` tells of."""
        return text and text | {name: torch.zeros_like(text[name]) for name in ("clip", "image")}

    def is_cut(self, caption):
        return False  # captions are not read

    @torch.no_grad()
    def encode(self, frames):
        """Frames (F, 3, H, W) in [-1, 1] -> moments (1, 2C, F, h, w)."""
        frames = frames.to(self.device, self.vae.quant_conv.weight.dtype)
        return self.vae.encode(frames).latent_dist.parameters.transpose(0, 1)[None]

    def draw_latents(self, moments, generator):
        """z (C, F, h, w) of moments (2C, F, h, w): a sample."""
        noise = torch.randn(moments.chunk(2)[0].shape, generator=generator)
        return sample_posterior(moments, noise, self.vae.config.scaling_factor)

    def next_text(self, z):
        """What the part after z (B,C,F,h,w) is told, whose picture is z's last frame: exact, or with gradient as a wanted one."""
        last = torch.tensor([[z.shape[2] - 1]]) if z.requires_grad else None
        pictures = [self.decode_part(video, last)[:, -1] for video in z.split(1)]               # (1, 3, H, W) each
        return self.condition(2 * torch.cat(pictures).clamp(0, 1) - 1)

    def decode_frames(self, z, index=None):
        """Frames index (B, S), or all, of z (B,C,f,h,w) -> (B,S,3,H,W), about [0, 1], not clamped. Parts share a frame. With
        gradient, for which little can be kept, wanted frames are as decode_part says; else exact."""
        if index is not None and not (torch.is_grad_enabled() and z.requires_grad):
            return SVD.decode_frames(self, z)[torch.arange(len(z))[:, None], index.cpu()]
        if self.parts == 1:
            return self.decode_part(z, index)
        parts = z.unflatten(2, (self.parts, -1)).transpose(1, 2)                                # (B, parts, C, F, h, w)
        if index is None:
            made = [self.decode_part(part) for part in parts.unbind(1)]
            return torch.cat([made[0], *(frames[:, 1:] for frames in made[1:])], dim=1)  # its first is the last one's end
        new = parts.shape[3] - 1                                                                # frames that a next part adds
        of_part = (index.cpu() - 1).clamp(min=0) // new                                         # (B, S)
        chosen = parts[torch.arange(len(z))[:, None], of_part].flatten(0, 1)                    # (B*S, C, F, h, w)
        return self.decode_part(chosen, (index.cpu() - new * of_part).view(-1, 1))[:, 0].unflatten(0, index.shape)

    def decode_part(self, z, index=None):
        """The same of one part. All frames are decoded together, exactly; a wanted one with `latent_context` frames on each side,
        though the decoder looks up to 29 away: how far off that is, docs/bases.md says."""
        latents = z.transpose(1, 2) / self.vae.config.scaling_factor                            # (B, F, C, h, w)
        B, F = latents.shape[:2]
        n = F if index is None else min(2 * self.latent_context + 1, F)
        first = torch.zeros(B, 1, dtype=torch.long) if n == F else (index.cpu() - self.latent_context).clamp(0, F - n)
        clips = torch.arange(B)[:, None, None]
        windows = latents[clips, first[..., None] + torch.arange(n)].to(self.vae.decoder.conv_in.weight.dtype)
        x = self.vae.decode(windows.flatten(0, 2), num_frames=n).sample.to(z.dtype) / 2 + .5    # (B*S*n, 3, H, W)
        x = x.unflatten(0, (B, -1, n))                                                          # (B, S or 1, n, 3, H, W)
        return x[:, 0] if index is None else x[clips[..., 0], torch.arange(x.shape[1]), index.cpu() - first]

    def fingerprints(self):
        """Of what is made of clips, and of captions, which are not read."""
        return [f"{fingerprint(self.vae.state_dict())} {fingerprint(self.image_encoder.state_dict())} {MOTION} {STRENGTH}", ""]

    def release_encoders(self):
        """Free accelerator memory, once every picture and clip has been encoded: pictures of next parts are still to come."""
        for encoder in (self.vae.encoder, self.image_encoder) if self.parts == 1 else ():
            encoder.to("cpu")


def clip_pixels(images, size):
    """Pictures (B, 3, H, W) in [-1, 1] as CLIP is shown them, (B, 3, size, size): blurred as they shrink, made squares."""
    x = images
    for axis in (-1, -2):
        deviation = max((x.shape[axis] / size - 1) / 2, .001)
        length = int(max(4 * deviation, 3)) | 1                                                 # odd
        kernel = torch.exp(-(torch.arange(length).to(x) - length // 2) ** 2 / (2 * deviation**2))
        kernel = (kernel / kernel.sum()).view((1, 1, 1, length) if axis == -1 else (1, 1, length, 1))
        x = F_.pad(x, [length // 2] * 2 + [0, 0] if axis == -1 else [0, 0] + [length // 2] * 2, mode="reflect")
        x = F_.conv2d(x.flatten(0, 1)[:, None], kernel)[:, 0].unflatten(0, images.shape[:2])
    x = F_.interpolate(x, (size, size), mode="bicubic", align_corners=True)
    return clip_normalize((x + 1) / 2)


def load(base, folder, vae, text_encoder, dtype, device):
    """Of a diffusers folder, as StableVideoDiffusionPipeline.save_pretrained writes it. See model.load_base."""
    if text_encoder:
        raise ValueError(f"text_encoder {text_encoder}: {base} reads pictures, not captions, so none can be given")
    paths = {name: Path(vae) if vae and name == "vae" else folder / name for name in PARTS}
    for path in paths.values():
        if not (path / "config.json").is_file():
            raise ValueError(f"{base}: no config.json in {path}; expected a diffusers folder with {'/, '.join(PARTS)}/")
    for path in paths.values():
        check_weights(path)
    sigmas = read_sigmas(folder / "scheduler/scheduler_config.json")
    network = read_part(PARTS["unet"], paths["unet"], device, torch_dtype=dtype)
    autoencoder = read_part(PARTS["vae"], paths["vae"], device, torch_dtype=torch.float32)
    image_encoder = read_part(PARTS["image_encoder"], paths["image_encoder"], device, dtype=torch.float32)
    return in_precision(SVD(network, autoencoder, image_encoder, base, folder, sigmas), dtype, device)


def read_sigmas(path):
    """The least and the largest sigma of a published scheduler's config. ValueError for one of another prediction."""
    config = read_json(path) if path.is_file() else {}
    if config.get("prediction_type", "v_prediction") != "v_prediction":
        raise ValueError(f"{path}: prediction_type {config['prediction_type']!r}; Stable Video Diffusion's is v_prediction")
    return float(config.get("sigma_min", SIGMAS[0])), float(config.get("sigma_max", SIGMAS[1]))


def random(base, seed, dtype, device, sizes=SMALL):
    """Seeded random weights at small width, to try a pipeline without a download. See model.load_base."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        parts = (UNetSpatioTemporalConditionModel(**sizes[0]),
                 AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 4, **sizes[1]),
                 CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes[2])))
    return in_precision(SVD(*parts, base), dtype, device)


published = partial(random, sizes=PUBLISHED)  # to count and time a step


def in_precision(base, dtype, device):
    """Frozen, and on its device. What runs in every step gets the dtype; the encoders stay float32, what they make is kept."""
    for part in (base.network, base.vae, base.image_encoder):
        part.requires_grad_(False).eval().to(device)
    torch.nn.Module.to(base.network, dtype)  # diffusers' own `to` warns of each
    base.vae.decoder.to(dtype)
    return base
