"""bases/svd.py against diffusers' own pipeline, on small random weights in the published classes, and by hand."""
import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import adapted, assert_near, metrics, randn32 as randn, refused, script, seeded, write_file
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as theirs
from PIL import Image
from test_bases import ON_CLIPS as CLIPS, run_base
from transformers import CLIPImageProcessor

import generate
import lora
import sampler
import train
from bases import modelscope, svd
from formats import adapters
from methods import common, vader
from model import load_base
from support.clips import Prompt, fit_prompts, read_prompts, say_once
from support.ranks import sample_generator, take
from support.videos import read_video

FRAMES, HEIGHT, WIDTH = 6, 32, 48
SCHEDULER = {"prediction_type": "v_prediction", "sigma_min": .002, "sigma_max": 700., "timestep_spacing": "leading",
             "timestep_type": "continuous", "use_karras_sigmas": True, "steps_offset": 1, "beta_schedule": "scaled_linear",
             "beta_start": .00085, "beta_end": .012}  # as published


@pytest.fixture(scope="module")
def base():
    return load_base("random-svd")


@pytest.fixture
def told(base, animals):
    """What is told of the first picture, and the noise of a video."""
    shape = base.latent_shape(FRAMES, HEIGHT, WIDTH)
    return base.encode_text(read_prompts("prompts.txt")[:1]), randn(1, *shape)


def pipeline(base):
    pipe = StableVideoDiffusionPipeline(base.vae, base.image_encoder, base.network, EulerDiscreteScheduler(**SCHEDULER),
                                        CLIPImageProcessor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe, noise, steps=4, **more):
    """Of the first picture, whose pixels get the noise that `condition` draws."""
    return pipe(Image.open("cat.png"), HEIGHT, WIDTH, num_frames=FRAMES, num_inference_steps=steps, fps=7,
                generator=sample_generator(0, "picture"), latents=noise.transpose(1, 2), **more).frames


def test_levels_are_those_of_diffusers():
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    for D in (1, 2, 25):
        scheduler.set_timesteps(D)
        L = svd.levels(D)
        torch.testing.assert_close(torch.tensor(L.sigma[::-1]), scheduler.sigmas, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(L.t[:0:-1]), scheduler.timesteps, rtol=0, atol=1e-6)
        assert L.start == pytest.approx(float(scheduler.init_noise_sigma)) and L.alpha == [1.] * (D + 1)
    assert L.sigma[0] == 0 and L.sigma[1] == pytest.approx(.002) and L.fresh[1] == 0
    assert [f"{s:.2g}" for s in L.sigma[2:5]] == ["0.0079", "0.025", "0.066"]


def test_the_presets_steps_with_gradient_and_tau_follow_from_the_levels():
    """d z_prev / d out of each step, by the formula of its base; and how much of a clip is left where an edit starts."""
    L, ours = svd.levels(25), svd.SETTINGS
    moved = [(L.sigma[i] - L.sigma[i - 1]) / (L.sigma[i] ** 2 + 1) ** .5 for i in range(1, ours["grad_steps"] + 1)]
    assert [f"{m:.2g}" for m in moved] == ["0.002", "0.0059", "0.017"] and f"{sum(moved):.3f}" == "0.025"
    theirs = sampler.ddim_levels(20, sampler.alpha_bars())
    last = theirs.alpha[0] * theirs.sigma[1] / theirs.alpha[1] - theirs.sigma[0]                # of eps
    assert last == pytest.approx(.0122, abs=1e-4) and sum(moved) / last == pytest.approx(2, abs=.1)

    edit = theirs.alpha[12] / theirs.sigma[12]                                                  # tau = .6 of 20
    nearest = min(range(1, 26), key=lambda i: abs(math.log(1 / L.sigma[i] / edit)))
    assert f"{edit:.2f}" == "0.52" and nearest / 25 == ours["tau"]


@pytest.mark.parametrize("w", [3., 1.])
def test_sampling_equals_diffusers_pipeline(base, told, w):
    text, noise = told
    ours = sampler.sample(base.predict, noise, text, base.unconditional(text), base.levels(4), w)
    assert_near(ours, make(pipeline(base), noise, output_type="latent", max_guidance_scale=w).transpose(1, 2), 1e-5)
    video = make(pipeline(base), noise, output_type="pt", max_guidance_scale=w)
    torch.testing.assert_close(base.decode_frames(ours).clamp(0, 1), video, rtol=0, atol=1e-4)
    assert (w == 1.) == torch.equal(ours, sampler.sample(base.predict, noise, text, None, base.levels(4), 1.))


def test_the_clip_tower_is_shown_a_blurred_square(base):
    picture = randn(1, 3, 250, 600).sigmoid() * 2 - 1
    square = theirs._resize_with_antialiasing(picture, (224, 224)) / 2 + .5
    shown = CLIPImageProcessor()(square, do_resize=False, do_center_crop=False, do_rescale=False, return_tensors="pt")
    torch.testing.assert_close(svd.clip_pixels(picture, 224), shown.pixel_values, rtol=0, atol=1e-5)


def test_what_is_told(base):
    pictures = randn(2, 3, HEIGHT, WIDTH).clamp(-1, 1)
    text = base.condition(pictures, fps=10, motion=40, strength=0.)
    assert text["ids"].tolist() == [[9., 40., 0.]] * 2 and text["clip"].shape == (2, 1, 16)
    mode = base.encode(pictures)[0].transpose(0, 1)[:, :4]                                      # the mean, without the scale
    torch.testing.assert_close(text["image"], mode)
    uncond = base.unconditional(text)
    assert not uncond["clip"].any() and not uncond["image"].any() and torch.equal(uncond["ids"], text["ids"])


def test_the_loss_is_that_of_v(base, told):
    text, noise = told
    z = randn(*noise.shape, seed=1)
    t, alpha, sigma = level = base.level(torch.tensor([.5]))
    assert sigma.item() == pytest.approx(math.exp(.7)) and t.item() == pytest.approx(.7 / 4) and alpha.item() == 1
    z_t = z + sigma * noise
    z_0, eps = base.predict(z_t, level, text)
    torch.testing.assert_close(z_0 + sigma * eps, z_t, rtol=0, atol=1e-5)
    s = sigma.item()
    scaled = (z_t / (s**2 + 1) ** .5).transpose(1, 2)
    image = text["image"][:, None].expand(-1, FRAMES, -1, -1, -1)
    v = base.network(torch.cat([scaled, image], 2), t, text["clip"], text["ids"], return_dict=False)[0].transpose(1, 2)
    target = (z_t / (s**2 + 1) - z) * (s**2 + 1) ** .5 / s
    torch.testing.assert_close(base.error(z_0, eps, z, noise, level), (v - target).square().mean()[None], rtol=1e-4, atol=1e-5)


def decoded(base, z):
    """By the autoencoder's own call, (F, 3, H, W)."""
    return base.vae.decode(z[0].transpose(0, 1) / base.vae.config.scaling_factor, num_frames=z.shape[2]).sample / 2 + .5


def test_a_few_frames_and_their_gradient_are_decoded_with_their_neighbours(base, monkeypatch):
    z = torch.cat([randn(1, 4, FRAMES, 4, 6, seed=i) for i in range(2)])
    whole = torch.stack([decoded(base, clip[None]) for clip in z])
    torch.testing.assert_close(base.decode_frames(z), whole, rtol=0, atol=1e-5)
    index = torch.tensor([[0, 2], [5, 3]])
    torch.testing.assert_close(base.decode_frames(z, index), whole[torch.tensor([[0], [1]]), index], rtol=0, atol=1e-5)
    monkeypatch.setattr(base, "latent_context", 1)                                              # three frames for each
    z = z.requires_grad_()
    few = base.decode_frames(z, index)
    for b, k, window, at in ((0, 0, [0, 1, 2], 0), (0, 1, [1, 2, 3], 1), (1, 0, [3, 4, 5], 2), (1, 1, [2, 3, 4], 1)):
        torch.testing.assert_close(few[b, k], decoded(base, z[b:b + 1, :, window])[at], rtol=0, atol=1e-5)
    torch.testing.assert_close(few[:, :1], base.decode_frames(z, index[:, :1]))                 # each for itself
    assert (few[0, 0] - whole[0, 0]).abs().max() > 1e-3                                         # why the docs say by how much
    monkeypatch.setattr(base, "latent_context", 3)                                              # seven: all
    exact = base.decode_frames(z, index)
    for b in range(2):
        torch.testing.assert_close(exact[b], whole[b, index[b]], rtol=0, atol=1e-5)
    monkeypatch.undo()
    z = z[:1].detach().requires_grad_()
    base.decode_frames(z, torch.tensor([[1]])).sum().backward()
    assert [bool(frame.any()) for frame in z.grad[0].unbind(1)] == [True] * 5 + [False]


def test_layers_that_can_learn_nothing_have_no_adapters(told, capsys):
    text, noise = told
    made = load_base("random-svd")
    made.network.no_adapters = lora.NONE
    lora.inject(made.network, 2, generator=seeded())
    for layer in lora.layers(made.network).values():
        torch.nn.init.normal_(layer.lora_B, std=.1)
    made.predict(noise, (.1, 1., 2.), text)[0].square().sum().backward()
    size = {path: layer.lora_A.grad.abs().max().item() for path, layer in lora.layers(made.network).items()}
    dead = {path for path in size if path.endswith(("attn2.to_q", "attn2.to_k"))}
    assert max(size[path] for path in dead) < 1e-4 * min(size[path] for path in size.keys() - dead)
    say_once.cache_clear()
    for _ in range(2):
        assert lora.layers(adapted(load_base("random-svd")).network).keys() == size.keys() - dead
    assert capsys.readouterr().out.count("attn2's to_q and to_k get no adapters") == 1


def test_an_adapter_makes_the_same_video_in_diffusers_and_comes_back(base, told, tmp_path):
    import peft
    text, noise = told
    ours = adapted(load_base("random-svd"))
    expected = sampler.sample(ours.predict, noise, text, ours.unconditional(text), ours.levels(3), 3.)
    assert (expected - sampler.sample(base.predict, noise, text, base.unconditional(text), base.levels(3), 3.)).abs().max() > .01
    lora.save(ours.network, tmp_path / "lora.safetensors")
    adapters.export(tmp_path / "lora.safetensors", "peft", tmp_path / "peft")

    other = load_base("random-svd")
    pipe = pipeline(other)
    pipe.register_modules(unet=peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "peft").merge_and_unload())
    assert_near(make(pipe, noise, 3, output_type="latent", max_guidance_scale=3.).transpose(1, 2), expected)
    again = load_base("random-svd")
    lora.load(again.network, tmp_path / "peft")
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(again.network), lora.parameters(ours.network)))


def test_adapters_of_layers_that_learn_nothing_are_left_out_on_loading(told, tmp_path):
    text, noise = told
    made = load_base("random-svd")
    made.network.no_adapters = lora.NONE  # another program adapts all of them
    lora.inject(made.network, 2)
    for i, layer in enumerate(lora.layers(made.network).values()):
        layer.lora_B.data.copy_(randn(*layer.lora_B.shape, seed=i))
    lora.save(made.network, tmp_path / "all.safetensors")
    loaded = load_base("random-svd")
    lora.load(loaded.network, tmp_path / "all.safetensors")
    for ours, all_of_them in zip(loaded.predict(noise, (.1, 1., 2.), text), made.predict(noise, (.1, 1., 2.), text)):
        torch.testing.assert_close(ours, all_of_them, rtol=0, atol=1e-5)


def test_a_picture_begins_to_move(base, animals):
    flags = ["--base", "random-svd", "--frames", "2", "--size", "32", "--num-steps", "2", "--device", "cpu"]
    assert script("generate.py", *flags, "--image", "cat.png", "--prompt", "a cat", "--out", "one") == 0
    assert script("generate.py", *flags, "--prompts", "prompts.txt", "--out", "two") == 0
    one, two = [read_video(Path(folder) / "0000-a-cat.mp4") for folder in ("one", "two")]
    assert (one == two).all() and Path("two/0001-a-dog.txt").read_text() == "a dog\n"
    prompts = fit_prompts(read_prompts("prompts.txt"), base)
    base.latent_shape(2, 32, 32)
    z_0 = [z for _, z in generate.generate(base, prompts, [0, 1], 2, frames=2)]
    noise = torch.randn(1, *base.latent_shape(2, 32, 32), generator=sample_generator(1, "generate"))
    by_hand = sampler.sample(base.predict, noise, base.encode_text(prompts[1:]), base.unconditional(
        base.encode_text(prompts[1:])), base.levels(2), 3.)
    torch.testing.assert_close(z_0[1], by_hand[0], rtol=0, atol=1e-5)


# ------------------------------------------------------- Long videos ------------------------------------------------------

FLAGS = ["--base", "random-svd", "--size", "32", "--batch-size", "2", "--device", "cpu", "--reward-weights", "random:32",
         "--eval-every", "0", "--save-every", "1"]


def run(*flags, module):
    return train.main(["svd", *FLAGS, *map(str, flags)], module)


def told_next(base, video):
    """By the last frame of a video (F, 3, H, W)."""
    return base.condition(2 * video[-1:].clamp(0, 1) - 1)


def test_a_video_goes_on_from_its_last_frame(base, animals, monkeypatch, capsys):
    prompts = fit_prompts(read_prompts("prompts.txt"), base)
    first = list(generate.generate(base, prompts, [0, 1], 2, frames=3))
    monkeypatch.setattr(base, "parts", 3)
    long, alone = [[z for _, z in generate.generate(base, prompts, [0, 1], 2, frames=7, batch_size=n)] for n in (2, 1)]
    torch.testing.assert_close(torch.stack(long), torch.stack(alone), rtol=0, atol=1e-3)
    videos = base.decode_frames(torch.stack(long))
    for i, z in enumerate(long):
        torch.testing.assert_close(z[:, :3], first[i][1], rtol=0, atol=1e-4)                    # the video without --continue
        generator, text, frames = sample_generator(i, "generate"), base.encode_text(prompts[i:i + 1]), []
        for _ in range(3):  # by hand
            noise = torch.randn(1, 4, 3, 4, 4, generator=generator)
            part = decoded(base, sampler.sample(base.predict, noise, text, base.unconditional(text), base.levels(2), 3.))
            frames += part[1:] if frames else part
            text = told_next(base, part)
        torch.testing.assert_close(videos[i], torch.stack(frames), rtol=0, atol=1e-2)

    monkeypatch.setattr(base, "latent_context", 1)  # a frame's neighbours are of its own part
    z = torch.stack(long).requires_grad_()
    few = base.decode_frames(z, torch.tensor([[2, 3, 4], [6, 0, 5]]))
    for b, k, part, frame in ((0, 0, 0, 2), (0, 1, 1, 1), (0, 2, 1, 2), (1, 0, 2, 2), (1, 1, 0, 0), (1, 2, 2, 1)):
        expected = base.decode_part(z[b:b + 1, :, 3 * part:3 * part + 3], torch.tensor([[frame]]))[0, 0]
        torch.testing.assert_close(few[b, k], expected, rtol=0, atol=1e-5)

    flags = ["--frames", "3", "--size", "32", "--num-steps", "2", "--device", "cpu", "--prompt", "a cat", "--continue", "2"]
    svd_flags = ["--base", "random-svd", "--image", "cat.png"]
    assert script("generate.py", *flags, *svd_flags, "--out", "long") == 0
    assert len(read_video(Path("long/0000-a-cat.mp4"))) == 7
    for more, message in ((["--base", "tiny"], "continue: tiny starts from no picture"),
                          ([*svd_flags, "--frames", "1"], "frames = 1: must be at least 2")):
        assert script("generate.py", *flags, *more, "--out", "refused") == 2 and not Path("refused").exists()
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_vaders_gradient_stays_within_the_last_parts(animals):
    """Of two parts, and of a reward of the first part's frames alone, or of the others."""
    ours, K = adapted(load_base("random-svd")), 2
    ours.parts, parameters = 2, lora.parameters(ours.network)
    cfg = vader.Config(base="random-svd", frames=5, size=32, num_steps=3, grad_steps=K, guidance=2., frames_scored=0, parts=2,
                       prompts_train=Path("prompts.txt"))
    batch = common.read_videos(cfg, ours, lambda generator: torch.arange(5)).batch(0)
    noise, text, *_, keys = batch = tuple(take(item, slice(0, 1)) for item in batch)

    def gradient(scored, grad_parts):
        def reward(frames, captions):
            return frames.mean(dim=(2, 3, 4)) * torch.tensor([k in scored for k in range(5)])
        R, _ = vader.vader_rewards(ours, reward, ours.unconditional(text), batch, replace(cfg, grad_parts=grad_parts))
        return R, torch.cat([g.flatten() for g in torch.autograd.grad(R.sum(), parameters)])

    assert not gradient((0, 1, 2), 1)[1].any() and gradient((0, 1, 2), 2)[1].any()
    (R, one), (_, two) = gradient((3, 4), 1), gradient((3, 4), 2)
    assert (two - one).norm() > 1e-3 * one.norm() > 0                                           # by way of the picture

    fresh, levels = common.fresh_noise(noise, [sample_generator(*key) for key in keys], 3), ours.levels(3)
    for part, grad_steps in ((slice(0, 3), 0), (slice(3, 6), K)):  # by hand
        z_0 = sampler.chain(ours.predict, levels.start * noise[:, :, part], text, ours.unconditional(text), levels, 3, 2.,
                            grad_steps, 1., fresh[:, :, :, part])
        text = told_next(ours, decoded(ours, z_0))
    by_hand = ours.decode_part(z_0, torch.tensor([[1, 2]])).mean(dim=(2, 3, 4)).sum() / 5
    torch.testing.assert_close(R[0], by_hand, rtol=1e-4, atol=1e-6)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand, parameters)])
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.slow
def test_vader_trains_on_long_videos_and_scores_the_whole(animals, monkeypatch, capsys):
    monkeypatch.setattr("support.run.Evaluations.write_comparison", lambda *args: None)
    on_host, save_on_cpu = [], torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **more: on_host.append(more) or save_on_cpu(**more))
    flags = ["--prompts-train", "prompts.txt", "--frames", "9", "--parts", "2", "--steps", "1", "--num-steps", "2",
             "--grad-steps", "1", "--latent-context", "1", "--reward", "vjepa"]  # which sees 16 frames, of 17
    evaluations = ["--eval-every", "1", "--eval-count", "1", "--prompts", "pictures=prompts.txt"]
    assert run(*flags, *evaluations, "--out", "long-whole", module=vader) == 0 and not on_host
    assert "--fps 7 --continue 1 --image" in capsys.readouterr().out
    assert len(read_video(Path("long-whole/samples/step_000001_0000-a-cat.mp4"))) == 17
    assert run(*flags, "--save-on-cpu", "--clips-at-once", "1", "--out", "long-parts", module=vader) == 0
    assert on_host == [{"pin_memory": False}]
    whole, parts = [next(line for line in metrics(folder) if "loss" in line) for folder in ("long-whole", "long-parts")]
    assert [parts[name] for name in ("loss", "grad_norm")] == pytest.approx([whole["loss"], whole["grad_norm"]], rel=1e-3)
    assert whole["grad_norm"] > 0
    for more, message in ((["--parts", "0"], "parts = 0: must be at least 1"), (["--grad-parts", "3"], "must be from 1 to 2"),
                          (["--frames", "1"], "frames = 1: must be at least 2"),
                          (["--frames-scored", "18"], "frames_scored = 18: must be from 0 to 17")):
        refused(message, run, *flags, *more, "--out", "refused", module=vader)
    refused("parts = 2: must be 1, since tiny starts from no picture", train.main, ["--parts", "2", "--out", "refused"], vader)
    assert not Path("refused").exists()


# -------------------------------------------------------- Refusals ---------------------------------------------------------

def test_prompts_bring_pictures_where_the_base_wants_them(base, animals, monkeypatch):
    prompts = fit_prompts(read_prompts("prompts.txt"), base)
    assert prompts == ["a cat", "a dog"] and prompts[1].picture == Path("dog.png") and prompts[1].line == "dog.png|||a dog"
    monkeypatch.setattr(modelscope.Base, "is_cut", lambda self, caption: False)
    plain = fit_prompts(prompts, modelscope.Base(None, None, None, "small"))
    assert plain == ["a cat", "a dog"] and type(plain[0]) is str
    assert "starts from a picture; expected a line picture.png" in refused("'a cat': random-svd", fit_prompts, ["a cat"], base)
    refused("nowhere.png: cannot be read: no such file", fit_prompts, [Prompt("a cat", Path("nowhere.png"), "")], base)
    refused("words.txt: cannot be read", fit_prompts, [Prompt("a cat", Path("words.txt"), "")], base)


def test_what_is_wrong_is_said_before_anything_long(base, animals, monkeypatch):
    monkeypatch.setattr(svd.SVD, "predict", lambda *args: pytest.fail("sampled"))
    monkeypatch.setattr(svd.SVD, "condition", lambda *args: pytest.fail("encoded"))
    draft = importlib.import_module("methods.draft")
    refused("starts from a picture", run_base, "svd", "--prompts-train", "words.txt", "--out", "refused", method=draft)
    refused("starts from a picture", run_base, "svd", *CLIPS, "--eval-every", 1, "--prompts", "a=words.txt", "--out", "refused")
    refused("of 8", run_base, "svd", "--prompts-train", "prompts.txt", "--size", 36, "--out", "refused", method=draft)
    assert not Path("refused").exists()
    assert script("generate.py", "--base", "random-svd", "--prompt", "a cat", "--out", "refused") == 2
    assert script("generate.py", "--base", "random-svd", "--prompt", "a cat", "--image", "nowhere.png", "--out", "refused") == 2
    assert not Path("refused").exists()


def test_a_folder_is_read_and_what_is_missing_is_named(base, told, tmp_path):
    text, noise = told
    folder = tmp_path / "svd"
    pipeline(base).save_pretrained(folder)
    loaded = load_base(str(folder))
    for ours, expected in zip(loaded.predict(noise, (.1, 1., 2.), text), base.predict(noise, (.1, 1., 2.), text)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert loaded.fingerprints() == base.fingerprints() and loaded.levels(7).sigma == svd.levels(7).sigma
    refused("reads pictures, not captions", load_base, str(folder), text_encoder=str(folder))

    config = folder / "scheduler/scheduler_config.json"
    write_file(config, SCHEDULER | {"sigma_max": 80.})
    assert load_base(str(folder)).levels(5).sigma[5] == pytest.approx(80)
    write_file(config, SCHEDULER | {"prediction_type": "epsilon"})
    refused("prediction_type 'epsilon'; Stable Video Diffusion's is v_prediction", load_base, str(folder))
    config.unlink()
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    refused("vae: no weights here", load_base, str(folder))
    (folder / "image_encoder/config.json").unlink()
    refused("no config.json in .*image_encoder", load_base, str(folder))
