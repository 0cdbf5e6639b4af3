"""Rules of the house that no linter knows: size, forbidden words, what the lower floors may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastq"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
MAX_LINES = 600

# A task name selects from a registry and never imports; arguments are msgpack and never code.
CODE_IN_DATA = {"pickle", "marshal", "dill", "shelve", "yaml", "eval", "exec", "compile", "__import__", "import_module"}
ALLOWED_CODE = {
    "fastq/__init__.py": {"import_module"},  # public names, imported when first asked for
    "fastq/app.py": {"import_module"},  # FastQ.discover: modules that the code of the application names
    "fastq/consuming.py": {"import_module"},  # fastq.testing, which stands above
    "fastq/launch.py": {"import_module"},  # the application named on the command line
    "fastq/supervisor": {"import_module"},  # the entry function of a child spec
}

# Written in pieces, so that this file does not hold them.
HOSTS = [
    ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("debian", "org", "/"))
]
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "root", "home/[a-z]+", "Users/[A-Za-z]+")] + [
    "/opt/(wheels|pypi)"
]

STANDS_ON = {
    "fastq/errors.py": set(),
    "fastq/board.py": set(),
    "fastq/broker/embedded.py": {"fastq.errors"},
    "fastq/supervisor": {"fastq.errors", "fastq.config", "fastq.board", "fastq.supervisor", "setproctitle"},
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked() -> list[Path]:
    """The files of the repository that are text; of the folder, where there is no repository (an unpacked sdist)."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_a_module_is_no_longer_than_600_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES, "split it: few, deep modules, but not this deep"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_code_in_data(path):
    """A-01 and its kin: nothing that is read from Redis can choose what code runs."""
    allowed = set().union(*(words for place, words in ALLOWED_CODE.items() if relative(path).startswith(place)))
    assert _named(path) & CODE_IN_DATA <= allowed


def test_no_machine_and_no_registry_is_named():
    pattern = re.compile("|".join([*map(re.escape, HOSTS), *(rf"(?<![\w.~}}]){path}" for path in MACHINE_PATHS)]))
    found = [
        f"{relative(path)}: {match[0]}" for path in tracked() for match in pattern.finditer(path.read_text("utf-8"))
    ]
    assert found == []


def test_no_generated_file_is_tracked():
    suffixes = {".so", ".pyc", ".c", ".o", ".rdb", ".aof", ".log"}
    assert [relative(path) for path in tracked() if path.suffix in suffixes] == []


@pytest.mark.parametrize("place", STANDS_ON)
def test_a_lower_floor_stands_on_the_standard_library(place):
    target = ROOT / place
    files = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    assert files
    for path in files:
        foreign = {name for name in _imports(path) if name.partition(".")[0] not in sys.stdlib_module_names}
        strange = {name for name in foreign if not any(f"{name}.".startswith(f"{ok}.") for ok in STANDS_ON[place])}
        assert strange == set(), f"{relative(path)} imports {strange}"


def test_no_module_of_leftovers():
    names = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc", "types", "interfaces"})


def test_every_package_has_an_init():
    folders = {path.parent for path in MODULES}
    assert [relative(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def _imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, those for the type checker included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: absolute imports only"
            module = node.module or ""
            below = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if _is_module(name) else module for name in below}
    return found - {"__future__"}


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def _named(path: Path) -> set[str]:
    """The modules imported, the functions called by name, and `import_module` however it is reached."""
    found = {name.partition(".")[0] for name in _imports(path)}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.Attribute | ast.alias):
            name = node.attr if isinstance(node, ast.Attribute) else node.name
            found |= {"import_module"} & {name}
    return found


def test_each_decision_has_a_number_of_its_own():
    """docs/adr/0007-….md begins with `# 7. …`, and there is no other seventh."""
    paths = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in paths] == list(range(1, len(paths) + 1))
    for number, path in enumerate(paths, 1):
        assert path.read_text().startswith(f"# {number}. "), path.name
