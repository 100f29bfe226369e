"""``lingualinked keys``: makes keys, and says who may use this machine's daemon and which daemons are known.

Knows typer and the key files; prints fingerprints, which people compare, and public keys, which they copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lingualinked.errors import ArgumentError
from lingualinked.public_key import fingerprint, is_public_key

app = typer.Typer(
    name="keys",
    help="Make keys, authorise clients of this machine's daemon, and trust daemons of other machines, as with ssh.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_ANY_KEY = {"ignore_unknown_options": True}  # a public key may begin with a hyphen

PublicKey = Annotated[str, typer.Argument(help="A public key (40 characters, in single quotes), or a .pub file.")]


@app.command()
def new(name: Annotated[str, typer.Argument(help="Name of the key.")] = "default") -> None:
    """Make a key pair, by which daemons will know you."""
    from lingualinked.transport.keys.key_files import client_name, key_path, make_key  # imports zmq

    keys = make_key(name)
    typer.echo(f"Made the key {name!r}: {fingerprint(keys.public)}")
    typer.echo(f"Its secret half is in {key_path(name)} and never leaves this machine.")
    typer.echo("To authorise it, run this on each device that you want to use:")
    typer.echo(f"  lingualinked keys authorize '{keys.public}' --name {client_name(name)}")


@app.command(context_settings=_ANY_KEY)
def authorize(
    key: PublicKey,
    name: Annotated[str | None, typer.Option(help="Name of the client in lists and logs.")] = None,
) -> None:
    """Let the holder of a key use this machine's daemon, also one that is running."""
    from lingualinked.transport.keys.key_lists import authorize_client  # imports zmq

    public_key, named = _read_public_key(key)
    name = authorize_client(public_key, name or named)
    typer.echo(f"Authorised {name!r}: {fingerprint(public_key)}")


@app.command(context_settings=_ANY_KEY)
def trust(
    address: Annotated[str, typer.Argument(help="Where the daemon listens: tcp://HOST:PORT.")],
    key: PublicKey,
) -> None:
    """Record the public key of another machine's daemon, so that cluster files need not state it."""
    from lingualinked.transport.keys.key_lists import trust_daemon  # imports zmq

    public_key, _ = _read_public_key(key)
    typer.echo(f"The daemon at {trust_daemon(address, public_key)} is known by {fingerprint(public_key)}")


@app.command("list")
def list_keys() -> None:
    """Show your own keys, the authorised clients, and the daemons that you know."""
    from lingualinked.transport.keys.key_files import own_keys  # imports zmq
    from lingualinked.transport.keys.key_lists import AuthorizedClients, known_hosts  # imports zmq

    clients, hosts = AuthorizedClients().names, known_hosts().values()
    for title, keys in (
        ("Your keys", own_keys()),
        ("Clients that may use this machine's daemon", {name: key for key, name in clients.items()}),
        ("Daemons that you know", {host.address: host.public_key for host in hosts}),
    ):
        typer.echo(f"{title}:{'' if keys else ' none'}")
        width = max(map(len, keys), default=0)
        for name, key in keys.items():  # no table: a key that is wrapped or cut can't be copied
            typer.echo(f"  {name:{width}}  {fingerprint(key)}  {key}")


@app.command(context_settings=_ANY_KEY)
def revoke(
    who: Annotated[
        str, typer.Argument(help="Name or public key of a client, or address of a daemon (tcp://HOST:PORT).")
    ],
) -> None:
    """End what a client has on this machine's daemon and let it in no more; or forget a daemon."""
    from lingualinked.transport.keys.key_lists import forget_daemon, revoke_client  # imports zmq

    if who.startswith("tcp://"):
        typer.echo(f"The daemon at {who} is no longer known by {fingerprint(forget_daemon(who))}")
        return
    typer.echo(f"Revoked {who!r}: {fingerprint(revoke_client(who))}")


def _read_public_key(text: str) -> tuple[str, str | None]:
    """Return a key and the name beside it, from a file that `new` wrote or from the text itself."""
    if not is_public_key(text) and text.endswith(".pub"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"no public key can be read from {text!r}: {error}") from error
    words = text.split()
    return (words[0] if words else text), (words[1] if len(words) > 1 else None)
