"""Training records larger than memory: tokenised once, into arrays that are mapped and not read.

    examples = open_store("train.jsonl", "data/tokens", weights, tok, max_answer=64, context=8191)
    len(examples), examples[i]      # Examples, as objective.make_example gives them

A store is a folder: tokens.bin, all ids one behind the other; records.bin, a RECORD for each example; store.json. Its
name holds a hash of all that its content depends on, so what is there is used again, and nothing is ever stale.
"""
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from checkpoint import read_json
from cli import parse_line, read_lines
from data.prepare import LABELS, check_record
from objective import Example, make_example

ROOT = Path(__file__).resolve().parent.parent
# what decides how a record becomes ids: the tokenizer's files, and our own code
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
OUR_FILES = ("cli.py", "objective.py", "tokenizer.py", "data/prepare.py", "data/store.py")
# end: place in tokens.bin behind the example's last id; n_prompt is the mask: the answer is what lies behind it
# kind: place in store.json's list of kinds, pairs of label and category
RECORD = np.dtype([("end", "<i8"), ("n_prompt", "<i4"), ("label", "u1"), ("opening", "?"), ("kind", "<u4")])


class Store:
    """A finished store as a sequence of Examples; of its arrays only what is asked for comes into memory."""

    def __init__(self, folder):
        self.info = info = read_json(Path(folder) / "store.json")
        self.digest, self.skipped = info["records_sha256"], info["skipped"]  # the first of the whole JSON Lines file
        self.kinds = [tuple(kind) for kind in info["kinds"]]  # (label, category), as an Example's kind counts them
        try:
            self.tokens = np.memmap(Path(folder) / "tokens.bin", info["dtype"], "r", shape=info["tokens"])
            self.records = np.memmap(Path(folder) / "records.bin", RECORD, "r", shape=info["records"])
        except (OSError, ValueError) as e:
            raise ValueError(f"the tokens in {folder} are damaged ({e}): delete that folder") from None

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        i = range(len(self))[i]  # negative ones count from the end; IndexError behind it
        record = self.records[i]
        begin = int(self.records[i - 1]["end"]) if i else 0
        return Example(self.tokens[begin:int(record["end"])].tolist(), int(record["n_prompt"]),
                       LABELS[record["label"]], bool(record["opening"]), int(record["kind"]))

    def labels(self):
        return {LABELS[i] for i in np.unique(self.records["label"])}

    def count(self, label):
        return int((self.records["label"] == LABELS.index(label)).sum())


def open_store(source, cache, weights, tok, max_answer, context, skip_bad=False):
    """The Store of a JSON Lines file in the folder `cache`, written first where it is not there yet.

    Raises ValueError with file and line for the first record that cannot be trained on (no JSON, no UTF-8, wrong
    fields, no response, a prompt too long for the context); with skip_bad each is reported and left out.
    """
    digest = sha256(source)
    key = hashlib.sha256(json.dumps([
        digest, max_answer, context, skip_bad, [sha256(ROOT / name) for name in OUR_FILES],
        [sha256(Path(weights) / name) for name in TOKENIZER_FILES if (Path(weights) / name).is_file()]]).encode())
    name = f"{Path(source).stem}-{key.hexdigest()[:16]}"
    folder, unfinished = Path(cache) / name, Path(cache) / f"{name}.unfinished"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process writes, others wait and use it; a killed one lets go
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed: we hold the lock
            unfinished.mkdir()
            info = write(unfinished, source, tok, max_answer, context, skip_bad)
            (unfinished / "store.json").write_text(json.dumps(info | {"records_sha256": digest}), encoding="utf-8")
            os.rename(unfinished, folder)
    return Store(folder)


def sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e}") from None


def write(folder, source, tok, max_answer, context, skip_bad):
    """Writes tokens.bin and records.bin; returns what store.json holds."""
    dtype = "<u2" if max(tok.flag_ids) < 2**16 else "<u4"
    n_tokens, n_records, n_skipped, kinds = 0, 0, 0, {}
    progress = Progress(source)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "records.bin", "wb") as records:
        for number, line in read_lines(source):
            try:
                example, category = read_example(tok, line, f"{source}:{number}", max_answer, context)
            except ValueError as e:
                if not skip_bad:
                    raise ValueError(f"{e} (--skip-bad leaves such records out)") from None
                n_skipped += 1
                tell(f"skipped: {' '.join(str(e).split())}")
            else:
                n_tokens, n_records = n_tokens + len(example.ids), n_records + 1
                tokens.write(np.array(example.ids, dtype).tobytes())
                kind = kinds.setdefault((example.label, category), len(kinds))
                record = n_tokens, example.n_prompt, LABELS.index(example.label), example.opening, kind
                records.write(np.array(record, RECORD).tobytes())
            progress.add(line, n_records)
    if not n_records:
        raise ValueError(f"{source} is empty: wanted one JSON object a line" if not n_skipped else
                         f"{source}: all of its {n_skipped} records are bad")
    if n_skipped:
        tell(f"{source}: skipped {n_skipped:,} bad records of {n_skipped + n_records:,}")
    return {"dtype": dtype, "tokens": n_tokens, "records": n_records, "skipped": n_skipped, "kinds": list(kinds)}


def read_example(tok, line, where, max_answer, context):
    """(Example, category) of one line; ValueError with `where` if it cannot be trained on."""
    record = check_record(parse_line(line, where), where)
    if not record["response"]:
        raise ValueError(f"{where}: a record without a response: python data/prepare.py --generate writes them")
    try:
        return make_example(tok, record, max_answer, context), record["category"]
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


class Progress:
    """How far a long reading has come, a line on stderr every ten seconds."""

    def __init__(self, source):
        self.source, self.n_bytes, self.done = source, os.path.getsize(source), 0
        self.began = self.told = time.monotonic()

    def add(self, line, n_records):
        self.done += len(line.encode("utf-8", "surrogateescape"))
        now = time.monotonic()
        if now - self.told >= 10:
            self.told, left = now, (now - self.began) * (self.n_bytes / self.done - 1)
            tell(f"tokenising {self.source}: {n_records:,} records, {self.done / self.n_bytes:.0%}, {left / 60:.1f} min left")


def tell(text):
    """As cli.say, but by any of several processes: who writes the store need not be the first."""
    print(text, file=sys.stderr, flush=True)
