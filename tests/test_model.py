"""model.py: the networks against diffusers, transformers and open_clip; the full-size structures tensor by tensor."""
import hashlib
import json

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import model
from bases.modelscope import Base
from formats import tensor_names as names, tensors as published
from formats.word_tokenizer import WordTokenizer
from model import Autoencoder, TextConfig, TextEncoder, UNet3D, UNetConfig, VAEConfig
from support import ranks as processes
from tests.conftest import letters, randn, refused, seeded, vae_to_official


def randomised(module, seed=0):
    """Every tensor drawn anew, in float64: a zero or a one left from the initialisation would hide a mistake."""
    g = seeded(seed)
    for p in module.double().eval().parameters():
        spread = 0.3 if p.dim() < 2 else (2 / p[0].numel())**0.5
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * spread
    return module


def assert_same(ours, theirs, tolerance=2e-6):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance


# ---- The UNet against diffusers' UNet3DConditionModel, which always has 8 heads in its first temporal transformer

TWO_LEVELS = UNetConfig(channels=(8, 16), blocks_per_level=1, attention_levels=(True, False), context_dim=12, head_dim=4,
                        norm_groups=4)
FOUR_LEVELS = UNetConfig(channels=(8, 16, 24, 24), blocks_per_level=2, context_dim=12, head_dim=8, norm_groups=8)
ONLY_DEEP = UNetConfig(in_channels=3, out_channels=5, channels=(4, 8, 8), blocks_per_level=1,
                       attention_levels=(False, True, True), context_dim=6, head_dim=4, norm_groups=2)


def unet_inputs(config, B, F, H, W):
    """z_t (B, C, F, H, W), t (B,), text (B, N, context_dim)."""
    return randn(B, config.in_channels, F, H, W, seed=1), torch.tensor([551, 1, 951])[:B], randn(B, 5, config.context_dim, seed=2)


@pytest.mark.parametrize(("config", "B", "F", "H", "W"), [
    (TWO_LEVELS, 1, 1, 8, 8),                          # a picture is a clip of one frame
    (TWO_LEVELS, 2, 3, 6, 10),                         # odd number of frames, more than one clip, not square
    (TWO_LEVELS, 3, 5, 7, 5),                          # rows and columns that halving rounds up
    (FOUR_LEVELS, 2, 3, 8, 16),
    (FOUR_LEVELS, 1, 5, 11, 9),                        # odd at every level
    (ONLY_DEEP, 2, 4, 4, 6),
])
def test_unet_matches_diffusers(config, B, F, H, W):
    ours, (z_t, t, text) = randomised(UNet3D(config)), unet_inputs(config, B, F, H, W)
    theirs = UNet3DConditionModel.from_config(names.unet_to_diffusers(config)).double().eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the names and shapes are theirs
    z_t.requires_grad_(), text.requires_grad_()
    outs, grads = [], []
    for unet, call in ((ours, ours), (theirs, lambda *x: theirs(*x).sample)):
        eps = call(z_t, t, text)
        parameters = dict(unet.named_parameters())
        loss = (eps * randn(*eps.shape, seed=3)).sum()
        grad = torch.autograd.grad(loss, [z_t, text, *parameters.values()])
        outs.append(eps.detach())
        grads.append(dict(zip(["z_t", "text", *parameters], grad)))
    assert outs[0].shape == (B, config.out_channels, F, H, W)
    assert_same(*outs)
    # The gradient too: every parameter has one, and it is theirs.
    for name, grad in grads[0].items():
        scale = grads[1][name].abs().max()
        assert scale > 0 or F == 1 or ".attn" in name, name
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=2e-6 * max(scale.item(), 1e-3), msg=name)


def test_clips_do_not_mix_and_frames_do():
    unet, (z_t, t, text) = randomised(UNet3D(TWO_LEVELS)), unet_inputs(TWO_LEVELS, 2, 4, 4, 4)
    with torch.no_grad():
        eps = unet(z_t, t, text)
        torch.testing.assert_close(eps[1:], unet(z_t[1:], t[1:], text[1:]), rtol=1e-10, atol=1e-10)
        z_t[0, :, 3] += 1                                                                         # the last frame of clip 0
        changed = (unet(z_t, t, text) - eps).abs().amax((1, 3, 4))                                # (B, F)
    assert (changed[0] > 1e-6).all() and (changed[1] == 0).all()


def test_a_fresh_temporal_convolution_changes_nothing():
    x = randn(6, 8, 4, 5, dtype=torch.float32)
    assert torch.equal(model.TemporalConv(8, 4)(x, num_frames=3), x)


def test_channels_last_weights_are_the_same_numbers(monkeypatch):
    """What load_base does on cuda; frame convolutions then hand cuDNN weights in that order too."""
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)  # wherever the weights lie, their order is what matters
    for net, data in ((randomised(UNet3D(TWO_LEVELS)), unet_inputs(TWO_LEVELS, 1, 3, 4, 6)),
                      (randomised(Autoencoder(VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4))).decoder,
                       (randn(2, 4, 3, 5),))):
        with torch.no_grad():
            before, print_before = net(*data), published.fingerprint(net.state_dict())
            processes.move_to(net, "cuda")
            torch.testing.assert_close(net(*data), before, rtol=1e-10, atol=1e-10)
        assert published.fingerprint(net.state_dict()) == print_before
        weights = [m.weight.squeeze(-1) if isinstance(m, model.FrameConv) else m.weight for m in net.modules()
                   if isinstance(m, nn.Conv2d | nn.Conv3d)]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize("config", [TWO_LEVELS, ONLY_DEEP])
def test_recomputing_activations_changes_nothing_but_memory(config):
    unet, data = randomised(UNet3D(config)), unet_inputs(config, 2, 3, 4, 6)
    results = []
    for on in (False, True):
        unet.checkpoint_activations(on)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(0) or t, lambda t: t):
            eps = unet(*data)
        grads = torch.autograd.grad((eps * randn(*eps.shape)).sum(), list(unet.parameters()))
        results.append((eps, grads, len(kept)))
    (eps, grads, kept), (eps_re, grads_re, kept_re) = results
    assert torch.equal(eps, eps_re) and all(torch.equal(a, b) for a, b in zip(grads, grads_re))
    assert kept_re < kept / 2
    unet.checkpoint_activations(False)
    assert not any(level.recompute for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks))


# ---- The autoencoder against diffusers' AutoencoderKL ----------------------------------------------------

@pytest.mark.parametrize(("config", "N", "H", "W"), [
    (VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4), 1, 16, 16),
    (VAEConfig(channels=(8, 16, 16), blocks_per_level=2, norm_groups=8), 3, 20, 36),
    (VAEConfig(channels=(8, 8, 16, 16), blocks_per_level=1, latent_channels=6, norm_groups=4), 2, 27, 37),
])
def test_autoencoder_matches_diffusers(config, N, H, W):
    ours = randomised(Autoencoder(config))
    theirs = AutoencoderKL.from_config(names.vae_to_diffusers(config)).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x = randn(N, 3, H, W).requires_grad_()
    moments, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert moments.shape[:2] == (N, 2 * config.latent_channels)
    assert moments.shape[2:] == (H // config.downscale, W // config.downscale)
    # theirs clamps the log variance it hands out, and its mean is the first half
    assert_same(moments.detach(), expected.parameters.detach())
    assert_same(moments.chunk(2, dim=1)[0].detach(), expected.mean.detach())

    latent = randn(N, config.latent_channels, 3, 5).requires_grad_()
    pictures = [ours.decode(latent), theirs.decode(latent).sample]
    assert pictures[0].shape == (N, 3, 3 * config.downscale, 5 * config.downscale)
    assert_same(*(p.detach() for p in pictures))
    assert_same(*(torch.autograd.grad((p * randn(*p.shape)).sum(), latent)[0] for p in pictures))  # what the reward sends back
    assert_same(*(torch.autograd.grad(m.sum(), x)[0] for m in (moments, expected.parameters)))


# ---- The text tower against transformers' CLIPTextModel and an open_clip CLIP ----------------------------

CAPTIONS = ["a bear", "", "a very long caption, cut"]


def transformers_tower(layers, heads=2):
    config = CLIPTextConfig(vocab_size=40, hidden_size=16, intermediate_size=64, num_hidden_layers=layers,
                            num_attention_heads=heads, max_position_embeddings=9, hidden_act="gelu",
                            bos_token_id=1, eos_token_id=33)
    return randomised(CLIPTextModel(config))


def tower(tensors, layers, heads=2):
    with torch.device("meta"):
        ours = TextEncoder(TextConfig(vocab_size=40, context_length=9, width=16, heads=heads, layers=layers), letters)
    return published.load_strict(ours, tensors, "test")


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_matches_transformers(prefix):
    whole = transformers_tower(layers=4)
    tensors = {prefix + k.removeprefix("text_model."): v.detach() for k, v in whole.state_dict().items()}
    renamed = names.text_from_transformers(tensors)
    tokens = letters(CAPTIONS)
    with torch.no_grad():
        out = whole(tokens, output_hidden_states=True)
        # As it is, the last layer is the last.
        assert_same(tower(renamed, 4)(CAPTIONS), out.last_hidden_state)
        # The published text_encoder has one layer less than CLIP: its last is the penultimate, and the final norm follows.
        final = next(m for name, m in whole.named_modules() if name.endswith("final_layer_norm"))
        shorter = {k: v for k, v in renamed.items() if not k.startswith("transformer.resblocks.3.")}
        ours = tower(shorter, 3)(CAPTIONS)
        assert ours.shape == (3, 9, 16)
        assert_same(ours, final(out.hidden_states[-2]))
        cut = transformers_tower(layers=3)
        cut.load_state_dict({k: v for k, v in whole.state_dict().items() if ".3." not in k})
        assert_same(ours, cut(tokens).last_hidden_state)


def test_text_matches_open_clip():
    clip = randomised(open_clip.CLIP(8, dict(image_size=8, patch_size=4, width=16, layers=1, head_width=8),
                                     dict(context_length=9, vocab_size=40, width=16, heads=2, layers=4)))
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
    tensors = {k: v for k, v in clip.state_dict().items() if k.startswith(parts) and ".3." not in k}
    ours = tower(tensors, 3)
    with torch.no_grad():
        tokens = letters(CAPTIONS)
        x = clip.token_embedding(tokens) + clip.positional_embedding
        for block in clip.transformer.resblocks[:-1]:                                             # up to the penultimate
            x = block(x, attn_mask=clip.attn_mask.double())
        assert_same(ours(CAPTIONS), clip.ln_final(x))
        # A token sees those before it alone.
        changed = (ours(["a bear"]) - ours(["a bean"])).abs().amax(-1)[0]                         # (N,)
        assert (changed[:6] == 0).all() and (changed[6:] > 0).all()


def test_the_default_tokenizer_is_open_clips():
    text = TextEncoder(TextConfig(width=8, heads=1, layers=1))
    tokens = text.tokenizer(["A panda, riding a bicycle!"])
    assert torch.equal(tokens, open_clip.tokenize(["A panda, riding a bicycle!"])) and tokens.shape == (1, 77)
    assert text(["a panda", "a bear"]).shape == (2, 77, 8)
    assert text(("a panda",)).shape == (1, 77, 8)


def test_words_as_tokens_and_those_that_are_not_known(capsys):
    words = WordTokenizer(["a", "red", "circle"], context_length=6)
    assert words.vocab_size == 7                                      # padding, start, unknown, three words, end
    tokens = words(["a red circle", "", "A Circle.", "a red a red circle a circle"])
    assert capsys.readouterr().err == ""
    assert tokens.tolist() == [[1, 3, 4, 5, 6, 0], [1, 6, 0, 0, 0, 0], [1, 3, 5, 6, 0, 0], [1, 3, 4, 3, 4, 6]]
    assert tokens.dtype == torch.int64
    assert (tokens.argmax(1) == torch.tensor([4, 1, 3, 5])).all()     # CLIP pools where the number is largest: at the end
    assert words(["a panda, a bicycle"]).tolist() == [[1, 3, 2, 3, 2, 6]]
    assert capsys.readouterr().err == "words this model does not know: panda, bicycle; it knows: a red circle\n"
    words(["a bicycle"])  # is said once
    assert capsys.readouterr().err == ""


# ---- Between the parts -----------------------------------------------------------------------------------

def test_frames_are_picked_then_decoded():
    vae, z = randomised(Autoencoder(VAEConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4))), randn(2, 4, 5, 3, 4)
    with torch.no_grad():
        every = model.decode_frames(vae, z)                                                       # (B, F, 3, H, W)
        assert every.shape == (2, 5, 3, 6, 8) and every.dtype == torch.float32
        by_hand = vae.decode(z[1, :, 3:4].transpose(0, 1) / 0.18215)[0] / 2 + 0.5                 # clip 1, frame 3
        torch.testing.assert_close(every[1, 3], by_hand.float(), rtol=1e-5, atol=1e-5)
        index = torch.tensor([[4, 0], [1, 1]])
        picked = model.decode_frames(vae, z, index)                                               # (B, S, 3, H, W)
    for b in range(2):
        torch.testing.assert_close(picked[b], every[b, index[b]], rtol=1e-5, atol=1e-5)


def small_base(dtype=torch.float32):
    text = TextEncoder(TextConfig(vocab_size=40, context_length=9, width=12, heads=2, layers=1), WordTokenizer(["a", "bear"], 9))
    vae = Autoencoder(VAEConfig(channels=(8, 16, 16), blocks_per_level=1, norm_groups=4))
    return Base(*(randomised(m).to(dtype) for m in (UNet3D(TWO_LEVELS), vae, text)), "test")


def test_the_chain_stays_float32_around_a_half_precision_unet():
    base, (z_t, t, text) = small_base(torch.bfloat16), unet_inputs(TWO_LEVELS, 2, 3, 4, 4)
    z_0, eps = base.predict(z_t.float(), (t, .6, .8), text.float())
    assert eps.dtype == torch.float32 and torch.equal(eps, base.network(z_t.bfloat16(), t, text.bfloat16()).float())
    torch.testing.assert_close(.6 * z_0 + .8 * eps, z_t.float())
    assert base.device.type == "cpu" and base.default_size == 32 * 4


def test_a_caption_is_encoded_once_and_alone():
    base, calls = small_base(), []
    base.text_encoder.register_forward_hook(lambda module, args, out: calls.append(args[0]))
    features = base.encode_text(["a bear", "a", "a bear"])
    assert features.shape == (3, 9, 12) and calls == [["a bear"], ["a"]] and not features.requires_grad
    base.release_encoders()
    assert torch.equal(base.encode_text(["a"])[0], features[1]) and calls[2:] == [[""]]  # which a step needs


def test_devices_and_precisions_by_name(monkeypatch):
    cpu, cuda = processes.pick_device("cpu"), torch.device("cuda")
    assert cpu == torch.device("cpu") and isinstance(processes.pick_device(), torch.device)
    assert processes.pick_dtype(None, cpu) == torch.float32
    for version, expected in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):  # a T4 computes bfloat16 very slowly
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, version=version: version)
        assert processes.pick_dtype(None, cuda) == expected and processes.pick_dtype("bfloat16", cuda) == torch.bfloat16
    assert processes.pick_dtype("float16", cpu) == torch.float16
    for name in ("gpu", "cuda:99", "meta", ""):
        refused(f"device {name!r}: not available here", processes.pick_device, name)
    refused("dtype 'int8': must be one of float32, bfloat16, float16", processes.pick_dtype, "int8", cpu)


# ---- Full size, tensor by tensor, without memory ---------------------------------------------------------

def fingerprint(shapes):
    """SHA-256 of {name: shape}: sha256(json.dumps(sorted([name, shape] ...)))."""
    return hashlib.sha256(json.dumps(sorted([name, list(shape)] for name, shape in shapes.items())).encode()).hexdigest()


def meta(build):
    with torch.device("meta"):
        return build().state_dict()


def shapes(tensors):
    return {name: t.shape for name, t in tensors.items()}


# The names and shapes of the published files, by fingerprint().
PUBLISHED = {
    "diffusers unet": "8148bc90ef809c94887bb80c8590f905ee2b5ccad8e7165dad71a6d66b7ff581",
    "official unet": "9163bd093a1006513a9fda7613c54ca25ac724860966e2a9f895d1ffc661fbb3",
    "diffusers vae": "6286db08f9cfd63c3269bc33f220dd77e9ab46cd1173bb5f3f71ef61a92db085",
    "stable diffusion vae": "990f73fe7cdb8d4cb98d3ea36b665987d264928968b4275991a23699a5e2dc8c",
}


def test_full_size_unet_is_the_published_one():
    tensors = meta(UNet3D)
    assert len(tensors) == 1480 and sum(t.numel() for t in tensors.values()) == 1_411_233_860
    assert fingerprint(shapes(tensors)) == PUBLISHED["diffusers unet"]
    official = names.unet_to_official(tensors, UNetConfig())
    assert len(official) == 1480 and fingerprint(shapes(official)) == PUBLISHED["official unet"]
    assert shapes(names.unet_from_official(official, UNetConfig())) == shapes(tensors)


def test_full_size_autoencoder_is_stable_diffusions():
    tensors = meta(Autoencoder)
    assert len(tensors) == 248 and sum(t.numel() for t in tensors.values()) == 83_653_863
    assert fingerprint(shapes(tensors)) == PUBLISHED["diffusers vae"]
    official = vae_to_official(tensors, VAEConfig())
    in_ckpt = {f"first_stage_model.{name}": t.shape for name, t in official.items()}
    assert len(official) == 248 and fingerprint(in_ckpt) == PUBLISHED["stable diffusion vae"]
    assert shapes(names.vae_from_official(official, VAEConfig(), tensors)) == shapes(tensors)


def test_full_size_text_tower_is_vit_h_14_less_a_block():
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    ours = meta(TextEncoder)
    assert shapes(ours) == {k: clip[k].shape for k in ours}
    left_out = {k for k in clip.keys() - ours.keys() if not k.startswith("visual.")}
    assert {k for k in left_out if not k.startswith("transformer.resblocks.23.")} == {"text_projection", "logit_scale"}


def test_configs_of_diffusers_own_classes():
    with torch.device("meta"):
        theirs, vae = UNet3DConditionModel(), AutoencoderKL.from_config(names.vae_to_diffusers(VAEConfig()))
    assert names.unet_from_diffusers(json.loads(theirs.to_json_string()), UNetConfig) == UNetConfig()
    assert names.vae_from_diffusers(json.loads(vae.to_json_string()), VAEConfig) == VAEConfig()


def test_many_rows_attend_in_parts_and_give_the_same(monkeypatch):
    """A frame of 576 x 1024 pixels has 73,728 rows of heads in the stem, more than CUDA takes at once."""
    q, k, v = torch.randn(3, 2, 11, 4, 8, generator=torch.Generator().manual_seed(0))
    whole, sizes, real = model.attend(q, k, v), [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(model, "MAX_ROWS", 4)
    monkeypatch.setattr(model.F_, "scaled_dot_product_attention", lambda q, *more: sizes.append(q.shape[1]) or real(q, *more))
    assert torch.equal(model.attend(q, k, v), whole) and sizes == [4, 4, 3]
