"""
ViCLIP-L (InternVid, arXiv:2307.06942): how well a clip fits its caption; VBench's overall
consistency. `--reward viclip`. The cosine of a clip's and a caption's features. A video reward of
8 frames, the middle one of each of 8 equal parts; all their patches attend to each other.
Pixels are normalised by CLIP's statistics as VBench does (`viclip`, named ViCLIP-L/vbench), or by
ImageNet's as T2V-Turbo does (`viclip:imagenet`): scores of the two do not compare.
Ours differs from VBench: floats are resized, not bytes. From T2V-Turbo: the frames and the square
are the middle ones, not random.
Letters: B videos, F frames, N patches of a frame, W width, E width of the features.
"""
import torch
import torch.nn.functional as F_
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, Transformer
from torch import nn

from formats.reward_model import RewardModel, build, clip_normalize, clip_tokenizer, crop_centre
from formats.tensors import read_tensors
from rewards.shared import imagenet_normalize

FRAMES = 8
NORMALIZE = {"vbench": clip_normalize, "imagenet": imagenet_normalize}
LARGE = dict(size=224, patch=14, width=1024, layers=24, heads=16, features=768)
TEXT = dict(context_length=32, width=768, layers=12, heads=12, output_dim=768)
SMALL = dict(size=32, patch=8, width=32, layers=2, heads=2, features=24)
SMALL_TEXT = dict(context_length=32, width=32, layers=2, heads=2, output_dim=24)


class VideoTransformer(nn.Module):
    """The authors' video tower, of open_clip's blocks: clips (B, 3, F, H, W) -> (B, E)."""

    def __init__(self, size, patch, width, layers, heads, features):
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(.1 * torch.randn(width))
        places = (size // patch) ** 2 + 1  # the first is the class token's
        self.positional_embedding = nn.Parameter(.1 * torch.randn(places, width))
        self.temporal_positional_embedding = nn.Parameter(.1 * torch.randn(1, FRAMES, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU)
        self.proj = nn.Parameter(width ** -.5 * torch.randn(width, features))

    def forward(self, clips):
        place, time = self.positional_embedding, self.temporal_positional_embedding
        x = self.conv1(clips).flatten(3).permute(0, 2, 3, 1)                  # (B, F, N, W)
        x = x + place[1:] + time[:, :, None]                                  # (B, F, N, W)
        first = (self.class_embedding + place[0]).expand(len(x), 1, -1)       # (B, 1, W)
        x = torch.cat([first, x.flatten(1, 2)], dim=1)                        # (B, 1 + F N, W)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj                              # (B, E)


class Towers(nn.Module):
    """Both towers under the authors' names."""

    def __init__(self, video, text):
        super().__init__()
        self.vision_encoder = VideoTransformer(**video)
        self.text_encoder = TextTransformer(act_layer=QuickGELU, **text)


class ViCLIP(RewardModel):
    """frames (B, F, 3, H, W), captions -> cosines (B, 1). statistics: a key of NORMALIZE."""

    def __init__(self, towers, statistics, name):
        super().__init__(f"{name}/{statistics}", FRAMES, rule="middle")
        self.towers, self.normalize = towers, NORMALIZE[statistics]
        self.tokenizer = clip_tokenizer(towers.text_encoder.context_length)

    def forward(self, frames, captions):
        video = self.towers.vision_encoder
        x = crop_centre(self.pixels(frames, captions), video.size, antialias=False)
        x = self.normalize(x).to(video.proj.dtype).unflatten(0, frames.shape[:2])
        features = video(x.transpose(1, 2)).float()                           # (B, E)
        text = torch.stack(self.encode_once(captions, self.towers, self.text_features))
        return (F_.normalize(features, dim=-1) * text).sum(dim=-1, keepdim=True)   # (B, 1)

    def text_features(self, caption):
        """Unit features of a caption (E,), of its first 32 tokens."""
        tokens = self.tokenizer([caption]).to(self.towers.text_encoder.text_projection.device)
        return F_.normalize(self.towers.text_encoder(tokens).float(), dim=-1)[0]


def load(path, argument, dtype, device, video=LARGE, text=TEXT):
    """ViCLIP from its file, with the statistics `argument`; path None: small and random."""
    tensors, name = None, "ViCLIP-L"
    if path is None:
        video, text, name = SMALL, SMALL_TEXT, "ViCLIP-random"
    else:
        tensors = read_tensors(path)
        tensors.pop("temp", None)  # of the loss in pretraining alone
    towers = build(lambda: Towers(video, text), path, dtype, device, tensors)
    return ViCLIP(towers, argument or "vbench", name)
