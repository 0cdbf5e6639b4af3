"""Signed jobs: workers run only what somebody with a key has enqueued (docs/security.md).

A signature is an HMAC-SHA256 over what a job is: queue, id, version, priority, task, arguments, times and options. What its life
changes (attempts, the due time of a retry, the text of an error) is not in it, so retries and replays need no key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable

import msgspec

from fastq.errors import BadSignature, ConfigError, GivenBack
from fastq.job import SIGNED, Envelope, Extra, Signature, decode_envelope, encode

__all__ = ["Signer", "reader", "signer_of"]

LEAST_SECRET = 32
"""Characters: `python -c "import secrets; print(secrets.token_urlsafe(32))"` prints 43."""

EARLY = 1_000
"""Milliseconds by which a job may run before its time: promoters and workers read clocks at different moments."""

_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}\Z")


class Signer:
    """Signs with the first key, verifies with all of them.

    Args:
        keys: key id -> secret, in order.
        now_ms: Redis's time.

    Raises:
        ConfigError: no key, or one that is too short. No secret is ever in a message.
    """

    def __init__(self, keys: dict[str, str], now_ms: Callable[[], int]) -> None:
        if not keys:
            raise ConfigError("signing_keys: there is no key")
        for name, secret in keys.items():
            if not _KEY_ID.match(name):
                raise ConfigError("signing_keys: a key id is 1 to 32 characters of A-Z a-z 0-9 _ . -")
            if len(secret) < LEAST_SECRET:
                raise ConfigError(f"signing_keys: the secret of key {name!r} has fewer than {LEAST_SECRET} characters")
        # A key of its own for this purpose: the same secret elsewhere gives nothing away.
        self._keys = {
            name: hmac.digest(secret.encode(), b"fastq job signature 1", hashlib.sha256)
            for name, secret in keys.items()
        }
        self._first = next(iter(keys))
        self._now_ms = now_ms

    def __repr__(self) -> str:
        return f"<Signer {', '.join(self._keys)}>"

    def seal(self, queue: str, job_id: str, data: bytes) -> bytes:
        """The envelope with a signature for this id in this queue; any other one that it had is gone."""
        envelope = decode_envelope(data)
        extra = msgspec.structs.replace(envelope.extra) if envelope.extra else Extra()
        sealed = msgspec.structs.replace(envelope, version=SIGNED, extra=extra)
        mark = Signature(self._first, extra.due_at or 0, extra.expires_at or 0)
        extra.signature = msgspec.structs.replace(mark, mac=self._mac(queue, job_id, sealed, mark))
        return encode(sealed)

    def open(self, queue: str, job_id: str, data: bytes) -> Envelope:
        """The envelope, if it was signed for this id in this queue.

        Raises:
            BadSignature: it was not, or it may not run any more. UndecodableJob: it cannot be read.
            GivenBack: it is due later than somebody has made it ready.
        """
        envelope = decode_envelope(data)
        mark = envelope.extra.signature if envelope.extra else None
        if mark is None:
            raise BadSignature("the job is not signed, and signing_required is on")
        if mark.key not in self._keys:
            raise BadSignature(f"the job is signed with the key {mark.key[:32]!r}, which is not among signing_keys")
        if not hmac.compare_digest(self._mac(queue, job_id, envelope, mark), mark.mac):
            raise BadSignature(
                f"the signature does not fit: made with another key {mark.key!r}, or the job was changed"
            )
        self._check_times(envelope, mark)
        return envelope

    def open_either(self, queue: str, job_id: str, data: bytes) -> Envelope:
        """As :meth:`open`, but a job without any signature passes. Raises as :meth:`open`."""
        envelope = decode_envelope(data)
        if envelope.version != SIGNED and (envelope.extra is None or envelope.extra.signature is None):
            return envelope
        return self.open(queue, job_id, data)

    def _check_times(self, envelope: Envelope, mark: Signature) -> None:
        now = self._now_ms()
        if mark.not_before - now > EARLY:
            raise GivenBack("the job was signed for a later time", mark.not_before - now)
        kept = envelope.extra is not None and envelope.extra.expires_at == mark.expires
        if mark.expires and now > mark.expires and not kept:  # kept: it ends as expired, like any other job
            raise BadSignature("the job was signed with an expiry, which is over: enqueue it anew")

    def _mac(self, queue: str, job_id: str, envelope: Envelope, mark: Signature) -> bytes:
        extra = envelope.extra or Extra()
        signed = encode(
            (
                mark.key, queue, job_id, envelope.version, envelope.priority, envelope.task, envelope.body, envelope.enqueued_at,
                mark.not_before, mark.expires, extra.timeout, extra.soft_timeout, extra.max_attempts, extra.result_ttl, extra.schedule, extra.takes,
            )
        )  # fmt: skip
        return hmac.digest(self._keys[mark.key], signed, hashlib.sha256)


def signer_of(text: str, now_ms: Callable[[], int]) -> Signer | None:
    """What the setting ``signing_keys`` says: ``id=secret,id=secret``; None when it is empty.

    Raises:
        ConfigError: it is no list of keys.
    """
    if not text:
        return None
    keys: dict[str, str] = {}
    for part in text.split(","):
        name, equals, secret = part.strip().partition("=")
        if not equals:
            raise ConfigError("signing_keys is a list of id=secret, separated by commas; the first one signs")
        if name in keys:
            raise ConfigError("signing_keys names one key id twice")
        keys[name] = secret
    return Signer(keys, now_ms)


def reader(text: str, now_ms: Callable[[], int], *, required: bool) -> Callable[[str, str, bytes], Envelope] | None:
    """How a worker reads the envelopes of jobs, as ``(queue, job_id, data)``; None: nothing is verified.

    Raises:
        ConfigError: see :func:`signer_of`.
    """
    signer = signer_of(text, now_ms)
    if signer is None:
        return None
    return signer.open if required else signer.open_either
