"""The Lua lint: the scripts pass it, and it finds every fault that is planted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fastq.broker import scripts
from tools import lint_lua

SOUND = """\
#!lua
-- sound: a script without a fault
-- KEYS {q}:jobs {q}:ready:10 ... {q}:ready:0 {q}:running:<worker>
-- ARGV id
-- Sent twice: the same. Reply the job's envelope.
--- @include "now"
local jobs, id = KEYS[1], ARGV[1]
for i, key in ipairs(KEYS) do redis.call('SETRANGE', key, i, tostring(now_ms())) end
return redis.call('HGET', jobs, id)
"""
NOW = "local function now_ms() return redis.call('TIME')[1] * 1000 end\n"


def faults(folder: Path, text: str, name: str = "sound") -> list[str]:
    (folder / "include").mkdir(exist_ok=True)
    (folder / "include" / "now.lua").write_text(NOW)
    path = folder / f"{name}.lua"
    path.write_text(text)
    return [f"{p.line}: {p.text}" for p in lint_lua.lint([path])]


def test_our_scripts_are_sound():
    paths = sorted(scripts.FOLDER.glob("*.lua"))
    assert paths
    assert lint_lua.lint(paths) == []


def test_every_include_is_used():
    used = {match[1] for name in scripts.names() for match in scripts._INCLUDE.finditer(_own_text(name))}
    assert used == {path.stem for path in (scripts.FOLDER / "include").glob("*.lua")}


def test_a_script_is_addressed_by_its_own_digest():
    script = scripts.load("settle")
    assert script.sha.decode() == hashlib.sha1(scripts.expand("settle").encode()).hexdigest()


def test_a_sound_script_passes(tmp_path):
    assert faults(tmp_path, SOUND) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("total = 1", "'total' is assigned but not local"),
        ("function make() return 1 end", "'make' is assigned but not local"),
        ("local unused = 1", "'unused' is declared but never used"),
        ("local function unused() return 1 end", "'unused' is declared but never used"),
        ("for i, key in ipairs(KEYS) do redis.call('DEL', key) end", "'i' is declared but never used"),
        ("redis.call('DEL', job)", "'job' is not declared"),
        ("local t = {[job] = id}; t.id = jobs", "'job' is not declared"),
        ("local jobs = 1; redis.call('DEL', jobs)", "'jobs' hides an earlier local"),
        ("local pairs = 1; redis.call('DEL', pairs)", "'pairs' hides Lua's own"),
        ("redis.call('SET', jobs, cjson.encode(ARGV))", "'cjson' is not declared"),
        ("redis.call('SET', jobs, cmsgpack.pack(ARGV))", "'cmsgpack' is not declared"),
        ("redis.call('SET', jobs, struct.pack('I', 1))", "'struct' is not declared"),
        ("redis.call('SET', jobs, bit.band(1, 2))", "'bit' is not declared"),
        ("error('no')", "'error' is not declared"),
        ("redis.call('SET', jobs, redis.sha1hex(id))", "redis.sha1hex is not portable"),
        ("redis.call('SET', jobs, id // 2)", "Error compiling script"),
        ("if id then", "Error compiling script"),
        ("--- @include now", "not expanded"),
        ('--- @include "then"', "not expanded"),
        ("\tredis.call('DEL', jobs)", "a tab"),
    ],
)
def test_a_planted_fault_is_found_at_its_line(tmp_path, line, fault):
    found = faults(tmp_path, SOUND.replace("return redis", f"{line}\nreturn redis"))
    assert any(fault in text for text in found), found
    if "compiling" not in fault:
        assert any(text.startswith("9: ") and fault in text for text in found), found


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("-- sound: a", "-- sounds: a", "must begin with `-- sound: "),
        ("-- KEYS ", "-- ", "nothing about KEYS"),
        ("-- ARGV ", "-- ", "nothing about ARGV"),
        ("Sent twice: the same. ", "", "sent twice"),
        ("Reply the job's envelope.", "", "nothing about Reply"),
        ("{q}:jobs", "{q}:job", "{q}:job is not in fastq.broker.keys.TABLE"),
        ("{q}:running:<worker>", "{q}:runing:<worker>", "{q}:runing:<worker> is not in"),
        ("tostring(now_ms())", "''", "'now_ms' is declared but never used"),
    ],
)
def test_a_wrong_head_or_idle_include_is_found(tmp_path, old, new, fault):
    assert any(fault in text for text in faults(tmp_path, SOUND.replace(old, new)))


def test_a_long_script_is_found(tmp_path):
    long = SOUND.replace("return redis", "redis.call('DEL', jobs)\n" * lint_lua.MAX_LINES + "return redis")
    assert any("at most 120" in text for text in faults(tmp_path, long))


def _own_text(name: str) -> str:
    return (scripts.FOLDER / f"{name}.lua").read_text("utf-8")
