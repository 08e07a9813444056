"""Starts jobs of several processes as forks of one process that has already imported the libraries.

    python ranks.py SCRIPT      reads one job per line from stdin, {"processes": n, "argv": […], "before": "code", …},
                                and writes a line {"codes": […], "out": "…", "errors": "…"} for each

Starting Python and importing the libraries in each process takes ten times as long as training the tests' models.
torchrun itself is tested elsewhere.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def rank_of(number: int, job: dict, port: int, logs: list[str], script: str) -> None:
    """One process of a job. It ends without the interpreter's own exit, which the parent process needs."""
    where = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"]}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in where.items()} if job["processes"] > 1 else {})
    os.environ.update(job["environment"])
    for stream, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    sys.argv = [script, *job["argv"]]
    code = 1
    try:
        exec(job["before"], {"sys": sys})  # noqa: S102
        result = importlib.import_module(script).main(job["argv"])
        exec(job["after"], {"sys": sys})  # noqa: S102
        code = result
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run(job: dict, script: str, limit: float = 120) -> dict:
    """A job's exit codes and output. A process that fails ends the others, as under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile(mode="r") as out, tempfile.NamedTemporaryFile(mode="r") as errors:
        pids = []
        for number in range(job["processes"]):
            pid = os.fork()
            if not pid:
                rank_of(number, job, port, [out.name, errors.name], script)
            pids.append(pid)
        codes, started = {}, time.monotonic()
        while len(codes) < len(pids):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
                limit = min(limit, time.monotonic() - started + 1) if codes[pid] else limit
            if time.monotonic() - started > limit:
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.02)
        return {"codes": [codes[pid] for pid in pids], "out": out.read(), "errors": errors.read()}


class Ranks:
    """Runs jobs of a script's `main` through this file in a process of its own."""

    def __init__(self, script: str):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, script]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def __call__(
        self, processes: int, *argv: object, before: str = "", after: str = "", **environment: str
    ) -> tuple[list[int], str]:
        """The processes' exit codes and stderr; their stdout is `self.out`. `before`, `after`: code around `main`."""
        job = {"processes": processes, "argv": [str(a) for a in argv], "environment": environment}
        job |= {"before": before, "after": after}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.out = answer["out"]
        return answer["codes"], answer["errors"]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


if __name__ == "__main__":
    importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), sys.argv[1])), flush=True)
