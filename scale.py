"""What training takes with large models: memory a process, tokens/s, cost. A calculation; no weights, no GPU.

    python scale.py                              # the README's table: 8B and 70B on GPUs of 80 GB
    python scale.py --utilisation 0.3 --price 3

Measured is nothing here: `--utilisation` is what you get on your machine (tokens/s of train.py's log x FLOPs a token /
peak), and communication is taken to hide behind the work, for which the last column has to be small.
"""
import sys
from dataclasses import dataclass

import torch

from cli import option, parse, run
from model import Llama, LlamaConfig
from objective import CHUNK_ELSEWHERE

SHAPES = {  # of their config.json
    "Llama-3.1-8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Llama-3.1-70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)}
RUNS = (("Llama-3.1-8B", 1, False), ("Llama-3.1-8B", 8, False), ("Llama-3.1-8B", 8, True), ("Llama-3.1-70B", 8, True),
        ("Llama-3.1-70B", 16, True))


@dataclass(frozen=True)
class ScaleConfig:
    tokens: int = option(4096, "tokens of a micro-batch, a process")
    supervised: float = option(0.4, "share of them that the vocabulary losses read")
    layers: int = option(12, "blocks with LoRA, the upper ones")
    rank: int = option(16, "of LoRA")
    recompute: bool = option(False, "train.py --recompute: keep only what goes into a block")
    utilisation: float = option(0.4, "share of the peak that is reached: an assumption until it is measured")
    peak: float = option(989, "TFLOP/s of a GPU in bf16; an H100's by default")
    link: float = option(300, "GB/s at which a process receives weights")
    price: float = option(2.5, "of a GPU and hour")

    def problems(self):
        positive = ("tokens", "supervised", "layers", "rank", "utilisation", "peak", "link", "price")
        return [f"--{k} is {getattr(self, k)}, wanted above 0" for k in positive if not getattr(self, k) > 0]


def sizes(shape, config):
    """Numbers of parameters: lower blocks, upper ones, embedding, head, adapter."""
    base = dict(model_type="llama", vocab_size=128256, num_key_value_heads=8)
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(base | SHAPES[shape]))
    block = sum(p.numel() for p in model.layers[0].parameters())
    model.add_flag(rank=config.rank, layers=config.layers)
    adapter = sum(p.numel() for p in model.flag_parameters().values())
    head = model.embed_tokens.weight.numel()
    return block * model.n_frozen, block * (len(model.layers) - model.n_frozen), head, head, adapter


def memory(shape, processes, shard, config):
    """Bytes a process: weights, what is put together of them at a time, adapter, activations, logits."""
    lower, upper, embedding, head, adapter = sizes(shape, config)
    of, c = (processes if shard else 1), SHAPES[shape]
    layers = min(config.layers, c["num_hidden_layers"])
    block = upper // layers
    # bytes for the backward of a block and token: norms, inputs of the products, q, k, v, all bf16; fused attention
    kept = 15 * c["hidden_size"] + 8 * c["intermediate_size"]
    return {"weights": 2 * (lower + upper + embedding + head) / of,                  # bf16
            "together": 2 * (2 * block + embedding + head) if shard else 0,        # a block, and the next on its way
            "adapter": 5 * 4 * adapter / of,                # fp32: value, gradient, two moments, mean of the last steps
            "activations": config.tokens * (layers * (2 * c["hidden_size"] if config.recompute else kept)
                                            + config.recompute * kept),
            "logits": 4 * 4 * CHUNK_ELSEWHERE * 128256}     # four fp32 tensors of a chunk of positions


def flops(shape, config):
    """Of a token: the lower blocks run once; the upper ones and the head for the original model, forward, and backward
    to the activations alone, as frozen weights have no gradient. Attention's own products are left out: at 1,000
    tokens a few per cent."""
    lower, upper, _, head, _ = sizes(shape, config)
    return 2 * lower + (6 + 2 * config.recompute) * upper + 6 * head * config.supervised


def row(shape, processes, shard, config):
    lower, upper, embedding, head, _ = sizes(shape, config)
    m, work = memory(shape, processes, shard, config), flops(shape, config)
    speed = config.utilisation * config.peak * 1e12 / work                           # tokens/s of one GPU
    received = 2 * (lower + 3 * upper + 2 * (embedding + head)) if shard else 0      # bytes a micro-batch
    gb = lambda *names: f"{sum(m[n] for n in names) / 1e9:.1f}"
    return [shape, f"{processes}{' --shard' * shard}", gb("weights"), gb("together"), gb("adapter"),
            gb("activations", "logits"), gb(*m), f"{work / 1e9:.0f}", f"{processes * speed:,.0f}",
            f"{1e6 / speed / 3600 * config.price:.2f}", f"{received / config.link / 1e9 / (config.tokens / speed):.0%}"]


def main():
    config = parse(ScaleConfig, sys.argv[1:], __doc__)
    header = ["model", "processes", "weights, GB", "put together", "adapter", "activations", "in all, GB a process",
              "GFLOP a token", "tokens/s in all", "cost of a million", "receiving / working"]
    for cells in (header, ["---"] * len(header), *(row(*r, config) for r in RUNS)):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main)
