"""docs/bases.md: the worked example of a base of one's own."""
import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import metrics

import sampler
import train
from bases import modelscope
from formats import weights
from model import load_base
from support import ranks
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


# ------------------------------------------- Text as a dict of tensors ----------------------------------------------------

class Words(modelscope.Base):
    """ModelScopeT2V's parts, told a dict: a caption's features and a number that they are multiplied by."""
    def encode_captions(self, captions):
        words = super().encode_captions(captions)
        return {"words": words / 2, "times": torch.full((len(words), 1), 2.)}

    def encode_text(self, captions):
        return ranks.stack([ranks.take(self.encode_captions([caption]), 0) for caption in captions], self.device)

    def unconditional(self, text=None):
        if text is None:  # on its way out of memory
            return None
        assert text["words"].shape[1:] == (77, 64) and len(text["words"]) == len(text["times"])
        return self.encode_text([""] * len(text["times"]))

    def fingerprints(self):
        vae, text = super().fingerprints()
        return [vae, f"{text} as a dict"]

    def predict(self, z_t, level, text):
        assert len(text["words"]) == len(z_t)
        return super().predict(z_t, level, text["words"] * text["times"][..., None])


@pytest.fixture
def told_a_dict(monkeypatch, aside, plain):
    """Clips and prompts in a folder, and random-words, whose weights are those of random:32."""
    module = types.ModuleType("bases.words")
    module.random = lambda base, *rest: Words(**vars(modelscope.random("random:32", *rest)))
    monkeypatch.setitem(sys.modules, "bases.words", module)
    monkeypatch.setitem(weights.NETWORKS, "WordsUNet", "words")
    for i in range(2):
        pixels = torch.randint(255, (6, 32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        write_video(Path(f"{i}.mp4"), pixels.numpy(), 8)
    Path("clips.txt").write_text("0.mp4|||a cat\n1.mp4|||a dog runs\n")
    Path("prompts.txt").write_text("a cat\na dog runs\n")


CLIPS = ["--data", "clips.txt", "--workers", "0", "--clips-at-once", "1"]
PROMPTS = ["--prompts-train", "prompts.txt"]


@pytest.mark.parametrize("name, flags", [
    ("train", [*CLIPS, "--prompts", "a=prompts.txt", "--eval-every", "1", "--eval-count", "2"]),
    *[pytest.param(name, flags, marks=pytest.mark.slow) for name, flags in [
        ("train", [*CLIPS, "--no-cache"]), ("methods.onestep", CLIPS),
        ("methods.draft", PROMPTS), ("methods.refl", PROMPTS), ("methods.vader", PROMPTS),
        ("methods.ddpo", [*PROMPTS, "--updates", "1"]), ("methods.rwr", [*PROMPTS, "--rounds", "1", "--videos", "4"]),
        ("methods.dpo", [*PROMPTS, "--rounds", "1", "--pairs", "4"])]]])
def test_text_may_be_a_dict_of_tensors(told_a_dict, name, flags):
    """The run is that of the same text as one tensor, bit for bit: divided by two and multiplied again, it is the same."""
    flags = ["--frames", "2", "--segments", "1", "--size", "32", "--num-steps", "2", "--steps", "1", "--batch-size", "2",
             "--device", "cpu", "--reward-weights", "random:32", *([] if "--eval-every" in flags else ["--eval-every", "0"]),
             *flags]
    for base in ("random:32", "random-words"):
        for _ in range(1 + (name == "train" and base == "random-words")):  # the second time of what is cached
            assert train.main(["modelscope", "--base", base, *flags, "--out", base, "--overwrite"],
                              importlib.import_module(name)) == 0
    assert metrics("random:32") == metrics("random-words")
    assert all(line["grad_norm"] > 0 for line in metrics("random-words") if "grad_norm" in line)


def test_guidance_may_differ_from_frame_to_frame():
    g = torch.Generator().manual_seed(0)
    z, text = torch.randn(2, 4, 3, 2, 2, generator=g), torch.randn(2, 1, 5, generator=g)

    def predict(z_t, level, text):
        return z_t * text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1), z_t

    L = sampler.Levels([0., 1.], [1., 1.], [0., 3.], first_guidance=1.)
    rising, _ = sampler.guided(predict, z, L, 1, text, 0 * text[:1], 3.)
    told, _ = sampler.guided(predict, z, L, 1, text, 0 * text[:1], torch.tensor([1., 2., 3.]))
    for frame, w in enumerate((1., 2., 3.)):  # by hand: what is unconditional is 0 here
        expected = w * predict(z, None, text)[0]
        torch.testing.assert_close(rising[:, :, frame], expected[:, :, frame])
    torch.testing.assert_close(rising, told, rtol=0, atol=0)
    plain = sampler.Levels([0., 1.], [1., 1.], [0., 3.])
    torch.testing.assert_close(sampler.guided(predict, z, plain, 1, text, 0 * text[:1], 3.)[0], 3 * predict(z, None, text)[0])
