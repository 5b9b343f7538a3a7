"""What the tiny world gives to the scripts: fine-tuning clips, and prompts to evaluate with."""
import torch

from data import LatentDataset
from support.ranks import is_main_process, progress
from tiny.world import make_clip, scenes

CLIP_SEED = 2_000_000  # evaluation noise has other seeds


@torch.no_grad()
def tiny_clips(base, dtype, count=192):
    """The LatentDataset of the world's own clips, in memory: captions of in_domain, of web video's quality."""
    every = scenes("in_domain")
    chosen = [every[i % len(every)] for i in range(count)]
    moments = []
    for i, scene in enumerate(progress(chosen, "encoding clips", disable=not is_main_process())):
        clip, _ = make_clip(scene, CLIP_SEED + i)                                         # (F, 3, H, W) in [0, 1]
        encoded = base.vae.encode(clip.to(base.device, dtype) * 2 - 1)                    # (F, 2C, h, w)
        moments.append(encoded.float().transpose(0, 1).cpu()[None])                       # (1, 2C, F, h, w)
    captions = [scene.caption for scene in chosen]
    return LatentDataset(moments, list(base.encode_text(captions).cpu()), captions)


def prompt_sets():
    """{set: captions} of in_domain, new and other, each in an order that is fixed and mixed."""
    sets = {}
    for name in ("in_domain", "new", "other"):
        captions = [s.caption for s in scenes(name)]
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
        sets[name] = [captions[i] for i in order]
    return sets
