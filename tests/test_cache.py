"""What is trusted of the user's cache, and how its folders are made."""

import os
import stat
from pathlib import Path

import pytest

from wn_kernels import cache


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A cache in `top` with a file; every path from the top down."""
    top = tmp_path / "top"
    monkeypatch.setenv("XDG_CACHE_HOME", str(top))
    file = cache.directory() / "folder" / "file"
    cache.make(file.parent, cache.root())
    file.write_text("something")
    file.chmod(0o644)
    return top, top / "wn_kernels", file.parent, file


def give_away(path, monkeypatch):
    """Has a path belong to another user."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)


def test_what_is_ones_own_is_trusted(tree):
    assert cache.distrust(tree[-1], tree[0]) is None
    tree[-1].chmod(0o400)
    assert cache.distrust(tree[-1], tree[0]) is None


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("mode", [0o020, 0o002, 0o1002])
def test_what_others_may_write_is_not(tree, level, mode):
    part = tree[level]
    part.chmod(stat.S_IMODE(part.stat().st_mode) | mode)
    reason = cache.distrust(tree[-1], tree[0])
    assert reason == f"others may write to {part} (chmod go-w {part} forbids it)"


@pytest.mark.parametrize("level", range(4))
def test_what_belongs_to_another_is_not(tree, level, monkeypatch):
    give_away(tree[level], monkeypatch)
    reason = cache.distrust(tree[-1], tree[0])
    assert reason is not None
    assert "belongs to another user" in reason
    if os.geteuid() == 0:
        assert reason.startswith(f"{tree[level]} ")


def test_above_the_top_nothing_is_looked_at(tree):
    top, *_, file = tree
    top.parent.chmod(0o777)
    assert cache.distrust(file, top) is None
    assert cache.distrust(file, file.parent) is None
    top.chmod(0o777)
    assert cache.distrust(file, file.parent) is None


def test_what_is_not_there(tree):
    with pytest.raises(FileNotFoundError):
        cache.distrust(tree[-1].with_name("nothing"), tree[0])


def test_folders_are_made_for_the_user_alone(tree):
    for part in tree[:3]:
        assert stat.S_IMODE(part.stat().st_mode) == 0o700
    tree[1].chmod(0o777)
    with pytest.raises(PermissionError, match="others may write to"):
        cache.make(tree[2] / "another", tree[0])


def test_the_users_mask_does_not_matter(tmp_path):
    before = os.umask(0)
    try:
        cache.make(tmp_path / "a" / "b", tmp_path / "a")
    finally:
        os.umask(before)
    for part in (tmp_path / "a", tmp_path / "a" / "b"):
        assert stat.S_IMODE(part.stat().st_mode) == 0o700


def test_a_user_without_a_home(monkeypatch):
    """Has nothing, and an error that names the place."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert not cache.directory().exists()
    with pytest.raises(OSError, match="wn_kernels"):
        cache.make(cache.directory(), cache.root())
