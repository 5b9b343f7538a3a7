"""bases/opensora.py by hand-worked numbers, by what diffusers and transformers have of it, and by what must not change it."""
import html.parser
import json
import math

import pytest
import torch
from conftest import adapted, randn32 as randn, random_base, refused, write_file
from diffusers import AutoencoderKL
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed, get_2d_sincos_pos_embed
from diffusers.models.normalization import RMSNorm
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as pixart
from safetensors.torch import save_file
from test_bases import ON_CLIPS, run_base
from torch import nn
from transformers import T5EncoderModel

import lora
import sampler
from bases import opensora
from bases.t5 import clean_caption, clean_once, text_of_html
from formats import adapters, tensor_names as names, weights
from model import VAEConfig, load_base

FRAMES, HEIGHT, WIDTH = 34, 24, 16


@pytest.fixture(scope="module")
def base():
    return random_base("opensora", .1)


def noise_like(base, seed=0, frames=FRAMES):
    return randn(1, *base.latent_shape(frames, HEIGHT, WIDTH), seed=seed)


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def test_levels_by_hand():
    picture = opensora.levels(4, (1, 512, 512))
    assert picture.sigma == [0, .25, .5, .75, 1] and picture.t == [0, 250, 500, 750, 1000] and picture.fresh[1] == 0
    clip = opensora.levels(2, (34, 256, 512))  # ten latents of half as many pixels: a shift of the root of 5
    assert clip.sigma == pytest.approx([0, 5**.5 * .5 / (1 + (5**.5 - 1) * .5), 1]) and clip.alpha[1] == 1 - clip.sigma[1]
    assert opensora.levels(4).sigma == opensora.levels(4, (51, 256, 256)).sigma != picture.sigma
    chain = opensora.levels(20)  # the preset's tau leaves what ModelScopeT2V's .6 does
    assert chain.alpha[10] / chain.sigma[10] == pytest.approx(.52, abs=.01)


def test_sampling_reads_the_learnt_text_under_the_prompts_own_mask(base):
    noise, text = torch.cat([noise_like(base), noise_like(base, 1)]), base.encode_text(["a cat", "a dog that eats"])
    uncond = base.unconditional(text)
    assert uncond["mask"].equal(text["mask"]) and uncond["mask"][0].sum() < uncond["mask"][1].sum()
    assert uncond["text"][1].equal(base.network.y_embedder.y_embedding) and base.unconditional()["mask"].all()
    levels, z = base.levels(2, (FRAMES, HEIGHT, WIDTH)), noise
    with torch.no_grad():
        for i in (2, 1):
            t = torch.full((2,), levels.t[i])
            v, v_u = [base.network(z, t, told["text"], text["mask"], 24, HEIGHT, WIDTH) for told in (text, uncond)]
            z = z + (levels.sigma[i] - levels.sigma[i - 1]) * (v_u + 7. * (v - v_u))
    close(sampler.sample(base.predict, noise, text, uncond, levels, 7.), z, 1e-4 * z.abs().max().item())


def test_the_loss_is_the_velocitys_and_levels_are_drawn_as_its_authors_drew_them(base):
    z, noise, text = noise_like(base, 1), noise_like(base, 2), base.encode_text(["a cat"])
    u = torch.tensor([.5, .8413447])  # the quantiles of 0 and 1: sigma 1/2 and 1 / (1 + 1/e), before the shift
    t, alpha, sigma = base.level(u)
    shift = 15**.5 / 2  # 15 latents of a quarter of 512 x 512
    expected = [shift * s / (1 + (shift - 1) * s) for s in (.5, 1 / (1 + math.exp(-1)))]
    assert sigma.flatten().tolist() == pytest.approx(expected) and t.tolist() == pytest.approx([1000 * s for s in expected])
    level = t[:1], alpha[:1], sigma[:1]
    z_t = alpha[:1] * z + sigma[:1] * noise
    v = base.network(z_t, t[:1], text["text"], text["mask"], 24, HEIGHT, WIDTH)
    close(base.error(*base.predict(z_t, level, text), z, noise, level), (v - (z - noise)).square().mean()[None], 1e-4)


def test_a_block_is_diffusers_block_with_normalised_queries_and_keys():
    ours = opensora.Block(32, 2)
    theirs = BasicTransformerBlock(32, 2, 16, cross_attention_dim=32, activation_fn="gelu-approximate", attention_bias=True,
                                   norm_elementwise_affine=False, norm_type="ada_norm_single", norm_eps=1e-6)
    theirs.attn1.norm_q, theirs.attn1.norm_k = RMSNorm(16, 1e-6), RMSNorm(16, 1e-6)
    with torch.no_grad():
        for i, p in enumerate(ours.parameters()):
            p.copy_(.3 * randn(*p.shape, seed=i))
    own = ours.state_dict()
    state = {"scale_shift_table": own["scale_shift_table"], "attn1.norm_q.weight": own["attn.q_norm.weight"],
             "attn1.norm_k.weight": own["attn.k_norm.weight"]}
    for kind in ("weight", "bias"):
        q, k, v = own[f"attn.qkv.{kind}"].chunk(3)
        text_k, text_v = own[f"cross_attn.kv_linear.{kind}"].chunk(2)
        of_layer = {"attn1.to_q": q, "attn1.to_k": k, "attn1.to_v": v, "attn1.to_out.0": own[f"attn.proj.{kind}"],
                    "attn2.to_q": own[f"cross_attn.q_linear.{kind}"], "attn2.to_k": text_k, "attn2.to_v": text_v,
                    "attn2.to_out.0": own[f"cross_attn.proj.{kind}"],
                    "ff.net.0.proj": own[f"mlp.fc1.{kind}"], "ff.net.2": own[f"mlp.fc2.{kind}"]}
        state |= {f"{name}.{kind}": t for name, t in of_layer.items()}
    theirs.load_state_dict(state)
    x, text, level = randn(2, 1, 6, 32), randn(2, 5, 32, seed=1), randn(2, 6, 32, seed=2)
    mask = torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    with torch.no_grad():
        expected = theirs(x[:, 0], encoder_hidden_states=text, timestep=level.flatten(1),
                          encoder_attention_mask=(1 - mask.float())[:, None] * -1e9)
        close(ours(x, text, mask, level)[:, 0], expected, 1e-5 * expected.abs().max().item())


def test_positions_and_turns_are_those_of_diffusers(base):
    theirs = get_2d_sincos_pos_embed(32, 3, interpolation_scale=48 / 512, base_size=3).float()
    close(base.network.positions(3, 3, 48, 48), theirs, 1e-4)
    wide = base.network.positions(2, 8, 32, 128)  # by hand: row 1 of 2 and column 3 of 8, a picture 64 pixels wide in effect
    place = [3 * (4 / 8) * 8, 1 * (4 / 2) * 8]
    expected = [f(p / 10_000 ** (j / 8)) for p in place for f in (math.sin, math.cos) for j in range(8)]
    close(wide[8 + 3], torch.tensor(expected), 1e-4)
    x = randn(1, 2, 7, 16)
    close(opensora.rotate(x, base.network.rope.freqs), apply_rotary_emb(x, get_1d_rotary_pos_embed(16, 7, use_real=True)))


def test_the_network_by_what_must_and_must_not_change_it(base):
    z, t = torch.cat([noise_like(base), noise_like(base, 1)]), torch.tensor([728.5, 301.25])
    text = base.encode_text(["cat", "a dog"])

    @torch.no_grad()
    def velocity(z=z, text=text["text"], mask=text["mask"], fps=24, height=HEIGHT):
        return base.network(z, t, text, mask, fps, height, WIDTH)
    v = velocity()
    assert v.shape == z.shape
    close(velocity(text=text["text"] + 9. * ~text["mask"][..., None]), v)                      # padding is not read
    assert not velocity(text=text["text"] + .5 * text["mask"][..., None]).allclose(v, atol=1e-3)
    close(velocity(z=z * torch.tensor([1., 0]).view(2, 1, 1, 1, 1))[0], v[0])                  # clips are each for itself
    for changed in (velocity(fps=8), velocity(height=4 * HEIGHT), velocity(z=z.flip(2)).flip(2)):  # order is read off z by RoPE
        assert not changed.allclose(v, atol=1e-3)
    assert velocity(z=randn(2, 4, 5, 3, 5)).shape == (2, 4, 5, 3, 5)                           # odd rows and columns
    single = base.predict(z[:, :, :1], (t, 0., 1.), text)[0] - z[:, :, :1]
    close(single, velocity(z=z[:, :, :1], fps=120))                                            # a picture's frames a second


def test_checkpointed_blocks_have_the_same_gradient(base, monkeypatch):
    text, calls, gradients, forward = base.encode_text(["a cat"]), [], [], opensora.Block.forward
    monkeypatch.setattr(opensora.Block, "forward", lambda *inputs: calls.append(base.network.recompute) or forward(*inputs))
    for on in (False, True):
        base.checkpoint_activations(on)
        z = noise_like(base).requires_grad_()
        base.predict(z, (500., .5, .5), text)[0].square().sum().backward()
        gradients.append(z.grad)
    base.checkpoint_activations(False)
    close(*gradients, 0)
    assert (calls.count(False), calls.count(True)) == (4, 8)  # of four blocks


def test_published_names_and_sizes():
    with torch.device("meta"):
        network, vae = opensora.STDiT3(), opensora.VideoAutoencoder()
    state = network.state_dict()
    assert len(state) == 973 and sum(p.numel() for p in network.parameters()) == 1_207_643_972
    assert state["spatial_blocks.27.cross_attn.kv_linear.weight"].shape == (2304, 1152)
    assert state["y_embedder.y_embedding"].shape == (300, 4096) and state["rope.freqs"].shape == (36,)
    temporal = vae.temporal_vae.state_dict()
    assert len(temporal) == 267 and sum(p.numel() for p in temporal.values()) == 309_687_144
    assert temporal["decoder.conv_blocks.2.conv.weight"].shape == (1024, 512, 3, 3, 3)
    assert "spatial_vae.module.decoder.mid_block.attentions.0.to_out.0.weight" in vae.state_dict()
    assert sum(p.numel() for p in lora.inject(network, 4)) == 3_354_624 and len(lora.layers(network)) == 280


def test_the_2d_stage_is_diffusers(base):
    theirs = AutoencoderKL.from_config(names.vae_to_diffusers(VAEConfig((4, 8, 8, 8), 1, norm_groups=2))).eval()
    theirs.load_state_dict(base.vae.spatial_vae.module.state_dict())
    frames = randn(WINDOW := 17, 3, HEIGHT, WIDTH).clamp(-1, 1)
    z = base.encode(frames)
    with torch.no_grad():
        mean = .18215 * theirs.encode(frames).latent_dist.mode().transpose(0, 1)[None]         # (1, C, 17, h, w)
        padded = torch.cat([torch.zeros_like(mean[:, :, :3]), mean], dim=2)
        vae = base.vae.temporal_vae
        moments = vae.quant_conv(vae.encoder(padded))
        latents = vae.decoder(vae.post_quant_conv(moments[:, :4]))[:, :, 3:]
        pictures = theirs.decode(latents[0].transpose(0, 1) / .18215).sample
    scale, shift = torch.tensor([3.85, 2.32, 2.33, 3.06]), torch.tensor([-.1, .34, .27, .98])
    close(z, (moments[:, :4] - shift.view(-1, 1, 1, 1)) / scale.view(-1, 1, 1, 1))
    close(base.decode_frames(z)[0], pictures / 2 + .5)
    assert len(pictures) == WINDOW


def test_no_convolution_sees_a_later_frame(base, monkeypatch):
    conv = opensora.CausalConv(1, 4, double=True)
    with torch.no_grad():
        conv.conv.weight.zero_()[:, 0, 0, 1, 1] = 1.  # of three frames the first: two before
        conv.conv.bias.copy_(torch.tensor([0., 10., 20., 30.]))
        made = conv(torch.tensor([1., 2, 3, 4]).view(1, 1, 4, 1, 1)).squeeze().tolist()
    assert made == [[0, 10, 0, 10, 1, 11, 2, 12], [20, 30, 20, 30, 21, 31, 22, 32]]  # a channel's two frames are neighbours

    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: x)  # norms look at the whole window
    x, z = randn(1, 4, 20, 3, 2), randn(1, 4, 5, 3, 2)
    later, later_z = x.clone(), z.clone()
    later[:, :, 12:] += 1.
    later_z[:, :, 3:] += 1.
    for part, one, other, changed in (("encoder", x, later, 3), ("decoder", z, later_z, 12)):
        a, b = (base.vae.temporal_vae[part](t) for t in (one, other))
        assert a[:, :, :changed].equal(b[:, :, :changed]) and not a[:, :, changed].allclose(b[:, :, changed])


def test_windows_are_each_for_themselves_and_a_few_frames_are_those_of_the_whole(base):
    frames = randn(34, 3, HEIGHT, WIDTH).clamp(-1, 1)
    close(base.encode(frames)[:, :, 5:], base.encode(frames[17:]))
    z = torch.cat([noise_like(base, 1), noise_like(base, 2)])
    whole = base.decode_frames(z)
    assert whole.shape == (2, 34, 3, HEIGHT, WIDTH)
    close(whole[:, 17:], base.decode_frames(z[:, :, 5:]))
    index = torch.tensor([[0, 16, 17, 33], [20, 3, 3, 1]])
    few = base.decode_frames(z, index)
    for b in range(2):
        close(few[b], whole[b, index[b]])
    picture = base.encode(frames[:1])
    assert picture.shape == (1, 4, 1, 3, 2) and base.decode_frames(picture).shape == (1, 1, 3, HEIGHT, WIDTH)
    alone = base.decode_frames(z[:1, :, 2:3])[0, 0]  # as VADER decodes: no frame of the window is like it
    assert min((alone - frame).abs().max() for frame in whole[0, 4:10]) > .01


def test_gradient_is_the_whole_decodings_and_stays_in_the_window(base):
    z = noise_like(base, 1).requires_grad_()
    base.decode_frames(z, torch.tensor([[20, 33]])).square().sum().backward()
    few, z.grad = z.grad, None
    base.decode_frames(z)[:, [20, 33]].square().sum().backward()
    close(few, z.grad, 1e-4 * z.grad.abs().max().item())
    assert [bool(latent.any()) for latent in few[0].unbind(1)] == [False] * 5 + [True] * 5


DIRTY = ["A cat, at https://cats.com/a-cat?x=1 or www.cats.org", "a <b>bold</b> cat &amp; a dog &quot;here&quot;", "“Quoted” cat",
         "this-is-my-cute-cat_photo.jpg 640x480", "***SALE*** free shipping worldwide, click for more", "jc6640 IMG_12345678",
         "@someone's \u732b cat—dog", "cats [and] dogs / 192.168.0.1 page 12", "a+cat%20walks   slowly . . .", "cat's paw",
         "a red panda eats. It sleeps", "6640vc231 d1e2f3 #123 #12345 ..", "<person> runs", ":colon first-", ""]


def test_captions_are_cleaned_as_diffusers_cleans_them(monkeypatch):
    class Soup(html.parser.HTMLParser):
        """What BeautifulSoup(..., "html.parser").text is of such captions, which is not installed here."""
        def __init__(self, text, features):
            super().__init__()
            self.text = ""
            self.feed(text)
            self.close()

        def handle_data(self, data):
            self.text += data
    monkeypatch.setattr(pixart, "BeautifulSoup", Soup, raising=False)
    pipe = pixart.PixArtAlphaPipeline.__new__(pixart.PixArtAlphaPipeline)
    for caption in DIRTY:
        assert clean_once(clean_once(caption)) == pipe._clean_caption(pipe._clean_caption(caption)), caption


@pytest.mark.parametrize("caption, cleaned", [
    ("A Cat", "a cat"), ("see http://a.com: (cat)", "see: cat"), ("a very-good-and-kind-dog", "a very good and kind dog"),
    ("[:;cat", "cat")])  # a sign a time; stripped in between, which diffusers leaves out
def test_captions_by_hand(caption, cleaned):
    assert clean_caption(caption) == f"{cleaned} aesthetic score: 6.5."
    assert clean_caption(f"{caption} aesthetic score: 5.0.") == f"{cleaned} aesthetic score: 5.0."
    assert text_of_html("1 < 2 <i>it</i>alic<br/> <!-- no --> &lt;tag&gt; &#65; a & b") == "1 < 2 italic  <tag> A a & b"


def test_captions_are_read_by_t5_up_to_their_end(base):
    captions = ["a cat", "word " * 60]
    text, tower = base.encode_text(captions), base.text_encoder
    tokens = tower.tokenizer([clean_caption(c) for c in captions], padding="max_length", max_length=64, truncation=True,
                             return_tensors="pt")
    close(text["text"], tower.encoder(**tokens).last_hidden_state)
    assert text["mask"].equal(tokens.attention_mask.bool())
    assert text["mask"].sum(1).tolist() == [len("a cat aesthetic score: 6.5.") + 1, 64]  # bytes, and their end
    assert base.is_cut(captions[1]) and not base.is_cut(captions[0])


def test_a_run_takes_the_levels_of_its_own_size(animals, monkeypatch):
    asked = []
    monkeypatch.setattr(opensora.OpenSora, "levels", lambda self, *args: asked.append(args) or opensora.levels(*args))
    assert run_base("opensora", *ON_CLIPS, "--steps", 1, "--out", "sized", "--eval-every", 1, "--prompts", "a=prompts.txt") == 0
    assert len(asked) > 2 and set(asked) == {(4, (17, 32, 32))}  # training's and evaluations'


def test_adapters_are_pefts(base, tmp_path):
    from peft import PeftModel
    ours = adapted(random_base("opensora", .1))
    lora.save(ours.network, tmp_path / "lora.safetensors")
    adapters.export(tmp_path / "lora.safetensors", "peft", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(random_base("opensora", .1).network, tmp_path / "peft")  # names of the published class
    text, z = base.encode_text(["a cat"]), noise_like(base)
    told = z, torch.tensor([500.]), text["text"], text["mask"], 24, HEIGHT, WIDTH
    with torch.no_grad():
        close(theirs(*told), expected := ours.network(*told), 1e-4)
        assert (expected - base.network(*told)).abs().max() > .01
    again = random_base("opensora", .1)
    lora.load(again.network, tmp_path / "peft")
    close(again.network(*told).detach(), expected, 0)


NETWORK = dict(model_type="STDiT3", hidden_size=32, depth=2, num_heads=2, caption_channels=32, model_max_length=64,
               input_sq_size=512, patch_size=[1, 2, 2], qk_norm=True)
AUTOENCODER = dict(vae_2d=names.vae_to_diffusers(VAEConfig((4, 8, 8, 8), 1, norm_groups=2)), micro_frame_size=17,
                   vae_temporal=dict(filters=4, num_res_blocks=1, num_groups=2, latent_embed_dim=4))


@pytest.fixture
def folder(base, tmp_path):
    for part, module, config in (("net", base.network, NETWORK), ("vae", base.vae, AUTOENCODER)):
        write_file(tmp_path / "sora" / part / "model.safetensors", module.state_dict())
        write_file(tmp_path / "sora" / part / "config.json", config)
    return tmp_path / "sora"


def assert_same_base(loaded, base):
    z, text = noise_like(base, frames=17), base.encode_text(["a cat"])
    for ours, theirs in zip(loaded.predict(z, (500., .5, .5), text), base.predict(z, (500., .5, .5), text)):
        close(ours, theirs, 0)
    close(loaded.decode_frames(z), base.decode_frames(z), 0)
    assert not any(p.requires_grad for part in (loaded.network, loaded.vae) for p in part.parameters())


def test_one_folder_is_read_with_and_without_text_tower(base, folder):
    loaded = load_base(str(folder))
    assert_same_base(loaded, base)
    assert not loaded.is_cut("a cat")
    for ask, more in ((loaded.encode_text, [["a cat"]]), (loaded.unconditional, [])):  # the second before clips are encoded
        refused("has no text encoder: it needs text_encoder/ and tokenizer/, or --text-encoder", ask, *more)
    assert_same_base(load_base(str(folder / "net")), base)  # its parts lie beside it

    base.text_encoder.encoder.save_pretrained(folder / "text_encoder")
    refused("text_encoder: no tokenizer in it, nor in tokenizer/ beside it", load_base, str(folder))
    base.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
    theirs = load_base(str(folder)).encode_text(["a cat"])
    close(theirs["text"], base.encode_text(["a cat"])["text"])
    assert theirs["mask"].equal(base.encode_text(["a cat"])["mask"])


def test_parts_that_are_missing_or_do_not_fit_are_named(folder, tmp_path):
    def refuse(message, **given):
        refused(message, load_base, str(folder), **given)
    refused("org/vae: no such file or folder", load_base, "random-opensora", vae="org/vae")  # a hub id is no part of other bases
    config = T5EncoderModel.config_class(vocab_size=8, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5/spiece.model").touch()
    refuse("t5: its features are 16 wide, the network reads 32", text_encoder=str(tmp_path / "t5"))
    weights_file, tensors = tmp_path / "t5/model.safetensors", T5EncoderModel(config).state_dict()
    del tensors["encoder.embed_tokens.weight"], tensors["encoder.final_layer_norm.weight"]  # the first is also shared.weight
    save_file(tensors, weights_file, {"format": "pt"})
    refuse("t5: 1 tensors missing .encoder.final_layer_norm.weight.", text_encoder=str(tmp_path / "t5"))
    for file, change, what in (("net", {"qk_norm": False}, "net: .*expected qk_norm True, found False"),
                               ("vae", {"micro_frame_size": 16}, "vae: .*expected micro_frame_size 17, found 16")):
        path = folder / file / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        refuse(what)
        path.write_text(before)
    (folder / "vae").rename(tmp_path / "elsewhere")
    refuse("no vae found in .*; expected net/ and vae/, or --vae, like hpcai-tech/OpenSora-VAE-v1.2")
    assert load_base(str(folder), vae=str(tmp_path / "elsewhere")).vae.spatial_scale == .18215


def test_hub_ids_name_the_three_parts(base, folder, monkeypatch):
    base.text_encoder.encoder.save_pretrained(folder / "t5")
    base.text_encoder.tokenizer.save_pretrained(folder / "t5")
    hub = {"hpcai-tech/OpenSora-STDiT-v3": "net", "hpcai-tech/OpenSora-VAE-v1.2": "vae", "DeepFloyd/t5-v1_1-xxl": "t5",
           "org/vae": "vae"}
    asked = []
    monkeypatch.setattr(weights, "from_hub", lambda repo: asked.append(repo) or folder / hub[repo])
    loaded = load_base("hpcai-tech/OpenSora-STDiT-v3")
    assert_same_base(loaded, base)
    close(loaded.encode_text(["a cat"])["text"], base.encode_text(["a cat"])["text"])
    assert asked == list(hub)[:3]
    load_base("hpcai-tech/OpenSora-STDiT-v3", vae="org/vae")
    assert asked[3:] == [list(hub)[0], "org/vae", list(hub)[2]]
    files = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
             "pytorch_model.bin.index.json", "spiece.model", "tokenizer_config.json", "README.md", "other/config.json"]
    assert sorted(weights.hub_files(files)["part"]) == sorted(files[:6])
    assert not weights.hub_files(["config.json", "spiece.model"])["part"]  # a download that was cut
