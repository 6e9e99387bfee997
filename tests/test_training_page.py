"""The code of docs/training.md runs as written, and does what the page says."""

import re
from pathlib import Path

import torch

from tests.comparison import assert_matches

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


def test_code_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 9
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "training.png").exists()
    assert names["watch"].read()["angle"].shape == (10, 3)
    deviation = names["preserving"][0](torch.randn(4000, 64)).std().double()
    assert 0.9 < deviation < 1.1
    import wn_kernels

    for name, n in wn_kernels.slice_norms(names["model"]).items():  # the hook has kept them
        assert_matches(n, names["initial"][name].double(), torch.float32, 64, roundings=4)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"\]\((images/.*?)\)", PAGE.read_text("utf-8"))
    assert len(pictures) == 4
    assert sum((PAGE.parent / picture).stat().st_size for picture in pictures) < 200_000
