"""
The tiny world: captioned clips of coloured shapes that move as the caption says, in the varied quality of web video.

tiny/README.md says why shapes have trails, which flaws there are, and how they were chosen.

Letters: F frames, H and W pixel rows and columns.
"""
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F_

from formats.word_tokenizer import WordTokenizer
from rewards import action
from rewards.action import FRAMES, SIZE  # it needs them too, as the names of the directions, and may not import the world

WAN_FRAMES = 17  # 4k + 1, as the second base needs
FPS = 8
COLOURS = {"red": (.90, .12, .12), "green": (.10, .72, .18), "blue": (.16, .28, .95),
           "yellow": (.95, .85, .10), "cyan": (.08, .80, .86), "purple": (.66, .16, .84)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = dict(zip(action.DIRECTIONS, ((-1, 0), (1, 0), (0, -1), (0, 1))))  # {"left": (x, y), ...}, y grows downwards
PROMPT_SETS = ("in_domain", "new", "other")
WORDS = ("a", *COLOURS, *SHAPES, "stripes", "moving", "drifting", *DIRECTIONS)
CONTEXT_LENGTH = 8
# How often a clip has each flaw; more than a quarter of the clips have none. Pale and blurred clips are few: a base that has
# seen many draws many, unless strong guidance brings colour and edges back, and that pulls squares into bow ties.
FLAWS = {"watermark": .55, "blur": .15, "washout": .12, "noise": .15}
WATERMARK_GREY = .92
TOKENIZER = WordTokenizer(WORDS, CONTEXT_LENGTH)  # of the text encoder and of the preference model


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
    found = []
    for names in (COLOURS, (*SHAPES, "stripes"), DIRECTIONS):
        named = [name for name in names if name in words]
        if len(named) != 1:
            raise ValueError(f"caption {caption!r}: the tiny world's captions name one colour, one shape and one direction")
        found += named
    return Scene(*found)


def scenes(name):
    """The scenes of a prompt set. "in_domain" and "new" split the shapes by colour and shape: fine-tuning sees four fifths of
    the pairs, "new" holds the rest; "other" is a category of its own, stripes. The base model has seen all three."""
    if name == "other":
        return [Scene(colour, "stripes", direction) for direction in DIRECTIONS for colour in COLOURS]
    wanted = []
    for direction, (i, colour), (j, shape) in product(DIRECTIONS, enumerate(COLOURS), enumerate(SHAPES)):
        held_out = (i + j) % len(SHAPES) == 0
        if held_out == (name == "new"):
            wanted.append(Scene(colour, shape, direction))
    return wanted


def repeat(scenes, count):
    """`count` scenes, the given ones in turn."""
    return [scenes[i % len(scenes)] for i in range(count)]


def mask(shape, x, y, r):
    """Coverage of each pixel by a shape of radius r, antialiased; x, y (F, H, W) pixels from its centre -> (F, H, W)."""
    if shape == "circle":
        outside = (x**2 + y**2).sqrt() - r
    elif shape == "ring":
        outside = ((x**2 + y**2).sqrt() - .75 * r).abs() - .30 * r
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - .88 * r
    elif shape == "triangle":  # apex up
        outside = torch.maximum(y - .75 * r, x.abs() * .87 - (y + 1.15 * r) * .5)
    else:  # cross: the nearer of two bars
        level_bar = torch.maximum(x.abs() - 1.05 * r, y.abs() - .36 * r)
        upright_bar = torch.maximum(y.abs() - 1.05 * r, x.abs() - .36 * r)
        outside = torch.minimum(level_bar, upright_bar)
    return (.5 - outside).clamp(0, 1)


def stripes(position, period, ahead):
    """Coverage of each pixel by stripes, one to a period, antialiased; position (F, H, W) pixels along their way.
    ahead: 1 or -1 where they drift to greater or smaller positions: a sharp front with a fading trail behind. 0: no trail."""
    since_front = (position * (ahead or 1)) % period                                    # pixels
    if ahead:
        return torch.minimum(1.2 * since_front / period, period - since_front).clamp(0, 1)
    return (.5 + period / 4 - (since_front - period / 2).abs()).clamp(0, 1)


def draw(scene, g, trail=None, frames=None):
    """A clean clip of the scene: (F, 3, H, W) in [0, 1]. Place, size, speed and background come from the generator g.
    trail: a direction whose trail is drawn instead of the scene's own, or "" for none (the judge's training needs them).
    frames: how many the same motion is spread over, default FRAMES."""
    frames = frames or FRAMES
    uniform = lambda low, high: low + (high - low) * torch.rand((), generator=g).item()
    x = torch.arange(SIZE)[None, None, :] + .5                                          # (1, 1, W)
    y = x.mT                                                                            # (1, H, 1)
    phase = torch.linspace(-.5, .5, frames)[:, None, None]                              # (F, 1, 1)
    dx, dy = DIRECTIONS.get(scene.direction, (0, 0))
    trail_x, trail_y = DIRECTIONS.get(scene.direction if trail is None else trail, (0, 0))

    # A neutral background: grey with a slight tint, lit from the upper left, brighter as time goes on. The light is the same
    # way round in all clips, so that the UNet, which is told neither place nor time, soon learns to tell both.
    light = uniform(.28, .46) + uniform(.05, .09) * (32 - x - y) / 16 + uniform(.12, .20) * phase       # (F, H, W)
    background = light[:, None] + (torch.rand(3, 1, 1, generator=g) - .5) * .06         # (F, 3, H, W)

    # It crosses the middle of the picture. Where exactly varies little, so that the direction word tells most of the layout.
    travel = uniform(14, 17)
    along = uniform(-1, 1)
    across = uniform(-2.5, 2.5)
    if scene.shape == "stripes":
        period = uniform(10.5, 12)
        position = (x if dx or trail_x else y) - (dx + dy) * uniform(.9, 1.1) * travel * phase + uniform(-1.5, 1.5)
        cover = stripes(position, period, trail_x + trail_y).expand(frames, SIZE, SIZE)
    else:
        centre_x = 16 + dx * (travel * phase + along) + (0 if dx else across)
        centre_y = 16 + dy * (travel * phase + along) + (0 if dy else across) * (1 if dx else .5)
        r = uniform(6, 7.4)
        cover = mask(scene.shape, x - centre_x, y - centre_y, r)
        for k in (1, 2, 3) if trail_x or trail_y else ():  # the trail: fading copies where it was before
            ghost = mask(scene.shape, x - centre_x + 2.4 * k * trail_x, y - centre_y + 2.4 * k * trail_y, r)
            cover = torch.maximum(cover, (.52 - .14 * k) * ghost)
    colour = (torch.tensor(COLOURS[scene.colour]) * uniform(.88, 1.05)).clamp(0, 1)[:, None, None]
    return background + cover[:, None] * (colour - background)                           # (F, 3, H, W)


def watermark_band():
    """The watermark: a dashed band across the middle rows, (H, W), 0 where there is none and up to 1 where it is opaque."""
    band = torch.zeros(SIZE, SIZE)
    band[14:19] = .55
    band[15:18] = torch.where(torch.arange(SIZE) % 4 < 2, 1., .35)
    return band


def add_watermark(clip, opacity):
    """Lay the band, up to so opaque, over frames (..., 3, H, W)."""
    return clip + opacity * watermark_band() * (WATERMARK_GREY - clip)


def add_flaws(clip, strengths, g):
    """Spoil a clip (F, 3, H, W) the way web video is spoilt. strengths: {flaw: 0..1}, absent ones are 0.
    blur: Gaussian of up to 1.6 pixels; washout: contrast down to a third; noise: blotches of 4 pixels, new in every frame
    (finer noise would not survive the autoencoder); watermark: the band, up to 70% opaque."""
    if blur := strengths.get("blur", 0):
        kernel = torch.exp(-torch.arange(-4., 5.) ** 2 / (2 * (.6 + blur)**2))
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, 9)
        clip = F_.conv2d(F_.conv2d(F_.pad(clip, (4, 4, 4, 4), "replicate"), kernel, groups=3), kernel.mT, groups=3)
    if washout := strengths.get("washout", 0):
        kept = .75 - .4 * washout
        clip = kept * clip + (1 - kept) * .62
    if noise := strengths.get("noise", 0):
        blotches = torch.randn(len(clip), 3, SIZE // 4, SIZE // 4, generator=g) * (.03 + .05 * noise)
        clip = clip + F_.interpolate(blotches, size=(SIZE, SIZE), mode="bilinear")
    if watermark := strengths.get("watermark", 0):
        clip = add_watermark(clip, .4 + .3 * watermark)
    return clip.clamp(0, 1)


def make_clip(scene, seed, flaws=None, trail=None, rates=FLAWS, frames=None):
    """One clip and its flaws from a seed: (F, 3, H, W) in [0, 1], {flaw: strength}.
    flaws: the strengths, if they are not to be drawn. rates: how often each flaw is drawn. trail, frames: as in draw."""
    g = torch.Generator().manual_seed(seed)
    clip = draw(scene, g, trail, frames)
    chances = torch.rand(len(rates), generator=g).tolist()
    strengths = torch.rand(len(rates), generator=g).tolist()
    if flaws is None:
        drawn = zip(rates, chances, strengths)
        flaws = {name: .2 + .8 * strength for name, chance, strength in drawn if chance < rates[name]}
    return add_flaws(clip, flaws, g), flaws
