"""
The hpsv2 package's own score(), to check ours against.
The package (1.2.0) does not import as published, and downloads 4 GB of CLIP weights that it then replaces: neither happens here.
"""
import gzip
import io
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import torch
from PIL import Image


def import_hpsv2():
    """The hpsv2 package's modules `img_score` and `src.open_clip`. It lacks a vocabulary file, and imports tkinter's turtle."""
    import open_clip
    gzip_open, vocabulary = gzip.open, Path(open_clip.tokenizer.default_bpe())

    def open_vocabulary(path, *args):
        return gzip_open(vocabulary if Path(path).name == vocabulary.name else path, *args)

    sys.modules["turtle"] = types.SimpleNamespace(forward=None)
    try:
        with mock.patch("gzip.open", open_vocabulary), warnings.catch_warnings():  # or it mutes all our UserWarnings
            warnings.simplefilter("ignore")
            from hpsv2 import img_score
            from hpsv2.src import open_clip as fork
    finally:
        del sys.modules["turtle"]
    return img_score, fork


def official_hps(clip, clip_config=None, tokenizer=None):
    """The hpsv2 package's score(frames (S, 3, H, W) uint8, caption) -> S floats, on the float32 CLIP of `load_hpsv2(...).clip`.
    clip_config: as there; tokenizer: default the package's. On CUDA it differs more from HPSv2, since it computes in float16."""
    img_score, fork = import_hpsv2()
    with torch.device("meta"):
        model = fork.CLIP(**(clip_config or fork.get_model_config("ViT-H-14")), output_dict=True)
    model.load_state_dict(clip.state_dict(), assign=True)
    model.attn_mask = clip.attn_mask
    # score() reads its checkpoint again at every call (2 GB a caption). The weights are in place: let it read nothing.
    model.load_state_dict = lambda state_dict: None
    preprocess = fork.image_transform(model.visual.image_size, is_train=False, resize_longest_max=True)
    loaded = {"model": model, "preprocess_val": preprocess}

    def score(frames, caption):
        pictures = [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in frames]      # S of (H, W, 3)
        torch.save({"state_dict": {}}, nothing := io.BytesIO())
        nothing.seek(0)
        # For this one call: a filled model_dict keeps it from downloading LAION's CLIP, a root_path from making a cache folder.
        here = {"model_dict": loaded, "device": str(clip.logit_scale.device), "root_path": "."}
        if tokenizer:
            here["get_tokenizer"] = lambda name: tokenizer
        with mock.patch.multiple(img_score, **here), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its way to write autocast is deprecated
            return [float(s) for s in img_score.score(pictures, caption, cp=nothing)]

    return score


def official_distances(reward, sheets, sets, index):
    """[distance of our score from the package's own] of sheets {set: [videos (k, F, 3, H, W) of each model]}.
    sets: {set: prompts}, index: the frames that are scored (S,)."""
    tokenizer = reward.tokenizer if reward.clip_config else None  # a CLIP of another kind has words of its own
    score = official_hps(reward.clip, reward.clip_config, tokenizer)
    distances = []
    for name in sheets:
        for videos in sheets[name]:
            for video, prompt in zip(videos, sets[name]):
                frames = video[index].clamp(0, 1).mul(255).round().byte()               # (S, 3, H, W)
                ours = reward(frames[None].to(reward.clip.logit_scale.device) / 255, [prompt])[0].cpu()
                distances.append((ours - torch.tensor(score(frames, prompt))).abs().max().item())
    return distances
