"""
Temporal consistency: how well the hidden parts of a clip follow from the parts that are shown.
`--reward vjepa`.
VADER (arXiv:2407.08737), here with V-JEPA 2 (arXiv:2506.09985): minus the mean distance
|prediction - target| over the hidden patches, where the prediction comes from the shown patches
alone, and the target is what the encoder makes of the whole clip, normalised and without gradient.
Below 0; real clips are nearer to it. A video reward of 16 frames, without text.
Ours differs from transformers' class: its encoder is shown everything, and would so pass on what it
has to predict. A caption's own seed hides the patches, so that scores of two steps compare.
Letters: B videos, F frames, N patches of a clip, M hidden ones, E width.
"""
import zlib

import torch
import torch.nn.functional as F_

from formats.reward_model import RewardModel, build, crop_centre
from rewards.shared import imagenet_normalize, read_model_config, size_name

FRAMES = 16
BLOCKS, SHARE = 8, .15  # V-JEPA's: 8 blocks of 15% of the picture, through all frames; they overlap
SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, crop_size=64,
             patch_size=16, frames_per_clip=16, pred_hidden_size=48, pred_num_attention_heads=2,
             pred_num_hidden_layers=2, pred_num_mask_tokens=2)


def hidden_patches(rows, times, seed):
    """Bool (times * rows * rows,): which patches of a picture are hidden, at all times alike."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(rows, rows, dtype=torch.bool)
    for _ in range(BLOCKS):
        ratio = .75 + .75 * torch.rand((), generator=generator).item()        # of height to width
        h = min(max(round((SHARE * ratio) ** .5 * rows), 1), rows - 1)
        w = min(max(round((SHARE / ratio) ** .5 * rows), 1), rows - 1)
        top = torch.randint(rows - h + 1, (), generator=generator).item()
        left = torch.randint(rows - w + 1, (), generator=generator).item()
        block = torch.zeros_like(hidden)
        block[top:top + h, left:left + w] = True
        if not (hidden | block).all():  # something must be shown
            hidden |= block
    return hidden.flatten().repeat(times)


class VJEPA(RewardModel):
    """model: a transformers VJEPA2Model. frames (B, F, 3, H, W), captions -> (B, 1), below 0."""

    def __init__(self, model, name):
        super().__init__(name, FRAMES)
        self.model = model

    def forward(self, frames, captions):
        size = self.model.config.crop_size
        x = self.pixels(frames, captions)                                     # (B*F, 3, H, W)
        x = crop_centre(x, size, shortest=int(size * 256 / 224), mode="bilinear")
        x = imagenet_normalize(x).unflatten(0, frames.shape[:2])              # (B, F, 3, h, w)

        # Clip by clip, since each hides another number of patches.
        distances = [self.distance(*clip) for clip in zip(x.split(1), captions)]
        return -torch.stack(distances)[:, None]                               # (B, 1)

    def distance(self, x, caption):
        """How far the hidden patches of a clip (1, F, 3, h, w) are from what the others predict."""
        config, encoder = self.model.config, self.model.encoder
        rows, times = config.crop_size // config.patch_size, FRAMES // config.tubelet_size
        is_hidden = hidden_patches(rows, times, seed=zlib.crc32(caption.encode()))        # (N,)
        hidden = is_hidden.nonzero().T.to(x.device)                           # (1, M)
        shown = (~is_hidden).nonzero().T.to(x.device)                         # (1, N - M)

        # 1. What the encoder makes of the whole clip. Without gradient: else the target itself
        #    would move to where it is easy to predict.
        with torch.no_grad():
            whole = encoder(pixel_values_videos=x).last_hidden_state          # (1, N, E)
            whole_unit = F_.layer_norm(whole.float(), whole.shape[-1:])
            target = whole_unit[:, hidden[0]]                                 # (1, M, E)

        # 2. What it makes of the shown patches, put where the predictor picks them up.
        y = encoder.embeddings(x)[:, shown[0]]                                # (1, N - M, E)
        for layer in encoder.layer:
            y = layer(y, shown)[0]
        context = torch.zeros_like(whole)                                     # (1, N, E)
        context[:, shown[0]] = encoder.layernorm(y).to(whole.dtype)

        # 3. What the predictor makes of it.
        prediction = self.model.predictor(context, [shown], [hidden]).last_hidden_state
        return (prediction.float() - target).abs().mean()


def load(path, argument, dtype, device):
    """The reward from a hub folder; path None: small and random."""
    from transformers import VJEPA2Config, VJEPA2Model
    config = read_model_config(VJEPA2Config, path) if path else VJEPA2Config(**SMALL)
    model = build(lambda: VJEPA2Model(config), path, dtype, device)
    return VJEPA(model, f"VJEPA2-{size_name(config) if path else 'random'}")
