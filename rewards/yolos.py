"""
Object removal: how sure a detector is that a thing is nowhere in the picture. `--reward
yolos:book`; captions are ignored.
VADER (arXiv:2407.08737) with YOLOS (arXiv:2106.00666): the score is one minus the largest
probability of the class over all of the detector's queries, 0 to 1. An image reward.
Ours differs from VADER's code, which (1) looks at detections above 0.2 only, so a thing that is
seen dimly gives no gradient; (2) scores one frame, as it sets its sum back to zero in its loop.
Letters: B videos, S frames, N = B S pictures, Q queries, C classes.
"""
from formats.reward_model import RewardModel, build
from rewards import shared

SHORTEST, LONGEST = 512, 864  # yolos-tiny's own preprocessor
SPELLINGS = [  # transformers 5 has the second
    ("encoder.mid_position_embeddings", "encoder.interpolation.mid_position_embeddings")]
SMALL = shared.SMALL_SIZES | dict(
    image_size=[64, 64], patch_size=16, num_detection_tokens=8, use_mid_position_embeddings=False,
    initializer_range=.2, id2label={0: "book", 1: "dog", 2: "cat"})


class Yolos(RewardModel):
    """detector: YolosForObjectDetection. frames (B, S, 3, H, W) -> (B, S)."""

    def __init__(self, detector, class_index, name, shortest=SHORTEST, longest=LONGEST):
        super().__init__(name)
        self.detector = detector
        self.class_index = class_index
        self.limits = shortest, longest, detector.config.patch_size

    def forward(self, frames, captions):
        x = shared.fit_within(self.pixels(frames, captions), *self.limits)        # (N, 3, h, w)
        x = shared.imagenet_normalize(x).to(self.detector.vit.embeddings.cls_token.dtype)
        logits = self.detector(pixel_values=x).logits                         # (N, Q, C + 1)
        probability = logits.float().softmax(dim=-1)[..., self.class_index]   # (N, Q)
        return 1 - probability.amax(dim=-1).view(frames.shape[:2])            # (B, S)


def load(path, argument, dtype, device):
    """The reward from a hub folder, for the class `argument`; path None: small and random."""
    from transformers import YolosConfig, YolosForObjectDetection
    config = shared.read_model_config(YolosConfig, path) if path else YolosConfig(**SMALL)
    class_index = shared.find_class(config.id2label, argument, "reward yolos")
    detector = build(lambda: YolosForObjectDetection(config), path, dtype, device,
                     spellings=SPELLINGS)
    if path is None:
        return Yolos(detector, class_index, f"YOLOS-random:{argument}", *config.image_size)
    return Yolos(detector, class_index, f"YOLOS-{shared.size_name(config)}:{argument}")
