"""Finding files: the order of places, and downloads that are right or not there at all."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading

import pytest

from mambakit.data import DataError
from mambakit.data.fetch import RemoteFile, locate

CONTENT = b"some published bytes" * 1000


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of its own for the cache, and no MAMBAKIT_DATA."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MAMBAKIT_DATA", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A web server on this machine that has `thing.gz`, and counts what it is asked."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "thing.gz").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=folder)
    ) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/", asked
        web.shutdown()


def remote(*mirrors: str, content: bytes = CONTENT) -> RemoteFile:
    return RemoteFile("things", "thing.gz", hashlib.sha256(content).hexdigest(), mirrors)


def test_a_download_is_kept_and_not_repeated(home, server):
    address, asked = server
    path = locate(remote(address))
    assert path == home / ".cache" / "mambakit" / "things" / "thing.gz"
    assert path.read_bytes() == CONTENT
    before = len(asked)
    assert locate(remote(address)) == path
    assert len(asked) == before
    assert [p.name for p in path.parent.iterdir()] == ["thing.gz"]


def test_the_next_mirror_is_tried(home, server, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "thing.gz").write_bytes(CONTENT[:-1])
    unreachable = "http://127.0.0.1:1/"
    path = locate(remote(unreachable, wrong.as_uri() + "/", server[0] + "nowhere/", server[0]))
    assert path.read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(home, server):
    with pytest.raises(DataError, match="SHA-256") as error:
        locate(remote(server[0], content=b"something else"))
    assert "MAMBAKIT_DATA" in str(error.value)
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_no_network_is_one_line_that_says_what_to_do(home):
    with pytest.raises(DataError, match=r"things/ and set MAMBAKIT_DATA") as error:
        locate(remote("http://127.0.0.1:1/"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["thing.gz", "thing"])
def test_the_named_folder_comes_first_packed_or_not(home, tmp_path, monkeypatch, name):
    for folder in (home / ".cache" / "mambakit", tmp_path / "mine"):
        (folder / "things").mkdir(parents=True)
        (folder / "things" / name).write_bytes(b"")
    assert locate(remote()) == home / ".cache" / "mambakit" / "things" / name
    monkeypatch.setenv("MAMBAKIT_DATA", str(tmp_path / "mine"))
    assert locate(remote()) == tmp_path / "mine" / "things" / name


def test_a_named_folder_that_is_none_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBAKIT_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataError, match=r"typo.*not a folder"):
        locate(remote())
