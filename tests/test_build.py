"""The script that rebuilds the tiny world's weights: every stage runs, what it writes loads, and a seed gives the same files."""
import json

import pytest
import torch

from model import UNet3D, load_base
from reward import load_reward
from rewards import action
from tiny import build, world
from tiny.judge import load_judge


def test_the_stages_build_a_world_that_loads(short_clips, tmp_path, monkeypatch):
    scenes = [world.Scene(c, "circle", d) for c in ("red", "blue") for d in ("left", "right")]  # near ones differ in one word
    monkeypatch.setattr(build, "all_scenes", lambda: scenes)
    monkeypatch.setattr(action, "FRAMES", world.FRAMES)
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
