"""Time that a test moves: Redis's clock as scripts and clients of this process see it, on the kit's private server alone.

Redis's own clock cannot be set. So, from the first move to the end of the kit, the scripts that this process sends are others:
every ``TIME``, ``PEXPIREAT`` and ``PEXPIRETIME`` in them goes through a function that adds what :data:`KEY` on the server says
(0 on a server that no kit has moved). What lives for some time is aged by each move. Scripts in production never see any of it.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from fastq.broker import scripts
from fastq.broker.command import Command, raw
from fastq.broker.greeting import Clock
from fastq.broker.scripts import Script

__all__ = ["VirtualClock"]

KEY: Final = "fastq-testing-clock"

_CALL: Final = """
local function fastq_call(command, ...)
  local shift = tonumber(redis.call('GET', 'fastq-testing-clock') or '0')
  if command == 'TIME' then
    local time = redis.call('TIME')
    local us = time[1] * 1000000 + time[2] + shift
    return {math.floor(us / 1000000), us % 1000000}
  end
  if command == 'PEXPIREAT' then
    local key, at = ...
    return redis.call('PEXPIREAT', key, string.format('%.0f', at - math.floor(shift / 1000)))
  end
  local at = redis.call(command, ...)
  if command == 'PEXPIRETIME' and at > 0 then return at + math.floor(shift / 1000) end
  return at
end
"""

_AGE: Final = """
local cursor, by = '0', tonumber(ARGV[1])
repeat
  local reply = redis.call('SCAN', cursor, 'COUNT', 1000)
  cursor = reply[1]
  for _, key in ipairs(reply[2]) do
    local left = redis.call('PTTL', key)
    if left >= 0 and left <= by then
      redis.call('DEL', key)
    elseif left > by then
      redis.call('PEXPIRE', key, left - by)
    end
  end
until cursor == '0'
redis.call('SET', KEYS[1], ARGV[2])
"""

_CALLS: Final = re.compile(r"redis\.call\(\s*'(TIME|PEXPIREAT|PEXPIRETIME)'")


def moved(text: str) -> str:
    """A script that sees the moved time."""
    head, rest = "", text
    if text.startswith("#!"):
        head, _, rest = text.partition("\n")
        head += "\n"
    return head + _CALL + _CALLS.sub(lambda match: match[0].replace("redis.call", "fastq_call"), rest)


@functools.cache
def _load(name: str) -> Script:
    return Script(name, moved(scripts.expand(name)))


class VirtualClock:
    """How far this process's idea of Redis's time is ahead. It stands for the whole process while it is in use."""

    def __init__(self) -> None:
        self.shift_us = 0
        self._installed = False
        self._originals = (scripts.load, Clock.now_ms, Clock.now_us)

    def install(self) -> None:
        """From now on scripts and clocks of this process see the moved time."""
        if self._installed:
            return
        self._installed = True
        _, now_ms, now_us = self._originals
        _replace(
            _load, lambda clock: now_ms(clock) + self.shift_us // 1_000, lambda clock: now_us(clock) + self.shift_us
        )

    def uninstall(self) -> None:
        """They see Redis's own time again."""
        if self._installed:
            self._installed = False
            _replace(*self._originals)

    def move(self, by_us: int) -> Command[None]:
        """Move this process's time, and the command that moves the server's."""
        self.shift_us += by_us
        return raw("EVAL", _AGE, 1, KEY, by_us // 1_000, self.shift_us, decode=lambda _: None)


def _replace(load: object, now_ms: object, now_us: object) -> None:
    for home, name, value in ((scripts, "load", load), (Clock, "now_ms", now_ms), (Clock, "now_us", now_us)):
        setattr(home, name, value)
