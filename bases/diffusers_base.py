"""
What Wan and CogVideoX share, and in part the others: a network and a causal video autoencoder of diffusers, a text tower of
transformers, and the folder that a pipeline's save_pretrained writes. Each base's own file has the rest: levels, prediction,
captions, pixels.

Letters: B clips, C latent channels, F frames, f latents in time, h and w latent rows and columns, N text tokens, E their width.
"""
from pathlib import Path

import sentencepiece
import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from bases import modelscope
from formats.tensors import fingerprint, weight_files
from support.files import first_line, first_names, read_json


class DiffusersBase:
    """A base as train.py and all methods know it, but for what its own file adds. All parts are frozen."""
    world = network_file = None  # no clips of its own, and no adapters beside its weights
    latent_context = 2           # latents, of those that a frame is decoded from, that carry gradient
    max_tokens = None            # of a caption, which is filled up to so many

    def __init__(self, network, vae, tokenizer, text_encoder, name, folder=None):
        self.network, self.vae, self.name, self.folder = network, vae, name, folder
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.texts = {}  # {caption: its features}, on the CPU

    @property
    def device(self):
        return self.network.proj_out.weight.device

    @property
    def dtype(self):
        return self.network.proj_out.weight.dtype

    def check_size(self, height, width):
        """ValueError unless rows and columns are in sixteens: eight pixels a latent, two latents a token."""
        if height < 16 or width < 16 or height % 16 or width % 16:
            raise ValueError(f"height {height} and width {width}: must be multiples of 16")

    def chain_predict(self, interval):
        """`predict` for one chain. ValueError for DeepCache, which knows another network."""
        if interval != 1:
            raise ValueError(f"cache_interval = {interval}: DeepCache knows ModelScopeT2V's UNet; for {self.name} it must be 1")
        return self.predict

    def checkpoint_activations(self, on=True):
        """Keep the inputs of transformer blocks only, and recompute the rest in the backward pass."""
        (self.network.enable_gradient_checkpointing if on else self.network.disable_gradient_checkpointing)()

    # ------------------------------------------------------------------------------------------------------------------------
    # Captions

    def clean(self, caption):
        """A caption as the text tower was trained on it."""
        return caption

    def tokens(self, caption):
        """Its token numbers and their mask, (1, N) each."""
        tokens = self.tokenizer([self.clean(caption)], padding="max_length", max_length=self.max_tokens, truncation=True,
                                return_tensors="pt")
        return tokens.to(self.text_encoder.device)

    @torch.no_grad()
    def encode_captions(self, captions):
        """(B, N, E), not kept. Each is encoded alone, so that the result does not depend on the batch."""
        if self.text_encoder is None:
            raise ValueError(f"{self.name} has no text encoder: its folder needs text_encoder/ and tokenizer/")
        return torch.cat([self.encode_caption(caption) for caption in captions])

    def is_cut(self, caption):
        """Whether a caption is longer than the text encoder reads."""
        return bool(self.tokenizer) and len(self.tokenizer(self.clean(caption)).input_ids) > self.max_tokens

    encode_text, unconditional = modelscope.Base.encode_text, modelscope.Base.unconditional

    # ------------------------------------------------------------------------------------------------------------------------
    # Pixels

    def decode_frames(self, z, index=None):
        """
        Frames index (B, S), or all of them, of z (B,C,f,h,w) -> (B,S,3,H,W), about [0, 1], not clamped.

        Pixels are exact. Gradient flows through the `latent_context` latents that end at a frame's own, not through all that
        the decoder remembers: what a latent far back changes is little, and each costs the memory of one more decoding.
        """
        if index is None:
            index = torch.arange(4 * z.shape[2] - 3).expand(len(z), -1)
        decoded = [self.decode_clip(of_clip, frames) for of_clip, frames in zip(z.split(1), index.tolist())]
        return torch.stack(decoded).to(z.dtype) / 2 + .5

    def fingerprints(self):
        """Of the autoencoder, and of the text tower: their weights and precision."""
        parts = [self.vae, self.text_encoder]
        return ["none" if part is None else f"{fingerprint(part.state_dict())} {next(part.parameters()).dtype}" for part in parts]

    def release_encoders(self):
        """Free accelerator memory, once every caption and clip has been encoded."""
        self.vae.encoder.to("cpu")
        if self.text_encoder is not None:
            self.unconditional()  # the empty caption is read in every step
            self.text_encoder.to("cpu")


def decode_in_order(decode, parts, part_of, context, memory=()):
    """
    Decode a clip's parts up to the last one that a frame needs, each with what the decoder remembers of those before.

    decode(part, j, *memory) -> frames (1, 3, n, H, W), *memory; parts [(1, C, 1 or more, h, w)]; part_of: the part of each frame
    that is wanted. Gradient flows through `context` parts that end at such a one, each recomputed in the backward pass. Returns
    {part: (n, 3, H, W)}.
    """
    frames = {}
    for j in range(max(part_of) + 1):
        with_grad = torch.is_grad_enabled() and any(0 <= last - j < context for last in part_of)
        with torch.set_grad_enabled(with_grad):
            # Tensors one by one: those inside of a list an outer checkpoint, of decode_chunk, could not let go.
            made, *memory = (checkpoint(decode, parts[j], j, *memory, use_reentrant=False) if with_grad
                             else decode(parts[j], j, *memory))
        frames[j] = made[0].transpose(0, 1)
    return frames


def find_folders(base, folder, vae, text_encoder):
    """
    Folders of a base's network, autoencoder, tokenizer and text tower; the last two are None where there is no text tower.

    vae, text_encoder: folders to take instead. ValueError for a part, or a file of its weights, that is missing.
    """
    vae_folder, text_folder = [Path(path or folder / part) for path, part in ((vae, "vae"), (text_encoder, "text_encoder"))]
    if not (vae_folder / "config.json").is_file():
        raise ValueError(f"{base}: no vae/config.json; expected a diffusers folder with transformer/ and vae/")
    tokenizer_folder = text_folder.parent / "tokenizer"
    if not (text_folder / "config.json").is_file():
        tokenizer_folder = text_folder = None
    elif not tokenizer_folder.is_dir():
        raise ValueError(f"{tokenizer_folder}: no such folder; a text encoder's tokenizer is expected beside it")
    for part in (folder / "transformer", vae_folder, text_folder):
        if part is not None:
            check_weights(part)
    return folder / "transformer", vae_folder, tokenizer_folder, text_folder


def check_weights(folder):
    """ValueError unless every file of a part's weights is there, whole or in shards."""
    names = [file.name for file in folder.iterdir() if file.is_file()]
    first = (weight_files(names) or [""])[0]
    if not first:
        raise ValueError(f"{folder}: no weights here; expected a file like diffusion_pytorch_model.safetensors")
    listed = set(read_json(folder / first)["weight_map"].values()) if first.endswith(".json") else set()
    if missing := sorted(listed.difference(names)):
        raise ValueError(f"{folder}: {len(missing)} of {len(listed)} shards missing ({first_names(missing)})")


def read_part(of_class, folder, device, **dtype):
    """A part of a published folder, frozen. ValueError for files that cannot be read, and for tensors that they lack, which would
    be random ones."""
    try:
        part, found = of_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, **dtype)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: cannot be loaded: {first_line(error)}") from None
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{folder}: {len(missing)} tensors missing ({first_names(missing)})")
    return frozen(part, device)


def load_parts(folders, classes, dtype, device):
    """What lies in the folders of find_folders, frozen. classes: of the three that have weights. The autoencoder is float32."""
    network = read_part(classes[0], folders[0], device, torch_dtype=dtype)
    autoencoder = read_part(classes[1], folders[1], device, torch_dtype=torch.float32)
    if folders[3] is None:
        return network, autoencoder, None, None
    return network, autoencoder, read_tokenizer(folders[2]), read_part(classes[2], folders[3], device, dtype=dtype)


def read_tokenizer(folder):
    """
    A folder's tokenizer. T5's published ones have spiece.model alone. What sentencepiece brings to look into that file needs a
    later protobuf than hpsv2 lets in; transformers has the same for the earlier one, but does not take it by itself.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        from transformers.utils import sentencepiece_model_pb2
        sentencepiece.sentencepiece_model_pb2 = sentencepiece_model_pb2
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def frozen(part, device):
    return part.requires_grad_(False).eval().to(device)
