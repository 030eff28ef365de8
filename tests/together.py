"What the tests of text and of pictures share: processes that prepare data at the same time, and a module that writes down what it is shown."

import importlib
import multiprocessing
import time
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def prepare_in_child(builder, opened, folder, stuck, say):
    "What each process does: open the data, telling the test through the pipe `say` what happens; a stuck one begins to write and never ends. `builder` is 'module:function', `opened` a function of the folder that returns opened data."
    module, name = builder.split(":")
    module, text = importlib.import_module(module), importlib.import_module("ebt_nb.data.text")
    build = getattr(module, name)

    def watched(partial, *rest):
        say.send("builds")
        if stuck:
            (partial / "train.arrow").write_bytes(b"half a file")
            say.send("half done")
            time.sleep(600)
        build(partial, *rest)

    setattr(module, name, watched)
    text.say = say.send
    data = opened(folder)
    say.send(f"{data.folder} {len(data.splits['train'])}")


def check_killed_one_is_replaced(builder: str, opened, folder: Path, preload: str) -> None:
    "One process prepares, two others wait; the first is killed, one of the two takes over, and the third finds it done."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])

    def child(stuck):
        listen, say = context.Pipe(duplex=False)
        process = context.Process(target=prepare_in_child, args=(builder, opened, folder, stuck, say), daemon=True)
        process.start()
        say.close()
        return process, listen

    def next_line(listen):
        assert listen.poll(120), "nothing was said"
        return listen.recv()

    def rest(listen):
        lines = []
        try:
            while True:
                lines.append(next_line(listen))
        except EOFError:
            return lines

    holder, heard = child(stuck=True)
    others = []
    try:
        assert [next_line(heard), next_line(heard)] == ["builds", "half done"]
        others = [child(stuck=False) for _ in range(2)]
        for _, listen in others:
            assert next_line(listen).startswith("waiting for another process")
        hidden = [path for path in (folder / "cache").rglob("*") if path.name.startswith(".") and path.is_dir()]
        assert [path.name for one in hidden for path in one.iterdir()] == [
            "train.arrow"
        ]  # in a hidden folder: nothing that looks finished
        assert not [path for path in (folder / "cache").iterdir() if path.is_dir() and not path.name.startswith(".")]
        holder.kill()
        said = []
        for process, listen in others:
            process.join(120)
            said.append(rest(listen))
    finally:
        for process in [holder] + [process for process, _ in others]:
            process.kill()
    assert sorted(map(len, said)) == [1, 2] and said[0][-1] == said[1][-1], (
        said
    )  # one took over, the other found it done
    finished = [path for path in (folder / "cache").iterdir() if path.is_dir()]
    assert len(finished) == 1 and said[0][-1].startswith(str(finished[0]))


class Recorder(LightningModule):
    "Trains one number and writes down what `note` makes of the batches it is shown; `value` [...] is what it trains on."

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, _):
        self.seen.append(self.note(batch))
        return self.weight * self.value(batch).float().mean()

    def validation_step(self, batch, _):
        self.log("val", self.value(batch).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def shown_to(module: Recorder, data, folder: Path, steps: int, checkpoint: Path | None = None, **trainer) -> list:
    "What a module is shown in so many updates, from the start or from a checkpoint; one is saved every four."
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    Trainer(
        max_steps=steps,
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
    return module.seen
