"""
Open-Sora 1.2 (arXiv:2412.20404), one of VADER's bases: a transformer trained as a rectified flow, a two-stage autoencoder.

    python train.py opensora --data clips.txt --prompts animals=animals.txt

Both are here, under the published tensor names; the autoencoder's 2D stage is model.py's, the text tower is in t5.py. The
published code (github.com/hpcaitech/Open-Sora, v1.2.0) also needs colossalai, mmengine and xformers.

Against ModelScopeT2V: (1) z_t = (1 - sigma) z_0 + sigma eps, and the network tells the velocity v = z_0 - eps; (2) noise levels
depend on size and frames, and the network is told the size and the frames a second; (3) windows of 17 pictures are compressed in
time, to 5 latents; (4) text is a dict, features of 300 tokens and a mask of the real ones; (5) for no caption the network has
learnt features, of which it reads as many as the caption has tokens.

Ours differs from the published code: (1) the posteriors' modes are taken, not samples; (2) columns must divide by 8: its 426 at
240p become 53 latents, and 424 again; (3) RWR and DPO draw levels as for 51 frames of 256 x 256.

Traps: in 16 bits the step that the network is told is rounded, as in its training. The temporal decoder normalises over all of a
window, so that fewer latents give other pixels: VADER decodes one of five alone. A single picture is told as 120 frames a second.

Letters: B clips, C latent channels, F frames, f latents in time, h and w latent rows and columns, n windows or pictures; in the
transformer T frames of S patches, each E wide, l tokens of n rows that attend to each other, N text tokens.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F_
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from bases.diffusers_base import DiffusersBase
from bases.t5 import ReadsT5, load_tower, random_tower
from formats.tensor_names import check_fields, vae_from_diffusers, vae_to_diffusers
from formats.tensors import build_empty, fingerprint, load_strict, read_config, read_tensors
from formats.weights import HUB_BASES, find_base, find_part
from model import Autoencoder, VAEConfig, time_features
from sampler import Levels
from support.ranks import move_to
from support.settings import BASES

SETTINGS = BASES["opensora"]
WINDOW = 17  # pictures that are compressed together, to 5 latents
CHANNELS = 4  # C
HUB_PARTS = {"vae": "hpcai-tech/OpenSora-VAE-v1.2", "text_encoder": "DeepFloyd/t5-v1_1-xxl"}  # of the hub's base


# -- The noise levels ------------------------------------------------------------------------------------------------------------
def latent_frames(frames):
    return 1 if frames == 1 else frames // WINDOW * 5


def shifted(u, shape=None):
    """sigma of u in [0, 1], nearer to 1 the more pixels there are (SD3, arXiv:2403.03206, Eq. (23)): (frames, height, width)."""
    frames, height, width = shape or (SETTINGS["frames"], SETTINGS["size"], SETTINGS["size"])
    shift = (height * width * latent_frames(frames)) ** .5 / 512  # 1 for a picture of 512 x 512
    return shift * u / (1 + (shift - 1) * u)


def levels(num_steps, shape=None, published=False):
    """sigma from 0 to 1 over i = 0..D. shape: (frames, height, width), default SETTINGS'. The published ones are the default."""
    sigma = [shifted(i / num_steps, shape) for i in range(num_steps + 1)]
    return Levels([1000 * s for s in sigma], [1 - s for s in sigma], sigma)


# -- The transformer -------------------------------------------------------------------------------------------------------------
def mlp(width, inner, out):
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, inner), act=nn.GELU("tanh"), fc2=nn.Linear(inner, out)))


def rotate(x, freqs):
    """x (n, heads, T, d): pairs of channels turned by angles that grow with the frame (RoPE, arXiv:2104.09864); freqs (d/2,)."""
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * freqs.float()      # (T, d/2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                # (n, heads, T, d/2) each
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention along the second axis of x (n, l, E). freqs: given where that is time, whose order they tell."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads, eps=1e-6), nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x, freqs=None):
        q, k, v = rearrange(self.qkv(x), "n l (three h d) -> three n h l d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if freqs is not None:
            q, k = rotate(q, freqs), rotate(k, freqs)
        return self.proj(rearrange(F_.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class CrossAttention(nn.Module):
    """Attention of x (B, l, E) to the real tokens, those in mask (B, N), of text (B, N, E)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = [nn.Linear(width, n * width) for n in (1, 2, 1)]

    def forward(self, x, text, mask):
        q = rearrange(self.q_linear(x), "b l (h d) -> b h l d", h=self.heads)
        k, v = rearrange(self.kv_linear(text), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        out = F_.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))


def modulate(x, shift, scale):
    """Layer norm of x (..., E), then a scale and a shift that depend on the noise level (adaLN, arXiv:2212.09748)."""
    return F_.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Attention within each frame, or with freqs along time; to the text; and an MLP. x (B, T, S, E), level (B, 6, E)."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.cross_attn, self.mlp = Attention(width, heads), CrossAttention(width, heads), mlp(width, 4 * width, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**.5)

    def forward(self, x, text, mask, level, freqs=None):
        level = (self.scale_shift_table + level)[:, :, None, None]                        # (B, 6, 1, 1, E)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = level.unbind(1)
        h = modulate(x, shift, scale)                                                     # (B, T, S, E)
        if freqs is None:
            h = self.attn(h.flatten(0, 1)).view_as(x)                                     # (B T), S
        else:
            h = rearrange(self.attn(rearrange(h, "b t s e -> (b s) t e"), freqs), "(b s) t e -> b t s e", b=len(x))
        x = x + gate * h
        x = x + self.cross_attn(x.flatten(1, 2), text, mask).view_as(x)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))


class STDiT3(nn.Module):
    """The velocity z_0 - eps in z_t (B, C, f, h, w), told t (B,), the text and its mask, frames a second, pixel rows, columns."""

    def __init__(self, hidden_size=1152, depth=28, num_heads=16, caption_channels=4096, model_max_length=300, input_sq_size=512,
                 **others):  # all as config.json has them
        super().__init__()
        check_fields(others, dict(in_channels=CHANNELS, patch_size=[1, 2, 2], mlp_ratio=4., pred_sigma=True, qk_norm=True))
        E, C, heads = hidden_size, CHANNELS, num_heads
        self.input_sq_size, self.recompute = input_sq_size, False
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(C, E, (1, 2, 2), (1, 2, 2))})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, E), nn.SiLU(), nn.Linear(E, E))})
        self.fps_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, E), nn.SiLU(), nn.Linear(E, E))})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(E, 6 * E))
        self.y_embedder = nn.ModuleDict({"y_proj": mlp(caption_channels, E, E)})
        self.y_embedder.register_buffer("y_embedding", torch.randn(model_max_length, caption_channels))
        self.rope = nn.ParameterDict({"freqs": 10_000. ** -(torch.arange(0, E // heads, 2) / (E // heads))})
        self.spatial_blocks = nn.ModuleList(Block(E, heads) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(Block(E, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(E, 2 * 2 * 2 * C)})
        self.final_layer.scale_shift_table = nn.Parameter(torch.randn(2, E) / E**.5)

    def positions(self, rows, columns, height, width):
        """Of each patch, its column's and its row's sinusoids, (S, E): as far apart as they are in the picture, of any size."""
        side = round((rows * columns) ** .5) * self.input_sq_size / (height * width) ** .5
        weight, waves = self.t_block[1].weight, []
        for count in (rows, columns):
            places = torch.arange(count, device=weight.device) * side / count
            cosines, sines = time_features(places, weight.shape[1] // 2).chunk(2, dim=1)
            waves.append(torch.cat([sines, cosines], dim=1))                              # (count, E/2)
        of_column, of_row = waves[1].expand(rows, -1, -1), waves[0][:, None].expand(-1, columns, -1)
        return torch.cat([of_column, of_row], dim=2).flatten(0, 1)

    def forward(self, z_t, t, text, mask, fps, height, width):
        B, C, _, h, w = z_t.shape
        dtype = self.x_embedder.proj.weight.dtype

        # 1. Patches of 2 x 2 latents, with their places. Odd rows and columns get one more, of zeros.
        x = self.x_embedder.proj(F_.pad(z_t.to(dtype), (0, w % 2, 0, h % 2)))             # (B, E, T, rows, columns)
        rows, columns = x.shape[-2:]
        x = rearrange(x, "b e t h w -> b t (h w) e")                                      # (B, T, S, E)
        x = x + self.positions(rows, columns, height, width).to(x)

        # 2. The noise level and the caption.
        fps = torch.full((B,), float(fps), device=z_t.device)
        t = self.t_embedder.mlp(time_features(t.to(dtype), 256).to(dtype))                # (B, E)
        t = t + self.fps_embedder.mlp(time_features(fps, 256).to(dtype))
        level = self.t_block(t).unflatten(1, (6, -1))                                     # (B, 6, E)
        text = self.y_embedder.y_proj(text.to(dtype))                                     # (B, N, E)

        # 3. Within the frames, then along time, and so on.
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            for block, freqs in ((spatial, None), (temporal, self.rope.freqs)):
                inputs = x, text, mask.bool(), level, freqs
                x = checkpoint(block, *inputs, use_reentrant=False) if self.recompute else block(*inputs)

        # 4. Back to latents.
        shift, scale = (self.final_layer.scale_shift_table + t[:, None])[:, :, None, None].unbind(1)
        v = self.final_layer.linear(modulate(x, shift, scale))                            # (B, T, S, 2 2 2C)
        v = rearrange(v, "b t (h w) (p q c) -> b c t (h p) (w q)", h=rows, p=2, q=2)
        return v[:, :C, :, :h, :w]                                                        # (B, C, f, h, w)


# -- The autoencoder -------------------------------------------------------------------------------------------------------------
class CausalConv(nn.Module):
    """A 3D convolution that sees no later frame: time is padded in front alone. double: its channels are those of two frames."""

    def __init__(self, c_in, c_out, size=3, stride=1, bias=True, double=False):
        super().__init__()
        self.padding, self.double = (size // 2,) * 4 + (size - stride, 0), double
        self.conv = nn.Conv3d(c_in, c_out, size, (stride, 1, 1), bias=bias)

    def forward(self, x):                                                             # (n, C, f, h, w)
        x = self.conv(F_.pad(x, self.padding))
        return rearrange(x, "n (c two) f h w -> n c (f two) h w", two=2) if self.double else x


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), CausalConv(c_in, c_out, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), CausalConv(c_out, c_out, bias=False)
        self.conv3 = nn.Identity() if c_in == c_out else CausalConv(c_in, c_out, size=1, bias=False)

    def forward(self, x):
        h = self.conv1(F_.silu(self.norm1(x)))
        return self.conv3(x) + self.conv2(F_.silu(self.norm2(h)))


class TemporalStage(nn.Module):
    """
    Encodes pictures' latents (n, C, 20, h, w) as moments (n, 2C, 5, h, w), or decodes (n, C, 5, h, w) to such latents: blocks of
    one width, half the time or not, blocks of the next width, and so on. A decoder has this order backwards.
    """

    def __init__(self, is_decoder, filters=128, num_res_blocks=4, channel_multipliers=(1, 2, 2, 4),
                 temporal_downsample=(False, True, True), num_groups=32, **others):
        super().__init__()
        check_fields(others, dict(in_out_channels=CHANNELS, latent_embed_dim=CHANNELS))
        widths = [filters * m for m in channel_multipliers]
        if is_decoder:
            neighbours, resample = [*widths[1:], widths[-1]], [CausalConv(c, 2 * c, double=True) for c in widths[1:]]
        else:
            neighbours, resample = [widths[0], *widths], [CausalConv(c, c, stride=2) for c in widths[:-1]]

        def blocks(c_in, c):
            return nn.Sequential(*[ResBlock(c if j else c_in, c, num_groups) for j in range(num_res_blocks)])

        self.block_res_blocks = nn.ModuleList(blocks(c_in, c) for c_in, c in zip(neighbours, widths))
        self.conv_blocks = nn.ModuleList(conv if halved else nn.Identity() for conv, halved in zip(resample, temporal_downsample))
        self.res_blocks = blocks(widths[-1], widths[-1])
        self.norm1 = nn.GroupNorm(num_groups, widths[0] if is_decoder else widths[-1])
        middle = [self.block_res_blocks[0]]
        for conv, next_blocks in zip(self.conv_blocks, self.block_res_blocks[1:]):
            middle += [conv, next_blocks]
        if is_decoder:
            self.conv1, self.conv_out = CausalConv(CHANNELS, widths[-1]), CausalConv(widths[0], CHANNELS)
            self.layers = [self.conv1, self.res_blocks, *reversed(middle), self.norm1, nn.SiLU(), self.conv_out]
        else:
            self.conv_in, self.conv2 = CausalConv(CHANNELS, filters, bias=False), CausalConv(widths[-1], 2 * CHANNELS, size=1)
            self.layers = [self.conv_in, *middle, self.res_blocks, self.norm1, nn.SiLU(), self.conv2]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class VideoAutoencoder(nn.Module):
    """Both stages. Of each channel, z has a mean of about 0 and a deviation of about 1, by `shift` and `scale`."""

    def __init__(self, vae_2d=None, vae_temporal=None, **others):  # the published config.json says no sizes: the classes' own
        super().__init__()
        check_fields(others, {"micro_frame_size": WINDOW})
        spatial = vae_from_diffusers(vae_2d, VAEConfig) if "block_out_channels" in (vae_2d or {}) else VAEConfig()
        self.spatial_scale, sizes, C = spatial.scale, vae_temporal or {}, CHANNELS
        self.spatial_vae = nn.ModuleDict({"module": Autoencoder(spatial)})
        self.temporal_vae = nn.ModuleDict({
            "encoder": TemporalStage(False, **sizes), "quant_conv": CausalConv(2 * C, 2 * C, size=1),
            "decoder": TemporalStage(True, **sizes), "post_quant_conv": CausalConv(C, C, size=1)})
        self.register_buffer("shift", torch.tensor([-.1, .34, .27, .98]).view(1, -1, 1, 1, 1))
        self.register_buffer("scale", torch.tensor([3.85, 2.32, 2.33, 3.06]).view(1, -1, 1, 1, 1))

    def encode(self, frames):
        """Frames (F, 3, H, W) in [-1, 1] -> z (1, C, f, h, w): the mode of both posteriors, window by window."""
        latents = []
        for window in frames.split(WINDOW):
            mean = self.spatial_vae.module.encode(window).chunk(2, dim=1)[0] * self.spatial_scale  # (17, C, h, w)
            x = F_.pad(mean.transpose(0, 1)[None], (0, 0, 0, 0, -len(window) % 4, 0))  # zeros in front: (1, C, 20, h, w)
            latents.append(self.temporal_vae.quant_conv(self.temporal_vae.encoder(x)).chunk(2, dim=1)[0])
        return (torch.cat(latents, dim=2) - self.shift) / self.scale

    def decode_windows(self, z):
        """Windows of z (n, C, 5, h, w) -> latents of their pictures (n, C, 17, h, w); of one latent, one picture."""
        conv = self.temporal_vae.post_quant_conv
        x = conv((z * self.scale + self.shift).to(conv.conv.weight.dtype))
        return self.temporal_vae.decoder(x)[:, :, -(4 * z.shape[2] - 3):]


# -- The base --------------------------------------------------------------------------------------------------------------------
class OpenSora(ReadsT5):
    """The base as train.py and all methods know it; `load` and `random` make one, frozen."""
    kind = "opensora"
    default_frames = SETTINGS["frames"]
    default_size, guidance, fps = SETTINGS["size"], SETTINGS["guidance"], SETTINGS["fps"]
    world = network_file = None  # no clips of its own, and no adapters beside its weights
    levels = staticmethod(levels)

    def __init__(self, network, vae, text_encoder, name, folder=None):
        self.network, self.vae, self.text_encoder, self.name, self.folder = network, vae, text_encoder, name, folder
        self.dtype, self.texts = network.t_block[1].weight.dtype, {}  # {caption: its features and mask}
        # What runs in every step gets the network's precision. The encoders stay float32: they run once.
        for stage in (vae.spatial_vae.module, vae.temporal_vae):
            stage.decoder.to(self.dtype)
            stage.post_quant_conv.to(self.dtype)

    @property
    def device(self):
        return self.network.t_block[1].weight.device

    def latent_shape(self, frames, height, width):
        """(C, f, h, w) of a clip's latents. ValueError unless it has 1 frame or 17 k, and rows and columns in eights."""
        if frames != 1 and (frames < WINDOW or frames % WINDOW):
            raise ValueError(f"frames = {frames}: {self.name} makes 1 frame, or a multiple of 17: 17, 34, 51, ...")
        if height < 8 or width < 8 or height % 8 or width % 8:
            raise ValueError(f"height {height} and width {width}: must be multiples of 8")
        return CHANNELS, latent_frames(frames), height // 8, width // 8

    def level(self, u):
        """Training levels of u (B,) in [0, 1): t (B,), alpha, sigma (B,1,1,1,1). Less the shift, sigma's logit is normal."""
        sigma = shifted(torch.special.ndtri(u).sigmoid())
        return 1000 * sigma, (1 - sigma).view(-1, 1, 1, 1, 1), sigma.view(-1, 1, 1, 1, 1)

    def predict(self, z_t, level, text):
        """z_0 and eps in z_t (B,C,f,h,w) at level (t, alpha, sigma): numbers, or as `level` has them. text: as encode_text's."""
        t, alpha, sigma = level
        t = torch.as_tensor(t, dtype=torch.float32, device=z_t.device).expand(len(z_t))   # (B,)
        fps = self.fps if z_t.shape[2] > 1 else 120  # of a picture
        height, width = 8 * z_t.shape[3], 8 * z_t.shape[4]
        v = self.network(z_t, t, text["text"], text["mask"], fps, height, width).to(z_t.dtype)
        return z_t + sigma * v, z_t - alpha * v                                           # (B, C, f, h, w)

    def error(self, z_0, eps, z, noise, level):
        """The loss that the network was trained by, (B,), of what `predict` says: the mean square error of v."""
        return ((z_0 - eps) - (z - noise)).square().flatten(1).mean(dim=1)

    chain_predict = DiffusersBase.chain_predict

    def checkpoint_activations(self, on=True):
        """Keep the inputs of transformer blocks only, and recompute the rest in the backward pass."""
        self.network.recompute = on

    def unconditional(self, text=None):
        """The learnt features of no caption, as many as each clip's text has tokens; without a text, all of them."""
        if text is None:  # asked before clips are encoded, and that takes long
            self.check_text_encoder()
        learnt = self.network.y_embedder.y_embedding[None]                                # (1, N, E)
        mask = torch.ones_like(learnt[..., 0], dtype=torch.bool) if text is None else text["mask"]
        return {"text": learnt.expand(len(mask), -1, -1), "mask": mask}

    @torch.no_grad()
    def encode(self, frames):
        """Frames (F, 3, H, W) in [-1, 1] -> the latents z (1, C, f, h, w)."""
        self.latent_shape(len(frames), *frames.shape[-2:])
        return self.vae.encode(frames.to(self.device, self.vae.shift.dtype))

    def draw_latents(self, moments, generator):
        """z (C, f, h, w), of what `encode` gives: these are the latents already."""
        return moments.float()

    def decode_frames(self, z, index=None):
        """Frames index (B, S), or all, of z (B,C,f,h,w) -> (B,S,3,H,W), about [0, 1], not clamped; exact, with all gradient."""
        frames = WINDOW if z.shape[2] > 1 else 1
        windows = rearrange(z, "b c (n f) h w -> b n c f h w", f=latent_frames(frames))
        index = torch.arange(windows.shape[1] * frames).expand(len(z), -1) if index is None else index.cpu()
        window_of = torch.arange(len(z))[:, None] * windows.shape[1] + index // frames    # (B, S), of all clips'
        wanted, place = window_of.unique(return_inverse=True)  # each is decoded in time once, then the frames alone in 2D
        latents = self.vae.decode_windows(windows.flatten(0, 1)[wanted])                  # (n, C, 17, h, w)
        latents = latents[place, :, index % frames].flatten(0, 1) / self.vae.spatial_scale      # (B*S, C, h, w)
        pictures = torch.cat([self.vae.spatial_vae.module.decode(part) for part in latents.split(WINDOW)])
        return (pictures.to(z.dtype) / 2 + .5).unflatten(0, index.shape)

    def fingerprints(self):
        """Of the autoencoder, and of the text tower: their weights and precision."""
        text = self.text_encoder
        return [fingerprint(self.vae.state_dict()), f"{fingerprint(text.state_dict())} {text.encoder.dtype}" if text else "none"]

    def release_encoders(self):
        """Free accelerator memory, once every caption and clip has been encoded."""
        for part in filter(None, (self.vae.spatial_vae.module.encoder, self.vae.temporal_vae.encoder, self.text_encoder)):
            part.to("cpu")


def load(base, folder, vae, text_encoder, dtype, device):
    """Of one folder with net/, vae/, text_encoder/ and tokenizer/, or of a folder or hub id for each. See model.load_base."""
    if base == HUB_BASES["opensora"]:
        vae, text_encoder = vae or HUB_PARTS["vae"], text_encoder or HUB_PARTS["text_encoder"]
    vae = find_base(vae) if vae else find_part(folder, ["vae"])
    text_encoder = find_base(text_encoder) if text_encoder else find_part(folder, ["text_encoder"])
    if vae is None:
        raise ValueError(f"{base}: no vae found in {folder}; expected net/ and vae/, or --vae, like {HUB_PARTS['vae']}")
    network = read_network(folder / "net" if (folder / "net").is_dir() else folder, STDiT3, dtype, device)
    autoencoder = read_network(vae, VideoAutoencoder, torch.float32, device)
    text = text_encoder and move_to(load_tower(text_encoder, *network.y_embedder.y_embedding.shape, dtype), device)
    return OpenSora(network, autoencoder, text, base, folder)


def read_network(path, of_class, dtype, device):
    """A network of a folder's config.json and weights, frozen. It leaves the host's memory before the next is read."""
    module = build_empty(lambda: of_class(**read_config(path, dict) or {}), path)
    return move_to(load_strict(module, read_tensors(path), path, dtype), device)


def random(base, seed, dtype, device, full=False):
    """Seeded random weights at small width, to try a pipeline without a download. See model.load_base."""
    network = dict(hidden_size=32, depth=2, num_heads=2, caption_channels=32, model_max_length=64)
    vae = dict(vae_2d=vae_to_diffusers(VAEConfig((4, 8, 8, 8), 1, norm_groups=2)),
               vae_temporal=dict(filters=4, num_res_blocks=1, num_groups=2))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        network, vae = [STDiT3(), VideoAutoencoder()] if full else [STDiT3(**network), VideoAutoencoder(**vae)]
        parts = network.to(dtype), vae, random_tower(*network.y_embedder.y_embedding.shape)
    return OpenSora(*[move_to(part.eval().requires_grad_(False), device) for part in parts], base)


def published(base, seed, dtype, device):
    """The same at the published size, to count and time a step. Its text tower, which no step runs, has one layer."""
    return random(base, seed, dtype, device, full=True)
