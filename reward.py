"""
Score a video with an image reward on a few of its frames.

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.2.2, Eqs. (6)-(8). The image reward is HPSv2
(arXiv:2306.09341).

There was no reward model for videos when the paper was written, so it takes one for images. To
score all F frames would be costly and redundant: neighbours look alike. Segmental Video Reward
(SegVR) scores one random frame of each of S segments, which covers the whole clip. Temporally
Attenuated Reward (TAR) counts frames near the centre more than those at the ends.

    reward = load_hpsv2("HPS_v2_compressed.pt")                  # hub repository xswu/HPSv2
    g = segment_frames(num_frames=16, segments=4, batch=2)       # (B, S)
    frame_scores = reward(frames, captions)                      # (B, S, 3, H, W) -> (B, S)
    R = aggregate(frame_scores, tar_weights(g, num_frames=16))   # (B,), to be maximised

Ours differs from the official code (VGen, utils/reward/reward.py): (1) frames are picked before
they are decoded, so this file sees the S chosen frames, not all F; (2) frames are resized as HPSv2
itself does, the official code's way is preprocess="instructvideo"; (3) segments end at
floor(i F / S), so every frame can be drawn when S does not divide F; (4) Eq. (7)'s centre is F/2,
not F//2, which differ for odd F; (5) the reward is frozen.

Other rewards are in rewards/, one file each; docs/rewards.md compares them. Each maps frames
(B, S, 3, H, W) in [0, 1] and captions to scores: an image reward scores each frame -> (B, S); a
video reward is given `num_frames` of them in order -> (B, 1), and Eqs. (7) and (8) are not for it.

Letters: B videos, F frames of a video, S segments of it (one frame each), H and W pixel rows and
columns, E width of the CLIP features.
"""
import importlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F_

from formats import reward_model as published
from formats.known_rewards import HPS_FILES, find_reward, requested_rewards, split_reward
from formats.reward_model import RewardModel, check_clip_config, frames_of, load_clip
from formats.tensors import read_config
from formats.word_tokenizer import read_words
from support.tables import pixel_names

# ----------------------------------------------------------------------------------------------
# From frames to a video (Sec. 3.2.2). Frames are numbered 0..F-1.


def segment_edges(num_frames, segments):
    """
    Where segments begin and end: segment i has frames floor((i-1) F/S) to floor(i F/S) - 1.

    S + 1 frame numbers, from 0 to F. ValueError for S outside 1..F.
    """
    if not 1 <= segments <= num_frames:
        raise ValueError(f"segments = {segments}: must be from 1 to {num_frames}, "
                         "the number of frames")
    return [i * num_frames // segments for i in range(segments + 1)]


def segment_frames(num_frames, segments, batch, generator=None):
    """
    Which frames to score: g(i) uniform in [(i-1) F/S, i F/S - 1], i = 1..S (unnumbered equation).

    Random, so that over many steps every frame is scored; one of each segment, so that no part of
    the clip is left out of a step. Returns g (B, S) int64, rows increasing.
    generator: on the CPU. Give each clip its own (batch = 1), and its frames do not depend on the
    batch that it is in.
    """
    edges = segment_edges(num_frames, segments)
    g = []
    for start, end in zip(edges[:-1], edges[1:]):
        g.append(torch.randint(start, end, (batch,), generator=generator))    # (B,)
    return torch.stack(g, dim=1)                                              # (B, S)


def first_frames(num_frames, segments):
    """Where the paper measures (Sec. 3.3): the first frame of each segment, 0, 4, 8, 12 -> (S,)."""
    return torch.tensor(segment_edges(num_frames, segments)[:-1])             # (S,)


def tar_weights(index, num_frames, lambda_tar=1.0):
    """
    Eq. (7): f_i = exp(-lambda_tar |g(i) - F/2|), the weights of Temporally Attenuated Reward.

    Why does the centre count more? With equal weights (the plain mean of Eq. (6)) each scored frame
    is pushed equally hard towards its own best picture, and the paper saw twitching and colour
    jumps. With weights that fall off, frames near the ends are pushed less and stay closer to the
    base's video.

    index: g (B, S) in 0..F-1 -> f (B, S) in (0, 1]. lambda_tar = 0 gives the plain mean; ValueError
    if it is negative or not finite. F/2 is the paper's: 8 for F = 16, though frames 0..15 are
    centred on 7.5.
    """
    if not 0 <= lambda_tar < math.inf:
        raise ValueError(f"lambda_tar = {lambda_tar}: must be a finite number of at least 0")
    return torch.exp(-lambda_tar * (index - num_frames / 2).abs())            # (B, S)


def aggregate(scores, weights):
    """
    Eq. (8): R = (1/S) sum_i f_i r(x^g(i), c), one number for a video; with f = 1 it is Eq. (6).

    scores r (B, S), weights f (B, S) -> R (B,). At lambda 1 the mean weight is 0.135, so R is
    about 0.13 r. ValueError for shapes that differ.
    """
    if scores.shape != weights.shape or scores.dim() != 2:
        raise ValueError(f"scores {tuple(scores.shape)}, weights {tuple(weights.shape)}: "
                         "both must be (B, S)")
    return (weights.to(scores) * scores).mean(dim=1)                          # (B,)


# ----------------------------------------------------------------------------------------------
# The image reward r(x, c)

RESIZE = {"pad": published.letterbox, "crop": published.crop_centre, "stretch": published.stretch,
          "hpsv2": published.letterbox, "instructvideo": published.stretch}


class HPSv2(RewardModel):
    """
    Human Preference Score v2: how well people would like a picture as an answer to a caption.

    It is a CLIP fine-tuned on people's choices between pictures; the score is the cosine of a
    picture's and a caption's features. It stays frozen and in eval mode, even after .train().

    forward: frames (B, S, 3, H, W), floating, limited to [0, 1]; captions, B strings -> (B, S)
    float32 in [-1, 1], with gradient to the frames. ValueError for other shapes.

    clip: an open_clip CLIP. tokenizer: [str] -> (n, tokens) int64, default CLIP's own.
    version: "v2.0", "v2.1", "tiny" and "proxy" (small CLIPs trained the same way) or "random". Do
      not compare the published two (0.23 to 0.28, 0.15 to 0.31): report `name` with a score.
    preprocess: "pad" (black bars, the hpsv2 package's, also called "hpsv2"), "crop" (CLIP's own
      middle square) or "stretch" (the official code's, also "instructvideo"); scores differ by it,
      so `name` tells it unless it is "pad".
    clip_config: open_clip's description of a CLIP other than ViT-H-14.
    """
    VERSIONS = ("v2.0", "v2.1", "tiny", "proxy", "random")

    def __init__(self, clip, tokenizer=None, version="v2.0", preprocess="hpsv2", clip_config=None):
        if version not in self.VERSIONS:
            raise ValueError(f"HPS version {version!r}: must be one of {', '.join(self.VERSIONS)}")
        if preprocess not in RESIZE:
            raise ValueError(f"preprocess {preprocess!r}: must be one of {', '.join(RESIZE)}")
        size = clip.visual.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        if height != width:
            raise ValueError(f"the CLIP takes {height} x {width} pictures; HPSv2 needs squares")

        # What the names say where it differs from the hpsv2 package's own way.
        named = {"crop": "/crop", "stretch": "/stretch", "instructvideo": "/stretch"}
        super().__init__(f"HPS{version}{named.get(preprocess, '')}")
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer or published.clip_tokenizer(clip.context_length)
        self.size, self.clip_config, self.resize = height, clip_config, RESIZE[preprocess]

    def forward(self, frames, captions):
        # 1. Frames become the kind of picture that this CLIP was trained on.
        x = self.resize(self.pixels(frames, captions), self.size)             # (B*S, 3, size, size)
        x = published.clip_normalize(x).to(self.clip.visual.conv1.weight.dtype)

        # 2. The cosine of both features. A product and a sum rather than a matrix product, since
        #    these stay in float32 under autocast.
        image = F_.normalize(self.clip.encode_image(x).float(), dim=-1)       # (B*S, E)
        image = image.unflatten(0, frames.shape[:2])                          # (B, S, E)
        return (image * self.text_features(captions)[:, None]).sum(dim=-1)    # (B, S)

    def text_features(self, captions):
        """Unit features of captions, each computed once: [B] -> (B, E) float32, no gradient."""
        def encode(caption):
            tokens = self.tokenizer([caption]).to(self.clip.logit_scale.device)
            return F_.normalize(self.clip.encode_text(tokens).float(), dim=-1)[0]        # (E,)

        return torch.stack(self.encode_once(captions, self.clip, encode))     # (B, E)


# ----------------------------------------------------------------------------------------------
# Its weights, and other rewards

def load_hpsv2(path, version="v2.0", dtype=torch.float32, device="cpu", clip_config=None,
               tokenizer=None, preprocess="hpsv2"):
    """
    HPSv2 from its published weights: `HPS_v2_compressed.pt` (v2.0) or `HPS_v2.1_compressed.pt`
    (v2.1) of the hub repository xswu/HPSv2, the same tensors as safetensors, or the official code's
    8 GB `HPS_v2.pt` (v2.0).

    dtype: float32 is exact; float16 costs 6e-4 of score, bfloat16 1.9e-3, where differences that
    matter are 0.01. clip_config: another CLIP than ViT-H-14. ValueError: no such weights, tensors
    missing or left over, or a file that is named for the other version.
    """
    path = Path(path)
    named = "v2.1" if "v2.1" in path.name else "v2.0" if path.name.startswith("HPS_v2") else None
    if named and version in ("v2.0", "v2.1") and named != version:
        raise ValueError(f"{path.name} does not hold HPS {version}: the scores would carry the "
                         "wrong name")
    clip = load_clip(path, clip_config, dtype, device)
    return HPSv2(clip, tokenizer, version, preprocess, clip_config)


def load_reward(reward="hpsv2", weights=None, base_folder=None, dtype=torch.float32, device="cpu"):
    """
    The reward that a command line names (formats/known_rewards.py lists them).

    reward: "hpsv2" (v2.0) or "hpsv2.1", with "/crop" or "/stretch" for another preprocess; a file
      of rewards/, for some with ":" and what it is about ("yolos:book"); "my_file.py:function".
    weights: for HPSv2 a file; a folder with a small CLIP's config.json and words.txt, as the tiny
      world's; "random" (ViT-H-14) or "random:W" (small), untrained, to try the pipeline. Without
      weights: what lies in the base's own folder, else the hub's file. ValueError: nothing found.
    """
    name, argument = split_reward(reward)
    is_own = name.endswith(".py")
    path = Path(name) if is_own else find_reward(name, weights, base_folder)  # None: untrained
    if name not in (*HPS_FILES, "proxy"):
        # Imported here, on purpose: nobody pays for the others.
        module = importlib.import_module("rewards.own" if is_own else f"rewards.{name}")
        return module.load(path, argument, dtype, device)

    preprocess = argument or "pad"
    if path and (path / "words.txt").is_file():  # a small CLIP with words of its own
        config = read_config(path / "config.json", check_clip_config)
        words = read_words(path / "words.txt", config["text_cfg"])
        clip = load_clip(path, config, dtype, device)
        return HPSv2(clip, words, "proxy" if name == "proxy" else "tiny", preprocess, config)

    if path is None:
        config = None if str(weights) == "random" else published.SMALL_CLIP
        return HPSv2(load_clip(None, config, dtype, device), None, "random", preprocess, config)
    version = "v2.1" if name == "hpsv2.1" else "v2.0"
    return load_hpsv2(path, version, dtype, device, preprocess=preprocess)


# ----------------------------------------------------------------------------------------------
# Several rewards

@dataclass
class Rewards:
    """What is maximised, R = sum_k w_k R_k, and what is only measured (docs/rewards.md)."""
    summed: list                                                    # [(weight w_k, reward)]
    watched: tuple = ()                                             # rewards
    watch: tuple[str, ...] = ()                                     # all that --watch names

    @property
    def name(self):
        return " + ".join(r.name if w == 1 else f"{w:g} {r.name}" for w, r in self.summed)

    @property
    def every(self):
        """The rewards of the sum, then those that are watched."""
        return [*(reward for _, reward in self.summed), *self.watched]

    @property
    def pixels(self):
        """The watched measures of pixels, of support.tables.PIXELS."""
        return pixel_names(self.watch)

    def to(self, device):
        for reward in self.every:
            reward.to(device)


def as_rewards(reward):
    """Rewards as they are; a reward, or function, alone as their only part."""
    return reward if isinstance(reward, Rewards) else Rewards([(1., reward)])


def load_rewards(cfg, base_folder, dtype=torch.float32, device="cpu"):
    """
    All that a script's settings name.
    ValueError: fewer frames than one of them wants; two of one name, which logs would mix up.
    """
    optimised, watched, paths = requested_rewards(cfg)
    factors = [weight for weight, _ in optimised]
    loaded = []
    for asked in [*(asked for _, asked in optimised), *watched]:
        reward = load_reward(asked, paths.get(asked), base_folder, dtype, device)
        if reward.num_frames:
            frames_of(reward, cfg.frames)
        loaded.append(reward)

    names = [reward.name for reward in loaded]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards {', '.join(names)}: must have names that differ")
    return Rewards(list(zip(factors, loaded)), tuple(loaded[len(factors):]), cfg.watch)
