"""Turns public data sets into this project's record format, and writes the model's own answers where one is missing.

    python data/prepare.py --input advbench.csv --format advbench --output advbench.jsonl --generate
    python data/prepare.py --input prompts.jsonl --format records --output data/mini/train.jsonl --generate --direct

A record: {"prompt": text or chat messages, "response": the whole answer, "opening": its first words where they were put
into the model's mouth (else ""), "label": "harmful", "borderline" or "benign", "category": text}.
A malformed input is reported with file and line, and then nothing is written.
"""
import csv
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cli import check_text, option, parse, read_jsonl, run

FIELDS = ("prompt", "response", "opening", "label", "category")
LABELS = ("harmful", "borderline", "benign")


def read_records(path):
    """The records of a JSON Lines file, each checked. Raises ValueError naming file and line."""
    return [check_record(record, f"{path}:{line}") for line, record in read_jsonl(path)]


def check_record(record, where):
    if set(record) != set(FIELDS):
        raise ValueError(f"{where}: fields are {sorted(record)}, wanted exactly {sorted(FIELDS)}")
    wrong = [k for k in FIELDS[1:] if not isinstance(record[k], str)]
    if wrong or record["label"] not in LABELS:
        raise ValueError(f"{where}: {', '.join(wrong) or 'label'} is {record[(wrong or ['label'])[0]]!r}, wanted "
                         + ("text" if wrong else f"one of {', '.join(LABELS)}"))
    check_prompt(record["prompt"], where)
    if record["response"] and not record["response"].startswith(record["opening"]):
        raise ValueError(f"{where}: the response does not begin with its opening")
    return record


def check_prompt(prompt, where):
    from tokenizer import check_messages
    try:
        messages = check_messages(prompt)
    except ValueError as e:
        raise ValueError(f"{where}: prompt: {e}") from None
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"{where}: the prompt does not end with what a user says")


def read_requests(path, label):
    """The records of a file that go by `label`, as requests: prompt, category, opening, the model's own answers
    ("own": without the opening, "response": with it), and a reference answer ("reference").

    A file in the project's own format holds the model's own answers. Others have prompt and, if they like, openings,
    category, translation, label (one of ours, or XSTest's safe, unsafe) and response, somebody's reference answer.
    """
    requests = {}
    for line, r in read_jsonl(path):
        ours = set(r) == set(FIELDS)
        if ours:
            check_record(r, f"{path}:{line}")
        its = r.get("label", label)
        its = {"safe": "borderline", "unsafe": "harmful"}.get(its, its) if isinstance(its, str) else its
        if its not in LABELS:
            raise ValueError(f"{path}:{line}: label {its!r}, wanted one of {', '.join(LABELS)}, safe or unsafe")
        if its != label:
            continue
        check_prompt(r.get("prompt"), f"{path}:{line}")
        openings = r.get("openings") or [r.get("opening") or ""]
        if not isinstance(openings, list):
            raise ValueError(f"{path}:{line}: openings is {openings!r:.40}, wanted a list of texts")
        texts = [openings[0], r.get("response", ""), r.get("translation", ""), r.get("category", "")]
        if not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{path}:{line}: openings, response, translation and category are texts")
        key = json.dumps(r["prompt"])
        one = requests.setdefault(key, dict.fromkeys(("opening", "own", "response", "reference", "translation"), "")
                                  | {"prompt": r["prompt"], "category": texts[3]})
        one["opening"], one["translation"] = texts[0] or one["opening"], texts[2] or one["translation"]
        one["reference" if not ours else "response" if texts[0] else "own"] = texts[1]
    if not requests:
        raise ValueError(f"{path} has no {label} records")
    return list(requests.values())


# --------------------------------------------------------------------------------------------- the formats
# Each takes one row of its data set and gives a record; a field that is not there raises KeyError.

def circuit_breakers(row):
    """GraySwanAI/circuit-breakers, circuit_breakers_train.json: `output` complies, `llama3_output` refuses."""
    return record(row["prompt"], "harmful", row["category"], response=row["output"])


def advbench(row):
    """llm-attacks/llm-attacks, harmful_behaviors.csv."""
    return record(row["goal"], "harmful", "advbench", opening=row["target"])


def harmbench(row):
    """centerforaisafety/HarmBench, behaviours CSV; a context comes before the request, as in its own prompts."""
    context = row.get("ContextString") or ""
    prompt = f"{context}\n\n---\n\n{row['Behavior']}" if context else row["Behavior"]
    return record(prompt, "harmful", row["SemanticCategory"], opening=row["target"])


def xstest(row):
    """paul-rottger/xstest, xstest_prompts.csv; the unsafe twins have a type that starts with `contrast_`."""
    unsafe = row.get("label") == "unsafe" or row["type"].startswith("contrast_")
    return record(row["prompt"], "harmful" if unsafe else "borderline", row["type"])


def alpaca(row):
    """tatsu-lab/stanford_alpaca, alpaca_data.json."""
    prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return record(prompt, "benign", "alpaca", response=row["output"])


def beavertails(row):
    """PKU-Alignment/BeaverTails, JSON Lines. Safe answers mostly meet requests that look like trouble: borderline."""
    kinds = [name for name, hit in row["category"].items() if hit]
    return record(row["prompt"], "borderline" if row["is_safe"] else "harmful", kinds[0] if kinds else "beavertails",
                  response=row["response"])


def records(row):
    """Our own format; response and opening may be missing."""
    return record(row["prompt"], row["label"], row["category"], row.get("response", ""), row.get("opening", ""))


def record(prompt, label, category, response="", opening=""):
    return {"prompt": prompt, "response": response, "opening": opening, "label": label, "category": category}


FORMATS = {f.__name__.replace("_", "-"): f for f in
           (circuit_breakers, advbench, harmbench, xstest, alpaca, beavertails, records)}


def read_rows(path, targets=None):
    """(line, row) of a .csv, .jsonl or .json file (a list of objects). `targets`, a JSON object from BehaviorID to
    the first words of an answer (HarmBench keeps them apart), adds a column `target`."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        wanted = json.loads(Path(targets).read_text(encoding="utf-8")) if targets else None
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {path} or its targets: {e}") from None
    if wanted is not None and not isinstance(wanted, dict):
        raise ValueError(f"{targets}: wanted a JSON object from BehaviorID to text")
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as e:
            raise ValueError(f"{path}:{reader.reader.line_num}: {e}") from None
        for line, row in rows:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{line}: the row has not as many cells as the header")
            if wanted is not None and row.get("BehaviorID") not in wanted:
                raise ValueError(f"{path}:{line}: {targets} has no target for {row.get('BehaviorID')!r}")
            row.update({"target": wanted[row["BehaviorID"]]} if wanted else {})
        return rows
    return read_json_list(path, text)


def read_json_list(path, text):
    """(line, object) of a JSON list, item by item so that an error has a line."""
    decoder, rows = json.JSONDecoder(), []
    skip = lambda i: re.compile(r"[\s,]*").match(text, i).end()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: no JSON: {e.msg}") from None
    if not isinstance(whole, list):
        raise ValueError(f"{path}:1: wanted a JSON list of objects (or .jsonl, or .csv)")
    at, line, end = skip(skip(0) + 1), 1, 0
    while text[at:at + 1] != "]":
        line, before = line + text.count("\n", end, at), at
        value, end = decoder.raw_decode(text, at)
        check_text(value, f"{path}:{line}")
        rows.append((line, value))
        line += text.count("\n", before, end)
        at = skip(end)
    return rows


# -------------------------------------------------------------------------------------- on-policy answers

def answer_missing(items, config):
    """Fills in empty responses: the opening, then what the original model itself goes on with."""
    from data.smollm2 import ensure
    from model import Llama
    from sample import generate
    from tokenizer import Tokenizer
    weights = config.weights or ensure()
    model, tok = Llama.from_pretrained(weights), Tokenizer.from_pretrained(weights)
    todo = [r for r in items if not r["response"]]
    answers = generate(model, tok, [{"prompt": r["prompt"], "prefill": r["opening"]} for r in todo], mode="off",
                       max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed,
                       batch_size=config.batch_size)
    start = time.perf_counter()
    for n, (item, answer) in enumerate(zip(todo, answers), 1):
        item["response"] = answer.text
        left = (time.perf_counter() - start) / n * (len(todo) - n)
        if n % config.batch_size == 0 or n == len(todo):
            print(f"{n}/{len(todo)} answers, {left / 60:.1f} min left", file=sys.stderr, flush=True)
    empty = sum(not r["response"] for r in todo)
    if empty:
        print(f"{empty} answers are empty, the model ended at once: train.py refuses such records; take them out, or "
              "run this again on its output with another --seed", file=sys.stderr)


@dataclass(frozen=True)
class PrepareConfig:
    input: str | None = option(None, "file to read: .csv, .json or .jsonl")
    format: str = option("records", "of the input: " + ", ".join(FORMATS))
    targets: str | None = option(None, "JSON file from BehaviorID to the answer's first words (HarmBench)")
    output: str | None = option(None, "JSON Lines file to write")
    limit: int = option(0, "read only so many records; 0: all")
    direct: bool = option(False, "write each harmful prompt a second time, without its opening")
    generate: bool = option(False, "write the original model's own answer where a response is missing")
    max_new_tokens: int = option(128, "length of a generated answer at most, opening not counted")
    temperature: float = option(0.7, "of generated answers")
    batch_size: int = option(48, "answers generated side by side")
    seed: int = option(0, "of generated answers")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")

    def problems(self):
        problems = [f"--{name} FILE is needed" for name in ("input", "output") if getattr(self, name) is None]
        if self.format not in FORMATS:
            problems.append(f"--format is {self.format!r}, wanted one of {', '.join(FORMATS)}")
        if self.limit < 0:
            problems.append(f"--limit is {self.limit}, wanted 0 or more")
        return problems


def main():
    config = parse(PrepareConfig, sys.argv[1:], __doc__)
    items = []
    for line, row in read_rows(config.input, config.targets)[:config.limit or None]:
        where = f"{config.input}:{line}"
        try:
            item = FORMATS[config.format](row)
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{where}: no record of format {config.format}: {type(e).__name__} {e}") from None
        items.append(check_record(item, where))
        if config.direct and item["label"] == "harmful" and item["opening"]:
            items.append(item | {"opening": "", "response": ""})
    if config.generate:
        answer_missing(items, config)
    write_records(config.output, items)
    counts = {label: sum(r["label"] == label for r in items) for label in LABELS}
    print(f"{config.output}: {len(items)} records, " + ", ".join(f"{n} {label}" for label, n in counts.items()))


def write_records(path, items):
    tmp = Path(f"{path}.tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    os.replace(tmp, path)


if __name__ == "__main__":
    run(main)
