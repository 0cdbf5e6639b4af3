"""Limiters by name: from files, from :func:`configure_limiter`, from ``app.limiter``.

A file is ``fastq.toml`` or ``rate-sync.toml``, looked for in ``.`` and ``./config``; FASTQ_LIMITS names another one (or its
folder) instead. It has a table ``[stores.<id>]`` for each place where state is kept and ``[limiters.<id>]`` for each limiter.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from fastq import config
from fastq.broker.url import Endpoint, parse_url
from fastq.errors import ConfigError, did_you_mean, safe_text
from fastq.limiter.api import Limiter, limited
from fastq.limiter.plan import Plan
from fastq.limiter.stores import MemoryStore, RedisStore, Store
from fastq.limits import RULE_OPTIONS, check_limiter_id, read_rule

__all__ = [
    "Catalogue",
    "configure_limiter",
    "configure_store",
    "default",
    "get_or_clone_limiter",
    "monitored_acquire",
    "rate_limited",
]

P = ParamSpec("P")
R = TypeVar("R")

FILES: Final = ("fastq.toml", "rate-sync.toml")
_STORE_OPTIONS: Final = ("strategy", "engine", "url", "prefix")
_LIMITER_OPTIONS: Final = frozenset(
    {"store", "store_id", "timeout", "on_error", "fail_closed", "lease", "adaptive"} | RULE_OPTIONS
)
_NUMBERS: Final = frozenset(
    ["limit", "window_seconds", "rate_per_second", "burst", "max_concurrent", "timeout", "use_within", "lease"]
)
_RECOVERY: Final = 60.0
"""Seconds of ``adaptive = true``: a halved rate is whole again in half of that."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class Catalogue:
    """Stores and limiters by name. The default one, ``default()``, reads the files at its first use."""

    def __init__(self, *, files: bool = False) -> None:
        self._stores: dict[str, Store] = {}
        self._limiters: dict[str, tuple[Mapping[str, Any], Limiter]] = {}
        self._scoped: dict[tuple[str, str, bool], Limiter] = {}
        self._unread = files
        self._lock = threading.RLock()

    # -- defining -----------------------------------------------------------------------------------

    def add_store(self, name: str, options: Mapping[str, Any]) -> Store:
        """Define a store, or define it anew. Raises ConfigError."""
        store, problems = _make_store(options)
        if problems or store is None:
            raise ConfigError(f"store {name!r}: " + "; ".join(problems))
        with self._lock:
            self._stores[name] = store
        return store

    def add_limiter(self, name: str, options: Mapping[str, Any], store: Store | None = None) -> Limiter:
        """Define a limiter, or define it anew. Raises ConfigError, with all that is wrong in one message."""
        plan, problems = _make_plan(name, options)
        with self._lock:
            if store is None:
                store = self._store(str(options.get("store", options.get("store_id", "redis"))), problems)
            if problems or plan is None or store is None:
                raise ConfigError(f"limiter {name!r}: " + "; ".join(problems))
            limiter = Limiter(plan, store)
            self._limiters[name] = (dict(options), limiter)
            self._scoped = {scope: known for scope, known in self._scoped.items() if scope[0] != name}
        return limiter

    def adopt(self, limiter: Limiter, options: Mapping[str, Any]) -> None:
        """Know a limiter of an application by its name, too, unless there is one of that name."""
        with self._lock:
            self._limiters.setdefault(limiter.id, (dict(options), limiter))

    def _store(self, name: str, problems: list[str]) -> Store | None:
        if name in self._stores:
            return self._stores[name]
        if name not in ("redis", "memory"):
            problems.append(f"unknown store {name!r}{did_you_mean(name, {*self._stores, 'redis', 'memory'})}")
            return None
        self._stores[name] = _redis_store({}) if name == "redis" else MemoryStore()
        return self._stores[name]

    # -- finding ------------------------------------------------------------------------------------

    def find(self, name: str) -> Limiter:
        """A limiter by its name. Raises ConfigError: there is none; or the files have faults, with all of them."""
        with self._lock:
            if name not in self._limiters and self._unread:
                self.read(find_files())
                self._unread = False
            if name not in self._limiters:
                known = sorted(self._limiters)
                raise ConfigError(
                    f"no limiter {name!r}{did_you_mean(name, known)} (known: {', '.join(known) or 'none'}); define it with "
                    "app.limiter(...), fastq.configure_limiter(...) or [limiters] in fastq.toml"
                )
            return self._limiters[name][1]

    def all(self) -> dict[str, Limiter]:
        """Those that have been defined, by their names."""
        with self._lock:
            return {name: limiter for name, (_, limiter) in self._limiters.items()}

    def options(self, name: str) -> Mapping[str, Any] | None:
        """The options that a limiter was defined with."""
        known = self._limiters.get(name)
        return known[0] if known else None

    def scoped(self, name: str, scope: str, *, partition: bool) -> Limiter:
        """See :func:`get_or_clone_limiter`."""
        key = (name, scope, partition)
        limiter = self._scoped.get(key)
        if limiter is None:
            base = self.find(name)
            limiter = base.for_key(scope) if partition else base.named(scope)
            if len(self._scoped) < 10_000:
                self._scoped[key] = limiter
        return limiter

    # -- files --------------------------------------------------------------------------------------

    def read(self, paths: Iterable[Path]) -> None:
        """Define what stands in these files. Raises ConfigError with every fault of all of them; then nothing is defined."""
        faults: list[str] = []
        stores: dict[str, Store] = {}
        limiters: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for path in paths:
            tables = _tables(path, faults)
            for name, options in tables("stores"):
                store, problems = _make_store(options)
                faults += [f"{path} [stores.{name}]: {problem}" for problem in problems]
                if store is not None:
                    stores[name] = store
            for name, options in tables("limiters"):
                if name in limiters:
                    faults.append(f"{path} [limiters.{name}]: defined in {limiters[name][0]}, too")
                limiters[name] = (str(path), options)
        trial = Catalogue()
        trial._stores = {**self._stores, **stores}
        for name, (place, options) in limiters.items():
            _, problems = _make_plan(name, options)
            trial._store(str(options.get("store", options.get("store_id", "redis"))), problems)
            faults += [f"{place} [limiters.{name}]: {problem}" for problem in problems]
        if faults:
            raise ConfigError("; ".join(faults) if len(faults) == 1 else "\n  ".join(["limits:", *faults]))
        self._stores.update(trial._stores)
        for name, (_, options) in limiters.items():
            if name not in self._limiters:  # what the program says itself goes first
                self.add_limiter(name, options)


def find_files() -> list[Path]:
    """The files with limits, as they are looked for. Raises ConfigError: FASTQ_LIMITS names one that is not there."""
    named = os.environ.get("FASTQ_LIMITS", "").strip()
    if not named:
        folders = (Path(), Path("config"))
        return [path for folder in folders for name in FILES if (path := folder / name).is_file()]
    path = Path(named)
    found = [path / name for name in FILES if (path / name).is_file()] if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise ConfigError(f"FASTQ_LIMITS={safe_text(named, 200)!r}: there is no such file")
    return found


def _tables(path: Path, faults: list[str]) -> Callable[[str], list[tuple[str, Mapping[str, Any]]]]:
    """The tables of a file by their kind, with variables filled in."""
    import tomllib

    content: dict[str, Any] = {}
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        faults.append(f"cannot read {path}: {error.strerror}")
    except ValueError as error:
        faults.append(f"{path} is not valid TOML: {error}")
    if path.name != "fastq.toml":  # that one holds settings, too, which config.py checks
        faults += [f"{path}: unknown table {n!r}{did_you_mean(n, ('stores', 'limiters'))}" for n in content if n not in ("stores", "limiters")]  # fmt: skip

    def tables(kind: str) -> list[tuple[str, Mapping[str, Any]]]:
        table = content.get(kind, {})
        if not isinstance(table, dict):
            faults.append(f"{path}: {kind!r} must be a table: write [{kind}.<id>]")
            return []
        found: list[tuple[str, Mapping[str, Any]]] = []
        for name, options in table.items():
            if not isinstance(options, dict):
                faults.append(f"{path} [{kind}]: {name!r} must be a table: write [{kind}.{name}]")
                continue
            place = f"{path} [{kind}.{name}]"
            found.append((name, {option: _filled(option, value, place, faults) for option, value in options.items()}))
        return found

    return tables


def _filled(option: str, value: Any, place: str, faults: list[str]) -> Any:
    """A value with ``${VARIABLE}`` and ``${VARIABLE:-default}`` replaced; a number where the option is one."""
    if not isinstance(value, str) or "${" not in value:
        return value

    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], "") or match[2]
        if found is None:
            faults.append(f"{place}: {option}: the environment variable {match[1]} is not set; ${{{match[1]}:-default}} has a default")  # fmt: skip
        return found or ""

    text = _VARIABLE.sub(replace, value)
    if option in _NUMBERS:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
    return text


# -- from options to objects -------------------------------------------------------------------------------


def _make_store(options: Mapping[str, Any]) -> tuple[Store | None, list[str]]:
    problems = [f"unknown option {n!r}{did_you_mean(n, _STORE_OPTIONS)}" for n in options if n not in _STORE_OPTIONS]
    kind = options.get("strategy", options.get("engine", "redis"))
    if kind not in ("redis", "memory"):
        near = did_you_mean(str(kind), ("redis", "memory"))
        return None, [*problems, f"strategy={kind!r} must be 'redis' or 'memory'{near}"]
    if kind == "memory":
        problems += [f"{n} is no option of a memory store" for n in ("url", "prefix") if n in options]
        return MemoryStore(), problems
    try:
        return _redis_store(options), problems
    except ConfigError as error:
        return None, [*problems, str(error)]


def _redis_store(options: Mapping[str, Any]) -> RedisStore:
    arguments = {name: options.get(name) for name in ("url", "prefix")}
    settings = config.load(arguments=arguments).settings
    return redis_store(settings, lambda: _endpoint(settings.url))


def redis_store(settings: config.Settings, endpoint: Callable[[], Endpoint]) -> RedisStore:
    """The store of an application's limiters."""
    timeouts = {"connect_timeout": settings.connect_timeout, "response_timeout": settings.response_timeout}
    return RedisStore(endpoint, settings.prefix, **timeouts)


def _endpoint(url: str) -> Endpoint:
    if url == "memory://":
        from fastq.broker.embedded import shared_server

        url = shared_server().url
    return parse_url(url)


def _make_plan(name: str, options: Mapping[str, Any]) -> tuple[Plan | None, list[str]]:
    """A limiter's plan, and everything that is wrong with its options."""
    problems = [
        f"unknown option {n!r}{did_you_mean(n, _LIMITER_OPTIONS)}" for n in options if n not in _LIMITER_OPTIONS
    ]
    rule = None
    try:
        check_limiter_id(name)
        rule = read_rule({n: value for n, value in options.items() if n in RULE_OPTIONS})
    except ConfigError as error:
        problems.append(str(error))
    timeout, on_error, lease = options.get("timeout"), options.get("on_error"), options.get("lease", 15.0)
    if timeout is not None and (_no_number(timeout) or timeout < 0):
        problems.append(f"timeout={timeout!r} must be a number of seconds")
    if _no_number(lease) or not 0.2 <= lease <= 3_600:
        problems.append(f"lease={lease!r} must be a number of seconds from 0.2 to 3600")
    if on_error is None:
        on_error = "open" if options.get("fail_closed") is False else "closed"
    if on_error not in ("open", "closed"):
        problems.append(f"on_error={on_error!r} must be 'open' or 'closed'")
    adaptive = _RECOVERY if options.get("adaptive") is True else options.get("adaptive") or 0.0
    if _no_number(adaptive) or not (adaptive == 0 or 2 <= adaptive <= 86_400):
        problems.append(f"adaptive={adaptive!r} must be true, or the seconds of its recovery, from 2 to 86400")
    elif adaptive and rule is not None and rule.rate is None:
        problems.append("adaptive needs a rate")
    if {"store", "store_id"} <= options.keys():
        problems.append("store and store_id are the same: leave one away")
    if rule is None or problems:
        return None, problems
    return Plan(name, rule, timeout, on_error, float(lease), float(adaptive)), problems


def _no_number(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


# -- the default catalogue -----------------------------------------------------------------------------------

_default = Catalogue(files=True)


def default() -> Catalogue:
    """The process's own."""
    return _default


def configure_store(
    store_id: str, *, strategy: str = "redis", url: str | None = None, prefix: str | None = None
) -> None:
    """Define where limiters keep their state: ``strategy="redis"`` (by default where the settings say) or ``"memory"``.

    Example::

        fastq.configure_store("test", strategy="memory")

    Raises ConfigError.
    """
    given = {"strategy": strategy, "url": url, "prefix": prefix}
    _default.add_store(store_id, {name: value for name, value in given.items() if value is not None})


def configure_limiter(limiter_id: str, **options: Any) -> Limiter:
    """Define a limiter of this process, or define it anew. Options as in ``[limiters.<id>]``; see docs/limits.md.

    Example::

        fastq.configure_limiter("github_api", algorithm="sliding_window", limit=5000, window_seconds=3600, timeout=30)

    Raises ConfigError, with everything that is wrong in one message.
    """
    return _default.add_limiter(limiter_id, options)


async def get_or_clone_limiter(limiter_id: str, scope: str = "", *, partition: bool = False) -> Limiter:
    """The limiter of that name: defined in a file, by :func:`configure_limiter` or by ``app.limiter``.

    **The quota is shared by all scopes.** ``scope`` names the caller (``"worker-1"``, ``"email-worker"``): an API's limit is
    one limit, however many workers use it. In rate-sync each ``unique_id`` had a quota of its own, so that N workers
    exceeded the limit N-fold; where that is what you want, say ``partition=True``.

    Raises ConfigError: no such limiter, or faulty files.
    """
    return _default.scoped(limiter_id, scope, partition=partition)


async def monitored_acquire(limiter_id: str, job_type: str, timeout: float | None = None, cost: int = 1) -> None:
    """:meth:`Limiter.acquire` whose wait and timeout are counted under ``job_type`` instead of the running job's task.

    In a worker the monitor serves them as ``background_job_rate_limit_waits_total`` (those above 0.1 s),
    ``background_job_rate_limit_wait_seconds`` and ``background_job_rate_limit_timeouts_total``; see docs/metrics.md.
    ``job_type`` is one of a few names, not an id: each is a label.

    Raises as ``acquire``; ConfigError: no such limiter.
    """
    limiter = await get_or_clone_limiter(limiter_id, f"job:{job_type}")
    await limiter.acquire(timeout, cost)


def rate_limited(
    limiter: str | Limiter, *, timeout: float | None = None, cost: int = 1
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function, async or not: each call acquires first, and gives its slot back at its end.

    ``"api:{user_id}"`` is the partition of the limiter ``api`` by the function's argument ``user_id``; ``"api"`` is the limiter
    as a whole. ``timeout=None`` is the limiter's own.

    Example::

        @fastq.rate_limited("api:{user_id}", timeout=5)
        async def fetch(user_id: str) -> bytes: ...

    Raises ConfigError: the function has no such parameter. A call raises what ``acquire`` raises.
    """
    if isinstance(limiter, Limiter):
        known = limiter
        return limited(lambda: known, "", timeout, cost)
    name, brace, rest = limiter.partition("{")
    name = name.removesuffix(":")
    return limited(lambda: _default.find(name), brace + rest, timeout, cost)
