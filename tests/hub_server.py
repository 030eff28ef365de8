"""A small server that speaks what the library of the Hugging Face hub asks of one: models, files, commits, LFS.

It keeps everything in memory, checks tokens, and records the requests that it answers.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_token_that_may_write"


@dataclass
class Repository:
    "A repository: its commits, newest last, each the files by name; and who may read it."

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        "Add a commit that changes some files; return its hash."
        everything = {**(list(self.commits.values())[-1] if self.commits else {}), **files}
        text = repr([(name, hashlib.sha256(everything[name]).hexdigest()) for name in sorted(everything)])
        commit = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[commit] = everything
        return commit

    def find(self, revision: str) -> str | None:
        "The hash of a branch (there is only main), or of a commit, if it exists."
        if revision == "main":
            return list(self.commits)[-1] if self.commits else "0" * 40
        return revision if revision in self.commits else None


class HubServer(ThreadingHTTPServer):
    "The server; `address` is for HF_ENDPOINT. `break_commits` and `cut_files` make it fail half-way."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.break_commits = self.cut_files = False
        self.address = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class HubHandler(BaseHTTPRequestHandler):
    "Answers one request."

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value=None, status=200, headers=(), content=None):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Length": len(content), "Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_one(self):
        self.body = self.read_body()
        self.server.requests.append(f"{self.command} {self.path}")
        self.is_writer = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        path = self.path.partition("?")[0]
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return method(self, *match.groups())
        return self.refuse(404, "Unknown", f"no such endpoint: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def repository(self, name):
        "The repository of this name, after refusing those who may not see it."
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.is_writer):
            return self.refuse(401, "RepoNotFound", "Repository not found")
        if found.gated:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        return found

    def model_info(self, name, revision="main"):
        if found := self.repository(name):
            commit = found.find(revision.replace("%2F", "/"))
            if commit is None:
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            files = [{"rfilename": file} for file in found.commits.get(commit, {})]
            self.answer({"id": name, "sha": commit, "siblings": files, "private": found.private, "tags": []})

    def file(self, name, revision, file):
        if found := self.repository(name):
            commit = found.find(revision)
            content = found.commits.get(commit, {}).get(file)
            if content is None:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            if self.server.cut_files and self.command == "GET":
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                return self.wfile.write(content[: len(content) // 2])
            self.answer(headers=headers, content=content)

    def create(self):
        wanted = json.loads(self.body)
        is_private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if not self.is_writer:
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        if name in self.server.repositories:
            return self.answer({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
        self.server.repositories[name] = Repository(private=is_private)
        self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": "1"})

    def preupload(self, name, revision):
        modes = {True: "lfs", False: "regular"}
        files = json.loads(self.body)["files"]
        answers = [{"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")]} for f in files]
        self.answer({"files": [{**one, "shouldIgnore": False, "oid": None} for one in answers]})

    def large_file_batch(self, name):
        objects = []
        for one in json.loads(self.body)["objects"]:
            place = f"{self.server.address}/large/{one['oid']}"
            objects.append({**one, "authenticated": True, "actions": {"upload": {"href": place, "header": {}}}})
        self.answer({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def large_file(self, oid):
        self.server.large_files[oid] = self.body
        self.answer({})

    def commit(self, name, revision):
        if self.server.break_commits:
            return self.refuse(500, "Internal", "out of order")
        files = {}
        for line in self.body.splitlines():
            value = json.loads(line)["value"]
            if "content" in value:
                files[value["path"]] = base64.b64decode(value["content"])
            elif "oid" in value:
                files[value["path"]] = self.server.large_files[value["oid"]]
        if found := self.repository(name):
            commit = found.commit(files)
            url = f"{self.server.address}/{name}/commit/{commit}"
            self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def accept_yaml(self):
        self.answer({"errors": [], "warnings": []})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    rf"/api/models/{NAME}": HubHandler.model_info,
    rf"/api/models/{NAME}/revision/([^/]+)": HubHandler.model_info,
    rf"/{NAME}/resolve/([^/]+)/(.+)": HubHandler.file,
    r"/api/repos/create": HubHandler.create,
    r"/api/validate-yaml": HubHandler.accept_yaml,
    rf"/api/models/{NAME}/preupload/([^/]+)": HubHandler.preupload,
    rf"/{NAME}\.git/info/lfs/objects/batch": HubHandler.large_file_batch,
    r"/large/(\w+)": HubHandler.large_file,
    rf"/api/models/{NAME}/commit/([^/]+)": HubHandler.commit,
}
