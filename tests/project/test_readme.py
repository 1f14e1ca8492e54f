"""The documents: their Python runs, their commands and links are right, and they know every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sparsam
import sparsam.torch

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("cpp/*.md"))
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def test_documents_are_found() -> None:
    expected = {"README.md", "CONTRIBUTING.md", "cpp/README.md", "docs/api.md", "docs/formats.md"}
    assert expected <= set(DOCUMENTS)
    assert BLOCK.search(read("README.md"))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning, about PyTorch
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if BLOCK.search(read(name))])
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader types them; tracebacks show the document's own lines."""
    monkeypatch.chdir(tmp_path)
    text = read(document)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block[1], str(ROOT / document), "exec"), namespace)


@pytest.mark.parametrize(
    "command", ["pip install '.[demo]' && sparsam demo", "pip install '.[test]' && pytest"]
)
def test_readme_has_its_two_commands(command: str) -> None:
    assert read("README.md").splitlines().count(f"    {command}") == 1


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in LINK.findall(read(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            headings = HEADING.findall(target.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link


def test_every_public_name_is_on_the_map() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", read("docs/api.md"), re.MULTILINE))
    assert named == set(sparsam.__all__)


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/reference/*.md"))
    shown = re.findall(r"^::: sparsam\.(?:checkpoint\.)?(\w+)$", text, re.MULTILINE)
    written = re.findall(r"`sparsam\.(\w+)` is", text)
    assert {*sparsam.__all__} <= {*shown, *written, "checkpoint"}
    of_torch = re.findall(r"^::: sparsam\.torch\.(\w+)$", text, re.MULTILINE)
    assert sorted(of_torch) == sorted(sparsam.torch.__all__)
