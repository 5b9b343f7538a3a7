"""What the tiny base brings of its own, as its `world`: clips to fine-tune on, prompts to evaluate with, and a judge."""
import torch

from data import LatentDataset
from support.ranks import progress
from support.settings import rows_columns
from tiny import world
from tiny.judge import judge_clips, load_judge

CLIP_SEED = 2_000_000  # evaluation noise has other seeds
COUNT = 192


@torch.no_grad()
def clips(base, frames, size, count=None):
    """The LatentDataset of `count` or COUNT of the world's own clips, in memory: captions of in_domain, web video's quality."""
    if not is_of_world(frames, *rows_columns(size)):
        raise ValueError(f"frames = {frames}, size = {size}: the tiny world draws {world.FRAMES} or {world.WAN_FRAMES} frames of "
                         f"{world.SIZE} x {world.SIZE} pixels; --data is needed for others")
    scenes = world.repeat(world.scenes("in_domain"), count or COUNT)
    moments = []
    for i, scene in enumerate(progress(scenes, "encoding clips", unit="clips")):
        clip, _ = world.make_clip(scene, CLIP_SEED + i, frames=frames)                                # (F, 3, H, W) in [0, 1]
        moments.append(base.encode(clip * 2 - 1).float().cpu())                           # (1, 2C, F, h, w)
    captions = [scene.caption for scene in scenes]
    return LatentDataset(moments, list(base.encode_text(captions).cpu()), captions)


def is_of_world(frames, height, width):
    return frames in (world.FRAMES, world.WAN_FRAMES) and (height, width) == (world.SIZE, world.SIZE)


def prompt_sets():
    """{set: captions} of in_domain, new and other, each in an order that is fixed and mixed."""
    sets = {}
    for name in world.PROMPT_SETS:
        captions = [scene.caption for scene in world.scenes(name)]
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
        sets[name] = [captions[i] for i in order]
    return sets


def judge(base, frames, height, width, sets):
    """judge(clips, captions) -> {measure: (B,)} if clips and all prompts {set: captions} are of this world, else None."""
    if not is_of_world(frames, height, width):
        return None
    try:
        for prompt in sum(sets.values(), []):
            world.parse(prompt)
    except ValueError:
        return None
    classifier = load_judge().to(base.device)
    return lambda clips, captions: judge_clips(classifier, clips[:, :world.FRAMES], captions)
