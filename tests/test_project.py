"The project as a whole: notebooks and package agree, the README is current, the package can be built and installed."

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import nbformat
import pytest
import readme
import yaml

TOP = [
    "nbs",
    "ebt_nb",
    "job_scripts",
    "tests",
    "settings.ini",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "constraints.txt",
    "environment.yml",
]
IGNORED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.tmp~", "fixtures")


def ignored_files(folder, names):
    "What a copy of the checkout leaves out, for shutil.copytree: caches, fixtures and the runs of notebooks."
    runs = {"runs"} if Path(folder).name in ("experiments", "tutorials") else set()
    return IGNORED(folder, names) | runs


@pytest.fixture
def copy(root, tmp_path):
    "A copy of the checkout that a test may change."
    for name in TOP:
        if (root / name).is_dir():
            shutil.copytree(root / name, tmp_path / "copy" / name, ignore=ignored_files)
        else:
            shutil.copy(root / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def call(*words, **options):
    "Run a command and return its output; it must succeed."
    done = subprocess.run(list(map(str, words)), stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Notebooks, package, README


def read_files(folder):
    "Return the content of every file of notebooks and package, by path."
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for part in ("nbs", "ebt_nb")
        for p in (folder / part).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def files_that_disagree(folder):
    "Return the files that exporting and cleaning change, in a copy of a checkout."
    before, scripts = read_files(folder), Path(sys.executable).parent
    for command in ("nbdev_export", "nbdev_clean"):
        call(scripts / command, cwd=folder)
    after = read_files(folder)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.agreement
def test_notebooks_are_clean_and_the_package_is_what_they_export(copy):
    changed = files_that_disagree(copy)
    assert not changed, f"run nbdev_export and nbdev_clean, then look at what changed in {', '.join(changed)}"


@pytest.mark.agreement
def test_a_hand_edited_module_and_an_unclean_notebook_are_found(copy):
    files_that_disagree(copy)
    (copy / "ebt_nb/runs/folders.py").write_text((copy / "ebt_nb/runs/folders.py").read_text() + "\nnew = 1\n")
    book = nbformat.read(copy / "nbs/config/00_errors.ipynb", as_version=4)
    next(cell for cell in book.cells if cell.cell_type == "code").execution_count = 7
    nbformat.write(book, copy / "nbs/config/00_errors.ipynb")
    assert files_that_disagree(copy) == ["ebt_nb/runs/folders.py", "nbs/config/00_errors.ipynb"]


@pytest.mark.agreement
def test_readme_is_current(root):
    assert readme.main(root, check=True) == 0


@pytest.mark.agreement
def test_a_stale_readme_is_found(copy, capsys):
    assert readme.main(copy) == readme.main(copy, check=True) == 0
    book = nbformat.read(copy / "nbs/index.ipynb", as_version=4)
    book.cells[0].source += "\n\nMore."
    nbformat.write(book, copy / "nbs/index.ipynb")
    assert readme.main(copy, check=True) == 1 and "out of date" in capsys.readouterr().err


@pytest.mark.agreement
def test_links_of_the_readme_exist(root):
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", (root / "README.md").read_text())
    assert links and [link for link in links if not (root / link).exists()] == []


def test_python_of_the_readme_runs(root, tmp_path, forker):
    "All blocks, one after the other, as a reader would type them into one session."
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    code, out, err = forker.run("runs", cwd=tmp_path, setup="\n".join(blocks))
    assert code == 0 and len(blocks) == 4, err
    first, last = re.search(r"loss ([\d.]+) at first, ([\d.]+) after 20 updates", out).groups()
    assert float(last) < 0.9 * float(first) and (tmp_path / "my_model/model.safetensors").is_file()


def test_pictures_of_the_readme_are_small_and_described(root):
    pictures = re.findall(r"!\[([^\]]*)\]\((nbs/images/[^)]+)\)", (root / "README.md").read_text())
    sizes = [(root / path).stat().st_size for _, path in pictures]
    assert len(pictures) == 4 and sum(sizes) < 1_500_000 and all(len(words) > 40 for words, _ in pictures)


def test_citation_file_names_this_version_and_the_paper(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini")
    assert citation["version"] == settings["DEFAULT"]["version"] and citation["license"] == "Apache-2.0"
    [paper] = citation["references"]
    assert "2507.02092" in paper["url"] and len(paper["authors"]) == 10


# Packaging


@pytest.fixture
def with_a_job(copy):
    "The copy with one more, tiny experiment."
    cells = [
        nbformat.v4.new_code_cell("word = 'hello'", metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("import ebt_nb\nprint(word, 'from', ebt_nb.__file__)"),
    ]
    (copy / "nbs/experiments").mkdir(exist_ok=True)
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        ),
        copy / "nbs/experiments/tiny.ipynb",
    )
    return copy


def test_builds(root, with_a_job):
    call(sys.executable, "-m", "build", "--no-isolation", ".", cwd=with_a_job)
    [wheel], [source] = (with_a_job / "dist").glob("*.whl"), (with_a_job / "dist").glob("*.tar.gz")
    files = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in [
        ("ebt_nb", "ebt_nb"),
        ("nbs/experiments", "ebt_nb/experiments"),
        ("nbs/tutorials", "ebt_nb/notebooks/tutorials"),
        ("job_scripts/slurm_headers", "ebt_nb/slurm_headers"),
    ]:  # the wheel was built from the source archive, so this checks both
        expected = {
            p.relative_to(with_a_job / folder).as_posix()
            for p in (with_a_job / folder).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts
        }
        assert expected and {f"{inside}/{name}" for name in expected} <= files
    assert "ebt_nb/notebooks/start_here.ipynb" in files
    assert {name.split("/")[0] for name in files} == {"ebt_nb", "ebt_workbench-0.1.0.dist-info"}
    assert any(name.endswith("LICENSE") for name in files)
    with tarfile.open(source) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert set(TOP) <= top


def test_installed_without_a_checkout(with_a_job, tmp_path):
    venv.create(tmp_path / "fresh", with_pip=False)
    [site] = (tmp_path / "fresh/lib").glob("python3*/site-packages")
    # The packages that ebt_nb needs are taken from here. ebt_nb itself is not: .pth files within are not followed.
    (site / "others.pth").write_text(str(Path(nbformat.__file__).parents[1]))
    (tmp_path / "fresh/share").mkdir()
    (tmp_path / "fresh/share/jupyter").symlink_to(Path(sys.prefix) / "share/jupyter")  # nbconvert's templates
    python = tmp_path / "fresh/bin/python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--quiet",
        ".",
        cwd=with_a_job,
    )
    shutil.rmtree(with_a_job)
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    out = call(tmp_path / "fresh/bin/ebt", "run", "tiny", "-p", "word=greetings", "--runs-dir", "runs", cwd=empty)
    assert (
        f"greetings from {site}/ebt_nb/__init__.py" in out
        and len(list((empty / "runs/tiny").glob("*/report.html"))) == 1
    )
    assert "text/quickstart" in call(tmp_path / "fresh/bin/ebt", "presets", cwd=empty)
    assert f"exec {tmp_path}/fresh/bin/ebt run tiny" in call(
        tmp_path / "fresh/bin/ebt", "submit", "tiny", "--cluster", "local_cpu", "--dry-run", cwd=empty
    )
    copy_notebooks = (
        "from ebt_nb.jobs.lab import START_NOTEBOOK, prepare_lab_folders\n"
        "print((prepare_lab_folders().notebooks / START_NOTEBOOK).read_text())"
    )
    start_here = call(python, "-c", copy_notebooks, cwd=empty)
    linked = re.findall(r"\]\(([\w./-]+\.ipynb)\)", start_here)
    assert linked and all((empty / "ebt_notebooks" / name).is_file() for name in linked), linked
    list_tokenizers = (
        "from importlib.resources import files\n"
        "print(*sorted(path.name for path in (files('ebt_nb') / 'assets/tokenizers').iterdir()))"
    )
    assets = call(python, "-c", list_tokenizers, cwd=empty)
    names = ["austen_bpe_2k.json", "austen_bpe_8k.json", "gpt_neox_20b.json.gz", "python_bpe_2k.json"]
    assert assets.split() == names


# Job scripts


def fake_checkout(root, folder):
    "Make a checkout with setup.sh and empty files in place of the project's; return the path of setup.sh."
    (folder / "job_scripts").mkdir(parents=True)
    shutil.copy(root / "job_scripts/setup.sh", folder / "job_scripts")
    for name in ("settings.ini", "setup.py", "constraints.txt"):
        (folder / name).touch()
    return folder / "job_scripts/setup.sh"


def test_setup_refuses_an_old_python(root, tmp_path):
    script, bin = fake_checkout(root, tmp_path / "checkout"), tmp_path / "bin"
    bin.mkdir()
    for name in ("dirname", "cat", "cksum", "grep"):
        (bin / name).symlink_to(shutil.which(name))
    (bin / "python3").write_text("#!/bin/sh\nexit 1\n")  # as a Python older than 3.11, or without venv, answers
    (bin / "python3").chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash"), script], env={"PATH": str(bin)}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (
        done.returncode != 0 and "no Python 3.11 or newer" in done.stderr and not (tmp_path / "checkout/.venv").exists()
    )


FAKE_PYTHON = """#!/bin/sh
case "$*" in
    "-m venv --clear .venv")
        rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$PWD/.venv" >.venv/bin/activate ;;
    *"pip install"*" uv -c "* | *"--upgrade pip"*) exit 1 ;;
    *"pip install"*)
        echo begun >>log; until [ -e go ]; do sleep 0.05; done; touch .venv/installed; echo ended >>log ;;
    "-P -") test -e .venv/installed ;;
    "-P -c import ebt_nb"*) echo "compiled$PYTHONDONTWRITEBYTECODE" >>log ;;
esac
"""


# writes a uv that logs what it is told
FAKE_PYTHON_WITH_UV = """#!/bin/sh
case "$*" in
    "-m venv --clear .venv")
        rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "$PWD/.venv" >.venv/bin/activate ;;
    "-m pip config get global.index-url") echo "https://mirror/simple" ;;
    "-m pip config get global."*) exit 1 ;;
    *"pip install"*" uv -c "*)
        echo '#!/bin/sh
echo "$UV_DEFAULT_INDEX|$UV_INDEX|$UV_FIND_LINKS|$SSL_CERT_FILE|$*" >log; touch .venv/installed' >.venv/bin/uv
        chmod +x .venv/bin/uv ;;
    "-P -") test -e .venv/installed ;;
    *"pip install"*) exit 1 ;;
esac
"""


def test_setup_tells_uv_what_pip_is_told(root, tmp_path):
    script, bin = fake_checkout(root, tmp_path / "checkout"), tmp_path / "bin"
    bin.mkdir()
    (bin / "python3.11").write_text(FAKE_PYTHON_WITH_UV)
    (bin / "python3.11").chmod(0o755)
    environment = {"PATH": f"{bin}:{os.defpath}", "PIP_FIND_LINKS": "/wheels /more", "EBT_EXTRAS": "browser"}
    subprocess.run(["bash", script], env=environment, stdin=subprocess.DEVNULL, check=True)
    *settings, words = (tmp_path / "checkout/log").read_text().strip().split("|")
    assert settings == ["https://mirror/simple", "", "/wheels,/more", ""]
    assert words.startswith("pip install --quiet --python .venv/bin/python ") and words.endswith(" -c constraints.txt")
    assert " -e .[dev,docs,tensorboard,sweep,images,video,browser] " in words


@pytest.mark.skipif(not shutil.which("flock"), reason="setups are only serialised where there is flock (util-linux)")
def test_second_of_two_parallel_setups_waits_and_finds_the_work_done(root, tmp_path):
    script, bin, folder = fake_checkout(root, tmp_path / "checkout"), tmp_path / "bin", tmp_path / "checkout"
    bin.mkdir()
    (bin / "python3.11").write_text(FAKE_PYTHON)  # its installation lasts until there is a file `go`
    (bin / "python3.11").chmod(0o755)

    def start():
        return subprocess.Popen(
            ["bash", script],
            env={"PATH": f"{bin}:{os.defpath}", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start()
    try:
        assert "making .venv" in first.stdout.readline() and "installing" in first.stdout.readline()
        second = start()
        message = second.stdout.readline()
    finally:
        (folder / "go").touch()
    assert "waiting for another setup" in message
    for setup in (first, second):
        assert setup.wait(timeout=60) == 0
    output = first.stdout.read()
    assert "going on with pip" in output and "ready" in output and second.stdout.read() == ""
    assert (folder / "log").read_text().split() == ["begun", "ended", "compiled"] and (
        folder / ".venv/.set-up"
    ).is_file()
    assert (
        call("bash", script, env={"PATH": f"{bin}:{os.defpath}"}) == ""
        and script.read_bytes() == (root / "job_scripts/setup.sh").read_bytes()
    )


def test_setup_does_nothing_when_nothing_changed(root):
    if Path(sys.prefix) != root / ".venv" or not (root / ".venv/.set-up").is_file():
        pytest.skip("these tests do not run in the .venv that setup.sh made")
    assert call("bash", root / "job_scripts/setup.sh", env={"PATH": os.defpath}) == ""
