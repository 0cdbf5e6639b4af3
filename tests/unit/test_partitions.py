"""Where the jobs of a queue that is split lie: names, counts, the partition of an id."""

from __future__ import annotations

from collections import Counter

import pytest

from fastq import FastQ
from fastq.broker.keys import QueueKeys
from fastq.broker.topology import slot_of
from fastq.errors import ConfigError, InvalidQueueName, TaskDefinitionError
from fastq.job import new_id
from fastq.partitions import (
    MOST_PARTITIONS,
    check_partition,
    id_for,
    is_partition,
    parse_partitions,
    partition_for,
    queue_of,
    served,
    spread,
)
from fastq.registry import Tasks


def test_an_id_leads_to_the_same_partition_for_ever() -> None:
    """Processes, releases and other languages have to agree: CRC-32 of the id, modulo the number."""
    assert partition_for("mail", 4, "order-42") == "mail:2"
    assert partition_for("mail", 8, "order-42") == "mail:6"
    assert partition_for("mail", 4, "0123456789abcdef01234567") == "mail:0"
    assert partition_for("mail", 1, "order-42") == "mail"


def test_new_ids_spread_evenly() -> None:
    counts = Counter(partition_for("mail", 4, new_id()) for _ in range(4_000))
    assert set(counts) == set(spread("mail", 4))
    assert min(counts.values()) > 850, "4,000 coins with four sides: 850 is five deviations away"


def test_a_batch_and_a_workflow_are_where_they_are() -> None:
    """Their jobs are ``<id>-<n>`` and ``<id>.<n>``; ids that only look similar are hashed whole."""
    whole = new_id()
    assert {partition_for("mail", 16, f"{whole}{sign}{n}") for sign in "-." for n in range(50)} == {
        partition_for("mail", 16, whole)
    }
    assert len({partition_for("mail", 16, f"order-{n}") for n in range(200)}) == 16


def test_an_id_is_made_for_a_partition() -> None:
    for name in spread("mail", MOST_PARTITIONS):
        assert partition_for("mail", MOST_PARTITIONS, id_for("mail", MOST_PARTITIONS, name, new_id)) == name


def test_four_partitions_lie_in_the_four_quarters_of_the_slots() -> None:
    """So three or four masters that share the slots evenly all get a part, whatever the queue is called."""
    for queue in ("mail", "a", "emails-2", *(new_id() for _ in range(300))):
        slots = [slot_of(QueueKeys("fastq", name).jobs) for name in spread(queue, 4)]
        assert {slot * 4 // 16_384 for slot in slots} == {0, 1, 2, 3}
        assert {slot * 3 // 16_384 for slot in slots} == {0, 1, 2}


def test_names() -> None:
    assert is_partition("mail")
    assert is_partition("mail:0")
    assert is_partition("mail:63")
    for wrong in ("mail:", "mail:01", "mail:100", "mail:x", ":1", "mail:1:2", "ma il:1", "mail:1\n", ""):
        assert not is_partition(wrong)
        with pytest.raises(InvalidQueueName):
            check_partition(wrong)
    assert (queue_of("mail:12"), queue_of("mail")) == ("mail", "mail")


def test_who_serves_a_queue_serves_its_home_and_what_others_have_announced() -> None:
    assert served("mail", 1) == ["mail"]
    assert served("mail", 1, ["mail", "mailbox:1", "other"]) == ["mail"]
    assert served("mail", 2, ["mail:7", "mail:1", "mail:x"]) == ["mail", "mail:0", "mail:1", "mail:7"]
    assert served("mail:7", 1, ["mail:1"]) == ["mail:7"]


@pytest.mark.parametrize(
    "text", ["mail", "mail=", "mail=0", "mail=65", "mail=x", "mail=-1", "=4", "m ail=4", "mail:1=2"]
)
def test_a_setting_that_cannot_be_read(text: str) -> None:
    with pytest.raises((ConfigError, InvalidQueueName)):
        parse_partitions(text)
    with pytest.raises((ConfigError, InvalidQueueName)):
        FastQ("redis://nowhere", partitions=text)


def test_the_setting_comes_before_the_code() -> None:
    app = FastQ("redis://nowhere", partitions={"mail": 4})
    app.queue("mail", partitions=2)
    app.queue("bulk", partitions=3)
    app.queue("plain", partitions=1)
    assert app.partitions == {"mail": 4, "bulk": 3}
    assert app.served("plain") == ["plain"]


def test_the_code_says_one_number() -> None:
    tasks = Tasks()
    tasks.queue("mail", partitions=2)
    app = FastQ("redis://nowhere")
    app.include(tasks)
    assert app.partitions == {"mail": 2}
    with pytest.raises(TaskDefinitionError, match="2 partitions before, and now 3"):
        app.queue("mail", partitions=3)
    for wrong in (0, 65, True, "4", 2.0):
        with pytest.raises(TaskDefinitionError, match="1 to 64"):
            app.queue("other", partitions=wrong)  # type: ignore[arg-type]


def test_nothing_changes_for_a_queue_that_is_not_split() -> None:
    """The keys are byte for byte those of before, and a call is no other object."""
    app, split = FastQ("redis://nowhere"), FastQ("redis://nowhere", partitions="bulk=4")
    for each in (app, split):

        @each.task(queue="mail")
        async def send(to: str) -> None: ...

        call = send._call(("a",), {}, each)
        assert call.queue == "mail"
        assert each.keys(call.queue).jobs == b"fastq:{mail}:jobs"
    assert split.keys(partition_for("bulk", 4, "order-42")).jobs == b"fastq:{bulk:2}:jobs"


def test_a_partition_is_no_queue_of_a_task() -> None:
    """Where its jobs lie is not for the caller to say."""
    app = FastQ("redis://nowhere", partitions="mail=4")
    with pytest.raises(TaskDefinitionError):
        app.task(queue="mail:1")(lambda: None)
    with pytest.raises(InvalidQueueName):
        app._named("send", (), {}, {"queue": "mail:1"})


def test_a_bound_is_shared_out() -> None:
    app = FastQ("redis://nowhere")
    app.queue("mail", max_pending=10, partitions=4)
    app.queue("other", max_pending=10)
    bounds = [app.bound(name) for name in ("mail:0", "mail:3", "other")]
    assert [bound and bound.most for bound in bounds] == [3, 3, 10]
