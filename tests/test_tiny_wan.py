"""The tiny world's second base: what builds it, what it brings, and that every method trains on it."""
import importlib
import json
import math
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import JUDGED, ONCE, assert_same_run, metrics

import evaluate
import explain
import generate
import train
from formats.weights import TINY
from model import load_base
from reward import load_reward
from tiny import build, clips, flow, world
from tiny.judge import judge_clips, load_judge
from tiny.pretraining import render


@pytest.fixture(scope="module")
def base():
    return load_base("tiny-wan")


def clip_of(caption, frames=world.WAN_FRAMES, flaws=None):
    return world.make_clip(world.parse(caption), 3, flaws or {}, frames=frames)[0]


@pytest.mark.slow
def test_its_stages_build_a_base_that_loads_and_a_seed_gives_the_same_files(tmp_path, monkeypatch):
    scenes = [world.Scene(c, "circle", d) for c in ("red", "blue") for d in ("left", "right")]
    for module in (build, flow):
        monkeypatch.setattr(module, "all_scenes", lambda: scenes)
    monkeypatch.setattr(build, "NUM_STEPS", 2)

    def run(out, *stages):
        build.main(build.Config(base="tiny-wan", stages=stages, out=out, device="cpu", max_steps=2, clips=8, gate_count=1))
        return json.loads((out / "manifest.json").read_text())

    with pytest.raises(SystemExit, match="gates missed: .*base, new: shape"):  # after two steps of everything
        run(tmp_path / "a")
    again = run(tmp_path / "b", "vae", "transformer")
    whole = json.loads((tmp_path / "a/manifest.json").read_text())
    assert again == {name: digest for name, digest in whole.items() if name in again} and "transformer/config.json" in again
    made = load_base(str(tmp_path / "a"))
    assert made.world is clips and made.encode_text(["a red circle moving left"]).shape == (1, 8, 64)
    with pytest.raises(SystemExit, match="stages unet: tiny-wan has vae, transformer, preference, gates"):
        run(tmp_path / "c", "unet")


def test_many_clips_at_once_are_encoded_and_decoded_as_one(base):
    drawn, _ = render(world.scenes("new")[:2], 5, frames=world.WAN_FRAMES)
    z = flow.encode(base, drawn)
    one = base.encode(drawn[1].float() * 2 - 1)
    torch.testing.assert_close(z[1:], one, rtol=0, atol=1e-4)
    torch.testing.assert_close(flow.decode(base, z)[1:].clamp(0, 1), base.decode_frames(one).clamp(0, 1), rtol=0, atol=1e-4)


def test_the_proxy_is_the_other_bases_preference_model(base):
    frames, caption = clip_of("a red circle moving left")[None, :4], ["a red circle moving left"]
    for folder, other in ((base.folder, TINY), (TINY, base.folder)):
        proxy = load_reward("proxy", base_folder=folder)
        assert proxy.name == "HPSproxy"
        assert torch.equal(proxy(frames, caption), load_reward(base_folder=other)(frames, caption))
    with pytest.raises(ValueError, match="proxy: is for the tiny world alone"):
        load_reward("proxy")


def test_its_latents_have_mean_0_and_deviation_1_and_its_copies_are_close(base):
    drawn, _ = render(world.repeat(world.scenes("in_domain"), 12), 77, frames=world.WAN_FRAMES)
    with torch.no_grad():
        z = flow.encode(base, drawn)
        copies = flow.decode(base, z).clamp(0, 1)
    assert abs(z.mean()) < .1 and abs(z.std() - 1) < .15
    assert -10 * math.log10((copies - drawn.float()).square().mean()) > 29


def test_the_same_motion_is_spread_over_one_frame_more():
    short, long = clip_of("a red circle moving left", 16), clip_of("a red circle moving left", 17)
    assert len(long) == 17
    torch.testing.assert_close([long[0], long[-1]], [short[0], short[-1]])
    judged = judge_clips(load_judge(), long[None, :16], ["a red circle moving left"])
    assert judged["direction"] == judged["colour"] == judged["shape"] == 1


@pytest.mark.parametrize("rows", [-4, -2, 0, 3, 4])
def test_a_watermark_that_moved_has_not_gone(rows):
    clean = clip_of("a blue square moving up", 16)
    band = world.watermark_band().roll(rows, dims=0)
    marked = clean + .6 * band * (world.WATERMARK_GREY - clean)
    seen = judge_clips(load_judge(), torch.stack([clean, marked]), ["a blue square moving up"] * 2)["watermark"]
    assert seen[0] < .03 and seen[1] > .2


FLAGS = ["--base", "tiny-wan", "--num-steps", "5", "--batch-size", "2", "--device", "cpu", "--save-every", "1"]


@pytest.fixture
def few(aside, monkeypatch):
    monkeypatch.setattr(clips, "COUNT", 2)


@pytest.mark.slow
def test_a_run_by_defaults_has_its_own_clips_prompts_reward_and_judge(few):
    assert train.main([*FLAGS, "--eval-count", "1", "--eval-every", "2", "--steps", "1", "--out", "run"]) == 0
    settings = json.loads(Path("run/config.json").read_text())
    assert settings["preset"] == "tiny-wan"
    assert (settings["frames"], settings["tau"], settings["lr"], settings["anchor"]) == (17, .4, 5e-4, .02)
    measured = metrics("run")[-1]["eval"]
    assert measured.keys() == set(world.PROMPT_SETS) and measured["new"].keys() >= JUDGED | {"reward_mean"}


@pytest.mark.slow
def test_it_goes_on_bit_for_bit_and_the_scripts_read_its_adapter(few):
    flags = [*FLAGS, "--eval-count", "1", "--eval-every", "1"]
    assert train.main([*flags, "--steps", "2", "--out", "whole"]) == 0
    assert train.main([*flags, "--steps", "1", "--out", "parts"]) == 0
    assert train.main(["--resume", "parts", "--steps", "2"]) == 0
    assert_same_run("parts", "whole")
    adapter = Path("whole/lora.safetensors")
    generate.main(generate.Config(base="tiny-wan", prompt=["a red ring moving up"], num_steps=2, lora=adapter, out=Path("made")))
    assert len(iio.imread(next(Path("made").glob("*.mp4")))) == 17
    evaluate.main(evaluate.Config(base="tiny-wan", lora=adapter, num_steps=(2,), count=1, device="cpu", out=Path("table")))
    assert {row["model"] for row in json.loads(Path("table/table.json").read_text())["results"]} == {"base", "fine-tuned"}


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [*ONCE.items(), ("onestep", [])])
def test_every_method_trains_three_steps(few, name, flags):
    module = importlib.import_module(f"methods.{name}")
    assert train.main([*FLAGS, "--eval-every", "0", "--steps", "3", *flags, "--out", name], module) == 0
    assert all(0 < line["grad_norm"] < math.inf for line in metrics(name))


@pytest.mark.slow
def test_the_page_that_explains_a_step_is_drawn_of_it(few, monkeypatch):
    for name, value in {"TAUS": (), "GRAD_STEPS": (), "SEGMENTS": (), "LAMBDAS": (), "REPEATS": 2}.items():
        monkeypatch.setattr(explain, name, value)
    explain.main(explain.PRESETS["tiny-wan"])
    assert Path("out/explain/explain.png").stat().st_size > 10_000
