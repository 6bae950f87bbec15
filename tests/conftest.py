"""Tiny random checkpoints, made by transformers and tokenizers, so that every test has a reference beside it."""
import contextlib
import fcntl
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several workers (pytest -n auto), a core each
    torch.set_num_threads(1)

CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYSTEM = "You are tiny"


def write_tokenizer(folder):
    """A ChatML tokenizer whose tokens are the 256 bytes and a few merges; ids 0-2 are control tokens. 265 tokens."""
    from tokenizer import byte_alphabet
    alphabet = list(byte_alphabet().values())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he"]
    tokens = CHATML_SPECIAL + alphabet + [m.replace(" ", "") for m in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, t in enumerate(CHATML_SPECIAL)],
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"chat_template": "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"}))


def write_checkpoint(folder, kind="Llama", seed=0, **settings):
    """Saves a tiny random checkpoint of transformers' `kind` (Llama, Qwen2, Mistral) and returns that model, fp32."""
    import transformers
    config = dict(vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(config | settings))
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases start at 1 and 0, where a mistake would not show
        for name, p in reference.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    reference.save_pretrained(folder)
    return reference


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny ChatML Llama with its tokenizer: what --weights takes."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def model(tiny):
    from model import Llama
    return Llama.from_pretrained(tiny, dtype=torch.float32, device="cpu")


@pytest.fixture
def flagged(model):
    """The tiny model with LoRA and flag rows away from their start, so that they show."""
    model.add_flag(n_flags=1, rank=4, alpha=8, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.flag_parameters().values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.threshold = 0.5
    return model


@pytest.fixture(scope="session")
def tok(tiny):
    from tokenizer import Tokenizer
    return Tokenizer.from_pretrained(tiny)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """A context that one worker at a time is in: what is fetched once is not fetched by two at once."""
    @contextlib.contextmanager
    def lock():
        with open(tmp_path_factory.getbasetemp().parent / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            yield
    return lock


@pytest.fixture(scope="session")
def real():
    """Folder of the real default model, fetched if it is not there; for tests marked `real`."""
    from data.smollm2 import ensure
    return ensure()


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """Folder of a saved adapter whose flag row shows: f lies between 0 and 1 and above 0.001 somewhere."""
    from model import Llama
    model = Llama.from_pretrained(tiny, dtype=torch.float32, device="cpu")
    model.add_flag(n_flags=1, rank=4, alpha=8, seed=1)
    with torch.no_grad():
        for p in model.flag_parameters().values():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    model.threshold = 0.9
    folder = tmp_path_factory.mktemp("adapter")
    model.save_flag(folder)
    return folder


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a script as __main__ in this process: (exit code, stdout, stderr). Nothing is fetched."""
    import decode
    decode.kernels()  # compiled by now
    def call(file, *argv):
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a subprocess was started"))
        monkeypatch.setattr(sys, "argv", [file, *map(str, argv)])
        code = 0
        try:
            runpy.run_path(str(Path(__file__).resolve().parent.parent / file), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        return code, *capsys.readouterr()
    return call
