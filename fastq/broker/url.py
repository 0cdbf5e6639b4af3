"""Where Redis is: the URL forms that fastq takes, read once into an :class:`Endpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from fastq.broker.keys import GlobalKeys
from fastq.errors import ConfigError, did_you_mean, mask_url, safe_text

if TYPE_CHECKING:
    import ssl

__all__ = ["Endpoint", "parse_url"]

FORMS = (
    "redis://host:6379/0, rediss://host:6380/0, unix:///run/redis.sock?db=0, "
    "redis+sentinel://h1:26379,h2:26379/mymaster/0, redis+cluster://h1:6379,h2:6379, rediss+cluster://h1:6380"
)
_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "redis+cluster", "rediss+cluster")
_MANY = {"redis+sentinel": "26379", "redis+cluster": "6379", "rediss+cluster": "6379"}
"""Schemes that take several hosts, and the port of one that names none."""

_ENCODE = "special characters in a password must be percent-encoded (/ is %2F, # is %23, @ is %40)"
_OPTIONS = ("db", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")


class Endpoint(NamedTuple):
    """One Redis to talk to. ``shown`` is the URL with the password masked, for messages and logs."""

    shown: str
    host: str = "localhost"
    port: int = 6379
    path: str = ""  # a unix socket; then host and port are not used
    db: int = 0
    username: str = ""
    password: str = ""
    tls: bool = False
    options: tuple[tuple[str, str], ...] = ()
    sentinels: tuple[tuple[str, int], ...] = ()
    master: str = ""
    nodes: tuple[tuple[str, int], ...] = ()  # of a cluster; some of them are enough
    prefix: str = ""  # of keys whose version each new connection asks for, as a producer's does (schema.py)

    def __repr__(self) -> str:
        """Without the password: a repr ends up in logs and tracebacks."""
        return f"<Endpoint {self.shown}>"

    @property
    def unverified(self) -> bool:
        """Whether TLS is spoken with whoever answers: ``ssl_cert_reqs=none``."""
        return self.tls and dict(self.options).get("ssl_cert_reqs") == "none"

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context that the URL's ``ssl_*`` options ask for; None without TLS. Certificates are verified
        unless ``ssl_cert_reqs=none``.

        Raises:
            ConfigError: a certificate file cannot be read.
        """
        if not self.tls:
            return None
        import ssl

        options = dict(self.options)
        try:
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
            if options.get("ssl_certfile"):
                context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
        except OSError as error:
            raise ConfigError(f"the TLS files of {self.shown} cannot be used: {error}") from None
        if self.unverified or options.get("ssl_check_hostname", "true").lower() in ("false", "0", "no"):
            context.check_hostname = False
        if self.unverified:
            context.verify_mode = ssl.CERT_NONE
        return context

    def handshake(self, client_name: str) -> list[tuple[bytes | str, ...]]:
        """The commands that open a connection, sent in one write. The last one asks for Redis's clock."""
        words: list[tuple[bytes | str, ...]] = []
        if self.password:
            words.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        if self.db:
            words.append(("SELECT", str(self.db)))
        if self.prefix:
            words.append(("GET", GlobalKeys(self.prefix).schema))
        words.append(("CLIENT", "SETNAME", client_name))
        words.append(("TIME",))
        return words


def parse_url(url: str) -> Endpoint:
    """Read a Redis URL.

    Raises:
        ConfigError: naming the part that is wrong, with the password masked.
    """
    shown = safe_text(mask_url(url), 300)
    try:
        parts = urlsplit(url)
        scheme, query = parts.scheme, dict(parse_qsl(parts.query, keep_blank_values=True))
        host, username, password = parts.hostname or "localhost", parts.username or "", parts.password or ""
        port = 0 if scheme in _MANY else parts.port
    except ValueError as error:
        why = _ENCODE if "@" in url else error  # the error may quote what it took for the port: a part of the password
        raise ConfigError(f"the Redis URL {shown} cannot be read: {why}; use one of {FORMS}") from None
    if scheme not in _SCHEMES:
        raise ConfigError(f"the Redis URL {shown or '(empty)'} has no usable scheme; use one of {FORMS}")
    if scheme != "unix" and "@" in parts.path + parts.query + parts.fragment:
        raise ConfigError(f"the Redis URL {shown} has an @ behind its host: {_ENCODE}")
    for name in query:
        if name not in _OPTIONS:
            raise ConfigError(f"the Redis URL {shown} has an unknown option {name!r}{did_you_mean(name, _OPTIONS)}")
    tls = tuple((name, value) for name, value in query.items() if name.startswith("ssl_"))
    if tls and not scheme.startswith("rediss"):
        raise ConfigError(f"the Redis URL {shown} has the option {tls[0][0]!r}, which needs rediss://")
    if query.get("ssl_cert_reqs", "required") not in {"required", "optional", "none"}:
        raise ConfigError(f"the Redis URL {shown} has a wrong ssl_cert_reqs: use required or none")
    endpoint = Endpoint(shown, username=unquote(username), password=unquote(password), options=tls)
    if scheme == "unix":
        return _unix(endpoint, parts.path, query)
    if scheme in _MANY:
        hosts = _hosts(parts.netloc, scheme, shown)
        read = _sentinel if scheme == "redis+sentinel" else _cluster
        return read(endpoint._replace(tls=scheme == "rediss+cluster"), hosts, unquote(parts.path).strip("/"), query)
    database = _database(query.get("db", "") or parts.path.strip("/"), shown)
    return endpoint._replace(host=_host(host, shown), port=port or 6379, db=database, tls=scheme == "rediss")


def _host(host: str, shown: str) -> str:
    """The name itself, if the resolver can take it: it would raise UnicodeError only when connecting."""
    try:
        host.encode("idna")
    except UnicodeError:
        raise ConfigError(f"the Redis URL {shown} names the host {host!r:.80}, which is no host name") from None
    return host


def _database(text: str, shown: str) -> int:
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"the Redis URL {shown} names the database {text!r:.80}, which is not a number")
    return int(text or 0)


def _unix(endpoint: Endpoint, path: str, query: dict[str, str]) -> Endpoint:
    path = unquote(path)
    if path in {"", "/"} or "\0" in path:
        raise ConfigError(f"the Redis URL {endpoint.shown} names no socket: use unix:///run/redis.sock?db=0")
    return endpoint._replace(path=path, db=_database(query.get("db", ""), endpoint.shown))


def _sentinel(endpoint: Endpoint, hosts: tuple[tuple[str, int], ...], path: str, query: dict[str, str]) -> Endpoint:
    shown = endpoint.shown
    master, _, database = path.partition("/")
    if not master:
        raise ConfigError(f"the Redis URL {shown} names no master: use redis+sentinel://h1:26379,h2:26379/mymaster/0")
    database = query.get("db", "") or database
    return endpoint._replace(sentinels=hosts, master=master, db=_database(database, shown))


def _cluster(endpoint: Endpoint, hosts: tuple[tuple[str, int], ...], path: str, query: dict[str, str]) -> Endpoint:
    if _database(query.get("db", "") or path, endpoint.shown):
        raise ConfigError(f"the Redis URL {endpoint.shown} names a database: a cluster has none but number 0")
    return endpoint._replace(nodes=hosts, host=hosts[0][0], port=hosts[0][1])


def _hosts(netloc: str, scheme: str, shown: str) -> tuple[tuple[str, int], ...]:
    """The hosts of a list like ``user:password@h1:26379,h2,[::1]:26379``."""
    hosts = []
    for entry in netloc.rpartition("@")[2].split(","):
        host, colon, port = entry.rpartition(":")
        if not colon or entry.endswith("]"):
            host, port = entry, _MANY[scheme]
        if not host or not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 65_536):
            kind = "sentinel" if scheme == "redis+sentinel" else "node"
            raise ConfigError(f"the Redis URL {shown} has a {kind} {entry!r:.80} that is not host:port")
        hosts.append((_host(host.strip("[]"), shown), int(port)))
    return tuple(hosts)
