"""The unit in docs/operations.md leaves the processes the time that they take, and calls what exists."""

from __future__ import annotations

import configparser
import inspect
import re
import shlex
from pathlib import Path

from fastq.cli.root import root
from fastq.config import Settings
from fastq.errors import ExitCode
from fastq.supervisor.loop import KEEPER_GRACE, KILL_MARGIN, Supervisor

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_the_unit() -> None:
    found = re.search(r"```ini\n(.+?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names of directives have a case
    unit.read_string(found[1])
    service = unit["Service"]
    cancel_grace = inspect.signature(Supervisor).parameters["cancel_grace"].default
    assert float(service["TimeoutStopSec"]) > Settings().grace + cancel_grace + KILL_MARGIN + KEEPER_GRACE
    assert int(service["RestartPreventExitStatus"]) == ExitCode.USAGE
    program, verb, _, *options = shlex.split(service["ExecStart"])
    assert Path(program).name == "fastq"
    command = root.get_command(None, verb)  # type: ignore[arg-type]  # the context is not looked at
    assert command is not None
    known = {name for parameter in command.params for name in parameter.opts}
    assert {option for option in options if option.startswith("-")} <= known
