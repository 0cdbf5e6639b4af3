"""``fastq enqueue NAME --json '{…}'``: a job by its task's name, without the application."""

from __future__ import annotations

import contextlib
import sys

import click
import msgspec

from fastq.broker.calls import Numbers, Target, enqueue_sync
from fastq.broker.command import raw
from fastq.broker.commands import NewJob, Refused
from fastq.broker.keys import GlobalKeys, QueueKeys
from fastq.cli.session import Session, with_text_session
from fastq.errors import (
    BodyTooLarge,
    BrokerError,
    InvalidArguments,
    InvalidOption,
    JobIdReused,
    UnknownTask,
    safe_text,
)
from fastq.job import PLAIN, TASK_NAME, Envelope, Extra, check_id, check_priority, encode, new_id, state_of
from fastq.partitions import parse_partitions, partition_for, queue_of
from fastq.values import check_queue_name, parse_duration, parse_queues

__all__ = ["verbs"]

LONGEST = 366 * 86_400
"""Seconds: a longer delay is a mistake."""


def body_of(task: str, text: str) -> bytes:
    """The body of a call with these JSON arguments: an object of keywords, or a list of positional ones.

    Raises:
        InvalidArguments: it is neither, or holds what a body cannot.
    """
    try:
        arguments = msgspec.json.decode(text)
    except Exception as error:  # noqa: BLE001 - DecodeError, UnicodeEncodeError (argv is bytes), RecursionError
        raise InvalidArguments(f"the arguments of task {task!r} are not JSON: {error}") from None
    if not isinstance(arguments, dict | list) or (isinstance(arguments, dict) and "" in arguments):
        raise InvalidArguments(
            f'the arguments of task {task!r} must be an object, {{"to": "a@example.org"}}, or a list'
        )
    try:
        return encode(arguments)
    except (OverflowError, RecursionError) as error:
        raise InvalidArguments(f"an argument of task {task!r} cannot be encoded: {error}") from None


def envelope_of(task: str, body: bytes, priority: int, now: int, delay_ms: int) -> bytes:
    """The envelope of a job that nothing but its name and arguments is known of."""
    extra = Extra(due_at=now + delay_ms) if delay_ms else None
    return encode(Envelope(priority, PLAIN, task, body, now, 0, extra))


@click.command()
@click.argument("name")
@click.option("--json", "arguments", metavar="JSON", default="{}", help='Arguments: {"to": "…"} or […]; - reads stdin.')
@click.option("--queue", "-q", help="Default: the first one of the setting queues.")
@click.option("--priority", "-p", type=int, default=5, show_default=True, help="0 to 10, higher runs first.")
@click.option("--delay", metavar="DURATION", default="0", help="Due so much later: 90, 5m, 2h.")
@click.option("--job-id", metavar="ID", help="An id of your own: a second job with it is not created.")
@click.option("--output", "-o", type=click.Choice(["text", "json"]), default="text", help="What is printed.")
@with_text_session
def enqueue(
    session: Session,
    name: str,
    arguments: str,
    queue: str | None,
    priority: int,
    delay: str,
    job_id: str | None,
    output: str,
) -> None:
    """Enqueue a job by its task's name.

    Prints the job's id. The arguments are checked by the worker: the task's signature is not known here.
    """
    settings = session.settings
    if not TASK_NAME.match(name):
        raise UnknownTask(f"{name!r:.250} is not a task name: 1 to 200 characters of A-Z a-z 0-9 _ . : -")
    body = body_of(name, sys.stdin.read() if arguments == "-" else arguments)
    if len(body) > settings.max_body:
        raise BodyTooLarge(f"the arguments of task {name!r} take {len(body):,} bytes, more than {settings.max_body:,}")
    chosen = check_queue_name(queue or queue_of(parse_queues(settings.queues).names[0]))
    seconds = parse_duration(delay)
    if seconds > LONGEST:
        raise InvalidOption(f"delay={delay!r} must be at most 366 days")
    delay_ms = round(seconds * 1_000)
    new = NewJob(check_id(job_id) if job_id else new_id(), b"", delay_ms, chosen=job_id is not None)
    chosen = partition_for(chosen, parse_partitions(settings.partitions).get(chosen, 1), new.id)
    q = QueueKeys(settings.prefix, chosen)
    session.agree()  # also: its clock is Redis's from here on
    envelope = envelope_of(name, body, check_priority(priority), session.connection.clock.now_ms(), delay_ms)
    if settings.signing_keys:
        from fastq.signing import signer_of

        signer = signer_of(settings.signing_keys, session.connection.clock.now_ms)
        envelope = signer.seal(chosen, new.id, envelope) if signer else envelope
    refused = _send(session, q, priority, new._replace(envelope=envelope))
    created = not _refused(refused, new.id, chosen)
    session.as_json = output == "json"
    session.answer({"id": new.id, "queue": chosen, "created": created}, [new.id])
    if not created:
        click.echo("fastq: this job exists already; nothing was enqueued", err=True)
    else:
        warn_of_unknown(session, q, name)


def warn_of_unknown(session: Session, q: QueueKeys, task: str) -> None:
    """On stderr, if no live worker serves the queue, or none that does knows the task."""
    from fastq.broker.explain import unheard

    with contextlib.suppress(BrokerError):  # what was asked for is done; a producer's rights may not reach this far
        if text := session.run(unheard(session.inspector, q, task)):
            click.echo(f"fastq: {safe_text(text)}", err=True)


def _send(session: Session, q: QueueKeys, priority: int, job: NewJob) -> list[Refused]:
    connection, settings = session.connection, session.settings
    numbers, target = Numbers(connection.clock), Target(q, priority)
    refused = enqueue_sync(connection, numbers, target, [job], settings.enqueue_timeout)
    connection.call(raw("SADD", GlobalKeys(settings.prefix).queues, q.queue))
    return refused


def _refused(refused: list[Refused], job_id: str, queue: str) -> bool:
    """Whether a living job has this id.

    Raises:
        JobIdReused: a finished one has.
    """
    if not refused:
        return False
    if refused[0].why == "dead":
        raise JobIdReused(job_id, queue, "failed")
    if refused[0].why == "finished":
        raise JobIdReused(job_id, queue, state_of(refused[0].detail))
    return True


verbs = {"enqueue": enqueue}
