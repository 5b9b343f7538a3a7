"""bases/wan.py against diffusers' own pipelines, on small random weights in the published classes."""
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, metrics
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline
from safetensors.torch import load_file
from test_ranks import two_ranks

import lora
import sampler
import train
from bases import wan
from formats import adapters
from model import load_base
from support.ranks import run_script
from support.videos import write_video

FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture(scope="module")
def base():
    made = load_base("random-wan")
    with torch.no_grad():  # as initialised, the network's last layer hides the rest of it
        for i, p in enumerate(made.network.parameters()):
            p.add_(.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_like(base, seed=0):
    return randn(1, *base.latent_shape(FRAMES, HEIGHT, WIDTH), seed=seed)


def pipeline(base, kind=WanPipeline, shift=3.):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = kind(base.tokenizer, base.text_encoder, vae=base.vae, transformer=base.network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(text, uncond, **more):
    return dict(prompt_embeds=text, negative_prompt_embeds=uncond, height=HEIGHT, width=WIDTH, guidance_scale=4., **more)


# ------------------------------------------------------- The chain ---------------------------------------------------------

def test_levels_by_hand():
    L = wan.levels(4)
    assert L.sigma == pytest.approx([0, 3 * .25 / 1.5, 3 * .5 / 2, 3 * .75 / 2.5, 1]) and L.t == [1000 * s for s in L.sigma]
    assert [a + s for a, s in zip(L.alpha, L.sigma)] == [1.] * 5 and L.fresh[1] == 0 and L.start == 1
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.)
    for D in (1, 2, 7, 20):
        scheduler.set_timesteps(D)
        published = wan.levels(D, published=True, shift=5.)
        torch.testing.assert_close(torch.tensor(published.sigma[::-1]), scheduler.sigmas, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(published.t[:0:-1]), scheduler.timesteps, rtol=0, atol=1e-3)
    assert wan.levels(20).sigma[1] > .13 and wan.levels(20, published=True).sigma[1] < .01  # why it is not the default


def test_sampling_equals_diffusers_pipeline(base):
    noise, text, uncond = noise_like(base), base.encode_text(["a cat"]), base.encode_text(["blurry"])
    ours = sampler.sample(base.predict, noise, text, uncond, base.levels(5, published=True), 4.)
    asked = ask(text, uncond, num_frames=FRAMES, latents=noise, num_inference_steps=5)
    theirs = pipeline(base)(**asked, output_type="latent").frames
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("tau", [.6, .4])
def test_the_edit_equals_diffusers_video_to_video(base, tau):
    text, uncond = base.encode_text(["a cat"]), base.unconditional(None)
    video = randn(1, 3, FRAMES, HEIGHT, WIDTH).sigmoid()                                       # in [0, 1]
    z = base.encode((2 * video - 1)[0].transpose(0, 1))
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))                     # as the pipeline draws it
    ours = sampler.edit(base.predict, z, eps, text, uncond, base.levels(10, published=True), tau, 4.)
    theirs = pipeline(base, WanVideoToVideoPipeline)(
        video=video.transpose(1, 2), strength=tau, num_inference_steps=10, generator=torch.Generator().manual_seed(3),
        **ask(text, uncond), output_type="latent").frames
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_captions_are_read_as_diffusers_reads_them(base):
    captions = ["a  cat &amp;amp; a dog ", "", "word " * 600]
    theirs, _ = pipeline(base).encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)
    torch.testing.assert_close(base.encode_text(captions), theirs, rtol=0, atol=1e-5)
    assert (base.encode_text([captions[0]])[0, 40:] == 0).all()


def test_the_loss_is_the_velocitys(base):
    z, noise, text = noise_like(base, 1), noise_like(base, 2), base.encode_text(["a cat"])
    t, alpha, sigma = level = base.level(torch.tensor([.3]))
    assert sigma.item() == pytest.approx(.9 / 1.6) and t.item() == pytest.approx(562.5)
    z_t = alpha * z + sigma * noise
    v = base.network(z_t, t, text, return_dict=False)[0]
    loss = base.error(*base.predict(z_t, level, text), z, noise, level)
    torch.testing.assert_close(loss, (v - (noise - z)).square().mean()[None], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------- Pixels ----------------------------------------------------------

def test_a_few_frames_are_those_of_the_whole_video(base):
    z = torch.cat([noise_like(base, 1), noise_like(base, 2)])
    whole = base.vae.decode(wan.to_vae(base.vae, z)).sample.transpose(1, 2) / 2 + .5           # clamped by the autoencoder
    torch.testing.assert_close(base.decode_frames(z).clamp(0, 1), whole, rtol=0, atol=1e-5)
    index = torch.tensor([[0, 4, 5], [8, 1, 1]])
    few = base.decode_frames(z, index)
    for b in range(2):
        torch.testing.assert_close(few[b].clamp(0, 1), whole[b, index[b]], rtol=0, atol=1e-5)


def test_gradient_reaches_the_latents_of_the_context_and_is_the_decoders_own(base):
    def gradient(context, frame):
        z = noise_like(base).mul(.1).requires_grad_()
        base.latent_context = context
        base.decode_frames(z, torch.tensor([[frame]])).square().sum().backward()
        return z.grad[0]
    try:
        of_two, of_all = gradient(2, 8), gradient(9, 8)
        assert [bool(latent.any()) for latent in of_two.unbind(1)] == [False, True, True]
        assert [bool(latent.any()) for latent in gradient(1, 4).unbind(1)] == [False, True, False]
    finally:
        base.latent_context = 2
    z = noise_like(base).mul(.1).requires_grad_()  # the decoder's own, by its own `decode`; nothing is clamped at these pixels
    pixels = base.vae.decode(wan.to_vae(base.vae, z)).sample[:, :, 8] / 2 + .5
    assert (pixels > 0).all() and (pixels < 1).all()
    pixels.square().sum().backward()
    torch.testing.assert_close(of_all, z.grad[0], rtol=1e-3, atol=1e-4 * z.grad.abs().max().item())


# ------------------------------------------------------- Training ---------------------------------------------------------

FLAGS = ["--base", "random-wan", "--frames", "9", "--size", "32", "--num-steps", "4", "--batch-size", "2", "--reward-weights",
         "random:32", "--device", "cpu", "--eval-every", "0", "--save-every", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two clips and two prompts, in which runs start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("wan"))
        for i in range(2):
            pixels = torch.randint(255, (12, 32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            write_video(Path(f"{i}.mp4"), pixels.numpy(), 16)
        Path("clips.txt").write_text("0.mp4|||a cat\n1.mp4|||a dog\n")
        Path("prompts.txt").write_text("a cat\na dog\n")
        yield


def train_on_clips(*flags):
    return train.main(["wan", *FLAGS, "--data", "clips.txt", "--workers", "0", "--max-skip", "0", *map(str, flags)])


def test_a_run_is_continued_bit_for_bit(world):
    assert train_on_clips("--steps", 3, "--out", "whole") == 0
    assert train_on_clips("--steps", 2, "--out", "parts") == 0
    assert train.main(["--resume", "parts", "--steps", "3"]) == 0
    assert_same_run("parts", "whole")
    assert all(line["grad_norm"] > 0 for line in metrics("whole"))


@pytest.mark.slow
def test_two_ranks_do_what_one_does(world):
    """Clips of 32 x 48 pixels, and gradient through one latent of a frame alone."""
    flags = ["--size", "32x48", "--latent-context", 1, "--steps", 2, "--no-cache"]
    assert train_on_clips(*flags, "--out", "one-rank") == 0
    ended, _ = two_ranks(lambda rank: run_script("train.py", lambda: train_on_clips(*flags, "--out", "two-ranks")))
    assert [status for status, _, _ in ended] == [0, 0], ended
    for ours, theirs in zip(metrics("two-ranks"), metrics("one-rank"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5) and ours["grad_norm"] > 0
    ours, theirs = load_file("two-ranks/lora.safetensors"), load_file("one-rank/lora.safetensors")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5 < max(t.abs().max() for t in ours.values())


def test_latent_context_is_a_setting_of_training(world):
    """It changes the gradient, not the frames; another one would be another run."""
    for context in (1, None):
        assert train_on_clips("--latent-context", context, "--steps", 1, "--out", f"context-{context}") == 0
    one, own = (metrics(f"context-{context}")[0] for context in (1, None))
    assert one["reward"] == own["reward"] and one["grad_norm"] != pytest.approx(own["grad_norm"], rel=1e-3)
    with pytest.raises(ValueError, match="latent_context would make it another run"):
        train.main(["--resume", "context-1", "--latent-context", "2"])


def test_an_adapter_makes_the_same_video_in_diffusers_and_comes_back(base, world, tmp_path):
    ours = load_base("random-wan")
    ours.network.load_state_dict(base.network.state_dict())
    lora.inject(ours.network, 4, alpha=8.)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers(ours.network).values()):
            layer.lora_B.copy_(.3 * randn(*layer.lora_B.shape, seed=i))
    lora.save(ours.network, tmp_path / "lora.safetensors")
    noise, text, uncond = noise_like(base), base.encode_text(["a cat"]), base.unconditional()
    expected = sampler.sample(ours.predict, noise, text, uncond, ours.levels(3, published=True), 4.)
    plain = sampler.sample(base.predict, noise, text, uncond, base.levels(3, published=True), 4.)
    assert (expected - plain).abs().max() > .01

    for program in ("diffusers-lora", "comfyui"):
        file = tmp_path / f"{program}.safetensors"
        adapters.export(tmp_path / "lora.safetensors", program, file)
        pipe = pipeline(base)
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
        theirs = pipe(**ask(text, uncond, num_frames=FRAMES, latents=noise, num_inference_steps=3), output_type="latent").frames
        pipe.unload_lora_weights()
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        again = load_base("random-wan")
        again.network.load_state_dict(base.network.state_dict())
        lora.load(again.network, file)
        for a, b in zip(lora.layers(again.network).values(), lora.layers(ours.network).values()):
            torch.testing.assert_close(a.scale * a.lora_B @ a.lora_A, b.scale * b.lora_B @ b.lora_A)


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    ("draft", []), ("refl", []), ("vader", []), ("ddpo", ["--updates", "1"]), ("rwr", ["--rounds", "1", "--videos", "4"]),
    ("nft", ["--updates", "1", "--group", "2"]), ("adjoint", ["--steps-learned", "1"]),
    ("dpo", ["--rounds", "1", "--pairs", "4"]), ("onestep", ["--data", "clips.txt", "--workers", "0"])])
def test_every_method_trains_three_steps(world, name, flags):
    module = importlib.import_module(f"methods.{name}")
    prompts = [] if name == "onestep" else ["--prompts-train", "prompts.txt"]
    assert train.main(["wan", *FLAGS, *prompts, "--steps", "3", *flags, "--out", name], module) == 0
    lines = metrics(name)
    assert [line["step"] for line in lines] == [1, 2, 3] and all(0 < line["grad_norm"] < math.inf for line in lines)


# -------------------------------------------------------- Refusals ---------------------------------------------------------

@pytest.mark.parametrize("size, what", [((16, 32, 32), "frames = 16: random-wan makes 4k . 1 frames"),
                                        ((0, 32, 32), "frames = 0"), ((9, 40, 32), "must be multiples of 16"),
                                        ((9, 32, 0), "must be multiples of 16")])
def test_a_size_that_has_no_latents_is_refused(base, size, what):
    with pytest.raises(ValueError, match=what):
        base.latent_shape(*size)


def test_a_folder_is_read_and_what_is_missing_is_named(base, tmp_path):
    folder = tmp_path / "wan"
    for part, name in ((base.network, "transformer"), (base.vae, "vae")):
        part.save_pretrained(folder / name)
    path = folder / "scheduler/scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"prediction_type": "flow_prediction", "flow_shift": 5.0}))      # as of UniPCMultistepScheduler
    loaded = load_base(str(folder))
    assert loaded.levels(4).sigma == wan.levels(4, shift=5.).sigma
    noise, text = noise_like(base), base.encode_text(["a cat"])
    for ours, theirs in zip(loaded.predict(noise, (500., .5, .5), text), base.predict(noise, (500., .5, .5), text)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="has no text encoder"):
        loaded.encode_text(["a cat"])

    path.write_text(json.dumps({"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="prediction_type 'epsilon'; Wan's is flow_prediction"):
        load_base(str(folder))
    (folder / "vae/config.json").unlink()
    with pytest.raises(ValueError, match="no vae/config.json"):
        load_base(str(folder))
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        load_base("random-wan", vae="nowhere")


def test_what_a_base_cannot_do_is_refused_before_clips_are_read(world):
    with pytest.raises(ValueError, match="cache_interval = 2: DeepCache knows ModelScopeT2V's UNet"):
        train.main(["wan", *FLAGS, "--data", "clips.txt", "--cache-interval", "2", "--out", "refused"])
    with pytest.raises(ValueError, match="preset modelscope: is not for base random-wan, whose own is wan"):
        train.main(["modelscope", *FLAGS, "--data", "clips.txt", "--prompts", "a=prompts.txt", "--out", "refused"])
    assert not Path("refused").exists()
