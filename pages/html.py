"""
Pages that people look at: self-contained HTML that opens from disk, with clips that play in step.

A page is a template of pages/templates, filled by jinja2 with autoescape on, so a caption is always shown
as text. Nothing is fetched: style, script, pictures and clips are inside. A clip is one WebP picture of all
its frames, which the page's script draws frame by frame. So clips side by side stay in step to the frame, any
browser plays them, and only those on screen are decoded.

Letters: F frames, H and W pixel rows and columns.
"""
import base64
import io
import math
from functools import partial
from pathlib import Path

import numpy as np

from support.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
QUALITIES = (100, 90, 80, 65, 50, 35, 20)  # of WebP; 100 is without loss
SMALL = 64  # pixels: clips up to this side are shown enlarged, with square pixels


# ----------------------------------------------------------------------------------------------
# Templates

def render(template, **values):
    """The text of a page. A value that the template names and that is missing is an error, not an empty
    space."""
    import jinja2
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # tables keep their order
    environment.filters |= {"short": short, "fixed": fixed, "signed": partial(fixed, sign="+")}
    return environment.get_template(template).render(**values)


def write_page(path, template, max_mb, **values):
    """Write a page, whole or not at all; ValueError if it is larger than it may be."""
    text = render(template, **values)
    size = len(text.encode()) / 1e6
    if size > max_mb:
        raise ValueError(f"{path.name} would have {size:.1f} MB, above --max-mb {max_mb:g}: show fewer "
                         "clips, or allow more")
    write_text(path, text)
    return size


def short(value):
    """A number as people read it: three digits that count."""
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def fixed(value, digits=4, sign=""):
    """A number with so many decimals; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


# ----------------------------------------------------------------------------------------------
# Pictures and clips

def webp(pixels, quality):
    """A picture (H, W, 3) uint8 as the bytes of a WebP file."""
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=quality == 100, quality=min(quality, 90), method=4)
    return file.getvalue()


def picture_uri(pixels):
    """A picture (H, W, 3) uint8 as the src of an <img>, without loss."""
    return "data:image/webp;base64," + base64.b64encode(webp(pixels, 100)).decode()


def heat(values):
    """Numbers (H, W) of at least 0 as colours (H, W, 3) uint8: black is 0, bright yellow the largest."""
    from matplotlib import colormaps
    scaled = values / max(values.max(), 1e-30)
    return (colormaps["inferno"](scaled)[..., :3] * 255).round().astype(np.uint8)


def undo_enlarging(pixels):
    """
    A clip (F, H, W, 3) at the size it had before support.videos.enlarge, which files of small clips have been
    through.

    Enlarged pixels show as steps at every z-th row and column and next to none between. Their mean takes out
    most of the codec's loss.
    """
    F, H, W, _ = pixels.shape
    signed = pixels.astype(np.int16)
    across = np.abs(np.diff(signed, axis=2)).mean(axis=(0, 1, 3))             # (W - 1,)
    down = np.abs(np.diff(signed, axis=1)).mean(axis=(0, 2, 3))               # (H - 1,)
    for z in range(min(H, W) // 8, 2, -1):
        # By place within an enlarged pixel; the last place is the edge to the next one.
        by_place = [across[place::z].mean() + down[place::z].mean() for place in range(z)]
        if H % z or W % z or by_place[-1] < .5 or max(by_place[:-1]) > .3 * by_place[-1]:
            continue
        small = pixels.reshape(F, H // z, z, W // z, z, 3).mean(axis=(2, 4)).round().astype(np.uint8)
        lost = np.abs(small.repeat(z, 1).repeat(z, 2).astype(np.int16) - signed)
        if lost.mean() < 3 and (lost > 50).mean() < 5e-4:  # of 255; what a codec changes, not edges elsewhere
            return small
    return pixels


def halve(pixels):
    """A clip at half its size."""
    F, H, W, _ = pixels.shape
    even = pixels[:, :H // 2 * 2, :W // 2 * 2].astype(np.float32)
    return even.reshape(F, H // 2, 2, W // 2, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)


def sheet(pixels, quality):
    """All frames of a clip in rows, as the bytes of one WebP file, and how many frames a row has."""
    # Lossy WebP halves the resolution of colours; of small clips that would show as smeared edges.
    zoom = 2 if quality < 100 and max(pixels.shape[1:3]) <= SMALL else 1
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    F, H, W, _ = pixels.shape
    columns = min(F, max(1, 4096 // W))
    rows = math.ceil(F / columns)
    filled = np.concatenate([pixels, np.zeros((rows * columns - F, H, W, 3), np.uint8)])
    grid = filled.reshape(rows, columns, H, W, 3).swapaxes(1, 2)              # (rows, H, columns, W, 3)
    return webp(np.ascontiguousarray(grid.reshape(rows * H, columns * W, 3)), quality), columns


class Clips:
    """
    The clips of a page. add() gives each a number for the template's clip(); pack() makes them fit.

    The best WebP quality at which all of them together stay within max_mb; when the lowest is too large, at
    half the size.
    """

    def __init__(self):
        self.pixels, self.known = [], {}

    def add(self, pixels):
        """pixels (F, H, W, 3) uint8 -> the clip's number; the same clip again is kept once."""
        number = self.known.setdefault((pixels.shape, pixels.tobytes()), len(self.pixels))
        if number == len(self.pixels):
            self.pixels.append(pixels)
        return number

    def pack(self, max_mb):
        """What the page's script reads: [{src, frames, columns, width, height}]; self.quality and self.halved
        say at which loss."""
        clips, self.halved = self.pixels, 0
        while True:
            for self.quality in QUALITIES:
                few = clips[::max(1, len(clips) // 12)]
                if self.megabytes(few) / max(len(few), 1) * len(clips) > 1.2 * max_mb:
                    continue
                packed = [self.entry(clip) for clip in clips]
                if sum(len(p["src"]) for p in packed) <= max_mb * 1e6:
                    return packed
            clips, self.halved = [halve(clip) for clip in clips], self.halved + 1
            if min(min(clip.shape[1:3]) for clip in clips) < 8:
                raise ValueError(f"{len(clips)} clips do not fit into {max_mb:.3g} MB: show fewer, or raise "
                                 "--max-mb")

    def megabytes(self, clips):
        return sum(len(self.entry(clip)["src"]) for clip in clips) / 1e6

    def entry(self, clip):
        data, columns = sheet(clip, self.quality)
        return {"src": base64.b64encode(data).decode(), "frames": len(clip), "columns": columns,
                "width": clip.shape[2], "height": clip.shape[1]}


# ----------------------------------------------------------------------------------------------
# Curves

def ticks(low, high, count=4):
    """Round numbers from low to high, about `count` of them."""
    span = (high - low) or 1.
    step = 10 ** math.floor(math.log10(span / count))
    step *= next((m for m in (1, 2, 5, 10) if span / (m * step) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title, series, width=420, height=230, x_label="step"):
    """
    What the template's chart() draws: lines, bands of their errors, and ticks, in pixels.

    series: [{name, points: [(x, y, error)], color: number of the line's colour}]. Points whose y is
    None or nan are left out.
    """
    known = [[p for p in s["points"] if p[1] is not None and math.isfinite(p[1])] for s in series]
    points = [p for found in known for p in found]
    if not points:
        return None
    xs = [p[0] for p in points]
    lows, highs = [p[1] - p[2] for p in points], [p[1] + p[2] for p in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(lows), max(highs)
    x1, pad = x1 if x1 > x0 else x0 + 1, .06 * (y1 - y0) or .05 * abs(y1) or .1
    y0, y1 = y0 - pad, y1 + pad

    def place(x, y):
        across, down = (x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)
        return round(48 + across * (width - 60), 1), round(10 + down * (height - 46), 1)

    lines = []
    for s, shown in zip(series, known):
        upper = [place(x, y + e) for x, y, e in shown]
        lower = [place(x, y - e) for x, y, e in shown]
        dots = [{"at": place(x, y), "x": x, "y": y, "error": e} for x, y, e in shown]
        lines.append(s | {"dots": dots, "path": " ".join("{},{}".format(*d["at"]) for d in dots),
                          "band": " ".join(f"{x},{y}" for x, y in upper + lower[::-1])})
    return {"title": title, "lines": lines, "width": width, "height": height, "x_label": x_label,
            "x_ticks": [(place(x, y0)[0], f"{x:g}") for x in ticks(x0, x1)],
            "y_ticks": [(place(x0, y)[1], f"{y:g}") for y in ticks(y0, y1)]}
