"""
PickScore (Kirstain et al., arXiv:2305.01569): which of two pictures people pick for a caption.
A CLIP ViT-H-14 tuned on people's choices; the score is exp(logit_scale) times the cosine of a
picture's and a caption's features, 18 to 24. An image reward.
Ours differs from the published code: captions are cleaned as CLIP's authors do, `&amp;` into `&`.
Letters: B videos, S frames, E width of the features.
"""
import torch
import torch.nn.functional as F_

from formats.reward_model import RewardModel, build, clip_normalize, clip_tokenizer, crop_centre
from rewards.shared import SMALL_SIZES, read_model_config

TOWER = SMALL_SIZES | dict(projection_dim=24, hidden_act="gelu")
VISION = TOWER | dict(image_size=32, patch_size=8)
SMALL = dict(projection_dim=24, text_config=TOWER, vision_config=VISION)


class PickScore(RewardModel):
    """clip: a transformers CLIPModel. frames (B, S, 3, H, W), captions -> (B, S)."""

    def __init__(self, clip, name="PickScore-v1"):
        super().__init__(name)
        self.clip, self.size = clip, clip.config.vision_config.image_size
        self.tokenizer = clip_tokenizer(clip.config.text_config.max_position_embeddings)

    def forward(self, frames, captions):
        x = crop_centre(self.pixels(frames, captions), self.size)             # (B*S, 3, size, size)
        x = clip_normalize(x).to(self.clip.visual_projection.weight.dtype)
        features = self.clip.visual_projection(self.clip.vision_model(pixel_values=x).pooler_output)
        image = F_.normalize(features.float(), dim=-1)                        # (B*S, E)
        image = image.unflatten(0, frames.shape[:2])                          # (B, S, E)
        text = self.encode_once(captions, self.clip, self.text_features)
        cosine = (image * torch.stack(text)[:, None]).sum(dim=-1)             # (B, S)
        return self.clip.logit_scale.float().exp() * cosine

    def text_features(self, caption):
        """Unit features of a caption (E,)."""
        tokens = self.tokenizer([caption]).to(self.clip.logit_scale.device)   # (1, tokens)
        features = self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)
        return F_.normalize(features.float(), dim=-1)[0]


def load(path, argument, dtype, device):
    """PickScore from a hub folder; path None: small and random."""
    from transformers import CLIPConfig, CLIPModel
    config = read_model_config(CLIPConfig, path) if path else CLIPConfig(**SMALL)
    clip = build(lambda: CLIPModel(config), path, dtype, device)
    return PickScore(clip, "PickScore-v1" if path else "PickScore-random")
