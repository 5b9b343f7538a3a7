"""bases/wan.py and bases/cogvideox.py against diffusers' own pipelines, on small random weights in the published classes."""
import json
import math
from functools import cached_property

import diffusers
import pytest
import sentencepiece
import torch
from conftest import adapted, assert_near, metrics, randn32 as randn, random_base, refused, seeded, write_file
from safetensors.torch import load_file, save_file
from test_bases import ON_CLIPS, run_base

import lora
import sampler
import train
from bases import cogvideox, wan
from bases.diffusers_base import read_tokenizer
from formats import adapters
from model import load_base

FRAMES, HEIGHT, WIDTH = 9, 48, 32


class Wan:
    """What the tests below have to know: of Wan here, then of CogVideoX 2b and 5b."""
    name, noise, guidance, programs = "wan", .1, 4., ("diffusers-lora", "comfyui")
    pipelines = diffusers.WanPipeline, diffusers.WanVideoToVideoPipeline
    clamps = True  # its autoencoder, what it decodes
    reached = {(24, 2): [5, 6], (24, 7): [*range(7)], (9, 1): [3], (24, 3): [4, 5, 6]}  # latents, by frame and latent_context

    @cached_property
    def base(self):
        return random_base(self.name, self.noise)

    def scheduler(self):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.)

    def levels(self, D):
        return self.base.levels(D, published=True)

    def turned(self, z):
        """Latents as diffusers has them."""
        return z

    def target(self, z, noise, level):
        """The velocity."""
        return noise - z

    def decoded(self, z):
        """By the autoencoder's own `decode`, as decode_frames has them."""
        return self.base.vae.decode(wan.to_vae(self.base.vae, z)).sample.transpose(1, 2) / 2 + .5

    def pipeline(self, number=0, base=None):
        base = base or self.base
        pipe = self.pipelines[number](base.tokenizer, base.text_encoder, vae=base.vae, transformer=base.network,
                                      scheduler=self.scheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def noise_like(self, seed=0, frames=FRAMES):
        return randn(1, *self.base.latent_shape(frames, HEIGHT, WIDTH), seed=seed)

    def ask(self, text, uncond):
        return dict(prompt_embeds=text, negative_prompt_embeds=uncond, height=HEIGHT, width=WIDTH,
                    guidance_scale=self.guidance, output_type="latent")


class CogVideoX(Wan):
    name, noise, guidance, programs, clamps = "cogvideox", .05, 6., ("diffusers-lora",), False
    pipelines = diffusers.CogVideoXPipeline, diffusers.CogVideoXVideoToVideoPipeline
    reached = {(24, 2): [5, 6], (24, 7): [*range(7)], (9, 1): [3, 4], (24, 3): [3, 4, 5, 6]}  # decoded by twos
    snr_shift = 3.

    def scheduler(self):
        return diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
                                                rescale_betas_zero_snr=True, snr_shift_scale=self.snr_shift)

    def levels(self, D):
        return self.base.levels(D)

    def turned(self, z):
        return z.transpose(1, 2)

    def target(self, z, noise, level):
        return level[1] * noise - level[2] * z

    def decoded(self, z):
        return self.base.vae.decode(z / self.base.vae.config.scaling_factor).sample.transpose(1, 2) / 2 + .5


class CogVideoX5b(CogVideoX):
    """Rotations for positions, other levels, another scale of latents."""
    snr_shift = 1.

    @cached_property
    def base(self):
        small = random_base("cogvideox", .05)
        network = diffusers.CogVideoXTransformer3DModel(**{**small.network.config, "use_rotary_positional_embeddings": True})
        network.load_state_dict(small.network.state_dict())
        small.vae.register_to_config(scaling_factor=.7)
        return cogvideox.CogVideoX(network.eval(), small.vae, small.tokenizer, small.text_encoder, name="5b",
                                   alpha_bar=cogvideox.signal_power(1.))


KNOWN = {"wan": Wan(), "cogvideox": CogVideoX(), "5b": CogVideoX5b()}


@pytest.fixture(params=["wan", "cogvideox"])
def known(request):
    return KNOWN[request.param]


def test_wans_levels_by_hand():
    L = wan.levels(4)
    assert L.sigma == pytest.approx([0, 3 * .25 / 1.5, 3 * .5 / 2, 3 * .75 / 2.5, 1]) and L.t == [1000 * s for s in L.sigma]
    assert [a + s for a, s in zip(L.alpha, L.sigma)] == [1.] * 5 and L.fresh[1] == 0 and L.start == 1
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.)
    for D in (1, 2, 7, 20):
        scheduler.set_timesteps(D)
        published = wan.levels(D, published=True, shift=5.)
        torch.testing.assert_close(torch.tensor(published.sigma[::-1]), scheduler.sigmas, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(published.t[:0:-1]), scheduler.timesteps, rtol=0, atol=1e-3)
    assert wan.levels(20).sigma[1] > .13 and wan.levels(20, published=True).sigma[1] < .01  # why it is not the default


def test_cogvideoxs_levels_are_the_published_schedulers():
    for name in ("cogvideox", "5b"):
        scheduler = KNOWN[name].scheduler()
        alpha_bar = cogvideox.signal_power(KNOWN[name].snr_shift)
        torch.testing.assert_close(alpha_bar, scheduler.alphas_cumprod, rtol=0, atol=1e-12)
    scheduler = KNOWN["cogvideox"].scheduler()
    for D in (1, 2, 7, 20, 30):
        scheduler.set_timesteps(D)
        assert cogvideox.levels(D).t[:0:-1] == scheduler.timesteps.tolist()
    L = cogvideox.levels(2)
    assert (L.t, L.alpha[0], L.sigma[0], L.alpha[2], L.sigma[2]) == ([-1, 499, 999], 1., 0., 0., 1.)
    assert L.alpha[1] == pytest.approx(math.sqrt(scheduler.alphas_cumprod[499])) and L.fresh[1] == 0
    assert cogvideox.levels(7).sigma[0] > 0  # 7 does not divide 1000: 142, less 1000 // 7, is level 0, not the clip
    refused("num_steps = 0: must be from 1 to 1000", cogvideox.levels, 0)


@pytest.mark.parametrize("name, D", [("wan", 5), ("cogvideox", 4), ("cogvideox", 7), ("5b", 7)])
def test_sampling_equals_diffusers_pipeline(name, D):
    known = KNOWN[name]
    base, noise = known.base, known.noise_like()
    text, uncond = base.encode_text(["a cat"]), base.encode_text(["blurry"])
    ours = sampler.sample(base.predict, noise, text, uncond, known.levels(D), known.guidance)
    asked = known.ask(text, uncond) | dict(num_frames=FRAMES, latents=known.turned(noise), num_inference_steps=D)
    assert_near(ours, known.turned(known.pipeline()(**asked).frames))
    if D == 4:
        assert_near(base.decode_frames(ours).clamp(0, 1), known.pipeline()(**asked | {"output_type": "pt"}).frames)


@pytest.mark.parametrize("tau", [.6, .4])
def test_the_edit_equals_diffusers_video_to_video(known, tau):
    base, generator = known.base, seeded(3)
    text, uncond = base.encode_text(["a cat"]), base.unconditional()
    video = randn(FRAMES, 3, HEIGHT, WIDTH).sigmoid()                                          # in [0, 1]
    z = base.draw_latents(base.encode(2 * video - 1)[0], generator)[None]
    eps = known.turned(torch.randn(known.turned(z).shape, generator=generator))                # as the pipeline draws it
    ours = sampler.edit(base.predict, z, eps, text, uncond, known.levels(10), tau, known.guidance)
    theirs = known.pipeline(1)(video=list(video), strength=tau, num_inference_steps=10, generator=seeded(3),
                               **known.ask(text, uncond)).frames
    assert_near(ours.detach(), known.turned(theirs))


def test_captions_are_read_as_diffusers_reads_them(known):
    base, captions = known.base, ["a  cat &amp; a dog ", "", "word " * 600]
    if known.name == "wan":
        captions[0] = "a  cat &amp;amp; a dog "
        assert (base.encode_text(captions[:1])[0, 40:] == 0).all()
    theirs, _ = known.pipeline().encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=base.max_tokens)
    torch.testing.assert_close(base.encode_text(captions), theirs, rtol=0, atol=1e-5)
    assert [base.is_cut(caption) for caption in captions] == [False, False, True]


def test_the_loss_is_the_velocitys(known):
    base, z, noise = known.base, known.noise_like(1), known.noise_like(2)
    t, alpha, sigma = level = base.level(torch.tensor([.3]))
    assert t.item() == pytest.approx(562.5 if known.name == "wan" else 300)
    assert (alpha + sigma if known.name == "wan" else alpha ** 2 + sigma ** 2).item() == pytest.approx(1)
    z_t, text = alpha * z + sigma * noise, base.encode_text(["a cat"])
    v = known.turned(base.network(hidden_states=known.turned(z_t), timestep=t, encoder_hidden_states=text, return_dict=False)[0])
    loss = base.error(*base.predict(z_t, level, text), z, noise, level)
    expected = (v - known.target(z, noise, level)).square().mean()[None]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_few_frames_are_those_of_the_whole_video(known):
    z = torch.cat([known.noise_like(1, frames=25), known.noise_like(2, frames=25)])
    whole, index = known.decoded(z), torch.tensor([[0, 8, 9, 16], [17, 24, 1, 1]])

    def close(ours, theirs):
        torch.testing.assert_close(ours.clamp(0, 1) if known.clamps else ours, theirs, rtol=0, atol=1e-5)
    close(known.base.decode_frames(z), whole)
    few = known.base.decode_frames(z, index)
    for b in range(2):
        close(few[b], whole[b, index[b]])
    close(known.base.decode_frames(z[:, :, :1]), known.decoded(z[:, :, :1]))  # of one frame


def test_gradient_reaches_the_latents_of_the_context_and_is_the_decoders_own(known, monkeypatch):
    base = known.base

    def gradient(frame, context):
        monkeypatch.setattr(base, "latent_context", context)
        z = known.noise_like(frames=25).mul(.03).requires_grad_()
        base.decode_frames(z, torch.tensor([[frame]])).square().sum().backward()
        return z.grad[0]
    found = {}
    for asked, reached in known.reached.items():
        found[asked] = gradient(*asked)
        assert [i for i, latent in enumerate(found[asked].unbind(1)) if latent.any()] == reached
    z = known.noise_like(frames=25).mul(.03).requires_grad_()
    pixels = known.decoded(z)[:, 24]
    assert not known.clamps or (pixels > 0).all() and (pixels < 1).all()  # nothing is clamped at these
    pixels.square().sum().backward()
    torch.testing.assert_close(found[24, 7], z.grad[0], rtol=1e-3, atol=1e-4 * z.grad.abs().max().item())
    if known.name == "cogvideox":
        base.checkpoint_activations()
        assert base.network.gradient_checkpointing and base.vae.decoder.gradient_checkpointing
        recomputed = gradient(24, 2)
        base.checkpoint_activations(False)
        assert_near(recomputed, found[24, 2])


def test_a_lower_precision_is_the_networks_and_the_decoders():
    low, plain = load_base("random-cogvideox", dtype=torch.bfloat16), load_base("random-cogvideox")
    z, text, level = KNOWN["cogvideox"].noise_like().requires_grad_(), plain.encode_text(["a cat"]), (500, .5, .5)
    assert [part.conv_in.conv.weight.dtype for part in (low.vae.encoder, low.vae.decoder)] == [torch.float32, torch.bfloat16]
    frames = low.decode_frames(z)
    for ours, theirs in zip([*low.predict(z, level, text), frames], [*plain.predict(z, level, text), plain.decode_frames(z)]):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() / theirs.norm() < .03
    frames.sum().backward()
    assert z.grad.isfinite().all() and z.grad.any()


def test_latent_context_is_a_setting_of_training(animals):
    """It changes the gradient, not the frames; another one would be another run."""
    for context in (1, None):
        assert run_base("wan", *ON_CLIPS, "--latent-context", context, "--steps", 1, "--out", f"context-{context}") == 0
    one, own = (metrics(f"context-{context}")[0] for context in (1, None))
    assert one["reward"] == own["reward"] and one["grad_norm"] != pytest.approx(own["grad_norm"], rel=1e-3)
    refused("latent_context would make it another run", train.main, ["--resume", "context-1", "--latent-context", "2"])


def test_an_adapter_makes_the_same_video_in_diffusers_and_comes_back(known, tmp_path):
    base, ours = known.base, adapted(random_base(known.name, known.noise))
    lora.save(ours.network, tmp_path / "lora.safetensors")
    noise, text, uncond = known.noise_like(), base.encode_text(["a cat"]), base.unconditional()
    expected, plain = (sampler.sample(of.predict, noise, text, uncond, known.levels(4), known.guidance) for of in (ours, base))
    assert (expected - plain).abs().max() > .01
    pipe = known.pipeline(base=random_base(known.name, known.noise))
    for program in known.programs:
        file = tmp_path / f"{program}.safetensors"
        adapters.export(tmp_path / "lora.safetensors", program, file)
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
        asked = known.ask(text, uncond) | dict(num_frames=FRAMES, latents=known.turned(noise), num_inference_steps=4)
        assert_near(known.turned(pipe(**asked).frames), expected)
        pipe.unload_lora_weights()
        again = random_base(known.name, known.noise)
        lora.load(again.network, file)
        for a, b in zip(lora.layers(again.network).values(), lora.layers(ours.network).values(), strict=True):
            torch.testing.assert_close(a.scale * a.lora_B @ a.lora_A, b.scale * b.lora_B @ b.lora_A)
    if known.name == "cogvideox":
        refused("is no layer of Wan's", adapters.export, tmp_path / "lora.safetensors", "comfyui", tmp_path / "other.safetensors")


def write_folder(known, folder):
    known.base.network.save_pretrained(folder / "transformer")
    known.base.vae.save_pretrained(folder / "vae")
    known.scheduler().save_pretrained(folder / "scheduler")


@pytest.mark.parametrize("name", ["wan", "5b"])
def test_a_folder_is_read(name, tmp_path):
    base, noise = KNOWN[name].base, KNOWN[name].noise_like()
    write_folder(KNOWN[name], tmp_path)
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    if name == "wan":
        write_file(scheduler, {"prediction_type": "flow_prediction", "flow_shift": 5.0})        # as of UniPCMultistepScheduler
    loaded, text = load_base(str(tmp_path)), base.encode_text(["a cat"])
    for ours, theirs in zip(loaded.predict(noise, (500., .5, .5), text), base.predict(noise, (500., .5, .5), text)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_near(loaded.decode_frames(noise), base.decode_frames(noise))
    refused("has no text encoder", loaded.encode_text, ["a cat"])
    if name == "wan":
        assert loaded.levels(4).sigma == wan.levels(4, shift=5.).sigma
        write_file(scheduler, {"prediction_type": "epsilon"})
        refused("prediction_type 'epsilon'; Wan's is flow_prediction", load_base, str(tmp_path))
        (tmp_path / "vae/config.json").unlink()
        refused("no vae/config.json", load_base, str(tmp_path))
    else:
        assert loaded.levels(4).sigma == base.levels(4).sigma != cogvideox.levels(4).sigma


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


def test_what_a_folder_lacks_or_is_not_is_named_before_weights_are_read(tmp_path, monkeypatch):
    def refuse(message):
        refused(message, load_base, str(tmp_path))

    def change(path, **values):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    write_folder(KNOWN["5b"], tmp_path)
    network = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(network)
    tensors.pop("proj_out.bias")
    save_file(tensors, network, {"format": "pt"})
    refuse("transformer: 1 tensors missing .*proj_out.bias")

    monkeypatch.setattr(diffusers.CogVideoXTransformer3DModel, "from_pretrained", None)
    KNOWN["5b"].base.text_encoder.save_pretrained(tmp_path / "text_encoder")
    refuse("tokenizer: no such folder")
    KNOWN["5b"].base.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text_encoder/model.safetensors").unlink()
    refuse("text_encoder: no weights here")
    shards = {f"part {i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    write_file(tmp_path / "text_encoder/model.safetensors.index.json", {"weight_map": shards})
    write_file(tmp_path / "text_encoder" / shards["part 1"], {"part 1": torch.ones(1)})
    refuse("text_encoder: 1 of 2 shards missing .model-00002-of-00002.safetensors")
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    change(scheduler, prediction_type="epsilon")
    refuse("scheduler_config.json: prediction_type 'epsilon'; CogVideoX 2b and 5b have 'v_prediction'")
    change(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=False)
    refuse("rescale_betas_zero_snr False")
    change(tmp_path / "transformer/config.json", patch_size_t=2)
    refuse("transformer/config.json: patch_size_t 2; CogVideoX 2b and 5b have None")
