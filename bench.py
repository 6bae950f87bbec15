"""How fast answers are written and adapters trained, beside transformers and beside what the machine allows.

    python bench.py decode                              # the default model
    python bench.py decode --shape llama-3.2-1b         # random weights of that shape
    python bench.py train                               # the default job; bench_train.py

All are timed in one process, in turn, on the same weights, dtype, prompts and lengths, so that what else the machine
does falls on all alike; given are medians over the rounds, and the range. The limits are this machine's own, measured
in the same rounds: a step cannot be faster than its weights and keys and values come out of memory (in the time in
which as many bytes of a large tensor are summed up), nor than its multiplications and additions are done (in the time
of a large matrix product). transformers is a peer only if it is installed (pip install -r requirements-dev.txt).
"""
import contextlib
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import pick_device
from cli import option, parse, read_jsonl, run, say
from model import Llama, LlamaConfig, inverse_frequencies
from sample import generate
from tokenizer import Tokenizer

DEV = Path(__file__).resolve().parent / "data" / "mini" / "dev.jsonl"
SHAPES = {  # of their config.json; the vocabulary's size counts, not what is in it
    "llama-3.2-1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": dict(vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                         num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)}


@dataclass(frozen=True)
class BenchConfig:
    batch: str = option("1,16", "answers side by side")
    new: int = option(128, "tokens an answer")
    rounds: int = option(5, "timings of each")
    long: int = option(1000, "tokens of the prompt whose answer's first token is timed")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")
    shape: str | None = option(None, "random weights instead: " + ", ".join(SHAPES))
    dtype: str = option("bfloat16", "bfloat16 or float32")
    json: bool = option(False, "the figures as one JSON object on stdout, in place of the tables")

    def problems(self):
        problems = [f"--{name} is {value}, wanted {least} or more" for name, value, least in
                    (("new", self.new, 2), ("rounds", self.rounds, 1), ("long", self.long, 100)) if value < least]
        if not all(b.isdecimal() and int(b) for b in self.batch.split(",")):
            problems.append(f"--batch is {self.batch!r}, wanted numbers with commas between")
        if self.shape is not None and self.shape not in SHAPES:
            problems.append(f"--shape is {self.shape!r}, wanted one of {', '.join(SHAPES)}")
        if self.dtype not in ("bfloat16", "float32"):
            problems.append(f"--dtype is {self.dtype!r}, wanted bfloat16 or float32")
        return problems


# ------------------------------------------------------------------------------------------------ what is timed

def build(config):
    """(model with an adapter, transformers' model or None, tokenizer)."""
    if config.weights is None:
        from data.smollm2 import ensure
    folder, dtype = config.weights or ensure(), getattr(torch, config.dtype)
    model = Llama.from_pretrained(folder, dtype) if config.shape is None else random_model(config.shape, dtype)
    model.add_flag(rank=16, layers=12)  # as train.py makes it; what is in it does not change the time
    try:
        import transformers
    except ImportError:
        say("transformers is not installed, so there is no peer (pip install -r requirements-dev.txt)")
        return model, None, Tokenizer.from_pretrained(folder)
    transformers.logging.disable_progress_bar()
    device = model.embed_tokens.weight.device
    if config.shape is None:
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    else:
        with torch.device(device):
            peer = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(max_position_embeddings=8192, **SHAPES[config.shape]), dtype=dtype)
        ours = model.state_dict() | {"lm_head.weight": model.head_weight}
        peer.load_state_dict({name: ours[name.removeprefix("model.")] for name in peer.state_dict()})
    return model, peer.eval(), Tokenizer.from_pretrained(folder)


def random_model(shape, dtype):
    config = LlamaConfig.from_dict({"model_type": "llama", "max_position_embeddings": 8192} | SHAPES[shape])
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device=pick_device()).requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(1)
    model.inv_freq = inverse_frequencies(config).to(p.device)
    return model.eval()


def ours(model, tok, mode, adapter=True):
    """A function (prompts, n) that writes n tokens to each prompt."""
    bias = {i: -math.inf for i in tok.stop_ids}  # no answer ends before its n tokens, here and in the peer

    def write(prompts, n):
        with contextlib.nullcontext() if adapter else model.flag_off():
            answers = list(generate(model, tok, prompts, mode, n, threshold=1.0, logit_bias=bias,
                                    batch_size=len(prompts)))
        assert all(len(a.tokens) == n for a in answers)
    return write


def theirs(peer, tok):
    def write(prompts, n):
        ids = [tok.render(p)[0] for p in prompts]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(x)) + x for x in ids], device=peer.device)       # (B, T)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids], device=peer.device)
        out = peer.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n,
                            eos_token_id=tok.stop_ids, pad_token_id=tok.stop_ids[0])
        assert out.shape[1] == width + n
    return write


def seconds(f, *args):
    """How long f takes, on a GPU until it is really done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    f(*args)
    wait()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------- the limits

class Machine:
    """What it can do: bytes read a second and floating-point operations a second, each measured once a round."""

    def __init__(self, model):
        like = model.embed_tokens.weight
        self.large = torch.ones(1 << (30 if like.is_cuda else 26), device=like.device)              # 4 GiB or 256 MiB
        self.square = torch.ones(*[8192 if like.is_cuda else 2048] * 2, device=like.device, dtype=like.dtype)
        self.bandwidth, self.flops = [], []

    def measure(self):
        n = len(self.square)
        self.bandwidth.append(self.large.numel() * 4 / statistics.median(seconds(self.large.sum) for _ in range(3)))
        self.flops.append(2 * n ** 3 / statistics.median(seconds(torch.mm, self.square, self.square) for _ in range(3)))


def step_costs(model, lengths, n):
    """(bytes read, floating-point operations) of the original model's mean step, answers of n tokens to prompts of these
    lengths (a list): all weights once, and the keys and values of what stands there; attention's products are left out
    of the operations."""
    c, size = model.config, model.head_weight.element_size()
    weights = sum(layer.weight.numel() for layer in model.block_linears()) + model.head_weight.numel()
    places = sum(length + n / 2 for length in lengths)
    return (size * (weights + places * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim),
            2 * weights * len(lengths))


# ------------------------------------------------------------------------------------------------------ the tables

def decode(config):
    """Figures of all batch sizes, and of the long prompt."""
    model, peer, tok = build(config)
    asked = [r["prompt"] for _, r in read_jsonl(DEV) if r["label"] == "benign" and isinstance(r["prompt"], str)]
    known = {"transformers": theirs(peer, tok)} if peer else {}
    known |= {"off, no adapter": ours(model, tok, "off", False)}
    known |= {mode: ours(model, tok, mode) for mode in ("off", "shadow", "stop")}
    found = {"device": device_name(), "threads": torch.get_num_threads(), "model": config.shape or config.weights
             or "SmolLM2-135M-Instruct", "dtype": config.dtype, "new": config.new, "rounds": config.rounds, "batch": {}}
    for B in map(int, config.batch.split(",")):
        prompts = (asked * (B // len(asked) + 1))[:B]
        found["batch"][B] = compare(config, model, known, prompts, [len(tok.render(p)[0]) for p in prompts])
    text = " ".join(asked)
    while len(tok.encode(text)) < config.long:
        text += " " + text
    long = tok.decode(tok.encode(text)[:config.long - len(tok.render("")[0])])
    found["long"] = {"tokens": len(tok.render(long)[0]), "seconds": {}}
    few = {name: known[name] for name in ("transformers", "off, no adapter") if name in known}
    for name, times in rounds(config, few, [long], 1).items():
        found["long"]["seconds"][name] = times
    return found


def rounds(config, known, prompts, n, each=lambda: None):
    """name -> seconds for n tokens, one a round; `each` is called in every round."""
    times = {name: [] for name in known}
    for r in range(config.rounds + 1):
        for name, write in known.items():
            taken = seconds(write, prompts, n)
            if r:  # the first is for warming up
                times[name].append(taken)
        if r:
            each()
        say(f"{len(prompts)} x {n} tokens, round {r} of {config.rounds}: " + ", ".join(
            f"{name} {t[-1]:.2f} s" for name, t in times.items() if t))
    return times


def compare(config, model, known, prompts, lengths):
    machine = Machine(model)
    first, whole = (rounds(config, known, prompts, n, each) for n, each in ((1, lambda: None),
                                                                             (config.new, machine.measure)))
    bandwidth, flops = statistics.median(machine.bandwidth), statistics.median(machine.flops)
    n_bytes, operations = step_costs(model, lengths, config.new)
    found = {"bandwidth": bandwidth, "flops": flops, "step_bytes": n_bytes, "step_operations": operations, "by": {}}
    for name, times in whole.items():
        step = (statistics.median(times) - statistics.median(first[name])) / (config.new - 1)
        found["by"][name] = {"seconds": times, "first": first[name], "step": step,
                             "tokens_per_s": [len(prompts) * config.new / t for t in times],
                             "of_bandwidth": n_bytes / step / bandwidth, "of_flops": operations / step / flops}
    return found


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError:
        names = []
    return f"{torch.get_num_threads()} threads, {names[0] if names else 'CPU'}"


def times_faster(than, seconds):
    """Median and range of the ratios, round by round."""
    ratios = sorted(a / b for a, b in zip(than, seconds))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def table(found):
    yield (f"{found['model']}, {found['dtype']}, {found['device']}; {found['new']} tokens an answer, medians of "
           f"{found['rounds']} rounds (and the range)\n")
    yield ("| batch | by | tokens/s, prompt included | times transformers | ms a step | of the memory limit | "
           "of the arithmetic limit |\n| --- | --- | --- | --- | --- | --- | --- |")
    for B, part in found["batch"].items():
        peer = part["by"].get("transformers")
        for name, x in part["by"].items():
            rate, original = sorted(x["tokens_per_s"]), name in ("transformers", "off, no adapter")
            share = f"{x['of_bandwidth']:.2f} | {x['of_flops']:.2f}" if original else "- | -"
            ratio = times_faster(peer["seconds"], x["seconds"]) if peer and original else "-"
            yield (f"| {B} | {name} | {statistics.median(rate):.1f} ({rate[0]:.1f} to {rate[-1]:.1f}) | {ratio} | "
                   f"{1e3 * x['step']:.1f} | {share} |")
    yield "\n| batch | with the adapter | time as a multiple of off's |\n| --- | --- | --- |"
    for B, part in found["batch"].items():
        for mode in ("shadow", "stop"):
            yield f"| {B} | {mode} | {times_faster(part['by'][mode]['seconds'], part['by']['off']['seconds'])} |"
    yield f"\n| first token of a prompt of {found['long']['tokens']} | ms |\n| --- | --- |"
    for name, times in found["long"]["seconds"].items():
        times = sorted(1e3 * t for t in times)
        yield f"| {name} | {statistics.median(times):.0f} ({times[0]:.0f} to {times[-1]:.0f}) |"
    limits = [(p["bandwidth"] / 1e9, p["flops"] / 1e9) for p in found["batch"].values()]
    yield "\nThe limits: " + "; ".join(f"{b:.1f} GB/s, {f:.0f} GFLOP/s" for b, f in limits) + "."


def main():
    what, argv = (sys.argv[1:] + ["--help"])[0], sys.argv[2:]
    if what not in ("decode", "train", "--help"):
        raise ValueError(f"{what!r} is no benchmark: wanted decode or train (see bench.py decode --help)")
    if what == "train":
        import bench_train
        return bench_train.report(parse(bench_train.BenchTrainConfig, argv, __doc__))
    config = parse(BenchConfig, argv if what == "decode" else ["--help"], __doc__)
    found = decode(config)
    print(json.dumps(found) if config.json else "\n".join(table(found)))


if __name__ == "__main__":
    run(main)
