"""
rewards/videoreward.py and rewards/viclip.py: against transformers' own classes, called as the authors call them, and against the
authors' video tower; published names of files; what is refused. tests/test_rewards.py has what they share with all rewards.
"""
import json
import re
from collections import OrderedDict

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F_
import transformers
from einops import rearrange
from tokenizers import Tokenizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, Resize

from benchmark import measure_peak
from evaluate import measure
from formats import video_reward as published
from formats.reward_model import CLIP_MEAN, CLIP_STD, clip_tokenizer, frames_of, spread_frames
from formats.reward_names import requested_rewards
from formats.tensors import build_empty, check_tensors
from reward import Rewards, load_reward
from rewards import viclip, videoreward
from rewards.hub import IMAGENET_MEAN, IMAGENET_STD
from tests.test_rewards import CAPTIONS, Change, mixed, random_frames, refused, seeded

KINDS = ["videoreward", "videoreward:VQ", "videoreward:MQ", "videoreward:TA", "viclip", "viclip:imagenet"]
CHAT = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
TEXT = videoreward.SMALL_TEXT | dict(vocab_size=256 + len(CHAT) + 3)
VISION = videoreward.SMALL_VISION
TEMPLATE = "\nRate  it: <|VQ_reward|>\r\nEND\n<|MQ_reward|>\n\nIt shows {text_prompt}.\n<|TA_reward|>\nEND\n"
SCALES = {"VQ": (3.6757, 2.2476), "MQ": (1.1646, 1.3811), "TA": (2.8105, 2.5121)}


# ------------------------------------ Live classes with small random weights, published -----------------------------------

def old_name(name):
    """What transformers 4.45 called a tensor."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def publish(tensors, names):
    """Tensors as the authors' file has them: peft's names, and of each projection a LoRA, which the weight here includes."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, t in tensors.items():
        stem = f"base_model.model.{names(name)}".removesuffix(".weight").removesuffix(".bias")
        ending = name.rpartition(".")[2]
        if not re.search(r"language_model.*_proj\.", name):
            found[f"{stem}.{ending}"] = t
            continue
        found[f"{stem}.base_layer.{ending}"] = t
        if ending == "weight":
            down, up = (.1 * torch.randn(shape, generator=generator) for shape in ((64, t.shape[1]), (t.shape[0], 64)))
            found |= {f"{stem}.lora_A.default.weight": down, f"{stem}.lora_B.default.weight": up}
            found[f"{stem}.base_layer.weight"] = t - 128 / 64 * up @ down
    return found


def live_videoreward(folder, names=old_name):
    """A folder as the hub's, and score(frames, positions) -> (B, 3): the authors' call, with prompts of a batch padded."""
    config = transformers.Qwen2VLConfig(text_config=TEXT, vision_config=VISION, video_token_id=256 + CHAT.index("<|video_pad|>"))
    model = seeded(lambda: transformers.Qwen2VLForConditionalGeneration(config), .05)
    head = seeded(lambda: nn.Linear(32, 1, bias=False))
    checkpoint = folder / published.CHECKPOINT
    (checkpoint / "tokenizer").mkdir(parents=True)
    torch.save(publish(model.state_dict() | {"rm_head.weight": head.weight.data}, names), checkpoint / "model.pth")
    bytes_alone = json.loads(published.byte_tokenizer().to_str())
    tokenizer = Tokenizer.from_str(json.dumps(bytes_alone | {"added_tokens": []}))
    tokenizer.add_special_tokens(CHAT)
    tokenizer.save(str(checkpoint / "tokenizer/tokenizer.json"))
    (folder / "prompt_template.txt").write_bytes(TEMPLATE.encode())
    norm = {f"{k}_{what}": v for k, pair in SCALES.items() for what, v in zip(("mean", "std"), pair)}
    (folder / "model_config.json").write_text(json.dumps({"inference_config": norm}))
    tokenizer.add_special_tokens(list(published.SCORES.values()))
    processor = transformers.Qwen2VLVideoProcessor(do_resize=False, do_rescale=False)

    def score(frames, positions="plain"):
        x = Resize((56, 84), InterpolationMode.BICUBIC, antialias=True)(frames.flatten(0, 1)).clamp(0, 1).unflatten(0, (2, 4))
        batch = processor(videos=list(x), return_tensors="pt")
        chat = [f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{'<|video_pad|>' * 12}"
                f"<|vision_end|>{TEMPLATE.format(text_prompt=c)}<|im_end|>\n<|im_start|>assistant\n" for c in CAPTIONS]
        rows = [torch.tensor(tokenizer.encode(text).ids) for text in chat]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        is_video = ids == config.video_token_id
        if positions == "plain":
            embeds = model.model.language_model.embed_tokens(ids)
            seen = model.model.visual(batch["pixel_values_videos"], grid_thw=batch["video_grid_thw"]).pooler_output
            embeds = embeds.masked_scatter(is_video[..., None].expand_as(embeds), seen)
            y = model.model(input_ids=None, position_ids=None, attention_mask=mask, inputs_embeds=embeds).last_hidden_state
        else:  # transformers' own forward, which lays the video's tokens out in rows and columns
            y = model.model(input_ids=ids, attention_mask=mask, mm_token_type_ids=2 * is_video.int(), **batch).last_hidden_state
        special = torch.stack([ids == tokenizer.token_to_id(t) for t in published.SCORES.values()]).any(0)
        mean, deviation = torch.tensor(list(SCALES.values())).T
        return (head(y)[special].view(2, 3) - mean) / deviation
    return folder, score


class AuthorsBlock(nn.Module):
    """A layer of ViCLIP as its authors have it, tokens first."""

    def __init__(self, width, heads, mask=None):
        super().__init__()
        self.attn, self.mask = nn.MultiheadAttention(width, heads), mask
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


def live_viclip(folder):
    """A file as VBench downloads it, and score(frames, mean, std) -> (B,): what the authors compute, in their order."""
    def part(**parameters):
        module = nn.Module()
        for name, value in parameters.items():
            setattr(module, name, value if isinstance(value, nn.Module) else nn.Parameter(torch.randn(value)))
        return module

    def blocks(mask=None):
        return part(resblocks=nn.ModuleList(AuthorsBlock(32, 2, mask) for _ in range(2)))
    model = seeded(lambda: part(
        temp=(), vision_encoder=part(
            conv1=nn.Conv3d(3, 32, (1, 8, 8), (1, 8, 8), bias=False), class_embedding=(32,), positional_embedding=(17, 32),
            temporal_positional_embedding=(1, 8, 32), ln_pre=nn.LayerNorm(32), transformer=blocks(), ln_post=nn.LayerNorm(32),
            proj=(32, 24)),
        text_encoder=part(
            token_embedding=nn.Embedding(49408, 32), positional_embedding=(32, 32), ln_final=nn.LayerNorm(32),
            transformer=blocks(torch.full((32, 32), -torch.inf).triu(1)), text_projection=(32, 24))), .1)
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "ViClip-InternVid-10M-FLT.pth")

    def score(frames, mean, std):
        x = Resize(32, InterpolationMode.BICUBIC, antialias=False)(frames.flatten(0, 1)).clamp(0, 1)
        video, text = model.vision_encoder, model.text_encoder
        x = video.conv1(Normalize(mean, std)(CenterCrop(32)(x)).unflatten(0, (2, 8)).transpose(1, 2))
        x = torch.cat([video.class_embedding.expand(16, 1, -1), rearrange(x, "b c t h w -> (b t) (h w) c")], 1)
        x = x + video.positional_embedding
        first = x[::8, :1]  # of the first frame of each clip
        x = rearrange(x[:, 1:], "(b t) n m -> (b n) t m", t=8) + video.temporal_positional_embedding
        x = video.ln_pre(torch.cat([first, rearrange(x, "(b n) t m -> b (n t) m", b=2)], 1)).transpose(0, 1)
        for block in video.transformer.resblocks:
            x = block(x)
        x = video.ln_post(x)[0] @ video.proj
        ids = clip_tokenizer(32)(CAPTIONS)
        y = (text.token_embedding(ids) + text.positional_embedding).transpose(0, 1)
        for block in text.transformer.resblocks:
            y = block(y)
        y = text.ln_final(y.transpose(0, 1))[torch.arange(2), ids.argmax(-1)] @ text.text_projection
        return F_.cosine_similarity(x, y)
    return folder / "ViClip-InternVid-10M-FLT.pth", score


@pytest.fixture
def small(monkeypatch):
    """Both as published, but small."""
    for module, sizes in ((videoreward, (TEXT, VISION)), (viclip, (viclip.SMALL, viclip.SMALL_TEXT))):
        monkeypatch.setattr(module, "load", lambda *args, load=module.load, sizes=sizes: load(*args, *sizes))
    init = videoreward.VideoReward.__init__
    monkeypatch.setattr(videoreward.VideoReward, "__init__", lambda *args: init(*args[:6], videoreward.SMALL_PIXELS))


@pytest.mark.parametrize(("kind", "names"), [("videoreward", str)] + [(kind, old_name) for kind in KINDS])
def test_scores_and_pixel_gradients_are_those_of_the_authors_call(kind, names, tmp_path, small):
    name, _, argument = kind.partition(":")
    path, live = live_viclip(tmp_path / "v") if name == "viclip" else live_videoreward(tmp_path / "v", names)
    ours = load_reward(kind, path)
    assert ours.name == {"viclip": "ViCLIP-L/vbench", "viclip:imagenet": "ViCLIP-L/imagenet"}.get(
        kind, kind.replace("videoreward", "VideoReward"))
    frames = (.1 + .8 * random_frames(2, ours.num_frames, 40, 64)).requires_grad_()
    if name == "viclip":
        theirs = live(frames, *((IMAGENET_MEAN, IMAGENET_STD) if argument else (CLIP_MEAN, CLIP_STD)))
    else:
        every = live(frames)
        theirs = every[:, list(SCALES).index(argument)] if argument else every.sum(1)
        assert (live(frames, "rows and columns") - every).abs().max() > 1e-3  # so the two calls can be told apart
    scores = ours(frames, CAPTIONS)
    torch.testing.assert_close(scores[:, 0], theirs, rtol=1e-5, atol=1e-5)
    expected, = torch.autograd.grad(theirs.sum(), frames)
    found, = torch.autograd.grad(scores.sum(), frames)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    # The caption counts, but for what is read off before it.
    swapped = (ours(frames, CAPTIONS[::-1]) - scores).abs().min()
    assert swapped == 0 if argument in ("VQ", "MQ") else swapped > 1e-5


@pytest.mark.parametrize("kind", ["videoreward", "viclip"])
def test_gradients_are_slopes(kind):
    reward = load_reward(kind, "random")
    frames = (.3 + .4 * random_frames(1, reward.num_frames, 28, 32)).requires_grad_()
    gradient, = torch.autograd.grad(reward(frames, ["a"]).sum(), frames)
    step = .05 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (reward(frames + step, ["a"]) - reward(frames - step, ["a"])).item() / 2
    assert slope == pytest.approx((gradient * step).sum().item(), rel=.01)


# --------------------------------------------------- Frames and files ----------------------------------------------------

@pytest.mark.parametrize("F", [8, 15, 16, 17, 49, 81])
def test_each_sees_the_frames_that_its_authors_choose(F):
    assert frames_of(load_reward("videoreward", "random"), F) == tuple(torch.linspace(0, F - 1, 4).round().int().tolist())
    edges = np.linspace(0, F, 9).astype(int)  # VBench's "middle"
    assert frames_of(load_reward("viclip", "random"), F) == tuple((a + b - 1) // 2 for a, b in zip(edges, edges[1:]))
    assert spread_frames(16, 4, "ends").tolist() == [0, 5, 10, 15]


def test_frames_of_another_rule_are_what_is_scored():
    ends, plain = Change("ends", 2, rule="ends"), Change("plain", 2)
    video = random_frames(1, 6)
    found = measure(Rewards([(1., ends), (1., plain)]), video[:, :1], video, CAPTIONS[:1])
    assert [found[k] for k in ("ends", "plain")] == pytest.approx(
        [(video[0, 5] - video[0, 0]).square().mean().item(), (video[0, 3] - video[0, 0]).square().mean().item()])


@pytest.mark.parametrize("names", [old_name, str])
def test_every_published_tensor_of_full_size_has_its_place(names):
    """As many as the authors' file is said to have; only names are compared, of stand-ins."""
    network = build_empty(lambda: videoreward.Network(videoreward.TEXT, videoreward.VISION), "meta")
    ours = {name: torch.zeros(1, 1) for name in network.state_dict()}
    tensors = publish(ours | {"lm_head.weight": torch.zeros(1, 1)}, names)
    assert len(tensors) == 1123
    check_tensors(ours, published.merge_lora(tensors), "merged")
    half = {name: t for name, t in tensors.items() if "layers.7.mlp.up_proj.lora_B" not in name}
    refused("1 tensors not known (model.language_model.layers.7.mlp.up_proj.lora_A", check_tensors, ours, published.merge_lora(half), "x")


def test_nothing_is_downloaded_before_the_authors_text_is_there(tmp_path, monkeypatch, small):
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / "hub" / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    live_videoreward(tmp_path / "hub")
    (tmp_path / "hub/prompt_template.txt").rename(tmp_path / "kept")
    refused(f"reward videoreward: {tmp_path}/hub/prompt_template.txt: no such file; it is the text that", load_reward, "videoreward")
    assert asked == [("KlingTeam/VideoReward", "model_config.json")]
    (tmp_path / "kept").rename(tmp_path / "hub/prompt_template.txt")
    assert load_reward("videoreward").name == "VideoReward" and len(asked) == 2

    (tmp_path / "other").mkdir()  # a folder with the text alone: what is missing is fetched
    for text, message in ((TEMPLATE.replace("{text_prompt}", ""), "must have <|VQ_reward|>, <|MQ_reward|>, {text_prompt}, <|TA_r"),
                          (TEMPLATE + "<|VQ_reward|>", "in this order and each once")):
        (tmp_path / "other/prompt_template.txt").write_text(text)
        refused(message, load_reward, "videoreward", tmp_path / "other")
    (tmp_path / "other/prompt_template.txt").write_bytes(TEMPLATE.encode())
    load_reward("videoreward", tmp_path / "other")
    names = ["model_config.json", *(f"checkpoint-11352/{name}" for name in ("tokenizer/tokenizer.json", "model.pth"))]
    assert asked[2:] == [("KlingTeam/VideoReward", name) for name in names]
    (tmp_path / "other/model_config.json").write_text("{}")
    refused("model_config.json: not the config of a model we have (KeyError: 'inference_config')", load_reward, "videoreward",
            tmp_path / "other")
    (tmp_path / "hub/checkpoint-11352/tokenizer/tokenizer.json").write_text("{}")
    refused("tokenizer.json: not a tokenizer (", load_reward, "videoreward", tmp_path / "hub")


@pytest.mark.parametrize(("kind", "message"), [
    ("videoreward:XQ", "videoreward:[VQ|MQ|TA], viclip:[vbench|imagenet], action:"), ("viclip:clip", "reward 'viclip:clip': must be one"),
    ("videoreward:", None), ("viclip:vbench", None)])
def test_which_names_there_are(kind, message):
    if message:
        refused(message, load_reward, kind, "random")
    else:
        assert load_reward(kind, "random").name in ("VideoReward-random", "ViCLIP-random/vbench")


def test_clips_that_are_too_short():
    for kind, frames in (("videoreward", 3), ("viclip", 7)):
        reward = load_reward(kind, "random")
        refused(f"frames = {frames}: this reward sees {frames + 1} frames of a clip, in order", frames_of, reward, frames)
        refused(f"frames = {frames}: {reward.name} sees {frames + 1} frames", reward, random_frames(1, frames), ["a"])
        refused(f"frames = {frames}: {kind} sees {frames + 1} frames", requested_rewards,
                mixed(reward=(kind,), frames=frames, reward_weights=("random",)))


# ------------------------------------------------- What they cost in full -------------------------------------------------

def full_viclip():
    return viclip.ViCLIP(viclip.Towers(viclip.LARGE, viclip.TEXT), "vbench", "ViCLIP-L")


def full_videoreward():
    network = videoreward.Network(videoreward.TEXT, videoreward.VISION)
    words = " ".join("x" * 860) + "<|VQ_reward|><|MQ_reward|>{text_prompt}<|TA_reward|>"
    return videoreward.VideoReward(network, published.byte_tokenizer(), words, SCALES, "VideoReward")


@pytest.mark.slow
@pytest.mark.parametrize(("make", "forward", "both", "weights", "more"), [
    (full_viclip, 0, 0, 0, 0), (full_videoreward, 0, 0, 0, 0)])
def test_full_size_cost(make, forward, both, weights, more, monkeypatch):
    """TFLOP and GiB of a clip of 256 x 256, counted on meta in bfloat16; docs/rewards.md has them."""
    with torch.device("meta"):
        reward = make().requires_grad_(False).to("meta", torch.bfloat16)
    frames = torch.rand(1, reward.num_frames, 3, 256, 256, device="meta", requires_grad=True)
    reward(frames.detach(), ["a"])  # the caption is encoded once
    with FlopCounterMode(display=False) as counter:
        scores = reward(frames, ["a"])
    with FlopCounterMode(display=False) as backward:
        scores.sum().backward()
    peak = measure_peak(lambda: reward(frames, ["a"]), [reward])
    found = (counter.get_total_flops() / 1e12, (counter.get_total_flops() + backward.get_total_flops()) / 1e12,
             peak["weights"], peak["total"] - peak["weights"])
    assert found == pytest.approx((forward, both, weights, more), abs=6e-3)
