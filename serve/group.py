"""The processes of one server on several hosts: a leader, which decides, and its followers.

A program that spans the devices of several processes runs only when each of them enqueues it, and
they all have to enqueue the same programs in the same order. So the leader (process 0) sends every
call of its engine, by name and with its host arrays, to the followers, which replay it. Nothing
else has to travel: what a call computes stays on the devices.

One TCP connection a follower carries the calls. The leader's port and a token for it go through a
collective, so nobody connects by mistake; but nothing is encrypted, and who can listen in can read:
a group belongs on a network of its own. A message is a line of JSON behind its length, and the
bytes of plain arrays: nothing in it is executed. The connection is also how either side notices
that the other one is gone.
"""

import contextlib
import json
import math
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from .config import ServerConfig
from .flags import flag_of

JOIN_SECONDS = 300
"""Until all processes are there."""
LOSS_SECONDS = 5
"""A failed collective may be heard of before the end of the process that it failed for."""
_LEAVE_SECONDS = 5
_SIZES = struct.Struct("!IQ")
"""Of a message: bytes of JSON, bytes of arrays."""
_MOST = 2**30
"""Of both."""
_MEET_SECONDS, _HELLO_SECONDS = 60, 5
"""Until all followers have connected, and what somebody who has connected gets to say who it is."""
_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sI")
"""The token and a rank: the first bytes on a connection, before anything is parsed."""
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""A host that is gone without a word is noticed after some ten seconds."""


class Lost(RuntimeError):
    """A process of the group is gone; nothing can be computed any more."""


class Connection:
    """Messages of names, facts and arrays over a socket."""

    def __init__(self, sock: socket.socket):
        """Takes over the socket to a member of the group."""
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._socket, self._file = sock, sock.makefile("rb")
        self._lock = threading.Lock()
        self._patience = -1.0

    def limit(self, seconds: float | None) -> None:
        """From now on nothing waits longer than that for the other side; None: for ever."""
        self._socket.settimeout(seconds)
        self._patience = -1.0 if seconds is None else seconds

    def send(self, name: str, arrays: Iterable[Any] = (), **facts: Any) -> None:
        """Sends one message; OSError if the other side is gone. Safe from any thread."""
        contiguous = [np.asarray(x, order="C") for x in arrays]
        head = {"name": name, "arrays": [(x.dtype.str, x.shape) for x in contiguous], **facts}
        text = json.dumps(head).encode()
        size = sum(x.nbytes for x in contiguous)
        parts = [_SIZES.pack(len(text), size), text, *(x.tobytes() for x in contiguous)]
        if not self._lock.acquire(timeout=self._patience):
            raise OSError("does not read what it is sent")
        try:
            self._socket.sendall(b"".join(parts))
        finally:
            self._lock.release()

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The next message: its name and facts, and its arrays.

        Raises:
          OSError: the other side is gone, or sent what is no message.
        """
        text_size, size = _SIZES.unpack(self._read(_SIZES.size))
        if max(text_size, size) > _MOST:
            raise OSError("sent what is no message")
        text, data = self._read(text_size), self._read(size)
        try:
            head = json.loads(text)
            return head, list(_arrays(head["arrays"], data))
        except Exception as error:  # of any bytes, whatever the parsers make of them
            raise OSError(f"sent what is no message ({type(error).__name__})") from None

    def close(self) -> None:
        """Ends both directions."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise OSError("closed the connection")
        return data


def _arrays(described: list, data: bytes) -> Iterable[np.ndarray]:
    """Numbers and truth values out of their bytes."""
    begin = 0
    for name, shape in described:
        dtype, count = np.dtype(name), math.prod(shape)
        if dtype.kind not in "biuf" or min(shape, default=0) < 0:
            raise ValueError(f"an array {shape} of {name}")
        yield np.frombuffer(data, dtype, count, begin).reshape(shape)
        begin += count * dtype.itemsize


class Leader:
    """Process 0's side: calls go out to all followers."""

    def __init__(
        self, config: ServerConfig, on_word: Callable[[str], Any], on_loss: Callable[[str], Any]
    ):
        """Forms the group; waits until all processes are there.

        Args:
          on_word: called when a follower was asked to "stop" or "hurry", from another thread.
          on_loss: called with one line when a follower is gone, from another thread.

        Raises:
          OSError: the processes did not find each other.
        """
        self._on_word, self._on_loss = on_word, on_loss
        self._ending = False
        self._gone = threading.Event()
        join(config)
        token = secrets.token_bytes(_TOKEN_BYTES)
        with socket.create_server((config.master_addr, 0)) as listener:
            _broadcast(listener.getsockname()[1].to_bytes(2, "big") + token)
            self._followers = _accept(listener, token, config.nnodes - 1)
        self._threads = [
            threading.Thread(target=self._listen, args=item, daemon=True)
            for item in self._followers.items()
        ]
        for follower, thread in zip(self._followers.values(), self._threads, strict=True):
            follower.send("flags", flags=config.shared)
            thread.start()

    def send(self, name: str, arrays: Iterable[Any]) -> None:
        """Has all followers enqueue a call, after those sent before.

        Raises:
          Lost: one of them is gone.
        """
        arrays = list(arrays)
        for rank, follower in self._followers.items():
            try:
                follower.send(name, arrays)
            except OSError as error:
                self._lose(rank, error)
                raise Lost(f"process {rank} is gone") from None

    def has_lost(self, seconds: float) -> bool:
        """Whether a follower is gone, or will be found to be within some seconds."""
        return self._gone.wait(seconds)

    def close(self) -> None:
        """Ends the followers; returns when they are gone, or do not seem to go."""
        self._ending = True
        for follower in self._followers.values():
            follower.limit(_LEAVE_SECONDS)
            with contextlib.suppress(OSError):
                follower.send("end")
        for thread in self._threads:
            thread.join(_LEAVE_SECONDS)

    def _listen(self, rank: int, follower: Connection) -> None:
        try:
            while True:
                head, _ = follower.receive()
                self._on_word(str(head.get("name")))
        except OSError as error:
            self._lose(rank, error)

    def _lose(self, rank: int, error: OSError) -> None:
        if not self._ending:
            reason = error.strerror or error
            self._on_loss(f"process {rank} is gone ({reason}): its own log may say why")
            self._gone.set()  # last: who waits for it relies on the reason being told


def follow(config: ServerConfig) -> Connection:
    """A follower's side of forming the group: the connection to the leader.

    Raises:
      OSError: the processes did not find each other.
      ValueError: the leader has other flags.
    """
    join(config)
    word = _broadcast(bytes(2 + _TOKEN_BYTES))
    port, token = int.from_bytes(word[:2], "big"), word[2:]
    sock = socket.create_connection((config.master_addr, port), _MEET_SECONDS)
    sock.sendall(_HELLO.pack(token, config.node_rank))
    leader = Connection(sock)
    leader.limit(2 * _MEET_SECONDS)  # until all the others have connected
    head, _ = leader.receive()
    leader.limit(None)
    own, its = config.shared, head["flags"]
    for name in own:
        if own[name] != its.get(name):
            raise ValueError(
                f"{flag_of(name)} is {own[name]!r} here and {its.get(name)!r} in process 0: give "
                "all processes the same flags but --node-rank"
            )
    return leader


def join(config: ServerConfig) -> None:
    """Makes the devices of all processes known to each. Comes before anything else of JAX.

    Raises:
      OSError: not all processes are there in time.
    """
    address = f"{config.master_addr}:{config.master_port}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            config.nnodes,
            config.node_rank,
            initialization_timeout=JOIN_SECONDS,
            coordinator_bind_address=address,
            cluster_detection_method="deactivate",
        )
    except RuntimeError as error:  # also of XLA
        raise OSError(
            f"process {config.node_rank} of {config.nnodes} did not meet the others at {address} "
            f"({' '.join(str(error).split())})"
        ) from None


def _broadcast(word: bytes) -> bytes:
    """The leader's word, on all processes."""
    mine = np.frombuffer(word, np.uint8).astype(np.int32)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()


def _accept(listener: socket.socket, token: bytes, count: int) -> dict[int, Connection]:
    """The connections of all followers, by rank; who does not know the token is turned away."""
    followers: dict[int, Connection] = {}
    missing = set(range(1, count + 1))
    end = time.monotonic() + _MEET_SECONDS
    while missing:
        listener.settimeout(max(0.001, end - time.monotonic()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            where = listener.getsockname()
            raise OSError(
                f"{len(followers)} of {count} processes have connected to {where[0]} port "
                f"{where[1]} in {_MEET_SECONDS} seconds"
            ) from None
        rank = _rank_of(sock, token)
        if rank in missing:
            missing.remove(rank)
            followers[rank] = Connection(sock)
        else:
            sock.close()
    return followers


def _rank_of(sock: socket.socket, token: bytes) -> int | None:
    """The rank that somebody says who has connected; None if it does not know the token."""
    end = time.monotonic() + _HELLO_SECONDS
    word = b""
    with contextlib.suppress(OSError):
        while len(word) < _HELLO.size:
            sock.settimeout(max(0.001, end - time.monotonic()))
            if not (part := sock.recv(_HELLO.size - len(word))):
                return None
            word += part
        given, rank = _HELLO.unpack(word)
        return rank if secrets.compare_digest(given, token) else None
    return None
