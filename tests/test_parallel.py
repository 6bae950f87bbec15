"""Several processes, by gloo on the CPU: what one gives, data parallel and sharded; a worker killed; torchrun itself."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train
from forked import exit_code, fork, together
from parallel import Team
from test_train import SMALL, write_records

ROOT = Path(train.__file__).parent


@pytest.fixture
def argv(tiny, tmp_path):
    """argv(out, **flags): arguments of train.py for a run of three steps, of which the lower block has no LoRA."""
    records = write_records(tmp_path / "records.jsonl", 3)

    def call(out, **flags):
        settings = SMALL | {"weights": tiny, "train": records, "dev": records, "tokens": tmp_path / "tokens", "layers": 1,
                            "out": tmp_path / out, "steps": 3, "micro-batch": 1, "save-every": 1} | flags
        return [a for k, v in settings.items() for a in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]

    return call


def run(argv):
    sys.argv = ["train.py", *argv]
    train.main()


def finish(pids, tmp_path, code=0):
    codes = [exit_code(pid) for pid in pids]
    assert codes == [code] * len(pids), (tmp_path / "output").read_text()[-4000:]


def same_result(a, b, exact=False):
    """Losses, adapter and figures of two runs: equal but for the order of sums."""
    close = dict(rtol=0, atol=0) if exact else dict(rtol=1e-4, atol=1e-6)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    for name in ("loss", "benign", "words", "kind", "gradient_norm", "supervised"):
        x, y = ([r[name] for r in log] for log in logs)
        assert y == (x if exact else pytest.approx(x, rel=1e-4)), name
    tensors, others = (load_file(out / "flag.safetensors") for out in (a, b))
    assert tensors.keys() == others.keys()
    for name in tensors:
        torch.testing.assert_close(others[name], tensors[name], msg=name, **close)
    x, y = (json.loads((out / "flag.json").read_text()) for out in (a, b))
    assert y["threshold"] == pytest.approx(x["threshold"], rel=1e-4) and y["base_sha256"] == x["base_sha256"]
    assert y["figures"]["benign_kl"] == pytest.approx(x["figures"]["benign_kl"], rel=1e-3)


def test_two_processes_give_what_one_gives(argv, tmp_path):
    finish([fork(lambda: run(argv("one")), tmp_path / "output")], tmp_path)
    for name, flags in (("parallel", {}), ("sharded", {"shard": True, "recompute": True})):
        finish(together(2, lambda: run(argv(name, **flags)), tmp_path / "output"), tmp_path)
        same_result(tmp_path / "one", tmp_path / name)
        assert not (tmp_path / name / "checkpoint.pt").exists()
    said = (tmp_path / "output").read_text()
    assert said.count("step    3/3") == 3 and said.count("adapter in") == 3  # the first process alone speaks


def test_a_killed_worker_leaves_a_run_that_any_number_of_processes_goes_on_with(argv, tmp_path):
    def until(n_steps, argv):
        real, steps = train.train_step, []

        def step(*args):
            steps.append(1)
            if len(steps) > n_steps and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        train.train_step = step
        run(argv)

    log = tmp_path / "output"
    finish(together(2, lambda: run(argv("whole")), log), tmp_path)
    for out, again in (("cut", 2), ("other", 1)):
        first, second = together(2, lambda: until(2, argv(out)), log)
        assert exit_code(second) == -signal.SIGKILL
        os.kill(first, signal.SIGKILL)  # as torchrun ends the others
        exit_code(first)
        assert (tmp_path / out / "checkpoint.pt").exists() and not (tmp_path / out / "flag.json").exists()
        finish(together(2, lambda: run(argv(out)), log) if again == 2 else [fork(lambda: run(argv(out)), log)], tmp_path)
        same_result(tmp_path / "whole", tmp_path / out, exact=again == 2)
    assert log.read_text().count("going on after step 2 of 3") == 2


def test_each_process_reads_and_holds_a_part_of_the_weights(tiny, model, tmp_path):
    class Counted:
        """A file of weights from which no whole tensor may be read."""

        def __init__(self, file):
            self.file, self.keys = real(file), real(file).keys

        def get_slice(self, name):
            slice_ = self.file.get_slice(name)

            class Rows:
                get_shape = slice_.get_shape

                def __getitem__(self, rows):
                    n_read.append(slice_[rows].numel())
                    return slice_[rows]

            return Rows()

    real, n_read = checkpoint.open_weights, []
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}

    def work():
        checkpoint.open_weights = Counted
        team = Team("cpu", shard=True)
        team.load(tiny, torch.float32, dict(rank=3, seed=4, n_kinds=5))
        found = dict(team.model.named_parameters())
        held = sum(p.to_local().numel() for n, p in found.items() if n in wanted)
        assert held == sum(n_read) and abs(held / sum(p.numel() for p in wanted.values()) - 1 / 2) < 0.01, (held, n_read)
        n_blocks = sum(p.to_local().numel() for p in team.model.layers.parameters())
        assert n_blocks < 0.6 * sum(p.numel() for p in team.model.layers.parameters())
        for name, p in wanted.items():
            assert torch.equal(found[name].full_tensor(), p), name
        assert found["kind_rows"].full_tensor().tolist() == [[0.0] * whole_model.config.hidden_size] * 5
        whole_model.add_flag(rank=3, seed=4)
        for name, p in whole_model.flag_parameters().items():
            torch.testing.assert_close(found[name].full_tensor(), p)
        team.leave()

    whole_model = model
    finish(together(2, work, tmp_path / "output"), tmp_path)


def test_what_several_processes_cannot_do_is_said(argv, tmp_path):
    with pytest.raises(ValueError, match="--shard.*torchrun"):
        Team("cpu", shard=True)
    finish(together(2, lambda: run(argv("odd", batch=3)), tmp_path / "output"), tmp_path, code=1)
    assert "--batch is 3, wanted a multiple of 2" in (tmp_path / "output").read_text()


def test_torchrun_itself_with_frozen_bf16_beside_trainable_fp32(argv, tmp_path):
    flags = dict(steps=1, dtype="bfloat16")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py",
                           *argv("out", shard=True, **flags)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter in") == 1 and done.stderr.count("step    1/1") == 1
    finish([fork(lambda: run(argv("one", **flags)), tmp_path / "output")], tmp_path)
    a, b = (json.loads((tmp_path / out / "log.jsonl").read_text()) for out in ("one", "out"))
    assert b["loss"] == pytest.approx(a["loss"], rel=0.02) and b["supervised"] == a["supervised"]  # other rounding
    assert load_file(tmp_path / "one" / "flag.safetensors").keys() == load_file(tmp_path / "out" / "flag.safetensors").keys()
