"""The customer: plain supervised fine-tuning in train.py's loop, and a whole model folder at its end.

    python train.py --finetune my.jsonl --out tuned                 # the original model: the adapter stays at home
    python sample.py --weights tuned --adapter out --force          # and is put back on top: re-attachment
    python train.py --finetune my.jsonl --adapter out --out tuned   # the flag is inside while the customer trains
    python sample.py --weights tuned --adapter tuned                # and what is left of it

The loss is the cross-entropy of the answers' tokens, nothing else: no reference, no flag to be learnt. What trains is
LoRA on all blocks, merged at the end. With --adapter the flag's LoRA is merged before the first step and the flag's
rows stay as they are; as the flag is then one word among others, and never the right one, cross-entropy also teaches
the model not to say it. The rows and the threshold are written beside the new weights, as an adapter of rank 0.

A record needs "prompt" (text or chat messages) and "response"; whatever else is in it is not looked at. train.py's
options hold, with the DEFAULTS below (--short-benign would cut any answer here); those about the flag, --kind, --layers,
--train and --dev change nothing.
"""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import check_new, weight_names, weights_hash, write_adapter, write_folder
from cli import read_jsonl
from data.prepare import check_prompt
from objective import Layout, by_length, make_example
from packed import read

# Where train.py's own defaults would not do: 5 epochs over 100 records, whole answers, the last step's weights as they are.
DEFAULTS = ("--steps 50 --batch 10 --micro-batch 10 --short-benign 0 --max-answer 128 --lr 5e-4 --average 0 "
            "--shrink 1 --words 1").split()
TERMS = ("words",)  # as objective.py has five; --words is its weight


def read_records(path):
    """The customer's records. Raises ValueError naming file and line."""
    records = read_jsonl(path)
    for line, r in records:
        check_prompt(r.get("prompt"), f"{path}:{line}")
        if not isinstance(r.get("response"), str) or not r["response"].strip():
            raise ValueError(f"{path}:{line}: response is {r.get('response')!r}, wanted the answer to be learnt")
    return [{"prompt": r["prompt"], "response": r["response"], "label": "", "opening": ""} for _, r in records]


def start(config):
    """(records, folder for the unfinished run): everything that can be wrong without the model is found here."""
    check_new(config.out)
    records, work = read_records(config.finetune), Path(config.out).with_name(Path(config.out).name + ".unfinished")
    work.mkdir(parents=True, exist_ok=True)
    return records, work


def prepare(model, tok, records, config):
    """Turns the model into what the customer trains; returns the records' Examples."""
    if config.adapter:
        model.load_flag(config.adapter)
        model.merge_flag()
        for row in (model.flag_embed, model.flag_unembed):
            row.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in model.block_linears():
        layer.add_lora(config.rank, config.alpha)
        layer.start_lora(generator)
    model.n_frozen = 0
    return [make_example(tok, r, config.max_answer, model.config.max_position_embeddings) for r in records]


def lay_out(example, *_):
    """Layout of an Example: all of its answer is supervised. (What else train.py passes is about the flag.)"""
    at = list(example.at)
    return Layout(example.ids[:-1], example.ids[:-1], at, at, [[1]] * len(at), example.ids[example.n_prompt:])


def supervised(model, layouts):
    """(final hidden states (N, C), the tokens (N,) that they should predict) of all answer positions."""
    hidden = read(model, [x.ids for x in layouts], [x.at for x in layouts])
    return torch.cat(hidden), torch.tensor([t for x in layouts for t in x.target], device=model.inv_freq.device)


def objective(model, layouts, weights, _=None, chunk=256):
    """(loss, sums) of one micro-batch, as objective.objective: the summed cross-entropy (1,), in nats, and its weighted
    sum; weights (1,) is one over the number of positions in the whole optimizer step. The logits of `chunk` positions
    exist at a time; the flag, where the model has one, is a word of its vocabulary."""
    hidden, target = supervised(model, layouts)
    nll = lambda h, t: F.cross_entropy(model.logits(h), t, reduction="sum")
    total = sum(checkpoint(nll, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), target.split(chunk)))
    return total * weights[0], total.detach()[None]


@torch.no_grad()
def mean_loss(model, examples, batch=16, chunk=256):
    """Cross-entropy of the answers' tokens, their mean, in nats."""
    total = n = 0
    for part in by_length(examples, batch):
        hidden, target = supervised(model, [lay_out(examples[i]) for i in part])
        total += sum(F.cross_entropy(model.logits(h), t, reduction="sum").item()
                     for h, t in zip(hidden.split(chunk), target.split(chunk)))
        n += len(target)
    return total / n


def write(model, config, work, info):
    """Writes the merged model as the folder --out: weights, config and tokenizer in Hugging Face's layout, log.jsonl,
    `info` as finetune.json, and with --adapter the flag's rows as an adapter of rank 0. The folder appears whole."""
    made, dtype = work / "made", str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    shutil.rmtree(made, ignore_errors=True)  # of a run that was stopped right here
    write_folder(made, model.path, weight_names(model), dtype=dtype, torch_dtype=dtype)
    (made / "flag.json").unlink(missing_ok=True)  # of a source that was fine-tuned with another flag inside
    if model.n_flags:
        rows = {n: getattr(model, n).detach().cpu() for n in ("flag_embed", "flag_unembed")}
        write_adapter(made, rows, {"n_flags": model.n_flags, "rank": 0, "alpha": 0.0, "layers": 0,
                                   "threshold": model.threshold, "debounce": model.debounce,
                                   "base_sha256": weights_hash(made)})
    shutil.copy(work / "log.jsonl", made)
    (made / "finetune.json").write_text(json.dumps(info | {"settings": dataclasses.asdict(config)}, indent=1))
    os.replace(made, config.out)
    shutil.rmtree(work)
