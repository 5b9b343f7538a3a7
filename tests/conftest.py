"""One thread for all tests and the processes they start: tensors here are too small to share, and waiting threads spin."""
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import support.threads  # noqa: E402, F401  as in every script
import json  # noqa: E402
import re  # noqa: E402
import runpy  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import imageio.v3 as iio  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import lora  # noqa: E402
import train  # noqa: E402
from formats.tensor_names import official_vae_names  # noqa: E402
from model import load_base  # noqa: E402
from reward import load_reward  # noqa: E402
from support import run as run_folder  # noqa: E402
from support.videos import write_video  # noqa: E402
from tiny import clips, world  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ONCE = {"draft": [], "refl": [], "vader": [], "ddpo": ["--updates", "1"], "rwr": ["--rounds", "1", "--videos", "4"],
        "dpo": ["--rounds", "1", "--pairs", "4"], "nft": ["--updates", "1", "--group", "2"],
        "adjoint": ["--steps-learned", "1"]}  # short runs by each method: what it samples is learned from once
JUDGED = {"watermark", "sharpness", "saturation", "noise", "colour", "shape", "direction", "static", "motion", "fidelity",
          "steadiness"}  # what the tiny world's judge measures
torch.set_num_threads(1)
GPU_TABLE = []  # of test_gpu.py: (what, as measured, as expected)


def pytest_configure(config):
    """Tests are of the CPU, on any machine, unless -m asks for those of a GPU; torch has not looked for one yet."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU here")


def pytest_terminal_summary(terminalreporter):
    """What a GPU was measured to do, to paste into an issue."""
    for row in [("check", "measured", "expected"), ("---",) * 3, *GPU_TABLE] if GPU_TABLE else ():
        terminalreporter.write_line(f"| {' | '.join(row)} |")


def pytest_collection_finish():
    """What is imported by now stays: imageio collects garbage after each file, which would look at all of it for 0.3 s."""
    gc.collect()
    gc.freeze()
    for name in ("kaiming_uniform_", "uniform_", "zeros_", "ones_"):  # on meta, where they took half the time of loading
        fill = getattr(torch.nn.init, name)
        setattr(torch.nn.init, name, lambda tensor, *args, fill=fill, **more: (
            tensor if tensor.is_meta else fill(tensor, *args, **more)))


def pytest_unconfigure():
    gc.unfreeze()  # or libraries would complain of leaks


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """A folder of its own to work in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def few_clips():
    """Six clips in the tiny world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "COUNT", 6)
        yield


@pytest.fixture(scope="module")
def short_clips(few_clips):
    """Of four frames: a run of two steps, with --frames 4, takes half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "FRAMES", 4)
        yield


@pytest.fixture
def plain(monkeypatch):
    """Without curves and clips, which take half of a short run's time; their files are there, empty."""
    monkeypatch.setattr(run_folder, "draw_curves", lambda lines, name, path, *watched: path.touch())
    monkeypatch.setattr(run_folder, "write_video", lambda path, video, fps: path.touch())
    monkeypatch.setattr(run_folder, "choose_comparisons", lambda prompts, rewards, files: [before.stat() for before, _ in files])
    monkeypatch.setattr(run_folder, "write_comparisons",
                        lambda path, *args: (path.touch(), path.with_suffix(".gif").touch()))


def run(*argv):
    """One run of train.py in this process; its exit status."""
    return train.main([*map(str, argv)])


def script(name, *argv):
    """A script as it starts from a shell, but in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [name, *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as end:
            return end.code
    return 0


def write_footage(count, folder=".", height=32, width=32):
    """Clips of a moving texture, nine frames at eight a second, and the list of them, clips.txt."""
    Path(folder).mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        texture = np.random.default_rng(i).integers(0, 255, (height, width + 9, 3), dtype=np.uint8)
        frames = np.stack([texture[:, k:k + width] for k in range(9)])
        iio.imwrite(Path(folder) / f"{i}.mp4", frames, plugin="pyav", codec="libx264", fps=8)
        lines.append(f"{i}.mp4|||a red circle moving {('left', 'right', 'up', 'down')[i % 4]}\n")
    Path("clips.txt").write_text("".join(lines))


def write_noise(path, frames=6, height=32, width=32, fps=8, seed=0):
    """A clip of random pixels; returns them, (F, H, W, 3)."""
    pixels = torch.randint(255, (frames, height, width, 3), generator=seeded(seed), dtype=torch.uint8).numpy()
    write_video(Path(path), pixels, fps)
    return pixels


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A folder with two clips, two pictures and lists of them, in which runs of every base start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("animals"))
        for i, name in enumerate(("cat", "dog")):
            pixels = write_noise(f"{name}.mp4", 30, 32, 48, 24, seed=i)
            iio.imwrite(f"{name}.png", pixels[0])
        Path("clips.txt").write_text("cat.mp4|||a cat\ndog.mp4|||a dog\n")
        Path("prompts.txt").write_text("cat.png|||a cat\ndog.png|||a dog\n")
        Path("words.txt").write_text("a cat\n")
        yield


def contents(folder):
    """{path: bytes} of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message, call, *args, **settings):
    """The line in which a call's ValueError says what was wrong; it matches the message."""
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **settings)
    assert str(error.value).isprintable()  # and so one line
    return str(error.value)


def write_file(path, content, **settings):
    """A file of what its content and its name say; settings are torch.save's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".json":
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    elif path.suffix == ".safetensors":
        save_file({name: t.contiguous() for name, t in content.items()}, path)
    else:
        torch.save(content, path, **settings)
    return path


def vae_to_official(tensors, config):
    """An autoencoder's tensors under Stable Diffusion's names, where the attention's projections are 1x1 convolutions."""
    official = {}
    for ours, theirs in official_vae_names(config, tensors).items():
        flat = theirs.endswith(("attn_1.q.weight", "attn_1.k.weight", "attn_1.v.weight", "attn_1.proj_out.weight"))
        official[theirs] = tensors[ours][:, :, None, None] if flat else tensors[ours]
    return official


def seeded(seed=0):
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


randn32 = partial(randn, dtype=torch.float32)


def assert_near(ours, theirs, share=1e-4):
    """Equal but for rounding, of the largest value."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=share * theirs.abs().max().item())


def apart(a, b):
    """How far, as a share of b; not a number where both are 0."""
    return ((a - b).norm() / b.norm()).item()


def built(make, seed=0):
    """A module with seeded weights, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval().requires_grad_(False)


def tuned_base(std=.1, dtype=torch.float32):
    """The tiny base with adapters that change what it does."""
    base, generator = load_base("tiny", dtype=dtype), seeded()
    lora.inject(base.network, 4, generator=generator)
    with torch.no_grad():
        for layer in lora.layers(base.network).values():
            layer.lora_B.normal_(std=std, generator=generator)
    return base


def random_base(name, noise=0.):
    """A small base with noise on every weight: as initialised, many parts do little, or the same to all."""
    base = load_base(f"random-{name}")
    with torch.no_grad():
        for i, (path, p) in enumerate(base.network.named_parameters()):
            if path != "rope.freqs":
                p.add_(noise * randn32(*p.shape, seed=i))
    return base


def adapted(base, rank=4, alpha=8., letters="qkvo"):
    """A base with adapters that change what it does."""
    lora.inject(base.network, rank, alpha, None, letters)
    with torch.no_grad():
        for i, layer in enumerate(lora.layers(base.network).values()):
            layer.lora_B.copy_(.3 * randn32(*layer.lora_B.shape, seed=i))
    return base


@pytest.fixture(scope="module")
def parts():
    """(base with adapters that do something, reward, the empty caption's features)."""
    base = tuned_base(.05)
    return base, load_reward(base_folder=base.folder), base.encode_text([""])


def letters(captions):
    """A tokenizer: letters, padded to 9 tokens."""
    return torch.tensor([[1, *(2 + ord(c) % 30 for c in caption[:7]), 33, *[0] * 7][:9] for caption in captions])


CAPTIONS = ["a red circle moving left", "a green square moving up"]


def inputs(base, seed=0):
    """(noise, text, g, captions) of two videos of four frames."""
    noise = torch.randn(2, 4, 4, *base.latent_shape(4, 32, 32)[2:], generator=seeded(seed))
    return noise, base.encode_text(CAPTIONS), torch.tensor([[0, 3], [1, 2]]), CAPTIONS


def gradient(base, R):
    """Gradient of R's sum in the adapters, as one vector."""
    return torch.cat([p.flatten() for p in torch.autograd.grad(R.sum(), lora.parameters(base.network))])


def write_adapter(path):
    """A file with the adapters of tuned_base."""
    lora.save(tuned_base().network, path, base="tiny")
    return path


def docs_example(page, words):
    """The lines of Python on a page of docs/ that have these words."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    example, = [lines for lines in blocks if words in lines]
    return example


def metrics(folder):
    """The lines of metrics.jsonl but for the time they took; of a run that goes on, the last one may be half written."""
    path = Path(folder) / "metrics.jsonl"
    *whole, _ = path.read_text().split("\n") if path.exists() else [""]
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in whole]


def listing(folder="."):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def same_tensors(a, b):
    """Whether two files hold the same tensors, bit for bit."""
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def assert_same_run(a, b):
    """Bit for bit, but for the time it took and where it lies."""
    assert metrics(a) == metrics(b)
    assert listing(a) == listing(b)
    for path in Path(b).glob("*.safetensors"):
        assert same_tensors(Path(a) / path.name, path), path.name
    if (Path(b) / "rewards.jsonl").is_file():  # DDPO's
        assert (Path(a) / "rewards.jsonl").read_text() == (Path(b) / "rewards.jsonl").read_text()


def assert_nearly_same_run(a, b, bound=1e-5):
    """As two ranks leave it, which add up in another order."""
    x, y = (load_file(Path(folder) / "lora.safetensors") for folder in (a, b))
    torch.testing.assert_close(x, y, atol=bound, rtol=0)
    assert max(t.abs().max() for t in y.values()) > bound
    for one, two in zip(metrics(a), metrics(b), strict=True):
        for name, measures in one.pop("eval", {}).items():
            assert measures == pytest.approx(two["eval"][name], abs=1e-5)
        two.pop("eval", None)
        assert one == pytest.approx(two, abs=1e-5)
