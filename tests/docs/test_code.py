"""The code of the README and of the documentation runs as written, page by page.

The blocks of a page are run one after the other in one namespace. Where a page loads weights from a
hub, a small model with random weights of the same class stands in for the download.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch

import wn_kernels
from bench import cli
from tests.comparison import assert_matches
from wn_kernels.__main__ import _parser

ROOT = Path(__file__).parent.parent.parent
README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def fenced(page):
    """The line, the language and the text of each block of a page."""
    text = page.read_text("utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        yield line, found[2], textwrap.dedent(found[3])


def blocks(page):
    """The line and the code of each block of Python."""
    return [(line, code) for line, language, code in fenced(page) if language == "python"]


def run(page):
    """Runs the code of a page and returns its names."""
    names = {"__name__": "__main__"}
    for line, code in blocks(page):
        tree = ast.increment_lineno(ast.parse(code), line - 1)
        exec(compile(tree, str(page), "exec"), names)
    return names


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def no_downloads(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def small(cls, name):
        return cls(cls.config_class(num_hidden_layers=1))

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(small))


@pytest.fixture
def one_process(tmp_path):
    """A group of one process, which `torchrun` would have made."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# The pages in the set have tests of their own below.
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p) and p not in {README, TRAINING}], ids=name_of
)
def test_code(page, request, tmp_path, monkeypatch, own_table):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(code for _, code in blocks(page))
    if "from_pretrained" in text:
        request.getfixturevalue("no_downloads")
    if "init_device_mesh" in text:
        request.getfixturevalue("one_process")
    run(page)


def test_what_the_readme_says(capsys, tmp_path, monkeypatch):
    """Its code runs as well: both layers agree, and both convolutions of the model are found."""
    monkeypatch.chdir(tmp_path)
    names = run(README)
    out = capsys.readouterr().out
    assert float(out.split()[0]) < 1e-5
    assert names["layer"].weight_v.grad.abs().max() > 0
    assert "2 fused, 0 left alone" in out


def test_what_the_page_on_training_says(tmp_path, monkeypatch):
    """Its code runs as well, draws its plot, and gives what the page says."""
    monkeypatch.chdir(tmp_path)
    assert len(blocks(TRAINING)) >= 9
    names = run(TRAINING)
    assert (tmp_path / "training.png").exists()
    assert names["watch"].read()["angle"].shape == (10, 3)
    deviation = names["preserving"][0](torch.randn(4000, 64)).std().double()
    assert 0.9 < deviation < 1.1
    for name, n in wn_kernels.slice_norms(names["model"]).items():  # the hook has kept them
        assert_matches(n, names["initial"][name].double(), torch.float32, 64, roundings=4)


def test_pictures_of_training_are_there_and_small():
    pictures = re.findall(r"\]\((images/.*?)\)", TRAINING.read_text("utf-8"))
    assert len(pictures) == 4
    assert sum((TRAINING.parent / picture).stat().st_size for picture in pictures) < 200_000


def commands():
    """Each command of the package, of the benchmark and of make that a page shows, in a block or in
    a line."""
    pattern = re.compile(r"(?:python -m (wn_kernels|bench)|(make))((?: [\w./:<>-]+)*)")
    for page in PAGES:
        shown = [text for _, language, text in fenced(page) if not language]
        shown += re.findall(r"`((?:python -m|make) [^`\n]+)`", page.read_text("utf-8"))
        for program, make, arguments in sorted(set(pattern.findall("\n".join(shown)))):
            words = arguments.split()
            if words[:1] not in ([], ["COMMAND"]):
                name = f"{name_of(page)}: {program or make}{arguments}"
                yield pytest.param(program or make, words, id=name)


@pytest.mark.parametrize(("program", "arguments"), [*commands()])
def test_a_command_exists(program, arguments, capsys):
    if program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for target in arguments:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    elif program == "wn_kernels":
        _parser().parse_args(arguments)
    else:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([*arguments[:1], "--help"])


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=name_of)
def test_links(page):
    """A link or a picture of a page outside the site leads to a file. `make docs` checks those of
    the site."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_there_is_code_to_run():
    assert sum(len(blocks(page)) for page in PAGES) > 20
