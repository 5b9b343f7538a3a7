"""
Video files in and out.

In: windows of a clip at a given rate, by PyAV, which comes with imageio's plugin and can stop early and tell which frames are
damaged. A clip that cannot be read or is too short is a ValueError that names it. Out: .mp4 that any player shows, and .gif.

Letters: K windows, F frames, H and W pixel rows and columns.
"""
import os
import re
from contextlib import contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F_
from torch.utils.data import DataLoader

from support.files import write_whole


@contextmanager
def open_video(path):
    """Container and first video stream of a file. Any FFmpeg error, now or while reading, is a ValueError naming the clip."""
    import av
    if not os.path.isfile(path):  # lists are other people's data, and FFmpeg would fetch a URL
        raise ValueError(f"{path}: cannot be read: no such file")
    try:
        with av.open(os.path.abspath(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: cannot be read: no video in it")
            stream = container.streams.video[0]
            # By default a decoder hides damage. With this it stops at most of it, and marks some of the rest (is_corrupt, below).
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1  # worker processes take a clip each
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def measure(path, config, count=None):
    """
    (last possible start, stride), in frames of the file. Too short: ValueError.

    config: num_frames F and fps. count: how many frames the file has, else its packets are counted, in milliseconds: the header
    of a truncated file promises too many.
    """
    with open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate  # of a variable rate, the mean
        if not rate:
            raise ValueError(f"{path}: cannot be read: no frame rate")
        if count is None:
            count = sum(bool(p.size) and not p.is_discard and not p.is_corrupt for p in container.demux(stream))
    stride = max(1, round(rate / config.fps))  # a clip slower than config.fps is taken as it is
    needed = (config.num_frames - 1) * stride + 1
    if count < needed:
        raise ValueError(f"{path}: too short: {config.num_frames} frames at {config.fps:g} a second need {needed} "
                         f"at its {float(rate):g} a second, found {count}")
    return count - needed, stride


def read_windows(path, config, pick, count=None):
    """Windows of one clip, (K, F, 3, H, W) uint8, at the starts that pick(last possible start) lists; see measure for count."""
    # In one pass, from the first frame to the last one needed: windows overlap, and most clips have few key frames to jump to.
    last, stride = measure(path, config, count)
    windows = [range(start, start + config.num_frames * stride, stride) for start in pick(last)]
    wanted = set().union(*windows)
    frames, seen = {}, 0
    with open_video(path) as (container, stream):
        whole = (packet for packet in container.demux(stream) if not packet.is_corrupt)  # the last of a truncated file is
        decoded = (frame for packet in whole for frame in packet.decode())
        for seen, frame in enumerate(islice(decoded, max(wanted) + 1), 1):
            if seen - 1 in wanted:
                frames[seen - 1] = fit_frame(frame, path, config)
    if len(frames) < len(wanted):  # two-pass VP8, for one, has packets that show nothing: choose again, among the real frames
        return read_windows(path, config, pick, count=seen)
    clips = torch.stack([frames[i] for window in windows for i in window])      # (K*F, 3, H, W)
    return clips.unflatten(0, (len(windows), -1))                               # (K, F, 3, H, W)


def fit_frame(frame, path, config):
    """One decoded frame, upright, resized until it just covers H x W, cropped around its centre -> (3, H, W) uint8."""
    if frame.is_corrupt:
        raise ValueError(f"{path}: cannot be read: a damaged frame")
    # rgb24 from whatever the file has, grey included. Phones store portrait video sideways, with a rotation angle.
    # One thread: starting more, for every frame, takes longer than the conversion.
    image = frame.to_ndarray(format="rgb24", threads=1)                         # (H', W', 3), of the file's own size
    image = np.rot90(image, round(frame.rotation / 90)).copy()

    scale = max(config.height / image.shape[0], config.width / image.shape[1])
    height, width = max(config.height, round(image.shape[0] * scale)), max(config.width, round(image.shape[1] * scale))
    x = torch.from_numpy(image).permute(2, 0, 1)[None]                          # (1, 3, H', W')
    x = F_.interpolate(x, (height, width), mode="bilinear", antialias=True)     # of bytes: several times faster than of floats
    top, left = (height - config.height) // 2, (width - config.width) // 2
    return x[0, :, top:top + config.height, left:left + config.width]           # (3, H, W)


def read_even_windows(config, path):
    """read_all_windows' entry of a path: config.starts windows, from the first possible start to the last, each once."""
    def pick(last):
        return sorted({round(k * last / max(1, config.starts - 1)) for k in range(config.starts)})

    try:
        return path, read_windows(path, config, pick), ""
    except ValueError as error:
        return path, torch.empty(0), str(error)


def read_all_windows(paths, config, num_workers=0):
    """Yields (path, its windows (K, F, 3, H, W) uint8, "") or (path, nothing, why not), in order; workers read ahead."""
    # A generator of its own, since a loader draws from the global one even when it does not shuffle.
    return DataLoader(paths, batch_size=None, collate_fn=partial(read_even_windows, config), num_workers=num_workers,
                      generator=torch.Generator())


def read_clip(path, config, start=0, generator=None):
    """One window of a clip, (F, 3, H, W) in [-1, 1], from this frame of the file on, or from one that `generator` draws."""
    def pick(last):
        if generator is not None:
            return [torch.randint(last + 1, (), generator=generator).item()]
        if not 0 <= start <= last:
            raise ValueError(f"{path}: no start at {start}; must be from 0 to {last}")
        return [start]

    return read_windows(path, config, pick)[0].float() / 127.5 - 1


def video_name(index, prompt):
    """A file name that is safe anywhere, whatever the prompt: its number, then letters and digits of it."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{index:04d}-{words}" if words else f"{index:04d}"


def to_pixels(video):
    """(F, 3, H, W) in [0, 1] -> (F, H, W, 3) uint8, as files have it."""
    return video.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_video(path, pixels, fps):
    """Save pixels (F, H, W, 3), uint8, as .mp4 or .gif: enlarged to at most 256, and cropped to even sizes, as yuv420p needs."""
    zoom = max(1, 256 // max(pixels.shape[1:3]))
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    pixels = pixels[:, :pixels.shape[1] // 2 * 2, :pixels.shape[2] // 2 * 2]
    with write_whole(path) as hidden:
        if path.suffix == ".gif":
            import imageio.v3 as iio
            iio.imwrite(hidden, pixels, extension=".gif", duration=round(1000 / fps), loop=0)
            return
        import av  # itself: imageio would collect garbage after each file, for 0.2 s
        with av.open(os.path.abspath(hidden), "w", format="mp4") as file:  # a name like lr:1 would be a protocol
            stream = file.add_stream("libx264", rate=fps)
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
            for picture in pixels:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())


def read_video(path):
    """All frames of a file that write_video wrote, (F, H, W, 3) uint8. ValueError names a file without any."""
    with open_video(path) as (container, stream):
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(stream)]
    if not frames:
        raise ValueError(f"{path}: cannot be read: no frames")
    return np.stack(frames)
