"""kill -9, at any moment: the same command given again goes on from a whole checkpoint, to the same adapter bit for bit.

    KILLS=50 python -m pytest tests/test_kill.py        # 5 by default
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from checkpoint import read_adapter
from forked import exit_code, fork
from test_train import SMALL, write_records

KILLS = int(os.environ.get("KILLS", 5))


class Moments:
    """Counts a run's calls that train or change files, and kills it in the n-th, counted from 0 (None: never): when a
    share of the file is written, or else before the call begins."""

    def __init__(self, n, share):
        self.n, self.share, self.count = n, share, 0
        for owner, name in ((torch, "save"), (checkpoint, "save_file"), (Path, "write_text"), (os, "replace"),
                            (Path, "unlink"), (train, "start_flag_rows"), (train, "train_step"), (train, "log_step"),
                            (train, "evaluate")):
            self.watch(owner, name, name in ("save", "save_file", "write_text"))

    def watch(self, owner, name, writes):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            self.count += 1
            if self.count - 1 == self.n:
                if writes:
                    real(*args, **kwargs)
                    path = next(a for a in args if isinstance(a, Path))
                    os.truncate(path, int(self.share * path.stat().st_size))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, call)


@pytest.fixture
def start(tiny, tmp_path):
    """start(out, n=None, share=0): train.py's main() in a process of its own, which counts its moments; its pid."""
    records = write_records(tmp_path / "records.jsonl", 2)
    flags = SMALL | {"weights": tiny, "train": records, "dev": records, "tokens": tmp_path / "tokens", "steps": 3,
                     "layers": 1, "batch": 2, "save-every": 1, "max-answer": 6}

    def call(out, n=None, share=0.0):
        def work():
            sys.argv = ["train.py", "--out", str(tmp_path / out), *(str(a) for k, v in flags.items() for a in (f"--{k}", v))]
            moments = Moments(n, share)
            train.main()
            with open(tmp_path / f"{out}.moments", "w") as file:
                file.write(str(moments.count))

        return fork(work, tmp_path / "output")

    return call


def ended(pid, tmp_path):
    """0, or -9 where it was killed."""
    code = exit_code(pid)
    assert code in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
    return code


def result(out):
    """What a finished run leaves, but for times: tensors, flag.json, log."""
    assert sorted(p.name for p in out.iterdir()) == ["flag.json", "flag.safetensors", "log.jsonl"]
    info = json.loads((out / "flag.json").read_text())
    for name in ("minutes", "peak_memory_mb"):
        del info["figures"][name]
    del info["settings"]["out"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return load_file(out / "flag.safetensors"), info, [r["loss"] for r in log]


def test_a_killed_run_resumes_to_the_same_result(start, tmp_path):
    assert ended(start("first"), tmp_path) == 0  # writes the tokenised records too, which the others find
    began = time.monotonic()
    assert ended(start("whole"), tmp_path) == 0
    seconds, n_moments = time.monotonic() - began, int((tmp_path / "whole.moments").read_text())
    tensors, *rest = result(tmp_path / "whole")
    draw, n_killed = random.Random(KILLS), 0
    for k in range(KILLS):
        out = f"run{k}"
        if k % 2:  # at a random time
            pid = start(out)
            time.sleep(draw.random() * seconds)
            os.kill(pid, signal.SIGKILL)
        else:      # at one of the moments that matter, all of them in turn
            pid = start(out, k // 2 * max(1, 2 * n_moments // KILLS) % n_moments, draw.random())
        n_killed += ended(pid, tmp_path) != 0
        if not (tmp_path / out / "flag.json").exists() or (tmp_path / out / "checkpoint.pt").exists():
            assert ended(start(out), tmp_path) == 0
        again, *others = result(tmp_path / out)
        assert again.keys() == tensors.keys() and all(torch.equal(again[n], tensors[n]) for n in tensors), k
        assert others == rest, k
    assert n_killed >= KILLS // 2


def test_an_adapter_is_the_old_one_none_or_the_new_one(flagged, tiny, tmp_path, monkeypatch):
    """In place of a kill an exception, as nothing catches it; flag.json says in `which` whose it is."""
    def tensors():
        return {n: p.detach() for n, p in flagged.flag_parameters().items()}

    seen = set()
    for n in range(6):
        folder = tmp_path / str(n)
        flagged.save_flag(folder, which="old")
        old = load_file(folder / "flag.safetensors")
        with torch.no_grad():
            flagged.flag_unembed += 1
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            left = [n]

            def interrupted(real):
                def call(*args, **kwargs):
                    if left[0] == 0:
                        raise KeyboardInterrupt
                    left[0] -= 1
                    return real(*args, **kwargs)
                return call

            for owner, name in ((checkpoint, "save_file"), (Path, "write_text"), (Path, "unlink"), (os, "replace")):
                m.setattr(owner, name, interrupted(getattr(owner, name)))
            flagged.save_flag(folder, which="new")
            assert n == 5
            raise KeyboardInterrupt
        try:
            found, info = read_adapter(folder, tiny)
        except ValueError as e:
            assert "flag.json is missing" in str(e)
            seen.add("none")
            continue
        seen.add(info["which"])
        wanted = old if info["which"] == "old" else tensors()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), n
    assert seen == {"old", "none", "new"}
