"""
CogVideoX 2b and 5b (arXiv:2408.06072): a transformer over caption and video tokens together, and a causal video autoencoder.

    python train.py cogvideox --data clips.txt --prompts animals=animals.txt

Its networks are diffusers' CogVideoXTransformer3DModel and AutoencoderKLCogVideoX, its text tower is transformers' T5 encoder.

Against ModelScopeT2V: (1) the network tells v = alpha eps - sigma z_0; (2) its levels are ModelScopeT2V's with the ratio of
signal to noise divided, by 3 in 2b and by 1 in 5b, and stretched so that the noisiest is noise alone; a chain starts there and
ends at the clip; (3) a latent holds four frames, the first one holds one, and the autoencoder reads and writes latents by twos,
the first time three, each time with what it remembers, so a clip has 8k + 1 frames; (4) a caption has 226 tokens, and those after
its end count.

Traps: an even number of latents is decoded to more frames than were encoded (13 become 16). alpha is 0 at the start, so nothing
may divide by it. A chain whose D does not divide 1000 does not land where its next step starts; diffusers tells the network the
latter level, and so do we. Published schedulers may name other spacings, or CogVideoXDPM: their levels are read, "trailing" and
the one-step rule of sampler.py are used, as the authors do for 2b. Guidance that changes with t (use_dynamic_cfg) is for their
other sampler, and diffusers puts t in the place of the step; there is none here. 2b was trained in float16, 5b in bfloat16.

Letters: B clips, C latent channels, F frames, f latents in time, h and w latent rows and columns, N text tokens, E their width.
"""
from functools import partial

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from bases.diffusers_base import DiffusersBase, decode_in_order, find_folders, frozen, load_parts
from model import sample_posterior
from sampler import Levels, alpha_bars
from support.files import read_json
from support.settings import BASES

SETTINGS = BASES["cogvideox"]
SNR_SHIFT = 3.  # what the ratio of signal to noise is divided by: 2b's; 5b's is 1
TRAIN_STEPS = 1000
# Constructor arguments of network, autoencoder and text tower, where the classes have others.
SMALL = (dict(num_attention_heads=2, attention_head_dim=16, time_embed_dim=16, text_embed_dim=32, num_layers=2),
         dict(block_out_channels=(4, 8, 8, 16), layers_per_block=1, norm_num_groups=2),
         dict(d_model=32, d_kv=8, d_ff=64, num_heads=4))
PUBLISHED = {}, {}, dict(d_model=4096, d_ff=10240, num_heads=64)  # 2b's
NETWORK = {"in_channels": 16, "patch_size_t": None, "use_learned_positional_embeddings": False}  # not 1.5's, not image-to-video's
SCHEDULE = {"prediction_type": "v_prediction", "num_train_timesteps": TRAIN_STEPS, "beta_schedule": "scaled_linear",
            "trained_betas": None, "rescale_betas_zero_snr": True, "set_alpha_to_one": True}


def signal_power(snr_shift=SNR_SHIFT, **betas):
    """abar (T,) of what the network was trained on, float64: shifted (arXiv:2403.03206), then with none left at T - 1."""
    with torch.device("cpu"):  # also where weights are made on another
        alpha_bar = alpha_bars(TRAIN_STEPS, **betas)
    alpha_bar = alpha_bar / (snr_shift + (1 - snr_shift) * alpha_bar)
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2  # arXiv:2305.08891, Algorithm 1


def levels(num_steps, shape=None, published=False, alpha_bar=None):
    """
    t_i = 1000 i / D - 1 for i = 1..D ("trailing"); entry 0 is the clip itself.

    A step leads floor(1000 / D) levels down, to entry i - 1. Where D does not divide 1000 that is not t_{i-1}: as in diffusers.
    shape is for other bases, and published is the same: the authors take these levels.
    """
    if not 1 <= num_steps <= TRAIN_STEPS:
        raise ValueError(f"num_steps = {num_steps}: must be from 1 to {TRAIN_STEPS}")
    alpha_bar = signal_power() if alpha_bar is None else alpha_bar
    t = [round(TRAIN_STEPS * i / num_steps) - 1 for i in range(num_steps + 1)]                 # -1, ..., 999
    power = []
    for above in t[1:]:
        landing = above - TRAIN_STEPS // num_steps
        power.append(float(alpha_bar[landing]) if landing >= 0 else 1.)
    power.append(float(alpha_bar[-1]))
    return Levels(t, [p ** .5 for p in power], [(1 - p) ** .5 for p in power])


class CogVideoX(DiffusersBase):
    """The base as train.py and all methods know it; `load` and `random` make one, frozen."""
    kind = "cogvideox"
    default_frames = SETTINGS["frames"]
    default_size, fps = SETTINGS["size"], SETTINGS["fps"]
    guidance = SETTINGS["guidance"]

    def __init__(self, *parts, name, folder=None, alpha_bar=None):
        super().__init__(*parts, name, folder)
        self.max_tokens = self.network.config.max_text_seq_length
        self.alpha_bar = signal_power() if alpha_bar is None else alpha_bar                     # (T,)
        self.vae.decoder.to(self.dtype)  # it runs in every step; the encoder stays float32, since what it makes is kept

    def latent_shape(self, frames, height, width):
        """(C, f, h, w) of a clip's latents. ValueError unless it has 8k + 1 frames, and rows and columns in sixteens."""
        if frames < 1 or frames % 8 != 1:
            raise ValueError(f"frames = {frames}: {self.name} makes 8k + 1 frames, 1, 9, 17, 25, ...: it decodes latents by twos "
                             "after the first, so 13 frames would become 16")
        self.check_size(height, width)
        return self.vae.config.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8

    def levels(self, num_steps, shape=None, published=False):
        return levels(num_steps, shape, published, self.alpha_bar)

    def level(self, u):
        """Training levels of u (B,) in [0, 1): t (B,), alpha, sigma (B,1,1,1,1). Even over t, as the authors draw them."""
        t = (TRAIN_STEPS * u).long()
        return t, *self.at(t)

    def at(self, t):
        """alpha and sigma (B,1,1,1,1) of t (B,), float32."""
        roots = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return [root.float().to(t.device)[t].view(-1, 1, 1, 1, 1) for root in roots]

    def predict(self, z_t, level, text):
        """z_0 and eps in z_t (B,C,f,h,w) at level (t, alpha, sigma), in z_t's dtype; text (B,N,E). t says what alpha and sigma
        the network was trained at; those of a chain differ from them if its D does not divide 1000 (see `levels`)."""
        t = torch.as_tensor(level[0], device=z_t.device).expand(len(z_t)).long()                 # (B,)
        alpha, sigma = [root.to(z_t.dtype) for root in self.at(t)]
        v = self.network(z_t.transpose(1, 2).to(self.dtype), text.to(self.dtype), t, return_dict=False,
                         image_rotary_emb=self.rotation(z_t))[0]                                # (B, f, C, h, w)
        v = v.transpose(1, 2).to(z_t.dtype)
        return alpha * z_t - sigma * v, sigma * z_t + alpha * v                                 # (B, C, f, h, w)

    def rotation(self, z_t):
        """5b's positions: cosines and sines for each token of z_t (B,C,f,h,w); 2b adds its own inside of the network."""
        config, (f, h, w) = self.network.config, z_t.shape[2:]
        if not config.use_rotary_positional_embeddings:
            return None
        p = config.patch_size
        grid = h // p, w // p
        crop = get_resize_crop_region_for_grid(grid, config.sample_width // p, config.sample_height // p)
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, f, device=z_t.device)

    def error(self, z_0, eps, z, noise, level):
        """The loss that the network was trained by, (B,), of what `predict` says: the mean square error of v."""
        _, alpha, sigma = level
        return (alpha * (eps - noise) - sigma * (z_0 - z)).square().flatten(1).mean(dim=1)

    def checkpoint_activations(self, on=True):
        """Keep the inputs of blocks only, and recompute the rest in the backward pass: of the decoder, too, which for eight
        frames of 256 x 256 keeps 10.2 GiB, and so 1.0 (counted, in bfloat16)."""
        super().checkpoint_activations(on)
        (self.vae.enable_gradient_checkpointing if on else self.vae.disable_gradient_checkpointing)()

    def encode_caption(self, caption):
        """(1, N, E). No mask: the network was trained on the features of all tokens, those after a caption's end among them."""
        return self.text_encoder(self.tokens(caption).input_ids).last_hidden_state

    @torch.no_grad()
    def encode(self, frames):
        """Frames (F, 3, H, W) in [-1, 1] -> moments (1, 2C, f, h, w): means, then log variances, not scaled."""
        self.latent_shape(len(frames), *frames.shape[-2:])
        video = frames.to(self.device, self.vae.dtype).transpose(0, 1)[None]                    # (1, 3, F, H, W)
        return self.vae.encode(video).latent_dist.parameters

    def draw_latents(self, moments, generator):
        """z (C, f, h, w) of moments (2C, f, h, w): a sample, as the authors train on."""
        noise = torch.randn(moments.chunk(2)[0].shape, generator=generator)
        return sample_posterior(moments, noise, self.vae.config.scaling_factor)

    def decode_clip(self, z, index):
        """Frames index [S] of z (1,C,f,h,w) -> (S,3,H,W), about [-1, 1]. Gradient flows through whole chunks of two latents."""
        def decode(chunk, j, memory=None):
            return self.vae.decoder(chunk, conv_cache=memory)

        latents = (z / self.vae.config.scaling_factor).to(self.dtype)
        chunks = [latents[:, :, :3], *latents[:, :, 3:].split(2, dim=2)]
        chunk_of = [max(i - 1, 0) // 8 for i in index]  # nine times 0, then 1 eight times, ...
        frames = decode_in_order(decode, chunks, chunk_of, (self.latent_context + 1) // 2)
        return torch.stack([frames[j][(i - 1) % 8 if j else i] for i, j in zip(index, chunk_of)])


def load(base, folder, vae, text_encoder, dtype, device):
    """Of a diffusers folder, as CogVideoXPipeline.save_pretrained writes it. See model.load_base. A base without text tower
    loads."""
    read_checked(folder / "transformer/config.json", NETWORK)
    schedule = read_checked(folder / "scheduler/scheduler_config.json", SCHEDULE)
    betas = {name: schedule[name] for name in ("beta_start", "beta_end") if name in schedule}
    alpha_bar = signal_power(schedule.get("snr_shift_scale", SNR_SHIFT), **betas)
    folders = find_folders(base, folder, vae, text_encoder)
    parts = load_parts(folders, (CogVideoXTransformer3DModel, AutoencoderKLCogVideoX, T5EncoderModel), dtype, device)
    return CogVideoX(*parts, name=base, folder=folder, alpha_bar=alpha_bar)


def read_checked(path, settings):
    """What a config file says; empty if there is none. ValueError where it says otherwise than the settings, or nothing."""
    config = read_json(path) if path.is_file() else settings
    for name, value in settings.items():
        if config.get(name) != value:
            raise ValueError(f"{path}: {name} {config.get(name)!r}; CogVideoX 2b and 5b have {value!r}")
    return config


def random(base, seed, dtype, device, sizes=SMALL):
    """Seeded random weights at small width, in CogVideoX's classes, to try a pipeline without a download. See model.load_base."""
    of_network, of_vae, of_text = sizes
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        network = CogVideoXTransformer3DModel(**of_network)
        vae = AutoencoderKLCogVideoX(**of_vae)
        text = T5EncoderModel(T5Config(vocab_size=384, num_layers=1, **of_text))
    network = network if dtype == torch.float32 else network.to(dtype)
    return CogVideoX(frozen(network, device), frozen(vae, device), ByT5Tokenizer(), frozen(text, device), name=base)


published = partial(random, sizes=PUBLISHED)  # to count and time a step; of the text tower, which no step runs, one layer of 24
