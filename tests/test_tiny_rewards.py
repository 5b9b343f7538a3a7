"""The tiny world's own rewards with the weights that ship: an action, which only the order of frames tells, and a removal."""
import pytest
import torch

from formats.weights import TINY
from reward import load_reward
from tiny import build, judge, world


def clips(rows, flaws=None):
    """Clips (B, F, 3, H, W) of rows (colour, shape, direction, trail), on seeds that no training has seen."""
    made = [world.make_clip(world.Scene(*row[:3]), 77_000_000 + i, flaws=flaws or {}, trail=row[3])[0]
            for i, row in enumerate(rows)]
    return torch.stack(made)


def scores(kind, frames):
    with torch.no_grad():
        return load_reward(kind, base_folder=TINY)(frames, ["a"] * len(frames))


def directions(frames):
    """Probabilities of the four, (B, 4)."""
    return torch.cat([scores(f"action:{d}", frames) for d in world.DIRECTIONS], dim=1).exp()


def test_an_action_is_told_by_motion_and_not_by_the_trail():
    opposite = dict(zip(world.DIRECTIONS, ("right", "left", "down", "up")))
    rows = [(colour, shape, d, trail) for d in world.DIRECTIONS for trail in (None, "", opposite[d])
            for colour, shape in (("red", "circle"), ("blue", "cross"), ("green", "ring"))]
    rows += [(colour, "stripes", d, None) for d in world.DIRECTIONS for colour in ("cyan", "purple", "yellow")]
    frames, truth = clips(rows), torch.tensor([[*world.DIRECTIONS].index(row[2]) for row in rows])
    found = directions(frames)
    assert found.shape == (48, 4) and (found.sum(dim=1) < 1 + 1e-5).all()
    assert (found.argmax(dim=1) == truth).float().mean() > .95
    assert (judge.left(frames, [""] * 48)[:, 0] == (truth == 0)).float().mean() > .95
    backwards = directions(frames.flip(1))
    assert (backwards.argmax(dim=1) == (truth ^ 1)).float().mean() > .9  # left for right, up for down
    for pace in (0., .2, .4):  # a shape that hardly moves must not satisfy the reward
        assert (directions(build.slowed(frames, pace)).sum(dim=1) < .5).float().mean() > .9, pace


def test_a_watermark_is_seen_in_every_frame_and_a_faint_one_too():
    rows = [(colour, shape, d, None) for colour in ("blue", "yellow") for shape in ("ring", "stripes") for d in world.DIRECTIONS]
    plain = scores("removal:watermark", clips(rows))
    marked = scores("removal:watermark", clips(rows, {"watermark": .5}))
    assert plain.shape == (16, 16) and (plain.exp() > .5).float().mean() > .95 and (marked.exp() < .5).float().mean() > .95
    faint = world.add_watermark(clips(rows), .3)
    assert (scores("removal:watermark", faint).exp() < .5).float().mean() > .95


@pytest.mark.parametrize("kind", ["action:right", "removal:watermark"])
def test_the_gradient_is_as_large_where_the_reward_is_lowest(kind):
    reward = load_reward(kind, base_folder=TINY)
    wrong = clips([("red", "square", "left", None)], {"watermark": 1.}).requires_grad_()
    right = clips([("red", "square", "right", None)]).requires_grad_()
    low, high = reward(wrong, ["a"]).mean(), reward(right, ["a"]).mean()
    assert low < high
    low.backward(), high.backward()
    assert wrong.grad.norm() > 10 * right.grad.norm() > 0
