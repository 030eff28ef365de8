"""`ebt dashboard`: who may ask, what is served, runs that grow while they are watched, and stop and resume.

The server answers in a thread of this process.
"""

import asyncio
import http.client
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ebt_nb.config.overrides import build_config
from ebt_nb.runs.folders import Run
from ebt_nb.runs.metrics import MetricsFile
from ebt_nb.widgets.dashboard import DashboardState
from ebt_nb.widgets.dashboard_server import MAX_REQUEST_BYTES, TOKEN_HEADER, DashboardServer
from ebt_nb.widgets.run_table import RunTable

STAND_IN = "import time; log = open({path!r}, 'a'); print('ready', flush=True); time.sleep(300)"


def make_run(folder, status="done", **details):
    run = Run.create(build_config("text/quickstart", {"trainer.max_steps": 100}), folder)
    MetricsFile(run.dir / "metrics.csv").append({"step": 10, "train/loss": 6.0})
    run.set_status(status, **details)
    return run


class Visitor:
    "Sends requests to a server that runs in a thread, with the right token unless told otherwise."

    def __init__(self, runs_dir: Path, allow_actions: bool):
        self.server = DashboardServer(DashboardState(runs_dir, allow_actions))
        self.loop, self.stop = asyncio.new_event_loop(), asyncio.Event()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.server.serve(self.stop),))
        self.thread.start()

    def send(self, method, path, body=None, **headers):
        "Return status, headers and text of an answer; a header that is None is not sent."
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        names = {"host": "Host", "cookie": "Cookie", "token": TOKEN_HEADER, "origin": "Origin"}
        given = {"host": f"127.0.0.1:{self.server.port}", "token": self.server.token} | headers
        data = None if body is None else json.dumps(body).encode()
        for name, value in given.items():
            if value is not None:
                connection.putheader(names[name], value)
        connection.putheader("Content-Length", str(len(data or b"")))
        connection.endheaders(data)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return reply.status, reply.headers, text

    def ask(self, **request):
        "Return the answer to a request of the page."
        code, _, text = self.send("POST", "/request", request)
        assert code == 200, text
        return json.loads(text)

    def close(self):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def visit(tmp_path, monkeypatch):
    monkeypatch.setattr(RunTable, "WALK_SHARE", 0)  # a test must not depend on the load of the machine
    monkeypatch.setattr(RunTable, "READ_SECONDS", math.inf)
    visitors = []

    def start(allow_actions=False):
        visitors.append(Visitor(tmp_path / "runs", allow_actions))
        return visitors[-1]

    yield start
    for visitor in visitors:
        visitor.close()


def test_nothing_is_answered_without_the_token(tmp_path, visit):
    make_run(tmp_path / "runs/one")
    visitor = visit()
    paths = ["/", "/report?folder=one", "/none", "/?token=", f"/?token={visitor.server.token[:-1]}", "/?token=%C3%A9"]
    for path in paths:
        code, headers, text = visitor.send("GET", path, token=None)
        assert code == 403 and "token is missing or wrong" in text and "one" not in text.replace("one that", ""), path
        assert "Set-Cookie" not in headers
    for token in (None, "", "wrong", visitor.server.token + "x"):
        assert visitor.send("POST", "/request", {}, token=token)[0] == 403
    code, headers, _ = visitor.send("GET", f"/?token={visitor.server.token}", token=None)
    assert code == 200 and "HttpOnly" in headers["Set-Cookie"] and "SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert visitor.send("GET", "/", token=None, cookie=cookie)[0] == 200
    assert visitor.send("POST", "/request", {}, token=None, cookie=cookie)[0] == 403  # a form of another page has that
    assert visitor.send("GET", "/", token=None, cookie=f"{cookie}x")[0] == 403


def test_other_hosts_and_methods_are_refused(tmp_path, visit):
    make_run(tmp_path / "runs/one")
    visitor = visit()
    for host in (
        "evil.example",
        f"evil.example:{visitor.server.port}",
        "127.0.0.1.evil.example",
        "[::1]:80",
        "0.0.0.0",
    ):
        assert visitor.send("GET", "/", host=host)[0] == 403, host
        assert visitor.send("POST", "/request", {}, host=host)[0] == 403, host
    for host in ("localhost", f"localhost:{visitor.server.port}", "127.0.0.1:9999"):  # 9999: through `ssh -L`
        assert visitor.send("GET", "/", host=host)[0] == 200, host
    assert visitor.send("GET", "/request")[0] == 405
    assert visitor.send("POST", "/", {})[0] == 405
    address = ("127.0.0.1", visitor.server.port)
    assert socket.create_connection(address).getpeername() == address
    with pytest.raises(OSError):  # not on the other addresses of the machine, such as 127.0.0.2
        socket.create_connection(("127.0.0.2", visitor.server.port), timeout=5)


def test_what_is_no_request_of_the_page_gets_one_sentence(tmp_path, visit):
    make_run(tmp_path / "runs/one")
    visitor = visit()
    for body in ([], 1, "text", None):
        assert visitor.send("POST", "/request", body)[0] == 400
    for body in ({"kind": "all"}, {"chosen": [["one"]]}, {"chosen": "one"}, {"sweep": 1}, {"more": 1}):
        code, _, text = visitor.send("POST", "/request", body)
        assert code == 200 and json.loads(text)["error"].startswith("request: "), text
    assert "no such sweep" in visitor.ask(sweep="../x")["sweep"]["problem"]
    try:
        code = visitor.send("POST", "/request", {"metric": "x" * MAX_REQUEST_BYTES})[0]
    except OSError:
        code = None  # the connection was closed at once
    assert code in (None, 400, 413)
    assert visitor.ask()["table"]["runs"][0]["run"] == "one"  # and the server goes on


def test_reports_come_from_run_folders_only(tmp_path, visit):
    run = make_run(tmp_path / "runs/one")
    (run.dir / "report.html").write_text("<script>fetch('/request')</script>")
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "report.html").write_text("secret")
    linked = make_run(tmp_path / "runs/linked")
    (linked.dir / "report.html").symlink_to(tmp_path / "secret.html")
    (tmp_path / "runs/away").symlink_to(tmp_path)
    (tmp_path / "runs/plain").mkdir()
    (tmp_path / "runs/plain/report.html").write_text("of no run")
    visitor = visit()
    code, headers, text = visitor.send("GET", "/report?folder=one")
    policy = headers["Content-Security-Policy"]
    assert code == 200 and "fetch" in text and policy.startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in policy and "default-src 'none'" in policy
    refused = ["..", "../", "one/..", "one/../..", "/", "", ".", "away", "linked", "plain", "%2e%2e", str(tmp_path)]
    for folder in refused:
        code, _, text = visitor.send("GET", f"/report?folder={folder}")
        assert code == 404 and "secret" not in text and "of no run" not in text, folder
    assert visitor.send("GET", "/report")[0] == 400
    for path in ("/report/../../secret.html", "/..%2f..%2fsecret.html", "/static/x", "/one/report.html"):
        assert visitor.send("GET", path)[0] == 404, path


def test_growing_metrics_appear(tmp_path, visit):
    run = make_run(tmp_path / "runs/one")
    visitor = visit()
    first = visitor.ask(chosen=["one"], metric="train/loss")
    assert first["curves"] == [{"run": "one", "points": [[10, 6.0]]}] and first["table"]["runs"][0]["step"] == 10
    again = visitor.ask(chosen=["one"], metric="train/loss", digest=first["digest"])
    assert "table" not in again and again["curves"] == first["curves"]
    metrics = MetricsFile(run.dir / "metrics.csv")
    metrics.append({"step": 20, "train/loss": 5.0})
    with open(run.dir / "metrics.csv", "a") as file:
        file.write("30,4.")  # being written
    grown = visitor.ask(chosen=["one"], metric="train/loss", digest=first["digest"])
    assert grown["curves"][0]["points"] == [[10, 6.0], [20, 5.0]] and grown["table"]["runs"][0]["step"] == 20
    metrics.drop_rows_after(10)  # as a resumed run does
    cut = visitor.ask(chosen=["one"], metric="train/loss", digest=grown["digest"])
    assert cut["curves"][0]["points"] == [[10, 6.0]] and cut["table"]["runs"][0]["step"] == 10
    (run.dir / "metrics.csv").write_text("no,metrics\nx,y\n")
    damaged = visitor.ask(chosen=["one"], digest=cut["digest"])
    assert damaged["chosen"] == [] and "metrics.csv: not the metrics of a run" in damaged["table"]["problems"][0]


def test_a_run_is_stopped_only_where_it_is_allowed(tmp_path, visit):
    run = make_run(tmp_path / "runs/one")
    code = STAND_IN.format(path=str(run.dir / "console.log"))
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
    try:
        run.set_status("running", process={"host": socket.gethostname(), "pid": process.pid})
        reader, visitor = visit(), visit(allow_actions=True)
        code, _, text = reader.send("POST", "/request", {"action": "stop", "run": "one"})
        assert code == 403 and "--allow-actions" in text and process.poll() is None
        for wrong in ({"token": None}, {"host": "evil.example"}):
            assert visitor.send("POST", "/request", {"action": "stop", "run": "one"}, **wrong)[0] == 403
        run.set_status("running", process={"host": socket.gethostname(), "pid": other.pid})
        assert "no open console.log of this run" in visitor.ask(action="stop", run="one")["done"]
        assert other.poll() is None and process.poll() is None
        run.set_status("running", process={"host": socket.gethostname(), "pid": process.pid})
        assert "SIGTERM was sent" in visitor.ask(action="stop", run="one")["done"]
        assert process.wait(timeout=60) == -signal.SIGTERM
        answer = visitor.ask(action="stop", run="one")  # it has gone: the run counts as killed
        assert "is killed, which allows only resume" in answer["done"] and other.poll() is None
        assert answer["table"]["runs"][0]["status"] == "killed"
    finally:
        for one in (process, other):
            one.kill()
            one.wait()


def test_a_run_is_resumed_as_a_process_of_its_own(tmp_path, visit, monkeypatch):
    run = make_run(tmp_path / "runs/one", "interrupted", step=10)
    done = make_run(tmp_path / "runs/done")
    code = "import sys, time; print('resuming', *sys.argv[1:], flush=True); time.sleep(300)"
    monkeypatch.setattr("ebt_nb.jobs.run_control.EBT_COMMAND", [sys.executable, "-S", "-c", code])
    visitor = visit(allow_actions=True)
    assert "is done, which allows neither" in visitor.ask(action="resume", run="done")["done"]
    assert "no such run" in visitor.ask(action="resume", run="../one")["done"]
    answer = visitor.ask(action="resume", run="one")
    assert "is resumed by process" in answer["done"] and answer["resuming"] == ["one"]
    pid = int(answer["done"].partition("by process ")[2].partition(";")[0])
    try:
        assert f"being resumed already, by process {pid}" in visitor.ask(action="resume", run="one")["done"]
        while not (text := (run.dir / "process.log").read_text()):
            time.sleep(0.05)
        assert text == f"resuming resume {run.dir} --runs-dir {tmp_path / 'runs'}\n"
        assert not (done.dir / "process.log").exists()
    finally:
        subprocess.run(["kill", str(pid)])


def test_the_command_prints_its_address_and_ends_at_ctrl_c(tmp_path):
    make_run(tmp_path / "runs/one")
    call = "code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    script = f"import sys; from ebt_nb.cli.main import main; {call}"
    words = ["dashboard", "--runs-dir", tmp_path / "runs"]
    process = subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True)
    assert f"runs below {tmp_path / 'runs'}: read-only" in process.stdout.readline()
    address = process.stdout.readline().removeprefix("open http://").strip()
    host, _, path = address.partition("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", f"/{path}")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert rest == "dashboard ended\nFalse\n" and process.returncode == 0  # torch was not imported
