"""The hub, by a stand-in on 127.0.0.1: what is pushed there comes back whole, by its id, and is checked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from diffpress.export.manifest import Manifest, list_files, read_manifest, write_manifest
from diffpress.hub import at_hand
from diffpress.pushing import push

COMMIT = "c" * 40
RECIPE = {"seed": 3, "sampling": {"steps": 2}, "quantize": {"method": "ptq"}}


class Hub(ThreadingHTTPServer):
    """Repositories as a table of their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        """Files that were fetched."""
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, value: Any = None, body: bytes = b"", **headers: str) -> None:
        body = body if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if self.server.refuses:
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(given)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.files.setdefault(name, {})
            self._answer(200, {"url": f"{self.server.address}/{name}"})
        elif "/preupload/" in path:
            files = json.loads(given)["files"]
            answers = [{"path": own["path"], "uploadMode": "regular", "shouldIgnore": False} for own in files]
            self._answer(200, {"files": answers})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, given.splitlines()):
                if line["key"] == "file":
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer(200, {"errors": [], "warnings": []})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for name, files in self.server.files.items():
            if path.startswith(f"/api/models/{name}/revision/") or path == f"/api/models/{name}":
                siblings = [{"rfilename": own} for own in sorted(files)]
                self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings})
                return
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": own, "size": len(body), "oid": _oid(body)} for own, body in files.items()
                ]
                self._answer(200, tree)
                return
            own = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
            if path.startswith(f"/{name}/resolve/") and own in files:
                self.server.asked += [own] if self.command == "GET" else []
                self._answer(200, body=files[own], ETag=f'"{_oid(files[own])}"', X_Repo_Commit=COMMIT)
                return
        self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")


def _oid(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:40]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "stand-in")
        yield server
        server.shutdown()


CARD = "---\nlicense: openrail++\npipeline_tag: text-to-image\ndatasets: [not/carried]\n---\n# Original\n"


@pytest.fixture
def artifact(tiny_pixels: Path, tmp_path: Path) -> Path:
    """An artifact without any edit, of a source on the hub, with a card and strangers beside it."""
    import shutil

    folder = Path(shutil.copytree(tiny_pixels, tmp_path / "small"))
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("...")
    metrics = {
        "psnr_db": 31.25,
        "count": 16,
        "steps": 8,
        "size_bytes": {"candidate": 10**6, "reference": 4 * 10**6},
        "total_size_bytes": {"candidate": 2 * 10**6, "reference": 5 * 10**6},
    }
    manifest = Manifest(
        fingerprint="",
        versions={"diffpress": "0.1.0"},
        recipe=RECIPE,
        source={"model": "org/original", "files": {}},
        timesteps=[],
        edits=[],
        plan=[],
        metrics=metrics,
        files=list_files(folder),
    )
    write_manifest(folder, manifest)
    (folder / "unet" / ".DS_Store").write_bytes(b"x")
    (folder / "notes.txt").write_text("private")
    return folder


def test_what_is_pushed_comes_back_whole_and_is_sound(hub: Hub, artifact: Path, diffpress: Callable[..., Any]) -> None:
    assert push(artifact, "me/small") == f"{hub.address}/me/small"
    files = read_manifest(artifact).files
    assert hub.files["me/small"].keys() == {*files, "diffpress.json"}
    assert all(hub.files["me/small"][name] == (artifact / name).read_bytes() for name in files if name != "README.md")
    # What others put beside it is not fetched.
    hub.files["me/small"]["onnx/large.onnx"] = b"..."
    found = diffpress("verify", "me/small")
    assert (found.status, "is sound" in " ".join(found.output.split())) == (0, True), found.errors
    assert "onnx/large.onnx" not in hub.asked
    assert any(path.is_symlink() for path in Path(at_hand("me/small")).rglob("*"))
    assert json.loads(diffpress("inspect", "me/small", "--json").output)["recipe"]["seed"] == 3


def test_the_card_has_figures_recipe_licence_and_base_model(hub: Hub, artifact: Path) -> None:
    push(artifact, "me/small")
    _, head, text = hub.files["me/small"]["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "diffusers",
        "tags": ["diffpress"],
        "license": "openrail++",
        "pipeline_tag": "text-to-image",
        "base_model": "org/original",
        "base_model_relation": "quantized",
    }
    assert "31.3 dB (16 pairs, 8 steps)" in text or "31.2 dB (16 pairs, 8 steps)" in text
    assert "1.0 MB of 4.0 MB (0.25)" in text
    assert yaml.safe_load(text.split("```yaml")[1].split("```")[0]) == RECIPE


@pytest.mark.parametrize("source", ["/home/me/secret/project", "models--org--original/snapshots/abc"])
def test_a_card_names_no_folders_of_the_machine(hub: Hub, artifact: Path, source: str) -> None:
    manifest = read_manifest(artifact)
    write_manifest(artifact, manifest.model_copy(update={"source": {"model": f"{source}", "files": {}}}))
    push(artifact, "me/small")
    card = hub.files["me/small"]["README.md"].decode()
    assert "secret" not in card
    assert ("base_model: org/original" in card) == source.startswith("models--")


def test_a_damaged_artifact_is_not_pushed(hub: Hub, artifact: Path, diffpress: Callable[..., Any]) -> None:
    (artifact / "model_index.json").write_text("{}")
    found = diffpress("push", artifact, "me/small")
    assert (found.status, hub.files) == (2, {})
    assert "model_index.json is not what was saved" in " ".join(found.errors.split())


@pytest.mark.parametrize(("name", "words"), [("small", "give ORG/NAME"), ("me/small", "hf auth login")])
def test_what_the_hub_refuses_is_said(
    hub: Hub, artifact: Path, diffpress: Callable[..., Any], name: str, words: str
) -> None:
    hub.refuses = True
    found = diffpress("push", artifact, name)
    assert (found.status, found.output) == (2, "")
    assert words in " ".join(found.errors.split())


def test_a_pipeline_is_fetched_with_all_that_its_tokenizers_read(hub: Hub) -> None:
    names = ["model_index.json", "tokenizer/merges.tiktoken", "tokenizer/chat_template.jinja", "unet/x.safetensors"]
    hub.files["me/plain"] = {name: name.encode() for name in [*names, "unet/model.onnx", "flax.msgpack"]}
    folder = Path(at_hand("me/plain"))
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} == set(names)


def test_what_is_not_there_is_said(hub: Hub, diffpress: Callable[..., Any]) -> None:
    found = diffpress("verify", "me/nothing")
    assert found.status == 2
    assert "there is no folder me/nothing, and it could not be fetched from the hub" in " ".join(found.errors.split())


@pytest.mark.long
def test_by_its_environment_variable(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    for arguments in (["push", str(artifact), "me/small"], ["run", "me/small", "--out", "a.png"]):
        program = f"import sys; sys.argv = ['diffpress', *{arguments!r}]; from diffpress.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").is_file()
