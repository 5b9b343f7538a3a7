"""bases/wan.py against diffusers' own pipelines, on small random weights in the published classes."""
import pytest
import torch
from conftest import adapted, assert_near, assert_same_adapters, metrics, randn32 as randn, random_base, refused, write_file
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline
from test_bases import ON_CLIPS, run_base

import lora
import sampler
import train
from bases import wan
from formats import adapters
from model import load_base

FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.fixture(scope="module")
def base():
    return random_base("wan", .1)


def noise_like(base, seed=0):
    return randn(1, *base.latent_shape(FRAMES, HEIGHT, WIDTH), seed=seed)


def pipeline(base, kind=WanPipeline, shift=3.):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = kind(base.tokenizer, base.text_encoder, vae=base.vae, transformer=base.network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(text, uncond, **more):
    return dict(prompt_embeds=text, negative_prompt_embeds=uncond, height=HEIGHT, width=WIDTH, guidance_scale=4., **more)


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
    assert_near(ours, theirs)


@pytest.mark.parametrize("tau", [.6, .4])
def test_the_edit_equals_diffusers_video_to_video(base, tau):
    text, uncond = base.encode_text(["a cat"]), base.unconditional(None)
    video = randn(1, 3, FRAMES, HEIGHT, WIDTH).sigmoid()                                       # in [0, 1]
    z = base.encode((2 * video - 1)[0].transpose(0, 1))
    eps = randn(*z.shape, seed=3)                                                              # as the pipeline draws it
    ours = sampler.edit(base.predict, z, eps, text, uncond, base.levels(10, published=True), tau, 4.)
    theirs = pipeline(base, WanVideoToVideoPipeline)(
        video=video.transpose(1, 2), strength=tau, num_inference_steps=10, **ask(text, uncond),
        generator=torch.Generator().manual_seed(3), output_type="latent").frames
    assert_near(ours.detach(), theirs)


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


def test_latent_context_is_a_setting_of_training(animals):
    """It changes the gradient, not the frames; another one would be another run."""
    for context in (1, None):
        assert run_base("wan", *ON_CLIPS, "--latent-context", context, "--steps", 1, "--out", f"context-{context}") == 0
    one, own = (metrics(f"context-{context}")[0] for context in (1, None))
    assert one["reward"] == own["reward"] and one["grad_norm"] != pytest.approx(own["grad_norm"], rel=1e-3)
    refused("latent_context would make it another run", train.main, ["--resume", "context-1", "--latent-context", "2"])


def test_an_adapter_makes_the_same_video_in_diffusers_and_comes_back(base, tmp_path):
    ours = adapted(random_base("wan", .1))
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
        assert_near(theirs, expected)
        again = random_base("wan", .1)
        lora.load(again.network, file)
        assert_same_adapters(again, ours)



def test_a_folder_is_read_and_what_is_missing_is_named(base, tmp_path):
    folder = tmp_path / "wan"
    for part, name in ((base.network, "transformer"), (base.vae, "vae")):
        part.save_pretrained(folder / name)
    path = folder / "scheduler/scheduler_config.json"
    write_file(path, {"prediction_type": "flow_prediction", "flow_shift": 5.0})                 # as of UniPCMultistepScheduler
    loaded = load_base(str(folder))
    assert loaded.levels(4).sigma == wan.levels(4, shift=5.).sigma
    noise, text = noise_like(base), base.encode_text(["a cat"])
    for ours, theirs in zip(loaded.predict(noise, (500., .5, .5), text), base.predict(noise, (500., .5, .5), text)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    refused("has no text encoder", loaded.encode_text, ["a cat"])

    write_file(path, {"prediction_type": "epsilon"})
    refused("prediction_type 'epsilon'; Wan's is flow_prediction", load_base, str(folder))
    (folder / "vae/config.json").unlink()
    refused("no vae/config.json", load_base, str(folder))
