"""Video files: windows of a clip read at a given rate, by PyAV, which can stop early and tell which frames are damaged; .mp4 that
any player shows, and .gif. Letters: n possible starts of a window, K windows, F frames, H and W pixel rows and columns."""
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F_
from torch.utils.data import DataLoader

from support.files import write_whole

HDR = {16: "PQ", 18: "HLG"}  # FFmpeg's numbers of the transfer curves that need tone mapping, for which PyAV's wheels lack zscale

# What clips may have that is said of them, and does not keep them from being used.
FLAWS = ("are interlaced, so that moving edges look like combs",
         "have fewer frames a second than --fps asks for, so that theirs pass faster, or some of them twice")


@contextmanager
def open_video(path):
    """Container and first video stream of a file, covers aside. FFmpeg's errors, now or while reading, become a ValueError."""
    import av
    if not os.path.isfile(path):  # lists are other people's data, and FFmpeg would fetch a URL
        raise ValueError(f"{path}: cannot be read: no such file")
    try:
        with av.open(os.path.abspath(path)) as container:
            cover = av.stream.Disposition.attached_pic
            stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
            if stream is None:
                raise ValueError(f"{path}: cannot be read: no video in it")
            curve = HDR.get(stream.codec_context.color_trc)
            if curve:
                raise ValueError(f"{path}: cannot be read: HDR ({curve}), whose colours would come out wrong; convert it to SDR")
            # By default a decoder hides damage. With this it stops at most of it, and marks some of the rest (is_corrupt, below).
            stream.codec_context.options = {"err_detect": "explode"}
            stream.codec_context.thread_count = 1  # worker processes take a clip each
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def shown_frames(container, stream):
    """Decoded frames in the order they are shown, without those that the container marks as not to be shown."""
    import av
    for packet in container.demux(stream):
        try:
            yield from [] if packet.is_corrupt else packet.decode()  # the last packet of a truncated file is
        except av.FFmpegError:
            if not packet.is_discard:  # a cut without encoding hides its first frames, and what these refer to may be gone
                raise


def plan_windows(path, config, times=None):
    """Numbers (n, F) of the frames that make a window, from each possible start; whether their rate is even. times: when each
    frame is shown, in ticks; by default packets are asked, which takes milliseconds (headers of truncated files are wrong)."""
    decoded = times is not None
    with open_video(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError(f"{path}: cannot be read: no frame rate")
        frame_ticks = float(1 / (rate * stream.time_base))
        if not decoded:
            whole = (packet for packet in container.demux(stream) if packet.size and not packet.is_corrupt)
            times = [packet.pts for packet in whole if not packet.is_discard]
            times.sort(key=lambda ticks: ticks or 0)  # packets come in the order of decoding; some containers keep no times
    even = is_even(times, frame_ticks)
    if not decoded and not even:  # to be sure, decode: some packets show nothing, such as the second field of a frame
        with open_video(path) as (container, stream):
            return plan_windows(path, config, [frame.pts for frame in shown_frames(container, stream)])

    # Of an even rate, every so many frames are taken, all of a clip slower than config.fps; else the nearest in time.
    step = max(1, round(rate / config.fps)) if even else float(rate / config.fps)           # in frames of the header's rate
    at = np.arange(len(times)) if even else np.array(times) / frame_ticks                   # in the same unit
    wanted = at[:, None] + step * np.arange(config.num_frames)                              # (n, F)
    wanted = wanted[wanted[:, -1] <= at[-1:] + 1e-6]
    if not len(wanted):
        needed, length = (config.num_frames - 1) * step + 1, at[-1] - at[0] + 1 if len(at) else 0
        raise ValueError(f"{path}: too short: {config.num_frames} frames at {config.fps:g} a second need {needed:g} at its "
                         f"{float(rate):g} a second, found {length:g}")
    return np.searchsorted((at[1:] + at[:-1]) / 2, wanted), even


def is_even(times, frame_ticks):
    """Whether each frame is within half a frame of where one rate puts it, which is within an eighth of the header's."""
    if len(times) < 2 or None in times or times != sorted(times) or times[0] == times[-1]:
        return True  # no times, or wrong ones: only the header's rate is left
    intervals = np.diff(times)
    late = np.cumsum(intervals - intervals.mean())
    # An eighth, since a GIF counts in hundredths of a second: 30 frames a second are then 33.3 by its header.
    return abs(late).max() <= intervals.mean() / 2 and abs(intervals.mean() / frame_ticks - 1) <= 1 / 8


def display_matrix(frame):
    """(a, b, c, d): pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift. Phones store portrait video sideways."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    numbers = [1, 0, 0, 0, 1] if matrix is None else np.frombuffer(matrix, np.int32).tolist()
    return numbers[0], numbers[1], numbers[3], numbers[4]


def resize_and_crop(frame, path, config, pixel_aspect):
    """One frame, upright, in square pixels, resized until it just covers H x W, cropped around its centre -> (3, H, W) uint8."""
    if frame.is_corrupt:
        raise ValueError(f"{path}: cannot be read: a damaged frame")
    # rgb24 from whatever the file has, grey included. One thread: starting more, for every frame, takes longer than converting.
    image = frame.to_ndarray(format="rgb24", threads=1)                         # (H', W', 3), of the file's own size
    a, b, c, d = display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):  # rows become columns
        image = image.transpose(1, 0, 2)
        a, d, pixel_aspect = c, b, 1 / pixel_aspect
    image = image[::-1 if d < 0 else 1, ::-1 if a < 0 else 1].copy()

    scale = max(config.height / image.shape[0], config.width / (image.shape[1] * pixel_aspect))
    height = max(config.height, round(image.shape[0] * scale))
    width = max(config.width, round(image.shape[1] * pixel_aspect * scale))
    x = torch.from_numpy(image).permute(2, 0, 1)[None]                          # (1, 3, H', W')
    x = F_.interpolate(x, (height, width), mode="bilinear", antialias=True)     # of bytes: several times faster than of floats
    top, left = (height - config.height) // 2, (width - config.width) // 2
    return x[0, :, top:top + config.height, left:left + config.width]           # (3, H, W)


def read_picture(path, height, width):
    """A picture, or a clip's first frame, by resize_and_crop: (3, height, width) uint8. ValueError if it cannot be read."""
    with open_video(path) as (container, stream):
        for frame in shown_frames(container, stream):
            return resize_and_crop(frame, path, SimpleNamespace(height=height, width=width), 1)
    raise ValueError(f"{path}: cannot be read: no picture in it")


def read_windows(path, config, times=None):
    """Windows of a clip, (K, F, 3, H, W) uint8, evenly from the first possible start to the last; what of FLAWS the clip has."""
    # In one pass, from the first frame to the last one needed: windows overlap, and most clips have few key frames to jump to.
    possible = plan_windows(path, config, times)[0]                             # (n, F)
    last = len(possible) - 1
    windows = possible[sorted({round(k * last / max(1, config.starts - 1)) for k in range(config.starts)})]     # (K, F)
    frames, seen, interlaced = {}, [], False
    with open_video(path) as (container, stream):
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        slow = (stream.average_rate or stream.guessed_rate or config.fps) < .95 * config.fps  # not for 23.976 instead of 24
        for number, frame in enumerate(islice(shown_frames(container, stream), windows.max() + 1)):
            seen.append(frame.pts)
            interlaced = interlaced or frame.interlaced_frame
            if number in windows:
                frames[number] = resize_and_crop(frame, path, config, pixel_aspect)
    if windows.max() >= len(seen):  # two-pass VP8, for one, has packets that show nothing: choose again, among the real frames
        return read_windows(path, config, seen)
    flaws = [flaw for flaw, found in zip(FLAWS, (interlaced, slow)) if found]
    return torch.stack([frames[number] for number in windows.flat]).unflatten(0, windows.shape), flaws


def read_clip(path, config):
    """The window that begins with the first frame, (F, 3, H, W) in [-1, 1]."""
    return read_windows(path, replace(config, starts=1))[0][0].float() / 127.5 - 1


def read_or_explain(config, path):
    """read_all_windows' entry of a path, its windows as an array: it passes a pipe, where a tensor needs shared memory."""
    try:
        windows, flaws = read_windows(path, config)
        return path, windows.numpy(), flaws, ""
    except ValueError as error:
        return path, np.empty(0), [], str(error)


def read_all_windows(paths, config, num_workers=0):
    """Yields path, its windows (K, F, 3, H, W) uint8, its flaws, and why there are no windows; workers read ahead."""
    generator = torch.Generator()  # a loader draws from the global one even when it does not shuffle
    for path, windows, *others in DataLoader(paths, batch_size=None, collate_fn=partial(read_or_explain, config),
                                             num_workers=num_workers, generator=generator):
        yield path, torch.from_numpy(windows), *others


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
    height, width = pixels.shape[1] // 2 * 2, pixels.shape[2] // 2 * 2
    with write_whole(path) as hidden:
        if path.suffix == ".gif":
            import imageio.v3 as iio
            iio.imwrite(hidden, pixels, extension=".gif", duration=round(1000 / fps), loop=0)
            return
        import av  # itself: imageio would collect garbage after each file, for 0.2 s
        with av.open(os.path.abspath(hidden), "w", format="mp4") as file:  # a name like lr:1 would be a protocol
            # The preset takes half the time of the default one; colours are off by 1.3 of 255 on average instead of 1.2.
            stream = file.add_stream("libx264", fps, {"preset": "veryfast"}, width=width, height=height, pix_fmt="yuv420p")
            for picture in pixels[:, :height, :width]:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())


def read_video(path):
    """All frames of a file that write_video wrote, (F, H, W, 3) uint8. ValueError names a file without any."""
    with open_video(path) as (container, stream):
        frames = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(stream)]
    if not frames:
        raise ValueError(f"{path}: cannot be read: no frames")
    return np.stack(frames)
