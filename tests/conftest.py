"""Fixtures for every test: real servers, an independent look at them, and proof that nothing is left behind.

`redis_url` is an empty database, `raw` looks into it through redis-py (never through the code under test), `make_server`
starts servers that a test may kill, `eventually` waits for a fact. Coroutine tests run without a plugin.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import inspect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import hypothesis
import pytest

from fastq.broker.embedded import EmbeddedServer, find_server

if TYPE_CHECKING:
    from tests.nodes import Cluster

T = TypeVar("T")
POLL = 0.005  # seconds between two looks at a fact
LINGER = 5.0  # seconds that a test's processes have to end once the test has
LASTING = pytest.StashKey[set[int]]()  # pids that live as long as the session

hypothesis.settings.register_profile("fastq", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("fastq")


# -- the session ------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server",
        metavar="PATH",
        default=os.environ.get("FASTQ_REDIS_SERVER"),
        help="run the suite on this valkey-server or redis-server (default: FASTQ_REDIS_SERVER, then the embedded one)",
    )
    parser.addoption("--cluster", action="store_true", help="the server that tests share is a cluster of three masters")
    parser.addoption("--acl", action="store_true", help="on the shared server fastq is the user of docs/security.md")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it runs in the background with these two ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    config.stash[LASTING] = set()
    if config.getoption("--server"):
        os.environ["FASTQ_REDIS_SERVER"] = str(config.getoption("--server"))
    # A developer's own settings are no part of a test.
    for name in [n for n in os.environ if n.startswith("FASTQ_") and n != "FASTQ_REDIS_SERVER"]:
        del os.environ[name]
    for name in ("REDIS_URL", "NOTIFY_SOCKET", "WATCHDOG_USEC"):
        os.environ.pop(name, None)
    _adopt_orphans()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --cluster or --acl: what uses the shared server, but for what is about one server, or another user (its mark says why)."""
    for option, mark in (("--cluster", "one_server"), ("--acl", "other_user")):
        if config.getoption(option):
            config.hook.pytest_deselected(items=[item for item in items if not _is_for_this(item, mark)])
            items[:] = [item for item in items if _is_for_this(item, mark)]


def _is_for_this(item: pytest.Item, mark: str) -> bool:
    return "redis_server" in getattr(item, "fixturenames", ()) and item.get_closest_marker(mark) is None


def pytest_report_header() -> str:
    return f"server: {find_server()}"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A coroutine function is run in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


# -- servers ----------------------------------------------------------------------------------------------------------


ACL_PASSWORD = "s3cret-of-the-suite"


def acl_rules() -> list[bytes]:
    """What the user of docs/security.md may do, as the page says."""
    page = Path(__file__).parents[1] / "docs" / "security.md"
    found = re.search(r"^ACL SETUSER fastq on >PASSWORD (.+)$", page.read_text(), re.MULTILINE)
    assert found, "docs/security.md has no ACL line"
    return found[1].encode().split()


class MakeServer(Protocol):
    """`make_server(appendonly=True)`: a started server of the test's own; options are EmbeddedServer's."""

    def __call__(self, **options: Any) -> EmbeddedServer: ...


@pytest.fixture(scope="session")
def redis_server(pytestconfig: pytest.Config) -> Iterator[EmbeddedServer | Cluster]:
    """The server that all tests share. Do not configure, stop or kill it: that is what `make_server` is for."""
    from tests.nodes import Cluster

    before = children()
    shared = Cluster() if pytestconfig.getoption("--cluster") else EmbeddedServer()
    with shared as server:  # start() checks that the pid which answers is the one it started
        pytestconfig.stash[LASTING] |= children() - before
        if pytestconfig.getoption("--acl"):
            for node in server.servers if isinstance(server, Cluster) else [server]:
                assert (
                    node.ask(b"ACL", b"SETUSER", b"fastq", b"on", b">" + ACL_PASSWORD.encode(), *acl_rules())
                    == b"+OK\r\n"
                )
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedServer | Cluster, pytestconfig: pytest.Config) -> str:
    """The URL of an empty database."""
    if isinstance(redis_server, EmbeddedServer):
        assert redis_server.ask(b"FLUSHALL") == b"+OK\r\n"
    else:
        redis_server.flush()
    user = f"://fastq:{ACL_PASSWORD}@" if pytestconfig.getoption("--acl") else "://"
    return redis_server.url.replace("://", user)


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    """redis-py on the same database: an oracle that shares no code with fastq. Replies are bytes."""
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """Servers of the test's own, to restart, pause, kill or configure; gone when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> EmbeddedServer:
            server = EmbeddedServer(**options)
            stack.callback(server.stop)
            return server.start()

        yield make


def connect(url: str) -> Any:
    """A redis-py client that sends every command once and waits as long as it takes, with every right (--acl)."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    url = url.replace(f"fastq:{ACL_PASSWORD}@", "")
    if url.startswith("redis+cluster://"):
        from tests.nodes import oracle

        return oracle(url)
    return redis.Redis.from_url(url, socket_timeout=None, retry=Retry(NoBackoff(), 0), protocol=2)


# -- facts ------------------------------------------------------------------------------------------------------------


def eventually(fact: Callable[[], T], timeout: float = 10.0) -> T:
    """Wait until `fact()` is true (an AssertionError in it counts as "not yet") and return its value.

    For what another process or thread does; never a substitute for an event that can be waited for.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        value, why = _look(fact)
        if value:
            return value  # type: ignore[return-value]
        assert time.monotonic() < deadline, f"not true within {timeout} s: {_source(fact)} (last: {why})"
        time.sleep(POLL)


async def eventually_async(fact: Callable[[], T | Awaitable[T]], timeout: float = 10.0) -> T:
    """The same inside a coroutine; `fact` may return an awaitable."""
    __tracebackhide__ = True
    deadline = time.monotonic() + timeout
    while True:
        value, why = _look(fact)
        if inspect.isawaitable(value):
            value = why = await value
        if value:
            return value  # type: ignore[return-value]
        assert time.monotonic() < deadline, f"not true within {timeout} s: {_source(fact)} (last: {why})"
        await asyncio.sleep(POLL)


def _look(fact: Callable[[], object]) -> tuple[object, object]:
    try:
        value = fact()
    except AssertionError as error:
        return None, error
    return value, value


def _source(fact: Callable[..., object]) -> str:
    try:
        return " ".join(inspect.getsource(fact).split())
    except OSError:
        return repr(fact)


def alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not, although `os.kill(pid, 0)` still finds it."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # an orphan that the suite has adopted
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in "ZX"
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in {"", "Z"}


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., Any]:
    """`eventually(fact, timeout=10)`, for those who would rather not import it."""
    return eventually


# -- nothing is left behind: processes ----------------------------------------------------------------------------------


def children() -> set[int]:
    """The pids of this process's children."""
    if sys.platform == "linux":
        tasks = list(Path("/proc/self/task").glob("*/children"))
        if tasks:  # 0.1 ms; a kernel may be built without it
            return {int(pid) for task in tasks for pid in _read(task).split()}
        return {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == os.getpid()}
    listing = subprocess.run(["ps", "-axo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listing.splitlines())
    return {int(pid) for pid, parent, command in rows if int(parent) == os.getpid() and command != "ps"}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # that thread or process has ended meanwhile
        return ""


def _parent(stat: Path) -> int:
    return int((_read(stat).rpartition(")")[2].split() or [0, 0])[1])


def _adopt_orphans() -> None:
    """On Linux orphaned grandchildren become our children, so that they are seen (PR_SET_CHILD_SUBREAPER)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _describe(pid: int) -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return f"{pid} {Path(f'/proc/{pid}/cmdline').read_text().replace(chr(0), ' ')}"
    shown = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return f"{pid} {shown.strip()}"


@pytest.fixture(autouse=True)
def no_process_left(pytestconfig: pytest.Config) -> Iterator[None]:
    """Every process that a test starts has ended when the test has, within `LINGER`."""
    before = children()
    yield

    def left() -> set[int]:
        new = children() - before - pytestconfig.stash[LASTING]
        return {pid for pid in new if alive(pid) and "resource_tracker" not in _describe(pid)}

    deadline = time.monotonic() + LINGER
    while (remaining := left()) and time.monotonic() < deadline:
        time.sleep(POLL)
    if remaining:
        listing = "\n".join(_describe(pid) for pid in sorted(remaining))
        for pid in remaining:
            os.kill(pid, signal.SIGKILL)
        pytest.fail(f"processes outlived the test:\n{listing}", pytrace=False)


# -- nothing is left behind: keys ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_key_leaked(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests/redis: every key in the database is one that fastq.broker.keys knows, of its type and with its lifetime."""
    folder = Path(__file__).parent / "redis"
    if folder not in request.path.parents or "redis_url" not in request.fixturenames:
        yield
        return
    url = request.getfixturevalue("redis_url")
    yield
    if request.node.get_closest_marker("leaves_keys") is None:
        with connect(url) as client:
            faults = list(key_faults(client))
        if faults:
            pytest.fail("keys without an owner or an end (see fastq.broker.keys):\n" + "\n".join(faults), pytrace=False)


def _is_open_batch(client: Any, name: str) -> bool:
    """Its keys begin to expire when it has ended; until then its queue knows it."""
    base, found, batch = name.partition("}:batch:")
    return bool(found) and client.zscore(f"{base}}}:groups", batch.partition(":")[0]) is not None


def key_faults(client: Any) -> Iterator[str]:
    """What is wrong with the keys of a database."""
    from fastq.broker import keys

    for key in sorted(client.scan_iter(count=1000)):
        name = key.decode()
        info = keys.describe(name)
        if info is None:
            yield f"{name}: not in the table of keys"
            continue
        kind = client.type(key).decode()
        if kind not in {info.type, "none"}:
            yield f"{name}: is a {kind}, the table says {info.type}"
        if info.lifetime == "ttl" and client.pttl(key) == -1 and not _is_open_batch(client, name):
            yield f"{name}: has no TTL"
