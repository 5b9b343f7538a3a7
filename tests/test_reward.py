"""reward.py: Sec. 3.2.2 by hand-written numbers; HPSv2 against the hpsv2 package itself, on small random weights."""
import math
import sys
import warnings
from unittest import mock

import open_clip
import pytest
import torch
from PIL import Image

from formats import hps_package
from formats.reward_model import clip_normalize, letterbox, limit, stretch
from reward import HPSv2, aggregate, first_frames, load_hpsv2, segment_frames, tar_weights
from tests.conftest import refused, seeded

# ViT-H-14's structure, small: 28 x 28 pictures in patches of 7, the real vocabulary.
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "patch_size": 7, "layers": 2, "width": 24, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 16, "heads": 2},
}
CAPTIONS = ["a red panda riding a bicycle, 4k", "a  Lighthouse &amp; the sea at night"]


def tiny_clip(seed=0, **vision):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(**{**CONFIG, "vision_cfg": CONFIG["vision_cfg"] | vision})


def random_frames(B=2, S=3, H=40, W=40, seed=0):
    return torch.rand(B, S, 3, H, W, generator=seeded(seed))


# -------------------------------------------- g(i): one frame per segment ---------------------------------------------

@pytest.mark.parametrize(("F", "S", "segments"), [
    (16, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
    (10, 4, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]),  # S does not divide F: edges 0, 2.5, 5, 7.5, 10, rounded down
    (5, 5, [[0], [1], [2], [3], [4]]),
    (6, 1, [[0, 1, 2, 3, 4, 5]]),
])
def test_segments_by_hand(F, S, segments):
    g = segment_frames(F, S, batch=600, generator=seeded())
    assert g.shape == (600, S) and g.dtype == torch.int64
    # Every frame of a segment is drawn, and none of another: together the segments reach all F frames.
    assert [sorted(set(column.tolist())) for column in g.T] == segments
    assert first_frames(F, S).tolist() == [segment[0] for segment in segments]


def test_segment_frames_are_uniform():
    n = 6000
    g = segment_frames(10, 4, batch=n, generator=seeded(1))
    for column, length in zip(g.T, [2, 3, 2, 3], strict=True):
        counts = column.unique(return_counts=True)[1].double()
        chi_square = ((counts - n / length) ** 2 / (n / length)).sum()
        assert chi_square < 13.8  # exceeded once in 1,000 by chance (two degrees of freedom)


def test_randomness_belongs_to_the_generator():
    state = torch.random.get_rng_state()
    one = segment_frames(16, 4, batch=1, generator=seeded(7))
    assert torch.equal(one, segment_frames(16, 4, batch=1, generator=seeded(7)))
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator was not touched


@pytest.mark.parametrize("S", [0, -1, 17])
def test_segments_outside_1_to_F(S):
    refused(f"segments = {S}: must be from 1 to 16", segment_frames, 16, S, batch=1)
    refused(f"segments = {S}: must be from 1 to 16", first_frames, 16, S)


# -------------------------------------------------- Eq. 7 and Eq. 8 ---------------------------------------------------

def test_tar_weights_by_hand():
    # F/2 = 8: frame 8 weighs 1 and frame 7 does not, though frames 0..15 lie evenly around 7.5.
    f = tar_weights(torch.tensor([[0, 7, 8, 9], [3, 6, 10, 15]]), num_frames=16)
    by_hand = [[0.00033546, 0.36787944, 1.0, 0.36787944], [0.00673795, 0.13533528, 0.13533528, 0.00091188]]
    torch.testing.assert_close(f, torch.tensor(by_hand))
    # F/2 is not rounded: the centre of 5 frames is 2.5.
    torch.testing.assert_close(tar_weights(torch.tensor([[2, 3]]), 5, 2.0), torch.tensor([[1.0, 1.0]]) / math.e)
    for lambda_tar in (-1.0, math.nan, math.inf):
        refused(f"lambda_tar = {lambda_tar}: must be", tar_weights, torch.tensor([[0]]), 16, lambda_tar)


def test_tar_weights_average_0_135():
    # So with lambda = 1, F = 16 and S = 4, R is about 0.135 r.
    f = tar_weights(segment_frames(16, 4, batch=20000, generator=seeded()), 16)
    exact = sum(math.exp(-abs(g - 8)) for g in range(16)) / 16
    assert exact == pytest.approx(0.135, abs=5e-4) and f.mean().item() == pytest.approx(exact, abs=2e-3)


def test_lambda_zero_is_the_plain_mean():
    g, r = segment_frames(16, 4, batch=5, generator=seeded()), torch.rand(5, 4, generator=seeded())
    assert tar_weights(g, 16, 0).eq(1).all()
    torch.testing.assert_close(aggregate(r, tar_weights(g, 16, 0.0)), r.mean(dim=1))


def test_aggregate_is_eq_8():
    r = torch.rand(3, 4, generator=seeded(1), requires_grad=True)
    f = torch.rand(3, 4, generator=seeded(2))
    R = aggregate(r, f)
    for b in range(3):
        assert R[b].item() == pytest.approx(sum(f[b, i] * r[b, i] for i in range(4)).item() / 4)
    R.sum().backward()
    torch.testing.assert_close(r.grad, f / 4)
    # It would broadcast, and silently weigh every video alike.
    refused(r"scores \(3, 4\), weights \(4,\)", aggregate, r, f[0])


# --------------------------------------------------- Preprocessing ----------------------------------------------------

@pytest.mark.parametrize(("H", "W", "inside"), [
    (60, 60, (0, 28, 0, 28)),   # square: no bars
    (30, 60, (7, 21, 0, 28)),   # wide: bars above and below
    (60, 25, (0, 28, 8, 20)),   # tall: 25 * 28 / 60 = 11.67, so 12 columns
    (60, 24, (0, 28, 8, 19)),   # 11.2, so 11 columns; of the 17 black ones 8 are left
    (7, 14, (7, 21, 0, 28)),    # small pictures grow
    (14, 28, (7, 21, 0, 28)),   # nothing to resize, still bars (the package forgets them here)
])
def test_letterbox_geometry(H, W, inside):
    top, bottom, left, right = inside
    x = letterbox(torch.ones(1, 3, H, W), 28)
    assert x.shape == (1, 3, 28, 28)
    torch.testing.assert_close(x[..., top:bottom, left:right], torch.ones(1, 3, bottom - top, right - left))
    x[..., top:bottom, left:right] = 0
    assert (x == 0).all()  # the bars are black before CLIP's mean is subtracted


def test_letterbox_keeps_bicubic_overshoot():
    edge = torch.zeros(1, 3, 56, 56)
    edge[..., 27:] = 1
    x = letterbox(edge, 28)
    assert x.min() < -0.01 and x.max() > 1.01


def test_official_code_resizes_without_antialiasing():
    from torchvision.transforms import Resize
    x = random_frames(1, 2, 50, 50)[0]
    torch.testing.assert_close(stretch(x, 28), Resize(28, antialias=False)(x), rtol=0, atol=1e-6)
    assert stretch(random_frames(1, 2, 30, 50)[0], 28).shape == (2, 3, 28, 28)
    # The option reaches the score.
    frames, clip = random_frames(), tiny_clip()
    scores = HPSv2(clip, preprocess="instructvideo")(frames, CAPTIONS)
    image = clip.encode_image(clip_normalize(stretch(frames.flatten(0, 1), 28)), normalize=True)
    text = clip.encode_text(open_clip.tokenize(CAPTIONS), normalize=True)
    torch.testing.assert_close(scores, torch.einsum("bsd,bd->bs", image.unflatten(0, (2, 3)), text))
    assert (scores - HPSv2(clip)(frames, CAPTIONS)).abs().max() > 1e-4


def test_limit_stops_only_pixels_outside():
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1], requires_grad=True)
    y = limit(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0.5, 1, 1] and x.grad.tolist() == [0, 1, 1, 1, 0]


# -------------------------------- HPSv2 is the hpsv2 package's score, with a gradient ---------------------------------

@pytest.fixture(scope="module")
def package():
    """The hpsv2 package: its scoring module and its fork of open_clip."""
    filters = list(warnings.filters)
    img_score, fork = hps_package.import_hpsv2()
    assert warnings.filters == filters  # it mutes every UserWarning when imported; not ours
    assert getattr(sys.modules.get("turtle"), "forward", True)  # the stand-in is gone
    return img_score, fork


def package_clip(fork, clip):
    """The package's own model class with the weights of an open_clip one, and its preprocessing."""
    model = fork.CLIP(**CONFIG, output_dict=True).eval()
    model.load_state_dict(clip.state_dict())
    return model, fork.image_transform(model.visual.image_size, is_train=False, resize_longest_max=True)


@pytest.mark.parametrize(("H", "W"), [(40, 40), (30, 50), (50, 33), (28, 28), (20, 12)])
def test_package_preprocesses_alike(package, H, W):
    _, preprocess = package_clip(package[1], tiny_clip())
    pixels = torch.randint(256, (3, H, W), generator=seeded(), dtype=torch.uint8)
    theirs = preprocess(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    ours = clip_normalize(letterbox(pixels[None] / 255, 28))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("H", "W"), [(40, 40), (30, 50)])
def test_package_scores_and_pixel_gradients_alike(package, H, W):
    clip = tiny_clip()
    model, preprocess = package_clip(package[1], clip)
    x_theirs, x_ours = (random_frames(2, 3, H, W).requires_grad_() for _ in range(2))

    pictures = x_theirs.flatten(0, 1)
    for step in preprocess.transforms[2:]:  # the first two turn a PIL image into such a tensor
        pictures = torch.stack([step(x) for x in pictures])
    out = model(pictures, package[1].tokenize(CAPTIONS))
    theirs = torch.stack([out["image_features"][3 * b:3 * b + 3] @ out["text_features"][b] for b in range(2)])
    theirs.sum().backward()

    ours = HPSv2(clip)(x_ours, CAPTIONS)
    ours.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (x_ours.grad - x_theirs.grad).norm() < 1e-5 * x_theirs.grad.norm()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the package's way to write autocast
def test_official_score_through_the_bridge(package, monkeypatch, tmp_path):
    img_score, fork = package
    for module, name in ((img_score, "create_model_and_transforms"), (img_score.huggingface_hub, "hf_hub_download")):
        monkeypatch.setattr(module, name, mock.Mock(side_effect=AssertionError("this would download")))
    torch.save({"state_dict": tiny_clip(seed=3).state_dict()}, tmp_path / "weights.pt")
    hps = load_hpsv2(tmp_path / "weights.pt", clip_config=CONFIG)
    frames = torch.randint(256, (3, 3, 30, 44), generator=seeded(), dtype=torch.uint8)
    ours = hps((frames / 255)[None], CAPTIONS[:1])[0].tolist()

    score = hps_package.official_hps(hps.clip, CONFIG)
    assert score(frames, CAPTIONS[0]) == pytest.approx(ours, abs=1e-4)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in frames]
    assert score(frames, CAPTIONS[1]) != pytest.approx(ours, abs=1e-4)  # the caption counts
    assert img_score.model_dict == {}  # whoever calls the package later does not get our model

    # And the package reading the file by itself, into a model of other weights.
    model, preprocess = package_clip(fork, tiny_clip(seed=4))
    monkeypatch.setattr(img_score, "model_dict", {"model": model, "preprocess_val": preprocess})
    monkeypatch.setattr(img_score, "root_path", str(tmp_path))
    monkeypatch.setattr(img_score, "device", "cpu")  # on CUDA it would compute in float16
    theirs = img_score.score(pictures, CAPTIONS[0], cp=tmp_path / "weights.pt")
    assert [float(s) for s in theirs] == pytest.approx(ours, abs=1e-4)


# ------------------------------------------ HPSv2 as a differentiable reward ------------------------------------------

def test_pixel_gradient():
    frames = 0.1 + 0.8 * random_frames()
    frames[0, 0, :, :10] = -0.2
    frames[0, 0, :, 10:20] = 1.3
    frames.requires_grad_()
    HPSv2(tiny_clip())(frames, CAPTIONS).sum().backward()
    saturated = (frames < 0) | (frames > 1)
    assert frames.grad.isfinite().all()
    assert (frames.grad[saturated] == 0).all() and (frames.grad[~saturated] != 0).float().mean() > 0.999


def test_any_precision():
    clip = tiny_clip()
    exact = HPSv2(clip)(random_frames(), CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert HPSv2(clip)(random_frames(), CAPTIONS).dtype == torch.float32
    clip.visual.bfloat16()
    rough = HPSv2(clip)(random_frames().bfloat16(), CAPTIONS)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.02)
    # The tower's own rounding is all that is lost: its features are normalised and multiplied in float32.
    x = clip_normalize(letterbox(random_frames().bfloat16().float().flatten(0, 1), 28)).bfloat16()
    image = clip.encode_image(x).double().unflatten(0, (2, 3))
    text = clip.encode_text(open_clip.tokenize(CAPTIONS)).double()
    cosine = torch.einsum("bsd,bd->bs", image, text) / image.norm(dim=-1) / text.norm(dim=-1)[:, None]
    torch.testing.assert_close(rough.double(), cosine, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("what", "call"), [
    ("28 x 35 pictures", lambda: HPSv2(tiny_clip(image_size=(28, 35)))),
    (r"frames are torch.float32 \(2, 3, 40, 40\)", lambda: HPSv2(tiny_clip())(random_frames()[0, :2], CAPTIONS)),
    ("frames are torch.uint8", lambda: HPSv2(tiny_clip())(random_frames().byte(), CAPTIONS)),
    ("a list of 2, one per video", lambda: HPSv2(tiny_clip())(random_frames(), CAPTIONS[:1])),
    ("captions are 'ab'", lambda: HPSv2(tiny_clip())(random_frames(), "ab")),
])
def test_misuse_is_said_plainly(what, call):
    refused(what, call)


# ------------------------------------------ Text features are computed once -------------------------------------------

def count_texts(hps):
    hps.clip.encode_text = mock.Mock(wraps=hps.clip.encode_text)
    return lambda: hps.clip.encode_text.call_count


def test_text_is_encoded_once_per_caption():
    hps = HPSv2(tiny_clip())
    calls = count_texts(hps)
    hps(random_frames(), CAPTIONS)
    hps(random_frames(seed=1), CAPTIONS[::-1])
    hps(random_frames(), [CAPTIONS[0], CAPTIONS[0]])
    assert calls() == 2
    hps.clip.requires_grad_(True)  # even then, or a second backward pass would meet a graph that is gone
    assert not hps.text_features(["a third caption"]).requires_grad


def test_kept_text_is_never_of_other_weights():
    hps, frames = HPSv2(tiny_clip(seed=0)), random_frames()
    calls = count_texts(hps)
    first = hps(frames, CAPTIONS)
    hps.clip.load_state_dict(tiny_clip(seed=1).state_dict())  # loaded in place
    torch.testing.assert_close(hps(frames, CAPTIONS), HPSv2(tiny_clip(seed=1))(frames, CAPTIONS))
    assert calls() == 4 and (hps(frames, CAPTIONS) - first).abs().max() > 1e-3
    hps.double()  # cast
    hps(frames, CAPTIONS)
    assert calls() == 6


def test_text_features_do_not_depend_on_company_or_context():
    alone = HPSv2(tiny_clip()).text_features(CAPTIONS[1:])
    hps = HPSv2(tiny_clip())
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():  # an evaluation first ...
        together = hps.text_features(CAPTIONS)
    assert torch.equal(together[1:].clone(), alone)
    frames = random_frames().requires_grad_()
    hps(frames, CAPTIONS).sum().backward()  # ... then training, with the same features


def test_loaded_equals_built(tmp_path):
    weights = {k: v.half() for k, v in tiny_clip().state_dict().items()}  # as published
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    built = open_clip.CLIP(**CONFIG)
    built.load_state_dict(weights)
    state = torch.random.get_rng_state()
    hps = load_hpsv2(path, "v2.1", clip_config=CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
    # Everything: parameters, and the buffers that no file holds (the causal mask).
    for of in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(hps.clip, of)()), dict(getattr(built, of)())
        assert ours.keys() == theirs.keys() and len(theirs)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name].data, tensor.data, rtol=0, atol=0)
    torch.testing.assert_close(hps(random_frames(), CAPTIONS), HPSv2(built)(random_frames(), CAPTIONS))
    rough = load_hpsv2(path, "v2.1", torch.bfloat16, clip_config=CONFIG)
    assert rough.name == "HPSv2.1" and {p.dtype for p in rough.parameters()} == {torch.bfloat16}
