"""The judge's measures of how a shape is drawn and how steadily it moves, on shapes whose faults are known."""
import math

import pytest
import torch

from tiny import judge, world

RADIUS = 6.7


def grid(cx, cy):
    """Pixels from a centre: x and y (F, H, W) for the centres of F frames."""
    at = torch.arange(world.SIZE) + .5
    cx, cy = (torch.as_tensor(c, dtype=torch.float32).reshape(-1, 1, 1) for c in (cx, cy))
    return at[None, None, :] - cx, at[None, :, None] - cy


def paint(cover):
    """A red clip on plain grey: cover (F, H, W) -> (1, F, 3, H, W)."""
    colour = torch.tensor(world.COLOURS["red"])[:, None, None]
    return (.4 + cover[:, None] * (colour - .4))[None]


def fidelity(cover, shape):
    mask = judge.shape_mask(paint(cover.expand(world.FRAMES, -1, -1)))[0]
    return judge.fidelity(mask, world.Scene("red", shape, "right")).item()


def steadiness(cover):
    return judge.steadiness(judge.shape_mask(paint(cover))).item()


def drawn(shape, x, y):
    return world.mask(shape, x, y, RADIUS)


def bow_tie(x, y):
    """A square whose four sides are drawn in by up to a third, so that its corners stick out."""
    half = .88 * RADIUS
    sag = torch.minimum(x.abs(), y.abs()) / half  # 0 in the middle of a side, 1 at a corner
    return (.5 - (torch.maximum(x.abs(), y.abs()) - half * (.67 + .33 * sag))).clamp(0, 1)


def pebble(x, y):
    radius = RADIUS * (1 + .2 * torch.cos(3 * torch.atan2(y, x)))
    return (.5 - ((x**2 + y**2).sqrt() - radius)).clamp(0, 1)


def hollow_square(x, y):
    return drawn("square", x, y) - .6 * world.mask("square", x, y, .55 * RADIUS)


@pytest.mark.parametrize("shape, faulty, at_most", [
    ("square", bow_tie, .85), ("circle", pebble, .87), ("square", hollow_square, .87),
    ("ring", lambda x, y: world.mask("circle", x, y, 1.05 * RADIUS), .85)])
def test_a_shape_drawn_badly_has_a_lower_fidelity_than_the_shape(shape, faulty, at_most):
    x, y = grid(15.3, 16.8)
    assert fidelity(drawn(shape, x, y), shape) > .97
    assert fidelity(faulty(x, y), shape) < at_most


def test_every_shape_fits_its_own_name_best():
    x, y = grid(17.1, 14.6)
    found = {(a, b): fidelity(drawn(a, x, y), b) for a in world.SHAPES for b in world.SHAPES}
    for a in world.SHAPES:
        assert found[a, a] > .96
        assert max(found[a, b] for b in world.SHAPES if b != a) < .88


@pytest.mark.parametrize("shape", judge.SHAPES)
@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_a_drawn_clip_sets_the_top_of_both_scales_whatever_its_trail_watermark_and_colour(shape, direction):
    scenes = [world.Scene(c, shape, direction) for c in ("yellow", "purple")]
    for flaws in ({}, {"watermark": .9}, {"washout": .9}):
        clips = torch.stack([world.make_clip(s, 40 + i, flaws)[0] for i, s in enumerate(scenes)])
        masks = judge.shape_mask(clips)
        for mask, scene in zip(masks, scenes):
            assert judge.fidelity(mask, scene) > .92
        assert judge.steadiness(masks).min() > .93


def test_the_mask_leaves_out_the_trail_and_sees_through_the_watermark():
    scene = world.Scene("green", "square", "left")
    clips = [world.make_clip(scene, 3, *how)[0] for how in (({}, ""), ({}, None), ({"watermark": 1.}, None))]
    alone, with_trail, marked = judge.shape_mask(torch.stack(clips))
    assert judge.overlap(with_trail, alone).min() > .97
    assert judge.overlap(marked, alone).min() > .93


def test_stripes_the_other_way_round_or_too_narrow_fit_badly():
    x, _ = grid(0., 0.)
    right = world.stripes(x - 2, 11., 1).expand(1, world.SIZE, -1)
    wrong = world.stripes(x - 2, 11., -1).expand(1, world.SIZE, -1)
    narrow = world.stripes(x - 2, 6., 1).expand(1, world.SIZE, -1)
    assert fidelity(right, "stripes") > .93
    assert max(fidelity(c, "stripes") for c in (wrong, narrow)) < .80


def test_jitter_of_place_or_of_size_and_flicker_lower_steadiness():
    path, wobble = torch.linspace(8.5, 23.5, world.FRAMES), torch.tensor([1., -1.]).repeat(world.FRAMES // 2)
    x, y = grid(path, 16.)
    steady = steadiness(drawn("square", x, y))
    assert steady > .97
    assert steadiness(drawn("square", *grid(path + wobble, 16.))) < steady - .08
    assert steadiness(drawn("square", *grid(path, 16. + wobble))) < steady - .08
    assert steadiness(world.mask("square", x, y, RADIUS + wobble[:, None, None])) < steady - .08
    assert steadiness(drawn("square", x, y) * (wobble > 0)[:, None, None]) < .1
    assert steadiness(drawn("ring", *grid(torch.full((world.FRAMES,), 16.), 16.))) > .99  # one that stands still is steady too


def test_a_clip_without_any_colour_has_no_shape_and_no_nan():
    grey = torch.full((1, world.FRAMES, 3, world.SIZE, world.SIZE), .4)
    mask = judge.shape_mask(grey)
    assert mask.sum() == 0 and judge.steadiness(mask).item() == 0
    assert [judge.fidelity(mask[0], world.Scene("red", s, "up")).item() for s in judge.SHAPES] == [0] * len(judge.SHAPES)


def test_judge_clips_reports_both_for_each_clip_as_if_it_were_alone():
    scenes = [world.Scene("red", "square", "left"), world.Scene("blue", "stripes", "up"), world.Scene("cyan", "ring", "down")]
    clips = torch.stack([world.make_clip(s, 7 + i, {})[0] for i, s in enumerate(scenes)])
    torch.manual_seed(0)
    untrained = judge.Judge().eval()
    together = judge.judge_clips(untrained, clips, [s.caption for s in scenes])
    for i, scene in enumerate(scenes):
        alone = judge.judge_clips(untrained, clips[i:i + 1], [scene.caption])
        for name in ("fidelity", "steadiness"):
            assert math.isclose(together[name][i].item(), alone[name].item(), abs_tol=1e-5)
            assert alone[name].item() > .9
