"""Reading tokens as fast as a CPU allows: what `sample.stream` writes answers with.

A step of one token a row reads every weight once and computes little with it, so it is bound by memory, as long as
nothing else gets in the way. In model.forward much does: PyTorch's bf16 product re-orders the weights at every call,
and there are some thirty small operators a block, each as dear as a small product. Here the weights are laid out ahead
for oneDNN, the CPU's matrix library (a copy as large as they are), q, k and v are one product, and so are gate and up;
what lies between the products is four functions of decode.c, which the machine's C compiler makes at the first use.

In fp32, on other devices, and where there is no C compiler, the model itself reads.
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

from model import visible

LEAST_ROWS = 4  # for fewer rows oneDNN takes another way, which is slower than that for four
PACKED = weakref.WeakKeyDictionary()  # model -> (which weights, as they were, what they are laid out as)


def fast(model):
    """What reads like the model: called with (ids (B, T), cache) it gives hidden states, and it has split_logits. It
    holds the adapter as it is now: make another one when that has changed."""
    weight = model.embed_tokens.weight
    can = (weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
           and torch.ops.mkldnn._is_mkldnn_bf16_supported() and kernels() is not None)
    return Fast(model) if can else model


@functools.cache
def kernels():
    """decode.c, compiled for this machine; None where that does not work, with a line on stderr."""
    source, compiler = Path(__file__).resolve().with_name("decode.c"), shutil.which("cc") or "cc"
    try:
        with tempfile.TemporaryDirectory() as tmp:
            compiled, library = f"{tmp}/decode.o", f"{tmp}/decode.so"
            run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
            run([compiler, "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c", source, "-o", compiled])
            # linked without OpenMP, so as to share PyTorch's threads, and without fast-math, which would change how this
            # whole process rounds numbers next to 0
            run([compiler, "-shared", compiled, "-o", library, "-lm"])
            found = ctypes.CDLL(library)
    except (OSError, subprocess.CalledProcessError) as e:
        why = (getattr(e, "stderr", None) or str(e)).strip().splitlines()[0]
        print(f"decode.c could not be compiled, so answers come at half the speed: {why}", file=sys.stderr)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    found.rms_norm.argtypes = [pointer] * 3 + [ctypes.c_float] + [size] * 2
    found.silu_mul.argtypes = [pointer] * 2 + [size] * 2
    found.write_cache.argtypes = [pointer] * 7 + [size] * 5
    found.attend.argtypes = [pointer] * 6 + [size] * 6
    for function in (found.rms_norm, found.silu_mul, found.write_cache, found.attend):
        function.restype = None
    return found


class Fast:
    """The model in bf16 on a CPU: 4 products (and LoRA's) and 4 or 5 other calls a block. Shapes: as in model.py, and
    N = B T tokens, n of them with padding."""

    def __init__(self, model):
        self.model, self.c, self.kernels = model, model.config, kernels()
        packed = iter(pack(model))
        made = [Product(group, next(packed)) for block in model.layers for group in products(block)]
        self.blocks = [(block.input_layernorm.weight, block.post_attention_layernorm.weight, *made[4 * i:4 * i + 4])
                       for i, block in enumerate(model.layers)]
        assert all(block[0].dtype == block[1].dtype == torch.bfloat16 for block in self.blocks)
        self.head = next(packed)

    def __call__(self, ids, cache):
        """Final hidden states (B, T, C) of ids (B, T), which continue what the cache holds."""
        c, k, (B, T), positions = self.c, self.kernels, ids.shape, cache.positions(ids.shape[1])
        assert cache.k.is_contiguous() and cache.v.is_contiguous() and int(positions.max()) < cache.max_len
        N, H, K, D = B * T, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        mask = visible(positions, cache.longest) if cache.longest else None
        at = positions.reshape(-1)                                                                  # (N,)
        rows = torch.arange(cache.k.shape[1])[cache.rows].repeat_interleave(T)                      # (N,)
        angles = at[:, None].float() * self.model.inv_freq                                          # (N, D / 2)
        cos, sin, sizes = angles.cos(), angles.sin(), (H, K, D, cache.max_len)
        x = F.pad(self.model.embed(ids).view(N, -1), (0, 0, 0, max(LEAST_ROWS - N, 0)))             # (n, C)
        normed, mixed, hidden = torch.zeros_like(x), x.new_zeros(len(x), H * D), x.new_zeros(len(x), c.intermediate_size)
        for i, (norm_1, norm_2, qkv_proj, o_proj, gate_up_proj, down_proj) in enumerate(self.blocks):
            keys, values = cache.k[i].data_ptr(), cache.v[i].data_ptr()
            k.rms_norm(normed.data_ptr(), x.data_ptr(), norm_1.data_ptr(), c.rms_norm_eps, N, c.hidden_size)
            qkv = qkv_proj(normed)                                                                  # (n, (H + 2 K) D)
            k.write_cache(qkv.data_ptr(), keys, values, cos.data_ptr(), sin.data_ptr(), at.data_ptr(), rows.data_ptr(),
                          N, *sizes)
            if T == 1:
                k.attend(mixed.data_ptr(), qkv.data_ptr(), keys, values, at.data_ptr(), rows.data_ptr(), B, *sizes,
                         cache.longest + 1)
            else:
                q = qkv[:N].view(B, T, -1, D)[:, :, :H].transpose(1, 2)                             # (B, H, T, D)
                y = F.scaled_dot_product_attention(q, *cache.read(i, T), mask, is_causal=mask is None, enable_gqa=True)
                mixed[:N].view(B, T, H, D).copy_(y.transpose(1, 2))
            x = o_proj(mixed, add=x)
            k.rms_norm(normed.data_ptr(), x.data_ptr(), norm_2.data_ptr(), c.rms_norm_eps, N, c.hidden_size)
            gate_up = gate_up_proj(normed)                                                          # (n, 2 I)
            k.silu_mul(hidden.data_ptr(), gate_up.data_ptr(), N, c.intermediate_size)
            x = down_proj(hidden, add=x)
        cache.advance(T)
        k.rms_norm(normed.data_ptr(), x.data_ptr(), self.model.norm.weight.data_ptr(), c.rms_norm_eps, N, c.hidden_size)
        return normed[:N].view(B, T, -1)

    def split_logits(self, hidden):
        """As the model's, of (..., C)."""
        x = hidden.reshape(-1, hidden.shape[-1])
        x = linear(F.pad(x, (0, 0, 0, max(LEAST_ROWS - len(x), 0))), self.head)[:len(x)]            # (N, V)
        return x.float().view(*hidden.shape[:-1], -1), self.model.flag_logits(hidden)


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
    """The frozen weights as oneDNN wants them, four a block and the head; kept for as long as the model lives, and made
    anew where a weight was changed in place (but for changes by way of `.data`, which nothing can see)."""
    groups = [[layer.weight for layer in group] for block in model.layers for group in products(block)]
    groups.append([model.head_weight])
    state = [(w.data_ptr(), None if w.is_inference() else w._version) for group in groups for w in group]
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
