"""
VideoReward (VideoAlign, arXiv:2501.13918): how people rate a generated video, in three scores:
visual quality, motion quality (low for a still picture), text alignment. `--reward videoreward` is
their sum, `videoreward:VQ`, `:MQ`, `:TA` one of them; each is standardised over the authors' data.
A Qwen2-VL-2B reads the video, then a text that asks for the scores, and a linear head reads each
off at a token of its own. A video reward of 4 frames, the first and last among them: the model's
rule for clips of up to two seconds. Tokens look back only, so the first two scores do not depend
on the caption, and what comes after the last wanted one is not computed.
Ours differs: floats are resized, not bytes. As published, and unlike in transformers' forward(),
positions count tokens, those of the video as all others.
Letters: B videos, S frames, P patches, N tokens, E width.
"""
import torch
import torch.nn.functional as F_
from einops import rearrange
from torch import nn

from formats import videoreward as published
from formats.reward_model import RewardModel, build, clip_normalize, limit
from formats.tensors import read_tensors

FRAMES, PATCH, MERGED = 4, 14, 2  # a token is 2 x 2 patches, each of 2 frames
PIXELS = 100_352, 200_704  # of a frame: at least, at most
TEXT = dict(vocab_size=151_660, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
            num_attention_heads=12, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
            rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
VISION = dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16)
SMALL_TEXT = TEXT | dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=.2,
                         bos_token_id=None, eos_token_id=None,
                         rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
SMALL_VISION = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, initializer_range=.2)
SMALL_PIXELS = 56 * 56, 56 * 84
BEFORE = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # Qwen2-VL's own form
          "<|im_start|>user\n<|vision_start|>")


class Network(nn.Module):
    """transformers' Qwen2-VL and the head, under the authors' names."""

    def __init__(self, text, vision):
        from transformers import Qwen2VLConfig, Qwen2VLModel
        super().__init__()
        self.model = Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))
        self.rm_head = nn.Linear(text["hidden_size"], 1, bias=False)

        # Frequencies of the positions are in no file, and on the meta device they have no values.
        for part, base in ((self.model.visual.rotary_pos_emb, 1e4),
                           (self.model.language_model.rotary_emb, text["rope_theta"])):
            for name, buffer in list(part.named_buffers()):
                exponents = torch.arange(len(buffer), device="cpu") / len(buffer)
                part.register_buffer(name, 1 / base ** exponents, persistent=False)


class VideoReward(RewardModel):
    """frames (B, S, 3, H, W), captions -> (B, 1). scales: {wanted score: (mean, deviation)}."""

    def __init__(self, network, tokenizer, template, scales, name, area_limits=PIXELS):
        super().__init__(name, FRAMES, rule="ends")
        self.network, self.tokenizer, self.template = network, tokenizer, template
        self.scales, self.area_limits = scales, area_limits

    def forward(self, frames, captions):
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
        x = self.pixels(frames, captions)                                     # (B*S, 3, H, W)
        size = smart_resize(*x.shape[-2:], PATCH * MERGED, *self.area_limits)
        x = F_.interpolate(x, size, mode="bicubic", antialias=True)
        x = clip_normalize(limit(x)).unflatten(0, frames.shape[:2])           # (B, S, 3, h, w)
        texts = self.encode_once(captions, self.network, self.read)
        return torch.stack([self.score(c, *t) for c, t in zip(x, texts)])[:, None]   # (B, 1)

    def read(self, caption):
        """Tokens before the video, those after it, and which of these the wanted scores are at."""
        text = "<|vision_end|>" + self.template.replace("{text_prompt}", caption)
        before, after = (self.tokenizer.encode(part).ids for part in (BEFORE, text))
        tokens = [self.tokenizer.token_to_id(published.SCORES[score]) for score in self.scales]
        wanted = [after.index(token) for token in tokens]
        return torch.tensor(before), torch.tensor(after[:max(wanted) + 1]), torch.tensor(wanted)

    def score(self, x, before, after, wanted):
        """The sum of the wanted scores of one clip (S, 3, h, w), in float32."""
        language, head = self.network.model.language_model, self.network.rm_head.weight
        # 1. What the network sees: patches of two frames, in squares of 2 x 2.
        patches = rearrange(x, "(t k) c (h m p) (w n q) -> (t h w m n) (c k p q)", k=2, m=MERGED,
                            n=MERGED, p=PATCH, q=PATCH)                       # (P, 3 * 2 * 14 * 14)
        grid = torch.tensor([[FRAMES // 2, x.shape[2] // PATCH, x.shape[3] // PATCH]])
        seen = self.network.model.visual(patches.to(head.dtype), grid_thw=grid.to(x.device))
        seen = getattr(seen, "pooler_output", seen)  # an object since transformers 5; (P / 4, E)

        # 2. What it reads, at positions that count tokens.
        before, after = (language.embed_tokens(part.to(x.device)) for part in (before, after))
        y = torch.cat([before, seen, after])[None]                            # (1, N, E)
        positions = torch.arange(y.shape[1], device=x.device)[None]           # (1, N)
        y = language(inputs_embeds=y, position_ids=positions, use_cache=False).last_hidden_state

        # 3. The scores at their tokens. A product and a sum stay in float32 under autocast.
        y = y[0, (len(before) + len(seen) + wanted).to(x.device)].float()     # (wanted, E)
        mean, deviation = torch.tensor(list(self.scales.values())).to(y).T
        return (((y * head.float()).sum(dim=-1) - mean) / deviation).sum()


def load(path, argument, dtype, device, text=TEXT, vision=VISION):
    """The sum, or the score `argument`, from the hub folder; path None: small and random."""
    ending = f":{argument}" if argument else ""
    wanted = [argument] if argument else list(published.SCORES)
    if path is None:
        network = build(lambda: Network(SMALL_TEXT, SMALL_VISION), None, dtype, device)
        as_they_are, name = dict.fromkeys(wanted, (0., 1.)), f"VideoReward-random{ending}"
        return VideoReward(network, published.byte_tokenizer(), published.SHORT, as_they_are, name,
                           SMALL_PIXELS)

    folder = path if path.is_dir() else path.parent
    template = published.read_template(folder)  # before gigabytes are read or downloaded
    scales = published.read_scales(folder)
    tokenizer = published.read_tokenizer(folder, text["vocab_size"])
    weights = published.find_file(folder, f"{published.CHECKPOINT}/model.pth")
    tensors = published.merge_lora(read_tensors(weights))
    network = build(lambda: Network(text, vision), weights, dtype, device, tensors)
    return VideoReward(network, tokenizer, template, {score: scales[score] for score in wanted},
                       f"VideoReward{ending}")
