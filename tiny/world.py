"""
The tiny world: captioned clips of coloured shapes that move as the caption says, in the varied quality of web video.

Each shape drags a fading trail, so that a single frame shows where it is going: an image reward can then see the whole
caption, and a text tower trained on frames learns the direction words.

A clip is 16 frames of 32 x 32 pixels at 8 fps, drawn from nothing but a seed. Some clips are blurred, washed out, noisy, or
carry a semi-transparent watermark band, and captions never mention it: a model that imitates them imitates the flaws too.

Letters: F frames, H and W pixel rows and columns.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F_

from formats.words import WordTokenizer

SIZE, FRAMES, FPS = 32, 16, 8
COLOURS = {"red": (.90, .12, .12), "green": (.10, .72, .18), "blue": (.16, .28, .95),
           "yellow": (.95, .85, .10), "cyan": (.08, .80, .86), "purple": (.66, .16, .84)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
# How often a clip has each flaw; more than a quarter of the clips have none. Pale and blurred clips are few: a base that has
# seen many draws many, unless strong guidance brings colour and edges back, and that pulls squares into bow ties.
FLAWS = {"watermark": .55, "blur": .15, "washout": .12, "noise": .15}


@dataclass(frozen=True)
class Scene:
    """What a caption says: a colour, a shape (or "stripes"), a direction (or "" for no motion, which no caption asks for)."""
    colour: str
    shape: str
    direction: str

    @property
    def caption(self):
        if self.shape == "stripes":
            return f"{self.colour} stripes drifting {self.direction}"
        return f"a {self.colour} {self.shape} moving {self.direction}"


def parse(caption):
    """The scene a caption of the tiny world describes, by its words; ValueError for any other caption."""
    words = caption.lower().split()
    found = [[n for n in names if n in words] for names in (COLOURS, (*SHAPES, "stripes"), DIRECTIONS)]
    if any(len(f) != 1 for f in found):
        raise ValueError(f"caption {caption!r}: the tiny world's captions name one colour, one shape and one direction")
    return Scene(*(f[0] for f in found))


PROMPT_SETS = ("in_domain", "new", "other")


def scenes(name):
    """
    The scenes of a prompt set. "in_domain" and "new" split the shapes by colour and shape: fine-tuning sees four fifths of
    the pairs, "new" holds the rest; "other" is a category of its own, stripes. The base model has seen all three.
    """
    pairs = [(c, s, (i + j) % len(SHAPES) == 0) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES)]
    if name == "other":
        return [Scene(c, "stripes", d) for d in DIRECTIONS for c in COLOURS]
    if name not in PROMPT_SETS:
        raise ValueError(f"prompt set {name!r}: must be in_domain, new or other")
    return [Scene(c, s, d) for d in DIRECTIONS for c, s, held_out in pairs if held_out == (name == "new")]


def mask(shape, x, y, r):
    """Coverage of each pixel by a shape of radius r, antialiased; x, y (F, H, W) pixels from its centre -> (F, H, W)."""
    if shape == "circle":
        d = (x**2 + y**2).sqrt() - r
    elif shape == "ring":
        d = ((x**2 + y**2).sqrt() - .75 * r).abs() - .30 * r
    elif shape == "square":
        d = torch.maximum(x.abs(), y.abs()) - .88 * r
    elif shape == "triangle":  # apex up
        d = torch.maximum(y - .75 * r, x.abs() * .87 - (y + 1.15 * r) * .5)
    else:  # cross: the nearer of two bars
        bar = lambda a, b: torch.maximum(a.abs() - 1.05 * r, b.abs() - .36 * r)
        d = torch.minimum(bar(x, y), bar(y, x))
    return (.5 - d).clamp(0, 1)


def stripes(position, period, ahead):
    """
    Coverage of each pixel by stripes, one to a period, antialiased; position (F, H, W) pixels along their way.

    ahead: 1 or -1 where they drift to greater or smaller positions: a sharp front with a fading trail behind. 0: no trail.
    """
    since_front = (position * (ahead or 1)) % period                                    # pixels
    if ahead:
        bars = torch.minimum(1.2 * since_front / period, period - since_front)
    else:
        bars = .5 + period / 4 - (since_front - period / 2).abs()
    return bars.clamp(0, 1)


def draw(scene, g, trail=None):
    """
    A clean clip of the scene: (F, 3, H, W) in [0, 1]. Place, size, speed and background come from the generator.

    trail: a direction whose trail is drawn instead of the scene's own, or "" for none (the judge's training needs them).
    """
    u = lambda lo, hi: lo + (hi - lo) * torch.rand((), generator=g).item()
    grid = torch.arange(SIZE) + .5
    yy, xx = (v[None] for v in torch.meshgrid(grid, grid, indexing="ij"))               # (1, H, W)
    phase = torch.linspace(-.5, .5, FRAMES)[:, None, None]                              # (F, 1, 1)
    dx, dy = DIRECTIONS.get(scene.direction, (0, 0))
    tx, ty = DIRECTIONS.get(scene.direction if trail is None else trail, (0, 0))

    # A neutral background: grey with a slight tint, lit from the upper left, brighter as time goes on. The light is the same
    # way round in all clips, so that the UNet, which is told neither place nor time, soon learns to tell both.
    light = u(.28, .46) + u(.05, .09) * (32 - xx - yy) / 16 + u(.12, .20) * phase        # (F, H, W)
    tint = (torch.rand(3, generator=g) - .5) * .06
    background = light[:, None] + tint[:, None, None]                                   # (F, 3, H, W)

    # It crosses the middle of the picture. Where exactly varies little, so that the direction word tells most of the layout.
    travel, along, across = u(14, 17), u(-1, 1), u(-2.5, 2.5)
    if scene.shape == "stripes":
        period = u(10.5, 12)
        position = (xx if dx or tx else yy) - (dx + dy) * u(.9, 1.1) * travel * phase + u(-1.5, 1.5)
        cover = stripes(position, period, tx + ty).expand(FRAMES, SIZE, SIZE)
    else:
        cx = 16 + dx * (travel * phase + along) + (abs(dy) or not dx) * across
        cy = 16 + dy * (travel * phase + along) + (abs(dx) or not dy) * across * (1 if dx else .5)
        r = u(6, 7.4)
        cover = mask(scene.shape, xx - cx, yy - cy, r)
        for k in (1, 2, 3) if tx or ty else ():  # the trail: fading copies where it was before
            ghost = mask(scene.shape, xx - cx + 2.4 * k * tx, yy - cy + 2.4 * k * ty, r)
            cover = torch.maximum(cover, (.52 - .14 * k) * ghost)
    colour = (torch.tensor(COLOURS[scene.colour]) * u(.88, 1.05)).clamp(0, 1)[:, None, None]
    return background + cover[:, None] * (colour - background)                           # (F, 3, H, W)


def watermark_band():
    """The watermark: a dashed band across the middle rows, (H, W), 0 where there is none and up to 1 where it is opaque."""
    band = torch.zeros(SIZE, SIZE)
    band[14:19] = .55
    band[15:18] = torch.where(torch.arange(SIZE) % 4 < 2, 1., .35)
    return band


def add_flaws(clip, strengths, g):
    """
    Spoil a clip (F, 3, H, W) the way web video is spoilt. strengths: {flaw: 0..1}, absent ones are 0.

    blur: Gaussian of up to 1.6 pixels; washout: contrast down to a third; noise: blotches of 4 pixels, new in every frame
    (finer noise would not survive the autoencoder); watermark: the band, up to 70% opaque.
    """
    if s := strengths.get("blur", 0):
        sigma = .6 + s
        k = torch.exp(-torch.arange(-4., 5.) ** 2 / (2 * sigma**2))
        k = (k / k.sum()).expand(3, 1, 1, 9)
        pad = F_.pad(clip, (4, 4, 4, 4), mode="replicate")
        clip = F_.conv2d(F_.conv2d(pad, k, groups=3), k.mT, groups=3)
    if s := strengths.get("washout", 0):
        keep = .75 - .4 * s
        clip = keep * clip + (1 - keep) * .62
    if s := strengths.get("noise", 0):
        blotches = torch.randn(len(clip), 3, SIZE // 4, SIZE // 4, generator=g) * (.03 + .05 * s)
        clip = clip + F_.interpolate(blotches, size=(SIZE, SIZE), mode="bilinear")
    if s := strengths.get("watermark", 0):
        alpha = (.4 + .3 * s) * watermark_band()
        clip = clip + alpha * (.92 - clip)
    return clip.clamp(0, 1)


def draw_flaws(g, rates):
    """Strengths of the flaws of one clip; rates {flaw: how often a clip has it}, as FLAWS."""
    dice, strengths = torch.rand(len(rates), generator=g).tolist(), torch.rand(len(rates), generator=g).tolist()
    return {f: .2 + .8 * s for (f, p), x, s in zip(rates.items(), dice, strengths) if x < p}


def make_clip(scene, seed, flaws=None, trail=None, rates=FLAWS):
    """
    One clip and its flaws from a seed: (F, 3, H, W) in [0, 1], {flaw: strength}.

    flaws: the strengths, if they are not to be drawn. rates: how often each flaw is drawn.
    """
    g = torch.Generator().manual_seed(seed)
    clip = draw(scene, g, trail)
    drawn = draw_flaws(g, rates)
    strengths = drawn if flaws is None else flaws
    return add_flaws(clip, strengths, g), strengths


WORDS = ("a", *COLOURS, *SHAPES, "stripes", "moving", "drifting", *DIRECTIONS)
CONTEXT_LENGTH = 8


def tokenizer():
    """The tiny world's tokenizer, the same for its text encoder and its preference model."""
    return WordTokenizer(WORDS, CONTEXT_LENGTH)
