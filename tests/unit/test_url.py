"""Redis URLs: each form is understood or answered with a ConfigError, and a password is never shown."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastq.broker.url import Endpoint, parse_url
from fastq.errors import ConfigError, mask_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", {}),
        ("redis://", {}),
        ("REDIS://db", {"host": "db"}),
        ("redis://db:7000", {"host": "db", "port": 7000}),
        ("redis://db:7000/", {"host": "db", "port": 7000}),
        ("redis://db/3", {"host": "db", "db": 3}),
        ("redis://db?db=4", {"host": "db", "db": 4}),
        ("redis://db/3?db=4", {"host": "db", "db": 4}),
        ("redis://[::1]:6380/1", {"host": "::1", "port": 6380, "db": 1}),
        ("redis://:pw@db", {"host": "db", "password": "pw"}),
        ("redis://app:pw@db", {"host": "db", "username": "app", "password": "pw"}),
        ("redis://app@db", {"host": "db", "username": "app"}),
        ("redis://a%2Fb:p%40%3A%2F%23%25@db", {"host": "db", "username": "a/b", "password": "p@:/#%"}),
        ("redis://:a:b@db", {"host": "db", "password": "a:b"}),
        ("redis://:a@b@db", {"host": "db", "password": "a@b"}),
        ("redis://münchen.example", {"host": "münchen.example"}),
        ("rediss://db", {"host": "db", "tls": True}),
        (
            "rediss://db?ssl_cert_reqs=none&ssl_check_hostname=false",
            {"host": "db", "tls": True, "options": (("ssl_cert_reqs", "none"), ("ssl_check_hostname", "false"))},
        ),
        ("unix:///run/redis.sock", {"path": "/run/redis.sock"}),
        ("unix:///run/redis.sock?db=2", {"path": "/run/redis.sock", "db": 2}),
        ("unix://:pw@/run/redis.sock", {"path": "/run/redis.sock", "password": "pw"}),
        ("unix:///run/a%20b/@x.sock", {"path": "/run/a b/@x.sock"}),
        ("redis+sentinel://s1/main", {"sentinels": (("s1", 26379),), "master": "main"}),
        (
            "redis+sentinel://app:pw@s1:1,s2,[::1]:3/main/5",
            {
                "sentinels": (("s1", 1), ("s2", 26379), ("::1", 3)),
                "master": "main",
                "db": 5,
                "username": "app",
                "password": "pw",
            },
        ),
        ("redis+cluster://n1", {"nodes": (("n1", 6379),), "host": "n1"}),
        (
            "rediss+cluster://app:pw@n1:1,[::1]:2,[::2]/0?ssl_cert_reqs=none",
            {
                "nodes": (("n1", 1), ("::1", 2), ("::2", 6379)),
                "host": "n1",
                "port": 1,
                "username": "app",
                "password": "pw",
                "tls": True,
                "options": (("ssl_cert_reqs", "none"),),
            },
        ),
        ("redis+sentinel://s1/main?db=6", {"sentinels": (("s1", 26379),), "master": "main", "db": 6}),
    ],
)
def test_every_form(url: str, expected: dict[str, object]) -> None:
    assert parse_url(url) == Endpoint(mask_url(url), **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("", "(empty)"),
        ("localhost:6379", "no usable scheme"),
        ("http://db", "no usable scheme"),
        ("redis:/db", None),
        ("redis://db:port", "port"),
        ("redis://db:99999", "range"),
        ("redis://db:-1", None),
        ("redis://[::1", "IPv6"),
        ("redis://a..b", "no host name"),
        ("redis://" + "a" * 64, "no host name"),
        ("redis://db/zero", "'zero'"),
        ("redis://db/-1", "'-1'"),
        ("redis://db/²", "not a number"),
        ("redis://db/" + "1" * 5_000, "not a number"),
        ("redis://db?db=x", "'x'"),
        ("rediss://db?ssl_ca_cert=x", "did you mean 'ssl_ca_certs'"),
        ("redis://db?timeout=1", "'timeout'"),
        ("redis://db?ssl_cert_reqs=none", "needs rediss://"),
        ("redis+sentinel://s1/main?ssl_cert_reqs=none", "needs rediss://"),
        ("rediss://db?ssl_cert_reqs=nome", "required or none"),
        ("unix://", "no socket"),
        ("unix:///", "no socket"),
        ("unix:///a%00b", "no socket"),
        ("redis+sentinel://s1", "no master"),
        ("redis+sentinel://s1:x/main", "'s1:x'"),
        ("redis+cluster://n1:x", "a node 'n1:x'"),
        ("redis+cluster://n1/2", "a cluster has none but number 0"),
        ("redis+cluster://n1?db=2", "a cluster has none but number 0"),
        ("redis+cluster://n1?ssl_cert_reqs=none", "needs rediss://"),
        ("redis+sentinel://s1:²/main", "not host:port"),
        ("redis+sentinel://s1:70000/main", "not host:port"),
        ("redis+sentinel:///main", "not host:port"),
        ("redis+sentinel://s1,,s2/main", "not host:port"),
        ("redis+sentinel://a..b:1/main", "no host name"),
        ("redis+sentinel://s1/main/x", "'x'"),
    ],
)
def test_what_is_wrong_is_named(url: str, named: str | None) -> None:
    if named is None:
        with pytest.raises(ConfigError):
            parse_url(url + ":")
        return
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    assert named in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is None


def test_a_message_is_short_whatever_the_url() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url("http://" + "x" * 100_000)
    assert len(str(caught.value)) < 600


# -- passwords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "redis://app:s3c/r3t@db/0",
        "redis://app:s3c#r3t@db/0",
        "redis://app:s3c?r3t@db/0",
        "redis://:12/s3cr3t@db:6379/0",
        "redis://:1?s3cr3t=2@db",
        "redis://:[s3cr3t@db",
        "redis://s3:cr3t@db:s3port",
        "redis:/app:s3cr3t@db",
        "app:s3cr3t@db",
        "htp://app:s3cr3t@db",
        "redis+sentinel://:s3c/r3t@s1:1/main",
        "redis+sentinel://:s3cr3t@s1:x/main",
        "rediss://:s3cr3t@db?nonsense=1",
        "redis://:s3cr3t@db/zero",
        "redis://:s3c\nr3t@db/zero",
        "unix://:s3cr3t@/",
    ],
)
def test_a_wrong_url_does_not_show_its_password(url: str) -> None:
    """Also where it is the password that makes it wrong: a character that had to be percent-encoded."""
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    for part in ("s3c", "r3t", "cr3t"):
        assert part not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_what_to_do_about_special_characters_is_told() -> None:
    for url in ("redis://app:s3c/r3t@db/0", "redis://:12/s3cr3t@db:6379/0"):
        with pytest.raises(ConfigError, match="percent-encoded"):
            parse_url(url)


@given(password=st.text(min_size=1), user=st.text())
@example(password="@", user="")
@example(password="/:@#?%[]", user="a:b/c@d")
def test_an_encoded_password_is_understood_and_never_shown(password: str, user: str) -> None:
    """Any text, percent-encoded: it arrives whole, and neither `shown` nor the repr holds it."""
    secret = f"<{password}>"
    try:
        url = f"redis://{quote(user, safe='')}:{quote(secret, safe='')}@db:1/2"
    except UnicodeEncodeError:  # half a surrogate pair: no URL can hold it
        return
    endpoint = parse_url(url)
    assert (endpoint.username, endpoint.password) == (user, secret)
    assert (endpoint.host, endpoint.port, endpoint.db) == ("db", 1, 2)
    assert endpoint.shown.endswith(":***@db:1/2") or endpoint.shown.endswith("…")
    assert quote(secret, safe="") not in repr(endpoint)
    assert secret not in repr(endpoint)


@given(st.text())
@example("redis://[v1.x]")
@example("redis://\u2100")
@example("redis://@:@/")
@example("rediss://h?ssl_ca_certs=%00")
def test_any_text_is_an_endpoint_or_a_config_error(url: str) -> None:
    """Never another exception."""
    read = endpoint_or_message(url)
    assert isinstance(read, Endpoint) or read.isprintable()


def endpoint_or_message(url: str) -> Endpoint | str:
    try:
        return parse_url(url)
    except ConfigError as error:
        return str(error)


PIECES = ["redis", "rediss", "unix", "redis+sentinel", "://", ":", "/", "@", "#", "?", "[", "]", ",", "%", "=", "&"]
PIECES += [
    "db",
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "none",
    "6379",
    "0",
    "::1",
    "localhost",
    "%40",
    "%zz",
    "\x00",
    "\n",
    "²",
]


@given(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.sampled_from(["", "redis://", "redis+sentinel://"])
)
def test_any_url_like_text_is_an_endpoint_or_a_config_error(rest: str, start: str) -> None:
    read = endpoint_or_message(start + rest)
    if isinstance(read, str):
        assert read.isprintable()
        return
    assert 0 <= read.port <= 65_535
    assert read.db >= 0
    read.host.encode("idna")
    assert "\x00" not in read.path


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://db", "redis://db"),
        ("redis://app@db", "redis://app@db"),
        ("redis://app:pw@db", "redis://app:***@db"),
        ("redis://:pw@db", "redis://:***@db"),
        ("redis://app:@db", "redis://app:***@db"),
        ("redis://app:p@w:x@db/0", "redis://app:***@db/0"),
        ("redis://app:p://w@db", "redis://app:***@db"),
        ("app:pw@db", "app:***@db"),
        ("unix:///run/x.sock", "unix:///run/x.sock"),
        ("redis+sentinel://:pw@s1:1,s2:2/m", "redis+sentinel://:***@s1:1,s2:2/m"),
        ("", ""),
    ],
)
def test_mask_url(url: str, shown: str) -> None:
    assert mask_url(url) == shown


# -- the handshake and TLS --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "first"),
    [
        ("redis://db", []),
        ("redis://:pw@db", [("AUTH", "pw")]),
        ("redis://app:pw@db/2", [("AUTH", "app", "pw"), ("SELECT", "2")]),
        ("redis://app@db", []),
    ],
)
def test_handshake(url: str, first: list[tuple[str, ...]]) -> None:
    assert parse_url(url).handshake("me") == [*first, ("CLIENT", "SETNAME", "me"), ("TIME",)]


def test_certificates_are_verified_unless_the_url_says_otherwise() -> None:
    context = parse_url("rediss://db").ssl_context()
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    unnamed = parse_url("rediss://db?ssl_check_hostname=FALSE").ssl_context()
    assert unnamed is not None
    assert (unnamed.verify_mode, unnamed.check_hostname) == (ssl.CERT_REQUIRED, False)
    unverified = parse_url("rediss://db?ssl_cert_reqs=none").ssl_context()
    assert unverified is not None
    assert (unverified.verify_mode, unverified.check_hostname) == (ssl.CERT_NONE, False)
    assert parse_url("redis://db").ssl_context() is None


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile"])
def test_a_certificate_file_that_cannot_be_read(option: str, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    for name in ("none.pem", "bad.pem"):
        endpoint = parse_url(f"rediss://:s3cr3t@db?{option}={tmp_path}/{name}")
        with pytest.raises(ConfigError, match="TLS files of rediss"):
            endpoint.ssl_context()
