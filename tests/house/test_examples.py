"""A-19: what people copy. Examples run no shell, evaluate no text, and take nothing from the web."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
FORBIDDEN = {"eval", "exec", "compile", "__import__", "system", "popen", "loads_pickle"}
MODULES = {"pickle", "marshal", "shelve", "http.server", "socketserver"}


def faults(source: str) -> list[str]:
    """What an example must not do, with the lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            shell = any(
                k.arg == "shell" and not (isinstance(k.value, ast.Constant) and not k.value.value)
                for k in node.keywords
            )
            if name in FORBIDDEN or shell:
                found.append(f"{node.lineno}: {name}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            found += [f"{node.lineno}: {name}" for name in names if name in MODULES]
    return found


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_examples_are_safe_to_copy(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "line", ["eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "run(x, shell=y)", "import pickle", "from marshal import loads"]
)  # fmt: skip
def test_a_planted_fault_is_found(line: str) -> None:
    assert faults(line)
    assert not faults("subprocess.run(['ls'], shell=False); compiled(x)")
