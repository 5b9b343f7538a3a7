"""
What denoises, and what is frozen: ModelScopeT2V's 3D UNet, its autoencoder, its text tower.

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.1; ModelScopeT2V (arXiv:2308.06571), Sec. 3.

A text-to-video model has three parts. The text tower turns a caption into features. The autoencoder
turns frames into latents with an eighth of their rows, and back. The UNet guesses the noise in such
latents; it is Stable Diffusion's image UNet with layers along time put in after each of its own.
All three are frozen, the UNet's attention is adapted (lora.py). Tensors are called as in diffusers;
formats/tensor_names.py knows the other published names.

Ours differs from the official code: (1) a clip stays one channels-last block of memory, read as B*F
images by the spatial layers and as B images of F rows and H*W columns by the temporal ones, so the
two kinds of layer alternate without copies (on CUDA GroupNorm makes one); (2) text keys and values
once a clip; (3) no dropout.

Letters: B clips, F frames, C channels (C' after a change of width), N text tokens, E width of the
time embedding, n items that a layer treats alike, l length attended over, d width of a head. H and
W are latent rows and columns in the UNet; in the autoencoder they are pixels, and h and w latent.
"""
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F_
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from formats import tensor_names as names
from formats.tensors import build_empty, load_strict, read_config, read_tensors
from formats.weights import find_base_file
from formats.word_tokenizer import read_words


@dataclass(frozen=True)
class UNetConfig:
    """Structure of the 3D UNet; defaults are ModelScopeT2V's (official configs/t2v_infer.yaml)."""
    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)              # width of each level
    blocks_per_level: int = 2                                       # one more on the way up
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # not at the lowest resolution
    context_dim: int = 1024                                         # width of the text features
    head_dim: int = 64                                              # heads = channels / head_dim
    stem_heads: int = 8                                             # but for transformer_in
    norm_groups: int = 32
    sample_size: int = 32                                           # latent rows it was trained on


@dataclass(frozen=True)
class VAEConfig:
    """Structure of the autoencoder; defaults are Stable Diffusion's f8 KL autoencoder."""
    channels: tuple[int, ...] = (128, 256, 512, 512)                # width of each level
    blocks_per_level: int = 2                                       # one more in the decoder
    latent_channels: int = 4
    scale: float = 0.18215                                          # z = scale * latent
    norm_groups: int = 32

    @property
    def downscale(self):
        """Pixels per latent column: every level but the last halves the picture."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Structure of the text tower; defaults are OpenCLIP ViT-H-14's, less its last block."""
    vocab_size: int = 49408
    context_length: int = 77                                        # tokens of a caption
    width: int = 1024
    heads: int = 16
    layers: int = 23                                                # up to the penultimate block


# ----------------------------------------------------------------------------------------------
# Layers. Images are (B*F, C, H, W), channels-last in memory.

class ResBlock(nn.Module):
    """Two 3x3 convolutions, the time embedding added between them, if there is one."""

    def __init__(self, c_in, c_out, groups, eps, time_dim=None):
        super().__init__()

        # The first half, up to where the time enters.
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, c_out)

        # The second half, and a way around both where the width changes.
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb=None):                                           # (n, C, H, W), (n, E)
        h = self.conv1(F_.silu(self.norm1(x)))                                # (n, C', H, W)
        if emb is not None:
            h = h + self.time_emb_proj(F_.silu(emb))[:, :, None, None]
        h = self.conv2(F_.silu(self.norm2(h)))                                # (n, C', H, W)
        shortcut = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x  # (n, C', H, W)
        return h + shortcut


class FrameConv(nn.Conv3d):
    """A convolution over three neighbouring frames, each pixel for itself."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):                                                     # (B, C, F, H*W)
        # The clip is an image of F rows and H*W columns: 2D kernels are faster.
        return F_.conv2d(x, self.weight.squeeze(-1), self.bias, padding=(1, 0))  # (B, C', F, H*W)


class TemporalConv(nn.Module):
    """Four frame convolutions with a residual, after every ResBlock (ModelScopeT2V, Sec. 3.3)."""

    def __init__(self, c, groups):
        super().__init__()

        def stage(*unused):
            return nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), *unused, FrameConv(c, c))

        # The published files number the layers with their dropout counted: it is an Identity here.
        self.conv1, self.conv2 = stage(), stage(nn.Identity())
        self.conv3, self.conv4 = stage(nn.Identity()), stage(nn.Identity())
        # Untrained it does nothing, so a UNet can learn from images first.
        nn.init.zeros_(self.conv4[-1].weight)
        nn.init.zeros_(self.conv4[-1].bias)

    def forward(self, x, num_frames):                                         # (B*F, C, H, W)
        # A view: frames are rows, pixels columns.
        h = rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames)          # (B, C, F, H*W)
        h = self.conv4(self.conv3(self.conv2(self.conv1(h))))                 # (B, C, F, H*W)
        return x + rearrange(h, "b c f (h w) -> (b f) c h w", h=x.shape[-2])


MAX_ROWS = 65_535  # of heads at once: CUDA's kernels start no more blocks along an axis


def attend(q, k, v):
    """Attention of q (n, rows, l, d) to k and v (n, rows, N, d), in parts where rows are many."""
    if q.shape[1] <= MAX_ROWS:
        return F_.scaled_dot_product_attention(q, k, v)

    parts = []
    for start in range(0, q.shape[1], MAX_ROWS):
        part = [t[:, start:start + MAX_ROWS] for t in (q, k, v)]
        parts.append(F_.scaled_dot_product_attention(*part))
    return torch.cat(parts, dim=1)                                            # (n, rows, l, d)


class Attention(nn.Module):
    """
    Multi-head attention along the second axis of x (n, l, ..., C), to context (n, N, C') or to x
    itself. What lies between l and C attends each for itself, as one long row of heads, so nothing
    is moved in memory. The four projections are what LoRA adapts.
    """

    def __init__(self, dim, heads, head_dim, context_dim=None, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias)                    # W_q (heads d, C)
        self.to_k = nn.Linear(context_dim or dim, heads * head_dim, bias)     # W_k (heads d, C')
        self.to_v = nn.Linear(context_dim or dim, heads * head_dim, bias)     # W_v (heads d, C')
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim)])

    def forward(self, x, context=None):
        context = x if context is None else context
        q = self.split_heads(self.to_q(x))                                    # (n, .. heads, l, d)
        k = self.split_heads(self.to_k(context))                              # (n, .. heads, N, d)
        v = self.split_heads(self.to_v(context))                              # (n, .. heads, N, d)
        out = attend(q, k, v)                                                 # (n, .. heads, l, d)
        return self.to_out[0](out.transpose(1, 2).reshape(*x.shape[:-1], -1))  # (n, l, ..., C)

    def split_heads(self, y):
        return rearrange(y, "n l ... (h d) -> n (... h) l d", h=self.heads)   # (n, .. heads, l, d)


class GEGLU(nn.Module):
    """Half of the projection gates the other half (arXiv:2002.05202)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x):                                                     # (..., C)
        # Two products of half the width: each half lies in one piece, which is faster.
        weights, biases = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        value = F_.linear(x, weights[0], biases[0])                           # (..., hidden)
        gate = F_.linear(x, weights[1], biases[1])                            # (..., hidden)
        return value * F_.gelu(gate)                                          # (..., hidden)


class FeedForward(nn.Module):
    """Four times as wide in between, gated: (..., C) -> (..., C)."""

    def __init__(self, dim):
        super().__init__()
        # The Identity stands where the published files count a dropout.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)                                                    # (..., C)


class TransformerBlock(nn.Module):
    """Self-attention; attention to the text, or to itself again (temporal); feed-forward."""

    def __init__(self, dim, heads, head_dim, context_dim=None):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x, text=None):                                          # (n, l, ..., C)
        x = x + self.attn1(self.norm1(x))                                     # (n, l, ..., C)
        h = self.norm2(x)                                                     # (n, l, ..., C)
        if text is None:
            x = x + self.attn2(h)                                             # (n, l, ..., C)
        else:
            # All frames of a clip attend to the same text: one row of F*H*W queries a clip saves
            # F copies of the text.
            queries = h.reshape(len(text), -1, h.shape[-1])                   # (B, F*H*W, C)
            x = x + self.attn2(queries, text).view_as(x)
        return x + self.ff(self.norm3(x))                                     # (n, l, ..., C)


class SpatialTransformer(nn.Module):
    """Attention within each frame, and to the text."""

    def __init__(self, c, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c)
        heads = c // config.head_dim
        self.transformer_blocks = nn.ModuleList([
            TransformerBlock(c, heads, config.head_dim, config.context_dim)])
        self.proj_out = nn.Linear(c, c)

    def forward(self, x, text):                                               # (B*F, C, H, W)
        h = rearrange(self.norm(x), "n c h w -> n (h w) c")                   # (B*F, H*W, C)
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h), text))  # (B*F, H*W, C)
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[-2])        # (n, C, H, W)


class TemporalTransformer(nn.Module):
    """Attention along time, for each pixel. Order comes from the temporal convolutions alone."""

    def __init__(self, c, heads, config):
        super().__init__()
        dim = heads * config.head_dim
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, dim)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(dim, heads, config.head_dim)])
        self.proj_out = nn.Linear(dim, c)

    def forward(self, x, num_frames):                                         # (B*F, C, H, W)
        h = self.norm(rearrange(x, "(b f) c h w -> b c f (h w)", f=num_frames))  # (B, C, F, H*W)
        h = rearrange(h, "b c f p -> b f p c")                                # (B, F, H*W, C)
        h = self.proj_out(self.transformer_blocks[0](self.proj_in(h)))        # (B, F, H*W, C)
        return x + rearrange(h, "b f (h w) c -> (b f) c h w", h=x.shape[-2])


class Downsample(nn.Module):
    """Half the rows and columns, by a strided convolution. The autoencoder's pads on one side."""

    def __init__(self, c, one_sided=False):
        super().__init__()
        self.one_sided = one_sided
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=0 if one_sided else 1)

    def forward(self, x):                                                     # (n, C, H, W)
        if self.one_sided:  # below and to the right
            x = F_.pad(x, (0, 1, 0, 1))
        return self.conv(x)                                                   # (n, C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the rows and columns, or what `size` asks: nearest neighbour, then a convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, size=None):                                          # (n, C, H, W)
        rows, columns = x.shape[-2:]
        x = F_.interpolate(x, size=size or (2 * rows, 2 * columns), mode="nearest")
        return self.conv(x)                                                   # (n, C, 2H, 2W)


# ----------------------------------------------------------------------------------------------
# The UNet

class Level(nn.Module):
    """One resolution: for each of `c_ins` a ResBlock, a temporal convolution [, two attentions]."""

    def __init__(self, c_ins, c, num_attentions, resample, config):
        super().__init__()
        time_dim, groups = 4 * config.channels[0], config.norm_groups
        heads = c // config.head_dim
        self.resnets = nn.ModuleList(ResBlock(c_in, c, groups, 1e-5, time_dim) for c_in in c_ins)
        self.temp_convs = nn.ModuleList(TemporalConv(c, groups) for _ in c_ins)
        numbers = range(num_attentions)
        self.attentions = nn.ModuleList(SpatialTransformer(c, config) for _ in numbers)
        self.temp_attentions = nn.ModuleList(TemporalTransformer(c, heads, config) for _ in numbers)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c)])
        self.recompute = False  # set by UNet3D.checkpoint_activations

    def block(self, j, x, emb, text, num_frames):
        """The j-th block: (B*F, C, H, W) -> (B*F, C', H, W)."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run_block, j, x, emb, text, num_frames, use_reentrant=False)
        return self.run_block(j, x, emb, text, num_frames)

    def run_block(self, j, x, emb, text, num_frames):
        x = self.temp_convs[j](self.resnets[j](x, emb), num_frames)
        if j < len(self.attentions):
            x = self.temp_attentions[j](self.attentions[j](x, text), num_frames)
        return x


def time_features(t, dim):
    """Sinusoids of the step: (B,) -> (B, dim), cosines first; float32, as in the official code."""
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10000) / (dim // 2) * exponents)              # (dim/2,)
    angles = t[:, None].float() * freqs                                       # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                    # (B, dim)


def embed(number, layers, dtype):
    """A number of each clip, such as its step, for all layers to see: (B,) -> (B, E)."""
    features = time_features(number, layers["linear_1"].in_features).to(dtype)  # (B, C)
    return layers["linear_2"](F_.silu(layers["linear_1"](features)))          # (B, E)


class UNet3D(nn.Module):
    """
    ModelScopeT2V's denoiser, eps(z_t, t, text). 1,411,233,860 parameters at full size.

    forward: z_t (B, C, F, H, W), t (B,) integers, text (B, N, context_dim) -> eps (B, C, F, H, W).
    """

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        ch = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, ch[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({
            "linear_1": nn.Linear(ch[0], 4 * ch[0]), "linear_2": nn.Linear(4 * ch[0], 4 * ch[0])})
        self.transformer_in = TemporalTransformer(ch[0], config.stem_heads, config)  # over time

        skips = self.build_way_down(config)
        self.mid_block = Level([ch[-1]] * 2, ch[-1], 1, None, config)  # two blocks, one attention
        self.build_way_up(config, skips)

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, ch[0], eps=1e-5)
        self.conv_out = nn.Conv2d(ch[0], config.out_channels, 3, padding=1)

    def build_way_down(self, config):
        """Every block's output, and every downsampled one, is kept for the way up: their widths."""
        blocks, last = config.blocks_per_level, len(config.channels) - 1
        self.down_blocks, skips = nn.ModuleList(), [config.channels[0]]
        for i, c in enumerate(config.channels):
            c_ins = [skips[-1]] + [c] * (blocks - 1)
            attentions = blocks if config.attention_levels[i] else 0
            resample = None if i == last else "down"
            self.down_blocks.append(Level(c_ins, c, attentions, resample, config))
            skips += [c] * (blocks if i == last else blocks + 1)
        return skips

    def build_way_up(self, config, skips):
        """One block more on each level; each takes what comes from below and one that was kept."""
        self.up_blocks = nn.ModuleList()
        c_prev = config.channels[-1]
        for i in reversed(range(len(config.channels))):
            c, c_ins = config.channels[i], []
            for _ in range(config.blocks_per_level + 1):
                c_ins.append(c_prev + skips.pop())
                c_prev = c
            attentions = len(c_ins) if config.attention_levels[i] else 0
            resample = "up" if i > 0 else None
            self.up_blocks.append(Level(c_ins, c, attentions, resample, config))

    def checkpoint_activations(self, on=True):
        """Recompute each block in the backward pass: less memory, more time, the same gradient."""
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            level.recompute = on

    def forward(self, z_t, t, text):
        return self.denoise(z_t, embed(t, self.time_embedding, z_t.dtype), text)

    def denoise(self, z_t, emb, text):
        """The same, of what the step became: emb (B, E)."""
        num_frames = z_t.shape[2]

        # 1. One embedding for all frames of a clip.
        emb = emb.repeat_interleave(num_frames, dim=0)                        # (B*F, E)

        # 2. In: frames are images from here on.
        x = rearrange(z_t, "b c f h w -> (b f) c h w")
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))     # (B*F, C, H, W)
        x = self.transformer_in(x, num_frames)                                # (B*F, C, H, W)

        # 3. Down, keeping what the way up will need.
        skips = [x]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                x = level.block(j, x, emb, text, num_frames)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)                                  # (B*F, C, H/2, W/2)
                skips.append(x)

        # 4. Through the middle and up. Odd sizes were rounded up on the way down, so each level is
        #    brought to the size of the next skip.
        for j in range(2):
            x = self.mid_block.block(j, x, emb, text, num_frames)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)                        # (B*F, C + C', H, W)
                x = level.block(j, x, emb, text, num_frames)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:])              # (B*F, C, H, W)

        eps = self.conv_out(F_.silu(self.conv_norm_out(x)))                   # (B*F, C, H, W)
        return rearrange(eps, "(b f) c h w -> b c f h w", f=num_frames)       # (B, C, F, H, W)


# ----------------------------------------------------------------------------------------------
# The autoencoder: frames to latents and back

class PixelAttention(Attention):
    """The autoencoder's only attention: one head over all pixels of a picture."""

    def __init__(self, c, groups):
        super().__init__(c, 1, c, bias=True)
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)

    def forward(self, x):                                                     # (n, C, H, W)
        h = super().forward(rearrange(self.group_norm(x), "n c h w -> n (h w) c"))  # (n, H*W, C)
        return x + rearrange(h, "n (h w) c -> n c h w", h=x.shape[-2])        # (n, C, H, W)


class Middle(nn.Module):
    """The autoencoder's lowest resolution, with attention over the pixels of a picture."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, c, groups, 1e-6), ResBlock(c, c, groups, 1e-6)])
        self.attentions = nn.ModuleList([PixelAttention(c, groups)])

    def forward(self, x):                                                     # (n, C, h, w)
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))        # (n, C, h, w)


class PictureLevel(nn.Module):
    """Residual blocks of one resolution, then down, up, or neither."""

    def __init__(self, c_in, c, num_blocks, resample, groups):
        super().__init__()
        c_ins = [c_in] + [c] * (num_blocks - 1)
        self.resnets = nn.ModuleList(ResBlock(width, c, groups, 1e-6) for width in c_ins)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c, one_sided=True)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c)])

    def forward(self, x):                                                     # (n, C, H, W)
        resample = (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ()))
        for block in (*self.resnets, *resample):
            x = block(x)
        return x


class Encoder(nn.Module):
    """Pictures (n, 3, H, W) in [-1, 1] -> (n, 2C, h, w), before the last 1x1 convolution."""

    def __init__(self, config):
        super().__init__()
        ch, groups, blocks = config.channels, config.norm_groups, config.blocks_per_level
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for c_in, c in zip((ch[0], *ch[:-1]), ch):
            resample = "down" if len(self.down_blocks) < len(ch) - 1 else None
            self.down_blocks.append(PictureLevel(c_in, c, blocks, resample, groups))
        self.mid_block = Middle(ch[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(F_.silu(self.conv_norm_out(x)))                  # (n, 2C, h, w)


class Decoder(nn.Module):
    """Latents (n, C, h, w), after the first 1x1 convolution -> pictures (n, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        ch, groups, blocks = config.channels[::-1], config.norm_groups, config.blocks_per_level + 1
        self.conv_in = nn.Conv2d(config.latent_channels, ch[0], 3, padding=1)
        self.mid_block = Middle(ch[0], groups)
        self.up_blocks = nn.ModuleList()
        for c_in, c in zip((ch[0], *ch[:-1]), ch):
            resample = "up" if len(self.up_blocks) < len(ch) - 1 else None
            self.up_blocks.append(PictureLevel(c_in, c, blocks, resample, groups))
        self.conv_norm_out = nn.GroupNorm(groups, ch[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(F_.silu(self.conv_norm_out(x)))                  # (n, 3, H, W)


class Autoencoder(nn.Module):
    """The frozen KL autoencoder, frame by frame: H = downscale h, W = downscale w. Latents here are
    unscaled: z = config.scale * latent."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        c = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, x):
        """(n, 3, H, W) in [-1, 1] -> moments (n, 2C, h, w), mean then log variance."""
        return self.quant_conv(self.encoder(x.contiguous(memory_format=torch.channels_last)))

    def decode(self, latent):
        """Latent (n, C, h, w) -> pictures (n, 3, H, W) in about [-1, 1], not clamped."""
        latent = latent.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(latent))


def sample_posterior(moments, noise, scale):
    """
    z = scale (mean + std noise), float32: a sample of the autoencoder's posterior
    (autoencoder.py:20-27). scale gives z about unit variance, as the diffusion model expects.

    moments (..., 2C, F, h, w): means, then log variances; noise (..., C, F, h, w) -> z, alike.
    """
    mean, logvar = moments.float().chunk(2, dim=-4)
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    return scale * (mean + std * noise)                                       # (..., C, F, h, w)


def decode_frames(vae, z, index=None):
    """
    Frames of clips: z (B, C, F, h, w) scaled latents, index g (B, S) -> (B, S, 3, H, W).

    In about [0, 1], not clamped: the reward limits what it is shown. index: default all. Frames are
    picked first, since decoding with gradient takes memory (official: last, reward.py:138-162).
    """
    z = z.transpose(1, 2)                                                     # (B, F, C, h, w)
    if index is not None:
        clips = torch.arange(len(z), device=z.device)[:, None]                # (B, 1)
        z = z[clips, index.to(z.device)]                                      # (B, S, C, h, w)
    latent = z.flatten(0, 1) / vae.config.scale                               # (B*S, C, h, w)
    x = vae.decode(latent.to(vae.post_quant_conv.weight.dtype))               # (B*S, 3, H, W)
    return (x.float() * .5 + .5).unflatten(0, z.shape[:2])                    # (B, S, 3, H, W)


class TextEncoder(nn.Module):
    """
    OpenCLIP's text transformer up to its penultimate block, then ln_final (clip_embedder.py:280).

    forward: captions [B] -> (B, N, width). tokenizer: [B] -> (B, N) integers, default OpenCLIP's.
    """

    def __init__(self, config=TextConfig(), tokenizer=None):
        super().__init__()
        from open_clip import SimpleTokenizer, transformer  # here, because it takes seconds
        self.config, length, width = config, config.context_length, config.width
        self.tokenizer = tokenizer or SimpleTokenizer(context_length=length)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width) * 0.01)
        self.transformer = transformer.Transformer(width, config.layers, config.heads)
        self.ln_final = nn.LayerNorm(width)

    def forward(self, captions):
        tokens = self.tokenizer(list(captions)).to(self.positional_embedding.device)   # (B, N)
        x = self.token_embedding(tokens) + self.positional_embedding          # (B, N, width)
        N = tokens.shape[1]
        mask = torch.full((N, N), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        return self.ln_final(self.transformer(x, attn_mask=mask))             # (B, N, width)


# ----------------------------------------------------------------------------------------------
# Loading. Any published format; formats/tensor_names.py says what each calls our tensors.

def load_unet(path, config=None, dtype=torch.float32):
    """UNet3D from any published file or diffusers folder, frozen; lora.load_beside reads its LoRA.
    config: for bare files, default full size; a folder brings its own."""
    described = read_config(path, lambda c: names.unet_from_diffusers(c, UNetConfig))
    config = described or config or UNetConfig()
    tensors, _ = names.split_lora(read_tensors(path))
    unet = build_empty(lambda: UNet3D(config), path)
    return load_strict(unet, names.unet_from_official(tensors, config), path, dtype)


def load_vae(path, config=None, dtype=torch.float32):
    """Autoencoder from a Stable Diffusion .ckpt, bare LDM tensors, or diffusers' vae folder."""
    described = read_config(path, lambda c: names.vae_from_diffusers(c, VAEConfig))
    config = described or config or VAEConfig()
    vae = build_empty(lambda: Autoencoder(config), path)
    tensors = names.vae_from_official(read_tensors(path), config, vae.state_dict())
    return load_strict(vae, tensors, path, dtype)


def load_text_encoder(path, tokenizer=None, dtype=torch.float32):
    """TextEncoder from open_clip's weights or transformers' text_encoder; its size is read off."""
    tensors, layers = names.text_tower(read_tensors(path), path)
    vocab_size, width = tensors["token_embedding.weight"].shape
    context_length, heads = len(tensors["positional_embedding"]), max(1, width // 64)
    built = dict(hidden_act="gelu", quick_gelu=False, layer_norm_eps=1e-5,
                 num_attention_heads=heads, num_hidden_layers=layers)
    read_config(path, lambda c: names.check_fields(c, built))  # transformers' or open_clip's
    config = TextConfig(vocab_size, context_length, width, heads, layers)
    if (Path(path) / "words.txt").is_file():  # of a small tower with words of its own
        tokenizer = read_words(Path(path) / "words.txt", vars(config))
    encoder = build_empty(lambda: TextEncoder(config, tokenizer), path)
    return load_strict(encoder, tensors, path, dtype)


def load_base(base, vae=None, text_encoder=None, dtype=torch.float32, device="cpu", seed=0):
    """
    What a script's --base names, frozen: "tiny", a folder, a file, a hub id, or untrained weights:
    "random" and "random:64" (ModelScopeT2V at full size, or 64 channels wide), "random-NAME" of a
    file in bases/ (small), and "random-NAME:full".

    Its file of bases/ is found by its own configuration. vae, text_encoder: a file or folder to
    take instead of its own. ValueError: parts missing or not fitting.
    """
    name, folder = find_base_file(base, (vae, text_encoder))
    module = importlib.import_module(f"bases.{name}")
    if folder is None:
        make = "published" if base.endswith(":full") else "random"
        if not hasattr(module, make):
            raise ValueError(f"base {base}: bases/{name}.py has no {make}")
        made = getattr(module, make)(base, seed, dtype, device)
    else:
        made = module.load(base, folder, vae, text_encoder, dtype, device)
    if folder and (folder / "reward/words.txt").is_file():  # the tiny world's clips and judge
        made.world = importlib.import_module("tiny.clips")
    return made
