"""The command ``fastq``. Each verb is imported when it is called: what `--version` needs is what it pays for."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line and exit with its status; an interrupt says nothing, from the first import on."""
    code = 130
    try:
        from fastq.cli.root import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        pass
    sys.exit(code)
