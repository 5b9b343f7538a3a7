"""
What denoises and what is frozen: ModelScopeT2V's 3D UNet, its KL autoencoder, its text tower.

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.1; ModelScopeT2V (arXiv:2308.06571), Sec. 3.
The module tree carries the tensor names of the diffusers checkpoints (down_blocks.0.resnets.0.conv1 ...), so those load and
save as they are. Three tables at the end translate the other published names: ModelScope's, LDM's and transformers'.

Ours differs from the official code: (1) a clip stays one channels-last block of memory, read as B*F images by the spatial
layers and as B images of F rows and H*W columns by the temporal ones, so the two kinds of layer alternate without copies;
(2) text keys and values are computed once a clip, not once a frame; (3) no dropout anywhere: nothing here is trained but LoRA.

Letters: B clips, F frames, C channels, H and W latent rows and columns, N text tokens, E width of the time embedding.
"""
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F_
from einops import rearrange
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """Structure of the 3D UNet; the defaults are ModelScopeT2V's (official configs/t2v_infer.yaml, 1,411,233,860 parameters)."""
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """width of each resolution level"""
    blocks_per_level: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    context_dim: int = 1024
    """width of the text features"""
    head_dim: int = 64
    stem_heads: int = 8
    """heads of the first temporal transformer alone; elsewhere channels / head_dim"""
    norm_groups: int = 32
    sample_size: int = 32
    """latent rows and columns of the clips it was trained on; it takes others too"""

    def __post_init__(self):
        sizes = (*self.channels, self.in_channels, self.out_channels, self.context_dim, self.head_dim, self.stem_heads,
                 self.sample_size)
        check_structure(self, sizes)
        attended = [c for c, a in zip(self.channels, self.attention_levels) if a] + [self.channels[-1]]
        if len(self.attention_levels) != len(self.channels) or any(c % self.head_dim for c in attended):
            raise ValueError(f"expected one attention_levels entry per level, and head_dim to divide channels there: {self}")


@dataclass(frozen=True)
class VAEConfig:
    """Structure of the autoencoder; the defaults are Stable Diffusion's f8 KL autoencoder (83,653,863 parameters)."""
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 4
    scale: float = 0.18215
    """z = scale * latent, so that z has about unit variance"""
    norm_groups: int = 32

    def __post_init__(self):
        check_structure(self, (*self.channels, self.latent_channels))
        if not (isinstance(self.scale, (int, float)) and 0 < self.scale < math.inf):
            raise ValueError(f"expected a scale above 0: {self}")

    @property
    def downscale(self):
        """Pixels per latent column: every level but the last halves the picture."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Structure of the text tower; the defaults are OpenCLIP ViT-H-14's, less its last block (clip_embedder.py:280-297)."""
    vocab_size: int = 49408
    context_length: int = 77
    width: int = 1024
    heads: int = 16
    layers: int = 23
    """blocks that are run: the penultimate block's output is what conditions the UNet"""


def check_structure(config, sizes):
    """ValueError for a structure that cannot be built, wherever its numbers come from."""
    whole = all(type(n) is int and 0 < n <= 2**16 for n in (*sizes, config.blocks_per_level, config.norm_groups))
    if not whole or not 0 < len(config.channels) * config.blocks_per_level <= 256:
        raise ValueError(f"expected whole numbers from 1, and at most 256 blocks: {config}")
    if any(c % config.norm_groups for c in config.channels):
        raise ValueError(f"expected norm_groups to divide every width in channels: {config}")


# ---------------------------------------------------------------------------------------------------------------------
# Layers. Images are (B*F, C, H, W), channels-last in memory.

class ResBlock(nn.Module):
    """Two 3x3 convolutions, the time embedding added between them. Also the autoencoder's block, which has no time."""

    def __init__(self, c_in, c_out, groups, eps, time_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb=None):
        h = self.conv1(F_.silu(self.norm1(x)))                              # (B*F, C, H, W)
        if emb is not None:
            h = h + self.time_emb_proj(F_.silu(emb))[:, :, None, None]
        h = self.conv2(F_.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class FrameConv(nn.Conv3d):
    """A convolution over three neighbouring frames. A clip is an image of F rows and H*W columns: 2D kernels do it faster."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):                                                   # (B, C, F, H*W)
        return F_.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))


class TemporalConv(nn.Module):
    """Four frame convolutions with a residual, after every ResBlock (ModelScopeT2V, Sec. 3.3)."""

    def __init__(self, c, groups):
        super().__init__()
        def stage(*unused):  # the published files number the convolutions with their dropout counted
            return nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), *unused, FrameConv(c, c))
        self.conv1 = stage()
        self.conv2, self.conv3, self.conv4 = stage(nn.Identity()), stage(nn.Identity()), stage(nn.Identity())
        nn.init.zeros_(self.conv4[-1].weight)  # starts as the identity, so that images learned first are not disturbed
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x, num_frames):
        h = rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames)        # a view: frames are rows, pixels columns
        h = self.conv4(self.conv3(self.conv2(self.conv1(h))))
        return x + rearrange(h, "b c f (h w) -> (b f) c h w", h=x.shape[-2])


class Attention(nn.Module):
    """
    Multi-head attention along the second axis. The four projections are what LoRA adapts.

    x (n, l, ..., C): whatever lies between l and C attends each for itself. It is one long row of heads, so nothing is moved.
    """

    def __init__(self, dim, heads, head_dim, context_dim=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias)
        self.to_k = nn.Linear(context_dim or dim, heads * head_dim, bias)
        self.to_v = nn.Linear(context_dim or dim, heads * head_dim, bias)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)])

    def forward(self, x, context=None):                                     # (n, l, ..., C), (n, N, C)
        context = x if context is None else context
        q, k, v = (rearrange(y, "n l ... (h d) -> n (... h) l d", h=self.heads)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out = F_.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).reshape(*x.shape[:-1], -1))


class GEGLU(nn.Module):
    """Half of the projection gates the other half (arXiv:2002.05202)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x):
        # Two products of half the width, so that each half lies in one piece for what follows: faster, there and back.
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2))
        value, gate = (F_.linear(x, weight, bias) for weight, bias in halves)
        return value * F_.gelu(gate)


class FeedForward(nn.Module):
    """Four times as wide in between, gated: (..., C) -> (..., C)."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))  # Identity: their dropout

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, then attention to the text (spatial) or a second self-attention (temporal), then feed-forward."""

    def __init__(self, dim, heads, head_dim, context_dim=None):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x, text=None):                                        # (n, l, ..., C), (B, N, context_dim)
        x = x + self.attn1(self.norm1(x))
        h = self.norm2(x)
        if text is None:
            x = x + self.attn2(h)
        else:  # all frames of a clip ask the same text: one sequence of F*H*W queries instead of F copies of the text
            x = x + self.attn2(h.reshape(len(text), -1, h.shape[-1]), text).view_as(x)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Attention within each frame and to the text."""

    def __init__(self, c, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        heads = c // config.head_dim
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, heads, config.head_dim, config.context_dim)])
        self.proj_out = nn.Linear(c, c)

    def forward(self, x, text):
        h = rearrange(self.norm(x), "n c h w -> n (h w) c")
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h), text))
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[-2])


class TemporalTransformer(nn.Module):
    """Attention along time, each pixel for itself. No position embedding: the temporal convolutions tell order."""

    def __init__(self, c, heads, config):
        super().__init__()
        dim = heads * config.head_dim
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, heads, config.head_dim)])
        self.proj_out = nn.Linear(dim, c)

    def forward(self, x, num_frames):
        h = self.norm(rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames))
        h = rearrange(h, "b c f p -> b f p c")
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h)))
        return x + rearrange(h, "b f (h w) c -> (b f) c h w", h=x.shape[-2])


class Resample(nn.Module):
    """Half the rows and columns (a strided convolution), or as many as `size` asks (nearest neighbour, then a convolution)."""

    def __init__(self, c, down, pad=1):
        super().__init__()
        self.down, self.pad = down, pad
        self.conv = nn.Conv2d(c, c, 3, stride=2 if down else 1, padding=pad if down else 1)

    def forward(self, x, size=None):
        if self.down and not self.pad:  # the autoencoder pads below and to the right only
            x = F_.pad(x, (0, 1, 0, 1))
        if not self.down:
            x = F_.interpolate(x, size=size or [2 * s for s in x.shape[-2:]], mode="nearest")
        return self.conv(x)


# ---------------------------------------------------------------------------------------------------------------------
# The UNet

class Level(nn.Module):
    """The blocks of one resolution: (residual, temporal convolution [, spatial, temporal attention]) for each of `c_ins`."""

    def __init__(self, c_ins, c, num_attentions, resample, config):
        super().__init__()
        time_dim, groups, n = 4 * config.channels[0], config.norm_groups, num_attentions
        self.resnets = nn.ModuleList([ResBlock(c_in, c, groups, 1e-5, time_dim) for c_in in c_ins])
        self.temp_convs = nn.ModuleList([TemporalConv(c, groups) for _ in c_ins])
        self.attentions = nn.ModuleList([SpatialTransformer(c, config) for _ in range(n)])
        self.temp_attentions = nn.ModuleList([TemporalTransformer(c, c // config.head_dim, config) for _ in range(n)])
        if resample == "down":
            self.downsamplers = nn.ModuleList([Resample(c, down=True)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Resample(c, down=False)])
        self.recompute = False  # set by UNet3D.checkpoint_activations

    def block(self, j, x, emb, text, num_frames):
        """The j-th block: (B*F, C, H, W) -> (B*F, C', H, W)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._block, j, x, emb, text, num_frames, use_reentrant=False)
        return self._block(j, x, emb, text, num_frames)

    def _block(self, j, x, emb, text, num_frames):
        x = self.temp_convs[j](self.resnets[j](x, emb), num_frames)
        if j < len(self.attentions):
            x = self.temp_attentions[j](self.attentions[j](x, text), num_frames)
        return x


def time_features(t, dim):
    """Sinusoids of the time step: (B,) -> (B, dim), cosines first; float32, as in the official code."""
    freqs = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, dtype=torch.float32, device=t.device))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet3D(nn.Module):
    """
    ModelScopeT2V's denoiser, eps(z_t, t, text).

    forward: z_t (B, C, F, H, W), t (B,) integer steps, text (B, N, context_dim) -> eps (B, C, F, H, W).
    """

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        ch, n, levels = config.channels, config.blocks_per_level, len(config.channels)
        self.conv_in = nn.Conv2d(config.in_channels, ch[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict(dict(linear_1=nn.Linear(ch[0], 4 * ch[0]), linear_2=nn.Linear(4 * ch[0], 4 * ch[0])))
        self.transformer_in = TemporalTransformer(ch[0], config.stem_heads, config)

        # Down: every block's output, and every downsampled one, is kept for the way up.
        skips, self.down_blocks = [ch[0]], nn.ModuleList()
        for i, c in enumerate(ch):
            c_ins = [ch[max(i - 1, 0)]] + [c] * (n - 1)
            last = i == levels - 1
            self.down_blocks.append(Level(c_ins, c, n * config.attention_levels[i], None if last else "down", config))
            skips += [c] * (n if last else n + 1)
        self.mid_block = Level([ch[-1]] * 2, ch[-1], 1, None, config)
        self.up_blocks, c_prev = nn.ModuleList(), ch[-1]
        for i, c in reversed(list(enumerate(ch))):
            c_ins = [c_prev + skips.pop()] + [c + skips.pop() for _ in range(n)]
            self.up_blocks.append(Level(c_ins, c, (n + 1) * config.attention_levels[i], "up" if i else None, config))
            c_prev = c

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, ch[0], eps=1e-5)
        self.conv_out = nn.Conv2d(ch[0], config.out_channels, 3, padding=1)

    def checkpoint_activations(self, on=True):
        """Recompute each block in the backward pass instead of keeping its activations: less memory, the same gradient."""
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            level.recompute = on

    def forward(self, z_t, t, text):
        num_frames = z_t.shape[2]
        emb = time_features(t, self.config.channels[0]).to(z_t.dtype)
        emb = self.time_embedding["linear_2"](F_.silu(self.time_embedding["linear_1"](emb)))   # (B, E)
        emb = emb.repeat_interleave(num_frames, dim=0)                                         # (B*F, E)

        x = rearrange(z_t, "b c f h w -> (b f) c h w").contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)                                                                    # (B*F, C, H, W)
        x = self.transformer_in(x, num_frames)

        skips = [x]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                x = level.block(j, x, emb, text, num_frames)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        for j in range(2):
            x = self.mid_block.block(j, x, emb, text, num_frames)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                x = level.block(j, torch.cat([x, skips.pop()], dim=1), emb, text, num_frames)
            if hasattr(level, "upsamplers"):  # to the size of the next skip, which odd sizes rounded up on the way down
                x = level.upsamplers[0](x, skips[-1].shape[-2:])

        eps = self.conv_out(F_.silu(self.conv_norm_out(x)))
        return rearrange(eps, "(b f) c h w -> b c f h w", f=num_frames)


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder: frames to latents and back

class PixelAttention(Attention):
    """The autoencoder's only attention: one head over all pixels of a picture."""

    def __init__(self, c, groups):
        super().__init__(c, 1, c, bias=True)
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)

    def forward(self, x):
        h = super().forward(rearrange(self.group_norm(x), "n c h w -> n (h w) c"))
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[-2])


class Middle(nn.Module):
    """The autoencoder's lowest resolution, with attention over the pixels of a picture."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, groups, 1e-6), ResBlock(c, c, groups, 1e-6)])
        self.attentions = nn.ModuleList([PixelAttention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class PictureLevel(nn.Module):
    """Residual blocks of one resolution, then down, up, or neither."""

    def __init__(self, c_in, c, num_blocks, resample, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c if j else c_in, c, groups, 1e-6) for j in range(num_blocks)])
        if resample == "down":
            self.downsamplers = nn.ModuleList([Resample(c, down=True, pad=0)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Resample(c, down=False)])

    def forward(self, x):
        for block in (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pictures (n, 3, H, W) in [-1, 1] -> mean and log-variance (n, 2C, h, w), before the last 1x1 convolution."""

    def __init__(self, config):
        super().__init__()
        ch, g = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            PictureLevel(ch[max(i - 1, 0)], c, config.blocks_per_level, "down" if i < len(ch) - 1 else None, g)
            for i, c in enumerate(ch)])
        self.mid_block = Middle(ch[-1], g)
        self.conv_norm_out = nn.GroupNorm(g, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(F_.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (n, C, h, w), after the first 1x1 convolution -> pictures (n, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        ch, g = config.channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, ch[0], 3, padding=1)
        self.mid_block = Middle(ch[0], g)
        self.up_blocks = nn.ModuleList([
            PictureLevel(ch[max(i - 1, 0)], c, config.blocks_per_level + 1, "up" if i < len(ch) - 1 else None, g)
            for i, c in enumerate(ch)])
        self.conv_norm_out = nn.GroupNorm(g, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(F_.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """
    The frozen KL autoencoder, frame by frame. Latents here are unscaled: z = config.scale * latent.

    encode: x (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w), mean then log variance, h = H / downscale.
    decode: latent (N, C, h, w) -> x (N, 3, H, W) in about [-1, 1]; nothing is clamped, so gradients pass.
    """

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        c = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, x):
        """(N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w)."""
        return self.quant_conv(self.encoder(x.contiguous(memory_format=torch.channels_last)))

    def decode(self, latent):
        """Latent (N, C, h, w), unscaled -> pictures (N, 3, H, W)."""
        return self.decoder(self.post_quant_conv(latent.contiguous(memory_format=torch.channels_last)))


# ---------------------------------------------------------------------------------------------------------------------
# The text tower

class TextEncoder(nn.Module):
    """
    OpenCLIP's text transformer up to its penultimate block, then ln_final (clip_embedder.py:280-297).

    forward: captions [B] -> (B, N, width). `tokenizer` maps a list of captions to (B, N) integers; default OpenCLIP's.
    """

    def __init__(self, config=TextConfig(), tokenizer=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=config.context_length)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, config.width) * 0.01)
        self.transformer = open_clip.transformer.Transformer(config.width, config.layers, config.heads)
        self.ln_final = nn.LayerNorm(config.width)

    def forward(self, captions):
        weight = self.token_embedding.weight
        tokens = self.tokenizer(list(captions)).to(weight.device)                       # (B, N)
        x = self.token_embedding(tokens) + self.positional_embedding                    # (B, N, width)
        n = tokens.shape[1]
        causal = torch.full((n, n), -math.inf, device=weight.device, dtype=weight.dtype).triu(1)
        return self.ln_final(self.transformer(x, attn_mask=causal))


class WordTokenizer:
    """
    A vocabulary of whole words, for CLIPs whose text table must stay small. Called like open_clip's tokenizers.

    captions [B] -> (B, context_length) int64: start, words, end, then padding; the end token has the largest number, where
    CLIP pools. An unknown word gets the one token shared by all unknown words, and a warning.
    """

    def __init__(self, words, context_length):
        self.words, self.context_length = list(words), context_length
        self.ids = {w: i + 3 for i, w in enumerate(self.words)}      # 0 padding, 1 start, 2 unknown
        self.end = len(self.words) + 3
        self.vocab_size = self.end + 1
        self.warned = set()

    def check_fit(self, path, vocab_size, context_length):
        """ValueError unless the text tower beside it, with tables of these sizes, can read what it makes."""
        if self.context_length != context_length or self.vocab_size > vocab_size:
            raise ValueError(f"{path}: words.txt makes {self.context_length} tokens from 0 to {self.end}, the weights beside it "
                             f"read {context_length} from 0 to {vocab_size - 1}")

    def encode(self, caption):
        """Token numbers of the caption's words, without start and end."""
        words = caption.lower().replace(",", " ").replace(".", " ").split()
        unknown = [w for w in words if w not in self.ids and w not in self.warned]
        if unknown:
            self.warned.update(unknown)
            warnings.warn(f"words this model does not know: {', '.join(unknown)}; it knows: {' '.join(self.words)}", stacklevel=2)
        return [self.ids.get(w, 2) for w in words]

    def __call__(self, captions):
        out = torch.zeros(len(captions), self.context_length, dtype=torch.long)
        for row, caption in zip(out, captions):
            tokens = [1, *self.encode(caption)[:self.context_length - 2], self.end]
            row[:len(tokens)] = torch.tensor(tokens)
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Published files. Names are translated to ours one by one, so nothing can be dropped or mixed up on the way.

class Inert:
    """Stands in for the few classes that published checkpoints mention beside their tensors; forgets what it is given."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Lightning's callbacks and numpy's numbers in the logs of Stable Diffusion .ckpt files. Allowed by name as Inert: the named
# code itself never runs.
MENTIONED = [(Inert, name) for name in (
    *(f"pytorch_lightning.callbacks.{name}" for name in
      ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "base.Callback")),
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]


def read_tensors(path):
    """
    Every tensor of a published file or component folder, {name: tensor}, memory-mapped: nothing is copied yet.

    path: .safetensors; a torch file (.pth, .pt, .bin, .ckpt), bare or with the tensors under "state_dict", names with or without
    "module."; or a folder of one component, whole or in shards. Files are data: torch files are read with weights_only=True.
    Raises ValueError naming the file when it is missing, damaged, holds no tensors or holds code.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    kind = "a .safetensors file" if path.suffix == ".safetensors" else "a torch file of tensors"
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            zipped = zipfile.is_zipfile(path)
            if zipped and any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
                raise ValueError("compressed, which torch.save never does")  # mapped, such bytes would be taken for weights
            with torch.serialization.safe_globals(MENTIONED):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can fail in any way: zip, pickle, json, or the reader itself
        code = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise ValueError(f"{path}: expected tensors alone, found {code[1]}; nothing in it was run. "
                             "Use a copy without it, best as .safetensors") from None
        raise ValueError(f"{path}: expected {kind}, found a damaged one or another kind ({first_line(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; expected a state dict, found {type(content).__name__}")
    if all(k.startswith("module.") for k in tensors):  # saved from inside DistributedDataParallel
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return tensors


def first_line(error):
    """A reader's complaint: its kind and its first sentence, short enough for one line."""
    message = str(error).split("WeightsUnpickler error: ")[-1].strip()  # torch puts its own advice before the cause
    sentence = re.split(r"\. |\n", message)[0][:160]
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


WEIGHT_FILES = [f"{stem}.{suffix}" for suffix in ("safetensors", "bin", "fp16.safetensors", "fp16.bin") for stem in
                ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")]


def read_folder(folder):
    """The tensors of a component folder: a single file, or the shards that an index lists."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            shards = {str(s) for s in shards.values()} if isinstance(shards, dict) else ()
            for s in shards or [""]:  # a shard is a file beside its index, nothing else
                if Path(s).name != s or Path(s).suffix != Path(name).suffix or not (folder / s).is_file():
                    raise ValueError(f"{index}: expected a weight_map of {Path(name).suffix} files beside it, found {s[:100]!r}")
            return {k: v for s in sorted(shards) for k, v in read_tensors(folder / s).items()}
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise ValueError(f"{folder}: no weights here; expected one of {', '.join(WEIGHT_FILES)} (or its .index.json)")


def read_json(path):
    """A JSON object from a file; ValueError naming the file if it is none."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found something else ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


@contextmanager
def write_whole(path):
    """
    A file or folder is written whole or not at all: yields a hidden path beside `path` to fill (a folder with files
    alone), flushed and renamed at the end.

    Replaces a file of that name, never a folder that holds anything (OSError). After an error nothing is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{os.urandom(4).hex()}.{path.name}")  # the suffix stays: some writers choose the format by it
    try:
        yield hidden
        for file in hidden.iterdir() if hidden.is_dir() else [hidden]:
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(hidden, path)
    finally:
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)


def some(names, n=3):
    """The first few names, and how many more there are."""
    shown = [name[:100] if name.isprintable() else repr(name[:100]) for name in sorted(names)[:n]]
    return ", ".join(shown) + (f" and {len(names) - n} more" if len(names) > n else "")


def check_tensors(expected, tensors, what):
    """ValueError if a tensor is missing, left over, or of another shape than in `expected` {name: tensor}; `what`: the source."""
    missing, unused = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unused:
        wrong = {"missing": missing, "not known": unused}
        raise ValueError(f"{what}: " + "; ".join(f"{len(n)} tensors {kind} ({some(n)})" for kind, n in wrong.items() if n))
    for name, t in expected.items():
        found = tensors[name]
        if t.shape != found.shape:
            raise ValueError(f"{what}: tensor {name} has shape {list(found.shape)}, expected {list(t.shape)}")
        if not found.is_floating_point() or found.layout != torch.strided or found.is_meta:
            raise ValueError(f"{what}: tensor {name} is {found.dtype}, {found.layout} on {found.device}, "
                             "expected floating-point numbers")


def load_strict(module, tensors, what, dtype=None):
    """
    Put tensors into a module built on the meta device: each is converted and taken over on its own, no second copy.

    Raises ValueError if a tensor is missing, left over, or of another shape; `what` names the source in the message.
    """
    check_tensors(module.state_dict(), tensors, what)
    # copy: a memory-mapped tensor would follow its file, and change or crash when the file does
    own = {k: v.to(dtype or v.dtype, copy=True) for k, v in tensors.items()}
    module.load_state_dict(own, assign=True)
    return module.eval().requires_grad_(False)


def assemble(build, tensors, what, dtype):
    """Build a module without memory of its own, then load it. float32 unless asked: fp16 files are for storage."""
    with torch.device("meta"):
        module = build()
    return load_strict(module, tensors, what, dtype or torch.float32)


def component_config(path, from_diffusers, otherwise):
    """The structure that a component folder's config.json describes; `otherwise` where there is none."""
    file = path / "config.json"
    if not file.is_file():
        return otherwise
    c = read_json(file)
    try:
        return from_diffusers(c)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: not the config of a model we have ({first_line(error)})") from None


def expect(c, expected):
    """Every field that a published config states must be what we build: another activation or block is another model."""
    for key, value in expected.items():
        if key in c and c[key] != value:
            raise ValueError(f"expected {key} {value!r}, found {c[key]!r}")


def again(name, taken):
    """A file may hold one tensor under two of its names: the second gets a name that load_strict will not know."""
    return f"{name} (a second one)" if name in taken else name


# -- UNet ------------------------------------------------------------------------------------------------------------

def official_unet_names(config):
    """{our tensor name: ModelScope's} for every tensor of UNet3D(config) (official tools/modules/unet/unet_t2v.py)."""
    n, levels = config.blocks_per_level, len(config.channels)
    blocks = {"conv_in": "input_blocks.0.0", "transformer_in": "input_blocks.0.1", "conv_norm_out": "out.0", "conv_out": "out.2",
              "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}

    def level(ours, j, theirs, attention):
        """Block j of a level: its ResBlock, temporal convolution and attentions are one official block's parts 0, 1, 2."""
        blocks[f"{ours}.resnets.{j}"] = f"{theirs}.0"
        blocks[f"{ours}.temp_convs.{j}"] = f"{theirs}.0.temopral_conv"
        if attention:
            blocks[f"{ours}.attentions.{j}"], blocks[f"{ours}.temp_attentions.{j}"] = f"{theirs}.1", f"{theirs}.2"
        return 3 if attention else 1  # where an upsampler would follow

    number = 1
    for i, attention in enumerate(config.attention_levels):
        for j in range(n):
            level(f"down_blocks.{i}", j, f"input_blocks.{number}", attention)
            number += 1
        if i < levels - 1:
            blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.op"
            number += 1
    level("mid_block", 0, "middle_block", True)
    blocks["mid_block.resnets.1"], blocks["mid_block.temp_convs.1"] = "middle_block.3", "middle_block.3.temopral_conv"
    for i, attention in enumerate(reversed(config.attention_levels)):
        for j in range(n + 1):
            number = i * (n + 1) + j
            part = level(f"up_blocks.{i}", j, f"output_blocks.{number}", attention)
        if i < levels - 1:
            blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{part}.conv"

    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    names, longest_first = {}, sorted(blocks, key=len, reverse=True)
    with torch.device("meta"):
        ours = list(UNet3D(config).state_dict())
    for name in ours:
        block = next(b for b in longest_first if name.startswith(b + "."))
        rest = name[len(block) + 1:]
        if ".resnets." in name:
            part, leaf = rest.rsplit(".", 1)
            rest = f"{resnet[part]}.{leaf}"
        names[name] = f"{blocks[block]}.{rest}"
    return names


def official_shape(name, t):
    """The temporal transformers' proj_in and proj_out are Conv1d in the official code: (out, in) becomes (out, in, 1)."""
    temporal = re.search(r"(temp_attentions\.\d+|transformer_in)\.proj_(in|out)\.weight$", name)
    return t.unsqueeze(-1) if temporal else t


def unet_to_official(tensors, config):
    """Tensors under our (diffusers') names -> the same under the official names and shapes."""
    return {theirs: official_shape(ours, tensors[ours]) for ours, theirs in official_unet_names(config).items()}


def unet_from_official(tensors, config):
    """The way back. Unknown names are kept as they are, for load_strict to name."""
    ours_of = {theirs: ours for ours, theirs in official_unet_names(config).items()}
    out = {}
    for name, t in tensors.items():
        ours = ours_of.get(name, name)
        wants_2d = ours != name and ours.endswith(("proj_in.weight", "proj_out.weight")) and t.dim() == 3 and t.shape[-1] == 1
        out[again(ours, out)] = t.squeeze(-1) if wants_2d else t
    return out


LORA_TENSOR = re.compile(r"_lora\.(down|up)_linear\.weight$")


def split_lora(tensors):
    """A fine-tuned official file holds both: -> (base tensors, LoRA tensors)."""
    lora = {k: v for k, v in tensors.items() if LORA_TENSOR.search(k)}
    return {k: v for k, v in tensors.items() if k not in lora}, lora


def unet_to_diffusers(config):
    """UNetConfig -> the config.json that diffusers' UNet3DConditionModel reads, with the one field it has no name for."""
    def kinds(attention, direction):
        return [f"CrossAttn{direction}Block3D" if a else f"{direction}Block3D" for a in attention]
    return {"_class_name": "UNet3DConditionModel", "in_channels": config.in_channels, "out_channels": config.out_channels,
            "block_out_channels": list(config.channels), "layers_per_block": config.blocks_per_level,
            "down_block_types": kinds(config.attention_levels, "Down"),
            "up_block_types": kinds(config.attention_levels[::-1], "Up"),
            "cross_attention_dim": config.context_dim, "attention_head_dim": config.head_dim,
            "norm_num_groups": config.norm_groups, "norm_eps": 1e-5, "act_fn": "silu",
            "downsample_padding": 1, "mid_block_scale_factor": 1, "sample_size": config.sample_size,
            "stem_heads": config.stem_heads}


def unet_from_diffusers(c):
    """The way back: a diffusers config.json (a dict) -> UNetConfig. An exception for a structure that is not ours."""
    expect(c, {"_class_name": "UNet3DConditionModel", "num_attention_heads": None, "time_cond_proj_dim": None})
    config = UNetConfig(c["in_channels"], c["out_channels"], tuple(c["block_out_channels"]), c["layers_per_block"],
                        tuple(kind.startswith("CrossAttn") for kind in c["down_block_types"]), c["cross_attention_dim"],
                        c["attention_head_dim"], c.get("stem_heads", 8), c.get("norm_num_groups", 32), c.get("sample_size") or 32)
    expect(c, unet_to_diffusers(config) | {"sample_size": c.get("sample_size")})
    return config


def load_unet(path, config=None, dtype=None):
    """
    UNet3D from any published file or a diffusers component folder (which brings its own config), frozen, in eval mode.

    Names may be diffusers' or the official ones. LoRA tensors inside a fine-tuned official file are left to lora.load.
    config: for bare files, default full size. dtype: float32 unless given. Raises ValueError as read_tensors and load_strict do.
    """
    path = Path(path)
    config = component_config(path, unet_from_diffusers, config or UNetConfig())
    tensors, _ = split_lora(read_tensors(path))
    if any(k.startswith("input_blocks.") for k in tensors):
        tensors = unet_from_official(tensors, config)
    return assemble(lambda: UNet3D(config), tensors, path, dtype)


# -- Autoencoder -----------------------------------------------------------------------------------------------------

def official_vae_names(config):
    """{our tensor name: LDM's} for every tensor of Autoencoder(config) (Stable Diffusion's first_stage_model)."""
    top = len(config.channels) - 1
    rules = [(r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
             (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
             (r"(decoder)\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{top - int(m[2])}.block.{m[3]}"),
             (r"(decoder)\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{top - int(m[2])}.upsample"),
             (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
             (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"),
             (r"to_([qkv])", r"\1"), (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out")]
    with torch.device("meta"):
        names = {name: name for name in Autoencoder(config).state_dict()}
    for ours in names:
        for pattern, replacement in rules:
            names[ours] = re.sub(pattern, replacement, names[ours])
    return names


OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def vae_to_official(tensors, config):
    """Tensors under our (diffusers') names -> LDM's, where the attention's projections are 1x1 convolutions."""
    return {theirs: tensors[ours][:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", theirs) else tensors[ours]
            for ours, theirs in official_vae_names(config).items()}


def vae_from_official(tensors, config):
    """LDM's names, with or without first_stage_model. (its file's other parts are not ours), or diffusers' old ones -> ours."""
    prefix = "first_stage_model."
    if any(k.startswith(prefix) for k in tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    tensors = {k: v for k, v in tensors.items() if not k.startswith("loss.")}  # VQGAN_autoencoder.pth: its training loss
    ours_of = {theirs: ours for ours, theirs in official_vae_names(config).items()}
    out = {}
    for name, t in tensors.items():
        ours = ours_of.get(name, name)
        ours = re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)", lambda m: m[1] + OLD_VAE_ATTENTION[m[2]], ours)
        wants_2d = ".attentions." in ours and t.dim() == 4 and t.shape[2:] == (1, 1)
        out[again(ours, out)] = t[:, :, 0, 0] if wants_2d else t
    return out


def vae_to_diffusers(config):
    """VAEConfig -> the config.json that diffusers' AutoencoderKL reads."""
    n = len(config.channels)
    return {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": list(config.channels),
            "layers_per_block": config.blocks_per_level, "latent_channels": config.latent_channels,
            "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
            "norm_num_groups": config.norm_groups, "act_fn": "silu", "scaling_factor": config.scale}


def vae_from_diffusers(c):
    """The way back: a diffusers config.json (a dict) -> VAEConfig. An exception for a structure that is not ours."""
    expect(c, {"_class_name": "AutoencoderKL"})
    config = VAEConfig(tuple(c["block_out_channels"]), c["layers_per_block"], c["latent_channels"],
                       c.get("scaling_factor", VAEConfig.scale), c.get("norm_num_groups", 32))
    expect(c, vae_to_diffusers(config))
    return config


def load_vae(path, config=None, dtype=None):
    """Autoencoder from a Stable Diffusion .ckpt, bare LDM tensors, or diffusers' vae; otherwise as load_unet."""
    path = Path(path)
    config = component_config(path, vae_from_diffusers, config or VAEConfig())
    return assemble(lambda: Autoencoder(config), vae_from_official(read_tensors(path), config), path, dtype)


# -- Text tower ------------------------------------------------------------------------------------------------------

def text_from_transformers(tensors):
    """transformers' CLIPTextModel, with or without its `text_model.` prefix -> OpenCLIP's names (its qkv are one matrix)."""
    renames = {"embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
               "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
               "layer_norm1": "ln_1", "layer_norm2": "ln_2",
               "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    out = {}
    for full, t in tensors.items():
        name = full.removeprefix("text_model.")
        if name == "embeddings.position_ids":  # a buffer that old versions saved
            continue
        if match := re.fullmatch(r"(.*encoder\.layers\.(\d+)\.self_attn\.)([qkv])_proj\.(weight|bias)", full):
            parts = [tensors.get(f"{match[1]}{p}_proj.{match[4]}") for p in "qkv"]
            if t.dim() and all(p is not None and p.shape == t.shape for p in parts):
                if match[3] == "q":
                    out[f"transformer.resblocks.{match[2]}.attn.in_proj_{match[4]}"] = torch.cat(parts)
                continue
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        out[again(name, out)] = t
    return out


def load_text_encoder(path, tokenizer=None, dtype=None):
    """
    TextEncoder from open_clip's weights (a file or folder; the last block and the image tower are left out) or transformers'
    text_encoder, whose 23 layers end at the penultimate already. The structure is read off the tensors, with heads of 64.
    """
    path = Path(path)
    tensors = read_tensors(path)
    if any("self_attn.q_proj" in k for k in tensors):
        tensors, drop = text_from_transformers(tensors), 0
    else:
        others = re.compile(r"visual\.|text_projection|logit_scale|logit_bias")  # the rest of a whole CLIP
        tensors, drop = {k: v for k, v in tensors.items() if not others.match(k)}, 1
    blocks = {int(m[1]) for k in tensors if (m := re.match(r"transformer\.resblocks\.(\d{1,4})\.", k))}
    layers = len(blocks) - drop
    tables = [tensors.get(name, torch.empty(0)) for name in ("token_embedding.weight", "positional_embedding")]
    if layers < 1 or blocks != set(range(len(blocks))) or any(t.dim() != 2 for t in tables):
        raise ValueError(f"{path}: expected the text tower of open_clip or transformers' CLIPTextModel, found {some(tensors)}")
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"transformer.resblocks.{layers}.")}
    (vocab_size, width), heads = tables[0].shape, max(1, tables[0].shape[1] // 64)
    component_config(path, lambda c: expect(c, {  # transformers' config, and what open_clip's can say against us
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_attention_heads": heads, "num_hidden_layers": layers,
        "quick_gelu": False}), None)
    config = TextConfig(vocab_size, len(tables[1]), width, heads, layers)
    if isinstance(tokenizer, WordTokenizer):
        tokenizer.check_fit(path, vocab_size, len(tables[1]))
    return assemble(lambda: TextEncoder(config, tokenizer), tensors, path, dtype)


# -- Everything a script needs -----------------------------------------------------------------------------------------

TINY = Path(__file__).resolve().parent / "tiny" / "weights"
PARTS = {  # what a folder may call each part: diffusers' components, then the files of the two ModelScope hub folders
    "unet": ("unet", "text2video_pytorch_model.pth", "model_scope_v1-4_0600000.pth"),
    "vae": ("vae", "VQGAN_autoencoder.pth", "v2-1_512-ema-pruned.ckpt"),
    "text_encoder": ("text_encoder", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors",
                     "stable-diffusion-v/open_clip_pytorch_model.bin")}


def pick_device(name=None):
    """The named device, or the first there is of cuda, mps, cpu. ValueError for one that torch does not have here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError):  # each kind of device has its own way to be absent
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"device {name!r}: not available here; allowed are cuda, mps, cpu, where torch has them")
    return device


def rank_and_size():
    """(rank, world size) of this process: (0, 1) unless it has joined a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(name=None):
    """This process's device, as pick_device's; under torchrun it joins the group first (nccl on cuda, gloo elsewhere)."""
    if "RANK" not in os.environ:
        return pick_device(name)
    cuda = torch.cuda.is_available() and name != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun keeps its store when it starts dead workers again: under the same names they would meet their former selves.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else pick_device(name or "cpu")


def run_script(script, main, refused=(OSError,)):
    """
    Call main() and end the process with the status it returns; None is 0.

    Bad input (ValueError) becomes one line and status 2, what the machine refused one line and 1, an interruption 130. All
    ranks find the same bad input and rank 0 says so; what went wrong on one rank, that rank says.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        status = main() or 0
    except ValueError as error:
        status, line = 2, str(error) if rank == 0 else ""
    except KeyboardInterrupt:
        status, line = 130, "interrupted" if rank == 0 else ""
    except refused as error:
        status, line = 1, f"rank {rank}: {error}" if rank else str(error)
    else:
        line = ""
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if line:
        print(f"{script}: {line}", file=sys.stderr)
    sys.exit(status)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(name, device):
    """Precision of the frozen weights: the named one, or bfloat16 on cuda and float32 elsewhere."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype {name!r}: allowed are {', '.join(DTYPES)}")
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]


@dataclass
class Base:
    """A text-to-video model, frozen: what load_base found, with the two functions that the rest of the code calls."""
    unet: UNet3D
    vae: Autoencoder
    text_encoder: TextEncoder
    name: str
    """as the user gave it"""
    folder: Path | None = None
    """where it lies on disk, if anywhere"""
    unet_file: Path | None = None
    """the UNet's own file or folder, which may hold LoRA tensors too"""

    def __post_init__(self):
        self.texts = {}

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def default_size(self):
        """Pixel rows and columns of the clips that the UNet was trained on."""
        return self.unet.config.sample_size * self.vae.config.downscale

    def denoiser(self, z_t, t, text):
        """eps(z_t, t, text) in float32, whatever the UNet's precision: schedule and adapters stay exact."""
        dtype = self.unet.conv_in.weight.dtype
        return self.unet(z_t.to(dtype), t, text.to(dtype)).to(z_t.dtype)

    @torch.no_grad()
    def encode_text(self, captions):
        """Captions [B] -> (B, N, E), each computed once, alone, and kept: a caption's features owe nothing to its company."""
        for caption in captions:
            if caption not in self.texts:
                self.texts[caption] = self.text_encoder([caption])[0].to(self.device)
        return torch.stack([self.texts[c] for c in captions])

    def release_encoders(self):
        """Give back the accelerator's memory that the encoders hold, once every caption and clip has been through them."""
        self.text_encoder.to("cpu")
        self.vae.encoder.to("cpu")

    def cut_captions(self, captions):
        """Those captions that are longer than the text encoder reads: it would not see their ends."""
        longest = self.text_encoder.config.context_length - 2  # less the start and the end token
        return [c for c in captions if len(self.text_encoder.tokenizer.encode(c)) > longest]


def decode_frames(vae, z, index=None):
    """
    Frames of clips: z (B, C, F, h, w) scaled latents, index (B, S) which frames (default all) -> (B, S, 3, H, W).

    In about [0, 1], not clamped: the reward limits what it is shown. Frames are picked before they are decoded, the official
    code decodes all F and then picks (utils/reward/reward.py:138-162).
    """
    z = z.transpose(1, 2)                                                                 # (B, F, C, h, w)
    if index is not None:
        z = z[torch.arange(len(z), device=z.device)[:, None], index.to(z.device)]         # (B, S, C, h, w)
    x = vae.decode((z.flatten(0, 1) / vae.config.scale).to(vae.post_quant_conv.weight.dtype))
    return (x.float() * .5 + .5).unflatten(0, z.shape[:2])                                # (B, S, 3, H, W)


def load_base(base, vae=None, text_encoder=None, dtype=None, device="cpu", seed=0):
    """
    The base model a script names: "tiny", a folder, a UNet file with its other parts beside it, a hub id, or "random".

    Folders may be diffusers' (unet, vae, text_encoder) or one of ModelScope's, recognised by their files. vae, text_encoder:
    a file or folder to take instead. "random" is the full-size structure with seeded random weights, "random:64" one of
    64, 128, 256, 256 channels. ValueError: nothing there, parts missing, or whatever the readers say.
    """
    if base == "random" or base.startswith("random:"):
        made = random_base(base, seed, dtype)
        return Base(place(made.unet, device), place(made.vae, device), place(made.text_encoder, device), base)
    folder = find_base(base)
    paths = {"unet": None, "vae": vae, "text_encoder": text_encoder}
    if folder.is_file():
        paths["unet"], folder = folder, folder.parent
    for part, names in PARTS.items():
        paths[part] = Path(paths[part]) if paths[part] else find_part(folder, part)
        if paths[part] is None:
            raise ValueError(f"{base}: no {part} found in {folder}; expected one of {', '.join(names)}"
                             + ("" if part == "unet" else f", or --{part.replace('_', '-')}"))
    words = paths["text_encoder"] / "words.txt"
    tokenizer = read_words(words) if words.is_file() else None
    made = Base(place(load_unet(paths["unet"], dtype=dtype), device), place(load_vae(paths["vae"], dtype=dtype), device),
                place(load_text_encoder(paths["text_encoder"], tokenizer, dtype), device), base, folder, paths["unet"])
    needed, latents, width = made.unet.config, made.vae.config.latent_channels, made.text_encoder.config.width
    if (needed.in_channels, needed.out_channels, needed.context_dim) != (latents, latents, width):
        raise ValueError(f"{base}: the UNet takes {needed.in_channels} and gives {needed.out_channels} latent channels, text of "
                         f"width {needed.context_dim}; {paths['vae']} has {latents}, {paths['text_encoder']} {width}")
    return made


def place(module, device):
    """To its device; on cuda with convolution weights channels-last, as activations are: else every call would copy them."""
    module.to(device)
    if torch.device(device).type == "cuda":
        channels_last(module)
    return module


def channels_last(module):
    """Convolution weights in channels-last order: other strides, the same numbers."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Conv3d):
            m.weight.data = m.weight.data.contiguous(
                memory_format=torch.channels_last if m.weight.dim() == 4 else torch.channels_last_3d)


def find_base(base):
    """Folder or file of a base: "tiny", a path, or a hub id, which is downloaded. ValueError: there is none or it is damaged."""
    path = TINY if str(base) == "tiny" else Path(base)
    path = path if path.exists() else from_hub(str(base))
    check_manifest(path)
    return path


def find_part(folder, part):
    """Where a part of the model lies: in the folder, or beside it if the folder is itself a part. None if nowhere."""
    return next((d / name for d in (folder, folder.absolute().parent) for name in PARTS[part] if (d / name).exists()), None)


def read_words(path):
    """The WordTokenizer of a words.txt: the context length on its first line, then one word a line."""
    try:
        length, *words = Path(path).read_text(encoding="utf-8").split() or [""]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    if not re.fullmatch("[1-9][0-9]{0,4}", length) or not words:
        raise ValueError(f"{path}: expected a context length, then words, found {length[:20]!r}")
    return WordTokenizer(words, int(length))


def check_manifest(folder):
    """If a folder has a manifest.json of SHA-256 digests, every file in it must be there and as it was built."""
    if not (folder / "manifest.json").is_file():
        return
    for name, digest in read_json(folder / "manifest.json").items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing, though manifest.json lists it")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{folder / name}: not the file that manifest.json lists (its SHA-256 differs)")


def hub_files(files):
    """
    Of a hub repository's files, those that load_base reads: {part: names}, no names for a part that it lacks.

    Of several weight files of a part, the first of WEIGHT_FILES, whole or in shards: safetensors before .bin, full precision.
    """
    chosen = {}
    for part, names in PARTS.items():
        weights = next((n for n in WEIGHT_FILES if f"{part}/{n}" in files or f"{part}/{n}.index.json" in files), None)
        chosen[part] = [f for f in names if f in files][:1]
        if weights:
            stem, _, suffix = weights.rpartition(".")
            name = re.compile(rf"{part}/(config\.json|{re.escape(stem)}(-\d+-of-\d+)?\.{suffix}(\.index\.json)?)")
            chosen[part] = [f for f in files if name.fullmatch(f)]
    return chosen


def from_hub(repo):
    """Folder of a hub repository's three parts, downloaded once by huggingface_hub, or from its cache without a network."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"base {repo!r}: no such file or folder; allowed are tiny, random, a path, or a hub id as {HUB_BASE}")
    try:
        chosen = hub_files(huggingface_hub.HfApi().list_repo_files(repo))
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=sum(chosen.values(), [])))
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.GatedRepoError):
        raise ValueError(f"base {repo!r}: no such hub repository, nor a file or folder of that name") from None
    except Exception as error:  # no network, by version httpx, OSError or a hub error; or no space for the files
        try:  # which weights are in the cache is for us to see: asked for all it could hold, the hub calls it incomplete
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=[f"{part}/config.json" for part in PARTS],
                                                            local_files_only=True))
            if all(hub_files([f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]).values()):
                return folder
        except Exception:  # nothing there, in as many ways
            pass
        raise ValueError(f"base {repo!r}: no file or folder of that name here, and the hub's cannot be downloaded "
                         f"({first_line(error)}); put the folders unet, vae and text_encoder of that repository, with "
                         "config.json and a .safetensors or .bin in each, into one folder and give that as --base") from None


HUB_BASE = "ali-vilab/text-to-video-ms-1.7b"


def random_base(spec, seed=0, dtype=None):
    """The whole structure with seeded random weights, for timing and trying the pipeline without a download."""
    width = spec.partition(":")[2] or "320"
    if not width.isdigit() or int(width) % 32 or int(width) < 32:
        raise ValueError(f"base {spec!r}: allowed are random, and random:W with W a multiple of 32")
    w, v = int(width), max(32, int(width) * 2 // 5 // 32 * 32)
    unet, vae, text = UNetConfig(), VAEConfig(), TextConfig()
    if w != 320:
        unet = UNetConfig(channels=(w, 2 * w, 4 * w, 4 * w), context_dim=64, head_dim=32 if w % 64 else 64, sample_size=8)
        vae, text = VAEConfig(channels=(v, 2 * v, 4 * v, 4 * v), blocks_per_level=1), TextConfig(width=64, heads=1, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Base(*(part.to(dtype or torch.float32).eval().requires_grad_(False)
                      for part in (UNet3D(unet), Autoencoder(vae), TextEncoder(text))), spec)
    return made


def fingerprint(module):
    """Names frozen weights whatever file they came from and in whatever precision: a hash of their signs, adapters left out."""
    digest = hashlib.sha256()
    for name, p in sorted(module.state_dict().items()):
        if "lora_" not in name:  # the sign bit, not p > 0: in fp16 the smallest of 1.4 B weights become +0 or -0
            digest.update(p.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
