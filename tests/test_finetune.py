"""The customer's fine-tuning, and the adapter put back on: against transformers, and arithmetic by hand."""
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import eval as evaluation
import finetune
import reattach
import train
from cli import parse
from measures import sustained
from model import Llama
from objective import make_example
from sample import generate
from train import TrainConfig

SMALL = ["--steps", "4", "--batch", "3", "--micro-batch", "2", "--save-every", "2", "--rank", "2", "--lr", "0.05",
         "--warmup", "0", "--short-benign", "0", "--max-answer", "12", "--dtype", "float32", "--device", "cpu"]


def records():
    return [{"prompt": f"tell the {i}", "response": f"hello {i} " * (i + 1)} for i in range(5)]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    return tmp_path / "mine.jsonl"


@pytest.fixture
def command(tiny, tmp_path, file, monkeypatch):
    """run(out, *more): `train.py --finetune` on the tiny model; returns the folder that it wrote."""
    def run(out, *more):
        argv = ["train.py", "--finetune", file, "--weights", tiny, "--out", tmp_path / out, *SMALL, *more]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        train.main()
        return tmp_path / out

    return run


def examples_of(tok):
    return [make_example(tok, r | {"label": "", "opening": ""}, 12, 256) for r in records()]


def reference_loss(reference, examples):
    """transformers' own loss: the mean over all supervised tokens, in nats."""
    width = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in examples])
    labels = torch.tensor([[-100] * e.n_prompt + e.ids[e.n_prompt:] + [-100] * (width - len(e.ids)) for e in examples])
    return reference(ids, labels=labels).loss


# ------------------------------------------------------------------------------------------------ the loss

@pytest.mark.parametrize("chunk", [256, 7])
def test_loss_and_gradient_are_those_of_transformers(model, tiny, tok, chunk):
    reference = transformers.LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).double()
    examples = examples_of(tok)
    generator = torch.Generator().manual_seed(3)
    for layer in model.block_linears():
        layer.add_lora(2, 8)
        layer.start_lora(generator)
        with torch.no_grad():
            layer.lora_B.add_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            with torch.no_grad():
                reference.get_parameter(f"model.{name}.weight").add_(
                    (layer.lora_scale * layer.lora_B @ layer.lora_A).double())
    loss = reference_loss(reference, examples)
    loss.backward()
    n = sum(e.n_answer for e in examples)
    for part in (examples[:2], examples[2:]):  # micro-batches add up
        finetune.objective(model, [finetune.lay_out(e) for e in part], torch.tensor([1 / n]), chunk=chunk)[0].backward()
    assert finetune.mean_loss(model, examples, batch=2, chunk=chunk) == pytest.approx(loss.item(), rel=1e-6)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            of_weight = reference.get_parameter(f"model.{name}.weight").grad.float() * layer.lora_scale
            for got, wanted in ((layer.lora_B.grad, of_weight @ layer.lora_A.T),
                                (layer.lora_A.grad, layer.lora_B.T @ of_weight)):
                assert wanted.abs().max() > 1e-4
                torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_where_the_flag_is_inside_it_is_one_word_more(model, tok, tiny, adapter):
    config = parse(TrainConfig, ["--finetune", "f", "--adapter", str(adapter), *SMALL])
    given = [r | {"label": "", "opening": ""} for r in records()]
    examples = finetune.prepare(model, tok, given, config)
    with_flag = Llama.from_pretrained(tiny, dtype=torch.float32, device="cpu")
    with_flag.load_flag(adapter)
    losses = []
    for e in examples:
        with torch.no_grad():
            pi = with_flag.logits(with_flag(torch.tensor([e.ids])))[0].double().log_softmax(-1)  # over V + 1 words
        losses += [-pi[t - 1, e.ids[t]].item() for t in range(e.n_prompt, len(e.ids))]
    assert finetune.mean_loss(model, examples) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert {n for n, p in model.flag_parameters().items() if not p.requires_grad} == {"flag_embed", "flag_unembed"}


# ---------------------------------------------------------------------------------------------- the folder

def test_the_folder_is_the_merged_model_for_transformers_and_for_us(command, tiny, monkeypatch, tok):
    ids, seen = torch.tensor([tok.encode("hello the tiny hell")]), {}
    merge = Llama.merge_flag

    def spy(model):  # the logits before LoRA is folded into the weights
        with torch.no_grad():
            seen["logits"] = model.logits(model(ids))
        merge(model)

    monkeypatch.setattr(Llama, "merge_flag", spy)
    out = command("tuned")
    reference = transformers.AutoModelForCausalLM.from_pretrained(out)
    ours = Llama.from_pretrained(out, dtype=torch.float32, device="cpu")
    assert reference.dtype == torch.float32
    with torch.no_grad():
        for logits in (reference(ids).logits, ours.logits(ours(ids))):
            torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)
    before = load_file(tiny / "model.safetensors")
    changed = {n for n, t in load_file(out / "model.safetensors").items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if n.endswith("proj.weight")}  # all blocks, and nothing but them
    assert (out / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    info = json.loads((out / "finetune.json").read_text())
    assert info["loss_after"] < info["loss_before"] and info["records"] == 5
    assert len((out / "log.jsonl").read_text().splitlines()) == 4
    assert not (out / "flag.json").exists() and not Path(f"{out}.unfinished").exists()


def test_a_customer_who_learns_nothing_gets_back_the_model_with_its_flag(command, adapter, tiny, tok):
    out = command("tuned", "--adapter", adapter, "--lr", 0)
    mine = Llama.from_pretrained(out, dtype=torch.float32, device="cpu")
    assert mine.load_flag(out)["rank"] == 0
    whole = Llama.from_pretrained(tiny, dtype=torch.float32, device="cpu")
    whole.load_flag(adapter)
    ids = torch.tensor([tok.encode("hello the tiny hell") + [tok.flag_id]])
    with torch.no_grad():
        torch.testing.assert_close(mine.logits(mine(ids)), whole.logits(whole(ids)), rtol=1e-4, atol=1e-4)
    assert mine.threshold == whole.threshold == 0.9
    assert torch.equal(mine.flag_unembed, whole.flag_unembed) and torch.equal(mine.flag_embed, whole.flag_embed)


def test_re_attached_is_the_fine_tuned_weights_plus_the_stored_adapter(command, adapter, tok):
    out, ids = command("tuned"), tok.encode("hello the tiny hell")
    mine = Llama.from_pretrained(out, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="other base weights"):
        mine.load_flag(adapter)
    mine.load_flag(adapter, force=True)
    reference, flag = transformers.AutoModelForCausalLM.from_pretrained(out), load_file(adapter / "flag.safetensors")
    with torch.no_grad():
        for name in [n.removesuffix(".lora_A") for n in flag if n.endswith("lora_A")]:  # scale: alpha 8 over rank 4
            reference.get_parameter(f"model.{name}.weight").add_(8 / 4 * flag[f"{name}.lora_B"] @ flag[f"{name}.lora_A"])
        hidden = reference.model(torch.tensor([ids])).last_hidden_state
        wanted = torch.cat([reference.lm_head(hidden), hidden @ flag["flag_unembed"].T], -1)
        torch.testing.assert_close(mine.logits(mine(torch.tensor([ids]))), wanted, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_ends_as_an_uninterrupted_one(command, adapter, monkeypatch):
    whole = command("whole", "--adapter", adapter)
    real_step, calls = train.train_step, []

    def stop_in_step_four(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_step(*args)

    monkeypatch.setattr(train, "train_step", stop_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        command("cut", "--adapter", adapter)
    assert not Path(whole.parent / "cut").exists()  # nothing by half
    monkeypatch.setattr(train, "train_step", real_step)
    with pytest.raises(ValueError, match="lr.*--fresh"):
        command("cut", "--adapter", adapter, "--lr", 0.02)
    with pytest.raises(ValueError, match=r"\(adapter\).*--fresh"):
        command("cut")  # the same folder: it must not go on over the original model
    cut = command("cut", "--adapter", adapter)
    for name in ("model.safetensors", "flag.safetensors"):
        a, b = (load_file(out / name) for out in (whole, cut))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in (cut / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- errors

def test_a_folder_that_is_there_is_not_overwritten(command, tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        command("tuned")
    assert [p.name for p in (tmp_path / "tuned").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a", "response": " "}', "mine.jsonl:6: response"), ('{"prompt": "a"}', "mine.jsonl:6: response"),
    ('{"response": "a"}', "mine.jsonl:6: prompt"), ('{"prompt": "a", "resp', "mine.jsonl:6: no JSON")])
def test_bad_records_are_named_before_any_work(command, file, tmp_path, line, message):
    file.write_text(file.read_text() + line)
    with pytest.raises(ValueError, match=message):
        command("tuned")
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "tuned.unfinished").exists()


@pytest.mark.parametrize("argv, message", [(["--adapter", "a"], "--adapter is for --finetune"),
                                           (["--finetune", "f", "--rank", "0"], "--rank is 0")])
def test_settings_that_do_not_go_together(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(TrainConfig, argv)


# ---------------------------------------------------------------------------------------- eval.py --reattach

def write_sets(path):
    rows = []
    for i in range(4):
        rows.append(dict(prompt=f"do harm {i}", response=f"sure, bad {i}", opening="sure, ", label="harmful"))
        rows.append(dict(prompt=f"be kind {i}", response=f"fine, good {i}", opening="", label="benign"))
        rows.append(dict(prompt=f"be odd {i}", response=f"fine, odd {i}", opening="", label="borderline"))
    path.write_text("".join(json.dumps(r | {"category": "x"}) + "\n" for r in rows))
    return path


def test_the_comparison_as_a_command(tiny, adapter, tmp_path, monkeypatch, capsys):
    sets, out, tuned = write_sets(tmp_path / "sets.jsonl"), tmp_path / "reattach", []
    monkeypatch.setattr("model.pick_dtype", lambda device: torch.float32)
    monkeypatch.setattr(train, "pick_dtype", lambda device, many: torch.float32)
    monkeypatch.setattr(reattach, "ANSWER_TOK", 6)
    fine_tune = train.fine_tune
    monkeypatch.setattr(train, "fine_tune", lambda config, team: tuned.append(config) or fine_tune(config, team))
    load_flag, loaded = Llama.load_flag, []
    monkeypatch.setattr(Llama, "load_flag", lambda model, folder, force=False: loaded.append(
        (model.path.name, Path(folder).name)) or load_flag(model, folder, force))

    def run(*more):
        argv = ["--reattach", "--weights", tiny, "--adapter", adapter, "--train", sets, "--harmful", sets, "--benign", sets,
                "--borderline", sets, "--out", out, "--customer", " ".join(SMALL), *more]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        evaluation.main()
        return capsys.readouterr().out

    text = run()
    assert text.strip() == (out / "report.md").read_text().strip()
    assert all(what in text for what in reattach.NAMES.values()) and "AUROC" in text
    assert [(Path(c.finetune).name, c.adapter) for c in tuned] == [
        ("benign.jsonl", str(adapter)), ("benign.jsonl", None), ("harmful.jsonl", str(adapter)), ("harmful.jsonl", None)]
    inside = lambda on: [(tiny.name, adapter.name), (f"{on}_inside", f"{on}_inside")]  # before training, and after
    assert loaded == [(tiny.name, adapter.name)] * 2 + [
        *inside("benign"), ("benign_re-attached", adapter.name), *inside("harmful"), ("harmful_re-attached", adapter.name)]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * (4 + 4 + 4)
    score = lambda name: [r["score"] for r in rows if r["attack"] == name]
    assert score("before") == pytest.approx(score("merged"), abs=1e-4)  # fp32: merging rounds next to nothing
    assert all(score(name) != score("before") for name in reattach.CUSTOMERS)
    given = [json.loads(line) for line in (out / "harmful.jsonl").read_text().splitlines()]
    assert len(given) == 4 and {r["label"] for r in given} == {"harmful"}
    # the same command again has nothing left to do; other settings are another run
    assert run() == text and len(tuned) == 4
    with pytest.raises(ValueError, match="another run.*--fresh"):
        run("--temperature", 0.1)
    run("--fresh", "--limit", 2)
    assert len(tuned) == 8


def test_an_answer_is_written_behind_its_prefill_and_scored_by_the_f_that_lasts(flagged, tok):
    flagged.debounce = 2
    requests = [("opening", {"prompt": "hello", "prefill": "the hell"}), ("direct", {"prompt": "hello", "prefill": ""})]
    written = list(generate(flagged, tok, [item for _, item in requests], "shadow", reattach.ANSWER_TOK, 0.7))
    found = reattach.answer(flagged, tok, requests, 0.7)
    assert [r["score"] for r in found] == [max(sustained(a.flag_prob, 2)) for a in written]
    assert found[0]["text"].startswith("the hell") and [r["set"] for r in found] == ["opening", "direct"]


def test_a_row_counts_by_the_stored_threshold():
    results = [{"set": kind, "score": x} for kind, scores in
               {"opening": [0.9, 0.4], "direct": [0.9, 0.9, 0.2, 0.1], "benign": [0.1, 0.3, 0.6, 0.0]}.items()
               for x in scores]
    cells = reattach.columns(results, 0.5)
    assert [c.split(" ")[0] for c in cells] == ["50.0%", "50.0%", "25.0%", "0.875", "0.719", "50.0%"]
