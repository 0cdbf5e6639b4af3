"""Coverage-guided fuzzing of what reads foreign bytes: ``make fuzz``, where atheris can be installed (CPython 3.11 to 3.13, Linux).

``fuzz.py envelopes|arguments|cron|urls [SECONDS]``. Each target takes bytes, knows the errors that may come of them, and asks
more than that nothing else is raised: the compiled reader of a worker (``_core.take_in``) and the one in Python have to agree
about every envelope, and what was read is written and read again as the same. The coverage that guides it is that of our
Python code: msgspec and the core are compiled without it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["fastq"]):
    from fastq import arguments, cron, job
    from fastq._core import take_in  # noqa: TID251 - the compiled reader is what is fuzzed
    from fastq.broker import url
    from fastq.errors import ConfigError, InvalidArguments, TaskDefinitionError, UndecodableJob

MOST = 100_000


def take(data: bytes) -> bool:
    """Whether a worker takes this envelope without a second look."""
    backlog: deque[Any] = deque()
    odd = take_in([b"id"], [data], [], "q", {}, backlog, job.read_envelope, lambda *read: read, job.PLAIN, MOST)
    assert len(odd) + len(backlog) == 1
    return not odd


def envelopes(data: bytes) -> None:
    """Two readers that agree; and what is not an envelope may still be looked at as a record or an error."""
    taken = take(data)
    assert 0 <= job.priority_of(data) <= 10
    job.decode_error(data)
    try:
        envelope = job.decode_envelope(data)
    except UndecodableJob:
        assert not taken
        return
    assert taken == (envelope.version == job.PLAIN and len(envelope.body) <= MOST and bool(data))
    again = job.encode(envelope)
    assert job.encode(job.decode_envelope(again)) == again


async def handler(number: int, text: str = "", *rest: float, flag: bool = False, **more: dict[str, list[int]]) -> None:
    """A signature with everything in it."""


CODECS = [
    arguments.Arguments("t", handler, lambda *_: False),
    arguments.Arguments("t", lambda a, b=2, *, c=3: None, lambda *_: False),
]


def bodies(data: bytes) -> None:
    """The arguments of a call, by their types and without."""
    for codec in CODECS:
        with contextlib.suppress(UndecodableJob, InvalidArguments):
            args, kwargs = codec.decode(data)
            codec.encode(args, kwargs)
    with contextlib.suppress(UndecodableJob, InvalidArguments):
        args, kwargs = arguments.untyped(data)
        arguments.encode_untyped("t", args, kwargs)


def expressions(data: bytes) -> None:
    """An expression is refused, or ticks: later than it is asked for."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(TaskDefinitionError):
        schedule = cron.Cron(text)
        assert schedule.next(1_000_000_000) > 1_000_000_000
        schedule.explain()


def urls(data: bytes) -> None:
    """A URL is refused, without its password, or read."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(ConfigError):
        endpoint = url.parse_url(text)
        assert endpoint.handshake("me")[-1] == ("TIME",)


SEEDS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "envelopes": (
        envelopes,
        [
            job.encode(job.Envelope(5, 1, "t", b"\x90", 1_700_000_000_000)),
            job.encode(job.Envelope(9, 1, "t", b"\x91\x01", 0, 3, job.Extra(timeout=1.0, due_at=7, error="e"))),
            job.encode(job.Envelope(5, 2, "t", b"\x80", 0)),
        ],
    ),
    "arguments": (bodies, [CODECS[0].encode((1, "x"), {}), CODECS[0].encode((1,), {"flag": True, "m": {"k": [1]}}), b"\x90"]),
    "cron": (expressions, [b"*/5 0-6,12 1 jan-mar mon#2", b"0 0 L * 5L", b"@daily", b"0 0 30 2 *"]),
    "urls": (urls, [b"redis://u:p@h:1/2?ssl_cert_reqs=none", b"unix:///a?db=1", b"redis+sentinel://a:1,b/m/0", b"rediss+cluster://h"]),
}  # fmt: skip


def main(name: str, seconds: str = "60") -> None:
    """Fuzz one target for so long; libFuzzer prints what it did, and the input that failed."""
    target, seeds = SEEDS[name]
    corpus = Path(tempfile.mkdtemp(prefix=f"fastq-fuzz-{name}-"))
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=5", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/", str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
