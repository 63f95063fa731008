"""Downloads from a server on loopback that answers as Hugging Face does, breaks off, lies and refuses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hybrid import pull as pull_module
from hybrid.cli.main import main
from hybrid.errors import CapacityError, ConfigError, DownloadError
from hybrid.pull import find, pull

DATA = {
    "m-Q4_K_M.gguf": bytes(range(256)) * 5000,
    "m-Q8_0-00001-of-00002.gguf": b"first" * 1000,
    "m-Q8_0-00002-of-00002.gguf": b"second" * 1000,
    "m-Q2_K-00001-of-00002.gguf": b"alone",
    "sub/m-Q4_K_M_XL.gguf": b"other",
}


class Server:
    """What it does, and what it was asked."""

    def __init__(self) -> None:
        self.breaks_after: list[int] = []  # bytes after which an answer breaks off, one an answer
        self.failures: list[int] = []  # status codes of the next answers
        self.resumes, self.tells_hash, self.damages = True, True, False
        self.asked: list[tuple[str, str, str | None]] = []

        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                server.answer(self, body=False)

            def do_GET(self) -> None:
                server.answer(self, body=True)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        path, wanted = handler.path, handler.headers.get("Range")
        self.asked.append((handler.command, path, wanted))
        if self.failures:
            handler.send_error(self.failures.pop(0))
            return
        if path.startswith("/api/models/user/repo/tree/main"):
            content = json.dumps([self.entry(name) for name in DATA] + [{"path": "README.md", "size": 1}])
            self.send(handler, content.encode(), 0, body)
            return
        name = path.split("/resolve/main/")[-1].lstrip("/")
        if name not in DATA:
            handler.send_error(404)
            return
        data = b"x" + DATA[name][1:] if self.damages else DATA[name]
        start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.resumes else 0
        self.send(handler, data, start, body)

    def entry(self, name: str) -> dict[str, object]:
        sha256 = hashlib.sha256(DATA[name]).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": len(DATA[name])}} if self.tells_hash else {}
        return {"path": name, "size": len(DATA[name]), **lfs}

    def send(self, handler: BaseHTTPRequestHandler, data: bytes, start: int, body: bool) -> None:
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        if self.tells_hash:
            handler.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
        handler.end_headers()
        if body:
            cut = self.breaks_after.pop(0) if self.breaks_after else len(data)
            handler.wfile.write(data[start : start + cut])
            if cut < len(data) - start:
                handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(pull_module.time, "sleep", lambda seconds: None)
    yield server
    server.http.shutdown()
    server.http.server_close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_quantisation_of_a_repository(server: Server, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    (found,) = pull(find("user/repo:q4_k_m"), tmp_path, lambda *args: calls.append(args))
    assert found.verified and content(tmp_path) == {"m-Q4_K_M.gguf": DATA["m-Q4_K_M.gguf"]}
    assert calls[-1] == (len(DATA["m-Q4_K_M.gguf"]),) * 2


def test_all_shards_in_order(server: Server, tmp_path: Path) -> None:
    found = pull(find("user/repo:Q8_0"), tmp_path)
    assert [file.path.name for file in found] == ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]
    assert content(tmp_path) == {name: DATA[name] for name in DATA if "Q8_0" in name}


@pytest.mark.parametrize("source", ["/m-Q4_K_M.gguf", "/m-Q4_K_M.gguf?download=true"])
def test_a_plain_url(server: Server, tmp_path: Path, source: str) -> None:
    server.tells_hash = False
    if "?" in source:
        DATA["m-Q4_K_M.gguf?download=true"] = DATA["m-Q4_K_M.gguf"]
    try:
        (found,) = pull(find(server.url + source), tmp_path)
    finally:
        DATA.pop("m-Q4_K_M.gguf?download=true", None)
    assert not found.verified and found.sha256 == hashlib.sha256(DATA["m-Q4_K_M.gguf"]).hexdigest()


def test_the_url_of_a_shard_means_all(server: Server, tmp_path: Path) -> None:
    pull(find(server.url + "/m-Q8_0-00002-of-00002.gguf"), tmp_path)
    assert len(content(tmp_path)) == 2


def test_broken_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    files = find("user/repo:Q4_K_M")
    server.breaks_after = [1000, 300_000, 1]
    (found,) = pull(files, tmp_path)
    assert found.verified
    resumed = [wanted for _, _, wanted in server.asked if wanted]
    assert resumed == ["bytes=1000-", "bytes=301000-", "bytes=301001-"]


def test_a_new_start_goes_on(server: Server, tmp_path: Path) -> None:
    (tmp_path / "m-Q4_K_M.gguf.partial").write_bytes(DATA["m-Q4_K_M.gguf"][:70_000])
    (found,) = pull(find("user/repo:Q4_K_M"), tmp_path)
    assert found.verified and [wanted for _, _, wanted in server.asked if wanted] == ["bytes=70000-"]
    before = len(server.asked)
    (again,) = pull(find("user/repo:Q4_K_M"), tmp_path)
    assert again.verified and len(server.asked) == before + 1  # the list of files alone


def test_passing_failures_are_tried_again_and_others_told(server: Server, tmp_path: Path) -> None:
    files = find("user/repo:Q4_K_M")
    server.failures = [503, 500]
    assert pull(files, tmp_path)[0].verified
    server.failures = [503] * 20
    with pytest.raises(DownloadError, match=r"failed after 0 bytes.*503"):
        pull(files, tmp_path / "other")
    server.failures = []
    with pytest.raises(DownloadError, match=r"404.*is the name right"):
        pull(find(server.url + "/nothing.gguf"), tmp_path)


def test_damage_is_found_and_removed(server: Server, tmp_path: Path) -> None:
    server.damages = True
    with pytest.raises(DownloadError, match=r"damaged: expected SHA-256 [0-9a-f]{64}, found"):
        pull(find("user/repo:Q4_K_M"), tmp_path)
    assert not content(tmp_path)
    (tmp_path / "m-Q4_K_M.gguf").write_bytes(b"y" * len(DATA["m-Q4_K_M.gguf"]))
    with pytest.raises(DownloadError, match="not the server's"):
        pull(find("user/repo:Q4_K_M"), tmp_path)


def test_a_server_that_cannot_resume(server: Server, tmp_path: Path) -> None:
    server.resumes = False
    (tmp_path / "m-Q4_K_M.gguf.partial").write_bytes(DATA["m-Q4_K_M.gguf"][:70_000])
    with pytest.raises(DownloadError, match="cannot resume"):
        pull(find("user/repo:Q4_K_M"), tmp_path)


def test_a_full_disk_is_told_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match=r"1280000 more bytes .* 10 are free"):
        pull(find("user/repo:Q4_K_M"), tmp_path)
    assert not content(tmp_path)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("user/repo", "expected user/repo:QUANT"),
        ("user/repo:Q3_K", "has no Q3_K; it has m-Q2_K"),
        ("user/repo:Q2_K", "has 1 of the 2 shards"),
        ("http://127.0.0.1/", "names no file"),
    ],
)
def test_sources_that_mean_nothing(server: Server, source: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        find(source)


def test_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "user/repo:Q4_K_M", "-o", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'm-Q4_K_M.gguf'}\n" and "as the server has it" in shown.err
    server.http.server_close()
    assert main(["pull", "user/repo:Q3_K", "-o", str(tmp_path)]) != 0
