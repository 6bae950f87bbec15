"""A step of one new token a row, as fast as a CPU's memory allows; `sample.stream` writes answers with it.

Such a step reads every weight once and computes little with it, so it is bound by memory, as long as nothing else gets
in the way. In model.forward much does: PyTorch's bf16 product re-orders the weights at every call, and there are some
thirty small operators a block, each as dear as a small product. Here the weights are laid out ahead for oneDNN, the
CPU's matrix library (a copy as large as they are), q, k and v are one product, and so are gate and up; what lies
between the products is three functions of decode.c, which the machine's C compiler makes at the first use.

In fp32, on other devices, and where there is no C compiler, the step is model.forward's.
"""
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F

LEAST_ROWS = 4  # for fewer rows oneDNN takes another way, which is slower than that for four
PACKED = weakref.WeakKeyDictionary()  # model -> (which weights, as they were, what they are laid out as)


def make_step(model):
    """A function (token (B,), cache) -> (logits of the words (B, V), of the flags (B, F)), fp32, that reads one token
    more of every row of a Cache. It holds the adapter as it is now: make another one when that has changed."""
    weight = model.embed_tokens.weight
    fast = (weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported() and kernels() is not None)
    if fast:
        return Decoder(model)
    return lambda token, cache: model.split_logits(model(token[:, None].to(weight.device), cache)[:, -1])


@functools.cache
def kernels():
    """decode.c, compiled for this machine; None where that does not work, with a line on stderr."""
    source, compiler = Path(__file__).resolve().with_name("decode.c"), shutil.which("cc") or "cc"
    with tempfile.TemporaryDirectory() as tmp:
        compiled, library = f"{tmp}/decode.o", f"{tmp}/decode.so"
        try:  # linked without OpenMP, so as to share PyTorch's threads, and without fast-math, which would change
            # how this whole process rounds numbers next to 0
            subprocess.run([compiler, "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c", source, "-o",
                            compiled], check=True, capture_output=True)
            subprocess.run([compiler, "-shared", compiled, "-o", library, "-lm"], check=True, capture_output=True)
            found = ctypes.CDLL(library)
        except (OSError, subprocess.CalledProcessError) as e:
            print(f"decode.c could not be compiled, so answers come at half the speed: {e}", file=sys.stderr)
            return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    found.rms_norm.argtypes = [pointer] * 3 + [ctypes.c_float] + [size] * 2
    found.silu_mul.argtypes = [pointer] * 2 + [size] * 2
    found.attend.argtypes = [pointer] * 7 + [size] * 6
    for function in (found.rms_norm, found.silu_mul, found.attend):
        function.restype = None
    return found


class Decoder:
    """The step in bf16 on a CPU: model.forward for T = 1, in 4 products and 4 calls of decode.c a block."""

    def __init__(self, model):
        self.model, self.c, self.kernels = model, model.config, kernels()
        packed = iter(pack(model))
        groups = [group for block in model.layers for group in products(block)]
        made = [Product(group, next(packed)) for group in groups]
        self.blocks = [(block.input_layernorm.weight.data_ptr(), block.post_attention_layernorm.weight.data_ptr(),
                        *made[4 * i:4 * i + 4]) for i, block in enumerate(model.layers)]
        self.head = next(packed)

    def __call__(self, token, cache):
        c, k, (B,) = self.c, self.kernels, token.shape
        assert cache.rows == slice(None) and cache.k.is_contiguous() and cache.v.is_contiguous()
        at, H, K, D = cache.positions(1)[:, 0], c.num_attention_heads, c.num_key_value_heads, c.head_dim
        angles = at[:, None].float() * self.model.inv_freq                                          # (B, D / 2)
        cos, sin, n = angles.cos(), angles.sin(), max(B, LEAST_ROWS)
        where = cos.data_ptr(), sin.data_ptr(), at.data_ptr(), B, H, K, D, cache.max_len, cache.longest + 1
        x = F.pad(self.model.embed(token), (0, 0, 0, n - B))                                        # (n, C)
        normed, mixed = torch.zeros_like(x), x.new_zeros(n, H * D)
        hidden = x.new_zeros(n, c.intermediate_size)
        keys, values, size = cache.k.data_ptr(), cache.v.data_ptr(), cache.k[0].numel() * cache.k.element_size()
        to_norm, to_attend, to_down = normed.data_ptr(), mixed.data_ptr(), hidden.data_ptr()
        for norm_1, norm_2, qkv_proj, o_proj, gate_up_proj, down_proj in self.blocks:
            k.rms_norm(to_norm, x.data_ptr(), norm_1, c.rms_norm_eps, B, c.hidden_size)
            qkv = qkv_proj(normed)                                                                  # (n, (H + 2 K) D)
            k.attend(to_attend, qkv.data_ptr(), keys, values, *where)
            x = o_proj(mixed, add=x)
            k.rms_norm(to_norm, x.data_ptr(), norm_2, c.rms_norm_eps, B, c.hidden_size)
            gate_up = gate_up_proj(normed)                                                          # (n, 2 I)
            k.silu_mul(to_down, gate_up.data_ptr(), B, c.intermediate_size)
            x = down_proj(hidden, add=x)
            keys, values = keys + size, values + size
        cache.advance(1)
        k.rms_norm(to_norm, x.data_ptr(), self.model.norm.weight.data_ptr(), c.rms_norm_eps, B, c.hidden_size)
        words = linear(normed, self.head)[:B].float()                                               # (B, V)
        return words, self.model.flag_logits(normed[:B])


class Product:
    """Several linear layers that read the same input, as one: y = W x + b + B A x. A and B are small."""

    def __init__(self, layers, weight):
        self.weight, self.bias, self.A = weight, None, None
        if any(layer.bias is not None for layer in layers):
            bias = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
            self.bias = torch.cat(bias)
        if any(layer.lora_on for layer in layers):
            assert all(layer.lora_on for layer in layers)
            B = torch.block_diag(*(layer.lora_scale * layer.lora_B.detach() for layer in layers))
            A = torch.cat([layer.lora_A.detach() for layer in layers])
            self.A, self.B = lay_out(A.bfloat16()), lay_out(B.bfloat16())

    def __call__(self, x, add=None):
        """x (n, in) -> (n, out), plus `add` (n, out) where it is given."""
        y = linear(x, self.weight, self.bias, add)
        return y if self.A is None else linear(linear(x, self.A), self.B, None, y)


def products(block):
    """The linear layers of a block that read the same input, in the order of the step."""
    a, m = block.self_attn, block.mlp
    return [a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [m.gate_proj, m.up_proj], [m.down_proj]


def pack(model):
    """The frozen weights as oneDNN wants them, four a block and the head; kept for as long as the model lives."""
    head = (model.embed_tokens if model.config.tie_word_embeddings else model.lm_head).weight
    groups = [[layer.weight for layer in group] for block in model.layers for group in products(block)] + [[head]]
    state = [(w.data_ptr(), w._version) for group in groups for w in group]
    if model not in PACKED or PACKED[model][0] != state:
        PACKED[model] = state, [lay_out(torch.cat([w.detach() for w in group])) for group in groups]
    return PACKED[model][1]


def lay_out(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # 16: rows at which the layout should be at its best


def linear(x, weight, bias=None, add=None):
    """x W^T + bias + add, W laid out. These are the operators that torch.compile, too, makes of a linear layer."""
    if add is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
