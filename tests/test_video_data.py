"Frames on disk, with the commands that write and read them: killed in the middle, encoded, trained on."

import signal
from pathlib import Path

from ebt_nb.runs.addresses import find_runs
from ebt_nb.training.checkpoints import read_checkpoint

# Few clips in small parts. The names of clips that are read are appended to a file; where a file says so, the process
# kills itself when it begins a part.
WATCHED = """
import os, signal
from pathlib import Path
from ebt_nb.data import frame_cache, moving_images

frame_cache.CLIPS_PER_PART, moving_images.NUM_HELD_OUT_CLIPS = 4, 4
read_clip, write_part = frame_cache.read_clip, frame_cache.FrameWriter.write_part

def read_and_log(clip, config):
    with open("read.txt", "a") as log:
        log.write(f"{clip.name}\\n")
    return read_clip(clip, config)

def write_or_die(self, name, *arguments):
    if Path("die_at").exists() and Path("die_at").read_text() == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_part(self, name, *arguments)

frame_cache.read_clip, frame_cache.FrameWriter.write_part = read_and_log, write_or_die
"""


def encode_words(**settings):
    "The words that encode small frames of video."
    settings = {
        "data.cache_dir": "cache",
        "data.image_size": 8,
        "encoder.images": "small_vae",
        "trainer.accelerator": "cpu",
        "trainer.threads": 1,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    words = ["--preset", "video/quickstart", "--defaults", "none"]
    return words + [word for key, value in settings.items() for word in ("-p", f"{key}={value}")]


def test_a_killed_encoding_goes_on_with_the_finished_parts(tmp_path, forker):
    words = ["encode", *encode_words(data__max_documents=10)]
    (tmp_path / "die_at").write_text("train-00002")
    code, _out, _err = forker.run(*words, cwd=tmp_path, setup=WATCHED)
    read = (tmp_path / "read.txt").read_text().splitlines()
    assert code == -signal.SIGKILL and [name.split()[1] for name in read] == [str(number) for number in range(8)]
    (tmp_path / "die_at").unlink()
    (tmp_path / "read.txt").unlink()
    code, out, err = forker.run(*words, cwd=tmp_path, setup=WATCHED)
    read = (tmp_path / "read.txt").read_text().splitlines()
    assert code == 0 and "26 clips, latents of 4 x 2 x 2" in err, err
    assert [name.split()[:2] for name in read[:2]] == [["train", "8"], ["train", "9"]] and len(read) == 2 + 4 * 4
    assert sum(file.suffix != ".lock" for file in (tmp_path / "cache").iterdir()) == 1
    code, again, err = forker.run(*words, cwd=tmp_path, setup=WATCHED)
    assert code == 0 and again == out and "encoded before" in err
    assert len((tmp_path / "read.txt").read_text().splitlines()) == len(read)


def test_checkpoints_name_the_encoder_of_frames(tmp_path, forker):
    settings = encode_words(data__source="big_buck_bunny", data__context=3, data__flip=True, data__batch_size=2)
    small = dict(model__layers=1, model__width=16, model__heads=2, trainer__max_steps=2, trainer__val_batches=1)
    for key, value in (small | dict(run__runs_dir="runs")).items():
        settings += ["-p", f"{key.replace('__', '.')}={value}"]
    code, _out, err = forker.run("train", *settings, cwd=tmp_path)
    assert code == 2 and "frames by 'small_vae' (encoder.images) are not encoded yet" in err and "`ebt encode`" in err
    assert not (tmp_path / "runs").exists()
    code, out, err = forker.run("encode", *settings, cwd=tmp_path)
    assert code == 0 and (tmp_path / out.strip() / "info.json").is_file(), err
    code, _out, err = forker.run("train", *settings, cwd=tmp_path)
    assert code == 0, err
    [run] = find_runs(Path(tmp_path, "runs"))
    assert read_checkpoint(run.checkpoint("last"))["encoders"]["images"]["name"] == "small_vae"
