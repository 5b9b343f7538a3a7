"""
Video-caption pairs in, latents and text features out: the z of Eq. (5) and its caption c.

Paper: InstructVideo (arXiv:2312.12490), Sec. 3.3, which trains on 16 x 256 x 256 clips of WebVid;
any list of clips will do. The encoders are frozen, so each clip and caption is encoded once and
kept, and training needs no encoder in memory. What is kept of a clip is the autoencoder's
posterior, a mean and a variance: z is a fresh sample of it every time.

    list -> clips -> frames in [-1, 1] -> moments (cached) -> z = scale (mean + std noise)

Ours differs from the official reader (tools/datasets/video_dataset.py): (1) a clip that cannot be
read or is too short is named and left out, never replaced by black frames (there lines 49-58, 96);
(2) the resize is antialiased; (3) clips are shuffled, and ranks see different ones; (4) the random
start is one of a few per clip, those whose moments are cached.

    clips = read_list("clips.txt")  # of support/clips.py
    dataset = encode_clips(clips, ClipConfig(), base, "cache")
    for position, index in batch_indices(step, batch_size, len(dataset), seed):
        moments, text, caption = dataset.get(index, sample_generator(seed, step, position))

Letters: B batch, n windows of a clip, F frames, C channels, H and W pixels, h and w latent pixels,
N text tokens, E their width.
"""
import functools
import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from support import clips as clip_files
from support.ranks import sample_generator
from support.settings import check_at_least

# ----------------------------------------------------------------------------------------------
# Which clips, which noise


@functools.lru_cache(maxsize=2)  # two, as a batch may end one epoch and begin the next
def epoch_order(num_clips, seed, epoch) -> tuple[int, ...]:
    """A permutation of range(num_clips). The official trainer reads its list in order."""
    generator = sample_generator(seed, "epoch", epoch)
    return tuple(torch.randperm(num_clips, generator=generator).tolist())


def batch_indices(step, batch_size, num_clips, seed, rank=0, world_size=1) -> list[tuple[int, int]]:
    """
    One rank's part of the batch of one step (from 0), as (position in the whole batch, clip).

    A run's samples are one stream, epoch after epoch, and step s takes the s-th batch_size of them.
    So the whole batch depends on (seed, step) alone, which is all there is to resume, and in an
    epoch the ranks together meet every clip exactly once. A batch may hold the end of one epoch and
    the start of the next: nothing is dropped or padded.
    batch_size: of all ranks; ValueError if they cannot share it equally.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch size {batch_size} on {world_size} rank(s): must be a multiple of "
                         "the number of ranks")
    share = batch_size // world_size
    batch = []
    for position in range(rank * share, (rank + 1) * share):
        epoch, index = divmod(step * batch_size + position, num_clips)
        batch.append((position, epoch_order(num_clips, seed, epoch)[index]))
    return batch


class LatentDataset:
    """
    What training sees of each clip: moments (n, 2C, F, h, w) of n windows, text (N, E), caption.

    moments, text: a tensor, or a list with an entry per clip (tensors, or what the cache
    has, read when asked for); captions: list of str. ValueError unless equally many. Windows may be
    dicts, which bring their text along.
    """

    def __init__(self, moments, text, captions, names=()):
        if not len(moments) == len(text) == len(captions) > 0:
            raise ValueError(f"{len(moments)} moments, {len(text)} texts, {len(captions)} "
                             "captions: must be equally many, and not 0")
        self.moments, self.text, self.captions = moments, text, captions
        digest = hashlib.sha256(json.dumps([list(names), list(captions)]).encode()).hexdigest()
        self.description = {"clips": len(captions), "fingerprint": digest[:16]}

    def __len__(self):
        return len(self.captions)

    def get(self, index, generator=None):
        """moments (2C, F, h, w) of a window that `generator` draws, or the first; text; caption."""
        windows = self.moments[index]
        k = 0
        if generator is not None:
            k = int(torch.randint(len(windows), (), generator=generator))
        window = windows[k]
        if isinstance(window, dict):  # image-to-video: the text is made of the first frame
            return window.pop("moments"), window, self.captions[index]
        return window, self.text[index][:], self.captions[index]


# ----------------------------------------------------------------------------------------------
# Latents and text, computed once

@dataclass(frozen=True)
class ClipConfig:
    """How clips are read. Cached moments belong to one setting."""
    num_frames: int = 16  # F (paper, Sec. 3.3)
    fps: float = 8        # frames a second, to a whole stride (official video_dataset.py:71-77)
    height: int = 256     # H (paper, Sec. 3.3)
    width: int = 256      # W (paper, Sec. 3.3)
    # Windows per clip whose moments are cached, 0.5 MB each in float32 at full size. Four, evenly
    # from the first possible start to the last, show most of a ten-second clip and serve every run.
    starts: int = 4

    def __post_init__(self):
        check_at_least(self, *asdict(self))


def encode_clips(clips, config, base, cache_dir=None, num_workers=0, max_skip=0.1) -> LatentDataset:
    """
    The dataset of all usable clips. What `cache_dir` has not got is computed now, and kept there.

    base: encode(frames (F, 3, H, W) in [-1, 1], on the CPU) -> moments (1, 2C, f, h, w),
      encode_captions(list of B) -> (B, N, E), is_cut(caption), and fingerprints() of both.
    cache_dir: None holds all in memory. With a folder, every rank encodes its share and waits.
    num_workers: processes that decode while this one encodes; they change the time alone.
    max_skip: the share of the list, 0 to 1, that may be left out, each clip with its reason; 0.1
      forgives a few bad downloads, not a wrong folder. ValueError: more than that, or all.
    """
    return LatentDataset(*clip_files.encode_clips(clips, config, base, cache_dir, num_workers,
                                                  max_skip))
