"""The training loop and what it reports: resume, thresholds, errors."""
import dataclasses
import json
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

import train
from calibrate import evaluate, score
from cli import parse
from objective import make_example
from parallel import Team
from train import TrainConfig, insertion, learning_rate, start_flag_rows, step_layouts

SMALL = {"steps": 6, "batch": 4, "micro-batch": 2, "max-answer": 12, "save-every": 2, "start-answer": 6, "rank": 2,
         "lr": 0.01, "dtype": "float32", "device": "cpu"}


def write_records(path, n=6):
    """n harmful answers (half with an opening) and as many benign ones, told apart by their words."""
    rows = []
    for i in range(n):
        opening = "sure, " if i % 2 else ""
        rows.append(dict(prompt=f"do harm {i}", response=f"{opening}bad bad {i}", opening=opening, label="harmful"))
        rows.append(dict(prompt=f"be kind {i}", response=f"fine, good {i}", opening="", label="benign"))
    path.write_text("".join(json.dumps(r | {"category": "x"}) + "\n" for r in rows))
    return path


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """run(out, **flags): train.py's main() on the tiny model."""
    records = write_records(tmp_path / "records.jsonl")

    def run(out, **flags):
        settings = SMALL | {"weights": tiny, "train": records, "dev": records, "out": tmp_path / out,
                            "tokens": tmp_path / "tokens"}
        settings |= {k.replace("_", "-"): v for k, v in flags.items()}
        argv = [a for k, v in settings.items() for a in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.main()
        return tmp_path / out

    return run


def test_a_resumed_run_ends_as_an_uninterrupted_one(command, monkeypatch, tmp_path):
    whole = command("whole")
    real_step, calls = train.train_step, []

    def stop_in_step_four(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", stop_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        command("cut")
    assert not (tmp_path / "cut" / "flag.json").exists()
    monkeypatch.setattr(train, "train_step", real_step)
    cut = command("cut")
    a, b = (load_file(out / "flag.safetensors") for out in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, cut)]
    assert [r["step"] for r in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    assert not (cut / "checkpoint.pt").exists()


def test_an_unfinished_run_of_other_settings_is_not_overwritten(command, monkeypatch):
    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command("out")
    monkeypatch.setattr(train, "train_step", real_step)
    with pytest.raises(ValueError, match="lr.*--fresh"):
        command("out", lr=0.02)
    command("out", lr=0.02, fresh=True)


def test_a_damaged_checkpoint_is_an_error(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="checkpoint.pt.*--fresh"):
        command("out")


def test_what_is_saved_is_the_adapter_alone_with_settings_and_figures(command, model):
    out = command("out")
    info = json.loads((out / "flag.json").read_text())
    assert info["settings"]["steps"] == 6 and info["threshold"] == info["figures"]["threshold"]
    assert set(info["figures"]["flagged"]) == {"benign", "borderline", "harmful_opening", "harmful_direct"}
    names = set(load_file(out / "flag.safetensors"))
    assert names == {"flag_embed", "flag_unembed"} | {n for n in names if n.endswith(("lora_A", "lora_B"))}
    assert len(names) == 2 + 2 * 7 * 2  # A and B on 7 linear layers of 2 blocks
    model.load_flag(out)
    assert model.threshold == info["threshold"]


def test_rank_0_trains_the_unembedding_row_alone(command):
    tensors = load_file(command("probe", rank=0) / "flag.safetensors")
    assert set(tensors) == {"flag_embed", "flag_unembed"} and tensors["flag_unembed"].abs().sum() > 0


@pytest.mark.parametrize("after", ["kl", "ce"])
def test_it_overfits_a_few_answers_and_leaves_the_words(command, model, tok, after):
    out = command("out", steps=80, batch=12, micro_batch=12, after_loss=after, flag=1.0)
    model.load_flag(out)
    records = [json.loads(line) for line in (out.parent / "records.jsonl").read_text().splitlines()]
    examples = [make_example(tok, r, 12, 255) for r in records]
    for e, s in zip(examples, score(model, examples)):
        assert (max(s["f"]) > 0.5) == (e.label == "harmful"), (e.label, s["f"])
    assert evaluate(model, examples, 0.2)["benign_kl"] < 0.1


@pytest.mark.parametrize("early, later", [(0.0, 1.0), (2.0, 1.0), (2.0, 5.0)])
def test_the_flag_rows_start_lowers_the_weighted_cross_entropy(model, tok, tmp_path, early, later):
    path = write_records(tmp_path / "r.jsonl", 20)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    swap = {"harmful": "benign", "benign": "harmful"}  # a few stand there with the other label too: no fit gets to 0
    records += [r | {"label": swap[r["label"]]} for r in records[:14]]
    examples = [make_example(tok, r, 12, 255) for r in records]
    model.add_flag(rank=2)
    config = dataclasses.replace(TrainConfig(), benign=2.0, flag=0.5, early=early, later=later, offset=1)
    nll = start_flag_rows(Team("cpu").take(model), examples, config)
    harmful, benign = [], []  # (weight, -log f or -log(1 - f)) of each position
    for e, s in zip(examples, score(model, examples)):
        for t, f in enumerate(s["f"]):
            if e.label != "harmful":
                benign.append((later if t else 1.0, -np.log(1 - f)))
            elif t >= 1:
                harmful.append((float(t) ** -early, -np.log(f)))
    average = lambda x: np.average([v for _, v in x], weights=[w for w, _ in x])
    measured = 0.5 * average(harmful) + 2.0 * average(benign)
    assert measured == pytest.approx(nll, rel=1e-3) and nll > 0.1
    assert measured < 0.5 * -np.log(0.2) + 2.0 * -np.log(0.8)  # the best that one constant f can do


def test_insertions_fall_off_as_a_power_law():
    draws = (np.arange(10_000) + 0.5) / 10_000
    at = np.array([insertion(u, 20, 2.0) for u in draws])
    for t in range(20):
        assert np.mean(at >= t) == pytest.approx((t + 1) ** -2.0, abs=2e-4)
    assert at.max() == 19 and insertion(0.0, 1, 2.0) == 0 and insertion(1 - 2**-24, 5, 0.01) == 4


def test_each_record_comes_once_an_epoch_and_insertions_vary(tok):
    examples = [make_example(tok, dict(prompt=f"p{i}", response="abcdefgh", opening="", label="harmful"), 9, 255)
                for i in range(8)]
    config = dataclasses.replace(TrainConfig(), batch=4, min_answer=20, max_answer=20, early=0.0)
    steps = [step_layouts(examples, s, config, tok.flag_id) for s in range(40)]
    for epoch in range(20):
        seen = [tuple(x.reference_ids) for s in steps[2 * epoch:2 * epoch + 2] for x in s]
        assert sorted(seen) == sorted(tuple(e.ids) for e in examples)
    n = examples[0].n_answer
    places = [x.ids.index(tok.flag_id) - examples[0].n_prompt for s in steps for x in s]
    assert set(places) == set(range(n))
    assert scipy.stats.chisquare(np.bincount(places, minlength=n)).pvalue > 1e-4  # uniform


def test_answers_are_cut_at_log_uniform_lengths(tok):
    record = dict(prompt="p", response="a" * 200, opening="", label="benign")
    examples = [make_example(tok, record, 64, 255)]
    config = dataclasses.replace(TrainConfig(), batch=1, min_answer=8, max_answer=64)
    lengths = [len(step_layouts(examples, s, config, tok.flag_id)[0].at) for s in range(400)]
    assert min(lengths) == 8 and max(lengths) == 64
    assert scipy.stats.kstest(np.log2(lengths), "uniform", args=(3, 3)).pvalue > 1e-3


def test_the_learning_rate_is_never_zero_and_peaks_after_the_warm_up():
    rates = [learning_rate(s, 50, 5) for s in range(50)]
    assert min(rates) > 0 and max(rates) == rates[5] == 1 and rates[:6] == sorted(rates[:6])
    assert learning_rate(0, 1, 0) == 1


# ----------------------------------------------------------------------------------------------- figures

def test_scores_are_those_of_a_plain_forward(flagged, tok):
    records = [dict(prompt="p" * i, response="answer " * i, opening="", label="benign") for i in (1, 3, 2)]
    examples = [make_example(tok, r, 30, 255) for r in records]
    for e, s in zip(examples, score(flagged, examples, batch=2, chunk=5)):
        with torch.no_grad():
            pi = flagged.logits(flagged(torch.tensor([e.ids])))[0].double().softmax(-1)[e.n_prompt - 1:-1]
            with flagged.flag_off():
                p0 = flagged.logits(flagged(torch.tensor([e.ids])))[0].double().softmax(-1)[e.n_prompt - 1:-1]
        q = pi[:, :-1] / pi[:, :-1].sum(-1, keepdim=True)
        np.testing.assert_allclose(s["f"], pi[:, -1], rtol=1e-4)
        np.testing.assert_allclose(s["kl_q"], (p0 * (p0 / q).log()).sum(-1), atol=1e-4)
        np.testing.assert_allclose(s["kl_pi"], (p0 * (p0 / pi[:, :-1]).log()).sum(-1), atol=1e-4)
        said = torch.tensor(e.ids[e.n_prompt:])[:, None]
        np.testing.assert_allclose(s["nll_q"], -q.gather(-1, said)[:, 0].log(), rtol=1e-3)
        np.testing.assert_allclose(s["nll_0"], -p0.gather(-1, said)[:, 0].log(), rtol=1e-3)
        assert s["same"] == (q.argmax(-1) == p0.argmax(-1)).tolist()


# ------------------------------------------------------------------------------------------------ errors

def test_all_bad_settings_are_listed_at_once():
    argv = ["--steps", "0", "--positions", "some", "--fpr", "1.5", "--clip", "0", "--nonsense", "3"]
    with pytest.raises(ValueError) as e:
        parse(TrainConfig, argv)
    assert "--nonsense" in str(e.value)
    with pytest.raises(ValueError) as e:
        parse(TrainConfig, argv[:-2])
    assert all(word in str(e.value) for word in ("--steps", "--positions", "--fpr", "--clip"))


@pytest.mark.parametrize("change, message", [
    (lambda r: r | {"response": "", "opening": ""}, "without a response"), (lambda r: r | {"label": "harmful"}, "no benign"),
    (lambda r: r | {"label": "evil"}, "records.jsonl:1"), (lambda r: {"prompt": "x"}, "records.jsonl:1")])
def test_bad_records_are_named_before_any_work(command, tmp_path, change, message):
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    bad = tmp_path / "bad" / "records.jsonl"
    bad.parent.mkdir()
    bad.write_text("".join(json.dumps(change(r)) + "\n" for r in rows))
    with pytest.raises(ValueError, match=message):
        command("out", train=bad)
    assert not (tmp_path / "out").exists()
