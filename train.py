"""Trains the red flag into a Llama: rows for the flag, LoRA, an objective of five terms, a calibrated threshold.

    python train.py --init llama                 # SmolLM2-135M-Instruct on data/mini, half an hour on 2 slow CPU cores
    python train.py --init llama --weights DIR --train my.jsonl --dev my_dev.jsonl --out my_flag
    python train.py --finetune my.jsonl --out tuned     # no flag: plain fine-tuning in the same loop, see finetune.py

The objective stands in objective.py, what is read once and the flag row's start in frozen.py. An interrupted run goes on
where it stopped when the same command, without --fresh, is given again.
Writes to --out: flag.safetensors, flag.json (settings, threshold, figures), log.jsonl (a line a step).
"""
import dataclasses
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import finetune
import objective
from calibrate import evaluate, print_table
from checkpoint import pick_dtype, whole
from cli import first_process, option, parse, run, say
from data.store import open_store, sha256
from frozen import read_ahead, start_flag_rows
from measures import conformal_threshold
from model import Llama, LlamaConfig
from parallel import Team
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
# Records whose hidden states are kept, at most, in memory: 10,000 take 0.9 GB of the default model. Of more records as
# many are read for the flag row's start, and then each step reads its own: most come up once.
N_KEPT = 20_000
# Rows for L_kind: their peak learning rate, not tuned, and how many there may be: categories are kinds, not names.
KIND_LR, MOST_KINDS = 1e-3, 1000


@dataclass(frozen=True)
class TrainConfig:
    init: str = option("llama", "what to start from; llama: a Llama-family chat model")
    weights: str | None = option(None, "its folder (default: SmolLM2-135M-Instruct, fetched once)")
    train: str = option(str(HERE / "data/mini/train.jsonl"), "records to train on")
    dev: str = option(str(HERE / "data/mini/dev.jsonl"), "records for the threshold and the table; never trained on")
    skip_bad: bool = option(False, "report and leave out records that cannot be read, in place of ending with an error")
    tokens: str = option(str(HERE / "data/tokens"), "folder for tokenised records, which are used again")
    out: str = option("out", "folder to write")
    fresh: bool = option(False, "begin anew, though --out holds an unfinished run")
    finetune: str | None = option(None, "instead of all this, fine-tune the words on these records (finetune.py)")
    adapter: str | None = option(None, "with --finetune: a flag adapter that is merged into the model first")
    # how long
    steps: int = option(600, "optimizer steps")
    batch: int = option(32, "answers a step")
    micro_batch: int = option(32, "answers in the model at once, in each process; fewer: less memory, other rounding")
    max_answer: int = option(64, "answers are cut to at most so many tokens")
    short: float = option(1.0, "in training a harmful one is cut to t tokens or more with chance t^-short; 0: not cut")
    short_benign: float = option(0.35, "the same for benign and borderline answers")
    hard: float = option(4.0, "the worse the fitted row judges a record, the more often it comes up, and counts the less "
                              "for it: about so many times the average at most, no less than one part in so many; 1, "
                              "--no-fit, or over 20,000 records: all alike")
    # the objective, see objective.py
    benign: float = option(20.0, "weight of L_benign")
    flag: float = option(1.0, "weight of L_flag")
    after: float = option(0.05, "weight of L_after")
    words: float = option(30.0, "weight of L_words")
    kind: float = option(3.0, "weight of L_kind: LoRA also learns to tell the records' labels and categories apart, which "
                              "finds more and moves the words more; 0, or --rank 0: it does not")
    early: float = option(50.0, "where the flag is inserted into a harmful answer: before its token t or a later one with "
                                "chance (t + 1)^-early, t counted from the offset; 50: always at 0, 3: seven times in "
                                "eight, 0: anywhere up to the cut")
    positions: str = option("all", "flag targets: all from the offset to the insertion, or one, at the insertion")
    offset: int = option(0, "first answer position that may be asked for the flag (k): evidence seen before it; of an "
                            "answer of k tokens or fewer the last")
    after_loss: str = option("kl", "kl to the original model behind the flag, or ce on the answer's own words")
    # the adapter
    rank: int = option(16, "of LoRA; 0 trains the unembedding row alone, a linear probe")
    layers: int = option(12, "blocks that carry it, the upper ones; those below run once for both models; 0, or more "
                            "than there are: all")
    alpha: float = option(32.0, "LoRA is scaled by alpha / rank")
    lr: float = option(2e-3, "peak learning rate of LoRA")
    flag_lr: float = option(3e-5, "peak learning rate of the flag's rows, which start fitted")
    warmup: int = option(5, "steps until the peak")
    clip: float = option(1.0, "gradient norm at most")
    average: float = option(0.5, "the adapter kept is the mean over this share of the steps, the last ones; 0: the last")
    shrink: float = option(0.9, "what LoRA adds to each layer is multiplied by this in the end, before the threshold is "
                                "chosen: the words' KL falls by about its square, little of what is found is lost; 1: not")
    fit: bool = option(True, "start the flag's row as a probe fitted to the frozen model; --no-fit: at zero")
    # the rest
    recompute: bool = option(False, "keep what goes into each block alone, compute the rest again: less memory, slower")
    debounce: int = option(2, "positions in a row with f above the threshold that raise the flag, or an answer's first: "
                              "for the threshold, and stored with the adapter")
    fpr: float = option(0.01, "benign answers that may be flagged within --max-answer tokens, for the threshold")
    save_every: int = option(10, "steps between checkpoints")
    seed: int = option(0, "of data order, cuts, insertions and LoRA")
    dtype: str = option("auto", "float32 or bfloat16, of the frozen weights; auto: what the machine multiplies faster")
    device: str = option("auto", "auto, cuda, mps or cpu")
    shard: bool = option(False, "under torchrun: each process holds a part of the model, for those that do not fit")

    def problems(self):
        choices = {"init": ("llama",), "positions": ("all", "one"), "after_loss": ("kl", "ce"),
                   "dtype": ("auto", "float32", "bfloat16")}
        problems = [f"--{k.replace('_', '-')} is {getattr(self, k)!r}, wanted {' or '.join(v)}"
                    for k, v in choices.items() if getattr(self, k) not in v]
        least = {"steps": 1, "batch": 1, "micro_batch": 1, "debounce": 1, "max_answer": 1, "save_every": 1, "rank": 0,
                 "layers": 0, "offset": 0, "warmup": 0, "benign": 0, "flag": 0, "after": 0, "words": 0, "kind": 0,
                 "early": 0, "short": 0, "short_benign": 0, "lr": 0, "flag_lr": 0}
        problems += [f"--{k.replace('_', '-')} is {getattr(self, k)}, wanted {v} or more"
                     for k, v in least.items() if not getattr(self, k) >= v]
        problems += [f"--{k} is {getattr(self, k)}, wanted above 0" for k in ("clip", "alpha")
                     if not getattr(self, k) > 0]
        if self.finetune and not self.rank:
            problems.append("--rank is 0, wanted 1 or more with --finetune: LoRA is what trains")
        elif not self.rank:
            problems += [f"--{k} is {getattr(self, k)}, but with --rank 0 there is no LoRA for it to set"
                         for k in ("layers", "alpha", "lr") if getattr(self, k) != getattr(TrainConfig, k)]
            if self.shrink not in (1, TrainConfig.shrink):
                problems.append(f"--shrink is {self.shrink}, but with --rank 0 there is no LoRA to shrink")
        problems += [f"--{k} is {getattr(self, k)}, which is no file" for k in ("train", "dev")
                     if not self.finetune and not Path(getattr(self, k)).is_file()]
        problems += [f"--{k} is {getattr(self, k)}, which is no folder" for k in ("weights", "adapter")
                     if getattr(self, k) and not Path(getattr(self, k)).is_dir()]
        if self.adapter and not self.finetune:
            problems.append("--adapter is for --finetune alone; the adapter of this training goes to --out")
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed is {self.seed}, wanted from 0 to 2^32 - 1")
        if not 0 <= self.average <= 1:
            problems.append(f"--average is {self.average}, wanted from 0 to 1")
        if not 0 < self.shrink <= 1:
            problems.append(f"--shrink is {self.shrink}, wanted above 0, at most 1")
        if not 1 <= self.hard <= 100:
            problems.append(f"--hard is {self.hard}, wanted from 1 to 100")
        if not 0 < self.fpr < 1:
            problems.append(f"--fpr is {self.fpr}, wanted between 0 and 1")
        if not self.offset < self.max_answer:
            problems.append(f"--offset is {self.offset}, wanted below --max-answer, {self.max_answer}")
        return problems


# ------------------------------------------------------------------------------------------------ records

def layout_of(examples, i, config, flag_id):
    """Record i as it is laid out, once for the whole run: the answer cut (--short, --short-benign), and the flag inserted
    into a harmful one, at places drawn by seed and record. What tells harm from harmless is mostly said early, and a run
    that reads short answers has time for more of them. A harmless one must raise no flag anywhere, for an answer's score
    is the highest f that lasts: so more is left of these."""
    example = examples[i] if asks_kind(config) else dataclasses.replace(examples[i], kind=None)
    cut, draw = torch.rand(2, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + i)).tolist()
    harmful = example.label == "harmful"
    power = config.short if harmful else config.short_benign
    if power:  # but a harmful one never so short that the offset leaves no place for the flag
        example = example.cut(max(power_law(cut, example.n_answer, power), config.offset + 1 if harmful else 1))
    first = min(config.offset, example.n_answer - 1)
    insert_at = first + insertion(draw, example.n_answer - first, config.early)
    return goal(config).lay_out(example, insert_at, flag_id, config.offset, config.positions)


def power_law(draw, n, power):
    """One of 1 .. n, of a uniform draw from [0, 1): P(t or more) = t^-power, what lies beyond n counting as n."""
    return min(int(math.exp(min(-math.log1p(-draw) / power, 40.0))), n)  # 40: no overflow, far behind any n


def insertion(draw, n, early):
    """Where of n positions the flag goes, of a uniform draw: P(t or later) = (t + 1)^-early.

    A prompt says most of what there is to know. With uniform insertions most flag targets lie deep in the answer,
    where a small model's ramblings say little, and an answer's score becomes noise.
    """
    return power_law(draw, n, early) - 1 if early else int(draw * n)


def asks_kind(config):
    """Whether L_kind is there at all: a probe (rank 0) has nothing that could learn from it."""
    return config.kind > 0 and config.rank > 0


# ------------------------------------------------------------------------------------------------ the loop

def goal(config):
    """What is trained for: the red flag (objective.py) or a customer's answers (finetune.py). Each has TERMS, the names
    of its losses, lay_out and objective."""
    return finetune if config.finetune else objective


def learning_rate(step, steps, warmup):
    """Share of the peak rate at step 0..steps-1: up over `warmup` steps, then a cosine down to a tenth; never 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def how_often(wrong, hard):
    """How often each record comes up, 1 on average, of how wrong the fitted row is about each (frozen.py): in proportion
    to it, but for the least and the most (--hard). So fewer steps go into what the start knows already (importance
    sampling, arXiv 1803.00942). As a record that comes up twice as often counts half (`batch_of`), the objective is nearly
    the same. Not quite, because a step's weights are divided by their own sum (`train_step`), which leans a little
    towards the hard ones, but is far less noisy for L_words than a fixed divisor."""
    often = wrong / wrong.mean().clamp(min=1e-9)
    for _ in range(20):  # bounds move the mean, and the mean the bounds: the least ends somewhat above 1 / hard
        often = often.clamp(1 / hard, hard)
        often = often / often.mean()
    return often


def run_order(often, config):
    """Which record stands at each place of each step, (steps, batch). An epoch has as many places as there are records.
    Record i has often[i] of them, rounded up or down by chance (systematic sampling: records lie on a line, often[i] long
    each, and marks stand at a distance of 1, the first at random); all are in a random order."""
    n, n_places = len(often), config.steps * config.batch
    ends, epochs = often.double().cumsum(0) * (n / often.double().sum()), []                        # (n,)
    for epoch in range(math.ceil(n_places / n)):
        generator = torch.Generator().manual_seed(config.seed * 1000 + epoch)
        marks = torch.arange(n) + torch.rand(1, generator=generator).double()
        records = torch.searchsorted(ends, marks, right=True).clamp(max=n - 1)
        epochs.append(records[torch.randperm(n, generator=generator)])
    return torch.cat(epochs)[:n_places].clone().view(config.steps, config.batch)


def batch_of(records, often, examples, layouts, config, flag_id):
    """A step's Layouts, the shortest first: packed.py attends rows of like length side by side."""
    batch = [(layouts[i] if layouts else layout_of(examples, i, config, flag_id)).weighed(1 / often[i].item())
             for i in records.tolist()]
    return sorted(batch, key=lambda x: len(x.ids))


def train_step(team, optimizer, layouts, config):
    """One optimizer step; returns each term's mean in nats (None where it has no position), the gradient norm, and how
    many positions were supervised."""
    names, count = goal(config).TERMS, torch.tensor([t for x in layouts for t in x.terms]).sum(0)
    settings = torch.tensor([getattr(config, t) for t in names])
    weights = torch.where(count > 0, settings / count, 0).to(team.device)  # over the whole step, not a micro-batch
    mine, n = team.share(layouts), config.micro_batch
    optimizer.zero_grad()
    sums = team.gradients(lambda model, part: goal(config).objective(model, part, weights, config.after_loss),
                          [mine[i:i + n] for i in range(0, len(mine), n)])
    clipped = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(torch.nn.utils.clip_grad_norm_(clipped, config.clip))
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm.item()}: lower --lr or --flag-lr")
    optimizer.step()
    means, n_supervised = (sums.cpu() / count).tolist(), sum(len(x.terms) for x in layouts)
    return {t: means[i] if count[i] else None for i, t in enumerate(names)}, norm.item(), n_supervised


def trained(model):
    """Name -> parameter: the adapter's, and the rows for L_kind that it is helped by."""
    return model.flag_parameters() | ({} if model.kind_rows is None else {"kind_rows": model.kind_rows})


def make_optimizer(model, config):
    parameters = {n: p for n, p in trained(model).items() if p.requires_grad}
    groups = [{"params": [p for n, p in parameters.items() if n.startswith(prefix)], "peak": peak}
              for prefix, peak in (("flag_", config.flag_lr), ("kind_", KIND_LR), ("layers.", config.lr))]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), weight_decay=0.0)


def at_once(config, team, most):
    """Answers that are read at once where no gradient is needed: `most`, or --micro-batch if that is fewer; on a GPU, which
    waits for each launch, twice --micro-batch, for without a gradient they take a fraction of the memory."""
    return 2 * config.micro_batch if team.device.type == "cuda" else min(most, config.micro_batch)


def ready(team, examples, config, flag_id, often, fit):
    """All records as Layouts that have been read ahead; [] of more than N_KEPT, which are read when they come up. With
    `fit` the flag's rows get their start from them, or from N_KEPT of them, drawn by seed; and `often` is filled in, how
    often each is to come up, if all were read."""
    few = len(examples) <= N_KEPT
    if not (few or fit):
        return []
    chosen = range(len(examples))
    if not few:
        generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(examples), generator=generator)[:N_KEPT].sort().values.tolist()
    layouts = read_ahead(team, [layout_of(examples, i, config, flag_id) for i in chosen], at_once(config, team, 32))
    if fit:
        began = time.perf_counter()
        nll, wrong = start_flag_rows(team, layouts, config)
        say(f"flag row fitted on {len(layouts):,} answers: loss {nll:.3f} nats, {time.perf_counter() - began:.0f} s")
        if few:
            often.copy_(how_often(wrong, config.hard))
        elif config.hard > 1:
            say(f"hard records come as often as others: there are more than {N_KEPT:,}")
    return layouts if few else []


def train(team, examples, config, flag_id, out):
    """Runs the steps that are left, a log line each, a checkpoint every few. At a rate high enough to learn in so few
    steps f swings up and down as a whole; the mean of the last steps' weights does not. In the end LoRA is shrunk a
    little: the words' KL falls by about the square, the order of f hardly changes (--shrink; between original and trained
    weights, as in arXiv 2109.01903)."""
    parameters, optimizer = trained(team.model), make_optimizer(team.model, config)
    adapter = team.model.flag_parameters()
    mean = {n: torch.zeros_like(p) for n, p in adapter.items() if p.requires_grad}  # of the last steps' weights
    averaged = range(min(config.steps - 1, round(config.steps * (1 - config.average))), config.steps)
    often = torch.ones(len(examples))  # how often each record comes up
    run, state = run_id(config, examples), {"parameters": parameters, "mean": mean}
    if len(examples) <= N_KEPT:
        state["records"] = {"often": often}
    save = lambda step: team.save(out / "checkpoint.pt", optimizer, state, step=step, run=run)
    if config.fresh and team.first:
        (out / "checkpoint.pt").unlink(missing_ok=True)  # at once: killed before its first step, this run is to come again
    begun = None if config.fresh else resume(team, out / "checkpoint.pt", optimizer, state, run)
    first = begun or 0
    done = first == config.steps  # killed behind the last step
    fit = config.fit and begun is None
    layouts = [] if config.finetune or done else ready(team, examples, config, flag_id, often, fit)
    order = team.agree(run_order(often, config).to(team.device)).cpu()
    if begun is None:
        save(0)  # marks --out as begun
    if team.first:
        cut_log(out, first)
    began = time.perf_counter()
    for step in range(first, config.steps):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(step, config.steps, config.warmup)
        batch = batch_of(order[step], often, examples, layouts, config, flag_id)
        terms, norm, n_supervised = train_step(team, optimizer, batch, config)
        if step in averaged:
            for n, total in mean.items():
                total += parameters[n].detach() / len(averaged)
        seconds = time.perf_counter() - start
        log_step(out, config, {
            "step": step + 1, "loss": sum(getattr(config, t) * (v or 0) for t, v in terms.items()), **terms,
            "supervised": n_supervised, "lr": optimizer.param_groups[-1]["lr"], "gradient_norm": norm,
            "tokens_per_s": sum(len(x.ids) for x in batch) / seconds,
            "left_s": (time.perf_counter() - began) / (step + 1 - first) * (config.steps - step - 1)})
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save(step + 1)
    with torch.no_grad():
        for n, total in mean.items():
            parameters[n].copy_(total * config.shrink if n.endswith("lora_B") else total)


def log_step(out, config, r):
    terms = " ".join(f"{t} {r[t]:.4f}" if r[t] is not None else f"{t} -" for t in goal(config).TERMS)
    say(f"step {r['step']:4}/{config.steps} | loss {r['loss']:.4f} {terms} | sup {r['supervised']:,} tok | "
        f"lr {r['lr']:.1e} | gnorm {r['gradient_norm']:.2f} | {r['tokens_per_s']:.0f} tok/s | "
        f"{r['left_s'] / 60:.1f} min left")
    if first_process():
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(r) + "\n")


def cut_log(out, n_steps):
    """Keeps the log's first n_steps lines: what an interrupted run wrote behind its checkpoint comes again."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)[:n_steps] if path.exists() else []
    (out / "log.jsonl.tmp").write_text("".join(lines))
    os.replace(out / "log.jsonl.tmp", path)


def run_id(config, examples=None):
    """What two runs must share for one to go on with the other's checkpoint: the records, and all settings that change
    more than rounding (--weights by its name alone, for a hash would read the whole model)."""
    settings = {k: v for k, v in dataclasses.asdict(config).items()
                if k not in ("out", "fresh", "save_every", "train", "dev", "tokens", "shard", "fpr", "debounce",
                             "device", "micro_batch", "recompute", "finetune", "adapter")
                and not (k == "hard" and config.finetune)}  # about the flag: changes nothing there
    adapter = {"adapter": sha256(Path(config.adapter) / "flag.safetensors")} if config.adapter else {}
    return settings | adapter | {"records": sha256(config.finetune) if config.finetune else examples.digest}


def resume(team, path, optimizer, tensors, run):
    """Goes on with an unfinished run that has the same run_id; returns its step, None where there is none."""
    state = team.read(path)
    if state is None:
        return None
    saved = state.get("run", {})
    differ = sorted(k for k in run.keys() | saved.keys() if run.get(k) != saved.get(k))
    if differ:
        raise ValueError(f"{path} is an unfinished run with other settings ({', '.join(differ)}): give the same "
                         "command to go on with it, --fresh to begin anew, or another --out")
    team.restore(state, optimizer, tensors)
    say(f"going on after step {state['step']} of {run['steps']}")
    return state["step"]


# --------------------------------------------------------------------------------------------------- main

def load(config, team):
    """Gives the team its model; returns the tokenizer and both sets of Examples. Everything that can be wrong is found
    before any work."""
    weights, dtype, tok = source(config, team.device)
    context = LlamaConfig.from_pretrained(weights).max_position_embeddings - 1  # one place is the flag's
    sets = [open_store(path, config.tokens, weights, tok, config.max_answer, context, config.skip_bad)
            for path in (config.train, config.dev)]
    for path, examples in zip((config.train, config.dev), sets):
        missing = {"harmful", "benign"} - examples.labels()
        if missing:
            raise ValueError(f"{path}: no {' or '.join(sorted(missing))} records")
        if examples.skipped:
            say(f"{path}: {len(examples):,} records, {examples.skipped:,} bad ones left out")
    examples, dev = sets
    if asks_kind(config) and len(examples.kinds) > MOST_KINDS:
        raise ValueError(f"{config.train}: {len(examples.kinds):,} different pairs of label and category, wanted "
                         f"{MOST_KINDS:,} at most: give broader categories, or --kind 0")
    if examples.digest == dev.digest:
        say("--dev holds what --train does: its threshold and table promise nothing for other records")
    n_benign = dev.count("benign")
    if conformal_threshold([0.0] * n_benign, config.fpr) == 1.0:
        say(f"{config.dev}: {n_benign} benign answers are too few for --fpr {config.fpr:g}: the threshold will be 1, and "
            "nothing flagged")
    adapter = dict(n_flags=1, rank=config.rank, alpha=config.alpha, seed=config.seed, layers=config.layers or None,
                   n_kinds=len(examples.kinds) if asks_kind(config) else 0)
    team.load(weights, dtype, adapter)
    team.model.recompute = config.recompute
    return tok, examples, dev


def source(config, device):
    """What the run starts from: folder, dtype, tokenizer."""
    if config.weights is None:
        from data.smollm2 import ensure
    weights = Path(config.weights or ensure())
    dtype = pick_dtype(device, many=True) if config.dtype == "auto" else getattr(torch, config.dtype)
    return weights, dtype, Tokenizer.from_pretrained(weights)


def fine_tune(config, team):
    """The customer's run: a whole model folder in --out. Returns the mean loss on its records before and after."""
    if team.size > 1:
        raise ValueError("--finetune is for one process: start it without torchrun")
    records, work = finetune.start(config)
    weights, dtype, tok = source(config, team.device)
    model = Llama.from_pretrained(weights, dtype, team.device)
    model.recompute = config.recompute
    examples = finetune.prepare(model, tok, records, config)
    before = finetune.mean_loss(model, examples)
    train(team.take(model), examples, config, tok.flag_id, work)
    model.merge_flag()
    info = {"records": len(records), "loss_before": before, "loss_after": finetune.mean_loss(model, examples)}
    finetune.write(model, config, work, info | {"run": run_id(config)})
    return info


def main():
    began = time.perf_counter()
    customer = any(a.split("=")[0] == "--finetune" for a in sys.argv)
    config = parse(TrainConfig, finetune.DEFAULTS * customer + sys.argv[1:], __doc__)
    team, out = Team(config.device, config.shard), Path(config.out)
    if config.batch % team.size:
        raise ValueError(f"--batch is {config.batch}, wanted a multiple of {team.size}, the number of processes")
    if config.finetune:
        info = fine_tune(config, team)
        return print(f"model in {config.out}; cross-entropy of its {info['records']} records {info['loss_before']:.3f} "
                     f"nats a token before, {info['loss_after']:.3f} after")
    tok, examples, dev = load(config, team)
    out.mkdir(parents=True, exist_ok=True)
    say(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()))
    train(team, examples, config, tok.flag_id, out)
    team.model.debounce = config.debounce
    figures = evaluate(team.model, dev, config.fpr, team.spread, at_once(config, team, 16))
    figures |= {"minutes": (time.perf_counter() - began) / 60, "peak_memory_mb": peak_memory_mb(team.device)}
    team.model.threshold = figures["threshold"]
    team.model.save_flag(out, settings=dataclasses.asdict(config), figures=figures)
    if team.first:
        (out / "checkpoint.pt").unlink()  # last: a run that is killed before goes on from it
        print_table(figures)
        print(f"\nadapter in {out}; try: python sample.py --adapter {out} --prompt \"...\"")
    team.leave()


def peak_memory_mb(device):
    """The most memory that this process has held, in MB (on a GPU, what its tensors took there)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


if __name__ == "__main__":
    run(main)
