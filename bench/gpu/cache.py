"""Triton's cache is filled without a GPU and packed for a machine that has one.

Over the stand-in the sections launch what they would launch on a GPU, so that their kernels are
compiled here. The archive holds the cubins, their metadata and the launchers. Triton's metadata has
absolute paths, so it is unpacked to the path that it was made at. It serves the same build of
Triton, the same sources of the kernels and the same capability; otherwise kernels are compiled
anew, and the run says how many.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

# Triton needs nothing else of what it keeps.
PACKED = (".cubin", ".json", ".so")
MANIFEST = "manifest.json"
CACHE = Path(tempfile.gettempdir()) / "wn_kernels_triton_cache"


class Kernels(NamedTuple):
    """A cache of Triton's, by its folder and a sentence about it."""

    folder: Path
    said: str

    @staticmethod
    def present() -> Kernels:
        """Returns the cache that Triton would take."""
        folder = os.environ.get("TRITON_CACHE_DIR")
        path = Path(folder) if folder else Path.home() / ".triton" / "cache"
        return Kernels(path, f"Triton's cache is {path}")

    def count(self) -> int:
        """Returns the number of kernels in it."""
        return sum(1 for _ in self.folder.glob("*/*.cubin"))


def versions() -> dict[str, Any]:
    """Returns the versions that a cache depends on."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "triton": of("triton"),
        "torch": of("torch"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
    }


def make(archive: Path, capability: int) -> int:
    """Fills a cache over the stand-in and packs it. Returns 1 if a section failed."""
    from bench.gpu.run import Options, run

    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    with tempfile.TemporaryDirectory() as out:
        # As long as it takes: every case, and every test.
        code = run(Options(Path(out), seconds=1e5, dry=capability, most=0))
    pack(CACHE, archive, capability)
    size = archive.stat().st_size / 2**20
    kernels = Kernels(CACHE, "").count()
    print(f"{kernels} kernels of capability {capability} packed into {archive}, {size:.1f} MiB")
    return code


def pack(folder: Path, archive: Path, capability: int) -> None:
    """Packs what Triton needs of a cache."""
    manifest = versions() | {"folder": str(folder), "capability": capability}
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as packed:
        text = json.dumps(manifest).encode()
        member = tarfile.TarInfo(MANIFEST)
        member.size = len(text)
        packed.addfile(member, BytesIO(text))
        for path in sorted(folder.rglob("*")):
            if path.suffix in PACKED:
                packed.add(path, path.relative_to(folder))


def unpacked(archive: Path) -> Kernels:
    """Unpacks a cache where it was made and returns it, or the present one if that does not fit."""
    with tarfile.open(archive) as packed:
        (first, *rest) = packed.getmembers()
        text = packed.extractfile(first)
        if first.name != MANIFEST or text is None:
            return _without(archive, "it is none that was packed here")
        manifest = json.load(text)
        for name, present in versions().items():
            if manifest[name] != present:
                return _without(archive, f"it is of {name} {manifest[name]}, and this is {present}")
        folder = Path(manifest["folder"])
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            packed.extractall(folder, members=rest, filter="data")
        except OSError as error:
            return _without(archive, f"{folder} cannot be written: {error}")
    kernels = Kernels(folder, "")
    return kernels._replace(said=f"{archive} is used: {kernels.count()} kernels in {folder}")


def _without(archive: Path, why: str) -> Kernels:
    present = Kernels.present()
    return present._replace(said=f"{archive} is not used: {why}")
