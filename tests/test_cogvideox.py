"""bases/cogvideox.py against diffusers' own pipelines, on small random weights in the published classes."""
import json
import math

import pytest
import sentencepiece
import torch
from conftest import adapted, assert_near, assert_same_adapters, randn32 as randn, random_base, refused, seeded, write_file
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel, CogVideoXVideoToVideoPipeline
from safetensors.torch import load_file, save_file

import lora
import sampler
from bases import cogvideox
from bases.diffusers_base import read_tokenizer
from formats import adapters
from model import load_base

FRAMES, HEIGHT, WIDTH = 9, 48, 32


@pytest.fixture(scope="module")
def base():
    return random_base("cogvideox", .05)


@pytest.fixture(scope="module")
def base_5b(base):
    """The same with what 5b has: rotations for positions, other levels, another scale of latents."""
    network = CogVideoXTransformer3DModel(**{**base.network.config, "use_rotary_positional_embeddings": True})
    network.load_state_dict(base.network.state_dict())
    made = cogvideox.CogVideoX(network.eval(), load_base("random-cogvideox").vae, base.tokenizer, base.text_encoder, name="5b",
                               alpha_bar=cogvideox.signal_power(1.))
    made.vae.register_to_config(scaling_factor=.7)
    return made


def noise_like(base, seed=0, frames=FRAMES):
    return randn(1, *base.latent_shape(frames, HEIGHT, WIDTH), seed=seed)


def make_scheduler(snr_shift=3.):
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
                                  clip_sample=False, snr_shift_scale=snr_shift)


def pipeline(base, kind=CogVideoXPipeline, snr_shift=3.):
    pipe = kind(base.tokenizer, base.text_encoder, vae=base.vae, transformer=base.network, scheduler=make_scheduler(snr_shift))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(text, uncond, **more):
    return dict(prompt_embeds=text, negative_prompt_embeds=uncond, height=HEIGHT, width=WIDTH, guidance_scale=6., **more)


def test_levels_are_the_published_schedulers():
    for shift in (3., 1.):
        theirs = make_scheduler(shift).alphas_cumprod
        torch.testing.assert_close(cogvideox.signal_power(shift), theirs, rtol=0, atol=1e-12)
    scheduler = make_scheduler()
    for D in (1, 2, 7, 20, 30):
        scheduler.set_timesteps(D)
        assert cogvideox.levels(D).t[:0:-1] == scheduler.timesteps.tolist()
    L = cogvideox.levels(2)
    assert (L.t, L.alpha[0], L.sigma[0], L.alpha[2], L.sigma[2]) == ([-1, 499, 999], 1., 0., 0., 1.)
    assert L.alpha[1] == pytest.approx(math.sqrt(scheduler.alphas_cumprod[499])) and L.fresh[1] == 0
    assert cogvideox.levels(7).sigma[0] > 0  # 7 does not divide 1000: 142, less 1000 // 7, is level 0, not the clip
    refused("num_steps = 0: must be from 1 to 1000", cogvideox.levels, 0)


@pytest.mark.parametrize("kind, D", [("2b", 4), ("2b", 7), ("5b", 7)])
def test_sampling_equals_diffusers_pipeline(base, base_5b, kind, D):
    base, snr_shift = (base, 3.) if kind == "2b" else (base_5b, 1.)
    noise, text, uncond = noise_like(base), base.encode_text(["a cat"]), base.encode_text(["blurry"])
    ours = sampler.sample(base.predict, noise, text, uncond, base.levels(D), 6.)
    pipe = pipeline(base, snr_shift=snr_shift)
    asked = ask(text, uncond, num_frames=FRAMES, latents=noise.transpose(1, 2), num_inference_steps=D)
    assert_near(ours, pipe(**asked, output_type="latent").frames.transpose(1, 2))
    if D == 4:
        assert_near(base.decode_frames(ours).clamp(0, 1), pipe(**asked, output_type="pt").frames)


@pytest.mark.parametrize("tau", [.6, .4])
def test_the_edit_equals_diffusers_video_to_video(base, tau):
    text, uncond = base.encode_text(["a cat"]), base.unconditional()
    video = randn(FRAMES, 3, HEIGHT, WIDTH).sigmoid()                                          # in [0, 1]
    generator = seeded(3)
    z = base.draw_latents(base.encode(2 * video - 1)[0], generator)[None]
    C, f, h, w = z.shape[1:]
    eps = torch.randn(1, f, C, h, w, generator=generator).transpose(1, 2)                      # as the pipeline draws it
    ours = sampler.edit(base.predict, z, eps, text, uncond, base.levels(10), tau, 6.)
    theirs = pipeline(base, CogVideoXVideoToVideoPipeline)(
        video=list(video), strength=tau, num_inference_steps=10, generator=seeded(3),
        **ask(text, uncond), output_type="latent").frames
    assert_near(ours.detach(), theirs.transpose(1, 2))


def test_captions_are_read_as_diffusers_reads_them(base):
    captions = ["a  cat &amp; a dog ", "", "word " * 300]
    theirs, _ = pipeline(base).encode_prompt(captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(base.encode_text(captions), theirs, rtol=0, atol=1e-5)
    assert [base.is_cut(caption) for caption in captions] == [False, False, True]


def test_the_loss_is_the_velocitys(base):
    z, noise, text = noise_like(base, 1), noise_like(base, 2), base.encode_text(["a cat"])
    t, alpha, sigma = level = base.level(torch.tensor([.3]))
    assert t.item() == 300 and (alpha ** 2 + sigma ** 2).item() == pytest.approx(1)
    z_t = alpha * z + sigma * noise
    v = base.network(z_t.transpose(1, 2), text, t, return_dict=False)[0].transpose(1, 2)
    loss = base.error(*base.predict(z_t, level, text), z, noise, level)
    torch.testing.assert_close(loss, (v - (alpha * noise - sigma * z)).square().mean()[None], rtol=1e-4, atol=1e-5)


def decoded(base, z):
    """By the autoencoder's own `decode`, as decode_frames has them."""
    return base.vae.decode(z / base.vae.config.scaling_factor).sample.transpose(1, 2) / 2 + .5


def test_a_few_frames_are_those_of_the_whole_video(base):
    z = torch.cat([noise_like(base, 1, frames=25), noise_like(base, 2, frames=25)])
    whole = decoded(base, z)
    torch.testing.assert_close(base.decode_frames(z), whole, rtol=0, atol=1e-5)
    index = torch.tensor([[0, 8, 9, 16], [17, 24, 1, 1]])
    few = base.decode_frames(z, index)
    for b in range(2):
        torch.testing.assert_close(few[b], whole[b, index[b]], rtol=0, atol=1e-5)
    torch.testing.assert_close(base.decode_frames(z[:, :, :1]), decoded(base, z[:, :, :1]), rtol=0, atol=1e-5)  # of one frame


def test_gradient_reaches_the_chunks_of_the_context_and_is_the_decoders_own(base):
    def gradient(frame, context=2):
        z = noise_like(base, frames=25).mul(.1).requires_grad_()
        base.latent_context = context
        try:
            base.decode_frames(z, torch.tensor([[frame]])).square().sum().backward()
        finally:
            base.latent_context = 2
        return z.grad[0]

    def reached(grad):
        return [bool(latent.any()) for latent in grad.unbind(1)]
    of_two, of_all = gradient(24), gradient(24, 7)
    assert reached(of_two) == [False] * 5 + [True] * 2 and reached(of_all) == [True] * 7
    assert reached(gradient(9, 1)) == [False] * 3 + [True] * 2 + [False] * 2
    assert reached(gradient(24, 3)) == [False] * 3 + [True] * 4
    z = noise_like(base, frames=25).mul(.1).requires_grad_()
    decoded(base, z)[:, 24].square().sum().backward()
    assert_near(of_all, z.grad[0])
    base.checkpoint_activations()
    try:
        assert_near(gradient(24), of_two)
        assert base.network.gradient_checkpointing and base.vae.decoder.gradient_checkpointing
    finally:
        base.checkpoint_activations(False)


def test_a_lower_precision_is_the_networks_and_the_decoders(base):
    low = load_base("random-cogvideox", dtype=torch.bfloat16)
    plain = load_base("random-cogvideox")
    z, text, level = noise_like(base).requires_grad_(), base.encode_text(["a cat"]), (500, .5, .5)
    assert [part.conv_in.conv.weight.dtype for part in (low.vae.encoder, low.vae.decoder)] == [torch.float32, torch.bfloat16]
    frames = low.decode_frames(z)
    for ours, theirs in zip([*low.predict(z, level, text), frames], [*plain.predict(z, level, text), plain.decode_frames(z)]):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() / theirs.norm() < .03
    frames.sum().backward()
    assert z.grad.isfinite().all() and z.grad.any()


def test_an_adapter_makes_the_same_video_in_diffusers_and_comes_back(base, tmp_path):
    ours = adapted(random_base("cogvideox", .05))
    assert len(lora.layers(ours.network)) == 8
    trained, file = tmp_path / "lora.safetensors", tmp_path / "exported.safetensors"
    lora.save(ours.network, trained)
    noise, text, uncond = noise_like(base), base.encode_text(["a cat"]), base.unconditional()
    expected = sampler.sample(ours.predict, noise, text, uncond, ours.levels(4), 6.)
    plain = sampler.sample(base.predict, noise, text, uncond, base.levels(4), 6.)
    assert (expected - plain).abs().max() > .01

    adapters.export(trained, "diffusers-lora", file)
    pipe = pipeline(random_base("cogvideox", .05))
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    asked = ask(text, uncond, num_frames=FRAMES, latents=noise.transpose(1, 2), num_inference_steps=4)
    assert_near(pipe(**asked, output_type="latent").frames.transpose(1, 2), expected)
    again = random_base("cogvideox", .05)
    lora.load(again.network, file)
    assert_same_adapters(again, ours)
    refused("is no layer of Wan's", adapters.export, trained, "comfyui", tmp_path / "comfyui.safetensors")



@pytest.fixture
def folder(base_5b, tmp_path):
    base_5b.network.save_pretrained(tmp_path / "transformer")
    base_5b.vae.save_pretrained(tmp_path / "vae")
    make_scheduler(1.).save_pretrained(tmp_path / "scheduler")
    return tmp_path


def test_a_folder_is_read(base_5b, folder):
    loaded = load_base(str(folder))
    assert loaded.levels(4).sigma == base_5b.levels(4).sigma != cogvideox.levels(4).sigma
    noise, text = noise_like(base_5b), base_5b.encode_text(["a cat"])
    for ours, theirs in zip(loaded.predict(noise, (500, .5, .5), text), base_5b.predict(noise, (500, .5, .5), text)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_near(loaded.decode_frames(noise), base_5b.decode_frames(noise))
    refused("has no text encoder", loaded.encode_text, ["a cat"])


def test_a_tokenizer_is_read_of_the_published_folders_one_file(tmp_path):
    texts = tmp_path / "texts"
    texts.write_text("a dog rides a bike\nthe quick brown fox\n" * 20)
    sentencepiece.SentencePieceTrainer.train(input=str(texts), model_prefix=str(tmp_path / "spiece"), vocab_size=24, pad_id=0,
                                             eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    write_file(tmp_path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 4})
    words = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenizer = read_tokenizer(tmp_path)
    for caption in ("a dog  rides", "the \ufb01fth bike", ""):
        assert tokenizer(caption).input_ids == [*words.encode(caption), 1]


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_a_folder_lacks_or_is_not_is_named_before_weights_are_read(base, folder, monkeypatch):
    def refuse(message):
        refused(message, load_base, str(folder))
    network = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(network)
    tensors.pop("proj_out.bias")
    save_file(tensors, network, {"format": "pt"})
    refuse("transformer: 1 tensors missing .*proj_out.bias")

    monkeypatch.setattr(CogVideoXTransformer3DModel, "from_pretrained", None)
    base.text_encoder.save_pretrained(folder / "text_encoder")
    refuse("tokenizer: no such folder")
    base.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "text_encoder/model.safetensors").unlink()
    refuse("text_encoder: no weights here")
    shards = {f"part {i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    write_file(folder / "text_encoder/model.safetensors.index.json", {"weight_map": shards})
    write_file(folder / "text_encoder" / shards["part 1"], {"part 1": torch.ones(1)})
    refuse("text_encoder: 1 of 2 shards missing .model-00002-of-00002.safetensors")

    scheduler = folder / "scheduler/scheduler_config.json"
    change(scheduler, prediction_type="epsilon")
    refuse("scheduler_config.json: prediction_type 'epsilon'; CogVideoX 2b and 5b have 'v_prediction'")
    change(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=False)
    refuse("rescale_betas_zero_snr False")
    change(folder / "transformer/config.json", patch_size_t=2)
    refuse("transformer/config.json: patch_size_t 2; CogVideoX 2b and 5b have None")
