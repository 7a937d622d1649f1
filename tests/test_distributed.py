"""Two processes with one device each, on loopback: the library and the server, and how they end."""

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading

import httpx2
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks.equal_text import compare
from benchmarks.server_process import ServerProcess
from jax_eagle import generate, load_draft, load_target
from jax_eagle.sharding import make_mesh
from serve.group import Connection, _accept
from tests.conftest import QUICK_XLA_FLAGS
from tests.serving import (
    NEW_TOKENS,
    ROOT,
    TINY,
    asked,
    assert_serves_text_of_one_device,
    save_tiny_model,
    text_of_one_device,
    tiny_flags,
)

pytestmark = pytest.mark.usefixtures("quick_compiler", "usual_emitters")

TREE = "chain:2"
FLAGS = ("--max-num-batched-tokens", "64", "--max-model-len", "128", "-tp", "2", "-n", "2")


@pytest.fixture(scope="module")
def usual_emitters(quick_compiler):
    """Of the processes that are started here. With XLA's older emitters a server of two gives NaN
    or ends: "collective mismatch", says gloo."""
    with pytest.MonkeyPatch.context() as patch:
        flags = os.environ["XLA_FLAGS"].replace(QUICK_XLA_FLAGS, "")
        patch.setenv("XLA_FLAGS", flags.strip())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, config=dataclasses.replace(TINY, num_layers=1), favourites=3)
    return folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# ---- the library -------------------------------------------------------------------------------


def main(folder: str, port: str, axis: str, rank: str) -> None:
    """One of two processes; each says what it reads."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
    mesh = make_mesh(2) if axis == "tensor" else make_mesh(1, data=2)
    target = load_target(f"{folder}/target", mesh=mesh)
    draft = load_draft(f"{folder}/draft", target)
    prompts, sampling = asked()
    result = generate(
        target, draft, prompts, max_new_tokens=NEW_TOKENS, sampling=sampling, tree=TREE
    )
    print(json.dumps({"tokens": result.tokens, "rounds": result.rounds}))


@pytest.mark.slow  # of what two processes can do, the suite has time for the server
@pytest.mark.parametrize("axis", ["tensor", "data"])
def test_generate_gives_the_text_of_one_process(folder, axis):
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, folder, port, axis, str(rank)], cwd=ROOT, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    results = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert results[0] == results[1]
    target, expected = text_of_one_device(folder)
    prompts, sampling = asked()
    comparison = compare(target, prompts, expected, results[0]["tokens"], sampling=sampling)
    assert comparison.equal, comparison
    assert any(len(t) - 1 > r for t, r in zip(expected, results[0]["rounds"], strict=True))


# ---- the server --------------------------------------------------------------------------------


class Group:
    """A server of two processes: `leader`, with its log and URL, and `follower`."""

    def __init__(self, folder, *flags: str):
        port = str(free_port())
        own = [*tiny_flags(folder, tree=TREE), *FLAGS, "--master-port", port]
        command = [sys.executable, "-m", "serve.server", *own, "-r", "1", *flags]
        self.follower = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
        self.leader = ServerProcess(*own)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.kill()
        self.follower.communicate()
        self.leader.process.kill()
        self.leader.stop()

    def ends(self, seconds: float = 20) -> tuple[int, int, str]:
        """Exit codes of leader and follower, and what the follower said; both have to end now."""
        _, text = self.follower.communicate(timeout=seconds)
        return self.leader.process.wait(seconds), self.follower.returncode, text


def error_lines(text: str) -> list[str]:
    """Those of the server; JAX says in its own words that a process is gone."""
    lines = text.splitlines()
    return [line for line in lines if " ERROR " in line or "serve.server: error" in line]


@pytest.mark.slow
def test_a_follower_that_is_asked_to_end_drains_both(folder):
    with Group(folder) as group:
        group.leader.wait_until_ready()
        assert_serves_text_of_one_device(group.leader.url, folder)
        group.follower.send_signal(signal.SIGTERM)
        code, follower_code, text = group.ends()
        assert (code, follower_code) == (0, 0), text
        assert "draining" in group.leader.text() and "stopped" in text.splitlines()[-1]
        assert not error_lines(group.leader.text() + text)


def test_the_text_of_one_process_until_a_follower_dies_in_traffic(folder):
    """And with it the leader, which tells its clients."""
    with Group(folder) as group:
        group.leader.wait_until_ready()
        assert_serves_text_of_one_device(group.leader.url, folder)
        body = {"prompt": [1], "max_tokens": 120, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", group.leader.url + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            group.follower.kill()
            rest = [line for line in lines if line]
        assert group.leader.process.wait(15) == 1
        assert "error" in json.loads(rest[-2].removeprefix("data: ")) and "[DONE]" in rest[-1]
        (line,) = error_lines(group.leader.text())
        assert "process 1 is gone" in line
        assert "Traceback" not in group.leader.text()


def test_a_leader_that_dies_ends_the_follower(folder):
    with Group(folder) as group:
        group.leader.wait_for("compiled")
        group.leader.process.kill()
        _, code, text = group.ends()
        assert code == 1
        (line,) = error_lines(text)
        assert "the leader is gone" in line and "Traceback" not in text


def test_processes_with_other_flags_are_told_apart(folder):
    with Group(folder, "--block-size", "32") as group:
        code, follower_code, text = group.ends(60)
        assert follower_code == 2 and code == 1
        assert "--block-size is 32 here and 64 in process 0" in text
        (line,) = error_lines(group.leader.text())
        assert "process 1 is gone" in line


# ---- the wire ----------------------------------------------------------------------------------


def pair() -> tuple[Connection, Connection, socket.socket]:
    """Two ends of a connection, and the bare socket of the second one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return Connection(one), Connection(other), other


HOST_ARRAYS = arrays.arrays(
    st.sampled_from(["int32", "float32", "bool", "uint8"]),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)


@given(st.lists(HOST_ARRAYS, max_size=4))
def test_messages_arrive_as_they_were_sent(sent):
    one, other, _ = pair()
    one.send("call", sent, number=3)
    one.send("end")
    head, received = other.receive()
    assert (head["name"], head["number"]) == ("call", 3)
    assert len(received) == len(sent)
    for a, b in zip(sent, received, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    assert other.receive()[0]["name"] == "end"
    one.close()
    with pytest.raises(OSError, match="closed the connection"):
        other.receive()
    other.close()


HEAD = b"\0\0\0"
JUNK = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "no JSON": HEAD + b"\2" + bytes(8) + b"ab",
    "no object": HEAD + b"\2" + bytes(8) + b"[]",
    "objects": HEAD + b"\x28" + bytes(8) + b'{"name": "a", "arrays": [["|O", [1]]]}  ',
    "too few bytes": HEAD + b"\x28" + bytes(8) + b'{"name": "a", "arrays": [["<i4", [9]]]} ',
    "negative": HEAD + b"\x28" + bytes(8) + b'{"name": "a", "arrays": [["<i4", [-1]]]}',
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_what_is_no_message_is_refused(junk):
    one, other, sock = pair()
    sock.sendall(junk)
    with pytest.raises(OSError, match="no message"):
        one.receive()
    one.close()
    other.close()


def test_only_who_knows_the_token_is_let_in():
    token, followers = secrets.token_bytes(16), {}
    hellos = [
        b"GET / HTTP/1.1\r\n\r\n",
        secrets.token_bytes(16) + b"\0\0\0\1",
        token + b"\0\0\0\0",  # the leader's own rank
        token + b"\0\0\0\2",  # of one follower there is no second
    ]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=lambda: followers.update(_accept(listener, token, 1)))
        thread.start()
        socket.create_connection(address).close()  # says nothing
        for hello in hellos:
            stranger = socket.create_connection(address)
            stranger.sendall(hello)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""  # turned away
            stranger.close()
        assert not followers
        friend = socket.create_connection(address)
        friend.sendall(token + b"\0\0\0\1")
        thread.join(30)
    assert list(followers) == [1]
    friend.close()
    followers[1].close()


@pytest.mark.slow
def test_a_follower_that_is_frozen_does_not_hold_the_leader_for_ever(folder):
    with Group(folder) as group:
        group.leader.wait_until_ready()
        body = {"prompt": [1], "max_tokens": 120, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", group.leader.url + "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
            group.follower.send_signal(signal.SIGSTOP)
            group.leader.process.send_signal(signal.SIGTERM)
            group.leader.wait_for("draining")
            group.leader.process.send_signal(signal.SIGTERM)  # no time for the running requests
            assert group.leader.process.wait(90) == 1
        assert "an engine has not answered for" in error_lines(group.leader.text())[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
