"""
Score a video with an image reward model on a few of its frames: Segmental Video Reward, Temporally Attenuated Reward.

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.2.2, Eqs. (6)-(8); the image reward is HPSv2 (arXiv:2306.09341).
Ours differs from the official code (VGen, utils/reward/reward.py): (1) frames are picked before they are decoded, so
this file sees the S chosen frames, not all F; (2) frames are resized as HPSv2 itself does, the official code's way is
`preprocess="instructvideo"`; (3) segments end at floor(i F / S), so every frame can be drawn when S does not divide F;
(4) Eq. 7's centre is F/2, not F//2 (they differ for odd F); (5) the reward is frozen; (6) nothing is downloaded.

    reward = load_hpsv2("HPS_v2_compressed.pt")                  # hub repository xswu/HPSv2
    g = segment_frames(num_frames=16, segments=4, batch=2)       # (B, S)
    r = reward(frames, captions)                                 # (B, S, 3, H, W) in [0, 1], [B] -> (B, S)
    R = aggregate(r, tar_weights(g, num_frames=16))              # (B,), to be maximised

Letters: B videos, F frames of a video, S segments of it (one frame each), H and W pixel rows and columns, N pictures,
D width of the CLIP features.
"""
import gzip
import io
import math
import re
import sys
import types
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import huggingface_hub
import open_clip
import torch
import torch.nn.functional as F_
from PIL import Image
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# From frame rewards to a video reward (Sec. 3.2.2). Frames are numbered 0..F-1.

def segment_edges(num_frames, segments):
    """S + 1 edges: segment i = 1..S holds frames floor((i-1) F/S) to floor(i F/S) - 1. S outside 1..F: ValueError."""
    if not 1 <= segments <= num_frames:
        raise ValueError(f"segments is {segments}; allowed are 1 to {num_frames}, the number of frames")
    return [i * num_frames // segments for i in range(segments + 1)]


def segment_frames(num_frames, segments, batch, generator=None):
    """
    Segmental sparse sampling: g(i) uniform in [(i-1) F/S, i F/S - 1], i = 1..S (Sec. 3.2.2, unnumbered).

    num_frames F, segments S in 1..F (else ValueError), batch B, generator on the CPU -> (B, S) int64, rows increasing.
    Give each clip its own generator (batch=1), and its frames do not depend on its neighbours in the batch.
    """
    edges = segment_edges(num_frames, segments)
    g = [torch.randint(start, end, (batch,), generator=generator) for start, end in pairwise(edges)]
    return torch.stack(g, dim=1)                                                            # (B, S)


def first_frames(num_frames, segments):
    """The first frame of each segment, where the paper measures: 0, 4, 8, 12 for F = 16, S = 4 -> (S,) int64."""
    return torch.tensor(segment_edges(num_frames, segments)[:-1])                           # (S,)


def tar_weights(index, num_frames, lambda_tar=1.0):
    """
    Temporally Attenuated Reward, Eq. (7): f_i = exp(-lambda_tar |g(i) - F/2|).

    index g (B, S) in 0..F-1; lambda_tar finite and not negative (else ValueError), 1 in the paper -> (B, S) in (0, 1].
    lambda_tar 0 makes Eq. 8 the plain mean. F/2 is the paper's: 8 for F = 16, though frames 0..15 are centred on 7.5.
    """
    if not (math.isfinite(lambda_tar) and lambda_tar >= 0):
        raise ValueError(f"lambda_tar is {lambda_tar}; allowed are finite numbers from 0 (the plain mean) up")
    return torch.exp(-lambda_tar * (index - num_frames / 2).abs())                          # (B, S)


def aggregate(scores, weights):
    """R = (1/S) sum_i f_i r_i, Eq. (8). scores r (B, S), weights f (B, S) -> (B,). Shapes that differ: ValueError."""
    if scores.shape != weights.shape or scores.dim() != 2:
        raise ValueError(f"scores {tuple(scores.shape)}, weights {tuple(weights.shape)}; allowed is (B, S) for both")
    return (weights.to(scores) * scores).mean(dim=1)                                        # (B,)


# ---------------------------------------------------------------------------------------------------------------------
# What HPSv2 sees: pictures in [0, 1] made into the kind its CLIP was trained on

def limit(x):
    """
    x limited to [0, 1]; a pixel outside gets no gradient (official code: reward.py:147), one at exactly 0 or 1 does.

    That is clamp() as it was when the official code was written; torch 2.15's gives no gradient at the limits either.
    """
    return torch.where((x >= 0) & (x <= 1), x, x.detach().clamp(0, 1))


def letterbox(x, size):
    """
    HPSv2's own resize: longest side to `size`, then black bars. x (N, 3, H, W) -> (N, 3, size, size).

    Follows ResizeMaxSize on float tensors (hpsv2 1.2.0, src/open_clip/transform.py:26): bicubic, antialiased, and its
    overshoot outside [0, 1] is kept. The bars are 0 before CLIP's mean is subtracted: black, not grey.
    """
    H, W = x.shape[-2:]
    scale = size / max(H, W)
    h, w = round(H * scale), round(W * scale)  # the package's order of operations, so that ties round alike
    x = F_.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=True)      # (N, 3, h, w)
    top, left = (size - h) // 2, (size - w) // 2
    return F_.pad(x, (left, size - w - left, top, size - h - top))                          # (N, 3, size, size)


def stretch(x, size):
    """
    The official InstructVideo code's resize (utils/reward/reward.py:79). x (N, 3, H, W) -> (N, 3, size, size).

    Bilinear and not antialiased: what torchvision 0.13, which VGen installs, does to tensors. The official code resizes
    the shorter side and so takes square videos only; others are stretched here.
    """
    return F_.interpolate(x, (size, size), mode="bilinear", align_corners=False)


RESIZE = {"hpsv2": letterbox, "instructvideo": stretch}


def clip_normalize(x):
    """Subtract CLIP's channel means, divide by its deviations. x (N, 3, H, W) in [0, 1] -> (N, 3, H, W)."""
    mean, std = torch.tensor([open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD]).to(x)[..., None, None]
    return (x - mean) / std


class HPSv2(nn.Module):
    """
    Human Preference Score v2 (arXiv:2306.09341): the cosine of a picture's and a caption's CLIP features, not scaled.

    clip: an open_clip CLIP of any size; it is frozen here and stays in eval mode, even after .train().
    tokenizer: [str] -> (n, tokens) int64; default is CLIP's own, at the model's context length.
    version: "v2.0", "v2.1", "tiny" (a small CLIP trained the same way) or "random"; `name` (HPSv2.0, ...) belongs beside every
      score: v2.0 gives about 0.23-0.28, v2.1 0.15-0.31, and the two do not compare.
    preprocess: "hpsv2" (letterbox) or "instructvideo" (stretch).
    clip_config: open_clip's description of a CLIP other than ViT-H-14, kept for `official_hps`.

    forward: frames (B, S, 3, H, W), floating, in [0, 1] and limited to it; captions, B strings -> (B, S) float32 in
    [-1, 1]. Weights of any precision; features are normalised and multiplied in float32. Other shapes: ValueError.
    """
    VERSIONS = ("v2.0", "v2.1", "tiny", "random")

    def __init__(self, clip, tokenizer=None, version="v2.0", preprocess="hpsv2", clip_config=None):
        super().__init__()
        if version not in self.VERSIONS:
            raise ValueError(f"unknown HPS version {version!r}; allowed are {', '.join(self.VERSIONS)}")
        if preprocess not in RESIZE:
            raise ValueError(f"unknown preprocess {preprocess!r}; allowed are {', '.join(RESIZE)}")
        size = clip.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        if height != width:
            raise ValueError(f"the CLIP takes {height} x {width} pictures; HPSv2 needs one that takes squares")
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer or partial(open_clip.tokenize, context_length=clip.context_length)
        self.name, self.size, self.resize, self.clip_config = f"HPS{version}", height, RESIZE[preprocess], clip_config
        self._texts, self._texts_of = {}, None

    def train(self, mode=True):
        """Stays in eval mode: a trainer's model.train() must not wake dropout in the reward."""
        return super().train(False)

    def text_features(self, captions):
        """Unit features of captions, each computed once and kept. B strings -> (B, D) float32, without gradient."""
        # What is kept belongs to exactly these weights: moving, casting or loading changes an address or a version.
        weights = [(p.data_ptr(), p._version) for p in self.clip.parameters()]
        if weights != self._texts_of:
            self._texts, self._texts_of = {}, weights
        device = self.clip.logit_scale.device
        # One caption at a time and outside autocast, so that not even the last bit of its features depends on its
        # company: a resumed run meets the same captions in other batches.
        place = "cpu" if device.type == "meta" else device.type  # autocast knows no meta device, where work is only counted
        with torch.no_grad(), torch.autocast(place, enabled=False):
            for caption in captions:
                if caption not in self._texts:
                    text = self.clip.encode_text(self.tokenizer([caption]).to(device))      # (1, D)
                    self._texts[caption] = F_.normalize(text.float(), dim=-1)[0]            # (D,)
        return torch.stack([self._texts[caption] for caption in captions])                  # (B, D)

    def forward(self, frames, captions):
        if frames.dim() != 5 or frames.shape[2] != 3 or not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; allowed are floating (B, S, 3, H, W)")
        if isinstance(captions, str) or len(captions) != len(frames):
            raise ValueError(f"captions are {captions!r:.80}; allowed is a list of {len(frames)}, one per video")
        x = self.resize(limit(frames.flatten(0, 1).float()), self.size)                     # (B*S, 3, size, size)
        x = clip_normalize(x).to(self.clip.visual.conv1.weight.dtype)
        image = F_.normalize(self.clip.encode_image(x).float(), dim=-1)                     # (B*S, D)
        image = image.unflatten(0, frames.shape[:2])                                        # (B, S, D)
        # A product and a sum rather than a matrix product: these stay in float32 under autocast.
        return (image * self.text_features(captions)[:, None]).sum(dim=-1)                  # (B, S)


def load_hpsv2(path, version="v2.0", dtype=torch.float32, device="cpu", clip_config=None, tokenizer=None,
               preprocess="hpsv2"):
    """
    HPSv2 from its published weights, without any download: `HPS_v2_compressed.pt` (v2.0) or `HPS_v2.1_compressed.pt`
    (v2.1) of the hub repository xswu/HPSv2, the same tensors as safetensors, or the official code's 8 GB `HPS_v2.pt` (v2.0).

    dtype: of the weights; float32 is exact, all of it in float16 costs 6e-4 of score, in bfloat16 1.9e-3 (differences
      that matter are 0.01). clip_config: open_clip's description of another CLIP; default ViT-H-14, with plain GELU.
    ValueError: no checkpoint, or one that would run code (none is run); missing, unused or misshapen tensors, by name;
      a file that is named for the other version.
    """
    path = Path(path)
    named = "v2.1" if "v2.1" in path.name else "v2.0" if path.name.startswith("HPS_v2") else None
    if named and version in ("v2.0", "v2.1") and named != version:
        raise ValueError(f"{path.name} does not hold HPS {version}: the scores would carry the wrong name")
    from model import load_strict, read_tensors  # here, because scoring needs no checkpoint reader
    tensors = read_tensors(path)
    with torch.device("meta"):  # no memory and no random numbers for weights that the file brings
        clip = open_clip.CLIP(**(clip_config or open_clip.get_model_config("ViT-H-14")))
    load_strict(clip, tensors, f"HPSv2 {path}", dtype)
    if clip.attn_mask is not None:  # in no file: -inf above the diagonal, as open_clip's build_causal_mask makes it
        clip.attn_mask = torch.full(clip.attn_mask.shape, -math.inf).triu(1)                # (tokens, tokens)
    return HPSv2(clip.to(device=device, dtype=dtype), tokenizer, version, preprocess, clip_config)


HUB_REWARDS = {  # version and files of xswu/HPSv2; the first is downloaded, any may lie in the base's folder
    "hpsv2": ("v2.0", ("HPS_v2_compressed.pt", "HPS_v2.pt")), "hpsv2.1": ("v2.1", ("HPS_v2.1_compressed.pt",))}
SMALL_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))


def load_reward(kind="hpsv2", weights=None, base_folder=None, dtype=torch.float32, device="cpu"):
    """
    The reward a script names. weights: a file; a folder with a small CLIP's config.json and words.txt, as the tiny world's; or
    "random" (ViT-H-14) or "random:W" (small), untrained, to try the pipeline.

    Without weights, the reward that lies in the base's own folder (the tiny world's, or InstructVideo's HPS_v2.pt) or beside
    it, else the hub's file of that kind. ValueError: unknown kind, no network and no cache, or as load_hpsv2.
    """
    from model import first_line, read_words
    if kind not in HUB_REWARDS:
        raise ValueError(f"reward {kind!r}: allowed are {', '.join(HUB_REWARDS)}")
    version, names = HUB_REWARDS[kind]
    if weights and re.fullmatch(r"random(:\d+)?", str(weights)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = open_clip.get_model_config("ViT-H-14") if str(weights) == "random" else SMALL_CLIP
            return HPSv2(open_clip.CLIP(**config).to(device=device, dtype=dtype), version="random", clip_config=config)
    small = Path(weights) if weights else base_folder and base_folder / "reward"
    if small and (small / "words.txt").is_file():
        config, words = read_clip_config(small / "config.json"), read_words(small / "words.txt")
        words.check_fit(small, config["text_cfg"]["vocab_size"], config["text_cfg"]["context_length"])
        return load_hpsv2(small, "tiny", dtype, device, config, words)
    if not weights and base_folder:
        places = [folder / name for folder in (base_folder, base_folder.absolute().parent) for name in names]
        weights = next((path for path in places if path.is_file()), None)
    if not weights:
        try:
            weights = huggingface_hub.hf_hub_download("xswu/HPSv2", names[0])
        except Exception as error:  # no network: httpx, OSError or a hub error, by version
            raise ValueError(f"reward {kind}: cannot be downloaded ({first_line(error)}); get {names[0]} from the hub repository "
                             "xswu/HPSv2 and give its path as --reward-weights") from None
    return load_hpsv2(weights, version, dtype, device)


def read_clip_config(path):
    """
    open_clip's description of a small CLIP from a JSON file: the fields of SMALL_CLIP, all of them and no other.

    ValueError for anything else. Other fields exist by which open_clip would fetch a model of some name: files are data.
    """
    from model import first_line, read_json

    def fits(found, like, field):
        if isinstance(like, dict):
            return isinstance(found, dict) and found.keys() == like.keys() and all(fits(found[k], like[k], k) for k in like)
        return type(found) is int and 0 < found <= (256 if field == "layers" else 2**16)
    config = read_json(path)
    if not fits(config, SMALL_CLIP, ""):
        raise ValueError(f"{path}: expected a small CLIP, whole numbers as in {SMALL_CLIP}, found {str(config)[:200]}")
    try:
        with torch.device("meta"):
            open_clip.CLIP(**config)
    except Exception as error:  # each layer has its own check, if any
        raise ValueError(f"{path}: not a CLIP that can be built ({first_line(error)})") from None
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The hpsv2 package's own score(), to check ours against

def import_hpsv2():
    """
    The hpsv2 package's modules `img_score` and `src.open_clip`, its fork. The wheel (1.2.0) does not import as it is:
    it lacks a vocabulary file, of which open_clip has the same bytes, and `from turtle import forward` needs tkinter.
    Both are bridged while importing; nothing installed is touched.
    """
    gzip_open, vocabulary = gzip.open, Path(open_clip.tokenizer.default_bpe())

    def open_vocabulary(path, *args, **kwargs):
        missing = Path(path).name == vocabulary.name and not Path(path).exists()
        return gzip_open(vocabulary if missing else path, *args, **kwargs)

    turtle, sys.modules["turtle"] = sys.modules.get("turtle"), types.ModuleType("turtle")
    sys.modules["turtle"].forward = None
    try:
        with mock.patch("gzip.open", open_vocabulary), warnings.catch_warnings():  # or it mutes all our UserWarnings
            warnings.simplefilter("ignore")
            from hpsv2 import img_score
            from hpsv2.src import open_clip as fork
    finally:
        del sys.modules["turtle"]
        if turtle is not None:
            sys.modules["turtle"] = turtle
    return img_score, fork


def official_hps(clip, clip_config=None, tokenizer=None):
    """
    The hpsv2 package's own scorer, model class and preprocessing, on weights that are already loaded. No download.

    clip: the float32 CLIP of `load_hpsv2(...).clip`, whose memory is shared; clip_config: as there; tokenizer: for a CLIP with
      words of its own, else the package's.
    Returns score(frames, caption): frames (S, 3, H, W) uint8, or S PIL images, of one video -> S floats.
    It agrees with HPSv2 on the same 8-bit frames; on CUDA less closely, since there the package computes in float16.
    ValueError: weights that are not float32; frames that are not 8-bit.
    """
    if {p.dtype for p in clip.parameters()} != {torch.float32}:
        raise ValueError("the hpsv2 package scores in float32; load the weights with dtype=torch.float32")
    img_score, fork = import_hpsv2()
    with torch.device("meta"):
        model = fork.CLIP(**(clip_config or fork.get_model_config("ViT-H-14")), output_dict=True)
    model.load_state_dict(clip.state_dict(), assign=True)
    model.attn_mask = clip.attn_mask
    # score() reads its checkpoint again at every call (2 GB a caption). The weights are in place: let it read nothing.
    model.load_state_dict = lambda state_dict: None
    loaded = {"model": model}
    loaded["preprocess_val"] = fork.image_transform(model.visual.image_size, is_train=False, resize_longest_max=True)

    def score(frames, caption):
        if isinstance(frames, torch.Tensor):
            if frames.dtype != torch.uint8:
                raise ValueError(f"frames are {frames.dtype}; the hpsv2 package scores 8-bit pictures")
            frames = [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in frames]    # S of (H, W, 3)
        torch.save({"state_dict": {}}, nothing := io.BytesIO())
        nothing.seek(0)
        # The package's globals for this one call: a filled model_dict keeps it from downloading LAION's CLIP, an
        # existing root_path from making a cache folder.
        here = {"model_dict": loaded, "device": str(clip.logit_scale.device), "root_path": "."}
        if tokenizer:
            here["get_tokenizer"] = lambda name: tokenizer
        with mock.patch.multiple(img_score, **here), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its way to write autocast is deprecated
            return [float(s) for s in img_score.score(list(frames), caption, cp=nothing)]

    return score
