"""`snapcore serve`: the disks and snapshots of a pool, and raw images, over NBD."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options
from snapcore.errors import UsageError

if TYPE_CHECKING:
    from snapcore.pool import RegionEvent
    from snapcore.server.nbd import Event, Rule, Tls

_printing = threading.Lock()


@click.command()
@click.option("-p", "--pool", "place", envvar="SNAPCORE_POOL", metavar="DIR", help="The pool; none: only images.")
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDRESS",
    help="unix:PATH or tcp:HOST:PORT, several times. Default: what systemd hands over, else tcp:localhost:10809.",
)
@click.option("--export", "exports", multiple=True, metavar="PATTERN", help="Show only these, like web or 'web@*'.")
@click.option("--image", "images", multiple=True, metavar="NAME=PATH", help="Show a raw file or device, too.")
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@click.option("--tls-cert", metavar="FILE", help="Certificate (PEM); from now on clients must use TLS.")
@click.option("--tls-key", metavar="FILE", help="Its key, where the certificate's file has it not.")
@click.option("--tls-ca", metavar="FILE", help="Clients need a certificate that one of these authorities signed.")
@click.option("--tls-psk-file", metavar="FILE", help="Lines NAME:HEX of shared keys, in place of certificates.")
@click.option("--allow", multiple=True, metavar="CLIENT=PATTERN", help="Who, by certificate or PSK name, may use what.")
@click.option("--allow-read", multiple=True, metavar="CLIENT=PATTERN", help="The same, for reading only.")
@click.option("--max-connections", type=click.IntRange(1), default=256, show_default=True)
@click.option("--handshake-timeout", type=float, default=10, show_default=True, metavar="SECONDS")
@click.option("--idle-timeout", type=float, default=0, metavar="SECONDS", help="Cut off who asks nothing; 0: never.")
@click.option(
    "--request-timeout",
    type=float,
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="An I/O error for what waits so long for its medium; 0: never.",
)
@click.option("--socket-mode", default="600", show_default=True, metavar="OCTAL", help="Permissions of Unix sockets.")
@output.hydrate_option("Fetch the rest of all lazy disks at this rate. Default: as they were made.", None)
@key_options
@output.json_option
def serve(
    place: str | None,
    listen: tuple[str, ...],
    exports: tuple[str, ...],
    images: tuple[str, ...],
    read_only: bool,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    tls_psk_file: str | None,
    allow: tuple[str, ...],
    allow_read: tuple[str, ...],
    max_connections: int,
    handshake_timeout: float,
    idle_timeout: float,
    request_timeout: float,
    socket_mode: str,
    hydrate: float | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Serve a pool's disks and snapshots over NBD until SIGTERM or SIGINT comes.

    An export is called DISK, @SNAPSHOT or DISK@SNAPSHOT; with ?cow behind a snapshot, clients write to a throw-away
    disk. With --json, what happens is printed as one object a line.
    """
    from snapcore.cli import pooled
    from snapcore.cli.serving import until_told
    from snapcore.server.nbd import NbdServer, listening

    if place is None and not images:
        raise click.UsageError("give a pool (-p DIR) or images (--image NAME=PATH), or both")
    listeners = [] if listen else listening.activated(os.environ)
    with until_told() as told, contextlib.ExitStack() as open_:
        pool = None
        if place is not None:
            regions = keys.regions(_print_region if as_json else None)
            pool = open_.enter_context(pooled.opened(place, regions, read_only=read_only))
            pooled.hydrate(pool, hydrate)
        server = NbdServer(
            pool,
            listen=listen or (() if listeners else (listening.default_address(),)),
            listeners=listeners,
            exports=exports,
            rules=[*_rules(allow), *_rules(allow_read, read_only=True)],
            images=dict(_pair("--image", image) for image in images),
            tls=_tls(tls_cert, tls_key, tls_ca, tls_psk_file),
            read_only=read_only,
            max_connections=max_connections,
            handshake_timeout_s=handshake_timeout,
            idle_timeout_s=idle_timeout,
            request_timeout_s=request_timeout,
            socket_mode=_mode(socket_mode),
            on_event=_print_event if as_json else None,
        )
        with server:
            for uri in server.uris:
                _say({"event": "listening", "uri": uri}, f"listening on {uri}", as_json=as_json)
            told.wait()
            _say({"event": "stopping", "connections": server.connections}, "stopping", as_json=as_json)
    _say({"event": "stopped"}, "stopped; everything is on disk", as_json=as_json)


def _say(facts: dict[str, object], line: str, *, as_json: bool) -> None:
    with _printing:
        if as_json:
            output.print_json(facts)
        else:
            click.echo(output.text(line))
        sys.stdout.flush()


def _print_event(event: Event) -> None:
    facts: dict[str, object] = {"event": event.kind, "client": event.client}
    if event.export:
        facts |= {"export": event.export, "writable": event.writable}
    if event.kind != "connected":
        facts["reason"] = event.reason
    if event.kind == "disconnected":
        facts["requests"] = event.requests
    # Nobody reads any more: that is no reason to end a client's connection.
    with contextlib.suppress(OSError):
        _say(facts, "", as_json=True)


def _print_region(event: RegionEvent) -> None:
    facts: dict[str, object] = {"event": f"region-{event.kind}", "region": event.region.url}
    facts["snapshot"] = event.region.snapshot
    with contextlib.suppress(OSError):
        _say(facts | ({"reason": event.reason} if event.reason else {}), "", as_json=True)


def _rules(words: tuple[str, ...], *, read_only: bool = False) -> list[Rule]:
    from snapcore.server.nbd import Rule

    return [Rule(client, (pattern,), read_only) for client, pattern in (_pair("--allow", word) for word in words)]


def _pair(option: str, word: str) -> tuple[str, str]:
    first, found, second = word.partition("=")
    if not found or not first or not second:
        raise UsageError(f"{option} {word!r}: two things with a = between them are needed")
    return first, second


def _tls(certificate: str | None, key: str | None, authority: str | None, psk_file: str | None) -> Tls | None:
    from snapcore.server.nbd import Tls

    if certificate is None and psk_file is None:
        if key is not None or authority is not None:
            raise UsageError("--tls-key and --tls-ca need --tls-cert")
        return None
    return Tls(certificate, key, authority, psk_file)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"--socket-mode {text!r}: octal permissions are needed, like 660")
    return mode
