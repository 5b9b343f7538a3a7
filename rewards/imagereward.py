"""
ImageReward: how people rate a picture as an answer to a caption. Xu et al. (arXiv:2304.05977).
A BLIP reads the caption while it looks at the picture; five linear layers turn its first token
into a score, standardised over the authors' data: mostly -2 to 2. An image reward.
Ours differs from the published code: BLIP is transformers', whose tensors have other names.
Letters: B videos, S frames, N = B S pictures, T tokens.
"""
import torch
from torch import nn

from formats.known_rewards import hub_file
from formats.reward_model import RewardModel, build, clip_normalize, crop_centre
from formats.tensor_names import replace_all
from formats.tensors import read_tensors
from rewards.shared import SMALL_SIZES, LinearHead
from support.files import read_text

BERT = "google-bert/bert-base-uncased"  # whose words these are
MEAN, STD, TOKENS = 0.16717362830052426, 1.0333394966054072, 35  # the published code's
VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, hidden_act="gelu",
              num_attention_heads=16, image_size=224, patch_size=16, layer_norm_eps=1e-6)
TEXT = dict(vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072,
            num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=512,
            is_decoder=True,  # which has layers that look at the picture; called as no decoder
            layer_norm_eps=1e-12, hidden_act="gelu")
SMALL = SMALL_SIZES | dict(initializer_range=.2)
RENAMED = (  # from the authors' names to transformers'
    ("blip.visual_encoder.", "vision."), ("blip.text_encoder.", "text."),
    ("vision.cls_token", "vision.embeddings.class_embedding"),
    ("vision.pos_embed", "vision.embeddings.position_embedding"),
    ("vision.patch_embed.proj", "vision.embeddings.patch_embedding"),
    ("vision.blocks.", "vision.encoder.layers."), ("vision.norm.", "vision.post_layernorm."),
    (".attn.proj.", ".self_attn.projection."), (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SPELLED = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"]  # the small one's words


class Blip(nn.Module):
    """The authors' network out of transformers' parts."""

    def __init__(self, vision, text):
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)

    def forward(self, x, ids, mask):
        """Pictures (N, 3, H, W), tokens and which of them count (N, T) -> features (N, width)."""
        seen = self.vision(pixel_values=x).last_hidden_state                  # (N, patches, width)
        every_patch = torch.ones_like(seen[..., 0], dtype=torch.long)         # (N, patches)
        y = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen,
                      encoder_attention_mask=every_patch, is_decoder=False)
        return y.last_hidden_state[:, 0]


class ImageReward(RewardModel):
    """blip: Blip(...); head: LinearHead; words: BERT's. frames (B, S, 3, H, W) -> (B, S)."""

    def __init__(self, blip, head, words, name):
        from tokenizers import BertWordPieceTokenizer
        super().__init__(name)
        self.blip, self.head, self.size = blip, head, blip.vision.config.image_size
        self.tokenizer = BertWordPieceTokenizer({word: i for i, word in enumerate(words)})
        self.tokenizer.enable_truncation(TOKENS)
        self.tokenizer.enable_padding(length=TOKENS)

    def forward(self, frames, captions):
        x = crop_centre(self.pixels(frames, captions), self.size)             # (N, 3, size, size)
        x = clip_normalize(x).to(self.blip.vision.embeddings.class_embedding.dtype)
        # What BLIP makes of a caption depends on the picture: tokens are all that can be kept.
        tokens = torch.stack(self.encode_once(captions, self.blip, self.tokens))  # (B, 2, T)
        ids, mask = tokens.repeat_interleave(frames.shape[1], dim=0).to(x.device).unbind(1)
        scores = (self.head(self.blip(x, ids, mask)) - MEAN) / STD
        return scores.view(frames.shape[:2])                                  # (B, S)

    def tokens(self, caption):
        """Numbers of a caption's tokens, and which count (2, T)."""
        encoding = self.tokenizer.encode(caption)
        return torch.tensor([encoding.ids, encoding.attention_mask])


def load(path, argument, dtype, device, vision=VISION, text=TEXT):
    """ImageReward from its file; path None: small and random."""
    if path is None:
        vision = VISION | SMALL | dict(image_size=32, patch_size=8)
        text = TEXT | SMALL | dict(encoder_hidden_size=32, vocab_size=len(SPELLED),
                                   bos_token_id=2, sep_token_id=3)
        name, listed, parts, layers = "ImageReward-random", SPELLED, None, None
    else:
        path = path / "ImageReward.pt" if path.is_dir() else path
        published = {replace_all(name, RENAMED): t for name, t in read_tensors(path).items()}
        # Tensors that are still called blip.* were used in pretraining alone.
        parts = {k: v for k, v in published.items() if k.startswith(("vision.", "text."))}
        layers = {k[4:]: v for k, v in published.items() if k.startswith("mlp.")}
        advice = f"put it beside {path.name}"
        words = hub_file("imagereward", BERT, "vocab.txt", advice, path.parent)
        name, listed = "ImageReward-v1.0", read_text(words).rstrip("\n").split("\n")
        if not set(SPECIAL) < set(listed) or len(listed) > text["vocab_size"]:
            raise ValueError(f"{words}: not BERT's words, or more than {text['vocab_size']}")
    blip = build(lambda: Blip(vision, text), path, dtype, device, parts)
    head = build(lambda: LinearHead(text["hidden_size"]), path, device=device, tensors=layers)
    return ImageReward(blip, head, listed, name)
