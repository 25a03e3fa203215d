"""A stand-in for the Hub on loopback: as much of its protocol as the real client uses to create, push, list and load models.

Repositories have commits, branches, pull requests and large files. A private one, like one that is not there, answers 401 to
whoever does not show the token. `faults` makes the next requests of a kind fail.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers
import yaml
from huggingface_hub import constants, hf_api


TOKEN, USER = "hf_StandInTokenThatNobodyMayPrint", "user"
# Status of what goes wrong when a fault is set.
FAULTS = {"conflict": 412, "refused": 400, "busy": 429, "full": 507, "broken": 500}


@dataclass
class Repository:
    """`commits` maps a commit to its files; `refs` maps `main`, branches and `refs/pr/N` to commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {}, None)

    def commit(self, ref: str, files: dict[str, bytes], parent: str | None) -> str:
        sha = hashlib.sha1(repr((sorted(files.items()), parent, len(self.commits))).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.sha(revision)]


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: set[str] = set()
        self.validated: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    """Lets this process' client talk to another hub."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    # Transformers keeps a client, from 5.20 on.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)


class RefusalError(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        """Tests print nothing."""

    def answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        try:
            self.route([unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query), body)
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message} if refusal.code else {}
            self.answer(refusal.status, {"error": refusal.message or refusal.code}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (the server asks for these names)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def demand_token(self):
        if not self.known:
            raise RefusalError(401, "", "Invalid credentials in Authorization header")

    def fail(self, *kinds: str):
        for kind in self.server.faults & set(kinds):
            raise RefusalError(FAULTS[kind], "", f"the stand-in was asked to fail: {kind}")

    def repository(self, name: str) -> Repository:
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.known):
            # Whoever may not know whether it is there is not told.
            raise RefusalError(404 if self.known else 401, "RepoNotFound", "Repository not found")
        return found

    def revision(self, repository: Repository, revision: str) -> str:
        sha = repository.sha(revision)
        if sha is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def route(self, parts: list[str], query: dict[str, list[str]], body: bytes):
        match parts:
            case ["api", "whoami-v2"]:
                self.demand_token()
                self.answer(
                    200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
                )
            case ["api", "validate-yaml"]:
                self.validate(json.loads(body))
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", "models", owner, name, "branch", branch]:
                self.branch(f"{owner}/{name}", branch, json.loads(body or b"{}"))
            case ["api", "models", owner, name, "preupload", _]:
                self.preupload(f"{owner}/{name}", json.loads(body))
            case ["api", "models", owner, name, "commit", revision]:
                self.commit(f"{owner}/{name}", revision, "create_pr" in query, body)
            case ["api", "models", owner, name, "tree", revision, *folder]:
                self.tree(f"{owner}/{name}", revision, "/".join(folder), "recursive" in query)
            case ["api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case ["large", oid]:
                self.store(oid, body)
            case [owner, name, "resolve", revision, *file]:
                self.resolve(f"{owner}/{name}", revision, "/".join(file))
            case _:
                raise RefusalError(404, "", f"the stand-in has no {self.command} {self.path}")

    def validate(self, asked: dict):
        _, metadata, _ = asked["content"].split("---\n", 2)
        # Part of what the Hub looks at.
        found = yaml.safe_load(metadata)
        wrong = [
            name for name in ("license", "pipeline_tag", "library_name") if not isinstance(found.get(name, ""), str)
        ]
        wrong += [name for name in found.get("datasets", []) if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
        for model in found.get("model-index", []):
            for result in model["results"]:
                kind = result["dataset"]["type"]
                wrong += [] if re.fullmatch(r"[\w./-]+", kind, re.ASCII) else ["dataset.type"]
        errors = [{"message": f"{name} is not valid"} for name in wrong]
        self.server.validated.append(asked["content"])
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, asked: dict):
        self.demand_token()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name.split("/")[0] != USER:
            raise RefusalError(403, "", "You don't have the rights to create a model under this namespace")
        url = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.repositories:
            self.answer(409, url)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(private)
        self.answer(200, url)

    def branch(self, name: str, branch: str, asked: dict):
        self.demand_token()
        repository = self.repository(name)
        if branch in repository.refs:
            raise RefusalError(409, "", "Reference already exists")
        repository.refs[branch] = self.revision(repository, asked.get("startingPoint") or "main")
        self.answer(200)

    def preupload(self, name: str, asked: dict):
        self.demand_token()
        self.repository(name)
        self.fail("broken")
        large = (".safetensors", ".bin", ".png")
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(large) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, name: str, asked: dict):
        self.demand_token()
        self.repository(name)
        actions = [
            {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/large/{one['oid']}", "header": {}}}}
            for one in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": actions}, {"Content-Type": "application/vnd.git-lfs+json"})

    def store(self, oid: str, body: bytes):
        self.fail("full")
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusalError(400, "", "the content has another sum")
        self.server.large[oid] = body
        self.answer(200)

    def commit(self, name: str, revision: str, create_pr: bool, body: bytes):
        self.demand_token()
        repository = self.repository(name)
        self.fail("conflict", "refused", "busy")
        parent = self.revision(repository, revision)
        files = dict(repository.commits[parent])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, parent):
                raise RefusalError(412, "", "The branch has moved on")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if item["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            if item["key"] == "deletedFile":
                if value["path"] not in files:
                    raise RefusalError(400, "", f"there is no {value['path']} to delete")
                del files[value["path"]]
        requests = sum(ref.startswith("refs/pr/") for ref in repository.refs)
        ref = f"refs/pr/{requests + 1}" if create_pr else revision
        sha = repository.commit(ref, files, parent)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}"}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{name}/discussions/{requests + 1}"
        self.answer(200, answer)

    def tree(self, name: str, revision: str, folder: str, recursive: bool):
        repository = self.repository(name)
        files = repository.commits[self.revision(repository, revision)]
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise RefusalError(404, "EntryNotFound", "there is no such folder")
        listing = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(inside.items())
            if recursive or "/" not in path.removeprefix(f"{folder}/" if folder else "")
        ]
        self.answer(200, listing)

    def info(self, name: str, revision: str):
        repository = self.repository(name)
        sha = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self.answer(
            200,
            {"id": name, "modelId": name, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings},
        )

    def resolve(self, name: str, revision: str, file: str):
        repository = self.repository(name)
        sha = self.revision(repository, revision)
        if file not in repository.commits[sha]:
            raise RefusalError(404, "EntryNotFound", f"there is no {file}")
        data = repository.commits[sha][file]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "none"}
        self.answer(200, data, headers)
