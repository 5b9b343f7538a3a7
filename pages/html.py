"""Pages that people look at: single HTML files that open from disk, fetch nothing, and can be mailed. They are pages/templates,
filled by jinja2 with autoescape on, so a caption is always shown as text; style, script, pictures and clips are inside."""
import base64
import io
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from support.files import write_text
from support.videos import write_video

TEMPLATES = Path(__file__).parent / "templates"
LINE_COLORS = 6  # of page.css


def write_page(path, template, **values):
    """Fill a template and write the page, whole or not at all; returns its size in MB."""
    import jinja2
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # tables keep their order
    environment.filters |= {"fixed": fixed, "signed": partial(fixed, sign="+")}
    text = environment.get_template(template).render(**values)
    write_text(path, text)
    return len(text.encode()) / 1e6


def fixed(value, digits=4, sign=""):
    """A number with `digits` decimals; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def data_uri(kind, content):
    """The bytes of a picture or clip as an address that a page can show without a file beside it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def clip_uri(file):
    """An .mp4 file for a <video>, as it is."""
    return data_uri("video/mp4", Path(file).read_bytes())


def pixels_uri(pixels, fps):
    """Frames (F, H, W, 3) uint8 for a <video>."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, pixels, fps)
        return clip_uri(file)


def picture_uri(pixels):
    """A picture (H, W, 3) uint8 for an <img>, without loss."""
    import imageio.v3 as iio
    return data_uri("image/webp", iio.imwrite("<bytes>", pixels, extension=".webp", lossless=True))


def heat(values):
    """Numbers (H, W) of at least 0 as colours (H, W, 3) uint8: black is 0, bright yellow the largest."""
    from matplotlib import colormaps
    return (colormaps["inferno"](values / max(values.max(), 1e-30))[..., :3] * 255).round().astype(np.uint8)


def line_chart(title, lines):
    """Curves with bands of their errors: {"title", "svg", "legend"}, in the page's colours, light or dark.
    lines: {name: [(step, y, error)]}, at least one point. The legend has the name of each line and the values at its ends."""
    from matplotlib import rc_context
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    with rc_context({"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axis = figure.subplots()
        legend = []
        for i, (name, points) in enumerate(lines.items()):
            steps, values, errors = np.array(points, dtype=float).T
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
    svg = svg.replace("#000000", "var(--soft)").replace("#b0b0b0", "var(--line)")
    for i in range(LINE_COLORS):
        svg = svg.replace(to_hex(f"C{i}"), f"var(--c{i})")
    return {"title": title, "svg": svg, "legend": legend}
