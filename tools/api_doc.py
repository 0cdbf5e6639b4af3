"""docs/api.md, made of the docstrings of what ``fastq`` exports: ``python tools/api_doc.py > docs/api.md``."""

from __future__ import annotations

import enum
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import fastq

OPENING = "\n```python"
TITLES = ("Args", "Raises", "Returns", "Yields", "Attributes")
GROUPS = {
    "The application and its tasks": "FastQ Tasks Task JobOptions Signature Middleware State Depends Settings JobRegistry JobResult WorkerRunner",
    "Jobs": "JobHandle JobContext JobStatus JobState JobPriority Progress Event Bulk DeadLetter Message Consumer",
    "Retries and outcomes": "RetryPolicy Fixed Linear Exponential Steps Custom Additive Retry Snooze Fail requeue",
    "Once": "Unique make_idempotency_key Lock",
    "Batches and workflows": "Batch BatchResult BatchStatus chain group chord Workflow WorkflowStatus",
    "Schedules": "ScheduleInfo ScheduleOptions ScheduleRun CronTrigger crontab InMemoryScheduler",
    "Limits, leases and leaders": "Limiter SyncLimiter LimiterState configure_limiter configure_store get_or_clone_limiter rate_limited "
    "acquire_all acquire_all_sync monitored_acquire Lease SyncLease Term SyncTerm",
}  # fmt: skip


def prose(text: str) -> str:
    """A docstring as Markdown: sections as bold words, examples as code, roles as names."""
    out: list[str] = []
    code = False
    for line in re.sub(r":\w+:`~?(?:[\w.]*\.)?([^`]+)`", r"`\1`", text).replace("``", "`").splitlines():
        code = in_code(line, out) if code else in_text(line, out)
    while out and not out[-1]:
        out.pop()
    return "\n".join(out) + ("\n```" if code else "")


def in_code(line: str, out: list[str]) -> bool:
    """One line after ``::``; returns whether the example goes on."""
    if line and not line.startswith(" "):
        while not out[-1]:
            out.pop()
        out.append("```\n")
        return in_text(line, out)
    if line or out[-1] != OPENING:
        out.append(line.removeprefix("    "))
    return True


def in_text(line: str, out: list[str]) -> bool:
    """Any other line; returns whether an example begins behind it."""
    stripped = line.strip()
    if stripped.endswith("::"):
        if stripped != "Example::":
            out.append(stripped[:-1])
        out.append(OPENING)
        return True
    if stripped.endswith(":") and stripped[:-1] in TITLES:
        out.append(f"**{stripped}**\n")
    elif line.startswith("        "):
        out[-1] += f" {stripped}"
    else:
        out.append(f"- {stripped}" if line.startswith("    ") else stripped)
    return False


def signature_of(thing: Any, name: str) -> str:
    """As one would write the call; nothing for what is not called."""
    try:
        shown = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return name
    shown = re.sub(r" at 0x[0-9a-f]+", "", shown).replace("'", "")
    return name + re.sub(r"\((?:self|cls)(?:, )?", "(", shown, count=1)


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of ours that have a word to say, in the order of the source."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("fastq"):
            continue
        for name, value in vars(base).items():
            bare = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            documented = inspect.isfunction(bare) or isinstance(bare, property)
            if name.startswith("_") or name in seen or not documented or not inspect.getdoc(bare):
                continue
            seen.add(name)
            yield name, bare


def chapter(name: str) -> Iterator[str]:
    """One exported name."""
    thing = getattr(fastq, name)
    yield f"### {name}\n"
    if not inspect.isclass(thing):
        yield f"`{signature_of(thing, name)}`\n"
        yield prose(inspect.getdoc(thing) or "") + "\n"
        return
    if not issubclass(thing, enum.Enum | BaseException) and "__init__" in vars(thing):
        yield f"`{signature_of(thing.__init__, name)}`\n"
    yield prose(inspect.getdoc(thing) or "") + "\n"
    if issubclass(thing, enum.Enum):
        yield ", ".join(f"`{member.name}`" for member in thing) + "\n"
    for of, value in members(thing):
        if isinstance(value, property):
            yield f"#### {name}.{of}\n"
        else:
            wait = "await " if inspect.iscoroutinefunction(value) else ""
            yield f"#### {name}.{of}\n\n`{wait}{signature_of(value, of)}`\n"
        yield prose(inspect.getdoc(value) or "") + "\n"


def page() -> str:
    """The document."""
    named = {name for names in GROUPS.values() for name in names.split()}
    errors = [
        n for n in fastq.__all__ if inspect.isclass(getattr(fastq, n)) and issubclass(getattr(fastq, n), BaseException)
    ]
    errors = [name for name in errors if name not in named]
    rest = [name for name in fastq.__all__ if name not in named and name not in errors]
    groups = {**{title: names.split() for title, names in GROUPS.items()}, "Errors": errors}
    if rest:
        raise SystemExit(f"tools/api_doc.py: no group for {', '.join(rest)}")
    out = [
        "# API\n",
        "Everything that `import fastq` exports, from its docstrings: `python tools/api_doc.py > docs/api.md`.\n",
    ]
    for title, names in groups.items():
        out.append(f"- {title}: " + ", ".join(f"[{name}](#{name.lower()})" for name in names))
    out.append("")
    for title, names in groups.items():
        out.append(f"## {title}\n")
        for name in names:
            out += chapter(name)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
