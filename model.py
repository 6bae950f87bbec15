"""A Llama in one file, with the red flag: extra vocabulary rows, and LoRA that can be switched off.

    model = Llama.from_pretrained(path)      # config.json + safetensors, under Hugging Face's own names
    model.load_flag("out")                   # a trained adapter: LoRA, flag rows, threshold
    logits = model.logits(model(ids))        # (B, T, V + F)
    with model.flag_off(): ...               # the original model, bit for bit: (B, T, V)

Shapes: B rows, T new tokens, S cached tokens, C hidden, H query heads, K key/value heads, D head dim,
V words of the checkpoint, F flags (n_flags). The flags' ids are V .. V+F-1.
"""
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoint import (check_tensors, fill, load_weights, pick_device, pick_dtype, read_adapter, read_json, weights_hash,
                        whole, write_adapter)
from cli import first_process


# ------------------------------------------------------------------------------------------------- config

@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face config.json that change what is computed, under their own names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta, and what the type needs
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool

    @classmethod
    def from_pretrained(cls, path):
        path = Path(path) / "config.json"
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, d, where="config.json"):
        """The config of a Llama, Qwen2 or Mistral file. Raises one ValueError with all that is not supported."""
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        problems = [f"{name} is {d.get(name)!r}, wanted a whole number above 0" for name in needed
                    if not isinstance(d.get(name), int) or d[name] < 1]
        kind, act = d.get("model_type"), d.get("hidden_act", "silu")
        if kind not in ("llama", "qwen2", "mistral"):
            problems.append(f"model_type {kind!r} (supported: llama, qwen2, mistral)")
        if act != "silu":
            problems.append(f"hidden_act {act!r} (supported: silu)")
        optional = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
        wrong = [f"{name} is {d[name]!r}, wanted a whole number above 0" for name in optional
                 if d.get(name) is not None and (not isinstance(d[name], int) or d[name] < 1)]
        max_len = d.get("max_position_embeddings") or 2048
        problems += wrong or sliding_window_problems(d, kind, max_len)
        rope, rope_problems = read_rope(d)
        problems += rope_problems
        heads = d.get("num_attention_heads") or 1
        kv_heads = d.get("num_key_value_heads") or heads
        if not problems and heads % kv_heads:
            problems.append(f"{heads} attention heads are no multiple of {kv_heads} key/value heads")
        if problems:
            raise ValueError(f"{where}: " + "; ".join(problems))
        attention_bias = bool(d.get("attention_bias", False)) and kind == "llama"
        return cls(*(d[name] for name in needed), num_key_value_heads=kv_heads,
                   head_dim=d.get("head_dim") or d["hidden_size"] // heads, max_position_embeddings=max_len,
                   rms_norm_eps=d.get("rms_norm_eps", 1e-6), rope=rope,
                   tie_word_embeddings=d.get("tie_word_embeddings", False),
                   qkv_bias=attention_bias or kind == "qwen2", o_bias=attention_bias,
                   mlp_bias=bool(d.get("mlp_bias", False)) and kind == "llama")


def sliding_window_problems(d, kind, max_len):
    """A window as long as the context, or one that is switched off (Qwen2), never bites and is let through."""
    window = d.get("sliding_window", 4096)  # transformers' default for Mistral and Qwen2
    if kind == "qwen2" and not d.get("use_sliding_window", False):
        window = None
    if kind == "llama" or window is None or window >= max_len:
        return []
    return [f"an active sliding window of {window} tokens (supported: full attention only)"]


def read_rope(d):
    """(rope settings, problems): `rope_parameters` is transformers 5's spelling, `rope_theta` + `rope_scaling` 4's."""
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return {}, [f"rope_parameters or rope_scaling is {rope!r}, wanted an object"]
    rope = dict(rope)
    rope.setdefault("rope_theta", d.get("rope_theta", 10000.0))
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    needed = {"default": (), "linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if kind not in needed:
        return rope, [f"RoPE type {kind!r} (supported: {', '.join(needed)})"]
    problems = [f"RoPE type {kind} with {name} = {rope.get(name)!r}, wanted a number above 0"
                for name in ("rope_theta", *needed[kind])
                if not isinstance(rope.get(name), (int, float)) or rope[name] <= 0]
    if rope.get("partial_rotary_factor", d.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor other than 1")
    return rope, problems


def inverse_frequencies(config):
    """Radians a position for each of the D/2 rotary pairs, fp32. llama3 scaling: long waves are stretched by
    `factor`, short ones kept, and those between are blended (Llama 3.1's model card and reference code)."""
    rope, D = config.rope, config.head_dim
    inv_freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        waves = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # waves in the old context
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        return keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]
    return inv_freq


# ------------------------------------------------------------------------------------------------- layers

class Linear(nn.Linear):
    """nn.Linear that may carry LoRA (arXiv 2106.09685): y = W x + (alpha / rank) B A x. The base weight keeps its
    name, so checkpoints load as they are; A and B are fp32 whatever W is, because AdamW's steps vanish in bf16."""
    lora_on = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_A = self.lora_B = None

    def add_lora(self, rank, alpha):
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=self.weight.device))
        self.lora_scale, self.lora_on = alpha / rank, True

    def start_lora(self, generator):
        bound = 1 / math.sqrt(self.in_features)  # what kaiming_uniform_(a=sqrt(5)) gives, as in the LoRA code
        fill(self.lora_A, torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        fill(self.lora_B, torch.zeros(self.lora_B.shape))  # the identity at the start

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.lora_on:
            low = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)                # (B T, rank)
            B = (self.lora_scale * self.lora_B).to(x.dtype)
            y = torch.addmm(y.flatten(0, -2), low, B.T).view(y.shape)  # product and sum in one pass over y
        return y

    @torch.no_grad()
    def merge(self):
        """Folds LoRA into the weight, in fp32: W + scale B A is rounded once."""
        self.weight.copy_(self.weight.float() + self.lora_scale * self.lora_B @ self.lora_A)
        self.lora_A = self.lora_B = None
        self.lora_on = False


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return Normalise.apply(x, self.eps) * self.weight


class Normalise(torch.autograd.Function):
    """x over its root mean square, in fp32. Its backward computes the fp32 copies again, which autograd would keep: at
    two a block they are a third of what training holds."""

    @staticmethod
    def forward(ctx, x, eps):
        h = x.float()
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)                  # (..., 1)
        ctx.save_for_backward(x, scale)
        return (h * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, scale = ctx.saved_tensors
        y, dy = x * scale, dy.float()
        return ((dy - y * (dy * y).mean(-1, keepdim=True)) * scale).to(x.dtype), None


def rotate(x, cos, sin):
    """RoPE with the two halves of a head as pairs (Hugging Face's row order; Meta's own files interleave them)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def visible(positions, longest):
    """Which of the S+T places in a cache new tokens at these positions (B, T) see, S being `longest`: (B, 1, T, S+T)."""
    return torch.arange(longest + positions.shape[1], device=positions.device) <= positions[:, None, :, None]


def attend(q, k, v, mask):
    """Attention of q (B, H, T, D) to k, v (B, K, S+T, D); mask None is plainly causal."""
    (H, T, D), (B, K, S) = q.shape[1:], k.shape[:3]                                 # S: of all keys
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # on a CPU the fused kernel's backward takes three times as long as that of the formula itself. The query heads
        # that share a key/value head stand below each other, as longer queries: k and v are not repeated for them
        q, k, v = (q / math.sqrt(D)).reshape(B * K, -1, D), k.flatten(0, 1), v.flatten(0, 1)
        scores = (q @ k.transpose(1, 2)).view(B, K, H // K, T, S)
        visible = torch.ones(T, S, dtype=torch.bool).tril() if mask is None else mask[:, :, None]
        scores = scores + torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        return (scores.softmax(-1).view(B * K, -1, S) @ v).view(B, H, T, D)
    if T == 1:  # the same, for one new token a row
        grouped = q.reshape(B, K, -1, D)                                            # (B, K, H/K, D)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)

    def forward(self, x, cos, sin, mask, cache, layer):
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim).transpose(1, 2)
        q = rotate(heads(self.q_proj(x)), cos, sin)                                 # (B, H, T, D)
        k, v = rotate(heads(self.k_proj(x)), cos, sin), heads(self.v_proj(x))       # (B, K, T, D)
        y = attend(q, k, v, mask) if cache is None else cache.attend(layer, q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                     # (B, T, C)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, x, cos, sin, mask, cache, layer, keep=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, layer)
        if keep is not None:  # no block above looks at the other places
            x = x.index_select(1, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


# ------------------------------------------------------------------------------------------------- the model

class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(c), persistent=False)
        self.flag_embed = self.flag_unembed = self.kind_rows = None  # parameters, as add_flag makes them
        self.n_flags, self.flag_on, self.merged = 0, False, False
        self.n_frozen = 0  # blocks, from the bottom, without LoRA
        self.recompute = False  # in training keep only what goes into a block; the rest is computed again on the way back
        self.threshold, self.debounce, self.path = None, 1, None  # the flag counts after so many positions above it

    @classmethod
    def from_pretrained(cls, path, dtype="auto", device="auto", cut=None):
        """The original model of a folder with config.json and model.safetensors (or shards and their index).

        dtype "auto" is bf16 where the machine multiplies in it, else fp32; device "auto" is cuda, mps or cpu.
        Raises ValueError for anything missing, extra, misshapen or not supported. Peak memory: the weights and one
        tensor more. `cut` cuts the model among several processes before it has memory (parallel.py, take_parts).
        """
        path = Path(path)
        device = pick_device() if device == "auto" else torch.device(device)
        dtype = pick_dtype(device) if dtype == "auto" else dtype
        config = LlamaConfig.from_pretrained(path)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.requires_grad_(False)
        (cut(model) if cut else model).to_empty(device=device)
        model.inv_freq = inverse_frequencies(config).to(device)
        model.path = path
        load_weights(model, path)
        return model.eval()

    def forward(self, ids, cache=None, first=0, last=None, keep=None):
        """Final hidden states (B, T, C) of ids (B, T), or of embeddings (B, T, C) in their place; with a cache, they
        continue what it holds. With first and last only the blocks first .. last - 1 run: what goes in is what block
        first - 1 gave, and the norm is left out unless last is None. `keep` (n,) asks for the final states of these of
        the T places alone, (B, n, C): the last block's MLP, three quarters of it, is spared the others."""
        n_new, device = ids.shape[1], ids.device
        positions = torch.arange(n_new, device=device)[None] if cache is None else cache.positions(n_new)
        angles = (positions[..., None].float() * self.inv_freq)[:, None].repeat(1, 1, 1, 2)  # (B, 1, T, D)
        x = ids if ids.is_floating_point() else self.embed(ids)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = None  # a fresh sequence is plainly causal
        if cache is not None and cache.longest:
            mask = visible(positions, cache.longest)                                # (B, 1, T, S+T)
        blocks = range(first, len(self.layers) if last is None else last)
        for i in blocks:
            args = x, cos, sin, mask, cache, i, keep if i == len(self.layers) - 1 else None
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(self.layers[i], *args, use_reentrant=False) if again else self.layers[i](*args)
        if keep is not None and not blocks:
            x = x.index_select(1, keep)
        if cache is not None:
            cache.advance(n_new)
        return self.norm(x) if last is None else x

    def embed(self, ids):
        words = self.embed_tokens.weight
        if not (self.flag_on and self.n_flags):
            return F.embedding(ids, words)
        V = self.config.vocab_size
        flags = F.embedding((ids - V).clamp(min=0), self.flag_embed).to(words.dtype)
        return torch.where((ids >= V)[..., None], flags, F.embedding(ids.clamp(max=V - 1), words))

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    @property
    def head_weight(self):
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight                 # (V, C)

    def split_logits(self, hidden):
        """Logits of the words (..., V) and of the flags (..., F or 0), fp32, of hidden states (..., C)."""
        return F.linear(hidden, self.head_weight).float(), self.flag_logits(hidden)

    def flag_logits(self, hidden):
        """(..., F) of hidden states (..., C), fp32: bf16 would cut the score to two digits. (..., 0) with the flag off."""
        if not (self.flag_on and self.n_flags):
            return hidden.new_zeros(*hidden.shape[:-1], 0, dtype=torch.float32)
        return F.linear(hidden.float(), self.flag_unembed)

    def logits(self, hidden):
        """(..., V + F) of hidden states (..., C), fp32; (..., V) with the flag off. A call of its own, so that the
        head, a fifth of a small model's work, is paid only at positions that need it."""
        return torch.cat(self.split_logits(hidden), dim=-1)

    # --------------------------------------------------------------------------------------------- the flag

    def add_flag(self, n_flags=1, rank=16, alpha=32, seed=0, layers=None, n_kinds=0):
        """Grows the vocabulary by n_flags rows and every linear layer of the upper `layers` blocks (None: of all)
        by LoRA; only these train, and the rows for kinds.

        The new rows are parameters of their own, so the old ones stay as they are, tied or not. Until training
        chooses a start from data (frozen.py), unembedding rows are 0: log f is about -24, and no word moves. The
        embedding rows stay the mean of the words' unless LoRA is in all blocks.
        Rank 0: no LoRA, and only the unembedding rows train (a linear probe on the last hidden state).
        The n_kinds rows, which start at 0, help in training (objective.py, kind_loss) and are no part of the adapter.
        """
        if self.merged:
            raise ValueError("this model has an adapter merged into its weights: load it afresh to add another")
        assert n_flags >= 1 and rank >= 0
        words = self.embed_tokens.weight
        self.n_flags, self.flag_on = n_flags, True
        n_lora = 0 if rank == 0 else len(self.layers) if layers is None else min(layers, len(self.layers))
        self.n_frozen = len(self.layers) - n_lora
        empty = lambda n: torch.empty(n, words.shape[1], device=words.device)
        self.flag_embed = nn.Parameter(empty(n_flags), requires_grad=self.n_frozen == 0)   # (F, C)
        self.flag_unembed = nn.Parameter(empty(n_flags))                                   # (F, C)
        self.kind_rows = nn.Parameter(empty(n_kinds)) if n_kinds else None                 # (n_kinds, C)
        upper = set(self.layers[self.n_frozen:].modules())
        for layer in self.block_linears():
            if layer in upper:
                layer.add_lora(rank, alpha)
            else:
                layer.lora_A = layer.lora_B = None
                layer.lora_on = False
        if not words.is_meta:
            self.start_flag(seed)

    @torch.no_grad()
    def start_flag(self, seed):
        """Gives what add_flag has added its values; add_flag does so itself, unless the model has no memory yet."""
        words, generator = self.embed_tokens.weight, torch.Generator().manual_seed(seed)
        mean = whole(words.float().sum(0)) / len(words)                             # (C,)
        fill(self.flag_embed, mean.expand_as(self.flag_embed))
        fill(self.flag_unembed, torch.zeros(self.flag_unembed.shape))
        if self.kind_rows is not None:
            fill(self.kind_rows, torch.zeros(self.kind_rows.shape))
        for layer in self.block_linears():
            if layer.lora_on:
                layer.start_lora(generator)

    def block_linears(self):
        return [m for m in self.modules() if isinstance(m, Linear)]

    def flag_parameters(self):
        """Name -> parameter, of the adapter alone: LoRA and flag rows."""
        return {n: p for n, p in self.named_parameters() if n.startswith("flag_") or "lora_" in n}

    @contextlib.contextmanager
    def flag_off(self):
        """Within it the model is the original one: no adapter, no flag rows, logits bit-identical."""
        if self.merged:
            raise ValueError("the adapter is merged into the weights: the original model is gone, load it afresh")
        layers = [m for m in self.block_linears() if m.lora_on]
        before, self.flag_on = self.flag_on, False
        for m in layers:
            m.lora_on = False
        try:
            yield self
        finally:
            self.flag_on = before
            for m in layers:
                m.lora_on = True

    def merge_flag(self):
        """Folds LoRA into the weights, for export; the flag rows stay. There is no way back to the original."""
        if self.n_flags and not self.flag_on:
            raise ValueError("the adapter is switched off here (flag_off): merge it outside")
        for layer in self.block_linears():
            if layer.lora_on:
                layer.merge()
                self.merged = True

    def save_flag(self, folder, **info):
        """Writes flag.safetensors (LoRA and flag rows) and flag.json: `info`, threshold, base weights' hash. Of several
        processes the first writes; if they hold a part of the model each, all have to call this."""
        if self.merged:
            raise ValueError("the adapter is merged into the weights: there is no LoRA left to save")
        tensors = {n: whole(p.detach()).cpu().contiguous() for n, p in self.flag_parameters().items()}
        if not first_process():
            return
        layer = self.layers[-1].self_attn.q_proj
        rank = len(layer.lora_A) if layer.lora_on else 0
        info = {"n_flags": self.n_flags, "rank": rank, "alpha": layer.lora_scale * rank if rank else 0.0,
                "layers": len(self.layers) - self.n_frozen,
                "threshold": self.threshold, "debounce": self.debounce, "base_sha256": weights_hash(self.path)} | info
        write_adapter(folder, tensors, info)

    def load_flag(self, folder, force=False):
        """Adds the adapter that training saved in `folder`, sets self.threshold and self.debounce, and returns
        flag.json's content.

        Raises ValueError where it is missing, damaged, or was trained on other base weights (unless `force`).
        """
        tensors, info = read_adapter(folder, self.path, force)
        shapes = {n: [info["n_flags"], self.config.hidden_size] for n in ("flag_embed", "flag_unembed")}
        n_layers = info.get("layers", len(self.layers)) if info["rank"] else 0  # older adapters: all
        for i in range(len(self.layers))[len(self.layers) - n_layers:]:
            for name, layer in self.layers[i].named_modules():
                if isinstance(layer, Linear):
                    shapes |= {f"layers.{i}.{name}.lora_A": [info["rank"], layer.in_features],
                               f"layers.{i}.{name}.lora_B": [layer.out_features, info["rank"]]}
        check_tensors({n: list(t.shape) for n, t in tensors.items()}, shapes, Path(folder) / "flag.safetensors")
        # only now: an error leaves the model as it was
        self.add_flag(info["n_flags"], info["rank"], info["alpha"], layers=n_layers)
        with torch.no_grad():
            for name, parameter in self.flag_parameters().items():
                parameter.copy_(tensors[name])
        self.threshold, self.debounce = info["threshold"], info.get("debounce", 1)  # older adapters lack it
        return info
