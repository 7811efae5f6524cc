"""The address and the key of a server, checked before anything is sent there."""

import ipaddress
from urllib.parse import SplitResult, urlsplit

from dspark_megatron.errors import ConfigError, require

EXAMPLE = "http://localhost:8000/v1"


def checked_address(url: str, *, insecure: bool) -> str:
    """The address without a slash at its end. ConfigError for one that is none, that holds a
    secret, or that would send the key and the prompts in clear over a network. insecure: that is
    known and wanted."""
    shown = _without_secrets(url)
    must = f"--endpoint ({shown}) must be a URL, such as {EXAMPLE}"
    require(url.isascii() and url.isprintable() and " " not in url, f"{must}, of plain ASCII")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{must}: it has no valid host or port") from error
    require(
        "@" not in url,
        f"--endpoint ({shown}) must not hold a name or password (user:password@): it is written "
        "into logs; use the environment variable of --api-key-variable",
    )
    require(parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0, must)
    require(
        not parts.query and not parts.fragment and not url.endswith(("?", "#")),
        f"--endpoint ({shown}) must end with its path, without ? or #: /chat/completions is "
        "appended to it",
    )
    require(
        parts.scheme == "https" or insecure or is_this_host(parts),
        f"--endpoint ({shown}) would send prompts and key in clear to another host; use https://, "
        "or --insecure in a network that you trust",
    )
    return url.rstrip("/")


def is_this_host(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.rstrip(".") == "localhost"
    address = getattr(address, "ipv4_mapped", None) or address  # such as ::ffff:127.0.0.1
    return address.is_loopback or address.is_unspecified


def checked_key(key: str, variable: str) -> str:
    """The key without the white space around it. ConfigError, which does not tell it, for one that
    no header can hold."""
    key = key.strip()
    odd = sum(not (character.isascii() and character.isprintable()) for character in key)
    require(
        not odd,
        f"the key in the environment variable {variable} must be one line of plain ASCII, and "
        f"{odd} of its characters are none; set it anew",
    )
    return key


def _without_secrets(url: str) -> str:
    """An address without its user and query, whatever its form."""
    head, at, rest = url.rpartition("@")
    scheme = head.partition("://")[0] + "://" if "://" in head else ""
    shown = f"{scheme}***@{rest}" if at else url
    for mark in "?#":
        shown, found, _ = shown.partition(mark)
        if found:
            return f"{shown}{found}***"
    return shown
