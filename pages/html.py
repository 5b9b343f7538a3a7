"""
Pages that people look at: self-contained HTML that opens from disk, with clips that play in step.

A page is a template of pages/templates, filled by jinja2 with autoescape on, so a caption is always shown as text. Nothing is
fetched: style, script, pictures and clips are inside. A clip is one WebP picture of all its frames, which the page's script
draws one by one. So clips side by side stay in step to the frame, any browser plays them, and only those on screen are decoded.

Letters: F frames, H and W pixel rows and columns.
"""
import base64
import io
import math
from functools import partial
from pathlib import Path

import numpy as np
from einops import rearrange

from support.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
# How clips are made to fit: WebP's quality, 100 being without loss, and the divisor of their sides.
COMPRESSIONS = ((100, 1), (90, 1), (80, 1), (65, 1), (50, 1), (35, 1), (20, 1), (50, 2), (20, 2), (50, 4), (20, 4))
LINE_COLORS = 6  # of page.css


def write_page(path, template, max_mb, **values):
    """Fill a template and write the page, whole or not at all; returns its size in MB. ValueError above max_mb."""
    import jinja2
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # tables keep their order
    environment.filters |= {"short": short, "fixed": fixed, "signed": partial(fixed, sign="+")}
    text = environment.get_template(template).render(**values)
    size = len(text.encode()) / 1e6
    if size > max_mb:
        raise ValueError(f"{path.name} would have {size:.1f} MB, above --max-mb {max_mb:g}: show fewer clips, or allow more")
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


def webp(pixels, quality, shrink=1):
    """A picture (H, W, 3) uint8 as a WebP file in base64; shrink: by how much to divide its sides."""
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(pixels).reduce(shrink).save(file, "WEBP", lossless=quality == 100, quality=min(quality, 90), method=4)
    return base64.b64encode(file.getvalue()).decode()


def picture_uri(pixels):
    """A picture (H, W, 3) uint8 as the src of an <img>, without loss."""
    return "data:image/webp;base64," + webp(pixels, 100)


def heat(values):
    """Numbers (H, W) of at least 0 as colours (H, W, 3) uint8: black is 0, bright yellow the largest."""
    from matplotlib import colormaps
    return (colormaps["inferno"](values / max(values.max(), 1e-30))[..., :3] * 255).round().astype(np.uint8)


def pack_clip(pixels, quality, shrink):
    """What the page's script reads of a clip: all frames in rows, as one WebP picture, and their sizes."""
    F, H, W, _ = pixels.shape
    columns = min(F, max(1, 4096 // W))
    blank = np.zeros((-F % columns, H, W, 3), np.uint8)
    picture = rearrange(np.concatenate([pixels, blank]), "(r c) h w rgb -> (r h) (c w) rgb", c=columns)
    return {"src": webp(picture, quality, shrink), "frames": F, "columns": columns, "width": W, "height": H}


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
        """pack_clip of each, compressed until all fit into max_mb; self.quality and self.shrink say how."""
        for self.quality, self.shrink in COMPRESSIONS:
            packed = []
            size = 0
            for pixels in self.pixels:
                packed.append(pack_clip(pixels, self.quality, self.shrink))
                size += len(packed[-1]["src"])
                if size > max_mb * 1e6:
                    break
            else:
                return packed
        raise ValueError(f"{len(self.pixels)} clips do not fit into {max_mb:.3g} MB: show fewer, or raise --max-mb")


def line_chart(title, lines):
    """
    Curves with bands of their errors: {"title", "svg", "legend"}, in the page's colours, light or dark.

    lines: {name: [(step, y, error)]}, at least one point. The legend has the name of each line and the values at its ends.
    """
    from matplotlib import rc_context
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    with rc_context({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axis = figure.subplots()
        legend = []
        for i, (name, points) in enumerate(lines.items()):
            steps, values, errors = np.array(points, dtype=float).reshape(-1, 3).T
            color = f"C{i % LINE_COLORS}"
            axis.plot(steps, values, color=color, lw=1.8, marker="o" if len(steps) <= 60 else "", ms=4)
            axis.fill_between(steps, values - errors, values + errors, color=color, alpha=.15, lw=0)
            legend.append(f"{name}: {values[0]:.4g} to {values[-1]:.4g}")
        axis.set_xlabel("step")
        axis.locator_params("x", integer=True)
        axis.grid(axis="y")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})

    svg = file.getvalue()
    svg = svg[svg.index("<svg"):]
    page_colors = {"--soft": "#000000", "--line": "#b0b0b0"} | {f"--c{i}": to_hex(f"C{i}") for i in range(LINE_COLORS)}
    for variable, color in page_colors.items():
        svg = svg.replace(color, f"var({variable})")
    return {"title": title, "svg": svg, "legend": legend}
