"""
LAION's aesthetic predictor V2: how beautiful people would find a picture, whatever its caption, on
a scale of 1 to 10; most score 4.5 to 7. An image reward.
Unit features of OpenAI's CLIP ViT-L/14, then five linear layers without anything between them,
the authors' own (christophschuhmann/improved-aesthetic-predictor).
"""
import torch.nn.functional as F_

from formats.known_rewards import hub_file
from formats.reward_model import RewardModel, build, clip_normalize, crop_centre
from formats.tensors import read_tensors
from rewards.shared import SMALL_SIZES, LinearHead, read_model_config

HEAD_REPO = "trl-lib/ddpo-aesthetic-predictor"
HEADS = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.safetensors")
SMALL = SMALL_SIZES | dict(image_size=32, patch_size=8, projection_dim=24)


class Aesthetic(RewardModel):
    """clip: CLIPVisionModelWithProjection; head: LinearHead(E). (B, S, 3, H, W) -> (B, S)."""

    def __init__(self, clip, head, name="aesthetic-v2"):
        super().__init__(name)
        self.clip, self.head, self.size = clip, head, clip.config.image_size

    def forward(self, frames, captions):
        x = crop_centre(self.pixels(frames, captions), self.size)             # (B*S, 3, size, size)
        x = clip_normalize(x).to(self.clip.visual_projection.weight.dtype)
        features = self.clip(pixel_values=x).image_embeds.float()             # (B*S, E)
        scores = self.head(F_.normalize(features, dim=-1))                    # (B*S,)
        return scores.view(frames.shape[:2])                                  # (B, S)


def load(path, argument, dtype, device):
    """The predictor from its folder; path None: small and random."""
    from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection
    config, visual, head_file, name = CLIPVisionConfig(**SMALL), None, None, "aesthetic-random"
    if path:
        config, name = read_model_config(CLIPConfig, path).vision_config, "aesthetic-v2"
        # The text tower has no part in this.
        visual = {k: v for k, v in read_tensors(path).items() if k.startswith("vis")}
        head_file = next((path / file for file in HEADS if (path / file).is_file()), None)
        head_file = head_file or hub_file("aesthetic", HEAD_REPO, HEADS[0], f"put it into {path}")
    clip = build(lambda: CLIPVisionModelWithProjection(config), path, dtype, device, visual)
    head = build(lambda: LinearHead(config.projection_dim), head_file, device=device)
    return Aesthetic(clip, head, name)
