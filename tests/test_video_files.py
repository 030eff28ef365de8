"""Files of videos as they lie on real disks, from the command line.

Truncated, empty, mute, turned and odd ones: each is named, counted, and left out or refused as the configuration says.
"""

import json
import os
import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from ebt_nb.config.errors import LFS_POINTER
from ebt_nb.data.sources import ASSETS
from ebt_nb.data.video_files import write_clip

NUM_GOOD = 8
SETTINGS = {"data.context": 3, "data.seconds_between_frames": 0.1, "data.image_size": 16}


def write_noise(path, seed, times, width=32, height=32, **options):
    "Write a clip of noise with frames at these times."
    frames = np.random.default_rng(seed).integers(0, 256, (len(times), 3, height, width), np.uint8)
    write_clip(path, frames, times, **options)


def write_sound(path):
    "Write a file that holds sound only."
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = 8000, Fraction(1, 8000)
        for packet in stream.encode(frame) + stream.encode(None):
            container.mux(packet)


def turn(path):
    "Turn a clip by a quarter, as a phone does that is held upright: in the header."
    content = bytearray(path.read_bytes())
    begin = content.index(b"tkhd") + 44
    content[begin : begin + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


GOOD = {
    "uneven.mp4": dict(times=[0, 0.02, 0.1, 0.3, 0.31, 0.5, 0.9, 1.0]),
    "phone.mp4": dict(times=[k / 10 for k in range(8)], width=48, height=32),
    "odd.mkv": dict(times=[k / 10 for k in range(8)], width=33, height=17, codec="ffv1", pixel_format="yuv444p"),
    "web.webm": dict(times=[k / 10 for k in range(8)], codec="libvpx-vp9"),
    "old.avi": dict(times=[k / 10 for k in range(8)], codec="mpeg4"),
    "grey.mkv": dict(times=[k / 10 for k in range(8)], codec="ffv1", pixel_format="gray"),
    "deep.mp4": dict(times=[k / 10 for k in range(8)], pixel_format="yuv420p10le"),
    "fast.mp4": dict(times=[k / 50 for k in range(40)]),
}
BAD = {
    "empty.mp4": "the file is empty (0 bytes)",
    "cut.mp4": "an MP4 file without its index (moov), truncated or never finished",
    "cut_at_end.mp4": "it ends in the middle of a frame",
    "cut.webm": "truncated: it ends after",
    "codec.mp4": "its codec is not known",
    "sound.mp4": "holds no video (audio only)",
    "text.mp4": "no known video",
    "pointer.mp4": "Git-LFS pointer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder of good clips, bad ones, a short one, and things that are no clips."
    folder = tmp_path_factory.mktemp("videos") / "clips"
    folder.mkdir()
    for seed, (name, options) in enumerate(GOOD.items()):
        write_noise(folder / name, seed, **options)
    turn(folder / "phone.mp4")
    write_noise(folder / "short.mp4", 20, [0.0, 0.1])
    write_noise(folder / "source.mp4", 21, [k / 10 for k in range(12)], index_first=True)
    write_noise(folder / "source.webm", 22, [k / 10 for k in range(20)], codec="libvpx-vp9")
    index_first = (folder / "source.mp4").read_bytes()
    last_index = (folder / "fast.mp4").read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(last_index[: len(last_index) // 2])
    (folder / "cut_at_end.mp4").write_bytes(index_first[:-100])
    (folder / "cut.webm").write_bytes((folder / "source.webm").read_bytes()[:9000])
    (folder / "codec.mp4").write_bytes(last_index.replace(b"avc1", b"zzz1"))
    write_sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("not a video\n" * 9)
    (folder / "pointer.mp4").write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 9\n")
    (folder / "source.mp4").unlink()
    (folder / "source.webm").unlink()
    (folder / "README.md").write_text("clips")
    (folder / "__MACOSX").mkdir()
    shutil.copy(folder / "fast.mp4", folder / "__MACOSX/fast.mp4")
    shutil.copy(folder / "fast.mp4", folder / ".fast.mp4")
    return folder


def settings(**changes):
    "Words that set keys; keys without a section are of data."
    values = SETTINGS | {
        key.replace("__", ".") if "__" in key else f"data.{key}": value for key, value in changes.items()
    }
    return [word for key, value in values.items() for word in ("-p", f"{key}={value}")]


def test_each_clip_is_named_counted_and_listed(folder, tmp_path, forker):
    good = tmp_path / "good.txt"
    code, out, err = forker.run("inspect-video", folder, *settings(), "--json", "--write", good)
    assert code == 0, err
    summary = json.loads(out)
    counts = [summary[name] for name in ("clips", "usable", "unreadable", "short")]
    assert counts == [len(GOOD) + len(BAD) + 1, len(GOOD), len(BAD), 1]
    lines = {line.split(": ")[0].rsplit("/")[-1]: line for line in summary["unreadable_clips"]}
    assert lines.keys() == BAD.keys()
    for name, reason in BAD.items():
        assert reason in lines[name] and "\n" not in lines[name]
    assert "short.mp4: 2 frames" in summary["short_clips"][0]
    assert summary["sizes"] == {"32x32": 7, "32x48": 1, "33x17": 1}
    assert all(word in err for word in ("__MACOSX", ".fast.mp4", "README.md"))
    listed = good.read_text().split()
    assert listed[0] == "[train]" and sorted(line.rsplit("/")[-1] for line in listed[1:]) == sorted(GOOD)
    code, out, err = forker.run("inspect-video", good, *settings(unreadable="refuse", short="refuse"))
    assert code == 0 and f"{len(GOOD)}" in out, err


def test_what_the_configuration_refuses_is_refused(folder, tmp_path, forker):
    for changes, message in (
        (dict(unreadable="refuse"), f"{len(BAD)} clips are unreadable (data.unreadable=refuse)"),
        (dict(short="refuse"), "1 clips are short (data.short=refuse)"),
        (dict(context=99), "clips can be used"),
    ):
        code, out, err = forker.run("inspect-video", folder, *settings(**changes))
        assert code == 2 and message in err and "cut.webm" in out, err
    for source, message in (("ucf101", "data.source=ucf101:FOLDER"), ("moving_fashion", "is generated")):
        code, out, err = forker.run("inspect-video", source)
        assert code == 2 and message in err and not out, err


def test_preparation_leaves_out_or_refuses(folder, tmp_path, forker):
    words = ["prepare", "--preset", "video/quickstart"]
    options = dict(source=folder, cache_dir=tmp_path / "cache", validation_fraction=0.15)
    code, _out, err = forker.run(*words, *settings(**options))
    assert code == 0 and f"{len(BAD)} of {len(GOOD) + len(BAD) + 1} clips cannot be read and are left out" in err, err
    for changes, message in (
        (dict(unreadable="refuse"), "(data.unreadable=refuse)"),
        (dict(short="refuse"), "short.mp4: 2 frames, and a sample has 4"),
    ):
        code, _out, err = forker.run(*words, *settings(**options, **changes))
        assert code == 2 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize("decode", ["once", "on_the_fly"])
def test_training_survives_bad_files(folder, tmp_path, forker, decode):
    "Also a file that is damaged after it was found to be good, and is read while training."
    clips = tmp_path / "clips"
    shutil.copytree(folder, clips / "train", ignore=shutil.ignore_patterns("old.avi", "web.webm"))
    for split, name in dict(validation="old.avi", test="web.webm").items():
        (clips / split).mkdir()
        shutil.copy(folder / name, clips / split / name)
    options = dict(source=clips, cache_dir=tmp_path / "cache", decode=decode, batch_size=2)
    options |= dict(trainer__max_steps=2, trainer__val_every=2)
    code, _out, err = forker.run("prepare", "--preset", "video/quickstart", *settings(**options))
    assert code == 0, err
    damaged = clips / "train/fast.mp4"
    content, status = bytearray(damaged.read_bytes()), damaged.stat()
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    damaged.write_bytes(content)
    os.utime(damaged, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that it is not prepared anew
    words = settings(**options, run__runs_dir=tmp_path / "runs")
    code, out, err = forker.run("train", "--preset", "video/quickstart", *words)
    assert code == 0 and "Traceback" not in err, err
    assert ("fast.mp4: damaged" in err + out) == (decode == "on_the_fly"), err


def test_without_pyav_the_remedy_is_named(folder, tmp_path, forker):
    hidden = "import sys; sys.modules['av'] = None"
    code, _out, err = forker.run("inspect-video", folder, setup=hidden)
    assert code == 2 and "pip install 'ebt-workbench[video]'" in err and "Traceback" not in err, err


def test_the_embedded_clip_has_its_attribution():
    readme = (ASSETS / "README.md").read_text()
    clip = ASSETS / "video/big_buck_bunny.mp4"
    assert (
        "Creative Commons Attribution 3.0 license. (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org"
        in readme
    )
    assert "Excerpt, downscaled, audio removed" in readme and f"{len(clip.read_bytes()):,}" in readme
