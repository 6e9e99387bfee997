"""The tuned table's file: what is trusted, and what an interrupted write leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cache import give_away
from wn_kernels import tuning
from wn_kernels.plan import table

CHOICE = {"forward": "scaled", "backward": "scaled"}


@pytest.fixture
def place():
    """Where the table lies: it was named, or is in the user's cache."""
    return "cache"


@pytest.fixture
def stored(place, own_table, tmp_path, monkeypatch):
    """A table with a choice, and the paths that have to be trusted, from the file upwards."""
    if place == "cache":
        monkeypatch.delenv(table.VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        tuning._forget()
    path = table.store("aten", {"a": CHOICE})
    parts = [path, path.parent]
    return path, parts if place == "named" else [*parts, tmp_path / "home"]


each_part = pytest.mark.parametrize(
    ("place", "level"), [("named", 0), ("named", 1), ("cache", 0), ("cache", 1), ("cache", 2)]
)
both_places = pytest.mark.parametrize("place", ["named", "cache"])


@both_places
def test_ones_own_is_read(stored):
    assert table.find("aten", "a") == CHOICE
    assert stat_of(stored[0]) & 0o022 == 0


def stat_of(path):
    return path.stat().st_mode & 0o777


@each_part
def test_what_others_may_write_is_not_read(stored, level):
    part = stored[1][level]
    part.chmod(stat_of(part) | 0o020)
    with pytest.warns(UserWarning, match=f"{stored[0]} is ignored: others may write to {part} "):
        assert table.find("aten", "a") is None


@each_part
def test_of_another_user_is_not_read(stored, level, monkeypatch):
    part = stored[1][level]
    give_away(part, monkeypatch)
    with pytest.warns(UserWarning, match=f"{stored[0]} is ignored: .* belongs to another user"):
        assert table.find("aten", "a") is None


@both_places
def test_nothing_is_written_where_others_may_write(stored):
    path, parts = stored
    for folder in parts[1:]:
        before = stat_of(folder)
        folder.chmod(before | 0o002)
        with pytest.raises(PermissionError, match=f"others may write to {folder} "):
            table.store("aten", {"b": CHOICE})
        folder.chmod(before)
    assert list(json.loads(path.read_text())[table.machine("aten")]) == ["a"]


def test_a_file_that_others_may_write_is_put_aside(stored):
    path, _ = stored
    path.chmod(0o666)
    with pytest.warns(UserWarning, match="others may write"):
        table.store("aten", {"b": CHOICE})
    assert table.find("aten", "b") == CHOICE
    assert table.find("aten", "a") is None
    assert path.with_name(path.name + ".unreadable").exists()


def test_a_full_disk_leaves_what_was_there(stored, monkeypatch):
    path, _ = stored
    before = path.read_text()

    def write_text(self, text, *_):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(OSError, match=r"No space left on device: .*tuned\.json"):
            table.store("aten", {"b": CHOICE})
    assert path.read_text() == before
    assert {file.name for file in path.parent.iterdir()} == {"tuned.json", "tuned.json.lock"}


def test_a_write_that_was_interrupted(stored):
    """Killed with the new table half written: the old one is read, the next write cleans up."""
    path, _ = stored
    code = """
import os, signal
from pathlib import Path
from wn_kernels.plan import table

def write_text(self, text, *_):
    with open(self, "w") as file:
        file.write(text[:20])
    os.kill(os.getpid(), signal.SIGKILL)

Path.write_text = write_text
table.store("aten", {"b": {}})
"""
    before = path.read_text()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert path.read_text() == before
    assert list(path.parent.glob("*.new-*"))
    table.store("aten", {"c": CHOICE})
    assert {file.name for file in path.parent.iterdir()} == {"tuned.json", "tuned.json.lock"}
    assert table.find("aten", "a") == table.find("aten", "c") == CHOICE


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    """Nothing is found in it, without a warning, and an error names it."""
    (tmp_path / "file").touch()
    monkeypatch.delenv(table.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    table.forget()
    assert table.find("aten", "a") is None
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        table.store("aten", {"a": CHOICE})
    table.forget()


def test_under_any_mask(own_table):
    before = os.umask(0)
    try:
        table.store("aten", {"a": CHOICE})
    finally:
        os.umask(before)
    assert stat_of(own_table.parent) == 0o700
    assert table.find("aten", "a") == CHOICE
