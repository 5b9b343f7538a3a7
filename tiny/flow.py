"""
The tiny world's second base: Wan's classes at small width, trained as a rectified flow on the same clips, one frame longer.

    python -m tiny.build --base tiny-wan

docs/studies.md compares it with the first base, a UNet; tiny/README.md has its numbers, and what was tried.

Letters: B clips, F frames, C latent channels, f latents in time, h and w latent rows and columns.
"""
import shutil

import torch
import torch.nn.functional as F_
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from bases.wan import TinyWan, frozen, statistics, to_vae
from model import load_text_encoder
from support.ranks import progress
from tiny import world
from tiny.pretraining import all_scenes, captions_of, fit, render

# Wan 2.2's residual autoencoder, since it learns faster at this size; 17 x 32 x 32 pixels are 5 x 8 x 8 latents.
VAE = dict(base_dim=16, z_dim=12, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True], is_residual=True,
           scale_factor_spatial=4, latents_mean=[0.] * 12, latents_std=[1.] * 12)
NETWORK = dict(in_channels=VAE["z_dim"], out_channels=VAE["z_dim"], num_attention_heads=4, attention_head_dim=32, ffn_dim=512,
               num_layers=5, text_dim=64, freq_dim=128, rope_max_seq_len=32)


def encode(base, clips):
    """Clips (B, F, 3, H, W) in [0, 1] -> z (B, C, f, h, w). As base.encode, of many clips at once, which is faster."""
    x = clips.to(base.device).float().transpose(1, 2) * 2 - 1                            # (B, 3, F, H, W)
    z = base.vae.encode(x).latent_dist.mode()
    mean, std = statistics(base.vae, z)
    return (z - mean) / std


def decode(base, z):
    """z (B, C, f, h, w) -> clips, about [0, 1]. As base.decode_frames, of many clips at once."""
    return base.vae.decode(to_vae(base.vae, z)).sample.transpose(1, 2) / 2 + .5


def build_vae(cfg):
    """The autoencoder: the loss of the first base's, and the error of steps between neighbouring frames, on short clips first. It
    is written as diffusers does it, with the mean and the deviation of its latents, which become 0 and 1."""
    clips, _ = render(world.repeat(all_scenes(), min(2500, cfg.clips)), cfg.seed + 1_000_000, frames=world.WAN_FRAMES)
    vae = AutoencoderKLWan(**VAE).to(cfg.device)
    with torch.no_grad():  # at first little noise: by a posterior of variance 1 the means drown, and hundreds of steps are lost
        rows = slice(VAE["z_dim"], None)
        vae.quant_conv.weight[rows] *= .1
        vae.quant_conv.bias[rows] = -6.
    steps = min(5000, cfg.max_steps)

    def loss_of(step):
        length = 9 if step < .8 * steps else world.WAN_FRAMES
        first = torch.randint(world.WAN_FRAMES - length + 1, ()).item()
        x = clips[torch.randint(len(clips), (2,)), first:first + length].to(cfg.device).float()
        x = x.transpose(1, 2) * 2 - 1                                                    # (B, 3, F, H, W)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        edges = sum(F_.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (-1, -2, 2))
        kl = .5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F_.mse_loss(y, x) + .2 * F_.l1_loss(y, x) + .2 * edges + 1e-5 * kl

    # Convolutions learn faster by Muon than by AdamW.
    vae = fit("autoencoder", vae, loss_of, steps, lr=2e-3, ema_decay=.998, muon=lambda name, p: p.ndim >= 4 and len(p) > 8)
    clips, _ = render(world.repeat(all_scenes(), min(1000, cfg.clips)), cfg.seed + 2_000_000, frames=world.WAN_FRAMES)
    with torch.no_grad():
        x = clips.to(cfg.device).float().transpose(1, 2) * 2 - 1
        latents = [vae.encode(batch).latent_dist.mode() for batch in progress(x.split(16), "statistics of latents")]
    z = torch.cat(latents)
    mean = [round(v, 4) for v in z.mean(dim=(0, 2, 3, 4)).tolist()]
    std = [round(v, 4) for v in z.std(dim=(0, 2, 3, 4)).tolist()]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.half().save_pretrained(cfg.out / "vae")


def build_transformer(cfg):
    """The text-to-video transformer, by the velocity's loss of bases/wan.py, with captions dropped in a tenth of the clips."""
    vae = AutoencoderKLWan.from_pretrained(cfg.out / "vae")
    network = WanTransformer3DModel(**NETWORK).to(cfg.device)
    shutil.copytree(cfg.first / "text_encoder", cfg.out / "text_encoder", dirs_exist_ok=True)
    tower = load_text_encoder(cfg.out / "text_encoder")
    base = TinyWan(network, frozen(vae, cfg.device), None, frozen(tower, cfg.device), name="tiny-wan")
    scenes = all_scenes()
    clips, _ = render(world.repeat(scenes, cfg.clips), cfg.seed + 3_000_000, frames=world.WAN_FRAMES)
    with torch.no_grad():
        latents = torch.cat([encode(base, batch).half() for batch in progress(clips.split(16), "encoding clips")])
    text = base.encode_text(captions_of(scenes) + [""])                                  # (captions, N, E)

    def loss_of(step):
        rows = torch.randint(len(latents), (32,))
        z = latents[rows].float()
        noise = torch.randn_like(z)
        share = (torch.randperm(32) + torch.rand(32)) / 32                               # one in each 32nd of 0..1
        t, alpha, sigma = level = [v.to(cfg.device) for v in base.level(share.clamp(min=1e-3))]
        caption = torch.where(torch.rand(32) < .1, len(scenes), rows % len(scenes))      # the last one is empty
        z_0, eps = base.predict(alpha * z + sigma * noise, level, text[caption.to(cfg.device)])
        return base.error(z_0, eps, z, noise, level).mean()

    steps = min(6000, cfg.max_steps)
    network = fit("transformer", network, loss_of, steps, lr=2e-3, ema_decay=.999,
                  muon=lambda name, p: p.ndim == 2 and name.startswith("blocks."))
    network.half().save_pretrained(cfg.out / "transformer")
