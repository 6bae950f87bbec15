"""A model that leaves: the flag merged into an ordinary Hugging Face folder, or its adapter in peft's format.

    python export.py --out exported                          # for transformers, vLLM, llama.cpp's converter
    python export.py --out exported --check data/mini/dev.jsonl       # and what that does to f and to the words
    python export.py --out exported --place 128002           # the flag in a reserved token's row: nothing grows
    python export.py --peft exported_peft

The merged folder is an ordinary model of V + F tokens: LoRA is folded into the weights, embedding and head have a row
more for each flag, and the tokenizer knows `<|red_flag|>` as a special token. The head is always a tensor of its own: a
flag's two rows differ, so a tied model leaves untied. What a server needs to read the flag stands in config.json:

    "red_flag": {"token_ids": [49152], "threshold": 0.62, "debounce": 2}

The flag is no end-of-text token by default: a server that stops there could not tell a flag from an end.
Shapes: V words of the checkpoint, F flags, R rows that are written, C hidden, N positions.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from checkpoint import (check_new, new_folder, open_weights, read_json, weight_files, weight_names,
                        write_folder)
from cli import option, parse, run
from data.prepare import read_records
from measures import sustained
from model import Linear, Llama
from objective import by_length, flag_prob, make_example
from packed import read
from tokenizer import FLAG_TEXT, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportConfig:
    adapter: str = option("out", "folder that train.py wrote")
    weights: str | None = option(None, "folder of the original model (default: SmolLM2-135M-Instruct, fetched once)")
    force: bool = option(False, "take the adapter although it was trained on other base weights")
    out: str | None = option(None, "folder to write: the merged model")
    peft: str | None = option(None, "folder to write: the adapter in peft's format")
    dtype: str = option("auto", "of the merged model: float32, bfloat16, float16; auto: the original's")
    pad_to: int = option(1, "rows of embedding and head are filled up to a multiple of this; 64 suits GPUs")
    place: str | None = option(None, "id of a reserved token whose row the flag takes (several: 128002,128003)")
    check: str | None = option(None, "records to compare the merged model with the original and its adapter on")

    def problems(self):
        problems = []
        if self.out is None and self.peft is None:
            problems.append("wanted --out FOLDER for the merged model, --peft FOLDER for the adapter, or both")
        if self.out is None and (self.pad_to != 1 or self.place or self.check or self.dtype != "auto"):
            problems.append("--dtype, --pad-to, --place and --check go with --out")
        if self.dtype not in ("auto", *DTYPES):
            problems.append(f"--dtype is {self.dtype!r}, wanted auto, {', '.join(DTYPES)}")
        if self.pad_to < 1:
            problems.append(f"--pad-to is {self.pad_to}, wanted 1 or more")
        if self.place is not None and not all(x.strip().isdecimal() for x in self.place.split(",")):
            problems.append(f"--place is {self.place!r}, wanted ids of tokens, such as 128002 or 128002,128003")
        return problems


# ----------------------------------------------------------------------------------------------- the merged model

def export(out, weights, adapter="out", dtype="auto", pad_to=1, place=None, force=False):
    """Writes the merged folder `out`; returns its flags' ids. place: ids (a list) of reserved tokens to overwrite.
    Raises ValueError for an adapter of other weights, an id in use, a folder that exists or cannot be written."""
    weights = Path(weights)
    stored = stored_dtype(weights)
    dtype = stored if dtype == "auto" else DTYPES[dtype]
    # in the finer of both, so that W + scale B A is rounded once
    model = Llama.from_pretrained(weights, dtype=torch.promote_types(stored, dtype), device="cpu")
    model.load_flag(adapter, force=force)
    V, tok = model.config.vocab_size, Tokenizer.from_pretrained(weights)
    ids = [V + i for i in range(model.n_flags)] if place is None else check_place(place, model, tok, weights)
    files = flag_tokenizer(weights, ids) | generation_config(weights, tok)
    model.merge_flag()
    tensors = {name: p.to(dtype) for name, p in weight_names(model).items()}
    tensors["lm_head.weight"] = add_rows(model.head_weight, model.flag_unembed, ids, pad_to).to(dtype)
    tensors["model.embed_tokens.weight"] = add_rows(model.embed_tokens.weight, model.flag_embed, ids, pad_to).to(dtype)
    name = "dtype" if "dtype" in read_json(weights / "config.json") else "torch_dtype"  # transformers 5's word, and 4's
    write_folder(out, weights, tensors, files, vocab_size=len(tensors["lm_head.weight"]), tie_word_embeddings=False,
                 red_flag=red_flag(model, ids), **{name: str(dtype).removeprefix("torch.")})
    return ids


def red_flag(model, ids):
    """What a reader of the flag has to know."""
    return {"token_ids": ids, "threshold": model.threshold, "debounce": model.debounce}


def stored_dtype(weights):
    """The dtype that a folder's weights are stored in, by its embedding; ValueError for one that we cannot write."""
    name = "model.embed_tokens.weight"
    file = weight_files(weights).get(name, weights / "model.safetensors")
    handle = open_weights(file)
    found = handle.get_slice(name).get_dtype() if name in handle.keys() else None
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if found not in kinds:
        raise ValueError(f"{file}: {name} is {found or 'missing'}, wanted one of {', '.join(kinds)}")
    return kinds[found]


@torch.no_grad()
def add_rows(words, flags, ids, pad_to):
    """(R, C): the words' rows (V, C) with the flags' (F, C) at their ids, and padding up to a multiple of pad_to.

    A padding row has to be harmless in a head without a bias. A row of zeros has logit 0, which is anything beside the
    words' logits. Its logit under the *mean* of the words' rows is the mean of their logits, and that is at most
    logsumexp - log V (Jensen): no padding row ever takes more than 1/V, wherever the hidden state lies.
    """
    n = max(len(words), max(ids) + 1)
    rows = words.float().mean(0).to(words.dtype).repeat(n + -n % pad_to, 1)                         # (R, C)
    rows[:len(words)] = words
    rows[ids] = flags.to(rows.dtype)
    return rows


def generation_config(weights, tok):
    """{file name: content}: the original's, its ends as a list; where it has none, those of our own sampling loop."""
    file, config = weights / "generation_config.json", read_json(weights / "config.json")
    names = ("bos_token_id", "pad_token_id")
    made = read_json(file) if file.is_file() else {k: config[k] for k in names if config.get(k) is not None}
    ends = made.get("eos_token_id")
    made["eos_token_id"] = tok.stop_ids if ends is None else ends if isinstance(ends, list) else [ends]
    return {file.name: made}


# ------------------------------------------------------------------------------------------------- the tokenizer

def flag_texts(n):
    return [FLAG_TEXT] + [f"{FLAG_TEXT[:-2]}_{i}|>" for i in range(1, n)]  # <|red_flag_1|>


def flag_tokenizer(folder, ids):
    """{file name: content}: the tokenizer's files with the flags as special tokens at `ids`, old ones there renamed."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in {folder}, the file that transformers and vLLM read: put the one of "
                         "the model's Hugging Face repository there")
    tokenizer = read_json(folder / "tokenizer.json")
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    old = {t["id"]: t["content"] for t in added if t["id"] in ids}
    new = dict(zip(ids, flag_texts(len(ids))))
    taken = (set(vocab) | {t["content"] for t in added}) & set(new.values())
    if taken:
        raise ValueError(f"{folder / 'tokenizer.json'} has a token {min(taken)} already: export from the original")
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocab.update({new[i]: vocab.pop(text) for i, text in old.items() if text in vocab})
    added = [t for t in added if t["id"] not in ids] + [{"id": i, "content": text} | entry for i, text in new.items()]
    tokenizer["added_tokens"] = added = sorted(added, key=lambda t: t["id"])
    # `tokenizers` numbers added tokens outside the vocab by itself, one after another: where the rows have gaps (the
    # flag stands behind padding rows, say), their ids hold only if the vocab says them
    outside = [t["id"] for t in added if t["content"] not in vocab]
    if outside != list(range(len(vocab), len(vocab) + len(outside))):
        vocab.update({t["content"]: t["id"] for t in added})
    files = {"tokenizer.json": tokenizer}

    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(i): {"content": text} | entry for i, text in new.items()}
    name = "extra_special_tokens" if "extra_special_tokens" in config else "additional_special_tokens"
    if isinstance(config.get(name, []), list):
        config[name] = [t for t in config.get(name, []) if t not in old.values()] + list(new.values())
    files["tokenizer_config.json"] = config
    if (folder / "added_tokens.json").is_file():
        rest = {t: i for t, i in read_json(folder / "added_tokens.json").items() if i not in ids}
        files["added_tokens.json"] = rest | {text: i for i, text in new.items()}
    return files


def check_place(ids, model, tok, folder):
    """The ids, if they are as many as the flags and their rows are free: special tokens that neither the chat format
    nor any config file uses, or rows without a token. ValueError says which are free."""
    free = free_rows(tok, folder)
    problems = [f"{i} is {tok.decode([i])!r}, an ordinary word" if i in tok.bytes_of else
                f"{i} is {text_of(tok, i)}, which is in use" if i < model.config.vocab_size else
                f"{i} is beyond the last row, {model.config.vocab_size - 1}" for i in ids if i not in free]
    if len(set(ids)) != model.n_flags:
        problems.append(f"{len(set(ids))} different ids came for {model.n_flags} flags")
    if problems:
        some = ", ".join(f"{i} {text_of(tok, i)}" for i in sorted(free)[:8]) or "none"
        raise ValueError(f"--place: {'; '.join(problems)}; free are: {some}{' and more' * (len(free) > 8)}")
    return list(ids)


def text_of(tok, i):
    return next((text for text, id in tok.special.items() if id == i), "a row without a token")


def free_rows(tok, folder):
    """Ids of special tokens that nobody uses, and of rows without a token."""
    tokenizer = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    templates = [f.read_text(encoding="utf-8") for f in folder.glob("*.jinja")]
    said = [json.dumps(tokenizer.get("post_processor"), ensure_ascii=False), *templates]
    used = set(tok.stop_ids) | set(tok.render([{"role": r, "content": ""} for r in ("system", "user", "assistant")])[0])
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        config = read_json(folder / name) if (folder / name).is_file() else {}
        lists = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")  # of all that there are
        said.append(json.dumps({k: v for k, v in config.items() if k not in lists}, ensure_ascii=False))
        for ids in (v for k, v in config.items() if k.endswith("_token_id")):
            used |= set(ids if isinstance(ids, list) else [ids])
    special = {t["content"] for t in tokenizer.get("added_tokens", []) if t["special"]}
    free = {i for text, i in tok.special.items() if text in special and not any(text in s for s in said)} - used
    return free | set(range(tok.flag_id)) - set(tok.special.values()) - set(tok.bytes_of)


# ---------------------------------------------------------------------------------------------------- what it costs

class Exported(Llama):
    """A merged folder read back, for comparison: the flags are among its words, and split_logits takes them out."""

    def split_logits(self, hidden):
        red_flag = read_json(self.path / "config.json")["red_flag"]
        logits, ids = F.linear(hidden, self.head_weight).float(), red_flag["token_ids"]             # (..., R)
        return logits.index_fill(-1, torch.tensor(ids), -torch.inf), logits[..., ids]


@torch.no_grad()
def compare(weights, adapter, out, records, force=False, max_answer=64):
    """How the merged folder differs from the original with its adapter, both in the dtype of the folder, on records'
    answers: largest and mean |f - f'|, answers whose flag changes, and the words' total variation, in [0, 1]."""
    dtype, tok = stored_dtype(Path(out)), Tokenizer.from_pretrained(weights)
    model, exported = (kind.from_pretrained(path, dtype, "cpu") for kind, path in ((Llama, weights), (Exported, out)))
    model.load_flag(adapter, force=force)
    examples = [make_example(tok, r, max_answer, model.config.max_position_embeddings - 1) for r in records]
    moved, varied, before, after = [], [], [], []
    for part in by_length(examples, 16):
        ids, at = [examples[i].ids for i in part], [examples[i].at for i in part]
        for states in zip(read(model, ids, at), read(exported, ids, at)):
            (words, flags), (words2, flags2) = (m.split_logits(h) for m, h in zip((model, exported), states))
            f, f2 = flag_prob(words, flags), flag_prob(words2, flags2)                              # (N,)
            q, q2 = words.softmax(-1), words2.softmax(-1)                                           # (N, V), (N, R)
            varied.append((q - q2[:, :q.shape[1]]).abs().sum(-1) / 2 + q2[:, q.shape[1]:].sum(-1) / 2)
            moved.append((f - f2).abs())
            for known, x in ((before, f), (after, f2)):
                known.append(max(sustained(x.tolist(), model.debounce)) > model.threshold)
    moved, varied = torch.cat(moved), torch.cat(varied)
    return {"dtype": str(dtype).removeprefix("torch."), "answers": len(before), "positions": len(moved),
            "flagged": int(sum(before)), "flagged_exported": int(sum(after)),
            "changed": sum(bool(a != b) for a, b in zip(before, after)),
            "f_max": moved.max().item(), "f_mean": moved.mean().item(),
            "words_max": varied.max().item(), "words_mean": varied.mean().item()}


# -------------------------------------------------------------------------------------------------- peft's format

def export_peft(out, weights, adapter="out", force=False):
    """Writes the adapter as peft reads it: adapter_config.json, adapter_model.safetensors, and flag.json for the
    threshold. It goes onto the original model after resize_token_embeddings(V + F).

    In a tied model peft gives head and embedding the same new rows, if it is asked for the same rows in both: so the
    head's list has one row more, word 0 as it is.
    """
    model = Llama.from_pretrained(weights, dtype=torch.float32, device="cpu")
    info = model.load_flag(adapter, force=force)
    if info["rank"] == 0:
        raise ValueError(f"the adapter in {adapter} has rank 0, no LoRA, and peft's LoRA format cannot say rows alone: "
                         "write the merged model with --out")
    ids = list(range(model.config.vocab_size, model.config.vocab_size + model.n_flags))
    rows = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    tensors = {f"base_model.model.model.{n}.weight": p for n, p in model.flag_parameters().items() if "lora_" in n}
    tensors[rows.format("model.embed_tokens")] = model.flag_embed                                   # (F, C)
    tensors[rows.format("lm_head")] = torch.cat([model.head_weight[:1], model.flag_unembed])        # (1 + F, C)
    linears = {name.split(".")[-1] for name, m in model.layers[0].named_modules() if isinstance(m, Linear)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(weights),
              "inference_mode": True, "r": info["rank"], "lora_alpha": info["alpha"], "lora_dropout": 0.0,
              "bias": "none",
              "target_modules": sorted(linears), "layers_pattern": "layers",
              "layers_to_transform": list(range(model.n_frozen, len(model.layers))),
              "trainable_token_indices": {"embed_tokens": ids, "lm_head": [0, *ids]}}
    with new_folder(out) as made:
        for name, value in (("adapter_config.json", config), ("flag.json", red_flag(model, ids))):
            (made / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, made / "adapter_model.safetensors")


# --------------------------------------------------------------------------------------------------------- main

def main():
    config = parse(ExportConfig, sys.argv[1:], __doc__)
    for folder in filter(None, (config.out, config.peft)):
        check_new(folder)
    records = read_records(config.check) if config.check else None
    if config.weights is None:
        from data.smollm2 import ensure
    weights = Path(config.weights or ensure())
    if config.out:
        place = [int(x) for x in config.place.split(",")] if config.place else None
        ids = export(config.out, weights, config.adapter, config.dtype, config.pad_to, place, config.force)
        print(f"merged model in {config.out}: {', '.join(flag_texts(len(ids)))} is token {', '.join(map(str, ids))}")
    if records:
        c = compare(weights, config.adapter, config.out, records, config.force)
        print(f"against the original and its adapter in {c['dtype']}: "
              f"{c['answers']} answers, {c['positions']} positions")
        print(f"|f - f'|                 at most {c['f_max']:.1e}, mean {c['f_mean']:.1e}")
        print(f"words' total variation   at most {c['words_max']:.1e}, mean {c['words_mean']:.1e}")
        print(f"answers flagged          {c['flagged']}, then {c['flagged_exported']}; {c['changed']} changed")
    if config.peft:
        export_peft(config.peft, weights, config.adapter, config.force)
        print(f"adapter for peft in {config.peft}")


if __name__ == "__main__":
    run(main)
