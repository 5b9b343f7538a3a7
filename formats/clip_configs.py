"""Structures of small CLIPs, as open_clip describes them: what the tiny world's preference model and random rewards are."""
from functools import partial

import torch

from support.files import first_line, read_json

SMALL_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16),
                  text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))


def clip_tokenizer(context_length):
    """CLIP's own tokenizer: [str] -> (n, context_length) int64. open_clip is imported where it is needed: that takes seconds."""
    import open_clip
    return partial(open_clip.tokenize, context_length=context_length)


def read_clip_config(path):
    """
    open_clip's description of a small CLIP from a JSON file: the fields of SMALL_CLIP, all of them and no other.

    ValueError for anything else. Other fields exist by which open_clip would fetch a model of some name: files are data.
    """
    import open_clip
    config = read_json(path)
    if not has_form(config, SMALL_CLIP):
        raise ValueError(f"{path}: expected a small CLIP, whole numbers as in {SMALL_CLIP}, found {str(config)[:200]}")
    try:
        with torch.device("meta"):
            open_clip.CLIP(**config)
    except Exception as error:  # each layer has its own check, if any
        raise ValueError(f"{path}: not a CLIP that can be built ({first_line(error)})") from None
    return config


def has_form(found, like, field=""):
    """Whether two JSON values have the same fields, with whole numbers above 0 in both."""
    if isinstance(like, dict):
        return isinstance(found, dict) and found.keys() == like.keys() and all(has_form(found[k], like[k], k) for k in like)
    return type(found) is int and 0 < found <= (256 if field == "layers" else 2**16)
