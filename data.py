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

    clips = read_list("clips.txt")
    dataset = encode_clips(clips, ClipConfig(), encode, encode_text, "vae", "text", "cache")
    for position, index in batch_indices(step, batch_size, len(dataset), seed):
        moments, text, caption = dataset.get(index, sample_generator(seed, step, position))

Letters: B batch, n windows of a clip, F frames, C channels, H and W pixels, h and w latent pixels,
N text tokens, E their width.
"""
import functools
import json
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from support import clips as cache
from support.clips import CACHE_VERSION, describe_clips, describe_file, find_problems, leave_out, read_list, usable_clips  # noqa: F401  read_list, usable_clips: offered from here
from support.ranks import barrier, is_main_process, progress, rank_and_size, sample_generator
from support.videos import read_all_windows

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


def sample_posterior(moments, noise, scale):
    """
    z = scale (mean + std noise), float32: a sample of the autoencoder's posterior
    (autoencoder.py:20-27). scale gives z about unit variance, as the diffusion model expects.

    moments (..., 2C, F, h, w): means, then log variances; noise (..., C, F, h, w) -> z, alike.
    """
    mean, logvar = moments.float().chunk(2, dim=-4)
    std = (0.5 * logvar.clamp(-30, 20)).exp()
    return scale * (mean + std * noise)                                       # (..., C, F, h, w)


class LatentDataset:
    """
    What training sees of each clip: moments (n, 2C, F, h, w) of n windows, text (N, E), caption.

    moments, text: a tensor, or a list with an entry per clip (tensors, or cache.Stored, which are
    read when asked for); captions: list of str. ValueError unless equally many.
    """

    def __init__(self, moments, text, captions, names=()):
        if not len(moments) == len(text) == len(captions) > 0:
            raise ValueError(f"{len(moments)} moments, {len(text)} texts, {len(captions)} "
                             "captions: must be equally many, and not 0")
        self.moments, self.text, self.captions = moments, text, captions
        self.description = describe_clips(names, captions)  # to tell these clips from others

    def __len__(self):
        return len(self.captions)

    def get(self, index, generator=None):
        """moments (2C, F, h, w) of a window that `generator` draws, or the first; text; caption."""
        windows = self.moments[index]
        k = 0
        if generator is not None:
            k = int(torch.randint(len(windows), (), generator=generator))
        return windows[k], self.text[index][:], self.captions[index]


# ----------------------------------------------------------------------------------------------
# Latents and text, computed once

@dataclass(frozen=True)
class ClipConfig:
    """How clips are read. Cached moments belong to one setting."""
    num_frames: int = 16  # F (paper, Sec. 3.3)
    fps: float = 8        # frames a second, to a whole stride (official video_dataset.py:71-77)
    height: int = 256     # H (paper, Sec. 3.3)
    width: int = 256      # W (paper, Sec. 3.3)
    # Windows per clip whose moments are cached, 0.5 MB each in float32 at full size. The
    # official reader starts anywhere. Four, evenly from the first possible start to the last, show
    # most of a ten-second clip and, since nothing about them is random, serve every run.
    starts: int = 4

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} = {value}: must be above 0")


def to_unit(frames):
    """Bytes 0..255 to [-1, 1], which the autoencoder takes."""
    return frames.float() / 127.5 - 1


@torch.no_grad()
def encode_clips(clips, config, encode, encode_text, vae_name, text_name, cache_dir=None,
                 num_workers=0, max_skip=0.1) -> LatentDataset:
    """
    The dataset of all usable clips. What `cache_dir` has not got is computed now, and kept there.

    encode(frames (F, 3, H, W) in [-1, 1], on the CPU) -> moments (F, 2C, h, w); encode_text as in
    `encode_captions`. vae_name, text_name: tell weights and precision apart.
    cache_dir: None holds all in memory. With a folder, every rank encodes its share and waits.
    num_workers: processes that decode while this one encodes; they change the time alone.
    max_skip, ValueError: as usable_clips; a clip found damaged when decoded counts, too.
    """
    is_main = is_main_process()
    say = tqdm.write if is_main else lambda line: None
    paths = list(dict.fromkeys(clip.path for clip in clips))
    made_from = {path: describe_file(path, vae_name, config) for path in paths if path.is_file()}
    found = {path: cache.find_cached(cache_dir, key) for path, key in made_from.items()}

    # 1. Cached clips were checked when they were encoded. Check the others before the long work.
    problems = find_problems(clips, config, say, found)
    usable = leave_out(clips, problems, max_skip, say=lambda line: None)
    paths = list(dict.fromkeys(clip.path for clip in usable))

    # 2. Decode and encode what is missing, window by window, which bounds the memory.
    def encode_paths(missing):
        read = read_all_windows(missing, config, num_workers)
        bar = progress(read, "encoding clips", len(missing), disable=not is_main or not missing)
        for path, windows, problem in bar:
            if problem:
                problems[path] = problem
                tqdm.write(f"left out: {problem}")  # on any rank: only this one knows
                continue
            moments = [encode(to_unit(window)).transpose(0, 1) for window in windows]
            yield path, torch.stack(moments)                                  # (n, 2C, F, h, w)

    fill_cache(found, {path: made_from[path] for path in paths}, encode_paths, cache_dir)

    # 3. A clip that another rank could not read has no entry: leave it out here too.
    for path in paths:
        if found[path] is None:
            problems.setdefault(path, f"{path}: cannot be read, as another rank reports")
    clips = leave_out(clips, problems, max_skip, say)
    captions = [clip.caption for clip in clips]
    text = encode_captions(captions, encode_text, text_name, cache_dir)
    names = [clip.path.name for clip in clips]
    return LatentDataset([found[clip.path] for clip in clips], text, captions, names)


@torch.no_grad()
def encode_captions(captions, encode_text, text_name, cache_dir=None):
    """
    One entry per caption, whose [:] is its features (N, E); equal captions are computed once.

    encode_text(list of B captions) -> (B, N, E). text_name, cache_dir: as in `encode_clips`.
    """
    def encode_missing(missing):
        hidden = not is_main_process() or not missing
        for i in progress(range(0, len(missing), 64), "encoding captions", disable=hidden):
            part = missing[i:i + 64]
            yield from zip(part, encode_text(part), strict=True)

    made_from = {}
    for caption in captions:
        made_from[caption] = json.dumps([CACHE_VERSION, "text", text_name, caption])
    found = {caption: cache.find_cached(cache_dir, key) for caption, key in made_from.items()}
    fill_cache(found, made_from, encode_missing, cache_dir)
    return [found[caption] for caption in captions]


def fill_cache(found, made_from, compute, folder):
    """Compute what is missing, this rank's share of it if there is a folder to share."""
    rank, world_size = rank_and_size()
    cache.fill_cached(found, made_from, compute, folder, rank, world_size, barrier)
