"""Which addresses and names only this machine answers to."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_loopback(header: str) -> bool:
    """Whether a request's Host is this machine by a loopback name.

    A page of the web whose name was pointed to 127.0.0.1 (DNS rebinding) is of the same origin for a browser, and
    would read every answer; but its requests bear its own name.
    """
    try:
        return is_loopback(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return False
