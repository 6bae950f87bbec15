"""Fast reading on a CPU against model.forward and against PyTorch's own operators, in bf16."""
import subprocess

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import decode
from cache import Cache
from conftest import write_checkpoint
from model import Llama, RMSNorm, rotate
from sample import generate

pytestmark = pytest.mark.skipif(decode.kernels() is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                                reason="no C compiler, or a CPU without bf16")
many = settings(max_examples=40, deadline=None, derandomize=True, database=None)
random = lambda seed, *shape, scale=1.0: scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(y, wanted):
    """Within one rounding to bf16's 8 bits of the result in doubles (and of the intermediate ones)."""
    torch.testing.assert_close(y.double(), wanted.double(), atol=2e-3, rtol=2 ** -7)


@many
@given(st.integers(1, 9), st.integers(1, 70), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_rms_norm(B, C, scale, seed):
    x, norm = random(seed, B, C, scale=scale).bfloat16(), RMSNorm(C, 1e-5).bfloat16()
    norm.weight.data = random(seed + 1, C).bfloat16()
    y = torch.empty_like(x)
    decode.kernels().rms_norm(y.data_ptr(), x.data_ptr(), norm.weight.data_ptr(), 1e-5, B, C)
    close(y, F.rms_norm(x.double(), (C,), norm.weight.double(), 1e-5))
    assert (y == norm(x)).float().mean() > 0.9  # the same roundings in the same places, but for the order of a sum


@many
@given(st.integers(1, 9), st.integers(1, 70), st.floats(1e-2, 60), st.integers(0, 99))
def test_silu_mul(B, I, scale, seed):
    gate_up, y = random(seed, B, 2 * I, scale=scale).bfloat16(), torch.empty(B, I, dtype=torch.bfloat16)
    decode.kernels().silu_mul(y.data_ptr(), gate_up.data_ptr(), B, I)
    gate, up = gate_up.double().chunk(2, -1)
    close(y, F.silu(gate) * up)


@many
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 4),
       st.sampled_from([2, 16, 64, 128]), st.integers(0, 99))
def test_attend(at, K, G, D, seed):
    B, H, max_len, at = len(at), K * G, 41, torch.tensor(at)
    qkv = random(seed, B, (H + 2 * K) * D).bfloat16()
    keys, values = (random(seed + i, B, K, max_len, D).bfloat16() for i in (1, 2))
    angles, y = random(seed + 3, B, D // 2), torch.empty(B, H * D, dtype=torch.bfloat16)
    cos, sin, given = angles.cos(), angles.sin(), qkv.clone()
    b = torch.randperm(B + 1, generator=torch.Generator().manual_seed(seed))[:B]  # of the rows of a larger cache
    keys, values = (torch.cat([x, x[:1]]) for x in (keys, values))
    before = keys.clone(), values.clone()
    pointers = lambda *tensors: [x.data_ptr() for x in tensors]
    decode.kernels().write_cache(*pointers(qkv, keys, values, cos, sin, at, b), B, H, K, D, max_len)
    decode.kernels().attend(*pointers(y, qkv, keys, values, at, b), B, H, K, D, max_len, int(at.max()) + 1)
    heads = given.view(B, H + 2 * K, 1, D).double()
    turned = rotate(heads, *(x.double().repeat(1, 2)[:, None, None] for x in (cos, sin)))
    close(keys[b, :, at], turned[:, H:H + K, 0])
    assert torch.equal(values[b, :, at], given.view(B, H + 2 * K, D)[:, H + K:])
    for x, old in zip((keys, values), before):  # nothing else has been written
        old[b, :, at] = x[b, :, at]
        assert torch.equal(x, old)
    mask = (torch.arange(max_len) <= at[:, None])[:, None, None]
    wanted = F.scaled_dot_product_attention(turned[:, :H], keys[b].double(), values[b].double(), mask, enable_gqa=True)
    torch.testing.assert_close(y.double(), wanted.reshape(B, -1), atol=2e-2, rtol=2e-2)


@pytest.fixture
def half(tiny):
    return Llama.from_pretrained(tiny, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize("kind, config", [("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Qwen2", {}),
                                          ("Llama", {"attention_bias": True, "mlp_bias": True})])
@pytest.mark.parametrize("rank, B", [(None, 1), (0, 3), (4, 3), (4, 6)])
def test_it_errs_no_more_than_the_forward_pass_in_bf16(tmp_path, kind, config, rank, B):
    write_checkpoint(tmp_path, kind, **config)
    exact, model = (Llama.from_pretrained(tmp_path, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    for m in (exact, model) if rank is not None else ():
        m.add_flag(2, rank, layers=1)
        with torch.no_grad():
            for i, p in enumerate(m.flag_parameters().values()):
                p.copy_(random(i, *p.shape, scale=0.1))
    lengths = [5, 1, 9, 4, 7, 2][:B]
    ids = torch.randint(3, 200, (B, 12), generator=torch.Generator().manual_seed(1))
    found, errors = {}, {}
    with torch.no_grad():
        for name, m in (("exact", exact), ("plain", model), ("fast", decode.fast(model))):
            cache = Cache(model if name == "fast" else m, B + 1, 20)
            part, found[name] = cache.part(list(range(B, 0, -1)), [0] * B), []
            for t, n in ((0, 9), (9, 1), (10, 1), (11, 3)):  # a prompt, steps from there, and several tokens at once
                hidden = m(ids[:, t:t + n], part)
                found[name].append(torch.cat(m.split_logits(hidden[:, -2:]), -1))
                if t == 0:
                    part.crop(lengths)
    assert isinstance(decode.fast(model), decode.Fast)
    for name in ("plain", "fast"):
        errors[name] = torch.stack([(a - b).square().mean() for a, b in zip(found[name], found["exact"])]).mean().sqrt()
    assert found["fast"][0].shape == found["exact"][0].shape and found["fast"][0].dtype == torch.float32
    assert errors["fast"] < 1.25 * errors["plain"] < 0.1 * found["exact"][0].std()


def test_it_follows_the_adapter_and_the_weights(half):
    model = half
    def words():
        cache = Cache(model, 1, 8)
        with torch.no_grad():
            reader = decode.fast(model)
            return reader.split_logits(reader(torch.tensor([[5, 9, 4]]), cache)[:, -1])
    base, no_flags = words()
    assert no_flags.shape == (1, 0)
    model.add_flag(rank=4)
    with torch.no_grad():
        for layer in model.block_linears():
            layer.lora_B.fill_(0.1)
    tuned, flags = words()
    assert flags.shape == (1, 1) and not torch.equal(tuned, base)
    with model.flag_off():
        assert torch.equal(words()[0], base) and words()[1].shape == (1, 0)
    model.merge_flag()
    merged = words()[0]
    torch.testing.assert_close(merged, tuned, atol=0.15, rtol=0.05)
    assert not torch.equal(merged, base)


def test_it_reads_in_inference_mode(tiny):
    with torch.inference_mode():
        model = Llama.from_pretrained(tiny, dtype=torch.bfloat16, device="cpu")
        assert decode.fast(model)(torch.tensor([[5, 9]]), Cache(model, 1, 8)).shape == (1, 2, 32)


def test_answers_of_rows_that_come_and_go(half, tok):
    """Rows dropped and rows begun: the words are those that model.forward gives, but for its rounding."""
    model = half
    prompts = ["hello", "a", "What is this?", "the", "x y z", "b"]
    answers = list(generate(model, tok, prompts, "off", 20, batch_size=3))
    for prompt, a in zip(prompts, answers):
        ids = torch.tensor([tok.render(prompt)[0] + a.tokens])
        with torch.no_grad():
            logits = model.logits(model(ids))[0, -len(a.tokens) - 1:-1]
        chosen = logits.gather(-1, torch.tensor(a.tokens)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() < 0.05 * logits.std()  # likeliest, or within rounding of it


@pytest.mark.parametrize("broken", ["no compiler", "an error in the compiler", "nowhere to write"])
def test_without_a_compiler_the_model_itself_reads(half, monkeypatch, capsys, broken):
    decode.kernels.cache_clear()
    def fail(command, **_):
        if broken == "no compiler":
            raise FileNotFoundError(f"no {command[0]}")
        raise subprocess.CalledProcessError(1, command, stderr="decode.c: cannot find omp.h\nmore")
    try:
        with monkeypatch.context() as m:
            m.setattr(subprocess, "run", fail)
            if broken == "nowhere to write":
                m.setattr(decode.tempfile, "TemporaryDirectory", lambda: fail(["tmp"]))
            assert decode.fast(half) is half
            assert decode.fast(half) is half
        err = capsys.readouterr().err
        assert err.count("half the speed") == 1 and ("omp.h" in err) == (broken != "no compiler")
    finally:
        decode.kernels.cache_clear()
