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
CHART_SIZE = 420, 230  # pixels
SMALL = 64  # pixels: clips up to this side are shown enlarged, with square pixels


# ----------------------------------------------------------------------------------------------
# Templates

def write_page(path, template, max_mb, **values):
    """
    Fill a template and write the page, whole or not at all; returns its size in MB.

    A value that the template names and that is missing is an error, not an empty space. ValueError for a
    page larger than max_mb.
    """
    import jinja2
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # tables keep their order
    environment.filters |= {"short": short, "fixed": fixed, "signed": partial(fixed, sign="+")}
    text = environment.get_template(template).render(**values)
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
    through. Pages show it with square pixels of their own, and its file is smaller.

    Enlarged pixels show as steps at every zoom-th row and column and next to none between. Their mean takes
    out most of the codec's loss.
    """
    F, H, W, _ = pixels.shape
    signed = pixels.astype(np.int16)
    across = np.abs(np.diff(signed, axis=2)).mean(axis=(0, 1, 3))             # (W - 1,)
    down = np.abs(np.diff(signed, axis=1)).mean(axis=(0, 2, 3))               # (H - 1,)
    for zoom in range(min(H, W) // 8, 2, -1):
        if H % zoom or W % zoom:
            continue
        # By place within an enlarged pixel; the last place is the edge to the next one.
        *inside, edge = [across[i::zoom].mean() + down[i::zoom].mean() for i in range(zoom)]
        if edge < .5 or max(inside) > .3 * edge:
            continue
        small = block_means(pixels, zoom)
        lost = np.abs(small.repeat(zoom, 1).repeat(zoom, 2).astype(np.int16) - signed)
        if lost.mean() < 3 and (lost > 50).mean() < 5e-4:  # of 255; what a codec changes, not edges elsewhere
            return small
    return pixels


def block_means(pixels, side):
    """A clip (F, H, W, 3) with each square of side x side pixels as one; what is left over is cut off."""
    F, H, W = len(pixels), pixels.shape[1] // side, pixels.shape[2] // side
    blocks = pixels[:, :H * side, :W * side].reshape(F, H, side, W, side, 3)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)                  # (F, H, W, 3)


def pack_clip(pixels, quality):
    """What the page's script reads of a clip: all frames in rows, as one WebP picture, and their sizes."""
    # Lossy WebP halves the resolution of colours; of small clips that would show as smeared edges.
    zoom = 2 if quality < 100 and max(pixels.shape[1:3]) <= SMALL else 1
    enlarged = pixels.repeat(zoom, 1).repeat(zoom, 2)
    F, H, W, _ = enlarged.shape
    columns = min(F, max(1, 4096 // W))
    rows = math.ceil(F / columns)
    filled = np.concatenate([enlarged, np.zeros((rows * columns - F, H, W, 3), np.uint8)])
    grid = filled.reshape(rows, columns, H, W, 3).swapaxes(1, 2)              # (rows, H, columns, W, 3)
    picture = np.ascontiguousarray(grid.reshape(rows * H, columns * W, 3))
    return {"src": base64.b64encode(webp(picture, quality)).decode(), "frames": F, "columns": columns,
            "width": pixels.shape[2], "height": pixels.shape[1]}


class Clips:
    """The clips of a page: add() gives each a number for the template's clip(), pack() makes them fit."""

    def __init__(self):
        self.pixels = []
        self.numbers = {}

    def add(self, pixels):
        """pixels (F, H, W, 3) uint8 -> the clip's number; the same clip again is kept once."""
        number = self.numbers.setdefault((pixels.shape, pixels.tobytes()), len(self.pixels))
        if number == len(self.pixels):
            self.pixels.append(pixels)
        return number

    def pack(self, max_mb):
        """
        pack_clip of each, at the best WebP quality at which all of them fit into max_mb; if the lowest is too
        large, at half the size, and so on. self.quality and self.halved say what was lost.
        """
        for self.halved in range(4):
            clips = [block_means(clip, 2 ** self.halved) for clip in self.pixels]
            for self.quality in QUALITIES:
                packed = []
                size = 0
                for clip in clips:
                    packed.append(pack_clip(clip, self.quality))
                    size += len(packed[-1]["src"])
                    if size > max_mb * 1e6:
                        break
                else:
                    return packed
        raise ValueError(f"{len(clips)} clips do not fit into {max_mb:.3g} MB: show fewer, or raise --max-mb")


# ----------------------------------------------------------------------------------------------
# Curves

def ticks(low, high):
    """Round numbers from low to high, about four of them."""
    from matplotlib.ticker import MaxNLocator
    found = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [value for value in found if low <= value <= high]


def line_chart(title, lines):
    """
    What the template's chart() draws: lines, bands of their errors, and ticks, in pixels.

    lines: {name: [(step, y, error)]}, at least one point.
    """
    every = sum(lines.values(), [])
    left = min(x for x, _, _ in every)
    right = max(left + 1, *(x for x, _, _ in every))
    bottom = min(y - e for _, y, e in every)
    top = max(y + e for _, y, e in every)
    width, height = CHART_SIZE
    margin = .06 * (top - bottom) or .05 * abs(top) or .1
    bottom -= margin
    top += margin

    def place(x, y):
        across = 48 + (x - left) / (right - left) * (width - 60)
        down = 10 + (top - y) / (top - bottom) * (height - 46)
        return round(across, 1), round(down, 1)

    def path(points):
        return " ".join(f"{x},{y}" for x, y in points)

    drawn = []
    for name, points in lines.items():
        upper = [place(x, y + e) for x, y, e in points]
        lower = [place(x, y - e) for x, y, e in points]
        dots = [{"at": place(x, y), "x": x, "y": y, "error": e} for x, y, e in points]
        drawn.append({"name": name, "dots": dots, "path": path(dot["at"] for dot in dots),
                      "band": path(upper + lower[::-1])})
    return {"title": title, "lines": drawn, "width": width, "height": height,
            "x_ticks": [(place(x, bottom)[0], f"{x:g}") for x in ticks(left, right)],
            "y_ticks": [(place(left, y)[1], f"{y:g}") for y in ticks(bottom, top)]}
