"""What the tests of text and of images share.

Processes that prepare data at the same time, and a module that records the batches it is trained on.
"""

import importlib
import multiprocessing
import time
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def prepare_in_child(writer: str, open_data, folder: Path, is_stuck: bool, pipe) -> None:
    """Open data in a child process and send to the test through `pipe` what happens.

    writer: 'module:function', the function that writes a cache folder.
    open_data: a function of `folder` that returns opened data.
    is_stuck: begin to write and never end.
    """
    module_name, name = writer.split(":")
    module = importlib.import_module(module_name)
    write = getattr(module, name)

    def write_and_report(partial, *arguments):
        pipe.send("writes")
        if is_stuck:
            (partial / "train.arrow").write_bytes(b"half a file")
            pipe.send("half done")
            time.sleep(600)
        write(partial, *arguments)

    setattr(module, name, write_and_report)
    importlib.import_module("ebt_nb.data.cache").log_line = pipe.send
    data = open_data(folder)
    pipe.send(f"{data.folder} {len(data.splits['train'])}")


def next_message(pipe) -> str:
    "Return the next message of a child process; fail after two minutes."
    assert pipe.poll(120), "no message came"
    return pipe.recv()


def remaining_messages(pipe) -> list[str]:
    "Return all further messages of a child process, until it closes its pipe."
    messages = []
    try:
        while True:
            messages.append(next_message(pipe))
    except EOFError:
        return messages


def check_killed_preparation_is_replaced(writer: str, open_data, folder: Path, preload: str) -> None:
    "One process prepares, two others wait; the first is killed, one of the two takes over, the third finds it done."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    cache = folder / "cache"

    def start_child(is_stuck):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (writer, open_data, folder, is_stuck, sender)
        process = context.Process(target=prepare_in_child, args=arguments, daemon=True)
        process.start()
        sender.close()
        return process, receiver

    first, first_pipe = start_child(is_stuck=True)
    others = []
    try:
        assert [next_message(first_pipe), next_message(first_pipe)] == ["writes", "half done"]
        others = [start_child(is_stuck=False) for _ in range(2)]
        for _, pipe in others:
            assert next_message(pipe).startswith("waiting for another process")
        hidden = [path for path in cache.rglob("*") if path.name.startswith(".") and path.is_dir()]
        assert [path.name for partial in hidden for path in partial.iterdir()] == ["train.arrow"]
        assert not [path for path in cache.iterdir() if path.is_dir() and not path.name.startswith(".")]
        first.kill()
        messages = []
        for process, pipe in others:
            process.join(120)
            messages.append(remaining_messages(pipe))
    finally:
        for process in [first] + [process for process, _ in others]:
            process.kill()
    # One took over and wrote, the other found it done.
    assert sorted(map(len, messages)) == [1, 2] and messages[0][-1] == messages[1][-1], messages
    finished = [path for path in cache.iterdir() if path.is_dir()]
    assert len(finished) == 1 and messages[0][-1].startswith(str(finished[0]))


class BatchRecorder(LightningModule):
    """Train one number and record the batches.

    `describe_batch(batch)` returns what is recorded of a batch, `training_values(batch)` what is trained on.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.recorded = []

    def training_step(self, batch, _):
        self.recorded.append(self.describe_batch(batch))
        return self.weight * self.training_values(batch).float().mean()

    def validation_step(self, batch, _):
        self.log("val", self.training_values(batch).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def fit_and_record(
    module: BatchRecorder, data, folder: Path, updates: int, checkpoint: Path | None = None, **trainer
) -> list:
    "Train for so many updates, from the start or from a checkpoint, and return the record; save every four updates."
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving],
        check_val_every_n_epoch=None,
        val_check_interval=3,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        default_root_dir=folder,
        **trainer,
    ).fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return module.recorded
