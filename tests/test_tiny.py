"""The tiny world: its judge on shapes whose faults are known, its own rewards, and the script that rebuilds its weights."""
import json
import math

import pytest
import torch

from formats.weights import TINY
from model import UNet3D, load_base
from reward import load_reward
from rewards import action
from tiny import build, judge, world
from tiny.judge import load_judge

# ---- The judge: how a shape is drawn and how steadily it moves -----------------------------------------------------

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


def test_every_shape_fits_its_own_name_best_and_drawn_badly_less():
    x, y = grid(17.1, 14.6)
    found = {(a, b): fidelity(drawn(a, x, y), b) for a in world.SHAPES for b in world.SHAPES}
    for a in world.SHAPES:
        assert found[a, a] > .97
        assert max(found[a, b] for b in world.SHAPES if b != a) < .88
    assert fidelity(bow_tie(x, y), "square") < .85
    assert fidelity(world.mask("circle", x, y, 1.05 * RADIUS), "ring") < .85


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


# ---- Its own rewards, with the weights that ship -------------------------------------------------------------------

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


# ---- The script that rebuilds the weights: every stage runs, what it writes loads, and a seed gives the same files -

@pytest.mark.slow
def test_the_stages_build_a_world_that_loads(short_clips, tmp_path, monkeypatch):
    scenes = [world.Scene(c, "circle", d) for c in ("red", "blue") for d in ("left", "right")]  # near ones differ in one word
    monkeypatch.setattr(build, "all_scenes", lambda: scenes)
    monkeypatch.setattr(action, "FRAMES", world.FRAMES)
    monkeypatch.setattr(build.Base, "default_frames", world.FRAMES)
    monkeypatch.setattr(build, "NUM_STEPS", 2)
    def run(out, stages):
        build.main(build.Config(stages=stages, out=out, seed=3, device="cpu", threads=1, max_steps=2, clips=8, gate_count=1))
        return json.loads((out / "manifest.json").read_text())
    with pytest.raises(SystemExit, match="gates missed: fresh clips: action "):  # after two steps of everything
        run(tmp_path / "a", tuple(build.STAGES["tiny"]))
    whole = json.loads((tmp_path / "a/manifest.json").read_text())
    judged = {f"{of}, {name}" for of in ("through the autoencoder", "base") for name in world.PROMPT_SETS}
    assert json.loads((tmp_path / "a/gates.json").read_text()).keys() == judged | {"fresh clips", "still clips"}
    assert json.loads((tmp_path / "a/unet/config.json").read_text())["guidance"] == build.GUIDANCE

    base = load_base(str(tmp_path / "a"))
    assert base.default_size == world.SIZE and base.encode_text(["a red circle moving left"]).shape == (1, 8, 64)
    assert load_reward(base_folder=base.folder).name == "HPStiny"
    assert load_judge(tmp_path / "a/judge.safetensors")(torch.rand(1, 4, 3, 32, 32))[2].shape == (1, 5)
    for kind, shape in (("action:up", (1, 1)), ("removal:watermark", (1, 4))):
        assert load_reward(kind, base_folder=base.folder)(torch.rand(1, 4, 3, 32, 32), ["a"]).shape == shape

    again = run(tmp_path / "b", ("vae", "clip"))  # a stage alone gives what it gave among the others
    assert again == {name: digest for name, digest in whole.items() if name in again}
    (tmp_path / "a/removal/model.safetensors").unlink()
    assert run(tmp_path / "a", ("removal",)) == whole


def test_a_base_below_a_gate_is_named_with_the_measure_and_the_prompt_set():
    good = build.GATES | dict.fromkeys(build.GATES_OF_COPIES, 1.) | {"removal": .95}
    means = {f"{of}, {name}": dict(good) for of in ("through the autoencoder", "base") for name in world.PROMPT_SETS}
    means["fresh clips"] = {"action": .97}
    assert build.missed_gates(means) == []
    means["base, new"]["shape"], means["base, other"]["fidelity"] = .94, .89
    assert build.missed_gates(means) == ["base, new: shape 0.940 < 0.950", "base, other: fidelity 0.890 < 0.900"]
    means["through the autoencoder, other"]["fidelity"] = .98  # the copies set the scale
    assert build.missed_gates(means) == ["base, new: shape 0.940 < 0.950"]
    means["fresh clips"]["action"], means["through the autoencoder, new"]["removal"] = .96, .94
    worse = ["fresh clips: action 0.960 < 0.970", "through the autoencoder, new: removal 0.940 < 0.950"]
    assert build.missed_gates(means) == [*worse, "base, new: shape 0.940 < 0.950"]


def test_the_untrained_unet_returns_its_input_at_high_noise_to_a_hundredth():
    unet, g = UNet3D(build.UNET), torch.Generator().manual_seed(0)
    build.start_as_identity(unet)
    z_t, text = torch.randn(2, 4, 16, 8, 8, generator=g), torch.randn(2, 8, 64, generator=g)
    error = unet(z_t, torch.tensor([951, 801]), text) - z_t
    assert error.square().mean().sqrt() < .01
    assert all(p.requires_grad for p in unet.parameters())
