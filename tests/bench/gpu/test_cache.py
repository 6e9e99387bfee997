"""Triton's cache, packed here and unpacked where there is a GPU."""

import pytest

from bench.gpu import cache


@pytest.fixture
def filled(tmp_path):
    folder = tmp_path / "cache"
    for name in ("AB/k.cubin", "AB/k.json", "AB/k.ttir", "AB/__grp__k.json", "CD/launcher.so"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    archive = tmp_path / "packed" / "cache.tar.xz"
    cache.pack(folder, archive, 90)
    return folder, archive


def test_what_triton_needs_lies_where_it_was(filled):
    folder, archive = filled
    for path in folder.rglob("*.*"):
        path.unlink()
    kernels = cache.unpacked(archive)
    assert kernels.folder == folder
    assert kernels.count() == 1
    assert "is used: 1 kernels" in kernels.said
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
    assert found == {
        name: name for name in ("AB/k.cubin", "AB/k.json", "AB/__grp__k.json", "CD/launcher.so")
    }


def test_another_build_of_triton(filled, monkeypatch):
    """Its kernels are compiled anew, where Triton keeps its own, and that is said."""
    folder, archive = filled
    present = cache.versions()
    monkeypatch.setattr(cache, "versions", lambda: present | {"triton": "9.9"})
    kernels = cache.unpacked(archive)
    assert kernels.folder != folder
    assert f"is not used: it is of triton {present['triton']}, and this is 9.9" in kernels.said


def test_a_folder_that_cannot_be_written(filled, monkeypatch):
    _, archive = filled

    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache.Path, "mkdir", refuse)
    assert "cannot be written: read-only" in cache.unpacked(archive).said
