"""Lints the Lua scripts as Redis sees them: includes expanded. `python tools/lint_lua.py [SCRIPT.lua ...]`.

Per script: the head (name, KEYS, ARGV, what happens when it is sent twice, Reply), its length, every name declared and used,
none of Lua's or Redis's libraries that differ between Redis, Valkey and fakeredis, and that a real server compiles it.
Redis finds most of these only when the faulty line runs; a script that sets a global fails for good on the first call.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from luaparser import ast
from luaparser import astnodes as lua

from fastq.broker import keys, scripts
from fastq.broker.embedded import EmbeddedServer

MAX_LINES: Final = 120  # of one file; more asks for an include or a second script
LIBRARY: Final = frozenset(
    [
        "ARGV",
        "KEYS",
        "ipairs",
        "math",
        "next",
        "pairs",
        "redis",
        "select",
        "string",
        "table",
        "tonumber",
        "tostring",
        "type",
        "unpack",
    ]
)
REDIS: Final = frozenset({"call", "pcall", "error_reply", "status_reply"})
INCLUDE: Final = re.compile(r'--- @include "([a-z_]+)"')
LOOKS_LIKE_INCLUDE: Final = re.compile(r"\s*--+\s*@?include\b")


class Problem(NamedTuple):
    """One finding: where it is and what it is."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class Line(NamedTuple):
    """A line of an expanded script and where it came from."""

    text: str
    file: str
    number: int


# -- expand, keeping track of where each line came from ---------------------------------------------------------------


def expand(path: Path) -> list[Line]:
    """The lines of a script with its includes in their places; the same text as `scripts.expand`."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        match = INCLUDE.fullmatch(text)
        include = path.parent / "include" / f"{match[1]}.lua" if match else None
        if include is None or not include.exists():  # check_text names the one that is missing
            lines.append(Line(text, path.name, number))
            continue
        inner = include.read_text("utf-8").splitlines()
        lines += [Line(t, f"include/{include.name}", n) for n, t in enumerate(inner, 1)]
    return lines


# -- the head: what an operator reads ---------------------------------------------------------------------------------


def check_head(path: Path, lines: list[Line]) -> Iterator[Problem]:
    """`-- name: purpose`, then KEYS, ARGV, the effect of a second call and the reply, in words for redis-cli."""
    own = [line for line in lines if line.file == path.name]
    first = 1 if own and own[0].text.startswith("#!lua") else 0
    head: list[str] = []
    for line in own[first:]:
        if not line.text.startswith("-- "):
            break
        head.append(line.text)
    text = "\n".join(head)
    if not head or not head[0].startswith(f"-- {path.stem}: "):
        yield Problem(path.name, first + 1, f"the head must begin with `-- {path.stem}: what it does`")
    for word in ("-- KEYS ", "-- ARGV ", "Reply "):
        if word not in text:
            yield Problem(path.name, first + 1, f"the head says nothing about {word.strip('- ')}")
    if "Sent twice" not in text and "Read only" not in text:
        yield Problem(path.name, first + 1, "the head does not say what happens when it is sent twice")
    for name in named_keys(head):
        if not is_known_key(name):
            yield Problem(path.name, first + 1, f"the key {name} is not in fastq.broker.keys.TABLE")


def named_keys(head: Iterable[str]) -> Iterator[str]:
    """The key names of the KEYS paragraph of a head."""
    inside = False
    for line in head:
        inside = line.startswith("-- KEYS ") or (inside and line.startswith("--   "))
        if inside:
            yield from (word for word in line.removeprefix("-- KEYS").split() if word not in {"--", "..."})


def is_known_key(name: str) -> bool:
    """Whether the table of keys has this name; `<priority>` and `10` both stand for a part that varies."""
    shape = re.sub(r"<[^>]*>|\d+", "*", name)
    return any(re.sub(r"<[^>]*>", "*", info.pattern) == shape for info in keys.TABLE)


def check_text(path: Path, lines: list[Line]) -> Iterator[Problem]:
    """Length, tabs, and includes that were meant but are plain comments."""
    own = [line for line in lines if line.file == path.name]
    if len(own) > MAX_LINES:
        yield Problem(path.name, MAX_LINES + 1, f"{len(own)} lines: split it or use an include (at most {MAX_LINES})")
    for line in lines:
        if LOOKS_LIKE_INCLUDE.match(line.text):
            yield Problem(
                line.file, line.number, f'not expanded: {line.text!r} (write `--- @include "name"` in the script)'
            )
        if "\t" in line.text:
            yield Problem(line.file, line.number, "a tab")


# -- names: every one declared, every one used ------------------------------------------------------------------------


class Local:
    """A declared name."""

    def __init__(self, name: str, line: int) -> None:
        self.name = name
        self.line = line
        self.read = False


class Names:
    """Walks one script's tree with Lua's scoping rules and collects what is wrong with its names."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Local]] = []
        self.problems: list[tuple[int, str]] = []
        self.line = 1

    def block(self, statements: Iterable[lua.Node], declared: Iterable[lua.Node] = ()) -> None:
        """A new scope: its parameters or loop variables, then its statements."""
        self.open()
        for name in declared:
            self.declare(name)
        for statement in statements:
            self.visit(statement)
        self.close()

    def open(self) -> None:
        self.scopes.append({})

    def close(self) -> None:
        for local in self.scopes.pop().values():
            self.check_used(local)

    def check_used(self, local: Local) -> None:
        if not local.read and local.name != "_":
            self.problems.append((local.line, f"{local.name!r} is declared but never used"))

    def declare(self, node: lua.Node) -> None:
        if not isinstance(node, lua.Name):  # `...`
            return
        if node.id != "_" and any(node.id in scope for scope in self.scopes):
            self.problems.append((self.line, f"{node.id!r} hides an earlier local of this name"))
        if node.id in LIBRARY:
            self.problems.append((self.line, f"{node.id!r} hides Lua's own"))
        previous = self.scopes[-1].get(node.id)
        if previous is not None:
            self.check_used(previous)
        self.scopes[-1][node.id] = Local(node.id, self.line)

    def find(self, name: str) -> Local | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def read(self, name: str) -> None:
        local = self.find(name)
        if local is not None:
            local.read = True
        elif name not in LIBRARY:
            self.problems.append((self.line, f"{name!r} is not declared (or is not portable: see LIBRARY)"))

    def write(self, target: lua.Node) -> None:
        if not isinstance(target, lua.Name):
            self.visit(target)
        elif self.find(target.id) is None:
            self.problems.append((self.line, f"{target.id!r} is assigned but not local: Redis forbids globals"))

    def visit(self, node: object) -> None:
        """Dispatch on the kind of node; one that has no rule of its own is walked through."""
        if isinstance(node, list):
            for item in node:
                self.visit(item)
        if not isinstance(node, lua.Node):
            return
        self.line = node.line or self.line
        rule = getattr(self, f"visit_{type(node).__name__}", None)
        if rule is not None:
            rule(node)
        else:
            self.visit_parts(node)

    def visit_parts(self, node: lua.Node) -> None:
        for name, value in vars(node).items():
            if not name.startswith("_") and name != "comments":
                self.visit(value)

    # the kinds of node that declare, open a scope, or hold a name that is no variable

    def visit_Block(self, node: lua.Block) -> None:
        self.block(node.body)

    def visit_Name(self, node: lua.Name) -> None:
        self.read(node.id)

    def visit_Index(self, node: lua.Index) -> None:
        self.visit(node.value)
        if node.notation is lua.IndexNotation.SQUARE:
            self.visit(node.idx)
        elif self.is_foreign(node):
            allowed = ", ".join(sorted(REDIS))
            self.problems.append((self.line, f"redis.{node.idx.id} is not portable (allowed: {allowed})"))

    def is_foreign(self, node: lua.Index) -> bool:
        name = node.value.id if isinstance(node.value, lua.Name) else ""
        return name == "redis" and isinstance(node.idx, lua.Name) and node.idx.id not in REDIS

    def visit_Field(self, node: lua.Field) -> None:
        if node.between_brackets:
            self.visit(node.key)
        self.visit(node.value)

    def visit_Invoke(self, node: lua.Invoke) -> None:
        self.visit(node.source)
        self.visit(node.args)

    def visit_LocalAssign(self, node: lua.LocalAssign) -> None:
        self.visit(node.values)  # before the names exist: `local x = x` reads the outer one
        for target in node.targets:
            self.declare(target)

    def visit_Assign(self, node: lua.Assign) -> None:
        self.visit(node.values)
        for target in node.targets:
            self.write(target)

    def visit_LocalFunction(self, node: lua.LocalFunction) -> None:
        self.declare(node.name)
        self.block(node.body.body, node.args)

    def visit_Function(self, node: lua.Function) -> None:
        self.write(node.name)
        self.block(node.body.body, node.args)

    def visit_AnonymousFunction(self, node: lua.AnonymousFunction) -> None:
        self.block(node.body.body, node.args)

    def visit_Forin(self, node: lua.Forin) -> None:
        self.visit(node.iter)
        self.block(node.body.body, node.targets)

    def visit_Fornum(self, node: lua.Fornum) -> None:
        self.visit([node.start, node.stop, node.step])
        self.block(node.body.body, [node.target])

    def visit_Repeat(self, node: lua.Repeat) -> None:
        self.block([*node.body.body, node.test])  # `until` sees the locals of the body


def check_names(lines: list[Line]) -> Iterator[Problem]:
    """Undeclared, unused, hidden and forbidden names; or why the text cannot be read as Lua."""
    source = "\n".join("" if line.text.startswith("#!") else line.text for line in lines)
    try:
        tree = ast.parse(source)
    except Exception as error:  # noqa: BLE001 - the parser raises its generator's own kinds
        yield Problem(lines[0].file, 1, f"cannot be read as Lua: {error}")
        return
    names = Names()
    names.visit(tree.body)
    for number, text in sorted(names.problems):
        line = lines[number - 1]
        yield Problem(line.file, line.number, text)


# -- the server's own word --------------------------------------------------------------------------------------------


def check_compiles(server: EmbeddedServer, path: Path, lines: list[Line]) -> Iterator[Problem]:
    """SCRIPT LOAD on a real server: Lua 5.1's syntax and limits, and the flags of the first line."""
    text = "".join(f"{line.text}\n" for line in lines)
    reply = server.ask(b"SCRIPT", b"LOAD", text.encode()).decode()
    if reply.startswith("-"):
        match = re.search(r"user_script:(\d+):", reply)
        line = lines[min(int(match[1]), len(lines)) - 1] if match else lines[0]
        yield Problem(line.file, line.number, reply.strip("-\r\n "))
    elif path.parent == scripts.FOLDER and reply.strip() != scripts.load(path.stem).sha.decode():
        yield Problem(path.name, 1, "fastq.broker.scripts expands it to another text than this tool")


def lint(paths: Iterable[Path]) -> list[Problem]:
    """Everything that is wrong with these scripts."""
    problems: list[Problem] = []
    with EmbeddedServer() as server:
        for path in paths:
            lines = expand(path)
            problems += check_head(path, lines)
            problems += check_text(path, lines)
            problems += check_names(lines)
            problems += check_compiles(server, path, lines)
    return list(dict.fromkeys(problems))  # an include's fault is found once per script


def main(arguments: list[str]) -> int:
    """Exit status 1 when something was found."""
    paths = [Path(argument) for argument in arguments] or sorted(scripts.FOLDER.glob("*.lua"))
    problems = lint(paths)
    for problem in problems:
        print(problem)
    print(f"{len(paths)} Lua scripts, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
