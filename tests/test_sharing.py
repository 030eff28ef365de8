"Models that are shared: on a server that speaks the hub's protocol, as folders, and in the package."

import json
import shutil

import pytest
import torch
from hub_server import TOKEN, HubServer, Repository

from ebt_nb.cli.main import main
from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
from ebt_nb.runs.metrics import MetricsFile
from ebt_nb.runs.shared_models import SHIPPED_MODELS, list_shipped_models
from ebt_nb.training.build import build_module, load_module, load_pretrained

SMALL = {"model.layers": 1, "model.width": 16, "model.heads": 2, "data.context": 16, "trainer.threads": 1}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder of runs with one run, text/small, whose best checkpoint has random weights."
    folder = tmp_path_factory.mktemp("site")
    run = Run.create(build_config("text/quickstart", SMALL | {"run.runs_dir": str(folder), "run.name": "text/small"}))
    MetricsFile(run.dir / "metrics.csv").append({"step": 7, "val/loss": 7.25})
    module, checkpoint = build_module(run.config), {"global_step": 7}
    checkpoint["state_dict"] = module.state_dict()
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, run.dir / "checkpoints/best.ckpt")
    return folder


def set_endpoint(monkeypatch, address):
    "Change HF_ENDPOINT, which the library reads when it is imported."
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    "A server that is the hub of this process, with a token that may write."
    server = HubServer()
    set_endpoint(monkeypatch, server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts of the library
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def ebt(capsys, *words):
    "Exit code, output and error output of a command in this process."
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def refusal(capsys, *words):
    "The one line with which a command refuses."
    code, out, err = ebt(capsys, *words)
    lines = err.strip().splitlines()
    assert code == 2 and out == "" and lines[-1].startswith("ebt: ") and "Traceback" not in err, err
    return lines[-1]


def hidden_folders(site):
    "What a failed download has left in the cache."
    return [path.name for path in (site / ".hf").rglob("*")] if (site / ".hf").exists() else []


def test_a_model_goes_to_the_hub_as_one_commit_and_comes_back_the_same(site, hub, capsys, tmp_path):
    runs = ["--runs-dir", site]
    code, out, err = ebt(capsys, "checkpoint", "push", "text/small:best", "--to", "hf:jane/small", *runs)
    assert code == 0, err
    [(commit, files)] = hub.repositories["jane/small"].commits.items()
    assert out == f"hf:jane/small@{commit}: sent as one commit\n" and hub.repositories["jane/small"].private
    assert set(files) == {"README.md", "config.yaml", "model.safetensors"}
    assert "| val/loss | 7.25 |" in files["README.md"].decode() and str(site) not in files["config.yaml"].decode()

    prompt = ["--prompt", "It was", "--tokens", "4", "--json", *runs]
    code, out, err = ebt(capsys, "generate", "hf:jane/small", *prompt)
    assert code == 0, err
    assert json.loads(out) == json.loads(ebt(capsys, "generate", "text/small:best", *prompt)[1])
    original = load_module(next(site.glob("text/small/*/checkpoints/best.ckpt"))).state_dict()
    shared = load_pretrained("hf:jane/small", site).state_dict()
    assert all(torch.equal(shared[name], weight) for name, weight in original.items())

    downloads = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(downloads) == 3  # once each
    hub.requests.clear()
    assert ebt(capsys, "generate", f"hf:jane/small@{commit}", *prompt)[0] == 0 and not hub.requests
    target = tmp_path / "copy"
    assert ebt(capsys, "checkpoint", "pull", "hf:jane/small@main", "--to", target, *runs)[1] == f"model: {target}\n"
    assert json.loads(ebt(capsys, "generate", target, *prompt)[1]) == json.loads(out)
    assert "nothing is overwritten" in refusal(capsys, "checkpoint", "pull", "hf:jane/small", "--to", target, *runs)

    assert ebt(capsys, "checkpoint", "push", target, "--to", "hf:jane/open", "--public", *runs)[0] == 0
    assert not hub.repositories["jane/open"].private
    assert list(hub.repositories["jane/open"].commits.values()) == [files]


def test_what_is_not_on_the_hub_is_named(site, hub, capsys, monkeypatch):
    words = ["--runs-dir", site]
    hub.repositories["jane/half"], hub.repositories["jane/gated"] = Repository(), Repository(gated=True)
    hub.repositories["jane/half"].commit({"config.yaml": b"format: 2\n"})
    shutil.rmtree(site / ".hf", ignore_errors=True)
    for address, part in {
        "hf:jane": "reads hf:owner/name",
        "hf:jane/none": "no such model on the hub, or a private one",
        "hf:jane/gated": "grants access on request",
        "hf:jane/half@v2": "no such branch, tag or commit",
        "hf:jane/half": "holds no model.safetensors",
    }.items():
        line = refusal(capsys, "generate", address, *words)
        assert address in line and part in line, line
    hub.repositories["jane/half"].commit({"model.safetensors": b'\x08\0\0\0\0\0\0\0{"a":1}'})
    assert "damaged" in refusal(capsys, "generate", "hf:jane/half", *words)
    hub.cut_files = True
    assert "hf:jane/half" in refusal(capsys, "checkpoint", "pull", "hf:jane/half", *words)
    assert not any(name.startswith(".") for name in hidden_folders(site))
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert "the hub cannot be reached" in refusal(capsys, "generate", "hf:jane/half", *words)


def test_what_cannot_be_sent_is_named_and_leaves_nothing(site, hub, capsys, monkeypatch):
    push = ["checkpoint", "push", "text/small:best", "--runs-dir", site, "--to"]
    assert "leave @v1 out" in refusal(capsys, *push, "hf:jane/small@v1")
    assert "no name on the hub" in refusal(capsys, *push, "hf:jane/small.git")
    hub.break_commits = True
    assert "hf:jane/small: the hub answered with an error" in refusal(capsys, *push, "hf:jane/small")
    assert not hub.repositories["jane/small"].commits
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses this token" in refusal(capsys, *push, "hf:jane/other")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "needs a token that may write" in refusal(capsys, *push, "hf:jane/other")
    assert set(hub.repositories) == {"jane/small"}


def test_the_models_in_the_package(capsys):
    "They are small, say what they are, and predict as their cards say."
    models = list_shipped_models()
    assert set(models) == {"text/quickstart", "text/quickstart_transformer"}
    assert sum(path.stat().st_size for path in SHIPPED_MODELS.rglob("*") if path.is_file()) < 4e6
    for name, folder in models.items():
        card = (folder / "README.md").read_text()
        assert f"ebt generate shipped:{name}" in card and "ebt run shipped_models" in card
        assert load_pretrained(f"shipped:{name}").config.run.runs_dir.as_posix() == "runs"
    code, out, err = ebt(capsys, "evaluate", "--limit", "20", "--json")
    assert code == 0 and err.startswith("no address is given: using shipped:text/quickstart"), err
    assert json.loads(out)["loss"] < 4.6  # a model that knows frequencies alone is at 5.9 nats
    assert "did you mean 'text/quickstart'" in refusal(capsys, "generate", "shipped:text/quickstrat")
