"""The docs speak of what is there: links, code, files, commands with their options, keys."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from dspark_megatron.config import Config
from support.dspark_lines import check_dspark, is_dspark
from support.paths import ROOT

PACKAGE = ROOT / "dspark_megatron"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
KEYS = {f"{name}.{key}" for name, section in Config().to_dict().items() for key in section}
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*\.(py|sh|sbatch|yaml|md|json|jsonl|safetensors)")
FOREIGN = "tools/checkpoint/checkpoint_inspector.py"
"""Of Megatron-LM."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text_of(page))


def code(page: Path) -> list[str]:
    """What stands between backticks in a line."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(page))
    plain = (re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def links(page: Path) -> list[tuple[str, Path, str]]:
    """Text, file and anchor of every link to a place of this repository."""
    found = re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", prose(page))
    parts = ((text, *target.partition("#")[::2]) for text, target in found if "://" not in target)
    return [(text, page.parent / path if path else page, anchor) for text, path, anchor in parts]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for text, path, anchor in links(page):
        assert path.exists(), f"[{text}] leads to {path}, which is not there"
        assert not anchor or anchor in anchors(path), f"{path.name} has no heading #{anchor}"


def test_every_page_is_linked_from_the_readme_or_the_page_of_training():
    starts = ROOT / "README.md", ROOT / "docs" / "training.md"
    linked = {path.resolve() for start in starts for _, path, _ in links(start)}
    assert not set((ROOT / "docs").rglob("*.md")) - linked


def test_every_room_is_in_the_table_of_the_architecture():
    table = text_of(ROOT / "docs" / "architecture.md")
    rooms = [f"{p.name}/" for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]
    rooms += [p.name for p in PACKAGE.glob("*.py") if p.stem != "__init__"]
    heads = re.findall(r"(?m)^\| (`.+?) \|", table)
    assert not [room for room in rooms if not any(f"`{room}`" in head for head in heads)]


def defined(path: Path) -> set[str]:
    """Classes, functions, methods as `Class.method`, and names of a module."""
    names = set()
    for node in ast.parse(text_of(path)).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names |= {f"{node.name}.{f.name}" for f in inner if isinstance(f, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_linked_code_is_in_its_file(page):
    """A link whose text is a name in backticks leads to the file that defines it."""
    for text, path, _ in links(page):
        name = text.strip("`")
        if path.suffix == ".py" and text != name and not FILE.fullmatch(name):
            assert name in defined(path), f"{path.name} defines no {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    """Code by its path from the root or from the package, and what is in it where that is said."""
    for word in code(page):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|sh|sbatch)", word):
            assert (ROOT / word).is_file() or (PACKAGE / word).is_file(), f"there is no {word}"
        elif re.fullmatch(r"(dspark_megatron|tests|tools|examples|docs)(/[\w-]+)*/", word):
            assert (ROOT / word).is_dir(), f"there is no folder {word}"
    said = re.findall(r"`(\w+)`(?:\s+and\s+`(\w+)`)?\s+(?:of|in)\s+`([\w/]+\.py)`", prose(page))
    for *names, file in said:
        assert not set(names) - {""} - defined(PACKAGE / file), f"{file} does not define {names}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_that_are_named_exist(page):
    text = re.sub(r"(?ms)^```python.*?^```$|\]\([^)]*\)", "", text_of(page))
    sections = "|".join(Config().to_dict())
    named = set(re.findall(rf"(?<![\w/.-])((?:{sections})\.[a-z]\w*)(?![\w(/])", text))
    assert not {key for key in named if not FILE.fullmatch(key)} - KEYS


def test_every_key_is_on_some_page():
    text = "".join(text_of(page) for page in PAGES)
    missing = {key for key in KEYS if not re.search(rf"\b{re.escape(key)}\b", text)}
    assert not missing, "no page names these keys"


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a code block, optional ones too, but for settings; and of every
    tool with options between backticks."""
    blocks = re.findall(r"(?ms)^```(?:bash)?\n(.*?)^```$", text_of(page))
    lines = re.sub(r"\\\n", " ", "".join(blocks)).splitlines()
    lines += [f"python {word}" for word in code(page) if re.match(r"tools/\w+\.py ", word)]
    found = []
    for line in lines:
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if re.match(r"(\w+=\S+ )*(python|torchrun|dspark|make|\S+\.sh|sbatch) ", line):
            found.append([word for word in words_of(line) if "=" not in word])
    return found


def words_of(line: str) -> list[str]:
    """Optional ones too."""
    return shlex.split(re.sub(r"(?<!=)\[|\](?= |$)", " ", line))


def without_launcher(words: list[str]) -> list[str]:
    """torchrun's own options have a value each."""
    rest = words[1:]
    while words[0] == "torchrun" and rest[0].startswith("--"):
        rest = rest[2:]
    return rest


@cache
def help_of(*words: str) -> str:
    """What a command says of itself, run here up to its arguments."""
    said = io.StringIO()
    with mock.patch.object(sys, "argv", [*words, "--help"]), contextlib.redirect_stdout(said):
        with contextlib.suppress(SystemExit):
            if words[0].endswith(".py"):
                script = ROOT / words[0]
                with mock.patch.object(sys, "path", [str(script.parent), *sys.path]):
                    runpy.run_path(str(script), run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return said.getvalue()


ALL = {page: commands(page) for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if ALL[page]], ids=name_of)
def test_commands_have_these_options(page):
    for words in ALL[page]:
        if is_dspark(words):
            check_dspark(words)
        elif words[0] in ("python", "torchrun"):
            check_program(without_launcher(words))
        elif words[0] == "make":
            assert re.search(rf"(?m)^{words[1]}:", text_of(ROOT / "Makefile")), words
        else:
            script = words[1 if words[0] == "sbatch" else 0]
            files = [w for w in words if w.endswith((".sh", ".sbatch"))]
            assert all((ROOT / file).is_file() for file in files or [script]), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_dspark_commands_within_a_line_exist(page):
    for word in code(page):
        if word.startswith("dspark "):
            check_dspark(words_of(word), whole=False)


def check_program(words: list[str]) -> None:
    if words[0] in ("-c", FOREIGN):
        return
    words = words[1:] if words[0] == "-m" else words
    options = {word for word in words if word.startswith("--")}
    has_commands = words[0].endswith(("convert_checkpoint.py", "dspark_megatron", "cli.main"))
    command = words[:2] if has_commands else words[:1]
    known = set(re.findall(r"(?<![\w-])--[\w-]+", help_of(*command)))
    assert known, f"{command} says nothing of itself"
    assert not options - known, f"{command} has no {options - known}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page):
    tests = "".join(text_of(path) for path in (ROOT / "tests").rglob("test_*.py"))
    for word in code(page):
        if re.fullmatch(r"test_\w+", word):
            assert f"def {word}(" in tests, f"there is no {word}"


def test_pages_that_code_names_exist():
    sources = [
        path
        for folder in ("dspark_megatron", "tools", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
    ]
    for path in [*sources, ROOT / "setup.py"]:
        for page in re.findall(r"docs/\w+\.md", text_of(path)):
            assert (ROOT / page).is_file(), f"{path.name} names {page}, which is not there"


def programs(page: Path) -> set[str]:
    """What the commands of a page run: `dspark evaluate`, the file of a tool, ..."""
    found = set()
    for words in commands(page):
        rest = without_launcher(words) if words[0] in ("torchrun", "python") else words
        if rest[:2] == ["-m", "dspark_megatron"]:
            rest = ["dspark", *rest[2:]]
        if rest[0] == "dspark":
            found.add(" ".join(rest[: 3 if rest[1] == "served" else 2]))
        elif Path(rest[0]).suffix in (".py", ".sh") and rest[0] != FOREIGN:
            found.add(rest[0])
    return found


def test_every_command_of_the_docs_is_run_by_a_test_or_listed_with_the_reason():
    """By its name in a test, in the README's table of commands, or in the list of those without."""
    listed = text_of(ROOT / "CONTRIBUTING.md").partition("## Commands that no test runs")[2]
    without = set(re.findall(r"`(\S+?\.py)`", listed.partition("To release")[0]))
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if f.name != Path(__file__).name]
    tests = "\n".join(map(text_of, files))
    words = set(re.findall(r"[\w-]+", tests))
    pages = [page for page in PAGES if not re.search(r"\*\*Not\s+run\s+here\*\*", text_of(page))]
    named = {program for page in pages for program in programs(page)}
    run = {p for p in named if p in tests or Path(p).stem in words}
    run |= {p for p in named if p.startswith("dspark ") and '", "'.join(p.split()[1:]) in tests}
    assert named - run == without & named
    assert without <= named, f"no page names {without - named}"
