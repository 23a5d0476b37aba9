# SPDX-License-Identifier: Apache-2.0
"""A small Hub on loopback, for the unmodified client: repositories with commits, LFS, tokens, and faults.

Written from the client's source (huggingface_hub 2.4.0), so it proves what lrconvert asks of the client and
what survives a failure, not how the real Hub answers: its refusals (401, 403, 404, 409, 412) are a reading
of the client. There is no pull request, no paging, no rate limit; a file is LFS when its name ends in .safetensors,
whatever .gitattributes says. Of Xet there is the address of a storage, which refuses everything: its protocol is that
of hf_xet alone. Tests that are about something else switch it off (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIX = ".safetensors"


@dataclass
class Token:
    """Whose it is, and its role: read, write, or fineGrained with permissions."""

    user: str
    role: str = "write"
    permissions: list[str] = field(default_factory=list)

    def whoami(self) -> dict[str, Any]:
        access: dict[str, Any] = {"displayName": f"{self.role}-token", "role": self.role}
        if self.role == "fineGrained":
            entity = {"type": "user", "name": self.user}
            access["fineGrained"] = {"global": [], "scoped": [{"entity": entity, "permissions": self.permissions}]}
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    def writes(self, repo: str) -> bool:
        granted = self.role == "write" or "repo.write" in self.permissions
        return granted and repo.partition("/")[0] == self.user


@dataclass
class Repo:
    """Commits are whole trees: path to bytes. `refs` are branches and tags."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, tree: dict[str, bytes], message: str, branch: str = "main") -> str:
        digest = hashlib.sha1(repr((len(self.commits), self.refs.get(branch), sorted(tree))).encode())
        for name in sorted(tree):
            digest.update(tree[name])
        self.commits[digest.hexdigest()] = tree
        self.messages.append(message)
        self.refs[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the tree listing has it."""
    if not path.endswith(LFS_SUFFIX):
        return {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    sha = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n".encode()
    lfs = {"oid": sha, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(data), "oid": git_oid(pointer), "lfs": lfs}


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


class Refusal(Exception):
    """An answer that isn't 200, with the headers by which the client knows what it means."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Fault:
    """What happens to a request whose method and path match: a status, or for 0 a connection that breaks off."""

    pattern: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """The state. `fail_put`: the number of the LFS upload that fails, from 1; `fail_commit`: its status;
    `cut`: downloads of LFS files end after so many bytes. `part`: LFS files are uploaded in parts of so many."""

    url: str = ""
    tokens: dict[str, Token] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS, by sha256
    requests: list[str] = field(default_factory=list)  # method and path
    received: list[bytes] = field(default_factory=list)  # the body of every request, decoded where it is base64
    puts: int = 0
    fail_put: int = 0
    fail_commit: int = 0
    cut: int | None = None
    part: int | None = None
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)  # each is used up by the first request that it fits

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repository as somebody left it."""
        repo = self.repos[name] = Repo(private)
        repo.commit({".gitattributes": GITATTRIBUTES, **files}, "initial commit")
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return repo

    # --- what each address does: the caller's token, the match, the body -> JSON

    def whoami(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        return token.whoami()

    def create(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or (token.user if token else "")
        name = f"{owner}/{asked['name']}"
        if token is None or not token.writes(name):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.repos:
            raise Refusal(409, "You already created this model repo")
        self.add(name, {}, private=bool(asked.get("private")) or asked.get("visibility") == "private")
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def validate_yaml(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        values = yaml.safe_load(head[1]) if head else {}
        licence = values.get("license", "mit")
        if not isinstance(licence, str) or not re.fullmatch(r"[a-z0-9.-]+", licence):
            raise Refusal(400, json.dumps([{"message": f'"license" must be one of […], not {licence}'}]), "yaml")
        return {"errors": [], "warnings": []}

    def info(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        repo, name = self.readable(token, match), match["repo"]
        oid = self.revision(repo, match["rev"] or "main")
        files = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        return {"_id": name, "id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": files,
                "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def tree(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        repo = self.readable(token, match)
        return [entry(path, data) for path, data in sorted(repo.commits[self.revision(repo, match["rev"])].items())]

    def preupload(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        repo = self.writable(token, match)
        there = repo.commits[self.revision(repo, match["rev"])]
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            found = entry(path, there[path]) if path in there else {}
            oid = found["lfs"]["oid"] if "lfs" in found else found.get("oid")
            mode = "lfs" if path.endswith(LFS_SUFFIX) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def xet_token(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        self.writable(token, match)
        return {"accessToken": "of no storage", "exp": int(time.time()) + 3600, "casUrl": f"{self.url}/xet"}

    def lfs_batch(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        self.writable(token, match)
        answers = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.objects:
                answer["actions"] = {"upload": self.upload_of(asked["oid"], asked["size"])}
            answers.append(answer)
        return {"transfer": "basic" if self.part is None else "multipart", "objects": answers}

    def upload_of(self, oid: str, size: int) -> dict[str, Any]:
        """Where an LFS file goes: to one address, or its parts to one each, and then a list of them to another."""
        if self.part is None:
            return {"href": f"{self.url}/lfs-objects/{oid}"}
        numbers = range(1, -(-size // self.part) + 1)
        places = {str(number): f"{self.url}/lfs-parts/{oid}/{number}" for number in numbers}
        return {"href": f"{self.url}/lfs-whole/{oid}", "header": {"chunk_size": str(self.part), **places}}

    def lfs_part(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        self.lfs_counted()
        self.parts[match["sha"], int(match["number"])] = body
        return {}

    def lfs_whole(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        """The parts that are listed, by their ETags, joined."""
        listed = json.loads(body)["parts"]
        parts = [self.parts.pop((match["sha"], part["partNumber"])) for part in listed]
        if [part["etag"] for part in listed] != [etag(part) for part in parts]:
            raise Refusal(400, "other parts than those that were uploaded")
        self.store(match["sha"], b"".join(parts))
        return {}

    def lfs_put(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        self.lfs_counted()
        self.store(match["sha"], body)
        return {}

    def lfs_counted(self) -> None:
        self.puts += 1
        if self.puts == self.fail_put:
            raise Refusal(403, "Request has expired")  # what a store says; 5xx would be tried again for minutes

    def store(self, sha: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha:
            raise Refusal(400, "the content does not have the digest that was promised")
        self.objects[sha] = data

    def commit(self, token: Token | None, match: re.Match[str], body: bytes) -> Any:
        repo, branch = self.writable(token, match), match["rev"]
        if self.fail_commit:
            raise Refusal(self.fail_commit, "the commit failed")
        if branch not in repo.refs:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs[branch]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[repo.refs[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
                self.received.append(tree[value["path"]])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"LFS pointer to {value['oid']}, which was never uploaded")
                tree[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile" and tree.pop(value["path"], None) is None:
                raise Refusal(404, f"{value['path']} does not exist", "EntryNotFound")
        oid = repo.commit(tree, header["summary"], branch)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{match['repo']}/commit/{oid}"}

    # --- who may do what

    def readable(self, token: Token | None, match: re.Match[str]) -> Repo:
        repo = self.repos.get(match["repo"])
        own = token is not None and match["repo"].partition("/")[0] == token.user
        if repo is None or (repo.private and not own):
            raise Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, token: Token | None, match: re.Match[str]) -> Repo:
        repo = self.readable(token, match)
        if token is None or not token.writes(match["repo"]):
            raise Refusal(403, "Forbidden: you must have write access to this repository")
        return repo

    def revision(self, repo: Repo, name: str) -> str:
        oid = repo.resolve(unquote(name))
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return oid


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<rev>[^/]+)", Hub.tree),
    ("GET", rf"/api/models/{_REPO}(?:/revision/(?P<rev>[^/]+))?", Hub.info),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<rev>[^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<rev>[^/]+)", Hub.commit),
    ("GET", rf"/api/models/{_REPO}/xet-write-token/(?P<rev>[^/]+)", Hub.xet_token),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/lfs-objects/(?P<sha>[0-9a-f]{64})", Hub.lfs_put),
    ("PUT", r"/lfs-parts/(?P<sha>[0-9a-f]{64})/(?P<number>\d+)", Hub.lfs_part),
    ("POST", r"/lfs-whole/(?P<sha>[0-9a-f]{64})", Hub.lfs_whole),
]
RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
STORED = re.compile(r"/lfs-objects/(?P<sha>[0-9a-f]{64})")


class Handler(BaseHTTPRequestHandler):
    """One request: finds its route, speaks HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms until the client has acknowledged the header
    hub: Hub
    lock: threading.Lock

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.received += [body, self.path.encode()]
        fits = (fault for fault in self.hub.faults if re.search(fault.pattern, f"{self.command} {path}"))
        if (fault := next(fits, None)) is not None:
            self.hub.faults.remove(fault)
            if fault.status:
                return self._send(fault.status, b'{"error": "a fault"}', fault.headers)
            self.close_connection = True
            return self.connection.close()
        try:
            with self.lock:
                token = self._token()
                if self.command in ("GET", "HEAD") and (match := RESOLVE.fullmatch(path)):
                    return self._resolve(token, match)
                if self.command == "GET" and (match := STORED.fullmatch(path)):
                    return self._send(200, self.hub.objects[match["sha"]], cut=self.hub.cut)
                for method, pattern, act in ROUTES:
                    if method == self.command and (match := re.fullmatch(pattern, path)):
                        answer = json.dumps(act(self.hub, token, match, body)).encode()
                        return self._send(200, answer, {"ETag": etag(body)} if method == "PUT" else None)
            raise Refusal(404, f"no such address: {path}")
        except Refusal as no:
            answer = {"errors": json.loads(no.message)} if no.code == "yaml" else {"error": no.message}
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message} if no.code != "yaml" else {}
            self._send(no.status, json.dumps(answer).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 (the names that http.server looks for)

    def _token(self) -> Token | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _resolve(self, token: Token | None, match: re.Match[str]) -> None:
        repo = self.hub.readable(token, match)
        oid, path = self.hub.revision(repo, match["rev"]), unquote(match["path"])
        if path not in repo.commits[oid]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = repo.commits[oid][path]
        found = entry(path, data)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{found["oid"]}"'}
        if "lfs" not in found:
            return self._send(200, data, headers)
        sha = found["lfs"]["oid"]
        headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data))}
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as with the Hub: no redirect within
        self._send(302, b"", {**headers, "Location": f"{elsewhere}/lfs-objects/{sha}"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        self.close_connection = self.close_connection or cut is not None


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a free port of 127.0.0.1, until the block ends."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
