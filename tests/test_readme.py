"""The README's code runs as written."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_code_blocks(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    difference = float(capsys.readouterr().out.split()[0])
    assert difference < 1e-5
    assert names["y"].shape == (16, 4096)
    assert names["layer"].weight_v.grad.abs().max() > 0
