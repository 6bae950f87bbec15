"""The model against transformers, files that are no good, and the cache against the model without it."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import pick_device, pick_dtype, weights_hash
from cache import Cache
from conftest import write_checkpoint
from model import Llama, LlamaConfig, attend, visible

V = 272  # words of the tiny checkpoints
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # with 12 pairs: one kept, two blended, nine stretched
EVERYTHING = dict(head_dim=24, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                  rope_parameters=LLAMA3, rms_norm_eps=1e-3, num_hidden_layers=3)
KINDS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "key heads 1": ("Llama", {"num_key_value_heads": 1}),
    "key heads 4": ("Llama", {"num_key_value_heads": 4}),
    "head_dim 24": ("Llama", {"head_dim": 24}),
    "head_dim 6": ("Llama", {"head_dim": 6}),
    "theta 500": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "attention_bias": ("Llama", {"attention_bias": True}),
    "mlp_bias": ("Llama", {"mlp_bias": True}),
    "eps": ("Llama", {"rms_norm_eps": 0.1}),
    "everything": ("Llama", EVERYTHING),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "qwen2 window switched off": ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral head_dim": ("Mistral", {"sliding_window": None, "head_dim": 24, "rope_parameters": LLAMA3}),
    "mistral window as long as the context": ("Mistral", {"sliding_window": 256}),
}


def load(folder, dtype=torch.float32):
    return Llama.from_pretrained(folder, dtype=dtype, device="cpu")


def some_ids(rows=2, n=64, seed=0, below=V):
    return torch.randint(0, below, (rows, n), generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, cache=None):
    with torch.no_grad():
        return model.logits(model(ids, cache))


def assert_near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def shake(model, seed=2):
    """Moves the adapter away from its start, so that it shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.flag_parameters().values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def edit_json(path, **changes):
    """Sets keys of a JSON file; a value of None removes the key."""
    d = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in d.items() if v is not None}))


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


# ------------------------------------------------------------------------------- logits equal transformers'

@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_transformers(name, tmp_path):
    kind, settings = KINDS[name]
    reference = write_checkpoint(tmp_path, kind, **settings)
    model, ids = load(tmp_path), some_ids()
    with torch.no_grad():
        wanted = reference(ids).logits
    assert_near(logits_of(model, ids), wanted, 1e-4)
    assert_near(model.logits(model(ids)), wanted, 1e-4)  # with gradients on, attention takes another path


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "rope_scaling with type", "both"])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 700.0}, LINEAR, LLAMA3],
                         ids=lambda rope: rope["rope_type"])
def test_rope_is_read_in_every_spelling(rope, spelling, tmp_path):
    reference = write_checkpoint(tmp_path, rope_parameters=rope, head_dim=24)
    old = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "type" in spelling.split():
        old["type"] = old.pop("rope_type")
    changes = {"rope_parameters": rope} if spelling in ("rope_parameters", "both") else {"rope_parameters": None}
    if spelling != "rope_parameters":
        plain = spelling == "rope_scaling" and rope["rope_type"] == "default"  # the usual config has null there
        changes |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else old}
    edit_json(tmp_path / "config.json", **changes)
    with torch.no_grad():
        assert_near(logits_of(load(tmp_path), some_ids()), reference(some_ids()).logits, 1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_load_through_their_index_and_hash_like_one_file(tied, tmp_path):
    reference = write_checkpoint(tmp_path / "one", tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert_near(logits_of(load(tmp_path / "shards"), some_ids()), reference(some_ids()).logits, 1e-4)
    assert weights_hash(tmp_path / "one") == weights_hash(tmp_path / "shards")
    change_tensors(lambda t: t["model.layers.1.mlp.up_proj.weight"][3].add_(1e-3))(tmp_path / "one")
    assert weights_hash(tmp_path / "one") != weights_hash(tmp_path / "shards")


@pytest.mark.parametrize("name", ["llama", "everything", "qwen2", "mistral"])
def test_bf16_is_as_transformers_bf16(name, tmp_path):
    import transformers
    kind, settings = KINDS[name]
    exact = write_checkpoint(tmp_path, kind, **settings)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model, ids = load(tmp_path, torch.bfloat16), some_ids()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours, theirs, true = logits_of(model, ids), reference(ids).logits.float(), exact(ids).logits
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().mean() < 0.01 and (ours - true).abs().mean() < 1.2 * (theirs - true).abs().mean()


def test_names_that_may_be_left_over_are_let_through(tmp_path):
    """lm_head.weight written out though tied, and the rotary buffer of old files."""
    reference = write_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_near(logits_of(load(tmp_path), some_ids()), reference(some_ids()).logits, 1e-4)


# ----------------------------------------------------------------------------------- errors name the thing

CONFIG_ERRORS = [
    ({"model_type": "gpt2"}, "gpt2.*supported"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "gelu.*supported"),
    ({"model_type": "phi", "hidden_act": "relu"}, "phi.*relu"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*supported"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic.*supported"),
    ({"rope_parameters": {"rope_type": "linear"}}, "linear.*factor"),
    ({"rope_parameters": LLAMA3 | {"rope_type": "longrope"}}, "longrope"),
    ({"model_type": "mistral", "sliding_window": 64}, "sliding window of 64"),
    ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding window of 4096"),  # Mistral's default
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, "window of 64"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_position_embeddings": 8192, "max_window_layers": 0},
     "sliding window of 4096"),  # Qwen2's default
    ({"hidden_size": None}, "hidden_size"),
    ({"vocab_size": "many"}, "vocab_size.*many"),
    ({"num_key_value_heads": 3}, "4 attention heads.*3"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads"),
    ({"head_dim": -8}, "head_dim"),
    ({"rope_parameters": "linear"}, "rope_parameters"),
    ({"rope_parameters": LINEAR | {"factor": "4"}}, "factor"),
    ({"rope_parameters": LINEAR | {"rope_theta": "high"}}, "rope_theta"),
]


@pytest.mark.parametrize("changes, message", CONFIG_ERRORS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_config_that_is_not_supported_is_an_error(copy, changes, message):
    edit_json(copy / "config.json", **changes)
    with pytest.raises(ValueError, match=f"(?s)config.json.*{message}"):
        load(copy)


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return spoil


def tie(lm_head, embedding=True):
    def spoil(folder):
        edit_json(folder / "config.json", tie_word_embeddings=True)
        change_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + lm_head}))(folder)
        change_tensors(lambda t: embedding or t.pop("model.embed_tokens.weight"))(folder)
    return spoil


def cut(name, n_bytes=-100):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


def index(weight_map=None, **moved):
    """An index beside the one file, true but for what is moved."""
    def spoil(folder):
        names = {name: "model.safetensors" for name in load_file(folder / "model.safetensors")} | moved
        text = json.dumps({"weight_map": names if weight_map is None else weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


FILE_ERRORS = {
    "missing tensor": (change_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "extra tensor": (change_tensors(lambda t: t.update({"model.layers.9.x": torch.ones(2)})), "model.layers.9.x"),
    "misshapen tensor": (change_tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
                         r"model.norm.weight.*\[31\].*\[32\]"),
    "truncated weights": (cut("model.safetensors"), "model.safetensors"),
    "weights cut in the header": (cut("model.safetensors", 20), "model.safetensors"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "truncated config": (cut("config.json", -9), "config.json"),
    "config is a list": (write("config.json", "[1]"), "config.json.*list"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no folder": (lambda folder: shutil.rmtree(folder), "config.json"),
    "index names a tensor its shard lacks": (index(**{"model.extra": "model.safetensors"}), "model.extra"),
    "index names a shard that is not there": (index(**{"model.norm.weight": "b.safetensors"}), "b.safetensors"),
    "index lacks a tensor": (index({}), "is missing"),
    "index leaves tensors of its shard out": (index({"model.norm.weight": "model.safetensors"}), "does not put"),
    "index is cut": (write("model.safetensors.index.json", '{"weight'), "index.json"),
    "index maps nothing": (index(["model.safetensors"]), "index.json"),
    "tied, and another head": (tie(0.1), "lm_head.weight"),
    "tied, and no embedding": (tie(0, embedding=False), "embed_tokens.weight"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_a_damaged_checkpoint_is_an_error(copy, name):
    spoil, message = FILE_ERRORS[name]
    spoil(copy)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(copy)


def test_automatic_device_and_dtype_fit_the_machine(tiny):
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else
                                  "mps" if torch.backends.mps.is_available() else "cpu")
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    assert pick_dtype(torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)
    model = Llama.from_pretrained(tiny)
    assert model.lm_head.weight.device.type == pick_device().type
    assert model.lm_head.weight.dtype == pick_dtype(pick_device())


@pytest.mark.parametrize("cpu, one, many", [
    ({}, torch.float32, torch.float32),
    ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, torch.bfloat16),    # Intel: Sapphire Rapids
    ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, torch.float32),    # the same, as some clouds lend it
    ({"avx512_bf16": True, "sse4a": True}, torch.bfloat16, torch.bfloat16)],      # AMD: Zen 4
    ids=["none", "AMX", "Intel without AMX", "AMD"])
def test_many_tokens_are_read_in_what_the_machine_multiplies_fastest(monkeypatch, cpu, one, many):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu)
    assert pick_dtype(torch.device("cpu")) == one
    assert pick_dtype(torch.device("cpu"), many=True) == many


# ------------------------------------------------------------------------------------------ peak memory

MEASURE = """
import os, sys, torch
from model import Llama
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
def load(folder): return Llama.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
for folder in sys.argv[2:]:
    if not (child := os.fork()):  # a process of its own, for a peak of its own
        load(sys.argv[1])  # whatever the first load brings in for good
        before = peak()
        size = sum(p.nbytes for p in load(folder).parameters())
        print((peak() - before) / size, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(tiny, tmp_path):
    """150 MB of bf16: from one file, from shards, and from fp32; the head is an eighth of it."""
    config = dict(model_type="llama", vocab_size=18000, hidden_size=512, intermediate_size=2048, num_hidden_layers=13,
                  num_attention_heads=8)
    with torch.device("meta"):
        shapes = {("" if n.startswith("lm_head") else "model.") + n: p.shape
                  for n, p in Llama(LlamaConfig.from_dict(config)).named_parameters()}
    folders = [tmp_path / name for name in ("bf16", "shards", "fp32")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {n: torch.ones(s, dtype=torch.float32 if folder.name == "fp32" else torch.bfloat16)
                   for n, s in shapes.items()}
        if folder.name != "shards":
            save_file(tensors, folder / "model.safetensors")
            continue
        files = {n: f"model-{i % 3}.safetensors" for i, n in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in tensors if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    del tensors
    command = [sys.executable, "-c", MEASURE, tiny, *folders]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    peaks = [float(x) for x in result.stdout.split()]
    for folder in folders:
        shutil.rmtree(folder)
    assert len(peaks) == 3, result.stderr
    assert 1 <= min(peaks) and max(peaks) <= 1.2, dict(zip(("bf16", "shards", "fp32"), peaks))


# ------------------------------------------------------------------------------------------------- cache

@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 7], [1, 11], [11, 1], [4, 1, 1, 6], [3, 3, 3, 3]], ids=str)
def test_cached_decode_equals_the_full_forward_at_every_position(flagged, chunks):
    ids = some_ids(3, 12, below=V + 1)
    ids[:, 4] = V  # the flag is read like any other token
    cache = Cache(flagged, 3, 12)
    pieces = [logits_of(flagged, chunk, cache) for chunk in ids.split(chunks, dim=1)]
    assert_near(torch.cat(pieces, 1), logits_of(flagged, ids))


PROMPTS, GOING_ON = [3, 7, 1, 5], [[1], [2, 3], [1, 1, 1]]  # tokens of each row; chunks they go on by


@pytest.mark.parametrize("chunks", GOING_ON, ids=str)
@pytest.mark.parametrize("keep", [None, [2, 0], [1], [0, 1, 3]], ids=str)
def test_ragged_rows_equal_rows_alone(flagged, keep, chunks):
    rows = [some_ids(1, n + sum(chunks), seed=n, below=V + 1)[0] for n in PROMPTS]
    padded = some_ids(4, max(PROMPTS), seed=9)  # what stands in the padding must not matter
    for row, n, ids in zip(padded, PROMPTS, rows):
        row[:n] = ids[:n]
    cache, lengths = Cache(flagged, 4, max(PROMPTS) + sum(chunks)), list(PROMPTS)
    first = logits_of(flagged, padded, cache)
    cache.crop(lengths)
    for i, n in enumerate(lengths):
        assert_near(first[i, :n], logits_of(flagged, rows[i][None, :n])[0])
    if keep is not None:
        cache.keep(keep)
        rows, lengths = [rows[i] for i in keep], [lengths[i] for i in keep]
    for n_new in chunks:
        new = torch.stack([row[n:n + n_new] for row, n in zip(rows, lengths)])
        found = logits_of(flagged, new, cache)
        lengths = [n + n_new for n in lengths]
        assert cache.lengths.tolist() == lengths
        for i, n in enumerate(lengths):
            assert_near(found[i], logits_of(flagged, rows[i][None, :n])[0, -n_new:])


@pytest.mark.parametrize("n_kept", [0, 1, 6, 10])
def test_crop_and_go_on_equals_a_fresh_prefill(model, n_kept):
    ids, other = some_ids(2, 10), some_ids(2, 5, seed=1)
    cache = Cache(model, 2, 15)
    logits_of(model, ids, cache)
    cache.crop([n_kept] * 2)
    fresh = logits_of(model, torch.cat([ids[:, :n_kept], other], 1))[:, n_kept:]
    assert_near(logits_of(model, other, cache), fresh)


@pytest.mark.parametrize("lengths", [[6, 6], [2, 6]], ids=str)
def test_more_tokens_than_the_cache_holds_are_an_error_and_change_nothing(model, lengths):
    ids = some_ids(2, 11)
    cache = Cache(model, 2, 8)
    logits_of(model, ids[:, :6], cache)
    cache.crop(lengths)
    with pytest.raises(ValueError, match="cache holds 8.*6.*3"):
        model(ids[:, 6:9], cache)
    found = logits_of(model, ids[:, 6:8], cache)
    for i, n in enumerate(lengths):
        alone = torch.cat([ids[i, :n], ids[i, 6:8]])[None]
        assert_near(found[i], logits_of(model, alone)[0, n:])


@pytest.mark.parametrize("grad", [True, False])
def test_a_token_changes_no_logits_before_it(flagged, grad):
    ids = some_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = V
    with torch.set_grad_enabled(grad):
        a, b = (flagged.logits(flagged(x)) for x in (ids, changed))
    assert torch.equal(a[:, :7], b[:, :7]) and ((a - b).abs().amax(-1) > 1e-3)[0, 7:].all()


@pytest.mark.parametrize("seen", ["causal", "one start", "a start a row"])
@pytest.mark.parametrize("K", [1, 3, 6])
def test_attention_with_gradients_is_the_librarys(seen, K):
    torch.manual_seed(0)
    B, H, T, D = 2, 6, 5, 4
    starts = {"causal": None, "one start": [[3]], "a start a row": [[3], [1]]}[seen]
    mask = None if starts is None else visible(torch.tensor(starts) + torch.arange(T), 3)   # (1 or B, 1, T, S)
    S = T if mask is None else mask.shape[3]
    q, k, v = (torch.randn(B, n, m, D, dtype=torch.float64, requires_grad=True) for n, m in ((H, T), (K, S), (K, S)))
    wide = [x.repeat_interleave(H // K, dim=1) for x in (k, v)]
    reference = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=mask, is_causal=mask is None)
    found = attend(q, k, v, mask)
    torch.testing.assert_close(found, reference)
    weights = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (found, reference))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_final_states_of_some_places_are_those_of_all(model, first):
    x, keep = torch.randn(2, 7, model.config.hidden_size), torch.tensor([5, 0, 5, 6])
    assert len(model.layers) == 2  # first = 2: no block runs at all
    torch.testing.assert_close(model(x, first=first, keep=keep), model(x, first=first)[:, keep])
