"""Processes for tests, forked from this one: importing torch takes seconds."""
import os
import socket
import sys
import traceback

import torch


def fork(work, log):
    """pid of a process that runs work(); what it prints or raises goes behind the file `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "a") as file:
            sys.stdout = sys.stderr = file
            os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)  # other threads do not live through a fork
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def together(n, work, log):
    """pids of n processes that run work() as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def as_rank(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        work()

    return [fork(lambda: as_rank(rank), log) for rank in range(n)]


def exit_code(pid):
    """Of a process that has ended: 0, 1 where it raised, or -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
