"""``fastq limits list|show|set|penalize|reset``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click
import msgspec

from fastq.cli.root import Verbs
from fastq.cli.serve import application
from fastq.cli.session import NotFound, Session, with_session
from fastq.cli.table import Cell, counted, duration, pairs, rows
from fastq.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from fastq.broker.limit_views import Holder, LimitInfo, LimitInspector
    from fastq.limits import Rule

__all__ = ["verbs"]

ID = click.argument("limiter", metavar="ID")
KEY = click.option("--key", metavar="TEXT", default="", help="One partition instead of the limiter as a whole.")
APP = click.option(
    "--app", metavar="APP", envvar="FASTQ_APP", default="", help="Its limiters, too: package.module:app (FASTQ_APP)."
)
HEAD = ("LIMITER", "RULE", "LEFT", "RESET", "PENALTY", "HOLDERS", "PARKED")


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``show``."""

    limiter: Any
    holders: Any


class Limits(Verbs):
    """Without a verb: the list."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        listed = not args or (args[0].startswith("-") and args[0] != "--help")
        return super().parse_args(ctx, ["list", *args] if listed and not ctx.resilient_parsing else args)


@click.group(cls=Limits)
def limits() -> None:
    """Look at limits, change them, stop everybody for a while."""


@limits.command("list")
@APP
@with_session
def list_all(session: Session, app: str) -> None:
    """List the limiters that are configured here or that a process has used."""
    found = session.run(_inspector(session, app).overview())
    session.answer(found, rows(HEAD, [_row(info) for info in found]) if found else ["no limiter yet"])


@limits.command()
@ID
@KEY
@APP
@with_session
def show(session: Session, limiter: str, key: str, app: str) -> None:
    """Print the state of a limiter, and who holds its slots."""
    inspector = _inspector(session, app)
    info, holders = session.run(inspector.show(_known(session, inspector, limiter), key))
    session.answer(Shown(limiter=info, holders=holders), _lines(info, holders))


@limits.command("set")
@ID
@click.argument("changes", nargs=-1, required=True, metavar="OPTION=VALUE...")
@APP
@with_session
def change(session: Session, limiter: str, changes: tuple[str, ...], app: str) -> None:
    """Change the rule for every process: rate=50/s, max_concurrent=3, limit=100 window_seconds=60. What is not said stays."""
    inspector = _inspector(session, app)
    rule = session.run(inspector.set(_known(session, inspector, limiter), _read(changes)))
    session.answer(
        {"id": limiter, "rule": str(rule)}, [f"{limiter}: {rule}, in force with each process's next request"]
    )


@limits.command()
@ID
@click.argument("seconds", type=click.FloatRange(0, 31_622_400))
@KEY
@APP
@with_session
def penalize(session: Session, limiter: str, seconds: float, key: str, app: str) -> None:
    """Grant nothing to anybody for SECONDS; 0 ends it. A longer penalty is never made shorter."""
    inspector = _inspector(session, app)
    left = session.run(inspector.penalize(_known(session, inspector, limiter), seconds, key))
    to_whom = f"in partition {key}" if key else "in no partition"
    said = f"nothing is granted for {duration(left)}, {to_whom}" if left else "no penalty"
    session.answer({"id": limiter, "key": key, "penalty": left}, [f"{limiter}: {said}"])


@limits.command()
@ID
@KEY
@APP
@with_session
def reset(session: Session, limiter: str, key: str, app: str) -> None:
    """Back to the configured rule, without a penalty, with nothing used. Slots stay with their holders."""
    inspector = _inspector(session, app)
    changed = session.run(inspector.reset(_known(session, inspector, limiter), key))
    said = "as configured again" if changed else "was as configured already"
    session.answer({"id": limiter, "key": key, "changed": changed}, [f"{limiter}: {said}"])


def _inspector(session: Session, app: str) -> LimitInspector:
    from fastq.broker.limit_views import LimitInspector
    from fastq.limiter.catalogue import Catalogue, find_files

    catalogue = Catalogue()
    catalogue.read(find_files())
    configured: dict[str, Rule] = {name: limiter.plan.rule for name, limiter in catalogue.all().items()}
    if app:
        configured |= {
            name: limiter.plan.rule for name, limiter in application(session.settings, app).limiters().items()
        }
    return LimitInspector(session.settings.prefix, configured)


def _known(session: Session, inspector: LimitInspector, name: str) -> str:
    names = session.run(inspector.names())
    if name not in names:
        raise NotFound(f"no limiter {name!r}{did_you_mean(name, names)}")
    return name


def _read(changes: tuple[str, ...]) -> Rule:
    from fastq.limits import read_rule

    options: dict[str, Any] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not value:
            raise ConfigError(f"{change!r}: write OPTION=VALUE, like rate=50/s or max_concurrent=3")
        options[name] = _number(value)
    return read_rule(options)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _row(info: LimitInfo) -> tuple[Cell, ...]:
    holders = "" if info.max_concurrent is None else f"{info.holders}/{info.max_concurrent}"
    return (
        info.id,
        _rule(info),
        info.remaining,
        duration(info.reset_in) if info.reset_in else "",
        duration(info.penalty) if info.penalty else "",
        holders,
        sum(info.parked.values()),
    )


def _rule(info: LimitInfo) -> str:
    return f"{info.rule or '?'}{' (overridden)' if info.overridden else ''}"


def _lines(info: LimitInfo, holders: list[Holder]) -> Iterator[str]:
    yield from pairs(
        {
            "limiter": info.id,
            "key": info.key,
            "rule": _rule(info),
            "left": info.remaining,
            "all back in": duration(info.reset_in) if info.reset_in else "",
            "penalty": duration(info.penalty) if info.penalty else "",
            "pace": f"{info.pace:.0%} of the rate" if info.pace < 1 else None,
            "holders": None if info.max_concurrent is None else f"{info.holders} of {info.max_concurrent}",
            **{f"parked in {queue}": counted(count, "job") for queue, count in sorted(info.parked.items())},
        }
    )
    if holders:
        yield ""
        yield from rows(("HOLDER", "LEASE"), [(held.holder, duration(held.lease)) for held in holders])


verbs = {"limits": limits}
