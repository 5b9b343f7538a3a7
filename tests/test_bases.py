"""docs/bases.md: the worked example of a base of one's own."""
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import metrics

import sampler
import train
from formats import weights
from model import load_base
from support.videos import write_video

DOCS = Path(__file__).resolve().parent.parent / "docs/bases.md"


@pytest.fixture
def velocity(monkeypatch):
    """The example, as if its file lay in bases/."""
    example, = [lines for lines in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL) if "class Base" in lines]
    module = types.ModuleType("bases.velocity")
    exec(example, vars(module))
    monkeypatch.setitem(sys.modules, "bases.velocity", module)
    monkeypatch.setitem(weights.NETWORKS, "VelocityUNet", "velocity")
    return load_base("random-velocity")


def test_its_guesses_fit_its_levels_and_its_network(velocity):
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 1, *velocity.latent_shape(2, 32, 32), generator=g)
    text, levels = velocity.encode_text(["a cat"]), velocity.levels(4)
    z_t = sampler.add_noise(z, noise, levels, 3)
    z_0, eps = velocity.predict(z_t, (levels.t[3], levels.alpha[3], levels.sigma[3]), text)
    torch.testing.assert_close(sampler.add_noise(z_0, eps, levels, 3), z_t, rtol=0, atol=1e-5)
    v = velocity.network(z_t, torch.tensor([levels.t[3]]), text)
    torch.testing.assert_close(levels.alpha[3] * eps - levels.sigma[3] * z_0, v, rtol=0, atol=1e-5)
    loss = velocity.error(z_0, eps, z, noise, (levels.t[3], levels.alpha[3], levels.sigma[3]))
    torch.testing.assert_close(loss, (v - (levels.alpha[3] * noise - levels.sigma[3] * z)).square().mean()[None])


def test_it_has_no_published_size(velocity):
    with pytest.raises(ValueError, match="base random-velocity:full: bases/velocity.py has no published"):
        load_base("random-velocity:full")


@pytest.mark.usefixtures("aside")
def test_it_trains(velocity):
    pixels = torch.randint(255, (6, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(Path("a.mp4"), pixels.numpy(), 8)
    Path("clips.txt").write_text("a.mp4|||a cat\n")
    flags = "--data clips.txt --workers 0 --frames 2 --segments 1 --size 32 --num-steps 2 --steps 1 --batch-size 1 --eval-every 0"
    assert train.main(["modelscope", "--base", "random-velocity", "--reward-weights", "random:32", "--device", "cpu",
                       *flags.split(), "--out", "run"]) == 0
    assert metrics("run")[0]["grad_norm"] > 0
