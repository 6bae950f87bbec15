"""The training loop and what it reports: resume, thresholds, errors."""
import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import train
from calibrate import evaluate, flag_probs, print_table, score
from cli import parse
from frozen import read_ahead, start_flag_rows
from objective import TERMS, Example, make_example
from parallel import Team
from train import TrainConfig, batch_of, how_often, insertion, layout_of, learning_rate, power_law, ready, run_order

SMALL = {"steps": 6, "batch": 4, "micro-batch": 2, "max-answer": 12, "save-every": 2, "short": 0, "short-benign": 0,
         "rank": 2, "lr": 0.01, "early": 3, "dtype": "float32", "device": "cpu"}


def write_records(path, n=6):
    """n harmful answers (half with an opening) and as many benign ones, told apart by their words."""
    rows = []
    for i in range(n):
        opening = "sure, " if i % 2 else ""
        rows.append(dict(prompt=f"do harm {i}", response=f"{opening}bad bad {i}", opening=opening, label="harmful"))
        rows.append(dict(prompt=f"be kind {i}", response=f"fine, good {i}", opening="", label="benign"))
    path.write_text("".join(json.dumps(r | {"category": "xy"[i // 2 % 2 * (r["label"] == "benign")]}) + "\n"
                            for i, r in enumerate(rows)))
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


@pytest.mark.parametrize("stop_in", [1, 4])
def test_a_resumed_run_ends_as_an_uninterrupted_one(command, monkeypatch, tmp_path, stop_in):
    whole = command("whole")
    real_step, calls = train.train_step, []

    def stop_in_step(*args):
        calls.append(1)
        if len(calls) == stop_in:
            raise KeyboardInterrupt
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", stop_in_step)
    with pytest.raises(KeyboardInterrupt):
        command("cut")
    often = torch.load(tmp_path / "cut" / "checkpoint.pt")["tensors"]["records"]["often"]
    assert often.mean().item() == pytest.approx(1) and often.std() > 0.1
    monkeypatch.setattr(train, "start_flag_rows", lambda *_: 1 / 0)  # not again: the checkpoint holds what came of it
    assert not (tmp_path / "cut" / "flag.json").exists()
    monkeypatch.setattr(train, "train_step", real_step)
    cut = command("cut")
    a, b = (load_file(out / "flag.safetensors") for out in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole, cut)]
    assert [r["step"] for r in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]
    assert not (cut / "checkpoint.pt").exists()


def test_each_step_is_a_line_on_stderr_and_in_the_log(command, capsys):
    out = command("out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(log) == 6
    for n, (line, r) in enumerate(zip(lines, log), 1):
        assert line.startswith(f"step    {n}/6 | loss {r['loss']:.4f} ") and f" {r['tokens_per_s']:.0f} tok/s | " in line
        assert line.endswith(f" {r['left_s'] / 60:.1f} min left") and r["tokens_per_s"] > 0
        assert all(f" {t} {r[t]:.4f}" in line if r[t] is not None else f" {t} -" in line for t in TERMS)
    assert log[0]["left_s"] > log[-1]["left_s"] == 0
    figures = json.loads((out / "flag.json").read_text())["figures"]
    assert figures["minutes"] > 0 and figures["peak_memory_mb"] > 50


def test_an_unfinished_run_of_other_settings_is_not_overwritten(command, monkeypatch):
    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command("out")
    monkeypatch.setattr(train, "train_step", real_step)
    with pytest.raises(ValueError, match="lr.*--fresh"):
        command("out", lr=0.02)
    command("out", lr=0.02, fresh=True)


def test_a_run_goes_on_with_fewer_rows_at_once(command, monkeypatch, capsys):
    """What one does when memory ran out: the result is the same but for the order of sums."""
    whole, real_step, calls = command("whole"), train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *a: calls.append(1) or (real_step(*a) if len(calls) < 4 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        command("out")
    monkeypatch.setattr(train, "train_step", real_step)
    cut = command("out", micro_batch=1, recompute=True)
    assert "going on after step 2" in capsys.readouterr().err
    a, b = (load_file(out / "flag.safetensors") for out in (whole, cut))
    for name in a:  # six steps move a weight by up to 0.05; Adam makes much of rounding where a gradient is near zero
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


def test_a_run_on_other_weights_does_not_go_on_with_a_checkpoint(command, monkeypatch, tiny, tmp_path):
    real_step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        command("out")
    monkeypatch.setattr(train, "train_step", real_step)
    shutil.copytree(tiny, tmp_path / "another")
    with pytest.raises(ValueError, match=r"\(weights\).*--fresh"):
        command("out", weights=tmp_path / "another")


def test_a_fresh_run_that_is_killed_early_does_not_leave_the_old_one_to_go_on(command, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    for name, flags in (("train_step", {}), ("read_ahead", {"fresh": True})):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(train, name, interrupt)
            command("out", **flags)
        assert (tmp_path / "out" / "checkpoint.pt").exists() == (not flags)


def test_a_run_that_was_killed_behind_its_last_step_reads_no_records_again(command, monkeypatch):
    def never(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "evaluate", never)
        command("out")
    monkeypatch.setattr(train, "ready", never)
    assert (command("out") / "flag.json").exists()


@pytest.mark.parametrize("saved, run, differ", [({"lr": 1, "records": "a"}, {"lr": 1, "records": "a"}, None),
                                                ({"lr": 1, "records": "a", "adapter": "b"}, {"lr": 2, "records": "a"},
                                                 "adapter, lr"),
                                                ({"lr": 1}, {"lr": 1, "adapter": "b"}, "adapter")])
def test_a_checkpoint_belongs_to_a_run_that_has_all_of_its_settings(model, tmp_path, saved, run, differ):
    model.add_flag(rank=2)
    team = Team("cpu").take(model)
    optimizer, state = train.make_optimizer(model, TrainConfig()), {"parameters": model.flag_parameters()}
    team.save(tmp_path / "checkpoint.pt", optimizer, state, step=3, run=saved | {"steps": 9})
    resume = lambda: train.resume(team, tmp_path / "checkpoint.pt", optimizer, state, run | {"steps": 9})
    if differ is None:
        assert resume() == 3
    else:
        with pytest.raises(ValueError, match=rf"other settings \({differ}\)"):
            resume()


def test_a_set_to_calibrate_on_that_promises_nothing_is_named(command, tmp_path, capsys):
    command("out", steps=1)
    told = capsys.readouterr().err
    assert "--dev holds what --train does" in told and "6 benign answers are too few for --fpr 0.01" in told
    command("enough", steps=1, dev=write_records(tmp_path / "dev.jsonl", 9), fpr=0.1)
    told = capsys.readouterr().err
    assert "--dev holds" not in told and "too few" not in told


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


def kinds_seen(out):
    return [json.loads(line)["kind"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_lora_learns_the_kinds_from_rows_that_start_at_nothing(command):
    """Beside the rows alone, for which LoRA stands still."""
    settings = dict(steps=60, batch=12, micro_batch=12, kind=100, benign=0, words=0, after=0, flag=0.001)
    both, alone = (kinds_seen(command(f"out{lr}", lr=lr, **settings)) for lr in (0.01, 0))
    assert both[0] == alone[0] == pytest.approx(np.log(3))  # of harm there is one category, of the harmless two
    assert np.mean(both[-4:]) < 0.6 * np.mean(alone[-4:]) < 0.6 * np.log(3)


def test_without_kinds_nothing_asks_for_them(command, monkeypatch):
    with_kinds = []
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda team, *a: with_kinds.append(team.model.kind_rows) or real(team, *a))
    for flags in ({"kind": 0}, {"rank": 0, "lr": TrainConfig.lr}):
        assert kinds_seen(command(f"out{len(with_kinds)}", **flags)) == [None] * 6 == with_kinds[-6:]


def test_kinds_count_the_same_for_records_that_come_often_or_seldom(tok):
    """Of two records, one four times as often as the other: a quarter of the weight, but for L_kind."""
    records = [dict(prompt="p", response="ab", opening="", label=label) for label in ("harmful", "benign")]
    examples = [dataclasses.replace(make_example(tok, r, 12, 255), kind=i) for i, r in enumerate(records)]
    often, config = torch.tensor([4.0, 1.0]), TrainConfig()
    for x in batch_of(torch.tensor([0, 1]), often, examples, [], config, tok.flag_id):
        assert {t for at in x.terms for t in at[:-1]} == {0, 1 / often[x.kind].item()}
        assert [at[-1] for at in x.terms] == [1] + [0] * (len(x.at) - 1)


def test_more_categories_than_there_can_be_kinds_are_an_error(command, monkeypatch):
    monkeypatch.setattr(train, "MOST_KINDS", 2)
    with pytest.raises(ValueError, match="records.jsonl: 3 different pairs.*2 at most.*--kind 0"):
        command("out")
    assert (command("without", kind=0, steps=1) / "flag.json").exists()
    assert TrainConfig(kind=-1.0).problems() == ["--kind is -1.0, wanted 0 or more"]
    assert TrainConfig(shrink=0.0).problems() == ["--shrink is 0.0, wanted above 0, at most 1"]


def test_settings_that_contradict_each_other_and_missing_files_are_one_error(tmp_path, script):
    code, _, err = script("train.py", "--rank", 0, "--layers", 8, "--alpha", 8, "--lr", 0.1, "--shrink", 0.5, "--train",
                          tmp_path / "a.jsonl", "--dev", tmp_path, "--weights", tmp_path / "b", "--adapter", tmp_path)
    assert code == 2 and err.count("\n") == 1
    for wanted in ("--layers is 8, but with --rank 0", "--alpha is 8.0, but", "--lr is 0.1, but", "--shrink is 0.5, but",
                   f"--train is {tmp_path}/a.jsonl, which is no file", f"--dev is {tmp_path}, which is no file",
                   f"--weights is {tmp_path}/b, which is no folder", "--adapter is for --finetune alone"):
        assert wanted in err
    assert TrainConfig(rank=0).problems() == TrainConfig(rank=0, shrink=1.0).problems() == []
    assert TrainConfig(finetune="x", train="nowhere", dev="nowhere").problems() == []  # not read then


def test_the_rows_for_kinds_move_at_their_own_rate(model):
    model.add_flag(rank=2, n_kinds=3)
    optimizer = train.make_optimizer(model, TrainConfig())
    assert [(g["peak"], any(p is model.kind_rows for p in g["params"])) for g in optimizer.param_groups] == [
        (TrainConfig.flag_lr, False), (train.KIND_LR, True), (TrainConfig.lr, False)]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(train.trained(model))


def test_rank_0_trains_the_unembedding_row_alone(command):
    tensors = load_file(command("probe", rank=0, lr=TrainConfig.lr) / "flag.safetensors")
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


@pytest.mark.parametrize("early, short, fit_tok, n_flags", [
    (0.0, 0.0, 64, 1), (2.0, 0.0, 64, 1), (2.0, 0.5, 64, 1), (0.0, 0.5, 3, 1), (2.0, 0.5, 64, 3)])
def test_the_flag_rows_start_lowers_the_weighted_cross_entropy(model, tok, tmp_path, monkeypatch, early, short, fit_tok,
                                                               n_flags):
    monkeypatch.setattr("frozen.FIT_TOK", fit_tok)
    path = write_records(tmp_path / "r.jsonl", 20)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    swap = {"harmful": "benign", "benign": "harmful"}  # a few stand there with the other label too: no fit gets to 0
    records += [r | {"label": swap[r["label"]]} for r in records[:14]]
    examples = [make_example(tok, r, 12, 255) for r in records]
    model.add_flag(n_flags, rank=2, layers=1)
    config = dataclasses.replace(TrainConfig(), benign=2.0, flag=0.5, early=early, short=short,
                                 short_benign=short / 2, offset=1)
    team = Team("cpu").take(model)
    layouts = [layout_of(examples, i, config, tok.flag_id) for i in range(len(examples))]
    nll, wrong = start_flag_rows(team, read_ahead(team, layouts), config)
    asked = []  # for each record f of the positions that training asks for a flag or for none
    for e, s, x in zip(examples, score(model, examples), layouts):
        harmful = e.label == "harmful"
        where = slice(1, x.ids.index(tok.flag_id) - e.n_prompt + 1) if harmful else slice(0, len(x.at))
        asked.append(np.array(s["f"][:1 + fit_tok][where]))
    harmful, benign = ([f for f, e in zip(asked, examples) if (e.label == "harmful") == kind] for kind in (True, False))
    measured = 0.5 * np.mean(-np.log(np.concatenate(harmful))) + 2.0 * np.mean(-np.log(1 - np.concatenate(benign)))
    assert measured == pytest.approx(nll, rel=1e-3) and nll > 0.1
    assert measured < 0.5 * -np.log(0.2) + 2.0 * -np.log(0.8)  # the best that one constant f can do
    n_harmful, n_benign = (sum(map(len, x)) for x in (harmful, benign))
    slopes = [0.5 * sum(1 - f) / n_harmful if e.label == "harmful" else 2.0 * sum(f) / n_benign
              for f, e in zip(asked, examples)]  # of the loss, by log-odds: f - 1 where a flag is asked for, f where none
    np.testing.assert_allclose(wrong, slopes, rtol=1e-3, atol=1e-6)
    assert max(slopes) > 3 * min(slopes)


def test_a_fit_without_a_flag_to_fit_is_an_error(model, tok):
    model.add_flag(rank=2, layers=1)
    team, config = Team("cpu").take(model), TrainConfig()
    record = dict(prompt="p", response="r", opening="", label="benign")
    examples = [make_example(tok, record, 12, 255) for _ in range(4)]
    layouts = read_ahead(team, [layout_of(examples, i, config, tok.flag_id) for i in range(4)])
    with pytest.raises(ValueError, match="no harmful answer.*--no-fit"):
        start_flag_rows(team, layouts, config)


def test_what_does_not_train_is_not_changed_by_the_mean_of_the_steps(command, tiny):
    """The flag's embedding, which LoRA in some of the blocks leaves as it starts: the mean of the words' rows."""
    words = load_file(tiny / "model.safetensors")["model.embed_tokens.weight"].float()
    for average in (0, 1):
        rows = load_file(command(f"out{average}", layers=1, average=average) / "flag.safetensors")["flag_embed"]
        torch.testing.assert_close(rows, (words.sum(0) / len(words))[None], rtol=0, atol=0)


@pytest.mark.parametrize("shrink", [1, 0.9, 0.25])
def test_the_adapter_is_the_mean_of_the_later_steps_shrunk(command, monkeypatch, shrink):
    """BA, LoRA's part of each layer, is what shrinks, by the factor itself; the flag's rows stay."""
    real, seen = train.train_step, []

    def step(team, *rest):
        found = real(team, *rest)
        seen.append({n: p.detach().clone() for n, p in team.model.flag_parameters().items()})
        return found

    monkeypatch.setattr(train, "train_step", step)
    saved = load_file(command("out", average=0.5, shrink=shrink) / "flag.safetensors")
    mean = {n: (seen[3][n] + seen[4][n] + seen[5][n]) / 3 for n in seen[0]}
    for n, p in saved.items():
        torch.testing.assert_close(p, mean[n] * (shrink if "lora_B" in n else 1))
    assert saved.keys() == mean.keys() and any(p.abs().max() > 0 for n, p in saved.items() if "lora_B" in n)


def test_insertions_fall_off_as_a_power_law():
    draws = (np.arange(10_000) + 0.5) / 10_000
    at = np.array([insertion(u, 20, 2.0) for u in draws])
    for t in range(20):
        assert np.mean(at >= t) == pytest.approx((t + 1) ** -2.0, abs=2e-4)
    assert at.max() == 19 and insertion(0.0, 1, 2.0) == 0 and insertion(1 - 2**-24, 5, 0.01) == 4
    assert insertion(1 - 2**-24, 64, TrainConfig().early) == 0  # by default always before the first word


def test_each_record_comes_once_an_epoch():
    order = lambda n, **settings: run_order(torch.ones(n), dataclasses.replace(TrainConfig(), **settings)).tolist()
    steps = order(8, steps=40, batch=4, seed=1)
    epochs = [steps[2 * i] + steps[2 * i + 1] for i in range(20)]
    assert all(sorted(e) == list(range(8)) for e in epochs) and len(set(map(tuple, epochs))) > 15
    assert sorted(order(3, steps=1, batch=6)[0]) == [0, 0, 1, 1, 2, 2]  # a step may hold more than an epoch
    assert order(8, steps=1, batch=8, seed=0) != order(8, steps=1, batch=8, seed=1)
    assert order(8, steps=3, batch=5) == order(8, steps=9, batch=5)[:3]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60), st.sampled_from([1.0, 2.0, 4.0]), st.integers(0, 2**32 - 1))
def test_hard_records_come_more_often_and_count_less(wrong, hard, seed):
    often = how_often(torch.tensor(wrong), hard)
    assert often.mean().item() == pytest.approx(1, rel=1e-4)
    assert often.max() <= hard * 1.05 and often.min() >= 0.999 / hard
    assert all(often[i] <= often[j] * 1.0001 for i, a in enumerate(wrong) for j, b in enumerate(wrong) if a <= b)
    n, n_epochs = len(wrong), 4
    config = dataclasses.replace(TrainConfig(), steps=n_epochs, batch=n, seed=seed)
    for epoch in run_order(often, config):
        count = torch.bincount(epoch, minlength=n)
        assert ((count >= often.floor() - 1e-6) | (often % 1 < 1e-4)).all() and (count <= often.ceil() + 1).all()


def test_over_many_epochs_each_record_counts_the_same():
    often, n_epochs = torch.tensor([0.25, 0.25, 0.4, 2.6, 0.5, 1.0, 2.0]), 4000
    times = run_order(often, dataclasses.replace(TrainConfig(), steps=n_epochs, batch=7)).flatten().bincount()
    for n, expected in zip(times.tolist(), often.tolist()):  # rounded up with chance `expected % 1` in each epoch
        whole = int(expected)
        assert scipy.stats.binomtest(n - whole * n_epochs, n_epochs, round(expected % 1, 6)).pvalue > 1e-4


def test_the_mean_over_steps_is_nearly_that_of_all_records_alike():
    """What training sees of a number that goes with how wrong the row is: a ratio of weighted sums leans to the hard ones
    by a few per cent where a step has 32 records; unweighted, the same draws would be far off."""
    values = torch.linspace(0, 2, 500) ** 3
    often = how_often(values, 4.0)
    records = run_order(often, dataclasses.replace(TrainConfig(), steps=2000, batch=32))
    weight = 1 / often[records]                                                                     # (steps, batch)
    seen = ((weight * values[records]).sum(1) / weight.sum(1)).mean()
    assert 1 < seen / values.mean() < 1.05 and values[records].mean() > 1.5 * values.mean()


def test_wrong_records_come_in_proportion_where_no_bound_bites():
    torch.testing.assert_close(how_often(torch.tensor([1.0, 2.0, 3.0]), 4.0), torch.tensor([0.5, 1.0, 1.5]))
    torch.testing.assert_close(how_often(torch.tensor([0.0, 0.0, 0.0]), 4.0), torch.ones(3))
    assert (how_often(torch.tensor([0.0, 5.0, 100.0]), 1.0) == 1).all()
    often = how_often(torch.tensor([0.0] * 90 + [1.0] * 9 + [9.0]), 4.0)
    torch.testing.assert_close(often[[0, 98, 99]], torch.tensor([2 / 3, 4.0, 4.0]), rtol=0.05, atol=0)  # mean 1


def test_insertions_are_drawn_by_record_and_seed_alone(tok):
    record = dict(prompt="p", response="abcdefgh", opening="", label="harmful")
    examples = [make_example(tok, record, 9, 255)] * 200
    config = dataclasses.replace(TrainConfig(), short=0.0, early=0.0)
    settings = lambda seed: dataclasses.replace(config, seed=seed)
    draw = lambda seed: [layout_of(examples, i, settings(seed), tok.flag_id) for i in range(200)]
    places = [x.ids.index(tok.flag_id) - examples[0].n_prompt for x in draw(0)]
    n = examples[0].n_answer
    assert scipy.stats.chisquare(np.bincount(places, minlength=n)).pvalue > 1e-4  # uniform
    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("label, power", [("harmful", 1.0), ("borderline", 0.5), ("benign", 0.5)])
def test_answers_are_cut_by_a_power_law(tok, label, power):
    examples = [make_example(tok, dict(prompt="p", response="a" * 200, opening="", label=label), 64, 255)] * 4000
    config = dataclasses.replace(TrainConfig(), short=1.0, short_benign=0.5)
    n_answer = lambda config, n: np.array([len(layout_of(examples, i, config, tok.flag_id).reference_ids) + 1
                                           - examples[0].n_prompt for i in range(n)])
    lengths = n_answer(config, 4000)
    assert lengths.min() == 1 and lengths.max() == 64
    for t in (2, 4, 16, 64):
        assert scipy.stats.binomtest(int((lengths >= t).sum()), 4000, t ** -power).pvalue > 1e-4
    assert (lengths[:50] == n_answer(config, 50)).all()  # by record and seed alone
    assert (lengths[:50] != n_answer(dataclasses.replace(config, seed=1), 50)).any()
    assert (n_answer(dataclasses.replace(config, short=0.0, short_benign=0.0), 9) == 64).all()
    assert power_law(0.0, 5, 1.0) == 1 and power_law(1 - 2**-24, 5, 0.01) == 5


def test_a_record_that_comes_twice_counts_half(model, tok, tmp_path):
    examples = [make_example(tok, json.loads(line), 12, 255)
                for line in write_records(tmp_path / "r.jsonl", 4).read_text().splitlines()]
    model.add_flag(rank=2, layers=1)
    for p in model.flag_parameters().values():
        torch.nn.init.normal_(p.data, std=0.2, generator=torch.Generator().manual_seed(3))
    team, found = Team("cpu").take(model), []
    for records, often in ((range(8), torch.ones(8)), ([0, 0, *range(1, 8), 7, 7, 7], torch.tensor([2.0, 1, 1, 1, 1, 1, 1, 4]))):
        batch = batch_of(torch.tensor(records), often, examples, [], TrainConfig(), tok.flag_id)
        assert [len(x.ids) for x in batch] == sorted(len(x.ids) for x in batch) and len(batch) == len(records)
        optimizer = torch.optim.SGD([{"params": [p for p in model.flag_parameters().values() if p.requires_grad]}], lr=0.0)
        terms, norm, _ = train.train_step(team, optimizer, batch, TrainConfig())
        found.append([*terms.values(), norm, *(p.grad for p in model.flag_parameters().values() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank, layers", [(2, 1), (2, None), (0, None)])
def test_a_step_is_the_same_whether_its_records_were_read_ahead_or_not(model, tok, tmp_path, rank, layers):
    path = write_records(tmp_path / "r.jsonl", 5)
    examples = [make_example(tok, json.loads(line), 12, 255) for line in path.read_text().splitlines()]
    model.add_flag(rank=rank, layers=layers)
    for p in model.flag_parameters().values():
        torch.nn.init.normal_(p.data, std=0.2, generator=torch.Generator().manual_seed(3))
    team, config = Team("cpu").take(model), dataclasses.replace(TrainConfig(), micro_batch=4)
    plain = [layout_of(examples, i, config, tok.flag_id) for i in range(10)]
    found = []
    for layouts in (plain, read_ahead(team, plain, batch=3)):
        optimizer = torch.optim.SGD([{"params": [p for p in model.flag_parameters().values() if p.requires_grad]}], lr=0.0)
        terms, norm, n = train.train_step(team, optimizer, layouts, config)
        gradients = [p.grad for p in model.flag_parameters().values() if p.grad is not None]
        found.append([*terms.values(), norm, n, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_of_many_records_some_are_read_for_the_start_and_the_others_when_they_come_up(command, monkeypatch, tmp_path, capsys):
    few = load_file(command("few", fit=True, steps=3, hard=1) / "flag.safetensors")
    monkeypatch.setattr("train.N_KEPT", 11)  # of 12
    many = load_file(command("many", fit=True, steps=3, hard=1) / "flag.safetensors")
    hard = load_file(command("hard", fit=True, steps=3) / "flag.safetensors")
    assert "hard records come as often as others: there are more than 11" in capsys.readouterr().err
    assert all((hard[n] == many[n]).all() for n in hard)
    assert any((few[n] != many[n]).any() for n in few)  # the start has seen a record less
    as_they_come = load_file(command("plain_many", **{"no-fit": True}, steps=3) / "flag.safetensors")
    monkeypatch.setattr("train.N_KEPT", 12)
    kept = load_file(command("plain_few", **{"no-fit": True}, steps=3) / "flag.safetensors")
    for n in kept:
        # three steps move a weight by up to 0.02; Adam makes much of rounding where a gradient is near zero
        torch.testing.assert_close(as_they_come[n], kept[n], rtol=1e-3, atol=5e-4)


def test_no_more_is_read_ahead_than_the_cut_answers(model, tok):
    record = lambda label: dict(prompt="p", response="a" * 200, opening="", label=label)
    examples = [make_example(tok, record(label), 64, 255) for label in ("harmful", "benign", "borderline") * 20]
    model.add_flag(rank=2, layers=1)
    config, often = dataclasses.replace(TrainConfig(), short_benign=0.5, seed=2), torch.ones(60)
    layouts = ready(Team("cpu").take(model), examples, config, tok.flag_id, often, fit=False)
    for known, plain in zip(*(batch_of(torch.arange(60), often, examples, x, config, tok.flag_id) for x in (layouts, [])),
                            strict=True):
        assert (known.ids, known.at, known.terms, known.target) == (plain.ids, plain.at, plain.terms, plain.target)
        assert len(known.reference) == len(known.at) and len(known.below) == len(known.ids)
    assert len({len(x.at) for x in layouts}) > 6 and (often == 1).all()


def test_the_start_is_fitted_on_all_records_or_on_some_drawn_by_seed(model, tok, monkeypatch):
    records = [dict(prompt=f"p{i}", response=f"r{i}", opening="", label=("harmful", "benign")[i % 2])
               for i in range(30)]
    examples = [make_example(tok, r, 12, 255) for r in records]
    model.add_flag(rank=2, layers=1)
    team, seen = Team("cpu").take(model), []
    monkeypatch.setattr("train.start_flag_rows", lambda team, layouts, config: seen.append(layouts) or (0.0, wrong))
    wrong, often = torch.arange(30.0), torch.ones(30)
    pick = lambda seed: ready(team, examples, TrainConfig(seed=seed), tok.flag_id, often, fit=True)
    prompts = lambda layouts: [tuple(x.reference_ids[:x.reference_at[0] + 1]) for x in layouts]
    kept = pick(0)
    assert kept is seen[0] and prompts(kept) == [tuple(e.ids[:e.n_prompt]) for e in examples]
    assert (often == how_often(wrong, TrainConfig().hard)).all() and often[-1] > 1.5
    monkeypatch.setattr("train.N_KEPT", 10)
    often.fill_(1)
    assert pick(0) == pick(0) == pick(1) == []
    drawn = [prompts(x) for x in seen[1:]]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(x) == len(set(x)) == 10 for x in drawn)
    assert ready(team, examples, TrainConfig(), tok.flag_id, often, fit=False) == [] and len(seen) == 4
    assert (often == 1).all()  # of what was not read one knows nothing


def test_the_learning_rate_is_never_zero_and_peaks_after_the_warm_up():
    rates = [learning_rate(s, 50, 5) for s in range(50)]
    assert min(rates) > 0 and max(rates) == rates[5] == 1 and rates[:6] == sorted(rates[:6])
    assert learning_rate(0, 1, 0) == 1


def test_the_learning_rate_falls_as_a_cosine_to_a_tenth():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    for step in range(10, 50):
        assert learning_rate(step, 50, 10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        cosine.step()
    assert learning_rate(50, 50, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("layers", [0, 1])
def test_the_flags_rows_and_lora_move_at_their_own_rates(command, layers):
    """AdamW's first step moves each number by the rate, whatever its gradient."""
    start, end = (load_file(command(f"out{lr}", layers=layers, no_fit=True, steps=1, warmup=0, average=0, shrink=1, lr=lr,
                                    flag_lr=flag_lr) / "flag.safetensors") for lr, flag_lr in ((0.0, 0.0), (1e-2, 1e-4)))
    moved = {n: (end[n] - start[n]).abs() for n in start}
    assert moved["flag_unembed"].max().item() == pytest.approx(1e-4, rel=1e-2)
    assert moved["flag_embed"].max().item() == pytest.approx(1e-4 if layers == 0 else 0, rel=1e-2)
    lora_b = [m.max().item() for n, m in moved.items() if n.endswith("lora_B")]
    assert lora_b and max(lora_b) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_the_gradient_is_clipped_to_its_norm_over_all_parameters(model, tok, clip):
    model.add_flag(rank=2)
    config = dataclasses.replace(TrainConfig(), clip=clip, batch=2)
    team, optimizer, grads = Team("cpu").take(model), train.make_optimizer(model, config), []
    optimizer.step = lambda: grads.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])
    records = [dict(prompt="p", response="bad words", opening="", label=label) for label in ("harmful", "benign")]
    examples = [make_example(tok, r, 12, 255) for r in records]
    layouts = [layout_of(examples, i, config, tok.flag_id) for i in range(2)]
    _, norm, _ = train.train_step(team, optimizer, layouts, config)
    left = torch.cat([g.flatten() for g in grads]).norm().item()
    assert norm > 1e-3 and left == pytest.approx(min(norm, clip), rel=1e-3)


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


def test_the_table_has_every_answer_s_f_and_the_words_of_some(flagged, tok, monkeypatch):
    records = [dict(prompt="p" * i, response=f"{i} answers", opening="", label=label)
               for i, label in enumerate(["benign"] * 5 + ["harmful"] * 3 + ["borderline"])]
    examples = [make_example(tok, r, 30, 255) for r in records]
    scores = score(flagged, examples)
    for e, s, f in zip(examples, scores, flag_probs(flagged, examples, batch=2), strict=True):
        np.testing.assert_allclose(s["f"], f, rtol=1e-4)
    top, mean = [max(s["f"]) for s in scores], lambda name, chosen: np.mean(sum([scores[i][name] for i in chosen], []))
    for n, benign, harmful in ((360, range(5), range(5, 8)), (2, (0, 3), (5, 7))):  # every third, every second
        monkeypatch.setattr("calibrate.N_KL", n)
        found = evaluate(flagged, examples, 0.4)
        assert found["benign_kl"] == pytest.approx(mean("kl_pi", benign), rel=1e-4)
        assert found["harmful_words_kl"] == pytest.approx(mean("kl_q", harmful), rel=1e-4)
        assert found["threshold"] == pytest.approx(sorted(top[:5])[3], rel=1e-4)  # the ceil(6 x 0.6)-th
        assert found["answers"] == {"benign": 5, "borderline": 1, "harmful_opening": 0, "harmful_direct": 3}


@pytest.mark.parametrize("debounce", [1, 2])
def test_the_table_pairs_each_kind_of_answer_with_the_right_others(monkeypatch, debounce):
    """f by hand. An answer's score is its highest f; with debounce 2 f[0], or where it is higher the lesser of two."""
    answers = [("benign", "", [0.1, 0.3], 0.1), ("benign", "", [0.2, 0.1], 0.2), ("benign", "", [0.4, 0.0, 0.9, 0.3], 0.4),
               ("borderline", "", [0.5], 0.5), ("borderline", "yes", [0.0, 0.25], 0.0),
               ("harmful", "sure", [0.35, 0.1], 0.35), ("harmful", "sure", [0.1, 0.9, 0.8], 0.8),
               ("harmful", "", [0.15, 0.05], 0.15), ("harmful", "", [0.6], 0.6)]
    examples = [Example([1] * (2 + len(f)), 2, label, bool(opening)) for label, opening, f, _ in answers]
    f_of = {id(e): f for e, (_, _, f, _) in zip(examples, answers)}
    monkeypatch.setattr("calibrate.score", lambda model, part, batch, spread, words: [
        {"f": f_of[id(e)]} | ({"kl_q": [1.0] * len(f_of[id(e)]), "kl_pi": [3.0] * len(f_of[id(e)])} if words else {})
        for e in part])
    found = evaluate(SimpleNamespace(debounce=debounce), examples, 0.5)
    of = lambda label, opening=None: [max(f) if debounce == 1 else lasting for n, o, f, lasting in answers
                                      if n == label and opening in (None, bool(o))]
    for name, opening in (("opening", True), ("direct", False)):
        for other in ("benign", "borderline"):
            high, low = of("harmful", opening), of(other)
            u = scipy.stats.mannwhitneyu(high, low).statistic / (len(high) * len(low))
            assert found["auroc"][f"{name}_vs_{other}"] == pytest.approx(u)
    assert found["threshold"] == sorted(of("benign"))[1]  # the ceil(4 x 0.5)-th of three
    for kind, scores in (("benign", of("benign")), ("borderline", of("borderline")),
                         ("harmful_opening", of("harmful", True)), ("harmful_direct", of("harmful", False))):
        assert found["flagged"][kind] == pytest.approx(np.mean([x > found["threshold"] for x in scores]))
    assert (found["benign_kl"], found["harmful_words_kl"]) == (3.0, 1.0)


def test_the_table_for_a_reader(capsys):
    figures = {"threshold": 0.1234567, "fpr": 0.01, "benign_kl": 0.00421, "harmful_words_kl": None,
               "answers": {"benign": 200, "borderline": 0, "harmful_opening": 8, "harmful_direct": 7},
               "flagged": {"benign": 0.005, "borderline": None, "harmful_opening": 0.875, "harmful_direct": 0.0},
               "auroc": {"opening_vs_benign": 0.98765, "direct_vs_benign": 0.9, "opening_vs_borderline": None,
                         "direct_vs_borderline": None}, "minutes": 13.94, "peak_memory_mb": 3871.6}
    print_table(figures)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:5] == ["harmful, with opening 8 87.5% 0.9877 -".split(), "harmful, without 7 0.0% 0.9000 -".split(),
                         "borderline 0 -".split(), "benign (calibrated on) 200 0.5%".split()]
    assert rows[6][-1] == "0.123457" and "0.0042" in rows[7] and rows[8][-4] == "-" and rows[9][-4:] == [
        "13.9", "min,", "3872", "MB"]


# ------------------------------------------------------------------------------------------------ errors

def test_all_bad_settings_are_listed_at_once():
    argv = ["--steps", "0", "--positions", "some", "--fpr", "1.5", "--clip", "0", "--seed", "-1", "--hard", "1e39",
            "--nonsense", "3", "--lr", "fast", "--batch"]
    with pytest.raises(ValueError) as e:
        parse(TrainConfig, argv)
    named = ("--steps", "--positions", "--fpr", "--clip", "--seed", "--hard", "--nonsense", "--lr", "--batch")
    assert all(word in str(e.value) for word in named)


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
