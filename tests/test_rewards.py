"""rewards/ against the live classes of transformers on small random weights: scores, gradients, preprocessing, refusals."""
import json
import os
import re
import types
import zlib
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F_
import transformers
from einops import rearrange
from safetensors.torch import load_file
from test_ranks import two_ranks
from tokenizers import Tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize
from transformers.models.qwen2_vl import modeling_qwen2_vl

import train
from benchmark import measure_peak
from evaluate import measure
from formats import videoreward as published
from formats.known_rewards import requested_rewards
from formats.reward_model import CLIP_MEAN, CLIP_STD, SMALL_CLIP, RewardModel, crop_centre, frames_of, spread_frames
from formats.tensor_names import replace_all
from formats.tensors import build_empty, check_tensors
from formats.weights import TINY
from reward import HPSv2, Rewards, aggregate, load_reward, load_rewards, tar_weights
from rewards import imagereward, pickscore, viclip, videomae, videoreward, vjepa, yolos
from rewards.shared import IMAGENET_MEAN, IMAGENET_STD, SIZES, fit_within
from support import ranks as processes
from tests.conftest import docs_example, metrics, refused as refused_by_pattern, run, same_tensors

YOLOS_SIZE = {"shortest_edge": 512, "longest_edge": 864}  # yolos-tiny's preprocessor_config.json
CAPTIONS = ["A red Panda's book &amp; playing piano, 4k", "a  cat moving left"]
KINDS = ["pickscore", "aesthetic", "imagereward", "yolos:book", "videomae:playing piano", "videomae", "vjepa", "videoreward",
         "videoreward:VQ", "videoreward:MQ", "videoreward:TA", "viclip", "viclip:imagenet"]


def random_frames(B=2, S=3, H=40, W=56, seed=0):
    return torch.rand(B, S, 3, H, W, generator=torch.Generator().manual_seed(seed))


def frames_for(kind):
    return random_frames(S={"videomae": 16, "vjepa": 16, "videoreward": 4, "viclip": 8}.get(kind.partition(":")[0], 3))


def refused(message, call, *args, **settings):
    refused_by_pattern(re.escape(message), call, *args, **settings)


def seeded(make, noise=0.):
    """make() with seeded weights; noise is added to all of them, since biases and positions begin at zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        module = make().eval()
        for p in module.parameters():
            p.add_(noise * torch.randn(p.shape))
    return module


def published_head(width):
    """The five layers of the aesthetic predictor and of ImageReward, as their authors have them."""
    return seeded(lambda: nn.Sequential(nn.Linear(width, 1024), nn.Dropout(.2), nn.Linear(1024, 128), nn.Dropout(.2),
                                        nn.Linear(128, 64), nn.Dropout(.1), nn.Linear(64, 16), nn.Linear(16, 1)))


def prepared(frames, size, mean, std, mode, shortest=None):
    """What a live model is given, by torchvision: (B*S, 3, size, size)."""
    x = Resize(shortest or size, mode, antialias=True)(frames.flatten(0, 1))
    return Normalize(mean, std)(CenterCrop(size)(x.clamp(0, 1)))


# ----------------------------- Live classes: published folders with small random weights ------------------------------

# Each function returns the weights' path and score(frames) -> scores.

def live_pickscore(folder):
    tower = pickscore.TOWER | {"initializer_range": .2}
    vision = tower | dict(image_size=32, patch_size=8)
    config = transformers.CLIPConfig(projection_dim=24, text_config=tower, vision_config=vision)
    model = seeded(lambda: transformers.CLIPModel(config))
    model.save_pretrained(folder)

    def score(frames):
        x = prepared(frames, 32, CLIP_MEAN, CLIP_STD, InterpolationMode.BICUBIC)
        table = model(pixel_values=x, input_ids=open_clip.tokenize(CAPTIONS)).logits_per_image.view(2, 3, 2)   # (B, S, captions)
        return torch.stack([table[0, :, 0], table[1, :, 1]])
    return folder, score


def live_aesthetic(folder):
    path, _ = live_pickscore(folder)
    model = transformers.CLIPModel.from_pretrained(path)
    head = published_head(24)
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, path / "sac+logos+ava1-l14-linearMSE.pth")

    def score(frames):
        x = prepared(frames, 32, CLIP_MEAN, CLIP_STD, InterpolationMode.BICUBIC)
        features = model.get_image_features(pixel_values=x)
        features = features if isinstance(features, torch.Tensor) else features.pooler_output  # transformers 4, 5
        return head(F_.normalize(features, dim=-1)).view(2, 3)
    return path, score


def authors_name(name):
    """What ImageReward.pt calls a tensor of transformers' vision model."""
    for new, old in (("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
                     ("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks"), ("post_layernorm", "norm"),
                     ("self_attn.projection", "attn.proj"), ("self_attn", "attn"), ("layer_norm", "norm")):
        name = name.replace(new, old)
    return name


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "a", "play", "##ing", "'", "s", ",", "4", "##k", "left"]
VISION = imagereward.VISION | imagereward.SMALL | dict(image_size=32, patch_size=8)
TEXT = imagereward.TEXT | imagereward.SMALL | dict(encoder_hidden_size=32, vocab_size=len(WORDS), bos_token_id=2, sep_token_id=3)


def live_imagereward(folder):
    from transformers.models.blip.modeling_blip_text import BlipTextModel
    vision = seeded(lambda: transformers.BlipVisionModel(transformers.BlipVisionConfig(**VISION)))
    text = seeded(lambda: BlipTextModel(transformers.BlipTextConfig(**TEXT), add_pooling_layer=False))
    head = published_head(32)
    published = {f"blip.visual_encoder.{authors_name(k)}": v for k, v in vision.state_dict().items()}
    published |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    published |= {f"mlp.layers.{k}": v for k, v in head.state_dict().items()}
    published |= {"blip.vision_proj.weight": torch.zeros(4, 4)}
    published |= {"blip.text_encoder.embeddings.position_ids": torch.arange(9)[None]}
    folder.mkdir()
    torch.save(published, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")

    def score(frames):
        tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
        x = prepared(frames, 32, CLIP_MEAN, CLIP_STD, InterpolationMode.BICUBIC).unflatten(0, (2, 3))
        rows = []
        for pictures, caption in zip(x, CAPTIONS):  # as the published score(): one prompt at a time
            words = tokenizer(caption, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
            for picture in pictures:
                seen = vision(pixel_values=picture[None]).last_hidden_state
                out = text(input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen,
                           encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long), is_decoder=False)
                rows.append((head(out.last_hidden_state[:, 0]) - 0.16717362830052426) / 1.0333394966054072)
        return torch.stack(rows).view(2, 3)
    return folder / "ImageReward.pt", score


def live_yolos(folder):
    config = transformers.YolosConfig(**yolos.SMALL | dict(use_mid_position_embeddings=True))
    model = seeded(lambda: transformers.YolosForObjectDetection(config), .1)
    model.save_pretrained(folder)

    def score(frames):
        processor = transformers.YolosImageProcessor(size=YOLOS_SIZE, do_rescale=False, do_pad=False)
        x = frames.flatten(0, 1)
        h, w = processor(list(x.detach()), return_tensors="pt")["pixel_values"].shape[-2:]  # it has no gradient
        x = Normalize(IMAGENET_MEAN, IMAGENET_STD)(Resize((h, w), antialias=True)(x))
        return 1 - model(pixel_values=x).logits.softmax(-1)[..., 0].max(dim=1).values.view(2, 3)
    return folder, score


def live_videomae(folder):
    config = transformers.VideoMAEConfig(**videomae.SMALL | dict(initializer_range=.2))
    model = seeded(lambda: transformers.VideoMAEForVideoClassification(config), .1)
    model.save_pretrained(folder)

    def score(frames):
        x = prepared(frames, 32, IMAGENET_MEAN, IMAGENET_STD, InterpolationMode.BILINEAR).unflatten(0, (2, 16))
        return model(pixel_values=x).logits.softmax(-1)                                          # (B, C)
    return folder, score


def live_vjepa(folder, monkeypatch):
    config = transformers.VJEPA2Config(**vjepa.SMALL | dict(pred_hidden_size=24))
    model = seeded(lambda: transformers.VJEPA2Model(config), .1)
    model.save_pretrained(folder)
    attention = F_.scaled_dot_product_attention

    def score(frames):
        """The live class shows its encoder everything; with the hidden patches out of every head's reach, it shows the rest."""
        x = prepared(frames, 64, IMAGENET_MEAN, IMAGENET_STD, InterpolationMode.BILINEAR, shortest=73).unflatten(0, (2, 16))
        rows = []
        for clip, caption in zip(x.split(1), CAPTIONS):
            hidden = vjepa.hidden_patches(4, 8, zlib.crc32(caption.encode()))
            with torch.no_grad():
                target = F_.layer_norm(model.get_vision_features(clip), (48,))[:, hidden]

            def masked(q, k, v, hidden=hidden, **options):
                if q.shape[-1] == 24:  # the encoder's heads; the predictor's are narrower
                    options["attn_mask"] = ~hidden[None, None, None]
                return attention(q, k, v, **options)
            with monkeypatch.context() as patch:
                patch.setattr(F_, "scaled_dot_product_attention", masked)
                out = model(clip, context_mask=[(~hidden).nonzero().T], target_mask=[hidden.nonzero().T])
            rows.append(-(out.predictor_output.last_hidden_state - target).abs().mean())
        return torch.stack(rows)[:, None]
    return folder, score


OLD = ("model.language_model.", "model."), ("model.visual.", "visual.")  # names of transformers 4.45
CHAT = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
QWEN = videoreward.SMALL_TEXT | dict(vocab_size=256 + len(CHAT) + 3), videoreward.SMALL_VISION
TEMPLATE = "\nRate  it: <|VQ_reward|>\r\nEND\n<|MQ_reward|>\n\nIt shows {text_prompt}.\n<|TA_reward|>\nEND\n"
SCALES = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


def publish(tensors, names):
    """Tensors as the authors' file has them: peft's names, and of each projection a LoRA, which the weight here includes."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, t in tensors.items():
        stem, _, ending = f"base_model.model.{replace_all(name, names)}".rpartition(".")
        adapted = re.search(r"language_model.*_proj\.", name)
        if adapted and ending == "weight":
            down, up = (.1 * torch.randn(shape, generator=generator) for shape in ((64, t.shape[1]), (t.shape[0], 64)))
            found |= {f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": up}
            t = t - 128 / 64 * up @ down
        found[f"{stem}.base_layer.{ending}" if adapted else f"{stem}.{ending}"] = t
    return found


def live_videoreward(folder, names=OLD):
    """The authors' call, with prompts of a batch padded; score(frames) -> (B, 3)."""
    config = transformers.Qwen2VLConfig(text_config=QWEN[0], vision_config=QWEN[1], video_token_id=260)
    model = seeded(lambda: transformers.Qwen2VLForConditionalGeneration(config), .05)
    head = seeded(lambda: nn.Linear(32, 1, bias=False))
    tokenizer = Tokenizer.from_str(json.dumps(json.loads(published.byte_tokenizer().to_str()) | {"added_tokens": []}))
    tokenizer.add_special_tokens(CHAT)
    (folder / "checkpoint-11352/tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "checkpoint-11352/tokenizer/tokenizer.json"))
    torch.save(publish(model.state_dict() | {"rm_head.weight": head.weight.data}, names), folder / "checkpoint-11352/model.pth")
    (folder / "prompt_template.txt").write_bytes(TEMPLATE.encode())
    norm = {f"{k}_{what}": v for k, pair in SCALES.items() for what, v in zip(("mean", "std"), pair)}
    (folder / "model_config.json").write_text(json.dumps({"inference_config": norm}))
    tokenizer.add_special_tokens(list(published.SCORES.values()))

    def score(frames):
        x = Resize((56, 84), InterpolationMode.BICUBIC, antialias=True)(frames.flatten(0, 1)).clamp(0, 1).unflatten(0, (2, 4))
        batch = transformers.Qwen2VLVideoProcessor(do_resize=False, do_rescale=False)(videos=list(x), return_tensors="pt")
        before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        chat = [f"{before}{'<|video_pad|>' * 12}<|vision_end|>{TEMPLATE.format(text_prompt=c)}<|im_end|>\n<|im_start|>assistant\n"
                for c in CAPTIONS]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(tokenizer.encode(t).ids) for t in chat], batch_first=True, padding_value=-1)
        mask, ids = (ids >= 0).long(), ids.clamp(min=0)
        is_video = ids == config.video_token_id
        embeds = model.model.language_model.embed_tokens(ids)
        seen = model.model.visual(batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"]).pooler_output
        embeds = embeds.masked_scatter(is_video[..., None].expand_as(embeds), seen)
        y = model.model(input_ids=None, position_ids=None, attention_mask=mask, inputs_embeds=embeds).last_hidden_state
        other = model.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=2 * is_video.int(), **batch)
        assert (other.last_hidden_state - y)[mask > 0].abs().mean() > 1e-3  # transformers' own call has other positions
        special = torch.stack([ids == tokenizer.token_to_id(t) for t in published.SCORES.values()]).any(0)
        mean, deviation = torch.tensor(list(SCALES.values())).T
        return (head(y)[special].view(2, 3) - mean) / deviation
    return folder, score


def live_viclip(folder):
    """What the authors compute, in their order, on a file as VBench downloads it; score(frames) -> (B, 2), of both statistics."""
    w = seeded(lambda: viclip.Towers(viclip.SMALL, viclip.SMALL_TEXT), .1).state_dict()
    parts = ("attn.in_proj_", "attn.out_proj.", "ln_1.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.")
    layers = [f"transformer.resblocks.{i}.{part}{kind}" for i in range(2) for part in parts for kind in ("weight", "bias")]
    video = ["class_embedding", "conv1.weight", "ln_post.bias", "ln_post.weight", "ln_pre.bias", "ln_pre.weight",
             "positional_embedding", "proj", "temporal_positional_embedding", *layers]
    text = ["ln_final.bias", "ln_final.weight", "positional_embedding", "text_projection", "token_embedding.weight", *layers]
    assert w.keys() == {*(f"vision_encoder.{name}" for name in video), *(f"text_encoder.{name}" for name in text)}
    folder.mkdir()
    torch.save({"model": w | {"temp": torch.ones(())}}, folder / "ViClip-InternVid-10M-FLT.pth")
    v, t = ({name: w[f"{tower}_encoder.{name}"] for name in names} for tower, names in (("vision", video), ("text", text)))

    def run(tensors, x, **mask):
        quick_gelu = lambda x: x * torch.sigmoid(1.702 * x)
        layer = nn.TransformerEncoderLayer(32, 2, 128, 0., quick_gelu, batch_first=True, norm_first=True)
        stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        renamed = [("transformer.resblocks", "layers"), ("attn", "self_attn"), ("mlp.c_fc", "linear1"), ("mlp.c_proj", "linear2"),
                   ("ln_", "norm")]
        stack.load_state_dict({replace_all(name, renamed): tensors[name] for name in layers})
        return stack(x, **mask)

    def norm(tensors, name, x):
        return F_.layer_norm(x, (32,), tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def cosine(frames, mean, std):
        x = Resize(32, InterpolationMode.BICUBIC, antialias=False)(frames.flatten(0, 1)).clamp(0, 1)
        x = Normalize(mean, std)(CenterCrop(32)(x)).unflatten(0, (2, 8)).transpose(1, 2)
        x = rearrange(F_.conv3d(x, v["conv1.weight"], stride=(1, 8, 8)), "b c t h w -> (b t) (h w) c")
        x = torch.cat([v["class_embedding"].expand(16, 1, -1), x], 1) + v["positional_embedding"]
        first = x[::8, :1]  # of each clip's first frame
        x = rearrange(x[:, 1:], "(b t) n m -> (b n) t m", t=8) + v["temporal_positional_embedding"]
        x = torch.cat([first, rearrange(x, "(b n) t m -> b (n t) m", b=2)], 1)
        x = norm(v, "ln_post", run(v, norm(v, "ln_pre", x)))[:, 0] @ v["proj"]
        ids = open_clip.tokenize(CAPTIONS, 32)
        y = t["token_embedding.weight"][ids] + t["positional_embedding"]
        y = run(t, y, mask=torch.full((32, 32), -torch.inf).triu(1))[torch.arange(2), ids.argmax(-1)]
        return F_.cosine_similarity(x, norm(t, "ln_final", y) @ t["text_projection"])
    pairs = (CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD)
    return folder / "ViClip-InternVid-10M-FLT.pth", lambda frames: torch.stack([cosine(frames, *pair) for pair in pairs], dim=1)


LIVE = {"pickscore": live_pickscore, "aesthetic": live_aesthetic, "imagereward": live_imagereward, "yolos": live_yolos,
        "videomae": live_videomae, "vjepa": live_vjepa, "videoreward": live_videoreward, "viclip": live_viclip}


@pytest.fixture
def small_sizes(monkeypatch):
    for module, sizes in ((imagereward, (VISION, TEXT)), (videoreward, QWEN), (viclip, (viclip.SMALL, viclip.SMALL_TEXT))):
        monkeypatch.setattr(module, "load", lambda *args, load=module.load, sizes=sizes: load(*args, *sizes))
    init = videoreward.VideoReward.__init__
    monkeypatch.setattr(videoreward.VideoReward, "__init__", lambda *args: init(*args[:6], videoreward.SMALL_PIXELS))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_pixel_gradients_are_the_live_classes(kind, tmp_path, monkeypatch, small_sizes):
    name = kind.partition(":")[0]
    path, live_score = LIVE[name](tmp_path / "hub", *([monkeypatch] if name == "vjepa" else []))
    ours = load_reward(kind, path)
    frames = (0.1 + 0.8 * frames_for(kind)).requires_grad_()
    theirs = live_score(frames)
    if name == "videomae":  # named once for all, or by each caption: the classes are "playing piano", "moving left", ...
        theirs = theirs[:, [0]] if ":" in kind else torch.stack([theirs[0, [0]], theirs[1, [1]]])
    if name in ("videoreward", "viclip"):
        index = {"VQ": 0, "MQ": 1, "TA": 2, "imagenet": 1}.get(kind.partition(":")[2], 0)
        theirs = theirs.sum(1, keepdim=True) if kind == "videoreward" else theirs[:, [index]]
    expected, = torch.autograd.grad(theirs.sum(), frames)

    scores = ours(frames, CAPTIONS)
    found, = torch.autograd.grad(scores.sum(), frames)
    assert scores.shape == (2, 1 if ours.num_frames else 3) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, theirs, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 1e-5  # or the gradients would agree whatever they are
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_hidden_patches_are_not_seen():
    """Or the encoder would pass on what the predictor has to find out, and the target would move towards the prediction."""
    hidden = vjepa.hidden_patches(4, 8, zlib.crc32(b"a"))
    assert 0 < hidden.float().mean() < 1 and (hidden.view(8, 16) == hidden.view(8, 16)[0]).all()  # at all times alike
    assert not torch.equal(hidden, vjepa.hidden_patches(4, 8, 1))
    assert torch.equal(hidden, vjepa.hidden_patches(4, 8, zlib.crc32(b"a")))
    x = random_frames(1, 16, 64, 64).requires_grad_()
    load_reward("vjepa", "random").distance(x, "a").backward()
    moved = x.grad.abs().amax((0, 1, 2)).view(4, 16, 4, 16).amax((1, 3)).flatten()                # of each patch of the picture
    assert (moved[hidden[:16]] == 0).all() and (moved[~hidden[:16]] > 0).all()


# ------------------------------------------------------- Frames -------------------------------------------------------

@pytest.mark.parametrize(("H", "W"), [(64, 64), (40, 57), (57, 40), (32, 32), (20, 33), (133, 96)])
def test_crops_are_torchvisions(H, W):
    x = random_frames(1, 2, H, W)[0].double()
    for mode, name in ((InterpolationMode.BICUBIC, "bicubic"), (InterpolationMode.BILINEAR, "bilinear")):
        for shortest in (32, 36):
            theirs = CenterCrop(32)(Resize(shortest, mode, antialias=True)(x)).clamp(0, 1)
            torch.testing.assert_close(crop_centre(x, 32, shortest, name), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("H", "W"), [(512, 512), (320, 512), (512, 320), (256, 256), (100, 400), (400, 100), (333, 517)])
def test_detectors_frames_are_as_large_as_its_own_processors(H, W):
    processor = transformers.YolosImageProcessor(size=YOLOS_SIZE, do_rescale=False, do_pad=False)
    x = random_frames(1, 1, H, W)[0]
    theirs = processor(list(x), return_tensors="pt")["pixel_values"]
    ours = fit_within(x, 512, 864, 16)
    assert ours.shape == theirs.shape
    rounding = 1e-4 if transformers.__version__ >= "5" else .05  # version 4 resizes 8-bit pictures
    torch.testing.assert_close(Normalize(IMAGENET_MEAN, IMAGENET_STD)(ours), theirs, rtol=0, atol=rounding)


@pytest.mark.parametrize("F", [8, 15, 16, 17, 49, 81])
def test_each_sees_the_frames_that_its_authors_choose(F):
    assert frames_of(load_reward("videoreward", "random"), F) == tuple(torch.linspace(0, F - 1, 4).round().int().tolist())
    edges = np.linspace(0, F, 9).astype(int)  # VBench's "middle"
    assert frames_of(load_reward("viclip", "random"), F) == tuple((a + b - 1) // 2 for a, b in zip(edges, edges[1:]))
    assert spread_frames(16, 16).tolist() == list(range(16)) and spread_frames(9, 3).tolist() == [0, 3, 6]
    video = random_frames(1, F)  # and these are what is scored
    found = measure(Rewards([(1., Change("ends", 2, rule="ends"))]), video[:, :1], video, CAPTIONS[:1])["reward"]
    assert found == pytest.approx((video[0, -1] - video[0, 0]).square().mean().item())


def test_hpsv2_says_how_it_takes_its_pictures():
    clip, frames = seeded(lambda: open_clip.CLIP(**SMALL_CLIP)), random_frames()
    names = [HPSv2(clip, preprocess=p).name for p in ("hpsv2", "pad", "crop", "stretch", "instructvideo")]
    assert names == ["HPSv2.0", "HPSv2.0", "HPSv2.0/crop", "HPSv2.0/stretch", "HPSv2.0/stretch"]
    x = prepared(frames, 32, CLIP_MEAN, CLIP_STD, InterpolationMode.BICUBIC)
    image = clip.encode_image(x, normalize=True).unflatten(0, (2, 3))
    text = clip.encode_text(open_clip.tokenize(CAPTIONS), normalize=True)
    torch.testing.assert_close(HPSv2(clip, preprocess="crop")(frames, CAPTIONS), (image * text[:, None]).sum(-1))
    assert [load_reward(kind, "random:32").name for kind in ("hpsv2", "hpsv2/pad", "hpsv2.1/crop")] == [
        "HPSrandom", "HPSrandom", "HPSrandom/crop"]


# ---------------------------------------------- What all have in common -----------------------------------------------

@pytest.mark.parametrize("kind", ["hpsv2", *KINDS])
def test_random_rewards_are_seeded_frozen_and_named(kind, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every device was seeded"))
    state = torch.random.get_rng_state()
    reward, same = load_reward(kind, "random:32"), load_reward(kind, "random:32" if kind == "hpsv2" else "random")
    assert torch.equal(torch.random.get_rng_state(), state) and "random" in reward.name
    outer = nn.ModuleList([reward]).train()
    assert not any(m.training for m in outer[0].modules()) and not any(p.requires_grad for p in reward.parameters())
    frames = frames_for(kind).requires_grad_()
    scores = reward(frames, CAPTIONS)
    torch.testing.assert_close(same(frames, CAPTIONS), scores, rtol=0, atol=0)
    torch.testing.assert_close(reward(frames[1:], CAPTIONS[1:]), scores[1:], rtol=1e-4, atol=1e-5)  # each video by itself
    turned = reward(frames.flip(1), CAPTIONS)
    if reward.num_frames:  # order counts for video rewards alone
        assert (turned - scores).abs().min() > 1e-5
    else:
        torch.testing.assert_close(turned, scores.flip(1), rtol=1e-4, atol=1e-5)
    scores.sum().backward()
    assert frames.grad.isfinite().all() and frames.grad.abs().max() > 1e-5
    assert not any(p.grad is not None for p in reward.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(frames, CAPTIONS).dtype == torch.float32
    rough = load_reward(kind, "random:32", dtype=torch.bfloat16)(frames.bfloat16(), CAPTIONS)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, scores, rtol=.1, atol=.1)


# -------------------------------------------- What is refused, in one line --------------------------------------------

@pytest.mark.parametrize(("reward", "message"), [
    ("hps", "reward 'hps': must be one of hpsv2, hpsv2.1, pickscore"), ("hpsv2/fit", "reward 'hpsv2/fit': must be one of"),
    ("pickscore:book", "videomae:[ACTION], vjepa, videoreward:[VQ|MQ|TA], viclip:[vbench|imagenet], proxy, action:left"),
    ("removal:book", "removal:watermark, or my_file.py:function; hpsv2 and hpsv2.1 may end in /crop or /stretch"),
    ("yolos:boook", "no class 'boook'; must be one of its 3, such as book"),
    ("videomae:playing the piano", "no class 'playing the piano'; must be one of its 5, such as playing piano")])
def test_names_and_classes(reward, message):
    refused(message, load_reward, reward, "random")


def test_a_caption_that_names_no_action():
    reward = load_reward("videomae", "random")
    refused("the caption 'a cat' names none of its actions; name one yourself, as in videomae:", reward.class_of, "a cat")
    assert [reward.class_of(c) for c in ("Moving LEFT, then", "a cat playing piano moving up")] == [1, 0]


def test_malformed_weights(tmp_path, small_sizes):
    """formats/tensors.py reads all files (tests/test_files.py); here is what only rewards have."""
    path, _ = live_imagereward(tmp_path / "blip")
    (path.parent / "vocab.txt").write_text("a\nb\n")
    refused("vocab.txt: not BERT's words", load_reward, "imagereward", path)
    path, _ = live_pickscore(tmp_path / "clip")
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["hidden_size"] = "wide"
    (path / "config.json").write_text(json.dumps(config))
    refused("config.json", load_reward, "pickscore", path)


def test_hub_folders_and_what_lies_beside(tmp_path, monkeypatch, capsys, small_sizes):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / repo.partition("/")[2] / name))
    live_videomae(tmp_path / "videomae-base-finetuned-kinetics")
    assert load_reward("videomae:moving up").name == "VideoMAE-32:moving up" and SIZES[768] == "base"
    assert capsys.readouterr().err.splitlines()[-1] == "VideoMAE-32: its weights are CC-BY-NC-4.0, for no commercial use"
    path, _ = live_aesthetic(tmp_path / "clip-vit-large-patch14")
    os.renames(path / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "ddpo-aesthetic-predictor/aesthetic-model.pth")
    assert load_reward("aesthetic").name == "aesthetic-v2"
    path, _ = live_imagereward(tmp_path / "ImageReward")
    os.renames(path.parent / "vocab.txt", tmp_path / "bert-base-uncased/vocab.txt")
    assert load_reward("imagereward").name == "ImageReward-v1.0"


@pytest.mark.parametrize("names", [OLD, ()])
def test_every_published_tensor_of_full_size_has_its_place(names):
    """As many as the authors' file is said to have; only names are compared, of stand-ins."""
    full = build_empty(lambda: videoreward.Network(videoreward.TEXT, videoreward.VISION), "meta")
    ours = {name: torch.zeros(1, 1) for name in full.state_dict()}
    tensors = publish(ours | {"lm_head.weight": torch.zeros(1, 1)}, names)
    assert len(tensors) == 1123
    check_tensors(ours, published.merge_lora(tensors), "merged")
    half = {name: t for name, t in tensors.items() if "layers.7.mlp.up_proj.lora_B" not in name}
    refused("not known (model.language_model.layers.7.mlp.up_proj.lora_A", check_tensors, ours, published.merge_lora(half), "")


def test_nothing_is_downloaded_before_the_authors_text_is_there(tmp_path, monkeypatch, small_sizes):
    hub, other, asked = tmp_path / "hub", tmp_path / "other", []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(hub / name))
    live_videoreward(hub)
    (hub / "prompt_template.txt").unlink()
    refused(f"reward videoreward: {hub}/prompt_template.txt: no such file; it is the text", load_reward, "videoreward")
    assert asked == [("KlingTeam/VideoReward", "model_config.json")]
    other.mkdir()  # a folder with the text alone: what is missing is fetched
    for text, message in ((TEMPLATE.replace("{text_prompt}", ""), "must have <|VQ_reward|>, <|MQ_reward|>, {text_prompt}, <|TA_"),
                          (TEMPLATE + "<|VQ_reward|>", "in this order and each once")):
        (other / "prompt_template.txt").write_text(text)
        refused(message, load_reward, "videoreward", other)
    (other / "prompt_template.txt").write_bytes(TEMPLATE.encode())
    load_reward("videoreward", other)
    checkpoint = [f"checkpoint-11352/{name}" for name in ("tokenizer/tokenizer.json", "model.pth")]
    assert [name for _, name in asked] == ["model_config.json", "model_config.json", *checkpoint]
    (other / "model_config.json").write_text("{}")
    refused("config.json: not the config of a model we have (KeyError: 'inference_config')", load_reward, "videoreward", other)
    (hub / checkpoint[0]).write_text("{}")
    refused("tokenizer.json: not a tokenizer (", published.read_tokenizer, hub, 264)


@pytest.mark.parametrize(("kind", "frames"), [("videoreward", 3), ("viclip", 7)])
def test_clips_that_are_too_short(kind, frames):
    reward, message = load_reward(kind, "random"), f"frames = {frames}: {{}} sees {frames + 1} frames of a clip, in order"
    refused(message.format("this reward"), frames_of, reward, frames)
    refused(message.format(reward.name), reward, random_frames(1, frames), ["a"])
    for path in ("random", "."):  # a folder, which has no config.json to say another number
        refused(message.format(kind), requested_rewards, mixed(reward=(kind,), frames=frames, reward_weights=(path,)))


# ------------------------------------ Several rewards, and those of the user's own ------------------------------------

class Brightness(RewardModel):
    """An image reward of a known score."""
    def forward(self, frames, captions):
        x = self.pixels(frames, captions)
        return x.mean((1, 2, 3)).view(frames.shape[:2])


class Change(RewardModel):
    """A video reward of a known score."""
    def forward(self, frames, captions):
        x = self.pixels(frames, captions).unflatten(0, frames.shape[:2])
        return (x[:, 1:] - x[:, :-1]).square().mean((1, 2, 3, 4))[:, None]


@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_several_rewards_are_their_weighted_sum_over_frames_that_are_decoded_once(chunk):
    clip, decoded = random_frames(2, 9, 8, 8).requires_grad_(), []

    def decode_frames(z_0, index):
        decoded.extend(index[0].tolist())
        return clip.gather(1, index[:, :, None, None, None].expand(-1, -1, 3, 8, 8))

    parts = [(2., Brightness("bright")), (-.5, Change("change", 3)), (1., Brightness("again"))]
    mixture = Rewards(parts, (Brightness("seen"),))
    assert mixture.name == "2 bright + -0.5 change + again"
    g = torch.tensor([[0, 3, 4, 8], [1, 2, 5, 7]])
    f = tar_weights(g, 9)
    base, cfg = types.SimpleNamespace(decode_frames=decode_frames), train.Config(decode_chunk=chunk, frames=9)
    R, logged = train.video_rewards(base, mixture, torch.zeros(2, 4, 9, 1, 1), g, CAPTIONS, cfg)
    assert decoded == [0, 3, 4, 8, 0, 3, 6]  # both image rewards' frames, then the video reward's

    frames = clip[torch.arange(2)[:, None], g]
    bright = frames.mean((2, 3, 4))
    change = (clip[:, [3, 6]] - clip[:, [0, 3]]).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(R, 3 * aggregate(bright, f) - .5 * change)  # TAR's weights are for image rewards alone
    expected, = torch.autograd.grad((3 * aggregate(bright, f) - .5 * change).sum(), clip)
    torch.testing.assert_close(torch.autograd.grad(R.sum(), clip)[0], expected)
    assert list(logged) == ["reward", "bright", "change", "again"] and not any(v.requires_grad for v in logged.values())
    torch.testing.assert_close(logged["reward"], (3 * bright.mean(1) - .5 * change).detach())
    torch.testing.assert_close(logged["change"], change.detach())

    measured = measure(mixture, frames[:1].detach(), clip[:1].detach(), CAPTIONS[:1])
    assert list(measured) == ["reward", "bright", "change", "again", "seen"]
    assert measured["reward"] == pytest.approx(logged["reward"][0].item(), rel=1e-5) and measured["seen"] == measured["bright"]


def mixed(**settings):
    return types.SimpleNamespace(**dict(reward=(), reward_weights=(), watch=(), frames=16) | settings)


def test_what_settings_name(aside):
    for path in map(Path, ("a=b/HPS.pt", "a", "b=c", "d")):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert requested_rewards(mixed()) == ([(1., "hpsv2")], [], {})
    bare = mixed(reward_weights=("a=b/HPS.pt",))  # a bare path may have a = in it
    assert requested_rewards(bare) == ([(1., "hpsv2")], [], {"hpsv2": "a=b/HPS.pt"})
    several = mixed(reward=("hpsv2.1/crop=2", "videomae:playing piano=-.5"), watch=("yolos:book",),
                    reward_weights=("videomae=a", "hpsv2.1=b=c", "yolos:book=d"))
    assert requested_rewards(several) == (
        [(2., "hpsv2.1/crop"), (-.5, "videomae:playing piano")], ["yolos:book"],
        {"videomae:playing piano": "a", "hpsv2.1/crop": "b=c", "yolos:book": "d"})


@pytest.mark.parametrize(("settings", "message"), [
    ({"reward": ("hpsv2=x",)}, "reward 'hpsv2=x': the weight after = must be a finite number other than 0"),
    ({"reward": ("hpsv2=nan",)}, "the weight after ="), ({"reward": ("motion",)}, "reward 'motion': must be one of hpsv2"),
    ({"watch": ("clip",)}, "or a reward 'clip': must be one of"),
    ({"reward": ("hpsv2", "vjepa"), "reward_weights": ("random",)}, "reward_weights 'random': must be NAME=PATH, with one of "),
    ({"reward": ("action:left",), "frames": 8}, "frames = 8: action sees 16 frames of a clip, in order; it must have as many"),
    ({"reward": ("hpsv2", "hpsv2")}, "rewards hpsv2, hpsv2: each must be named once"),
    ({"reward": ("own.py:g",)}, "reward own.py:g: must name a function of the file, as in own.py:NAME"),
    ({"reward": ("broken.py:f",)}, "reward broken.py:f: the file cannot be imported (SyntaxError")])
def test_settings_that_are_refused_before_anything_is_loaded(aside, settings, message):
    Path("own.py").write_text("raise RuntimeError('run too early')\nif True:\n    f = lambda frames, captions: 0\n")
    Path("broken.py").write_text("def f(:")
    refused(message, requested_rewards, mixed(**settings))
    assert requested_rewards(mixed(reward=("own.py:f",)))[0] == [(1., "own.py:f")]


def test_rewards_of_a_run():
    """What is maximised, with weights, and what is watched."""
    refused("tensors missing", load_reward, "pickscore", TINY / "reward")  # a folder of HPSv2's kind
    assert load_reward("proxy", "random:32").name == "HPSrandom"
    assert load_rewards(mixed(reward_weights=("random:32",)), None).name == "HPSrandom"
    alone = load_rewards(mixed(reward=("vjepa",), reward_weights=("random",)), None)
    assert alone.name == "VJEPA2-random" and alone.every[0].num_frames == 16
    twice = load_rewards(mixed(reward=("hpsv2=2",), reward_weights=("random:32",), watch=("motion",)), None)
    assert (twice.name, twice.pixels, len(twice.every)) == ("2 HPSrandom", ("motion",), 1)
    refused("HPSrandom, HPSrandom: must have names that differ",  # logs would mix them up
            load_rewards, mixed(reward=("hpsv2", "hpsv2.1"), reward_weights=("hpsv2=random:32", "hpsv2.1=random:32")), None)


def test_the_documented_example(aside):
    Path("my_reward.py").write_text(docs_example("rewards.md", "def warm"))
    warm, steady = load_reward("my_reward.py:warm"), load_reward("my_reward.py:steady")
    assert (warm.name, warm.num_frames, steady.name, steady.num_frames) == ("my_reward:warm", None, "my_reward:steady", 8)
    frames = random_frames(2, 8).requires_grad_()
    torch.testing.assert_close(warm(frames, CAPTIONS), (frames[:, :, 0] - frames[:, :, 2]).mean((2, 3)))
    assert steady(frames, CAPTIONS).shape == (2, 1)
    (warm(frames, CAPTIONS).sum() + steady(frames, CAPTIONS).sum()).backward()
    assert (frames.grad != 0).any()


def test_own_modules_are_frozen_and_named(aside):
    Path("own.py").write_text("import torch\nnet = torch.nn.Linear(3, 1)\nnet.name = 'net-v1'\n")
    reward = load_reward("own.py:net")
    assert reward.name == "net-v1" and not reward.training and [p.requires_grad for p in reward.parameters()] == [False, False]


@pytest.mark.parametrize(("code", "message"), [
    ("def f(frames, captions):\n    return frames.mean()", "own:f: returned torch.float32 (); must be floating (2, 3)"),
    ("def f(frames, captions):\n    return [1]", "returned list, not a tensor"),
    ("def f(frames, captions):\n    return frames.detach().mean((2, 3, 4))", "its scores have no gradient to the frames"),
    ("import nothing_like_it\nf = 3", "the file cannot be imported (ModuleNotFoundError")])
def test_own_rewards_that_do_not_work(aside, code, message):
    Path("own.py").write_text(code)
    refused(message, lambda: load_reward("own.py:f")(random_frames().requires_grad_(), CAPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expected"), [
    ("viclip", [1.653, 3.718, .796, 1.382]), ("videoreward", [4.723, 9.769, 4.114, 3.617])])
def test_full_size_cost(kind, expected, monkeypatch):
    """TFLOP forward and with backward, GiB of weights and beyond, for a clip of 256 x 256 on meta in bfloat16."""
    for name, result in (("position_ids", torch.empty(1152, 2, device="meta")),  # by numbers, which meta has not
                         ("attention_seqlens", (torch.tensor([0, 576, 1152]), 576))):
        monkeypatch.setattr(modeling_qwen2_vl, f"get_vision_{name}", lambda *args, result=result, **settings: result)
    with torch.device("meta"):
        if kind == "viclip":
            reward = viclip.ViCLIP(viclip.Towers(viclip.LARGE, viclip.TEXT), "vbench", "")
        else:
            network, text = videoreward.Network(videoreward.TEXT, videoreward.VISION), "x" * 690 + TEMPLATE
            reward = videoreward.VideoReward(network, published.byte_tokenizer(), text, SCALES, "")
    reward = reward.requires_grad_(False).to("meta", torch.bfloat16)
    frames = torch.rand(1, reward.num_frames, 3, 256, 256, device="meta", requires_grad=True)
    reward(frames.detach(), ["a"])  # the caption is encoded once
    with FlopCounterMode(display=False) as forward:
        scores = reward(frames, ["a"])
    with FlopCounterMode(display=False) as backward:
        scores.sum().backward()
    peak = measure_peak(lambda: reward(frames, ["a"]), [reward])
    tera = [counter.get_total_flops() / 1e12 for counter in (forward, backward)]
    assert [tera[0], sum(tera), peak["weights"], peak["total"] - peak["weights"]] == pytest.approx(expected, abs=2e-3)


SHORT = ["--device", "cpu", "--batch-size", "2", "--num-steps", "2", "--tau", "1", "--save-every", "1"]
MIXED = ["--reward", "hpsv2", "--reward", "aesthetic=0.5", "--reward", "videomae:moving left=2",
         "--reward-weights", "aesthetic=random", "--reward-weights", "videomae=random"]
RUN = pytest.mark.usefixtures("aside", "few_clips")


@RUN
@pytest.mark.slow
def test_a_mixture_alone_is_the_plain_run_bit_for_bit():
    """--watch makes a mixture of the one reward: what is optimised must not notice."""
    Path("my_reward.py").write_text("def red(frames, captions):\n    return frames[:, :, 0].mean((2, 3))\n")
    flags = [*SHORT, "--steps", 2, "--eval-every", 0, "--out"]
    assert run(*flags, "plain") == run(*flags, "watched", "--watch", "my_reward.py:red") == 0
    assert metrics("plain") == metrics("watched") and metrics("plain")[0].keys() == {"step", "reward", "loss", "grad_norm"}
    assert same_tensors("plain/lora.safetensors", "watched/lora.safetensors")


@pytest.mark.slow
@RUN
def test_several_rewards_are_logged_resumed_and_shared_among_ranks(monkeypatch):
    Path("my_reward.py").write_text("def red(frames, captions):\n    return frames[:, :, 0].mean((2, 3))\n")
    Path("prompts.txt").write_text("a red circle moving left\n")
    flags = [*SHORT, *MIXED, "--watch", "my_reward.py:red", "--prompts", "mine=prompts.txt",
             "--eval-count", "1", "--eval-every"]
    assert run(*flags, 2, "--steps", 2, "--out", "whole") == 0
    first, one, two, last = metrics("whole")
    names = ["HPStiny", "aesthetic-random", "VideoMAE-random:moving left"]
    assert list(one) == ["step", "reward", *names, "loss", "grad_norm"]
    for line in (one, two):
        assert line["reward"] == pytest.approx(line[names[0]] + .5 * line[names[1]] + 2 * line[names[2]], abs=1e-6)
    for line in (first, last):
        for measured in line["eval"].values():
            assert measured.keys() >= {"reward_mean", *names, "my_reward:red", "watermark"}

    # Resumed elsewhere: the file of the user's own reward is still found.
    assert run(*flags, 2, "--steps", 1, "--out", "parts") == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("--resume", "../parts", "--steps", 2) == 0
    monkeypatch.chdir("..")
    assert metrics("parts")[-1]["eval"] == last["eval"] and metrics("parts")[-2] == two
    refused("reward would make it another run", run, "--resume", "parts", "--reward", "vjepa")

    ranks = [*flags, 0, "--steps", 2, "--out", "ranks"]
    ended, _ = two_ranks(lambda rank: processes.run_script("train.py", lambda: run(*ranks)))
    assert [status for status, _, _ in ended] == [0, 0], ended
    for ours, theirs in zip(metrics("ranks"), (one, two), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = load_file("ranks/lora.safetensors"), load_file("whole/lora.safetensors")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@RUN
def test_classes_are_known_with_the_weights_and_refused_with_nothing_written():
    """What names alone tell is refused before anything is loaded (tests/test_rewards.py)."""
    Path("clips.txt").write_text("a.mp4|||a cat\n")
    flags = ["tiny", *SHORT, "--eval-every", 0, "--out", "refused", "--reward"]
    refused("no class 'boook'", run, *flags, "yolos:boook", "--reward-weights", "random")
    refused("is for the tiny world alone: must be", run, *flags, "action:left", "--base", "random:32", "--data", "clips.txt")
    assert not Path("refused").exists()
