"""Public CURVE keys as people read and compare them.

Knows their text alone; `transport.keys.keys` makes and uses key pairs.
"""

from __future__ import annotations

import base64
import hashlib
import re

from lingualinked.errors import ArgumentError

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", re.ASCII)
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)}


def raw_key(public_key: object, field: str = "") -> bytes:
    """Return the 32 bytes of a public key in Z85 text, or raise ArgumentError naming ``field`` if it is not a valid one.

    See `RFC 32/Z85 <https://rfc.zeromq.org/spec/32/>`_.
    """
    raw = b""
    if isinstance(public_key, str) and len(public_key) == 40 and all(digit in _VALUES for digit in public_key):
        for start in range(0, 40, 5):
            word = 0
            for digit in public_key[start : start + 5]:
                word = word * 85 + _VALUES[digit]
            raw += word.to_bytes(5, "big").removeprefix(b"\0")  # five digits can write a little more than 32 bits
    if len(raw) != 32:
        named = f"{field}={public_key!r}" if field else repr(public_key)
        raise ArgumentError(
            f"{named} is not a public key: it has 40 characters, as `lingualinked keys list` and a daemon print them"
        )
    return raw


def is_public_key(text: str) -> bool:
    """Return whether a text is a public key."""
    try:
        raw_key(text)
    except ArgumentError:
        return False
    return True


def fingerprint(public_key: str) -> str:
    """Return a short text that two people can compare, in the form that ssh uses: ``SHA256:...``."""
    digest = hashlib.sha256(raw_key(public_key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check_key_name(name: object, field: str) -> str:
    """Check that a name can be that of a key file."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.endswith(".pub"):
        raise ArgumentError(
            f"{field}={name!r} must be the name of a key: up to 64 letters, digits, dots, - and _, not ending in .pub"
        )
    return name
