"The documentation site: a room of notebooks is built and every link of it is followed; the workflow that deploys it."

import importlib.util
import queue
import shutil
import threading

import pytest
import yaml
from browser import CHROMIUM, open_browser

import ebt_nb.cli.main  # noqa: F401  registers the commands
from ebt_nb.cli.commands import capture_command
from ebt_nb.jobs.docs import build_site, serve_site
from ebt_nb.jobs.docs_links import find_broken_references, read_references

ROOM = "thinking"
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::DeprecationWarning")  # Sphinx's


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    "The site of the landing page and one room."
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(root / "nbs" / ROOM, folder / "nbs" / ROOM, ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(root / "nbs/images", folder / "nbs/images")
    shutil.copy(root / "nbs/index.ipynb", folder / "nbs/index.ipynb")
    return build_site(folder / "nbs", folder / "site")


def test_links_lead_somewhere(root, site):
    "What is broken are links of the landing page to notebooks that are not in this site, but in the checkout."
    for problem in find_broken_references(site.folder):
        page, address, _ = problem.split(": ")
        assert page == "index.html" and (root / "nbs" / address.lstrip("#")).is_file(), problem
    assert all("myst.xref_missing" in warning and "index.ipynb" in warning for warning in site.warnings)


def test_pages_load_nothing_from_the_network_and_show_no_directives(root, site):
    pages = list((site.folder / ROOM).glob("*.html"))
    assert len(pages) == len(list((root / "nbs" / ROOM).glob("*.ipynb"))) + 1
    for page in [*pages, site.folder / "index.html", site.folder / "search.html"]:
        assert not [address for address in read_references(page).loaded if "//" in address]
        assert "#|" not in page.read_text()


def test_notebooks_and_modules_link_to_each_other(site):
    notebook = read_references(site.folder / "thinking/01_descent.html")
    api = read_references(site.folder / "api/thinking/descent.html")
    assert "../api/thinking/descent.html" in notebook.followed
    assert "../api/thinking/descent.html#ebt_nb.thinking.descent.Trace" in notebook.followed
    assert "../../thinking/01_descent.html" in api.followed
    assert "../../_modules/ebt_nb/thinking/descent.html#Trace" in api.followed


def test_every_page_is_in_the_sidebar_of_its_room(site):
    followed = set(read_references(site.folder / "thinking/01_descent.html").followed)
    assert {path.name for path in (site.folder / ROOM).glob("0*.html")} - {"01_descent.html"} <= followed


@pytest.mark.skipif(not CHROMIUM or not importlib.util.find_spec("playwright"), reason="no Chromium or no playwright")
def test_a_reader_searches_the_site(site):
    addresses = queue.Queue()
    threading.Thread(target=serve_site, args=(site.folder, addresses.put), daemon=True).start()
    with open_browser() as browser:
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(addresses.get(timeout=60))
        assert "EBT Workbench" in page.locator("h1").first.text_content()
        page.locator('input[name="q"]').first.fill("Descent")
        page.locator('input[name="q"]').first.press("Enter")
        page.locator("#search-results li a", has_text="Descent").first.click()
        page.wait_for_url("**/thinking/**")
        assert page.locator("h1").count() == 1 and faults == []


def test_an_unknown_folder_is_not_replaced_and_the_command_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _out, err = capture_command("docs", "--output", str(tmp_path))
    assert code == 2 and "holds something else" in err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_workflow_builds_checks_and_deploys(root):
    workflow = yaml.safe_load((root / ".github/workflows/docs.yml").read_text())
    steps = workflow["jobs"]["deploy"]["steps"]
    used = [step["uses"].partition("@") for step in steps if "uses" in step]
    assert all(version.startswith("v") for _, _, version in used)
    assert [name for name, _, _ in used][-2:] == ["actions/upload-pages-artifact", "actions/deploy-pages"]
    [command] = [step["run"] for step in steps if "run" in step]
    assert command == "bash job_scripts/docs.sh --output _docs" and (root / "job_scripts/docs.sh").is_file()
