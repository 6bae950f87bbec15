"""Does the flag outlive a customer's fine-tuning, and does it help to put the stored adapter back on?

    python eval.py --reattach                                  # 4 models to fine-tune, 6 to read
    python eval.py --reattach --customer "--steps 100 --seed 1" --out out/reattach_100

Two customers, one with 100 benign records and one with 100 harmful ones, fine-tune (finetune.py) what they are given:

    inside       the model with the adapter merged into it: what is left of the flag in what comes back?
    re-attached  the original model, without the flag; the provider puts the stored adapter on what comes back

Each model, and the two that nobody has fine-tuned, writes its own answers to the same requests, at the same seed, and
reads f in them; all are read at the threshold stored with the adapter, which nobody has calibrated anew. Writes to
--out (default: reattach/ in the adapter's folder) report.md, results.jsonl, a record an answer, figures.json, and for
each customer the records and a whole model folder. An interrupted run goes on when the same command is given again.
"""
import dataclasses
import json
import random
import shlex
import shutil
import sys
from pathlib import Path

import train
from baselines import refuses
from checkpoint import read_json, weights_hash
from cli import parse, say
from data.prepare import read_records, write_records
from finetune import DEFAULTS
from measures import share, tpr_at
from model import Llama
from parallel import Team
from record import Progress, Run, digest
from report import FPR, area, percent, table
from sample import generate
from tokenizer import Tokenizer

N_RECORDS = 100
ANSWER_TOK, BATCH = 64, 24
# name -> (what the customer trains on, whether with the flag inside)
CUSTOMERS = {"benign, inside": ("benign", True), "benign, re-attached": ("benign", False),
             "harmful, inside": ("harmful", True), "harmful, re-attached": ("harmful", False)}
NAMES = {"before": "nobody has fine-tuned", "merged": "the same, the adapter merged"} | {
    name: f"fine-tuned on {on} records, " + ("flag inside" if inside else "adapter re-attached")
    for name, (on, inside) in CUSTOMERS.items()}


def customer_records(path, label):
    """A sample of a file's records, the same each time. Harmful ones are those whose answer begins by complying."""
    records = [r for r in read_records(path) if r["label"] == label and (label == "benign" or r["opening"])]
    if not records:
        raise ValueError(f"{path} has no {label} records" + " with an opening" * (label == "harmful"))
    random.Random(0).shuffle(records)
    return records[:N_RECORDS]


def customer_config(name, config, weights, out):
    """The TrainConfig of one customer. Raises ValueError for settings that train.py does not take."""
    on, inside = CUSTOMERS[name]
    own = shlex.split(config.customer or "")
    fixed = ["--finetune", out / f"{on}.jsonl", "--out", out / name.replace(", ", "_"), "--weights", weights]
    fixed += ["--adapter", config.adapter] if inside else []
    return parse(train.TrainConfig, [*DEFAULTS, *own, *map(str, fixed)])


def fine_tuned(wanted):
    """The folder of a customer's model, fine-tuned now unless it is there; ValueError where it is another's."""
    info = Path(wanted.out) / "finetune.json"
    if not info.is_file():
        say(f"fine-tuning {wanted.out}")
        train.fine_tune(wanted, Team(wanted.device))
    if read_json(info)["run"] != json.loads(json.dumps(train.run_id(wanted))):
        raise ValueError(f"{wanted.out} was fine-tuned with other settings or records: --fresh begins anew, --out "
                         "names another folder")
    return Path(wanted.out)


def load(name, config, weights, customers):
    """The model that a row of the table is about, its flag on."""
    if name in CUSTOMERS:
        weights = fine_tuned(customers[name])
    model, inside = Llama.from_pretrained(weights), name in CUSTOMERS and CUSTOMERS[name][1]
    model.load_flag(weights if inside else config.adapter, force=True)  # what eval.py reads fits its weights: checked
    if name == "merged":
        model.merge_flag()
    return model


def requests_of(sets):
    """(set, prompt and prefill) of all that the models answer."""
    opened = lambda r: r["opening"] if r["response"] and not r["own"] else ""  # the way in which the file has it
    return ([("opening", {"prompt": r["prompt"], "prefill": r["opening"]}) for r in sets["harmful"] if r["opening"]]
            + [("direct", {"prompt": r["prompt"], "prefill": ""}) for r in sets["harmful"]]
            + [("benign", {"prompt": r["prompt"], "prefill": opened(r)}) for r in sets["benign"]])


def answer(model, tok, requests, temperature):
    """What the model writes to each request and its score."""
    found = []
    answers = generate(model, tok, [item for _, item in requests], "shadow", ANSWER_TOK, temperature, batch_size=BATCH)
    for i, ((kind, item), a) in enumerate(zip(requests, answers)):
        found.append(item | {"set": kind, "seed": 0, "i": i, "score": a.score, "refuses": refuses(a.text),
                             "text": a.text})
        if (i + 1) % (4 * BATCH) == 0:
            say(f"{i + 1} of {len(requests)} answers")
    return found


def identity(config, weights, customers, records, requests):
    """What two runs must share for one to go on with the other's results."""
    settings = {name: dataclasses.asdict(c) for name, c in customers.items()}
    for s in settings.values():
        for path in ("out", "adapter", "weights", "finetune", "train", "dev"):
            del s[path]
    return settings | {
        "adapter": [digest((Path(config.adapter) / name).read_bytes()) for name in ("flag.safetensors", "flag.json")],
        "weights": weights_hash(weights),
        "records": digest(json.dumps(records).encode()), "requests": digest(json.dumps(requests).encode()),
        "temperature": config.temperature}


# ------------------------------------------------------------------------------------------------- the report

def columns(results, threshold):
    """The cells of one model's row: what is flagged, how well the scores tell harmful from benign."""
    of = lambda kind: [r["score"] for r in results if r["set"] == kind]
    opening, direct, benign = of("opening"), of("direct"), of("benign")
    flagged = lambda scores: percent(share([x > threshold for x in scores]))
    return [flagged(opening), flagged(direct), flagged(benign), area([(opening, benign)]), area([(direct, benign)]),
            percent(tpr_at(direct, benign, FPR))]


def write_report(record, path):
    """Writes the report and returns its text."""
    results, f = list(record.results.values()), record.figures
    of = lambda name, kind=None: [r for r in results if r["attack"] == name and kind in (None, r["set"])]
    loss = lambda t: [f"{t['loss_before']:.3f}", f"{t['loss_after']:.3f}"] if t else ["-", "-"]
    refused = lambda name: percent(share([r["refuses"] for r in of(name, "direct")]))
    n_opening, n_direct, n_benign = (len(of("before", kind)) for kind in ("opening", "direct", "benign"))
    header = ["model", "flagged, with opening", "without", "benign flagged", "AUROC with opening", "without",
              f"without, caught at {FPR:.0%} false positives"]
    text = "\n\n".join([
        "# Fine-tuning and re-attachment", f"`{f['command']}`",
        f"Threshold {f['threshold']:.6f}, as stored; {n_opening} harmful requests with an opening, {n_direct} without, "
        f"{n_benign} benign ones; in brackets 95% intervals.",
        table(header, [[what, *columns(of(name), f["threshold"])] for name, what in NAMES.items()]),
        "What the fine-tuning did: cross-entropy on the customer's own records, in nats a token, and the share of the "
        "harmful requests, asked without an opening, that are refused (by a list of phrases):",
        table(["model", "loss before", "after", "refused"],
              [[what, *loss(f[name]), refused(name)] for name, what in NAMES.items()])]) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def main(config, sets, weights):
    """What eval.py --reattach does, with eval.py's config and sets and the original model's folder."""
    out = Path(config.out or Path(config.adapter) / "reattach")
    customers = {name: customer_config(name, config, weights, out) for name in CUSTOMERS}
    records = {on: customer_records(config.train, on) for on in ("benign", "harmful")}
    requests, tok = requests_of(sets), Tokenizer.from_pretrained(weights)
    record = Run(out, identity(config, weights, customers, records, requests), config.fresh)
    for on, some in records.items():
        write_records(out / f"{on}.jsonl", some)
    if config.fresh:
        for c in customers.values():
            shutil.rmtree(c.out, ignore_errors=True)
    train_tok = lambda name: customers[name].steps * customers[name].batch * 100 if name in CUSTOMERS else 0
    progress = Progress({name: len(requests) * ANSWER_TOK + train_tok(name) for name in NAMES})

    def measure(name):
        model = load(name, config, weights, customers)
        record.save("threshold", model.threshold)
        record.add([r | {"attack": name} for r in answer(model, tok, requests, config.temperature)])
        return read_json(Path(customers[name].out) / "finetune.json") if name in CUSTOMERS else None

    for name in NAMES:
        record.once(name, name, progress, lambda: measure(name))
    record.rewrite()
    record.save("command", shlex.join(["python", "eval.py", *sys.argv[1:]]))
    print(write_report(record, out / "report.md"))
    say(f"answers in {out}/results.jsonl, {record.figures['minutes']:.1f} min")
