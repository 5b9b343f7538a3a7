"""What is asked of every base: runs of all methods, resumed and on two ranks, and sizes. And docs/bases.md: one of one's own."""
import importlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ONCE, assert_nearly_same_run, assert_same_run, docs_example, metrics, randn32, refused, seeded, write_noise
from test_ranks import two_ranks

import sampler
import train
from bases import opensora
from formats import adapters, weights
from model import load_base
from support import ranks

# ----------------------------------------------- Every base but the first -------------------------------------------------

OF_BASE = {"wan": ["--frames", "9"], "cogvideox": ["--frames", "9"], "opensora": ["--frames", "17"],
           "videocrafter": ["--frames", "4", "--size", "32x40", "--fps", "16", "--lora-layers", "qkv", "--lora-alpha", "2"],
           "svd": ["--frames", "6", "--tau", ".75"]}
SMALL = ["--size", "32", "--num-steps", "4", "--batch-size", "2", "--reward-weights", "random:32", "--device", "cpu",
         "--eval-every", "0", "--save-every", "1"]
ON_CLIPS = ["--data", "clips.txt", "--workers", "0"]
ON_PROMPTS = ["--prompts-train", "prompts.txt"]
METHODS = [*(ONCE | {"vader": ["--reward", "hpsv2"]}).items(), ("onestep", ON_CLIPS), ("rwr", ON_CLIPS)]


def run_base(base, *flags, method=train):
    of_base = [flag for flag in OF_BASE[base] if method is train or flag not in ("--tau", ".75")]
    return train.main([base, "--base", f"random-{base}", *SMALL, *of_base, *map(str, flags)], method)


@pytest.mark.slow
@pytest.mark.parametrize("base", OF_BASE)
def test_a_run_is_continued_bit_for_bit(base, animals):
    """And the cache changes nothing."""
    assert run_base(base, *ON_CLIPS, "--max-skip", 0, "--steps", 3, "--out", f"{base}-whole") == 0
    assert run_base(base, *ON_CLIPS, "--max-skip", 0, "--steps", 2, "--no-cache", "--out", f"{base}-parts") == 0
    assert train.main(["--resume", f"{base}-parts", "--steps", "3", "--cache"]) == 0
    assert_same_run(f"{base}-parts", f"{base}-whole")
    lines = metrics(f"{base}-whole")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["grad_norm"] > 0 for line in lines)
    if base == "videocrafter":  # whose flags name three projections and an alpha
        adapter = adapters.read_adapter(f"{base}-whole")
        assert adapter.alpha == 2 and not [name for name in adapter.tensors if "to_out" in name]


@pytest.mark.slow
@pytest.mark.parametrize("base, flags", [("wan", ["--size", "32x48", "--latent-context", 1, "--no-cache"]), ("svd", [])])
def test_two_ranks_do_what_one_does(base, flags, animals):
    """Wan on oblong clips, with gradient through one latent of a frame alone."""
    flags = [*ON_CLIPS, *flags, "--steps", 2]
    one_rank, both = f"{base}-one-rank", f"{base}-two-ranks"
    assert run_base(base, *flags, "--out", one_rank) == 0
    ended, _ = two_ranks(lambda rank: ranks.run_script("train.py", lambda: run_base(base, *flags, "--out", both)))
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert_nearly_same_run(both, one_rank)
    assert all(line["grad_norm"] > 0 for line in metrics(both))


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", METHODS)
@pytest.mark.parametrize("base", OF_BASE)
def test_every_method_trains_three_steps(base, name, flags, animals, monkeypatch):
    """Open-Sora's levels are those of the run's own size, wherever they are asked for."""
    asked, out = [], f"{base}-{name}-{flags == ON_CLIPS}"
    monkeypatch.setattr(opensora.OpenSora, "levels", lambda self, *args: asked.append(args) or opensora.levels(*args))
    has_chain = (name, flags) != ("rwr", ON_CLIPS)  # real clips are noised to levels of training
    flags = [*flags, *([] if flags == ON_CLIPS else ON_PROMPTS), "--steps", "3", "--out", out]
    assert run_base(base, *flags, method=importlib.import_module(f"methods.{name}")) == 0
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3] and all(0 < line["grad_norm"] < math.inf for line in lines)
    assert {*asked} == ({(4, (17, 32, 32))} if base == "opensora" and has_chain else set())


@pytest.mark.parametrize("base, size, message", [
    ("wan", (16, 32, 32), "frames = 16: random-wan makes 4k . 1 frames"), ("wan", (0, 32, 32), "frames = 0"),
    ("wan", (9, 40, 32), "must be multiples of 16"), ("wan", (9, 32, 0), "must be multiples of 16"),
    ("cogvideox", (13, 32, 32), "frames = 13: random-cogvideox makes 8k . 1 frames.* 13 frames would be"),
    ("cogvideox", (16, 32, 32), "frames = 16"), ("cogvideox", (9, 40, 32), "must be multiples of 16"),
    ("opensora", (16, 32, 32), "frames = 16: random-opensora makes 1 frame, or a multiple of 17"),
    ("opensora", (0, 32, 32), "frames = 0"), ("opensora", (17, 240, 426), "width 426: must be multiples of 8"),
    ("opensora", (17, 4, 32), "must be multiples of 8"), ("svd", (6, 36, 36), "must be at least 1, and multiples of 8")])
def test_a_size_that_has_no_latents_is_refused(base, size, message):
    refused(message, load_base(f"random-{base}").latent_shape, *size)


@pytest.mark.parametrize("base", ["wan", "cogvideox", "opensora", "svd"])
def test_what_a_base_cannot_do_is_refused_before_clips_are_read(base, animals):
    for flags, message in ((["--cache-interval", 2], "cache_interval = 2: DeepCache knows ModelScopeT2V's UNet"),
                           (["--size", 36], "multiples of")):
        refused(message, run_base, base, "--data", "clips.txt", *flags, "--out", "refused")
    assert not Path("refused").exists()


# ------------------------------------------------- A base of one's own ----------------------------------------------------

@pytest.fixture
def velocity(monkeypatch):
    """The example, as if its file lay in bases/."""
    module = types.ModuleType("bases.velocity")
    exec(docs_example("bases.md", "class Base"), vars(module))
    monkeypatch.setitem(sys.modules, "bases.velocity", module)
    monkeypatch.setitem(weights.NETWORKS, "VelocityUNet", "velocity")
    return load_base("random-velocity")


def test_its_guesses_fit_its_levels_and_its_network(velocity):
    z, noise = torch.randn(2, 1, *velocity.latent_shape(2, 32, 32), generator=seeded())
    text, levels = velocity.encode_text(["a cat"]), velocity.levels(4)
    z_t = sampler.add_noise(z, noise, levels, 3)
    z_0, eps = velocity.predict(z_t, (levels.t[3], levels.alpha[3], levels.sigma[3]), text)
    torch.testing.assert_close(sampler.add_noise(z_0, eps, levels, 3), z_t, rtol=0, atol=1e-5)
    v = velocity.network(z_t, torch.tensor([levels.t[3]]), text)
    torch.testing.assert_close(levels.alpha[3] * eps - levels.sigma[3] * z_0, v, rtol=0, atol=1e-5)
    loss = velocity.error(z_0, eps, z, noise, (levels.t[3], levels.alpha[3], levels.sigma[3]))
    torch.testing.assert_close(loss, (v - (levels.alpha[3] * noise - levels.sigma[3] * z)).square().mean()[None])


@pytest.mark.usefixtures("aside")
def test_it_trains_and_has_no_published_size(velocity):
    refused("base random-velocity:full: bases/velocity.py has no published", load_base, "random-velocity:full")
    write_noise("a.mp4")
    Path("clips.txt").write_text("a.mp4|||a cat\n")
    flags = "--data clips.txt --workers 0 --frames 2 --segments 1 --size 32 --num-steps 2 --steps 1 --batch-size 1 --eval-every 0"
    assert train.main(["modelscope", "--base", "random-velocity", "--reward-weights", "random:32", "--device", "cpu",
                       *flags.split(), "--out", "run"]) == 0
    assert metrics("run")[0]["grad_norm"] > 0


# ------------------------------------------- What bases may tell the core --------------------------------------------------

def test_text_may_be_a_dict_of_tensors():
    """Each goes through what one tensor would. Open-Sora and SVD, whose runs are above, have such text."""
    told = {"text": randn32(3, 7, 5), "mask": randn32(3, 7, seed=1)}
    for call in (lambda t: ranks.take(t, [2, 0]), lambda t: ranks.take(t, 1), lambda t: ranks.take(t, slice(1, 3)),
                 lambda t: ranks.stack([ranks.take(t, 2), ranks.take(t, 1)], "cpu"),
                 lambda t: ranks.map_tensors(lambda one, other: torch.cat([one, other]), t, t)):
        found = call(told)
        assert found.keys() == told.keys() and all(found[name].equal(call(told[name])) for name in told)


def test_guidance_may_differ_from_frame_to_frame():
    z, text = torch.randn(2, 4, 3, 2, 2, generator=seeded()), torch.randn(2, 1, 5, generator=seeded(1))

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
