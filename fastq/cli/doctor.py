"""``fastq doctor``: what is wrong, with the line to change."""

from __future__ import annotations

from collections.abc import Iterator

import click

from fastq.cli.session import Session, with_session
from fastq.cli.table import counted
from fastq.errors import ExitCode, safe_text

__all__ = ["verbs"]

MARKS = {"ok": "  ok ", "warn": " WARN", "fault": "FAULT"}


@click.command()
@click.option("--show-config", is_flag=True, help="Print each setting and where it came from; Redis is not asked.")
@with_session
def doctor(session: Session, show_config: bool) -> int:
    """Find what is wrong with Redis, permissions or the fleet. Exit status 5 when there is a fault; writes nothing."""
    if show_config:
        _show_config(session)
        return ExitCode.OK
    from fastq.broker.doctor import examine

    findings = session.connection.run(examine(session.settings.prefix, session.connection.endpoint))
    faults = sum(finding.level == "fault" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)

    def lines() -> Iterator[str]:
        for finding in findings:
            yield f"{MARKS[finding.level]}  {finding.name:<12} {safe_text(finding.message)}"
            if finding.fix:
                yield f"{'':<19} -> {safe_text(finding.fix)}"
        yield f"{counted(faults, 'fault')}, {counted(warnings, 'warning')} at {session.connection.endpoint.shown}"

    session.answer({"url": session.connection.endpoint.shown, "findings": findings}, lines())
    return ExitCode.UNHEALTHY if faults else ExitCode.OK


def _show_config(session: Session) -> None:
    from fastq.config import shown

    loaded = session.loaded
    values = {name: shown(loaded.settings, name) for name in loaded.settings.__struct_fields__}
    width, span = max(map(len, values)), min(max(map(len, values.values())), 40)
    text = [f"{name:<{width}}  {value:<{span}}  {safe_text(loaded.origins[name])}" for name, value in values.items()]
    session.answer({name: {"value": value, "origin": loaded.origins[name]} for name, value in values.items()}, text)


verbs = {"doctor": doctor}
