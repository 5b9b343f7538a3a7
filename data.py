"""
Video-caption pairs in, latents and text embeddings out: the z and c of Eq. (5), computed once and kept, so that training needs
no encoder in memory.
Paper: InstructVideo (arXiv:2312.12490), which trains on 16 x 256 x 256 clips of WebVid; any list of clips will do.

    list -> clips -> frames in [-1, 1] -> posterior moments (cached) -> z = scale (mean + std noise), noise fresh every time

Ours differs from the official reader, tools/datasets/video_dataset.py: (1) a clip that cannot be read or is too short is named
and left out, never replaced by black frames (there lines 49-58, 96); (2) the resize is antialiased; (3) clips are shuffled, and
ranks see different ones; (4) the random start is one of a few per clip, those whose moments are cached.

    dataset = encode_clips(read_list("clips.txt"), ClipConfig(), encode, encode_text, "vae name", "text name", "cache")
    for position, index in batch_indices(step, batch_size, len(dataset), seed):
        moments, text, caption = dataset.get(index, sample_generator(seed, step, position))

Letters: B batch, K windows, F frames, C channels, H and W pixels, h and w latent pixels, N text tokens.
"""
import csv
import functools
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import av  # comes with imageio's pyav plugin; used directly, since it can stop early and tells which frames are damaged
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# ----------------------------------------------- Lists of clips -----------------------------------------------

SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".gif")
FORMS = {
    ".csv": "a first line naming the columns, path and caption among them; one clip per line; captions with commas in quotes",
    ".jsonl": 'one {"path": "...", "caption": "..."} per line',
    "": "one relative/path.mp4|||caption per line, or relative/path.mp4|||caption|||frame count",
}


@dataclass(frozen=True)
class Clip:
    """One line of a list: a file of footage, what it shows, and what the list says of its length."""
    path: Path
    caption: str
    num_frames: int | None = None
    """what the list claims. Kept, not used: official prompt lists say 16, the length of the video to generate, beside the name
    of a far longer clip, and the official code drops it (inference_instructvideo_entrance.py). Files are counted instead"""


def read_list(path, root=None) -> list[Clip]:
    """
    The clips of a list, in its order. Videos are not looked at, so prompt lists without any can be read too.

    path: a .csv, a .jsonl or else a list in the official form (see FORMS; the first two may have a num_frames column too); or a
    folder, searched through for videos with a caption each, in a .txt file of the same name.
    root: the folder that paths in a file start from (default: the list's own).
    ValueError: an empty or malformed list; it names file and line, or the clip, and says what is allowed.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such list of clips, nor a folder of them")
    form = path.suffix.lower() if path.suffix.lower() in FORMS else ""
    clips, columns = [], None
    for number, line in enumerate(_text(path).split("\n"), 1):
        try:
            if form == ".csv" and columns is None:
                columns = [name.strip() for name in next(csv.reader([line]), [])]
            elif line.strip():
                row = _fields(line.strip(), form, columns)
                clips.append(_clip(Path(root or path.parent), row.get("path"), row.get("caption"), row.get("num_frames")))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}. Allowed: {FORMS[form]}") from None
    if not clips:
        raise ValueError(f"{path}: an empty list. Allowed: {FORMS[form]}")
    return clips


def _fields(line, form, columns):
    if form == ".jsonl":
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"no path and caption in {line[:80]!r}")
        return row
    fields = next(csv.reader([line], strict=True)) if form == ".csv" else line.split("|||")
    columns = columns or ["path", "caption", "num_frames"][: max(2, len(fields))]
    if len(fields) != len(columns):
        raise ValueError(f"{len(fields)} field(s) in {line[:80]!r}")
    return dict(zip(columns, fields, strict=True))


def _clip(root, path, caption, num_frames=None):
    for value in (path, caption):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"clip {path!r} has caption {caption!r}, and neither may be empty")
    if num_frames not in (None, "") and not (str(num_frames).strip().isdecimal() and int(num_frames)):
        raise ValueError(f"clip {path!r} has frame count {num_frames!r}, which is no whole number above 0")
    return Clip(root / path.strip(), caption.strip(), int(num_frames) if num_frames else None)


def _read_folder(folder):
    clips = []
    for path in sorted(folder.rglob("*")):
        name, caption = path.relative_to(folder), path.with_suffix(".txt")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in name.parts):  # macOS: ._clip.mp4
            if not caption.is_file():
                raise ValueError(f"{path}: no caption. Allowed: a text file {caption.name} beside it")
            clips.append(_clip(folder, str(name), _text(caption)))
    if not clips:
        raise ValueError(f"{folder}: no clips in this folder. Allowed: {' '.join(SUFFIXES)}, each with a .txt caption")
    return clips


def _text(path):
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig drops the byte order mark that some editors put first
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None


# ----------------------------------------------- Frames of a clip -----------------------------------------------


@dataclass(frozen=True)
class ClipConfig:
    """How clips are read. Cached moments belong to one setting."""
    num_frames: int = 16
    """F (paper)"""
    fps: float = 8
    """frames a second, as near as a whole stride gets (official video_dataset.py:71-77)"""
    height: int = 256
    """H (paper)"""
    width: int = 256
    """W (paper)"""
    starts: int = 4
    """K, windows per clip whose moments are cached, 0.25 MB each in 16 bits at full size. The official reader starts anywhere;
    four, evenly from the first possible start to the last, show most of a ten-second clip and, unseeded, serve every run"""

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; allowed: above 0")


@contextmanager
def _video(path):
    """Container and first video stream of a file. What FFmpeg dislikes, then or later, is a ValueError naming the clip."""
    if not os.path.isfile(path):  # lists are other people's data, and FFmpeg would fetch a URL
        raise ValueError(f"{path}: cannot be read: no such file")
    try:
        with av.open(os.path.abspath(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: cannot be read: no video in it")
            # By default a decoder hides damage, making up what is missing from neighbouring frames. With this it stops at most of
            # it, and marks some of the rest (is_corrupt, below).
            stream = container.streams.video[0]
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1  # worker processes take a clip each
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _measure(path, config, count=None):
    """(last possible start, stride), in frames of the file. Too short: ValueError. count: how many it has, if that is known."""
    with _video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate  # of a variable rate, the mean
        if not rate:
            raise ValueError(f"{path}: cannot be read: no frame rate")
        if count is None:  # by its packets, which takes milliseconds: the header of a truncated file promises too many
            packets = container.demux(stream)
            count = sum(1 for packet in packets if packet.size and not packet.is_discard and not packet.is_corrupt)
    stride = max(1, round(rate / config.fps))  # a clip slower than 8 a second is taken as it is
    needed = (config.num_frames - 1) * stride + 1
    if count < needed:
        raise ValueError(f"{path}: too short: {config.num_frames} frames at {config.fps:g} a second need {needed} "
                         f"at its {float(rate):g} a second, found {count}")
    return count - needed, stride


def _windows(path, config, pick, count=None):
    """
    Windows of one clip, (K, F, 3, H, W) uint8, at the starts that pick(last possible start) lists.

    One pass, from the first frame to the last one needed: windows overlap, and most clips have few key frames to jump to.
    """
    last, stride = _measure(path, config, count)
    windows = [[start + i * stride for i in range(config.num_frames)] for start in pick(last)]
    wanted = {index for window in windows for index in window}
    end, frames, seen = max(wanted), {}, 0
    with _video(path) as (container, stream):
        packets = (packet for packet in container.demux(stream) if not packet.is_corrupt)  # the last one of a truncated file
        for seen, frame in enumerate((frame for packet in packets for frame in packet.decode()), 1):
            if seen - 1 in wanted:
                frames[seen - 1] = _fit(frame, path, config)
            if seen > end:
                break
    if len(frames) < len(wanted):  # two-pass VP8, for one, has packets that show nothing: choose again, among the real frames
        return _windows(path, config, pick, count=seen)
    return torch.stack([torch.stack([frames[index] for index in window]) for window in windows])  # (K, F, 3, H, W)


def _fit(frame, path, config):
    """One decoded frame, upright, resized until it just covers H x W, cropped around its centre -> (3, H, W) uint8."""
    if frame.is_corrupt:
        raise ValueError(f"{path}: cannot be read: a damaged frame")
    # rgb24 from whatever the file has, grey included. Phones store portrait video lying down, with the angle beside it.
    # One thread: starting more, for every frame, takes longer than the conversion.
    image = frame.to_ndarray(format="rgb24", threads=1)                         # (H', W', 3), of the file's own size
    image = np.rot90(image, round(frame.rotation / 90)).copy()
    scale = max(config.height / image.shape[0], config.width / image.shape[1])
    height, width = max(config.height, round(image.shape[0] * scale)), max(config.width, round(image.shape[1] * scale))
    x = torch.from_numpy(image).permute(2, 0, 1)[None]                          # (1, 3, H', W')
    x = F.interpolate(x, (height, width), mode="bilinear", antialias=True)      # of bytes: several times faster than of floats
    top, left = (height - config.height) // 2, (width - config.width) // 2
    return x[0, :, top:top + config.height, left:left + config.width]           # (3, H, W)


def read_clip(path, config=ClipConfig(), start=None, generator=None):
    """
    The frames of one clip, (F, 3, H, W) float32 RGB in [-1, 1]: every round(rate / fps)-th frame of the file.

    start: first frame, counted in the file; by default one that `generator` draws, all possible ones equally likely, or 0.
    ValueError names the clip: it cannot be read, is damaged, is too short (frames needed and found), or has no such start.
    Official: tools/datasets/video_dataset.py:71-77, where no window reaches the last 5 frames.
    """
    u = 0 if generator is None else torch.rand((), generator=generator).item()

    def pick(last):
        if start is not None and not 0 <= start <= last:
            raise ValueError(f"{path}: no start at {start}; allowed: 0 to {last}")
        return [int(u * (last + 1)) if start is None else start]

    return _unit(_windows(path, config, pick)[0])


def _unit(frames):
    return frames.float() / 127.5 - 1  # 0..255 -> -1..1


def usable_clips(clips, config=ClipConfig(), max_skip=0.1) -> list[Clip]:
    """
    The clips that open and are long enough. Prints the names of the others, with the reason, and how many are left.

    Counts packets and decodes nothing: damage inside a file shows when its frames are read.
    max_skip: the share of the list, 0 to 1, that may be left out. 0.1 forgives a few bad downloads, not a wrong folder.
    ValueError: more than that, or all.
    """
    return _leave_out(clips, _problems(dict.fromkeys(clip.path for clip in clips), config), max_skip)


def _problems(paths, config, say=tqdm.write):
    problems = {}
    for path in paths:
        try:
            _measure(path, config)
        except ValueError as error:
            problems[path] = str(error)
            say(f"left out: {error}")
    return problems


def _leave_out(clips, problems, max_skip, say=tqdm.write):
    good = [clip for clip in clips if clip.path not in problems]
    bad = len(clips) - len(good)
    if not good or not bad <= max_skip * len(clips):
        raise ValueError(f"{bad} of {len(clips)} clips cannot be used; allowed: {max_skip:.0%}, and not all (--max-skip). "
                         f"The first: {next(iter(problems.values()), 'none given')}")
    say(f"{len(good)} of {len(clips)} clips can be used")
    return good


# ------------------------------------------- Which clips, which noise -------------------------------------------


def sample_generator(seed, *key):
    """
    A CPU generator that depends on nothing but (seed, *key), whole numbers and words: say (seed, step, position in the batch).

    Randomness then belongs to the sample: the same in any batch, on any number of ranks, before and after resuming.
    """
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()  # hashed: neighbouring seeds stay unrelated
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator uses 32 bits of a seed


@functools.lru_cache(maxsize=2)  # two, as a batch may end one epoch and begin the next
def epoch_order(num_clips, seed, epoch) -> tuple[int, ...]:
    """A permutation of range(num_clips), by (seed, epoch). The official trainer reads the list in order, on every rank."""
    return tuple(torch.randperm(num_clips, generator=sample_generator(seed, "epoch", epoch)).tolist())


def batch_indices(step, batch_size, num_clips, seed, rank=0, world_size=1) -> list[tuple[int, int]]:
    """
    One rank's part of the batch of one step (from 0), as (position in the whole batch, clip); batch_size is that of all ranks.

    A run's samples are one stream, epoch after epoch, and step s takes the s-th batch_size of them. So the whole batch depends
    on (seed, step) only, which is all there is to resume, and in an epoch the ranks together meet every clip exactly once.
    Where batches do not divide the epoch, one holds the end of it and the start of the next: nothing is dropped or padded.
    ValueError: a batch that the ranks cannot share equally.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch size {batch_size} on {world_size} rank(s); allowed: a multiple of the number of ranks")
    share = batch_size // world_size
    batch = []
    for position in range(rank * share, (rank + 1) * share):
        epoch, place = divmod(step * batch_size + position, num_clips)
        batch.append((position, epoch_order(num_clips, seed, epoch)[place]))
    return batch


# ---------------------------------------- Latents and text, computed once ----------------------------------------


class LatentDataset:
    """
    What training sees of each clip: moments (K, 2C, F, h, w) of its K >= 1 windows, text (N, C), caption.

    moments, text: one tensor, or a list with an entry per clip, tensors or `Stored` ones; captions: list of str.
    """

    def __init__(self, moments, text, captions):
        if not len(moments) == len(text) == len(captions) > 0:
            raise ValueError(f"{len(moments)} moments, {len(text)} texts, {len(captions)} captions; "
                             "allowed: equally many, not 0")
        self.moments, self.text, self.captions = moments, text, captions

    def __len__(self):
        return len(self.captions)

    def get(self, index, generator=None):
        """moments (2C, F, h, w) of the window that `generator` draws (default: the first), text (N, C), caption; as stored."""
        windows = self.moments[index]
        k = 0 if generator is None else int(torch.randint(len(windows), (), generator=generator))
        return windows[k], self.text[index][:], self.captions[index]


def sample_posterior(moments, noise, scale):
    """
    z = scale (mean + std noise), float32: a sample of the autoencoder's posterior. Official: autoencoder.py:20-27.

    moments (..., 2C, F, h, w): means, then log variances; noise (..., C, F, h, w) -> z, of that shape. scale: VAEConfig.scale.
    """
    mean, logvar = moments.float().chunk(2, dim=-4)
    return scale * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise)


@torch.no_grad()
def encode_clips(clips, config, encode, encode_text, vae_name, text_name, cache_dir=None, num_workers=0, max_skip=0.1,
                 rank=0, world_size=1, barrier=lambda: None) -> LatentDataset:
    """
    The dataset of all usable clips. What `cache_dir` has not got is computed now, and kept there.

    encode(frames (F, 3, H, W) in [-1, 1], on the CPU) -> moments (F, 2C, h, w); encode_text as in `encode_captions`. Called for
    what is missing only, so an encoder may be loaded at the first call. vae_name, text_name: tell weights and precision apart.
    cache_dir: None holds all in memory. In a folder nothing is deleted: what other settings or since replaced clips left stays.
    num_workers: processes that decode while this one encodes. They change the time, not the result.
    rank, world_size, barrier: with a folder, every rank encodes its share and waits for the rest; without, every rank does all.
    max_skip, ValueError: as in `usable_clips`; a clip found damaged when decoded counts, too.
    """
    say = tqdm.write if rank == 0 else lambda line: None
    made_from = {}
    for path in dict.fromkeys(clip.path for clip in clips):
        if path.is_file():  # all that its moments depend on: a replaced file has another size or time
            file = str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns
            made_from[path] = json.dumps([CACHE_VERSION, "moments", vae_name, asdict(config), file])
    found = {path: _find(cache_dir, text) for path, text in made_from.items()}
    # What is in the cache was good when it went in and has not changed since. The rest is looked at before the long work begins.
    paths = dict.fromkeys(clip.path for clip in clips)
    problems = _problems([path for path in paths if found.get(path) is None], config, say)
    paths = [path for path in paths if path not in problems]
    _leave_out(clips, problems, max_skip, say=lambda line: None)

    def moments(paths):
        # A generator of its own, since a loader draws from the global one even when it does not shuffle.
        loader = DataLoader(_Reader(paths, config), batch_size=None, num_workers=num_workers, generator=torch.Generator())
        for (windows, problem), path in zip(tqdm(loader, "encoding clips", disable=rank != 0 or not paths), paths, strict=True):
            if problem:
                problems[path] = problem
                tqdm.write(f"left out: {problem}")  # on any rank: only this one knows
            else:  # window by window, which bounds the memory
                yield path, torch.stack([encode(_unit(window)).transpose(0, 1) for window in windows])  # (K, 2C, F, h, w)

    _fill(found, {path: made_from[path] for path in paths}, moments, cache_dir, rank, world_size, barrier)
    for path in paths:
        if found[path] is None:
            problems.setdefault(path, f"{path}: cannot be read, as another rank reports")
    clips = _leave_out(clips, problems, max_skip, say)
    captions = [clip.caption for clip in clips]
    text = encode_captions(captions, encode_text, text_name, cache_dir, rank, world_size, barrier)
    return LatentDataset([found[clip.path] for clip in clips], text, captions)


@torch.no_grad()
def encode_captions(captions, encode_text, text_name, cache_dir=None, rank=0, world_size=1, barrier=lambda: None):
    """
    One entry per caption, whose [:] is its embedding (N, C); equal captions are computed once. Serves prompts and "" as well.

    encode_text(list of B captions) -> (B, N, C). text_name, cache_dir, rank, world_size, barrier: as in `encode_clips`.
    """
    def embeddings(captions):
        for i in tqdm(range(0, len(captions), 64), "encoding captions", disable=rank != 0 or not captions):
            yield from zip(captions[i:i + 64], encode_text(captions[i:i + 64]), strict=True)

    made_from = {caption: json.dumps([CACHE_VERSION, "text", text_name, caption]) for caption in captions}
    found = {caption: _find(cache_dir, text) for caption, text in made_from.items()}
    _fill(found, made_from, embeddings, cache_dir, rank, world_size, barrier)
    return [found[caption] for caption in captions]


class _Reader(Dataset):
    """Path -> (its windows, (K, F, 3, H, W) uint8, and ""), or (nothing, why not). Runs in the loader's worker processes."""

    def __init__(self, paths, config):
        self.paths, self.config = paths, config

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        def even(last):  # each start once: a clip of 16 frames at 8 a second has one
            return sorted({round(k * last / max(1, self.config.starts - 1)) for k in range(self.config.starts)})

        try:
            return _windows(self.paths[index], self.config, even), ""
        except ValueError as error:
            return torch.empty(0), str(error)


# The cache: one safetensors file per tensor, named by the hash of a text that says what it was made from.

CACHE_VERSION = 1  # one more whenever clips are read in another way


class Stored:
    """A tensor in a cache file, read only when indexed, and only that part: stored[k], stored[:]."""

    def __init__(self, path):
        self.path = path
        with safe_open(path, "pt") as file:  # SafetensorError unless the file is as long as its header says
            self.length = file.get_slice("tensor").get_shape()[0]

    def __len__(self):
        return self.length

    def __getitem__(self, where):
        with safe_open(self.path, "pt") as file:
            return file.get_slice("tensor")[where].clone()  # off the memory map, which dies with the file


def _fill(found, made_from, compute, folder, rank, world_size, barrier):
    """Fills in what is None in found {item: entry}; made_from: {item: text}; compute(items) yields (item, tensor)."""
    # A rank's share is one of all items: which are missing changes while other ranks are at work.
    mine = list(made_from)[rank::world_size] if folder else list(made_from)
    for item, tensor in compute([item for item in mine if found[item] is None]):
        found[item] = _keep(folder, made_from[item], tensor.detach().cpu().contiguous())
    barrier()
    for item in made_from:
        if found[item] is None:
            found[item] = _find(folder, made_from[item])


def _file(folder, made_from):
    return Path(folder) / f"{hashlib.sha256(made_from.encode()).hexdigest()}.safetensors"


def _find(folder, made_from):
    if folder and _file(folder, made_from).exists():
        try:
            return Stored(_file(folder, made_from))
        except SafetensorError as error:
            tqdm.write(f"{_file(folder, made_from)}: damaged ({error}); computing it anew")


def _keep(folder, made_from, tensor):
    if not folder:
        return tensor
    # Whole or not at all, flushed before the rename: neither a crash nor another process meets half a file.
    path = _file(folder, made_from)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.stem}.{os.urandom(4).hex()}")  # two runs may be at the same file
    try:
        with open(hidden, "wb") as file:
            file.write(save({"tensor": tensor}, metadata={"made_from": made_from}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    return Stored(path)
