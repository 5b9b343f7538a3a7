"""data.py, on clips made here: frame i of a `grey` clip is a flat image whose level tells i."""
import os
import struct
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from bases.modelscope import Base
from data import ClipConfig, LatentDataset, batch_indices, encode_clips, epoch_order
from formats.word_tokenizer import WordTokenizer
from model import sample_posterior
from support import clips as clip_lists, ranks as processes
from support.clips import Clip, read_list, read_prompts, report_long
from support.ranks import sample_generator
from support.videos import is_even, plan_windows, read_all_windows, read_clip, read_windows
from tests.conftest import refused

SMALL = ClipConfig(num_frames=4, height=16, width=16, starts=3)


def write(path, images, fps=8, codec="libx264", pix_fmt="yuv420p", times=None, aspect=None, curve=2, **options):
    """images: (H, W, 3) uint8 arrays; times: of each in milliseconds; aspect: of a pixel; curve: FFmpeg's color_trc."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        stream.codec_context.color_trc = curve
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source, target, change):
    """Copy packets into another file, each as `change` leaves it; None leaves it out."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            changed = change(packet) if packet.size else None
            if changed:
                changed.stream = stream
                new.mux(changed)
    return target


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(container.streams.video[0]) if packet.size]


def window(path, config, start):
    """The window that begins with this frame, (F, 3, H, W) in [-1, 1]."""
    return read_windows(path, replace(config, starts=10**4))[0][start].float() / 127.5 - 1


def grey(path, n=40, fps=8, height=32, width=32, step=4, first=10, **options):
    return write(path, [np.full((height, width, 3), first + step * i, np.uint8) for i in range(n)], fps, **options)


def indices(frames, step=4, first=10):
    """(F, 3, H, W) in [-1, 1] -> which frame of a grey clip each one is. Compression moves levels by less than half a step."""
    level = (frames + 1) * 127.5
    assert (level.amax((1, 2, 3)) - level.amin((1, 2, 3))).max() <= 2, "the frames of a grey clip are flat"
    return ((level.mean((1, 2, 3)) - first) / step).round().int().tolist()


def noisy(path, n=40, fps=8, height=64, width=96, seed=0):
    """A clip with detail, so that its file is large enough to be damaged inside."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 255, (height + 8, width + n, 3), dtype=np.uint8)
    return write(path, [texture[4:4 + height, i:i + width].copy() for i in range(n)], fps, g=8)


def holed(path):
    """A noisy clip whose file has 4000 bytes of nothing in its middle."""
    whole = noisy(path).read_bytes()
    hole = len(whole) // 2
    path.write_bytes(whole[:hole] + bytes(4000) + whole[hole + 4000:])
    return path


# ----------------------------------------------- Lists of clips -----------------------------------------------

def test_the_official_form(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa/1.mp4|||  a cat walking \r\n\r\n2.mp4|||snail|||16\n".encode()
                     + b'/abs/3.mp4|||a, "quoted" | bar\n  \n')
    assert read_list(path) == [
        Clip(tmp_path / "a/1.mp4", "a cat walking"),
        Clip(tmp_path / "2.mp4", "snail"),
        Clip(Path("/abs/3.mp4"), 'a, "quoted" | bar'),
    ]
    assert read_list(path, root=tmp_path / "videos")[0].path == tmp_path / "videos/a/1.mp4"


def test_csv_and_jsonl_say_the_same(tmp_path):
    expected = [Clip(tmp_path / "1.mp4", "a dog, running"), Clip(tmp_path / "2.mp4", 'the "best" café')]
    table, lines = tmp_path / "list.csv", tmp_path / "list.JSONL"
    table.write_bytes(('\ufeffid,caption,path,num_frames\r\n7,"a dog, running",1.mp4,\r\n\r\n'
                       '8, "the ""best"" café",2.mp4,16\r\n').encode())
    lines.write_text('{"path": "1.mp4", "caption": " a dog, running "}\r\n\r\n'
                     '{"caption": "the \\"best\\" caf\\u00e9", "path": "2.mp4", "num_frames": 16, "id": 8}', encoding="utf-8")
    assert read_list(table) == read_list(lines) == expected
    text = 'path, caption\n1.mp4, "a dog,\n  then, two"\n\n'
    table.write_text(text)
    assert read_list(table) == [Clip(tmp_path / "1.mp4", "a dog,\nthen, two")]
    table.write_text(text + '2.mp4,"no end\n3.mp4,c\n')
    refused(r"list\.csv, line 5: unexpected end of data", read_list, table)


def test_prompts_end_with_their_line_and_nothing_else(tmp_path):
    path = tmp_path / "prompts.txt"
    text = ("\ufeff# balls\na red ball\u2028rolls\r\n  #a comment\nwait\x85 what\n\n \\#1 fan \none\x0cpage\rtwo\n"
            "1.mp4|||a cat|||16\n2.mp4|||\\#2")
    path.write_bytes(text.encode())
    prompts = ["a red ball\u2028rolls", "wait\x85 what", "#1 fan", "one\x0cpage\rtwo", "a cat", "#2"]
    assert read_prompts(path) == prompts


def test_captions_that_are_too_long_are_said_once(capsys):
    tower = SimpleNamespace(tokenizer=WordTokenizer(["a", "bear"], 5), config=SimpleNamespace(context_length=5))
    for _ in range(2):
        report_long(["a bear a", "a bear a bear", "a a a a", "a a a a"], Base(None, None, tower, "small"))
    said = capsys.readouterr().out
    assert said == "2 caption(s) longer than the text encoder reads, their ends are not seen; the first: 'a bear a bear'\n"


def test_a_folder_of_clips_with_captions(tmp_path, capsys):
    """Links to folders are followed, a loop ends; what has not the name of a video is named."""
    data, disk = tmp_path / "data", tmp_path / "disk"
    names = ["data/a.mp4", "data/a.gif", "data/sub/b.M4V", "data/notes.md", "data/c.mpeg4", "data/.cache/x.mp4", "data/._b.mp4",
             "disk/d.ts", "disk/more/e.wmv", "disk/.f.mp4"]
    for name in names:  # a.gif is the same video once more, as generate.py --gif writes it
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").write_text(f"\ufeffcaption of {name}\n", encoding="utf-8")
    for link, target in (("data/linked", disk), ("data/sub/loop", data), ("disk/more/back", disk), ("data/g.flv", disk / "d.ts")):
        (tmp_path / link).symlink_to(target)
    (data / "a.txt").write_text("a cat\n")
    expected = {"a.mp4": "a cat", "g.flv": "", "linked/d.ts": "caption of disk/d.ts",
                "linked/more/e.wmv": "caption of disk/more/e.wmv", "sub/b.M4V": "caption of data/sub/b.M4V"}
    for _ in range(2):  # a clip without a caption is named and left out later, with others like it
        assert [(str(clip.path.relative_to(data)), clip.caption) for clip in read_list(data)] == list(expected.items())
    out = capsys.readouterr().out
    assert out.count("2 file(s) without the name of a video left out") == 1 and "c.mpeg4" in out and "notes.md" in out


def test_clips_without_a_caption_are_named_and_left_out_all_of_them(tmp_path, capsys):
    for i in range(5):
        grey(tmp_path / f"{i}.mp4", n=8)
    for name, text in (("list.txt", "0.mp4|||a\n1.mp4|||\n2.mp4||| \n3.mp4|||b\n4.mp4|||c\n3.mp4|||\n"),
                       ("list.csv", "path,caption\n0.mp4,a\n1.mp4,\n2.mp4,\" \"\n3.mp4,b\n4.mp4,c\n3.mp4,\n")):
        (tmp_path / name).write_text(text)
        listed = read_list(tmp_path / name)
        refused(r"3 of 6 clips cannot be used.*1\.mp4: no caption", make, listed, None)
        dataset, encoders = make(listed, None, max_skip=0.5)
        out = capsys.readouterr().out
        assert all(f"left out: {tmp_path / f'{i}.mp4'}: no caption" in out for i in (1, 2, 3)) and "3 of 6 clips" in out
        assert dataset.captions == ["a", "b", "c"] and encoders.frames == 3 * 3 * 4, "what is left out is not encoded"
    (tmp_path / "list.jsonl").write_text('{"path": "0.mp4"}\n{"path": "1.mp4", "caption": " "}')
    assert [clip.caption for clip in read_list(tmp_path / "list.jsonl")] == ["", ""]


@pytest.mark.parametrize("name, text, message", [
    ("a.txt", "1.mp4|||cat\n2.mp4 a dog\n", r"a\.txt, line 2: 1 field.*Allowed: one relative/path\.mp4\|\|\|caption"),
    ("a.txt", "\n\n|||cat|||16\n", "line 3: clip '' has caption 'cat': must be a path and a text"),
    ("a.txt", "\n \n", r"a\.txt: an empty list\. Allowed"),
    ("a.txt", b"\xff\xfe\x00garbage", r"a\.txt: not a text file in UTF-8"),
    ("a.csv", "path,caption\n1.mp4,a cat, sitting\n", r"a\.csv, line 2: 3 field.*quotes"),
    ("a.csv", "file,text\n1.mp4,a cat\n", r"line 1: columns file, text.*Allowed: a first line naming"),
    ("a.jsonl", '{"path": "1.mp4", "caption": "cat"}\n{"path": \n', r"a\.jsonl, line 2: .*Allowed"),
    ("a.jsonl", '["1.mp4", "cat"]\n', "line 1: no path and caption"),
    ("a.jsonl", '{"path": "1.mp4", "caption": ["cat"]}\n', r"clip '1\.mp4' has caption \['cat'\]"),
])
def test_a_malformed_list_names_the_line_and_what_is_allowed(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(message, read_list, path)
    refused("nowhere: not a text file", read_list, tmp_path / "nowhere")
    path.unlink()
    refused(r"no clips in this folder\. Allowed: \.mp4", read_list, tmp_path)


# ----------------------------------------------- Frames of a clip -----------------------------------------------

NTSC = Fraction(30000, 1001)


@pytest.mark.parametrize("fps, stride", [(4, 1), (8, 1), (16, 2), (20, 2), (24, 3), (25, 3), (NTSC, 4), (30, 4)])
def test_eight_frames_a_second_by_stride(tmp_path, fps, stride):
    path = grey(tmp_path / "a.mp4", n=50, fps=fps)
    assert indices(read_clip(path, SMALL)) == [0, stride, 2 * stride, 3 * stride]
    assert indices(window(path, SMALL, 7)) == [7, 7 + stride, 7 + 2 * stride, 7 + 3 * stride]
    assert indices(read_clip(path, replace(SMALL, fps=2)))[1] == max(1, round(fps / 2)), "another rate can be asked for"
    last = 49 - 3 * stride
    assert indices(window(path, SMALL, last))[-1] == 49  # the very last frame is within reach


@pytest.mark.parametrize("name, options", [("a.mp4", {"bf": 2}), ("a.webm", {"codec": "libvpx"}), ("a.mkv", {"codec": "ffv1"})])
def test_a_variable_rate_is_read_by_time(tmp_path, name, options):
    """Half a second at 40 frames a second, then 5 a second. WebM's header has no mean rate."""
    times = [*range(0, 500, 25), *range(500, 3000, 200)]
    path = grey(tmp_path / name, n=len(times), fps=40, step=7, times=times, **options)
    assert indices(read_clip(path, SMALL), 7) == [0, 5, 10, 15]          # every 125 ms
    assert indices(window(path, SMALL, 10), 7) == [10, 15, 20, 21]  # from 250 ms on: 375, 500, and 625 is next to 700
    assert indices(window(path, SMALL, 20), 7) == [20, 21, 21, 22]  # from 500 ms on: 625, 750, 875
    assert times[plan_windows(path, SMALL)[0][-1, 0]] == 2500, "2500 + 375 ms are before the last frame's 2900"
    long = replace(SMALL, num_frames=16, fps=.1)
    refused(r"too short: 16 frames at 0\.1 a second need .* at its .* found", plan_windows, path, long)


def test_rounded_times_and_those_of_gifs_are_still_one_rate(tmp_path):
    assert is_even([33, 66, 100, 133, 167], 1000 / 30) and is_even([None, None], 1) and is_even([5], 1) and is_even([], 1)
    assert not is_even([0, 1, 2, 3, 8], 1) and not is_even([0, 2, 4, 6], 1), "a pause; half the rate that the header has"
    for fps in (8, 15, 20, 24, 30):
        path = grey(tmp_path / "a.gif", n=20, fps=fps, codec="gif", pix_fmt="rgb8")
        numbers, even = plan_windows(path, SMALL)
        assert even and numbers[0].tolist() == [i * max(1, round(fps / 8)) for i in range(4)]


@pytest.mark.parametrize("name, options", [
    ("vp9.webm", {"codec": "libvpx-vp9"}), ("a.avi", {"codec": "mpeg4", "b": 10**6}), ("b_frames.mp4", {"bf": 3, "g": 5}),
    ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}), ("one_channel.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
    ("full_range.mp4", {"pix_fmt": "yuvj420p"}), ("ten_bits.mkv", {"codec": "ffv1", "pix_fmt": "yuv420p10le"})])
def test_formats_read_alike(tmp_path, name, options):
    path = grey(tmp_path / name, n=13, fps=25, step=16, first=20, **options)
    assert [clip.path for clip in read_list(tmp_path)] == [path]
    frames = window(path, SMALL, 3)
    assert frames.shape == (4, 3, 16, 16) and frames.dtype == torch.float32
    level = (frames + 1) * 127.5
    tolerance = 20 if name == "a.gif" else 6  # 256 fixed colours against a grey scale
    assert torch.allclose(level.mean((1, 2, 3)), torch.tensor([68.0, 116, 164, 212]), atol=tolerance)


def ends(height, width, axis):
    """Grey in the middle square, white where a centre crop cuts."""
    image = np.full((height, width, 3), 255, np.uint8)
    size, margin = min(height, width), abs(height - width) // 2
    image[(slice(margin, margin + size), slice(None))[::1 if axis == 0 else -1]] = 60
    return image


@pytest.mark.parametrize("height, width", [(64, 64), (64, 128), (128, 64), (48, 202), (16, 32), (10, 20)])
def test_the_shortest_side_is_resized_and_the_centre_kept(tmp_path, height, width):
    image = ends(height, width, axis=0 if height > width else 1)
    path = write(tmp_path / "a.mkv", [image] * 4, codec="ffv1", pix_fmt="yuv444p")
    level = (read_clip(path, SMALL) + 1) * 127.5  # larger and smaller than the 16 x 16 asked for
    assert level.shape == (4, 3, 16, 16)
    assert torch.allclose(level[..., 2:-2, 2:-2], torch.tensor(60.0), atol=3)  # the grey square fills it


def test_a_frame_that_is_not_square(tmp_path):
    image = np.zeros((60, 60, 3), np.uint8)
    image[:30], image[30:] = (200, 0, 0), (0, 0, 200)  # red above blue
    path = write(tmp_path / "a.mkv", [image] * 4, codec="ffv1", pix_fmt="yuv444p")
    frames = read_clip(path, ClipConfig(num_frames=4, height=12, width=24))
    assert frames.shape == (4, 3, 12, 24)
    assert frames[0, :, 2, 12].argmax() == 0 and frames[0, :, 9, 12].argmax() == 2, "RGB, rows before columns"


def test_resizing_averages_what_it_leaves_out(tmp_path):
    """Stripes two pixels wide, four times smaller, are grey. Without antialiasing, every pixel would hit the same stripe."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 1::4] = image[:, 2::4] = 255
    path = write(tmp_path / "a.mkv", [image] * 4, codec="ffv1", pix_fmt="yuv444p")
    assert read_clip(path, SMALL)[..., 1:-1, 1:-1].abs().max() < 0.05


def set_matrix(path, a, b, c, d):
    """Write a display matrix, x' = a x + c y, y' = b x + d y, into an mp4's track header, which has it in 16.16 fixed point."""
    content = path.read_bytes()
    at = content.index(struct.pack(">5i", 65536, 0, 0, 0, 65536), content.index(b"tkhd"))
    matrix = struct.pack(">5i", a * 65536, b * 65536, 0, c * 65536, d * 65536)
    path.write_bytes(content[:at] + matrix + content[at + 20:])


@pytest.mark.parametrize("a, b, c, d", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),    # turned clockwise
                                        (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])  # mirrored
def test_a_clip_is_read_as_a_player_shows_it(tmp_path, a, b, c, d):
    levels = {(-1, -1): 40, (1, -1): 100, (-1, 1): 160, (1, 1): 220}  # of the corner at this x and y from the middle
    image = np.zeros((64, 64, 3), np.uint8)
    for (x, y), level in levels.items():
        image[32 * (y > 0):32 * (y > 0) + 32, 32 * (x > 0):32 * (x > 0) + 32] = level
    path = write(tmp_path / "a.mp4", [image] * 4)
    if a != 1 or d != 1:
        set_matrix(path, a, b, c, d)
    frame = (read_clip(path, SMALL)[0] + 1) * 127.5
    for (x, y), level in levels.items():
        column, row = (12 if place > 0 else 3 for place in (a * x + c * y, b * x + d * y))
        assert abs(frame[:, row, column].mean() - level) < 6, (x, y)


@pytest.mark.parametrize("name, options", [("a.mp4", {}), ("a.avi", {"codec": "mpeg4", "b": 10**6})])
def test_pixels_become_square(tmp_path, name, options):
    """16 columns of pixels twice as wide as high are a square: its upper quarter, which a crop would cut, is bright."""
    image = np.full((32, 16, 3), 40, np.uint8)
    image[:8] = 220
    path = write(tmp_path / name, [image] * 4, aspect=Fraction(2), **options)
    frame = read_clip(path, SMALL)[0]
    assert frame[:, :3].min() > .5 and frame[:, 5:].max() < -.5
    if name == "a.mp4":
        set_matrix(path, 0, 1, -1, 0)
        frame = read_clip(path, SMALL)[0]
        assert frame[:, :, 13:].min() > .5 and frame[:, :, :11].max() < -.5, "turned, the same on the right"


@pytest.mark.parametrize("curve, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_named(tmp_path, curve, name):
    path = grey(tmp_path / "hdr.mp4", n=8, curve=curve)
    refused(rf"hdr\.mp4: cannot be read: HDR \({name}\)", read_clip, path, SMALL)


def test_a_cover_picture_is_not_the_video(tmp_path):
    video, path = grey(tmp_path / "video.mp4", n=8), tmp_path / "covered.mp4"
    with av.open(str(video)) as old, av.open(str(path), "w") as new:
        stream, cover = new.add_stream_from_template(old.streams.video[0]), new.add_stream("mjpeg")
        cover.height, cover.width, cover.pix_fmt, cover.disposition = 32, 32, "yuvj420p", av.stream.Disposition.attached_pic.value
        new.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    # Our writer puts the cover last. Move its box ("udta") before the track's, which makes it the first stream.
    content = path.read_bytes()
    track, cover = content.index(b"trak") - 4, content.index(b"udta") - 4
    size = int.from_bytes(content[cover:cover + 4], "big")
    path.write_bytes(content[:track] + content[cover:cover + size] + content[track:cover] + content[cover + size:])
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    assert indices(window(path, SMALL, 4)) == [4, 5, 6, 7]


def test_frames_that_are_not_to_be_shown_are_no_error(tmp_path):
    """A cut without encoding begins at a key frame that frames shown before it refer to; their other references are gone."""
    groups = "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0:b-adapt=0"
    path = grey(tmp_path / "whole.mp4", n=40, **{"x264-params": groups})
    second = [number for number, packet in enumerate(packets_of(path)) if packet.is_keyframe][1]
    first = packets_of(path)[second]
    count = iter(range(100))

    def cut(packet):
        packet.pts, packet.dts = packet.pts - first.pts, packet.dts - first.pts
        return packet if next(count) >= second else None
    cut_path = remux(path, tmp_path / "cut.mp4", cut)
    assert any(packet.is_discard for packet in packets_of(cut_path))
    shown_first = round(first.pts * first.time_base * 8)
    assert indices(read_clip(cut_path, SMALL)) == list(range(shown_first, shown_first + 4))


def test_no_frame_is_ever_made_up(tmp_path):
    """Garbage, nothing, sound only, a lost index, a hole inside: an error naming the clip. Black or repeated frames: never."""
    whole = noisy(tmp_path / "whole.mp4").read_bytes()
    assert window(tmp_path / "whole.mp4", SMALL, 36).shape == (4, 3, 16, 16)
    broken = {"garbage.mp4": os.urandom(5000), "empty.mp4": b"", "text.mp4": b"404 not found", "cut.mp4": whole[:len(whole) // 2],
              "hole.mp4": holed(tmp_path / "hole.mp4").read_bytes()}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        refused(f"{name}: cannot be read", window, tmp_path / name, SMALL, 36)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    refused(r"sound\.mp4: cannot be read: no video", read_clip, tmp_path / "sound.mp4", SMALL)
    refused(r"nowhere\.mp4: cannot be read: no such file", read_clip, tmp_path / "nowhere.mp4", SMALL)


def test_a_truncated_clip_is_as_long_as_what_is_left(tmp_path):
    """A file that can be read without its end, which is longer by its header than it is."""
    whole = noisy(tmp_path / "whole.avi", n=40).read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[:len(whole) // 2])
    numbers, even = plan_windows(cut, SMALL)
    assert even and 10 < len(numbers) < 30
    assert window(cut, SMALL, -1).shape[0] == 4
    refused("too short: .* found", read_clip, cut, replace(SMALL, num_frames=40))


@pytest.mark.parametrize("hidden, order, windows", [
    ((11, 12), range(11), None),
    ((3, 4, 5), None, [[0, 1, 2, 2], [1, 2, 2, 2], [2, 2, 2, 6], *([i, i + 1, i + 2, i + 3] for i in range(6, 10))]),  # by time
    ((5,), [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12], None)])
def test_packets_that_show_nothing_are_not_counted_on(tmp_path, hidden, order, windows):
    """Two-pass VP8 has such packets, by a bit of the first byte: at the end, in place of frames, and a millisecond after one."""
    path = grey(tmp_path / "whole.webm", n=13, step=16, codec="libvpx")
    numbers = iter(range(13))

    def hide(packet):
        number, changed = next(numbers), packet
        if number in hidden:
            changed = av.Packet(bytes([bytes(packet)[0] & ~16]) + bytes(packet)[1:])
            changed.time_base = packet.time_base
        moved = (hidden == (5,) and number >= 5) * 125
        changed.pts = changed.dts = 125 * number - moved + (moved > 0 and number == 5)
        return changed
    remux(path, tmp_path / "hidden.webm", hide)
    if hidden == (5,):
        assert len(plan_windows(tmp_path / "hidden.webm", SMALL)[0]) == 9, "before anything is missed"
    read = read_windows(tmp_path / "hidden.webm", replace(SMALL, starts=100))[0].float() / 127.5 - 1
    assert [indices(window, 16) for window in read] == (windows or [list(order[k:k + 4]) for k in range(len(order) - 3)])


def test_clips_that_are_left_out_are_named(tmp_path, capsys):
    clips = 8 * [Clip(grey(tmp_path / "good.mp4", n=8), "grey")]
    (tmp_path / "garbage.mp4").write_bytes(os.urandom(500))
    bad = [Clip(tmp_path / "garbage.mp4", "x"), Clip(grey(tmp_path / "short.mp4", n=9, fps=25), "y")]
    mixed = clips[:3] + bad + clips[3:]
    assert make(mixed, None, max_skip=0.2)[0].captions == ["grey"] * 8
    out = capsys.readouterr().out
    assert "left out: " in out and "garbage.mp4: cannot be read" in out and "8 of 10 clips can be used" in out
    assert "short.mp4: too short: 4 frames at 8 a second need 10 at its 25 a second, found 9\n" in out
    refused(r"2 of 10 clips cannot be used; at most 10% may, and not all.*--max-skip.*garbage\.mp4", make, mixed, None)
    refused("2 of 2 clips cannot be used", make, bad, None, max_skip=1.0)  # whatever the share, nothing is not enough
    worst = [*bad, Clip(tmp_path / "more.mp4", "z"), *clips[:1]]
    grey(worst[2].path, n=50)
    encoders = Encoders()
    encoders.fingerprints = lambda: ("vae", "text")
    refused("1 of 4 clips cannot be used", encode_clips, worst, SMALL, encoders)
    assert not encoders.frames, "it ends at the first one that is too many"


def test_settings_must_be_above_zero_and_parts_equally_many():
    refused("equally many", LatentDataset, torch.zeros(2, 1), torch.zeros(2, 1), ["a"])
    for name, wrong in (("num_frames", 0), ("fps", float("nan")), ("height", -1), ("starts", 0)):
        refused(f"{name} = .*: must be a finite number above 0", ClipConfig, **{name: wrong})


# ------------------------------------------- Which clips, which noise -------------------------------------------

def test_an_epoch_is_a_shuffle_of_its_own():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len(set(orders)) == 4 and tuple(range(100)) not in orders
    assert epoch_order(100, 0, 0) == orders[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_that_one_rank_would_have(world_size):
    for step in range(20):
        parts = [batch_indices(step, 8, 21, 3, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {8 // world_size}
        assert [pair for part in parts for pair in part] == batch_indices(step, 8, 21, 3)
        assert [position for part in parts for position, _ in part] == list(range(8))


def test_an_epoch_meets_every_clip_once_and_batches_run_on_into_the_next():
    stream = [index for step in range(21) for rank in range(2) for _, index in batch_indices(step, 8, 21, 3, rank, 2)]
    for epoch in range(8):  # 21 steps of 8 are 8 epochs of 21
        assert tuple(stream[epoch * 21:(epoch + 1) * 21]) == epoch_order(21, 3, epoch)
    assert len(batch_indices(0, 8, 3, 0)) == 8  # even where a batch is longer than an epoch
    for batch_size, ranks in ((3, 2), (0, 1), (1, 2)):
        refused("must be a multiple of the number of ranks", batch_indices, 0, batch_size, 21, 3, 0, ranks)


def test_randomness_belongs_to_the_sample():
    before = torch.get_rng_state()
    keys = (0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 12), (0, 1, "2")
    noise = {key: torch.randn(1000, generator=sample_generator(*key)) for key in keys}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise[0, 1, 2], torch.randn(1000, generator=sample_generator(0, 1, 2)))
    values = torch.stack(list(noise.values()))
    assert (torch.corrcoef(values) - torch.eye(5)).abs().max() < 0.15


# ---------------------------------------- Latents and text, computed once ----------------------------------------

class Encoders:
    """Stand-ins with a memory: moments whose mean is the frame shrunk by 4, and texts filled with the caption's length."""
    def __init__(self):
        self.frames, self.texts = 0, []

    def encode(self, frames):
        self.frames += len(frames)
        mean = torch.nn.functional.avg_pool2d(frames, 4)
        return torch.cat([mean, mean * 0 - 40], dim=1).transpose(0, 1)[None]  # (1, 6, F, h, w)

    def is_cut(self, caption):
        return False

    def encode_captions(self, captions):
        self.texts += captions
        return torch.stack([torch.full((5, 7), float(len(caption))) for caption in captions])


def make(clips, cache_dir, config=SMALL, vae_name="vae", text_name="text", **options):
    encoders = Encoders()
    encoders.fingerprints = lambda: (vae_name, text_name)
    return encode_clips(clips, config, encoders, cache_dir, **options), encoders


def contents(dataset):
    return [(dataset.moments[i][:], dataset.text[i][:], dataset.captions[i]) for i in range(len(dataset))]


def same(a, b):
    return [x[2] for x in a] == [y[2] for y in b] and all(
        torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in (0, 1))


@pytest.fixture
def clips(tmp_path):
    paths = [grey(tmp_path / f"{i}.mp4", n=10 + 3 * i, fps=fps, height=32 + 8 * i) for i, fps in enumerate((8, 8, 16, 20))]
    return [Clip(path, "grey" if i < 3 else "a grey wall") for i, path in enumerate(paths)]


@pytest.mark.parametrize("cached", [True, False])
def test_a_dataset_holds_windows_text_and_caption(tmp_path, clips, cached):
    short = [Clip(grey(tmp_path / f"{n}.mp4", n=n), "x") for n in (4, 5)]
    assert [len(windows) for windows in make(short, None)[0].moments] == [1, 2], "a start is used once"
    dataset, encoders = make(clips + clips[:1], tmp_path / "cache" if cached else None)
    assert len(dataset) == 5 and dataset.captions[3:] == ["a grey wall", "grey"]
    assert encoders.frames == 4 * 3 * 4 and encoders.texts == ["grey", "a grey wall"], "a clip or caption twice is encoded once"
    starts = []
    for i, (last, stride) in enumerate(((6, 1), (9, 1), (9, 2), (12, 2))):
        for k, start in enumerate((0, round(last / 2), last)):  # evenly, from the first possible to the last
            window = dataset.moments[i][k]
            assert window.shape == (6, 4, 4, 4)
            assert indices(window[:3].transpose(0, 1)) == [start + j * stride for j in range(4)]
        moments, text, caption = dataset.get(i, sample_generator(0, i))
        starts += [indices(moments[:3].transpose(0, 1))[0]]
        assert text.shape == (5, 7) and text[0, 0] == len(caption)
        assert torch.equal(moments, dataset.get(i, sample_generator(0, i))[0])
    assert torch.equal(dataset.get(0)[0], dataset.moments[0][0])
    drawn = {indices(dataset.get(0, sample_generator(1, j))[0][:3].transpose(0, 1))[0] for j in range(20)}
    assert drawn == {0, 3, 6}, "every window comes up"


def test_what_is_cached_is_not_encoded_and_what_changes_is(tmp_path, clips):
    cache = tmp_path / "cache"
    first, _ = make(clips, cache)
    files = sorted(cache.iterdir())
    second, encoders = make(clips, cache)
    assert not encoders.frames and not encoders.texts and same(contents(first), contents(second))
    assert same(contents(make(clips, None)[0]), contents(first)), "no cache: the same numbers, and no files"
    assert sorted(cache.iterdir()) == files and len(files) == 4 + 2
    _, encoders = make(clips, cache, vae_name="another")
    assert encoders.frames and not encoders.texts
    _, encoders = make(clips, cache, text_name="another")
    assert not encoders.frames and encoders.texts
    for change in ({"num_frames": 3}, {"fps": 4}, {"height": 20}, {"width": 20}, {"starts": 2}):
        assert make(clips, cache, replace(SMALL, **change))[1].frames, change

    # Another clip under the same name; then the same bytes with another date, which cannot be told apart without reading them.
    grey(clips[0].path, n=10, first=50)
    dataset, encoders = make(clips, cache)
    assert encoders.frames == 12 and indices(dataset.moments[0][0][:3].transpose(0, 1), first=50) == [0, 1, 2, 3]
    os.utime(clips[1].path, (time.time() + 10,) * 2)
    assert make(clips, cache)[1].frames == 12
    assert make(clips, cache)[1].frames == 0
    recaptioned = [Clip(clips[0].path, "something else"), *clips[1:]]
    dataset, encoders = make(recaptioned, cache)
    assert encoders.frames == 0 and encoders.texts == ["something else"] and dataset.captions[0] == "something else"


def test_a_damaged_cache_file_is_made_anew(tmp_path, clips, capsys):
    first, _ = make(clips, tmp_path / "cache")
    expected = contents(first)
    for content in (b"", b"garbage" * 100, None):
        path = first.moments[2].path
        path.write_bytes(path.read_bytes()[:-50] if content is None else content)
        capsys.readouterr()
        again, encoders = make(clips, tmp_path / "cache")
        out = capsys.readouterr().out
        assert out.count(f"{path}: damaged") == 1 and "anew" in out
        assert encoders.frames == 12 and same(contents(again), expected)


def test_entries_of_an_early_version_are_not_used(tmp_path, clips, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(clip_lists, "CACHE_VERSION", 1)
        make(clips, tmp_path / "cache")
    assert [make(clips, tmp_path / "cache")[1].frames > 0 for _ in range(2)] == [True, False]


def test_workers_change_nothing_but_the_time(tmp_path, clips):
    clips = clips + [Clip(noisy(tmp_path / f"n{i}.mp4", seed=i), "noise") for i in range(3)]
    before = torch.get_rng_state()
    alone, _ = make(clips, None)
    helped, _ = make(clips, None, num_workers=2)
    assert same(contents(alone), contents(helped))
    [[_, windows, _, _]] = read_all_windows([clips[0].path], SMALL, num_workers=1)
    assert not windows.is_shared(), "workers need no shared memory, of which there may be too little"
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_interlaced_and_slow_clips_are_said_once(tmp_path, capsys):
    paths = [grey(tmp_path / f"{i}.mp4", n=8, **{"x264-params": "tff=1"} if i else {}) for i in range(3)]
    slow = [grey(tmp_path / f"slow{fps}.mp4", n=8, fps=fps) for fps in (7, 4)]
    make([Clip(path, "x") for path in paths + slow], None)
    out = capsys.readouterr().out
    assert out.count("2 clip(s) are interlaced") == 1 and f"the first: {paths[1]}" in out
    assert out.count("2 clip(s) have fewer frames a second than --fps") == 1 and f"the first: {slow[0]}" in out


def test_damage_inside_is_found_when_decoding_and_counts_too(tmp_path, clips, capsys):
    mixed = clips[:2] + [Clip(holed(tmp_path / "hole.mp4"), "noise")] + clips[2:]
    for num_workers in (0, 1):
        dataset, _ = make(mixed, None, max_skip=0.2, num_workers=num_workers)
        out = capsys.readouterr().out
        assert "hole.mp4: cannot be read" in out and out.count("4 of 5 clips can be used") == 1
        assert dataset.captions == [clip.caption for clip in clips]
        assert indices(dataset.moments[2][0][:3].transpose(0, 1)) == [0, 2, 4, 6]
    for _ in range(2):  # found out anew, not mistaken for a cached clip
        refused(r"1 of 5 clips cannot be used.*hole\.mp4", make, mixed, tmp_path / "cache")
    mixed.append(Clip(tmp_path / "nowhere.mp4", "x"))  # the share counts both kinds together
    refused(r"2 of 6 clips cannot be used.*hole\.mp4", make, mixed, None, max_skip=0.2)


def test_ranks_encode_disjoint_shares_and_see_the_same(tmp_path, clips, capsys, monkeypatch):
    """Two ranks, one after the other; at the barrier of the first, the second does its part."""
    clips = [*clips, Clip(holed(tmp_path / "hole.mp4"), "noise"), Clip(noisy(tmp_path / "n.mp4"), "noise")]
    shares = []

    def as_rank(rank, barrier):
        def all_gather(value):
            if value is None:
                barrier()
            return [value]

        with monkeypatch.context() as patch:
            for room in (processes, clip_lists):
                patch.setattr(room, "rank_and_size", lambda: (rank, 2))
            patch.setattr(clip_lists, "all_gather", all_gather)
            return make(clips, tmp_path / "cache", max_skip=0.5)

    def second():
        if not shares:
            shares.append(as_rank(1, lambda: None))

    capsys.readouterr()
    first, encoders = as_rank(0, second)
    assert encoders.frames == 2 * 12 and shares[0][1].frames == 3 * 12, "disjoint, and each clip by one of them"
    assert len(first) == 5 and same(contents(first), contents(make(clips, None, max_skip=0.5)[0]))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 5 + 3


def test_features_of_a_caption_may_be_several_tensors_of_any_lengths(tmp_path):
    """In memory as in the cache: features of the words, and one of the whole caption."""
    def encode(captions):
        return {"text": torch.ones(len(captions), 3, 2), "pooled": torch.ones(len(captions), 5)}
    for cache in (None, tmp_path):
        found = clip_lists.encode_captions(["a", "b"], encode, "tower", cache)[1][:]
        assert {name: tuple(t.shape) for name, t in found.items()} == {"text": (3, 2), "pooled": (5,)}


def test_a_posterior_sample_is_scale_times_mean_plus_std_noise():
    mean, noise = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)  # B 2, C 4, F 3
    z = sample_posterior(torch.cat([mean, torch.full_like(mean, 2 * np.log(3.0))], dim=1), noise, 0.5)
    assert torch.allclose(z, 0.5 * (mean + 3 * noise), atol=1e-5)
    assert torch.allclose(sample_posterior(torch.cat([mean, mean * 0 - 1e4], 1), noise, 1.0), mean, atol=1e-5)
    clamped = sample_posterior(torch.cat([mean, mean * 0 + 1e4], dim=1).half(), noise, 1.0)
    assert clamped.dtype == torch.float32 and clamped.isfinite().all(), "log variances are clamped to [-30, 20]"
    moments = torch.cat([mean, mean], dim=1)
    assert torch.equal(sample_posterior(moments[1], noise[1], 1.0), sample_posterior(moments, noise, 1.0)[1])
