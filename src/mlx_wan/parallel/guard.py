"""Ranks that watch each other: one that dies, hangs or fails stops all others, and they say which it was.

A collective waits for ever for a rank that hangs, and where MLX notices that one is gone it cannot say which. So every
rank keeps a TCP connection to rank 0 beside MLX's own, and a thread on either end that says once a second that its
process lives and how many exchanges it has begun. Nothing but that and one line at the end goes over it.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

import mlx.core as mx
import numpy as np

from mlx_wan.errors import UserError, WanError
from mlx_wan.parallel.pulse import PATIENCE, PULSE, STEADY
from mlx_wan.parallel.team import exchange

BEAT = 1.0  # seconds between two signs of life
SLOWER = 4.0  # a rank may be behind for so many times the longest way from one exchange to the next
SILENCE = 20.0  # seconds without one after which a rank counts as hanging
CONNECT = 10.0  # seconds to reach rank 0
# Where launchers say at what address rank 0 is.
ADDRESSES = ("NCCL_HOST_IP", "MLX_JACCL_COORDINATOR", "MASTER_ADDR")


class DisagreementError(UserError):
    """What every rank finds by itself at the same time: they were given different things, or what does not fit."""


class StoppedTogether(KeyboardInterrupt):
    """Ctrl-C, after which all ranks have agreed to end at the same place."""


@dataclass
class Place:
    """How far a rank has said to be, since when it is there, and since when others are further (None: they are not)."""

    count: int = 0
    patience: float = STEADY
    longest: float = 0.0
    still: float | None = None
    behind: float | None = None

    def hear(self, line: str) -> None:
        """Takes up an "at" line; whoever has moved is not behind until somebody else is further still."""
        count, patience, longest = line.split()
        if int(count) != self.count:
            self.still = self.behind = None
        self.count, self.patience, self.longest = int(count), float(patience), float(longest)


def straggler(places: Mapping[int, Place], now: float, silence: float) -> tuple[int | None, float] | None:
    """The rank that has been behind others for longer than it may be, and for how many seconds; None if all go on.

    It may for its own patience (`silence` in steady work), and for four times the longest way that any rank has had.
    (None, seconds) if all are among equal steps and none has come further for PATIENCE and four times that way.
    """
    furthest, longest = (max(getattr(place, name) for place in places.values()) for name in ("count", "longest"))
    for rank, place in sorted(places.items(), key=lambda item: item[1].count):
        if place.count == furthest:
            place.behind = None
            continue
        place.behind = now if place.behind is None else place.behind
        patience = silence if place.patience == STEADY else place.patience
        if now - place.behind > max(patience, SLOWER * longest):
            return rank, now - place.behind
    waited = now
    for place in places.values():
        place.still = now if place.still is None else place.still
        waited = min(waited, now - place.still)
    steady = all(place.patience == STEADY for place in places.values())
    return (None, waited) if steady and waited > max(PATIENCE, SLOWER * longest) else None


def tell(world: mx.distributed.Group, text: str) -> list[str]:
    """What every rank told, in order of rank; all must call it."""
    raw = np.frombuffer(text.encode(), np.uint8)
    lengths = np.array(exchange(mx.distributed.all_gather, mx.array([raw.size]), world))
    padded = np.pad(raw, (0, int(lengths.max()) - raw.size))
    texts = np.array(exchange(mx.distributed.all_gather, mx.array(padded)[None], world))
    return [bytes(row[:size]).decode() for row, size in zip(texts, lengths, strict=True)]


def tell_or_fail(
    world: mx.distributed.Group, hosts: list[str], text: str = "", failure: str | None = None
) -> list[str]:
    """As `tell`; DisagreementError, in every rank, if one tells of a failure in place of its text."""
    told = tell(world, f"+{text}" if failure is None else f"-{failure}")
    for rank, other in enumerate(told):
        if other.startswith("-"):
            raise DisagreementError(f"rank {rank} ({hosts[rank]}): {other[1:]}")
    return [other[1:] for other in told]


def check_agreement(world: mx.distributed.Group, facts: dict[str, str], hosts: list[str]) -> None:
    """DisagreementError, in every rank, if one has other facts (name -> anything short) than rank 0, or failed."""
    told = [json.loads(text) for text in tell_or_fail(world, hosts, json.dumps(facts))]
    for rank, other in enumerate(told):
        different = [name for name in told[0] if other.get(name) != told[0][name]]
        if different or other.keys() != told[0].keys():
            name = different[0] if different else "version of mlx-wan"
            raise DisagreementError(
                f"rank {rank} ({hosts[rank]}) was given another {name} than rank 0 ({hosts[0]}): "
                f"{other.get(name)} instead of {told[0].get(name)}; all ranks need the same"
            )


class Guard:
    """A context manager around the work of one rank; all must enter it at the same time.

    When another rank dies, hangs or leaves by an exception, this process calls `on_stop`'s functions, says so on stderr
    and ends with exit code 1, wherever it is: a collective that waits cannot be interrupted otherwise. At its end it
    waits until all have come to theirs: MLX's ring sends from the process's memory, and one that ended with something
    still to be sent would cut the others off.

    Raises UserError on entering if rank 0 cannot be reached.
    """

    def __init__(self, world: mx.distributed.Group, silence: float = SILENCE):
        self._world, self._silence = world, silence
        self._rank, self._size = world.rank(), world.size()
        self._links: dict[int, socket.socket] = {}  # other rank -> connection: to rank 0, or of rank 0 to all
        self._places = {rank: Place() for rank in range(self._size)}
        self._listeners: list[threading.Thread] = []
        self._clean_up: list[Callable[[], None]] = []
        self._lock, self._ended, self._ending = threading.Lock(), threading.Event(), threading.Lock()
        self._silent = False
        self.hosts: list[str] = []

    def on_stop(self, function: Callable[[], None]) -> None:
        """Calls `function` if this process must end in the middle of its work: to remove a half-written file."""
        self._clean_up.append(function)

    def __enter__(self) -> "Guard":
        token, server = secrets.token_hex(16), None
        if self._rank == 0:
            server = socket.create_server(("", 0), backlog=self._size)
        port = server.getsockname()[1] if server else 0
        facts = {"host": socket.gethostname(), "at": _own_addresses(), "port": port, "token": token}
        told = [json.loads(text) for text in tell(self._world, json.dumps(facts))]
        self.hosts = [other["host"] for other in told]
        try:
            if server is not None:
                self._accept(server, told[0]["token"])
            else:
                self._links[0] = self._connect(told[0])
        except OSError as error:
            here = f"rank {self._rank} ({self.hosts[self._rank]})"
            raise UserError(
                f"{here}: no connection to rank 0 at {', '.join(told[0]['at'])}, port {told[0]['port']} ({error}); "
                "the machines must reach each other over TCP"
            ) from None
        for rank, link in self._links.items():
            self._listeners.append(threading.Thread(target=self._listen, args=(rank, link), daemon=True))
            self._listeners[-1].start()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = isinstance(error, KeyboardInterrupt) and not isinstance(error, StoppedTogether)
        if error is not None and not isinstance(error, WanError | KeyboardInterrupt | SystemExit):
            # Most likely MLX has lost a rank. Whoever watches that one will know; this thread ends the process then.
            time.sleep(min(2.0, self._silence))
        elif interrupted and self._rank > 0:
            # A terminal's Ctrl-C reaches rank 0 too, which has a run to leave in order.
            time.sleep(min(2.0, self._silence))
        if error is None or isinstance(error, DisagreementError | StoppedTogether):
            self._part()
        else:
            what = "was stopped (Ctrl-C)" if isinstance(error, KeyboardInterrupt) else f"stopped: {error}"
            self._say(f"stop {self._name(self._rank)} {what}")
        self._ended.set()

    def _part(self) -> None:
        """Goes when all can: rank 0 hears everybody's goodbye before it says its own, for which the others wait."""
        PULSE.patience = STEADY  # others must not begin what this rank will not
        if self._rank > 0:
            self._say("bye", last=True)  # rank 0 would not read more; a connection closed over unread bytes is reset
        for listener in self._listeners:
            listener.join()
        if self._rank == 0:
            self._say("bye")

    # --- the connections ---------------------------------------------------------------------------------------------

    def _accept(self, server: socket.socket, token: str) -> None:
        server.settimeout(CONNECT)
        with server:
            while len(self._links) < self._size - 1:
                link, _ = server.accept()
                link.settimeout(CONNECT)
                given, _, rank = link.recv(64, socket.MSG_WAITALL).decode(errors="replace").partition(" ")
                if secrets.compare_digest(given, token) and rank.strip().isdigit():
                    self._links[int(rank)] = link
                else:
                    link.close()  # somebody else's

    def _connect(self, first: dict) -> socket.socket:
        error: OSError = OSError("no address")
        for address in first["at"]:
            try:
                link = socket.create_connection((address, first["port"]), timeout=CONNECT / 2)
                link.sendall(f"{first['token']} {self._rank}".ljust(64).encode())
                return link
            except OSError as problem:
                error = problem
        raise error

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            place = f"{PULSE.count} {PULSE.patience} {PULSE.longest}"
            self._say(f"at {place}")
            if self._rank == 0:
                self._places[0].hear(place)
                if late := straggler(self._places, time.monotonic(), self._silence):
                    rank, seconds = late
                    who = "every rank" if rank is None else self._name(rank)
                    self._stop(
                        f"{who} lives but has come no further for {seconds:.0f} s: "
                        + ("MLX's connection hangs, or one of them" if rank is None else "it hangs")
                    )

    def _say(self, line: str, last: bool = False) -> None:
        with self._lock:
            links, self._silent = {} if self._silent else self._links, self._silent or last
            for link in links.values():
                try:
                    link.sendall(f"{' '.join(line.split())}\n".encode())
                except OSError:
                    continue  # whoever listens to it finds out

    def _listen(self, rank: int, link: socket.socket) -> None:
        """Reads what another rank says until it says goodbye, or until there is a reason to end."""
        link.settimeout(self._silence)
        heard = b""
        try:
            while True:
                more = link.recv(4096)
                if not more:
                    return self._stop(f"{self._name(rank)} died")
                *lines, heard = (heard + more).split(b"\n")
                for line in lines:
                    if line == b"bye":
                        return None
                    if line.startswith(b"at "):
                        self._places[rank].hear(line.decode().removeprefix("at "))
                    elif line.startswith(b"stop "):
                        return self._stop(line.decode(errors="replace").removeprefix("stop "))
        except TimeoutError:
            self._stop(
                f"{self._name(rank)} has given no sign of life for {self._silence:g} s: it hangs, or the network"
            )
        except OSError:
            self._stop(f"{self._name(rank)} died")

    def _stop(self, why: str) -> None:
        if not self._ended.is_set():
            self._say(f"stop {why}")  # rank 0 tells all; the others know it from rank 0
            self._end(why)

    def _end(self, why: str) -> None:
        if not self._ending.acquire(blocking=False):
            return  # another thread is at it
        for function in self._clean_up:
            with contextlib.suppress(OSError):
                function()
        # A new line: a progress bar, or what MLX says of lost connections, may have left one unfinished. Written past
        # sys.stderr, which the main thread may be busy with, or done with.
        with contextlib.suppress(OSError):
            os.write(2, f"\nerror: {why}; all other ranks stop, and leave nothing half-written\n".encode())
        os._exit(1)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank]})"


def _own_addresses() -> list[str]:
    """Where this machine may be reached, likeliest first; the loopback last, for ranks on the same machine."""
    found = [os.environ[name].partition(":")[0] for name in ADDRESSES if os.environ.get(name)]
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError), open(hosts) as file:
            found += [str(place).rpartition(":")[0] for place in json.load(file)[int(os.environ["MLX_RANK"])]]
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return list(dict.fromkeys([*found, "127.0.0.1"]))
