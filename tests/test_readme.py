"""Every code block of the README, CONTRIBUTING and docs/ is run as it stands, page by page.

A page's blocks run in order in one empty folder, and its Python blocks share one namespace. Only three things differ
from what a reader does: the cache of fetched teachers holds a tiny LLaMA under each name, recipes run in their debug
size, and what would set this machine up anew (make, pip, git) is compared with the project's own files instead.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import mar.recipe
from mar.teachers import CACHE_LAYOUT, NAMED_TEACHERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TAGS = ("bash", "python", "text", "yaml")
TIME_LIMIT = 300
"""Seconds for one bash block: a hang must fail, whatever the machine's speed."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language tag, its text, and the line of the page where the text starts."""

    tag: str
    text: str
    line: int


def read_blocks(page: str) -> list[Block]:
    """The fenced blocks of a page. Raises ValueError for a block without an end or with a tag that no rule covers."""
    blocks: list[Block] = []
    opened: tuple[str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.splitlines(), start=1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif opened is None:
            tag = line.strip().removeprefix("```").split(" ")[0]
            if tag not in TAGS:
                raise ValueError(f"line {number}: the block's tag is {tag!r}; use one of {', '.join(TAGS)}.")
            opened, lines = (tag, number + 1), []
        else:
            blocks.append(Block(opened[0], textwrap.dedent("\n".join(lines)) + "\n", opened[1]))
            opened = None
    if opened is not None:
        raise ValueError(f"line {opened[1] - 1}: the block has no end.")
    return blocks


def fill_cache(cache: Path, model: Path) -> None:
    """Put `model` into a cache folder in the place of every named teacher."""
    for name, wheel in NAMED_TEACHERS.items():
        folder = cache / "teachers" / f"{name}-{wheel.gguf_sha256[:12]}-v{CACHE_LAYOUT}"
        shutil.copytree(model, folder)
        source = {"kind": "wheel", "name": name, "sha256": wheel.gguf_sha256, "note": "a tiny LLaMA of the tests"}
        (folder / "source.json").write_text(json.dumps(source), encoding="utf-8")


def debug_sized(commands: str) -> str:
    """Shell commands with every run of a recipe in its debug size."""
    return re.sub(r"^(mar (?:quickstart|refine)\b[^\n#]*?) *(#.*)?$", r"\1 --debug", commands, flags=re.MULTILINE)


def compared(command: str) -> bool:
    """Whether `command` sets a machine up: then it is checked against Makefile and pyproject.toml, not run."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        for target in (word for word in words[1:] if "=" not in word):
            assert target in targets, f"make has no target {target!r}."
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in re.findall(r"\[(.*?)\]", command):
            assert extra in project["optional-dependencies"], f"pyproject.toml has no extra {extra!r}."
    elif words[:1] != ["cd"] and words[:2] != ["git", "clone"]:
        return False
    return True


def run_bash(block: Block, where: str) -> None:
    kept = debug_sized("\n".join(line for line in block.text.splitlines() if not compared(line)))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", kept],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{kept}\n{done.stdout}\n{done.stderr}"


def run_yaml(block: Block) -> None:
    """Parse; a first line `# name.yaml` also writes the block to that file, for the blocks that follow."""
    yaml.safe_load(block.text)
    if named := re.match(r"# ([\w-]+\.yaml)\n", block.text):
        Path(named[1]).write_text(block.text, encoding="utf-8")


@each_page
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path) -> None:
    fill_cache(tmp_path / "cache", tiny_llama_folder)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "cache"))
    whole = mar.recipe.read_recipe
    monkeypatch.setattr(mar.recipe, "read_recipe", lambda *arguments: mar.recipe.debug_size(whole(*arguments)))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in read_blocks(page.read_text(encoding="utf-8")):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.tag == "bash":
            run_bash(block, where)
        elif block.tag == "yaml":
            run_yaml(block)
        elif block.tag == "python":
            # The blank lines give a traceback the page's own line numbers.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    written = {f"/{path.name}/" if path.is_dir() else f"/{path.name}" for path in Path.cwd().iterdir()}
    assert written <= set(ignored), f"{page.name} leaves {sorted(written - set(ignored))} in a clone; see .gitignore."


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), f"{page} links to {target}, which is not there."


def test_blocks_are_found_with_their_lines() -> None:
    page = "# A\n\n```bash\nmar info\n```\n\n- item\n\n    ```python\n    if True:\n        x = 1\n    ```\n"
    assert read_blocks(page) == [Block("bash", "mar info\n", 4), Block("python", "if True:\n    x = 1\n", 10)]


@pytest.mark.parametrize("fence", ["```", "```ruby", "```pycon"])
def test_an_unknown_tag_is_refused(fence: str) -> None:
    with pytest.raises(ValueError, match="line 2: the block's tag"):
        read_blocks(f"text\n{fence}\nputs 1\n```\n")


def test_a_block_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: the block has no end"):
        read_blocks("```python\nx = 1\n")


def test_only_runs_of_recipes_are_cut() -> None:
    page = "mar refine smollm2-135m runs/a  # hours\nmar quickstart\nmar convert smollm2-135m out\n"
    cut = "mar refine smollm2-135m runs/a --debug\nmar quickstart --debug\nmar convert smollm2-135m out\n"
    assert debug_sized(page) == cut


def test_set_up_commands_are_compared_not_run() -> None:
    assert compared("make test PIP_ARGS='--pre'  # all")
    assert compared("pip install -e '.[tensorboard]'")
    assert compared("cd mar")
    assert not compared("mar info")
    assert not compared("git status")
    with pytest.raises(AssertionError, match="no target 'nonsense'"):
        compared("make nonsense")
    with pytest.raises(AssertionError, match="no extra 'nonsense'"):
        compared("pip install '.[nonsense]'")
