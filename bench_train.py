"""python bench.py train: how fast the default job trains, beside the same objective written plainly on transformers and
peft, and beside what the machine's matrix products allow."""
import ctypes
import dataclasses
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import SHAPES, Machine, build, device_name, seconds, times_faster
from cli import option, say
from data.prepare import read_records
from frozen import read_ahead
from objective import TERMS, Example, make_example, pad
from packed import Packed
from parallel import Team
from train import TrainConfig, batch_of, make_optimizer, run_order, train_step

AHEAD = "nanoflag, records read ahead"  # as train.py does: what is frozen has been read before the loop
COMPARED = TERMS[:-1]  # without L_kind: a product with one row a kind, once an answer
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class BenchTrainConfig:
    rounds: int = option(8, "optimizer steps that each takes, on the same answers, in turn")
    batch: int = option(TrainConfig.batch, "answers a step")
    micro_batch: int = option(TrainConfig.micro_batch, "answers that go through the model at once")
    layers: int = option(TrainConfig.layers, "blocks with LoRA, the upper ones; 0: all")
    rank: int = option(TrainConfig.rank, "of LoRA")
    recompute: bool = option(False, "train.py --recompute")
    length: int = option(0, "tokens of each row, half of them the prompt, drawn at random; 0: the bundled records")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")
    shape: str | None = option(None, "random weights instead: " + ", ".join(SHAPES))
    dtype: str = option("bfloat16", "bfloat16 or float32")
    json: bool = option(False, "the figures as one JSON object on stdout, in place of the table")

    def problems(self):
        problems = [f"--{name.replace('_', '-')} is {getattr(self, name)}, wanted {least} or more" for name, least in
                    (("rounds", 1), ("batch", 1), ("micro_batch", 1), ("layers", 0), ("rank", 1), ("length", 0))
                    if getattr(self, name) < least]
        if 0 < self.length < 16:
            problems.append(f"--length is {self.length}, wanted 16 or more, or 0")
        if self.shape is not None and self.shape not in SHAPES:
            problems.append(f"--shape is {self.shape!r}, wanted one of {', '.join(SHAPES)}")
        if self.dtype not in ("bfloat16", "float32"):
            problems.append(f"--dtype is {self.dtype!r}, wanted bfloat16 or float32")
        return problems


class Peer:
    """The objective as one would write it first: transformers' model with peft's LoRA, the original model by
    disable_adapter, padded batches, logits of every position, and autograd for all of it."""

    def __init__(self, reference, job, flag_id):
        import peft
        n = reference.config.num_hidden_layers
        reference.resize_token_embeddings(flag_id + 1, mean_resizing=False)
        embedding = reference.get_input_embeddings().weight.data
        embedding[flag_id] = embedding[:flag_id].float().mean(0)
        lora = peft.LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules=LORA,
                               layers_to_transform=list(range(n - job.layers, n)) if job.layers else None)
        self.model, self.job, self.flag_id = peft.get_peft_model(reference, lora), job, flag_id
        self.flag_row = torch.zeros(reference.config.hidden_size, device=reference.device, requires_grad=True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad] + [self.flag_row]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, weight_decay=0.0)

    def logits(self, rows):
        llama, device = self.model.get_base_model(), self.flag_row.device
        ids, mask = pad(rows, device), pad([[1] * len(r) for r in rows], device)
        hidden = llama.model(ids, attention_mask=mask, use_cache=False).last_hidden_state           # (B, T, C)
        words = llama.lm_head(hidden)[..., :self.flag_id].float()                                   # (B, T, V)
        return torch.cat([words, (hidden.float() @ self.flag_row)[..., None]], -1)                  # (B, T, V + 1)

    def step(self, layouts):
        """One optimizer step; the mean of each term, in nats."""
        count = torch.tensor([t[:-1] for x in layouts for t in x.terms]).sum(0).clamp(min=1)
        weights = (torch.tensor([getattr(self.job, t) for t in COMPARED]) / count).to(self.flag_row.device)
        self.optimizer.zero_grad()
        sums = 0
        for i in range(0, len(layouts), self.job.micro_batch):
            part = self.terms(layouts[i:i + self.job.micro_batch])
            (part * weights).sum().backward()
            sums = sums + part.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.job.clip)
        self.optimizer.step()
        return (sums.cpu() / count).tolist()

    def terms(self, layouts):
        with torch.no_grad(), self.model.disable_adapter():
            all_p0 = self.logits([x.reference_ids for x in layouts])[..., :self.flag_id].log_softmax(-1)
        all_pi = self.logits([x.ids for x in layouts]).log_softmax(-1)                              # (B, T, V + 1)
        sums = 0
        for x, log_pi, log_p0 in zip(layouts, all_pi, all_p0):
            log_pi, log_p0 = log_pi[x.at], log_p0[x.reference_at]                                   # (n, V + 1), (n, V)
            log_f, log_not_f = log_pi[:, -1], torch.log1p(-log_pi[:, -1].exp())
            kl_pi = F.kl_div(log_pi[:, :-1], log_p0, log_target=True, reduction="none").sum(-1)
            losses = torch.stack([kl_pi, -log_f, kl_pi, kl_pi + log_not_f], -1)
            sums = sums + (losses * torch.tensor(x.terms, device=losses.device)[:, :-1]).sum(0)
        return sums


# ------------------------------------------------------------------------------------------------- what a step needs

def step_flops(model, layouts, micro_batch, ahead=False):
    """Floating-point operations that one step cannot do without: no padding, what rows begin with alike once, blocks
    without LoRA once for both models and without a backward pass; frozen weights take no gradient, but pass it on.
    With `ahead` the original model and those blocks have been read before."""
    c, total = model.config, 0
    block = sum(m.weight.numel() for m in model.layers[0].modules() if hasattr(m, "lora_on"))
    lora = sum(p.numel() for n, p in model.flag_parameters().items() if "lora_" in n)
    upper, pair = c.num_hidden_layers - model.n_frozen, 4 * c.num_attention_heads * c.head_dim

    def forward(rows):
        """Of one block that reads these rows: its products with weights, attention, LoRA's products in all blocks."""
        packed = Packed(rows, "cpu")
        at = packed.at[0, :1 + max(map(max, packed.paths))]
        return 2 * block * len(at), pair * int((at + 1).sum()), 2 * lora * len(at)

    for i in range(0, len(layouts), micro_batch):
        part = layouts[i:i + micro_batch]
        rows, references = [x.ids for x in part], [x.reference_ids for x in part]
        linear, attention, adapters = forward(rows)
        total += upper * (2 * linear + 3 * attention) + 3 * adapters  # there and back
        if not ahead:
            total += upper * sum(forward(references)[:2]) + model.n_frozen * sum(forward(rows + references)[:2])
        total += 3 * 2 * sum(len(x.at) for x in part) * model.head_weight.numel()  # both models, and back
    return total


def memory_mb():
    """(now, the most since `forget_peak`), in MB: of this process on Linux, of its tensors on a GPU; None elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) / 1e3, int(found["VmHWM"]) / 1e3


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # what the other one has freed is not there for this one to use
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(step, layouts, weights_mb):
    """What a step takes at its peak: the weights, and all that comes on top, in MB; None where nobody knows."""
    forget_peak()
    before = memory_mb()
    step(layouts)
    return before and memory_mb()[1] - before[0] + weights_mb


# --------------------------------------------------------------------------------------------------------- the table

def examples_of(config, job, tok, context):
    if not config.length:
        return [make_example(tok, r, job.max_answer, context) for r in read_records(job.train)]
    rng, half = random.Random(0), config.length // 2
    row = lambda: [rng.randrange(1000) for _ in range(config.length)]
    return [Example(row(), half, ("harmful", "benign")[i % 2]) for i in range(config.batch * (config.rounds + 1))]


def train_bench(config):
    """The figures: name -> seconds a round, tokens a round, memory; the limit; the terms of both in the first step."""
    job = dataclasses.replace(TrainConfig(), batch=config.batch, micro_batch=config.micro_batch, layers=config.layers,
                              rank=config.rank)
    if config.length:
        job = dataclasses.replace(job, max_answer=config.length, short=0.0, short_benign=0.0)
    model, peer, tok = build(config)
    model.add_flag(rank=job.rank, alpha=job.alpha, seed=0, layers=job.layers or None)
    model.recompute = config.recompute
    team, optimizer = Team(model.inv_freq.device).take(model), make_optimizer(model, job)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    ahead = lambda layouts: [train_step(team, optimizer, layouts, job)[0][t] for t in COMPARED]
    fresh = lambda layouts: [dataclasses.replace(x, below=None, reference=None) for x in layouts]
    known = {"nanoflag": lambda layouts: ahead(fresh(layouts)), AHEAD: ahead}
    if peer is not None:
        known["transformers + peft"] = Peer(peer, job, model.config.vocab_size).step
    examples = examples_of(config, job, tok, model.config.max_position_embeddings - 1)
    often, job = torch.ones(len(examples)), dataclasses.replace(job, steps=config.rounds + 1)
    steps = [batch_of(records, often, examples, [], job, model.config.vocab_size) for records in run_order(often, job)]
    steps = [read_ahead(team, layouts) for layouts in steps]
    weights_mb = sum(p.numel() * p.element_size() for n, p in model.named_parameters()) / 1e6
    found = {"device": device_name(), "threads": torch.get_num_threads(), "dtype": config.dtype,
             "model": config.shape or config.weights or "SmolLM2-135M-Instruct", "batch": job.batch,
             "tokens": [sum(len(x.ids) for x in layouts) for layouts in steps[1:]],
             "terms": {name: step(steps[0]) for name, step in known.items()},  # and so all are warm
             "memory_mb": {name: peak_mb(step, steps[0], weights_mb) for name, step in known.items()},
             "seconds": {name: [] for name in known}, "flops": [], "needed": {name: [] for name in known}}
    machine = Machine(model)
    for r, layouts in enumerate(steps[1:], 1):
        for name, step in known.items():
            found["seconds"][name].append(seconds(step, layouts))
        machine.measure()
        for name in known:
            found["needed"][name].append(step_flops(model, layouts, job.micro_batch, ahead=name == AHEAD))
        say(f"round {r} of {config.rounds}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in found["seconds"].items()))
    found["flops"] = machine.flops
    return found


def train_table(found):
    limit = statistics.median(found["flops"])
    yield (f"{found['model']}, {found['dtype']}, {found['device']}; {found['batch']} answers a step, medians of "
           f"{len(found['flops'])} steps (and the range)\n")
    yield ("| by | tokens/s | times transformers + peft | of the arithmetic limit | memory, MB |\n"
           "| --- | --- | --- | --- | --- |")
    peer = found["seconds"].get("transformers + peft")
    for name, times in found["seconds"].items():
        rates = sorted(n / t for n, t in zip(found["tokens"], times))
        shares = [needed / t / limit for needed, t in zip(found["needed"][name], times)]
        memory = found["memory_mb"][name]
        yield (f"| {name} | {statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f}) | "
               f"{times_faster(peer, times) if peer else '-'} | {statistics.median(shares):.2f} | "
               f"{'-' if memory is None else format(memory, '.0f')} |")
    needed = ", ".join(f"{statistics.median(n) / 1e9:.0f}" for n in found["needed"].values())
    yield (f"\nThe limit: {limit / 1e9:.0f} GFLOP/s; a step needs, in this order, {needed} GFLOP. "
           "Memory: the weights, and what a step takes on top of them at its peak.")


def report(config):
    found = train_bench(config)
    print(json.dumps(found) if config.json else "\n".join(train_table(found)))
