"""
What reward models share: they stay frozen, they take pictures of their own kind, and they are built from files. reward.py says
what a reward is. Its `name` tells the version, since scores of two versions do not compare.

Letters: N pictures, H and W pixel rows and columns.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F_
from torch import nn

from formats.tensor_names import replace_all
from formats.tensors import build_empty, load_strict, read_tensors


class RewardModel(nn.Module):
    """A reward that stays frozen and in eval mode."""

    def __init__(self, name, num_frames=None, rule="first"):
        super().__init__()
        self.name = name
        self.num_frames = num_frames
        self.rule = rule  # which frames those are: spread_frames
        self.training = False
        self._texts = {}
        self._texts_of = None  # what tells the weights that they were computed with

    def train(self, mode=True):
        """Stays in eval mode: a trainer's model.train() must not switch on the reward's dropout."""
        return super().train(False)

    def pixels(self, frames, captions):
        """Frames (B, S, 3, H, W) as single pictures (B*S, 3, H, W) in float32, limited to [0, 1]; ValueError for other shapes."""
        if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}: must be floating (B, S, 3, H, W)")
        if isinstance(captions, str) or len(captions) != len(frames):
            raise ValueError(f"captions are {captions!r:.80}: must be a list of {len(frames)}, one per video")
        if self.num_frames and frames.shape[1] != self.num_frames:
            raise ValueError(f"frames = {frames.shape[1]}: {self.name} sees {self.num_frames} frames of a clip, in order")
        return limit(frames.flatten(0, 1).float())

    def encode_once(self, captions, model, encode):
        """[encode(caption)] without gradient, each computed once for the weights that `model` has now."""
        weights = [(p.data_ptr(), p._version) for p in model.parameters()]  # moving, casting or loading them changes one
        if weights != self._texts_of:
            self._texts = {}
            self._texts_of = weights

        # One at a time and outside autocast: not even the last bit may depend on the batch, as a resumed run has others.
        with torch.no_grad(), no_autocast(next(model.parameters())):
            for caption in captions:
                if caption not in self._texts:
                    self._texts[caption] = encode(caption)
        return [self._texts[caption] for caption in captions]


def no_autocast(tensor):
    """A context without autocast on the tensor's device; meta has none."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


# -- Frames in [0, 1] into the pictures that models were trained on, on tensors and differentiable --------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, as in open_clip and transformers
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def limit(x):
    """x limited to [0, 1]; a pixel outside gets no gradient (official reward.py:147), one at 0 or 1 does, as clamp() had it."""
    return torch.where((x >= 0) & (x <= 1), x, x.detach().clamp(0, 1))


def letterbox(x, size):
    """HPSv2's own resize (ResizeMaxSize, hpsv2 1.2.0, src/open_clip/transform.py:26): longest side to `size`, then black bars."""
    H, W = x.shape[-2:]
    scale = size / max(H, W)
    h, w = round(H * scale), round(W * scale)  # the package's order of operations, so that ties round alike
    x = F_.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=True)      # (N, 3, h, w), may overshoot
    top, left = (size - h) // 2, (size - w) // 2
    return F_.pad(x, (left, size - w - left, top, size - h - top))                          # (N, 3, size, size)


def stretch(x, size):
    """The official InstructVideo code's resize (utils/reward/reward.py:79), of square videos there; not antialiased."""
    return F_.interpolate(x, (size, size), mode="bilinear", align_corners=False)


def crop_centre(x, size, shortest=None, mode="bicubic", antialias=True):
    """CLIP's own resize: shortest side to `shortest` (default `size`), then the middle square."""
    from torchvision.transforms import InterpolationMode, functional
    x = functional.resize(x, shortest or size, InterpolationMode(mode), antialias=antialias)     # (N, 3, h, w)
    return functional.center_crop(limit(x), size)  # published code resizes 8-bit pictures, which cannot overshoot


def clip_normalize(x, mean=CLIP_MEAN, std=CLIP_STD):
    """Subtract the channel means that a model was trained with, divide by the deviations. x (N, 3, H, W) -> (N, 3, H, W)."""
    mean, std = torch.tensor([mean, std]).to(x)[..., None, None]
    return (x - mean) / std


def spread_frames(num_frames, wanted, rule="first"):
    """Which frames a video reward sees: `wanted` of 0..num_frames-1, evenly spread and in order -> (wanted,).
    rule: the "first" of each of `wanted` equal parts, or its "middle"; "ends": from the very first to the very last."""
    if num_frames < wanted:
        raise ValueError(f"frames = {num_frames}: this reward sees {wanted} frames of a clip, in order; it must have as many")
    if rule == "ends":
        return torch.tensor([round(i * (num_frames - 1) / (wanted - 1)) for i in range(wanted)])
    edges = [i * num_frames // wanted for i in range(wanted + 1)]
    return torch.tensor([(a + b - 1) // 2 if rule == "middle" else a for a, b in zip(edges, edges[1:])])


def frames_of(reward, num_frames):
    """The frames of a clip that a video reward sees, by its own rule, as a tuple; None for an image reward, which sees any."""
    wanted = getattr(reward, "num_frames", None)
    return tuple(spread_frames(num_frames, wanted, getattr(reward, "rule", "first")).tolist()) if wanted else None


# -- Modules from files -----------------------------------------------------------------------------------------------

def build(make, source=None, dtype=torch.float32, device="cpu", tensors=None, spellings=()):
    """The module that make() builds, frozen and in eval mode, with published weights, or seeded random ones if source is None.
    source: a file or folder; tensors: those of it to take, if not all; spellings: pairs (old, new) of what names may contain."""
    if source is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone
            return make().eval().requires_grad_(False).to(device=device, dtype=dtype)

    module = build_empty(make, source)
    ours = {replace_all(name, spellings): name for name in module.state_dict()}
    renamed = {}
    for name, t in (read_tensors(source) if tensors is None else tensors).items():
        if not name.endswith("position_ids") or name in ours.values():  # older files also hold these position numbers
            renamed[ours.get(replace_all(name, spellings), name)] = t
    load_strict(module, renamed, source, dtype)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # in no file
            parent, _, own_name = name.rpartition(".")
            assert own_name in ("attn_mask", "position_ids"), name
            values = torch.arange(buffer.shape[-1]).expand(buffer.shape)                  # (1, tokens)
            if own_name == "attn_mask":
                values = torch.full(buffer.shape, -math.inf, dtype=dtype).triu(1)         # (tokens, tokens), open_clip's
            module.get_submodule(parent).register_buffer(own_name, values, persistent=False)
    return module.to(device)


# -- CLIPs of open_clip's class ---------------------------------------------------------------------------------------

SMALL_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))


def clip_tokenizer(context_length):
    """CLIP's own tokenizer: [str] -> (n, context_length) int64. open_clip is imported where it is needed: that takes seconds."""
    import open_clip
    return partial(open_clip.tokenize, context_length=context_length)


def check_clip_config(content):
    """open_clip's description of a small CLIP, of a JSON file's content: the fields of SMALL_CLIP, all of them and no other."""
    for fields, known in [(content, SMALL_CLIP), *((content[part], SMALL_CLIP[part]) for part in ("vision_cfg", "text_cfg"))]:
        if fields.keys() != known.keys():  # by others open_clip would fetch a model of some name, and files are data
            raise ValueError(f"expected the fields {', '.join(known)}, found {', '.join(fields)}")
    return content


def load_clip(path, config, dtype, device):
    """An open_clip CLIP as `build` makes it, random if path is None. config: open_clip's description, default ViT-H-14's."""
    import open_clip
    return build(lambda: open_clip.CLIP(**(config or open_clip.get_model_config("ViT-H-14"))), path, dtype, device)
