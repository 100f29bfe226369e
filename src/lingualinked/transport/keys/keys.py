"""CURVE key pairs, which identify parties and encrypt their messages.

Knows no sockets and no messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from lingualinked.errors import ArgumentError, ProtocolError
from lingualinked.public_key import raw_key


@dataclass(frozen=True, slots=True)
class KeyPair:
    """The two halves of one party's CURVE key, each 40 characters of Z85 text; peers identify it by the public one.

    See `RFC 26/CURVEZMQ <https://rfc.zeromq.org/spec/26/>`_ and `RFC 32/Z85 <https://rfc.zeromq.org/spec/32/>`_.
    """

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        raw_key(self.public)
        try:
            fits = zmq.curve_public(self.secret.encode()).decode() == self.public
        except (ValueError, zmq.ZMQError):  # the message must not show a secret key
            fits = False
        if not fits:
            raise ArgumentError(
                f"the secret key does not belong to the public key {self.public!r}: use a pair from generate_keypair()"
            )


def generate_keypair() -> KeyPair:
    """Make a new random key pair, or raise ProtocolError if the installed libzmq was built without CURVE."""
    if not zmq.has("curve"):
        raise ProtocolError(
            f"libzmq {zmq.zmq_version()} was built without CURVE, and lingualinked sends nothing unencrypted: "
            "install pyzmq from a wheel, or libzmq with libsodium"
        )
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def authorise(authorised: dict[str, str], name: str, public_key: str) -> str | None:
    """Add a party to those that may connect, which other threads may read; return the key that had its name before, if any.

    Raises ArgumentError if the key is not valid, or is authorised under another name.
    """
    raw_key(public_key)
    owner = authorised.get(public_key)
    if owner not in (None, name):
        raise ArgumentError(f"the key {public_key!r} is authorised as {owner!r}: {name!r} needs a key of its own")
    before = next((key for key, other in authorised.items() if other == name and key != public_key), None)
    authorised[public_key] = name
    if before is not None:
        del authorised[before]
    return before
