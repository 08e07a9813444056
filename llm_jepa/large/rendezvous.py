"""Where the nodes of a training meet before it begins, so that each of them hears what is wrong with any.

The first node listens at the port that the training's rendezvous will use. Each other one sends a line of JSON, its
number, its problems and the name of a file that it made in the folder for the runs, and gets back a line with the
problems of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from llm_jepa.cli import first_line


def busy_port(port: int) -> list[str]:
    """Whether the first node can listen at the rendezvous port."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        return [f"MASTER_PORT {port} cannot be used on this node ({first_line(error)}): set another MASTER_PORT"]
    return []


def read_line(connection: socket.socket, limit: float) -> Any:
    """The JSON value that the other end sends as one line. Raises OSError or ValueError."""
    connection.settimeout(max(0.01, limit))
    with connection.makefile("r", encoding="utf-8") as file:
        return json.loads(file.readline())


def gather(s: Any, problems: list[str]) -> list[str]:
    """On the first node: the problems of all nodes, which it also tells the others."""
    begin, others, connections = time.monotonic(), set(), []
    problems = [f"node 0: {p}" for p in problems]
    try:
        server = socket.create_server(("", s.master_port))
    except OSError:
        return problems + [f"node 0: {p}" for p in busy_port(s.master_port)]
    print(f"preflight.py: waiting for {s.nnodes - 1} more nodes, {s.join_limit:g} s at most", file=sys.stderr)
    with server:
        while len(others) < s.nnodes - 1 and (left := begin + s.join_limit - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                told = read_line(connection, min(10, left))
                node, shared = told["node"], (Path(s.output_dir) / told["mark"]).exists()
                problems += [f"node {node}: {p}" for p in told["problems"]]
            except (OSError, ValueError, KeyError, TypeError):  # nobody, or somebody else
                continue
            if node in others:
                problems.append(f"two nodes have NODE_RANK {node}")
            if not shared:
                problems.append(f"node {node}: its {s.output_dir} is not node 0's: use a folder that all nodes share")
            others.add(node)
            connections.append(connection)
        missing = [str(n) for n in range(1, s.nnodes) if n not in others]
        if missing:
            problems.append(
                f"node {', '.join(missing)} did not come to port {s.master_port} within {s.join_limit:g} s: run the "
                "same command there with its NODE_RANK and this MASTER_ADDR, and see that the port is open between the "
                "nodes"
            )
        for connection in connections:
            with contextlib.suppress(OSError), connection:
                connection.sendall((json.dumps(problems) + "\n").encode())
                connection.recv(1)  # the other end closes first, so that no closed connection holds the port
    return problems


def tell(s: Any, problems: list[str]) -> list[str]:
    """On another node: the problems of all nodes, or that the first node cannot be reached."""
    deadline, address = time.monotonic() + s.join_limit, f"{s.master_addr}:{s.master_port}"
    mark, why = Path(s.output_dir) / f".preflight-{s.node_rank}-{os.getpid()}.tmp", "nobody answers"
    print(f"preflight.py: looking for node 0 at {address}, {s.join_limit:g} s at most", file=sys.stderr)
    try:
        with contextlib.suppress(OSError):  # said by folder_problems
            mark.touch()
        while (left := deadline - time.monotonic()) > 0:
            try:
                with socket.create_connection((s.master_addr, s.master_port), min(10, left)) as connection:
                    message = {"node": s.node_rank, "mark": mark.name, "problems": problems}
                    connection.sendall((json.dumps(message) + "\n").encode())
                    return read_line(connection, deadline - time.monotonic() + 10)
            except ValueError:
                why = "what answers there is no preflight.py"
            except OSError as error:
                why = first_line(error)
            if deadline - time.monotonic() < 0.5:
                break  # a last try without time would say no more than that
            time.sleep(0.5)
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
    return [f"node {s.node_rank}: {p}" for p in problems] + [
        f"node {s.node_rank}: node 0 cannot be reached at {address} within {s.join_limit:g} s ({why}): run the same "
        f"command there with NODE_RANK=0, and see that MASTER_ADDR is its name and the port is open between the nodes"
    ]
