"""The script that rebuilds the tiny world's weights: every stage runs, what it writes loads, and a seed gives the same files."""
import json

import pytest
import torch

from model import UNet3D, load_base
from reward import load_reward
from tiny import build, world
from tiny.judge import load_judge


def test_the_stages_build_a_world_that_loads(tmp_path, monkeypatch):
    scenes = [world.Scene(c, "circle", d) for c in ("red", "blue") for d in ("left", "right")]  # near ones differ in one word
    monkeypatch.setattr(build, "all_scenes", lambda: scenes)
    def run(out, stages):
        build.main(build.Config(stages=stages, out=out, seed=3, device="cpu", threads=1, vae_steps=2, clip_steps=2, image_steps=2,
                                unet_steps=2, preference_steps=2, judge_steps=2, clips=8, gate_count=2))
        return json.loads((out / "manifest.json").read_text())
    with pytest.raises(SystemExit, match="gates missed: base, in_domain: "):  # after two steps of everything
        run(tmp_path / "a", build.STAGES)
    whole = json.loads((tmp_path / "a/manifest.json").read_text())
    assert {name.split("/")[0] for name in whole} == {"vae", "unet", "text_encoder", "reward", "judge.safetensors", "gates.json"}
    assert json.loads((tmp_path / "a/gates.json").read_text()).keys() == {
        "fresh clips", "through the autoencoder", "still clips", "base, in_domain", "base, new", "base, other"}

    base = load_base(str(tmp_path / "a"))
    assert base.default_size == world.SIZE and base.encode_text(["a red circle moving left"]).shape == (1, 8, 64)
    assert load_reward(base_folder=base.folder).name == "HPStiny"
    assert load_judge(tmp_path / "a/judge.safetensors")(torch.rand(1, 16, 3, 32, 32))[2].shape == (1, 5)

    again = run(tmp_path / "b", ("vae", "clip"))  # a stage alone gives what it gave among the others
    assert again == {name: digest for name, digest in whole.items() if name in again}


def test_the_untrained_unet_returns_its_input_at_high_noise_to_a_hundredth():
    unet, g = UNet3D(build.UNET), torch.Generator().manual_seed(0)
    build.start_as_identity(unet)
    z_t, text = torch.randn(2, 4, 16, 8, 8, generator=g), torch.randn(2, 8, 64, generator=g)
    error = unet(z_t, torch.tensor([951, 801]), text) - z_t
    assert error.square().mean().sqrt() < .01
    assert all(p.requires_grad for p in unet.parameters())
