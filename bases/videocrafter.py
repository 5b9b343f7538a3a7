"""
VideoCrafter2 (arXiv:2401.09047), one of the bases on which VADER shows its results.

    python train.py videocrafter --data clips.txt --prompts animals=animals.txt
    python -m methods.vader videocrafter --prompts-train prompts.txt                # VADER's own settings

Its UNet is ModelScopeT2V's, told the frame rate besides the step; autoencoder and text tower are the same, so model.py has
them all.

Against ModelScopeT2V: (1) the signal is scaled: z_t = s_t sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, with s_t falling from 1 at
t = 0 to 0.7 at t = 399, and 0.7 from there; (2) the network is told the frames a second, `fps`; (3) clips have 320 x 512 pixels;
(4) all parts are in one file, model.ckpt.

Traps: alpha² + sigma² is not 1 here. Plain DDIM, as in the ports to diffusers, ends up elsewhere: by a third of the largest
latent, with small random weights. The fresh noise of a step follows from abar = 1 - sigma² alone, as in the authors' sampler;
DDPM's formula from alpha and sigma would give another amount. They sample with eta = 1, which leaves noise of deviation .02 in
the final latents, and with guidance 12. A number of steps that does not divide 1000 gives more steps than it says in their
sampler, or fails (3); here it is what it says, and `published=True` gives their levels. tau = .6 of ModelScopeT2V leaves as much
of a clip as tau = .5 does here, since the signal is weaker.

Letters: B clips, C latent channels, F frames, h and w latent rows and columns, N text tokens, E their width.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bases import modelscope
from formats import tensor_names as names
from formats.tensors import build_empty, fingerprint, load_strict, read_config, read_tensors
from formats.weights import PARTS, WHOLE, find_part
from model import Autoencoder, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig, embed, load_text_encoder, load_vae
from sampler import Levels, alpha_bars, ddpm_step
from support.ranks import move_to
from support.settings import BASES

SETTINGS = BASES["videocrafter"]
SCALED = 400  # levels over which the signal's scale falls
LEAST = .7    # to this
SMALL = (dict(channels=(32, 64), blocks_per_level=1, attention_levels=(True, False), context_dim=64, head_dim=16),  # UNet
         dict(channels=(32, 32, 32, 32), blocks_per_level=1), dict(width=64, heads=1, layers=2))  # autoencoder, text tower


def scales(num_train_steps=1000):
    """s_t (T,), what the signal is multiplied by, float64."""
    falling = torch.linspace(1, LEAST, SCALED, dtype=torch.float64)
    return torch.cat([falling, falling.new_full((num_train_steps - SCALED,), LEAST)])            # (T,)


def levels(num_steps, shape=None, published=False):
    """
    t, alpha and sigma of Eq. (3)'s chain. shape is for other bases.

    published: the authors' levels, which are others where num_steps does not divide 1000: it is their spacing that is exact,
    and they take as many steps as then fit in.
    """
    abar, scale = alpha_bars(), scales()
    ddpm_step(num_steps, num_steps)  # refuses a number of steps that there cannot be
    t = [0] + [ddpm_step(i, num_steps) for i in range(1, num_steps + 1)]
    if published:
        t = [0] + [first + 1 for first in range(0, len(abar), len(abar) // num_steps)]
        if t[-1] == len(abar):
            raise ValueError(f"num_steps = {num_steps}: the authors' levels end at {t[-1]} there, the network knows 0 to 999")
    sigma = (1 - abar[t]).sqrt().tolist()
    fresh = [0.]
    for s, s_prev in zip(sigma[1:], sigma):
        fresh.append(s_prev / s * (1 - (1 - s**2) / (1 - s_prev**2)) ** .5)
    return Levels(t, (abar[t].sqrt() * scale[t]).tolist(), sigma, fresh)


class VideoCrafterUNet(UNet3D):
    """ModelScopeT2V's UNet, told the frames a second as it is told the step."""

    def __init__(self, config):
        super().__init__(config)
        c = config.channels[0]
        self.fps_embedding = nn.ModuleDict({"linear_1": nn.Linear(c, 4 * c), "linear_2": nn.Linear(4 * c, 4 * c)})

    def forward(self, z_t, t, text, fps=None):
        """z_t (B,C,F,h,w), t (B,), text (B,N,E), fps (B,) -> eps (B,C,F,h,w)."""
        fps = torch.full_like(t, SETTINGS["fps"]) if fps is None else fps
        step, rate = embed(t, self.time_embedding, z_t.dtype), embed(fps, self.fps_embedding, z_t.dtype)
        return self.denoise(z_t, step + rate, text)


@dataclass
class Base(modelscope.Base):
    """The base as train.py and all methods know it; `load` and `random` make one, frozen. text_encoder may be None."""
    kind = "videocrafter"
    default_frames = SETTINGS["frames"]
    default_size = SETTINGS["size"]
    guidance: float = SETTINGS["guidance"]
    fps: float = SETTINGS["fps"]                                     # what the network is told

    def levels(self, num_steps, shape=None, published=False):
        return levels(num_steps, shape, published)

    def level(self, u):
        """Training levels of u (B,) in [0, 1): t (B,), alpha, sigma (B,1,1,1,1)."""
        t, alpha, sigma = super().level(u)
        return t, alpha * scales()[t].view_as(alpha).float(), sigma

    def predict(self, z_t, level, text):
        """z_0 and eps in z_t (B,C,F,h,w) at level (t, alpha, sigma), in z_t's dtype; text (B,N,E)."""
        t, alpha, sigma = level
        t = torch.as_tensor(t, device=z_t.device).expand(len(z_t))                               # (B,)
        fps = torch.full_like(t, self.fps, dtype=torch.float32)                                  # (B,)
        eps = self.network(z_t.to(self.dtype), t, text.to(self.dtype), fps).to(z_t.dtype)
        return (z_t - sigma * eps) / alpha, eps                                                  # (B, C, F, h, w)

    def encode_captions(self, captions):
        if self.text_encoder is None:
            raise ValueError(f"{self.name} has no text encoder: there is none in it, and none was given by --text-encoder")
        return super().encode_captions(captions)

    def is_cut(self, caption):
        return self.text_encoder is not None and super().is_cut(caption)

    def fingerprints(self):
        dtype = self.vae.quant_conv.weight.dtype
        parts = (self.vae, self.text_encoder)
        return ["none" if part is None else f"{fingerprint(part.state_dict())} {dtype}" for part in parts]

    def release_encoders(self):
        self.vae.encoder.to("cpu")
        if self.text_encoder is not None:
            super().release_encoders()


def load(base, folder, vae, text_encoder, dtype, device):
    """
    See model.load_base. Of model.ckpt, or a folder with it, and with a config.json of its structure if it is of another size
    than the published; or of the port's folder, with vae/ and text_encoder/ in it. A base without a text tower loads.
    """
    file = folder if folder.is_file() else folder / WHOLE
    if file.is_file():
        folder, whole = file.parent, read_tensors(file)
        found = read_config(folder, structures)
        config, vae_config = found or (UNetConfig(), VAEConfig())
        tensors = names.of_part(whole, names.IN_WHOLE["unet"])
        paths = {part: file if names.of_part(whole, prefix) else None for part, prefix in names.IN_WHOLE.items()}
        paths["unet"] = file
    else:
        paths = {part: find_part(folder, PARTS[part]) for part in ("vae", "text_encoder")}
        paths["unet"] = find_part(folder, ["unet/config.json", "config.json"]).parent
        config, vae_config = read_config(paths["unet"], port_structure), None
        tensors = read_tensors(paths["unet"])
    for part, given in (("vae", vae), ("text_encoder", text_encoder)):
        paths[part] = Path(given) if given else paths[part]
    if paths["vae"] is None:
        raise ValueError(f"{base}: has no autoencoder; expected first_stage_model.* in {WHOLE}, vae/ in the port's, or --vae")

    network = build_empty(lambda: VideoCrafterUNet(config), paths["unet"])
    network = load_strict(network, names.unet_from_videocrafter(tensors, config), paths["unet"], dtype)
    text = paths["text_encoder"] and load_text_encoder(paths["text_encoder"])
    autoencoder = load_vae(paths["vae"], vae_config)
    modelscope.expect_fitting(config, autoencoder.config, text.config if text else None, paths)
    return assembled(network, autoencoder, text, base, folder, dtype, device)


def structures(content):
    """The config.json beside a model.ckpt, with the arguments of its classes -> structures of its UNet and autoencoder."""
    unet, vae = content["unet"], content["vae"]
    names.check_fields(content, {"use_scale": True, "scale_b": LEAST, "linear_start": .00085, "linear_end": .012,
                                 "timesteps": 1000})
    names.check_fields(unet, {"fps_cond": True, "addition_attention": True, "temporal_conv": True, "temporal_attention": True,
                              "temporal_selfatt_only": True, "use_linear": True, "use_relative_position": False,
                              "use_causal_attention": False, "transformer_depth": 1})
    names.check_fields(vae, {"double_z": True, "in_channels": 3, "out_ch": 3, "attn_resolutions": []})
    channels = tuple(unet["model_channels"] * factor for factor in unet["channel_mult"])
    of_unet = UNetConfig(
        in_channels=unet["in_channels"], out_channels=unet["out_channels"], channels=channels,
        blocks_per_level=unet["num_res_blocks"], context_dim=unet["context_dim"], head_dim=unet["num_head_channels"],
        attention_levels=tuple(2**i in unet["attention_resolutions"] for i in range(len(channels))))
    of_vae = VAEConfig(
        channels=tuple(vae["ch"] * factor for factor in vae["ch_mult"]), blocks_per_level=vae["num_res_blocks"],
        latent_channels=vae["z_channels"], scale=content.get("scale_factor", VAEConfig.scale))
    return of_unet, of_vae


def port_structure(content):
    """The config.json of the port -> the structure of its UNet."""
    names.check_fields(content, {"_class_name": "UNet3DVideoCrafterConditionModel", "fps_cond": True})
    return names.unet_from_diffusers(content | {"_class_name": "UNet3DConditionModel"}, UNetConfig)


def random(base, seed, dtype, device, sizes=SMALL):
    """Seeded random weights at small width, to try a pipeline without a download. See model.load_base."""
    unet, vae, text = sizes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        parts = [VideoCrafterUNet(UNetConfig(**unet)), Autoencoder(VAEConfig(**vae)), TextEncoder(TextConfig(**text))]
    return assembled(*[part.eval().requires_grad_(False) for part in parts], base, None, dtype, device)


def assembled(network, vae, text, name, folder, dtype, device):
    made = Base(move_to(network, device), move_to(vae, device), text and move_to(text, device), name, folder)
    return modelscope.in_precision(made, dtype)


published = partial(random, sizes=({}, {}, dict(layers=1)))  # to count and time a step, which runs no text tower
