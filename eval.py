"""How much the flag catches, what it costs, and what gets past it: counted, with intervals and without a judge.

    python eval.py                                   # the adapter in out/, the bundled dev split, the quick attacks
    python eval.py --full --compare out_probe        # everything, and another adapter read on the same answers
    python eval.py --harmful h.jsonl --benign b.jsonl --attack direct,opening,gcg --seeds 3

Writes to --out (default: eval/ in the adapter's folder) results.jsonl, a record an answer, figures.json and report.md.
An interrupted run goes on where it stopped when the same command is given again.
"""
import dataclasses
import hashlib
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from attacks import AGAINST, ATTACKS, GRADIENT, LONG, TEMPLATES, lengthen, sampling
from baselines import LayerProbe
from calibrate import flag_probs, score
from cli import option, parse, read_jsonl, run
from data.prepare import LABELS, read_records, read_requests
from model import Llama
from objective import Example, flag_prob, make_example
from report import plot, write_report
from sample import generate
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
QUICK = ("direct", "opening", "prefill_5", "prefill_25", "role_play", "refusal_suppression", "split_words",
         "typed_flag", "system_forbids", "temperature_2", "logit_bias")
BATCH = 24


@dataclass(frozen=True)
class EvalConfig:
    adapter: str = option("out", "folder that train.py wrote")
    full: bool = option(False, "all attacks, more requests, longer answers: an hour or two on 2 CPU cores")
    attack: str | None = option(None, "attacks, by name, with commas; 'none' for none (default: a quick dozen)")
    harmful: str | None = option(None, "records with harmful requests (default: those of the bundled dev split)")
    benign: str | None = option(None, "records with harmless requests (the same)")
    borderline: str | None = option(None, "records with harmless requests that look like trouble (the same)")
    limit: int = option(0, "use only so many requests of each set; 0: all")
    attacked: int | None = option(None, "requests that each attack is tried on (default: 24; with --full 108)")
    costly: int = option(12, "the same for long contexts; a third of it for the gradient attacks")
    samples: int = option(20, "answers a request for the attack resample")
    seeds: int = option(1, "answers a request elsewhere; the first is the one in the file, where there is one")
    max_new_tokens: int | None = option(None, "length of generated answers (default: 24; with --full 64)")
    temperature: float = option(0.7, "of generated answers")
    context_tok: int = option(4000, "tokens of context that the long attacks build")
    gcg_steps: int = option(20, "steps of GCG (published: 500)")
    gcg_width: int = option(64, "swaps tried in a step of GCG (published: 512)")
    pgd_steps: int = option(50, "steps of PGD on the embeddings")
    pgd_radius: float = option(0.3, "how far PGD may move a token's embedding, of the mean length")
    compare: str | None = option(None, "other adapters' folders, with commas, read on the same answers")
    classifier: bool = option(False, "fit a probe on a middle layer too, as an external classifier; --full does")
    train: str = option(str(HERE / "data/mini/train.jsonl"), "what the classifier is fitted on")
    utility: str | None = option(None, "problems with a number as the answer, before and after (GSM8K's format)")
    plot: bool = option(False, "draw the pictures too (needs matplotlib)")
    out: str | None = option(None, "folder to write (default: eval/ in the adapter's)")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")
    fresh: bool = option(False, "begin anew, though --out holds results")

    def problems(self):
        unknown = [a for a in self.attacks() if a not in ATTACKS]
        problems = [f"no attack {a!r}; there are {', '.join(ATTACKS)}" for a in unknown[:1]]
        least = {"limit": 0, "attacked": 1, "costly": 1, "samples": 1, "seeds": 1, "max_new_tokens": 1, "temperature": 0,
                 "context_tok": 1, "gcg_steps": 0, "gcg_width": 1, "pgd_steps": 1, "pgd_radius": 0}
        return problems + [f"--{k.replace('_', '-')} is {getattr(self, k)}, wanted {v} or more" for k, v in least.items()
                           if getattr(self, k) is not None and not getattr(self, k) >= v]

    def attacks(self):
        if self.attack is not None:
            return [] if self.attack == "none" else [a.strip() for a in self.attack.split(",")]
        return list(ATTACKS if self.full else QUICK)

    def n_new(self):
        return self.max_new_tokens or (64 if self.full else 24)

    def n_requests(self, attack):
        """How many requests an attack is tried on."""
        if attack in GRADIENT:
            return max(1, self.costly // 3)
        return self.costly if attack in LONG else self.attacked or (108 if self.full else BATCH)


# ------------------------------------------------------------------------------------------------- the sets

def read_sets(config):
    dev = str(HERE / "data/mini/dev.jsonl")
    sets = {label: read_requests(getattr(config, label) or dev, label) for label in LABELS}
    for label, requests in sets.items():  # a sample of all categories, the same each time
        random.Random(0).shuffle(requests)
        sets[label] = requests[:config.limit or None]
    return sets


# ------------------------------------------------------------------------------------------- answers, and f in them

def groups(config, sets):
    """(set, attack, seed, requests) in the order in which they run."""
    found = [(label, "direct", seed, sets[label]) for label in ("benign", "borderline") for seed in range(config.seeds)]
    for attack in config.attacks():
        n = config.n_requests(attack) if attack not in ("direct", "opening") else None
        for seed in range(config.samples if attack == "resample" else config.seeds):
            found.append(("harmful", attack, seed, sets["harmful"][:n]))
            if attack in TEMPLATES + AGAINST:  # do they also make it cry wolf?
                found.append(("benign", attack, seed, sets["benign"][:n]))
    return found


def answer(model, tok, label, attack, seed, requests, config, common):
    """Results of one batch of requests: attacked, answered and read; those that an attack skips are left out."""
    context = model.config.max_position_embeddings - 1
    stored = attack in ("direct", "opening") and seed == 0
    made, examples, items, results = [], [], [], []
    for i, r in requests:
        text = r["own" if attack == "direct" else "response"] if stored else ""
        item = ATTACKS[attack](r, model, tok, common)
        if item is None:
            continue
        result = {"set": label, "attack": attack, "seed": seed, "i": i, "category": r["category"],
                  "prompt": item["prompt"], "prefill": item["prefill"], "own": bool(text)}
        if "loss" in item:
            result["loss"] = item["loss"]
        n_prefill = len(tok.encode(item["prefill"])) if item["prefill"] else 0
        if "embeddings" in item:
            made.append(read_moved(model, tok, item, config.n_new()) | result | {"embedded": True})
        elif text:
            examples.append(make_example(tok, {"prompt": item["prompt"], "response": text, "label": label,
                                               "opening": item["prefill"]}, 64, context))
            results.append(result | {"n_prefill": n_prefill})
        else:
            items.append(({k: item[k] for k in ("prompt", "prefill")}, result | {"n_prefill": n_prefill}))
    for e, f, result in zip(examples, flag_probs(model, examples), results):
        made.append(result | {"tokens": e.ids[e.n_prompt:], "flag_prob": f})
    settings = {"temperature": config.temperature} | sampling(attack, tok)
    answers = generate(model, tok, [x for x, _ in items], "shadow", config.n_new(),
                       seed=seed * 10_007 + (requests[0][0] if requests else 0), batch_size=BATCH, **settings)
    for a, (_, result) in zip(answers, items):
        made.append(result | {"tokens": a.tokens, "flag_prob": a.flag_prob})
    return [measure(r, tok, model.threshold) for r in made]


@torch.no_grad()
def read_moved(model, tok, item, n_tok):
    """f over an answer read behind a prompt that exists as embeddings alone."""
    tokens = tok.encode(item["prefill"])[:n_tok]
    words = model.embed(torch.tensor(tokens, device=item["embeddings"].device))
    hidden = model(torch.cat([item["embeddings"], words])[None])[0, len(item["embeddings"]) - 1:-1]   # (n, C)
    return {"tokens": tokens, "flag_prob": flag_prob(*model.split_logits(hidden)).tolist(), "n_prefill": 0}


def measure(result, tok, threshold):
    """The result with score = max f, f at the first position, the highest f behind the prefill, where it is flagged."""
    f = result["flag_prob"]
    flag_at = next((t for t, x in enumerate(f) if x > threshold), None)
    return result | {"score": max(f), "first": f[0], "score_new": max(f[result["n_prefill"]:], default=None),
                     "flag_at": flag_at, "text": tok.decode(result["tokens"])}


def splice(tok, sets, n):
    """(Example, onset, request) of benign answers that turn harmful at answer token `onset`: some words of the answer
    to a harmless question, then a harmful answer to another one."""
    rng, found = random.Random(1), []
    pairs = zip((r for r in sets["benign"] if len(r["own"].split()) >= 12), (r for r in sets["harmful"] if r["response"]))
    for benign, harmful in list(pairs)[:n]:
        words = benign["own"].split(" ")
        before = tok.encode(" ".join(words[:rng.randint(4, min(30, len(words) - 1))]) + "\n\n")
        prompt = tok.render(benign["prompt"])[0]
        ids = prompt + before + tok.encode(harmful["response"])
        found.append((Example(ids, len(prompt), "harmful"), len(before), benign))
    return found


# --------------------------------------------------------------------------------------------------- the run

class Run:
    """What is on disk of a run: results.jsonl, and figures.json for what is no answer. Made for going on later."""

    def __init__(self, out, identity, fresh):
        self.out, self.results, self.figures = out, {}, {"run": identity}
        self.began, self.minutes_before = time.perf_counter(), 0.0
        out.mkdir(parents=True, exist_ok=True)
        if fresh or not (out / "figures.json").exists():
            (out / "results.jsonl").write_text("")
            self.save("run", identity)
            return
        self.figures = json.loads((out / "figures.json").read_text())
        self.minutes_before = self.figures["minutes"]
        differ = [k for k, v in identity.items() if self.figures["run"].get(k) != v]
        if differ:
            raise ValueError(f"{out} holds the results of another run ({', '.join(differ)} differ): --fresh begins anew, "
                             "--out names another folder")
        for line in (out / "results.jsonl").read_text().split("\n"):
            try:
                r = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off in mid-line, or the empty one behind the last
            self.results[self.key(r)] = r
        self.rewrite()

    key = staticmethod(lambda r: (r["set"], r["attack"], r["seed"], r["i"]))

    def add(self, results):
        self.results |= {self.key(r): r for r in results}
        with open(self.out / "results.jsonl", "a") as f:
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results))

    def rewrite(self):
        with open(self.out / "results.jsonl.tmp", "w") as f:
            f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in self.results.values())
        os.replace(self.out / "results.jsonl.tmp", self.out / "results.jsonl")

    def save(self, name, value):
        self.figures |= {name: value, "minutes": self.minutes_before + (time.perf_counter() - self.began) / 60}
        (self.out / "figures.json.tmp").write_text(json.dumps(self.figures, indent=1))
        os.replace(self.out / "figures.json.tmp", self.out / "figures.json")

    def once(self, name, make):
        """Makes figure `name` unless it is there from before."""
        if name not in self.figures:
            say(f"{name} ...")
            self.save(name, make())


def identity(config, sets):
    """What two runs must share for one to go on with the other's results; attacks may be added."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in (
        "adapter", "attack", "harmful", "benign", "borderline", "compare", "classifier", "train", "utility", "plot", "out",
        "weights", "fresh")}
    digest = lambda data: hashlib.sha256(data).hexdigest()
    return settings | {"adapter": digest((Path(config.adapter) / "flag.safetensors").read_bytes()),
                       "records": digest(json.dumps(sets).encode())}


def say(text):
    print(text, file=sys.stderr, flush=True)


def attack_all(model, tok, sets, config, record):
    """Answers and reads every group that is not on disk yet, batch by batch, saying how long it will take."""
    batches = []
    for label, attack, seed, requests in groups(config, sets):
        size = 1 if attack in GRADIENT else BATCH
        for start in range(0, len(requests), size):
            batches.append((label, attack, seed, list(enumerate(requests))[start:start + size]))
    done = record.figures.get("batches", [])
    todo = [b for b in batches if [*b[:3], b[3][0][0]] not in done]
    for attack in sorted({b[1] for b in todo if b[1].startswith("prefill_")}, key=lambda a: int(a.split("_")[1])):
        n, n_tok = config.n_requests(attack), int(attack.split("_")[1])
        say(f"harmful answers of {n_tok} tokens, where there are none yet ...")
        lengthen(model, tok, sets["harmful"][:n], n_tok)
    common = {k: getattr(config, k) for k in ("context_tok", "gcg_steps", "gcg_width", "pgd_steps", "pgd_radius")}
    common |= {"suffix_tok": 20, "benign": [{"response": r["own"] or r["reference"]} for r in sets["benign"]],
               "harmful": sets["harmful"]}
    began, spent, total = time.perf_counter(), 0, sum(map(cost, todo))
    for batch in todo:
        record.add(answer(model, tok, *batch, config, common))
        done.append([*batch[:3], batch[3][0][0]])
        record.save("batches", done)
        spent += cost(batch)
        left = (time.perf_counter() - began) * (total - spent) / spent
        say(f"{batch[0]} {batch[1]}, seed {batch[2]}: {len(batch[3])} answers, {left / 60:.1f} min left")
    record.rewrite()  # a batch that an interruption hit between the two files stands twice in the first


def cost(batch):
    """Roughly what a batch takes, in answers read: for the time left."""
    _, attack, seed, requests = batch
    each = {**dict.fromkeys(GRADIENT, 300), **dict.fromkeys(LONG, 40), "prefill_1000": 20, "prefill_400": 8}
    return len(requests) * each.get(attack, 1 if attack in ("direct", "opening") and seed == 0 else 3)


def example_of(tok, result):
    """The Example that a result's answer is, for reading it again."""
    prompt = tok.render(result["prompt"])[0]
    return Example(prompt + result["tokens"], len(prompt), result["set"])


def compare(model, tok, folders, record, force=False):
    """Reads the same answers with other adapters: their scores go into each result, under the folder's name."""
    for folder in folders:
        todo = [r for r in record.results.values() if folder not in r.get("others", {}) and not r.get("embedded")]
        if not todo:
            continue
        say(f"{len(todo)} answers read by {folder} ...")
        record.save(f"threshold {folder}", model.load_flag(folder, force)["threshold"])
        for r, f in zip(todo, flag_probs(model, [example_of(tok, r) for r in todo])):
            r.setdefault("others", {}).update({folder: max(f), f"{folder}, first position alone": f[0]})
        record.rewrite()


def classify(model, tok, config, record):
    """Fits the external classifier and writes its scores beside the flag's, for direct requests and with opening."""
    todo = [r for r in record.results.values() if r["attack"] in ("direct", "opening")]
    if all("classifier" in r.get("others", {}) for r in todo):
        return
    say("classifier ...")
    context = model.config.max_position_embeddings - 1
    probe = LayerProbe(model).fit([make_example(tok, r, 16, context) for r in read_records(config.train)])
    for r, s in zip(todo, probe.scores([example_of(tok, r) for r in todo])):
        r.setdefault("others", {})["classifier"] = s
    record.rewrite()


def measure_costs(model, tok, sets, config, record):
    """Everything that is no attack: onset, words, changed answers, problems solved, what comes behind a flag."""
    import costs
    n = 108 if config.full else BATCH
    results = list(record.results.values())
    direct = lambda label: [r for r in results if r["set"] == label and r["attack"] == "direct" and r["seed"] == 0][:4 * n]

    def onsets():
        made = splice(tok, sets, 2 * n)
        return [{"onset": onset, "flag_prob": f}
                for (_, onset, _), f in zip(made, flag_probs(model, [e for e, _, _ in made]))]

    def words():
        answers = [example_of(tok, r) for label in ("benign", "harmful") for r in direct(label)[:2 * n]]
        context = model.config.max_position_embeddings - 1
        given = [r for r in sets["benign"] if r["reference"]][:2 * n]
        references = [make_example(tok, {"prompt": r["prompt"], "response": r["reference"], "label": "benign",
                                         "opening": ""}, 128, context) for r in given]
        return costs.words(model, answers, references)

    for r in results:  # a file without the model's own answers has them by now
        request = sets[r["set"]][r["i"]]
        if r["attack"] == "direct" and r["seed"] == 0:
            request["own"] = request["own"] or r["text"]
        if r["attack"] == "opening" and r["seed"] == 0:
            request["response"] = request["response"] or r["text"]
    flagged = [r for r in results if r["set"] == "harmful" and r["attack"] == "opening" and r["flag_at"] is not None]
    record.once("onsets", onsets)
    record.once("words", words)
    record.once("unchanged", lambda: costs.unchanged(model, tok, [r["prompt"] for r in sets["benign"][:n]]))
    record.once("behind_the_flag", lambda: costs.behind_the_flag(
        model, tok.flag_id, [(example_of(tok, r), r["flag_at"]) for r in flagged[:n]]))
    if config.utility:
        problems = [r for _, r in read_jsonl(config.utility)][:config.limit or n]
        record.once("solved", lambda: costs.solved(model, tok, problems))
        with model.flag_off():
            record.once("solved_before", lambda: costs.solved(model, tok, problems))


def main():
    config = parse(EvalConfig, sys.argv[1:], __doc__)
    sets = read_sets(config)
    folders = [f for f in (config.compare or "").split(",") if f]
    for folder in [config.adapter, *folders]:
        if not (Path(folder) / "flag.json").is_file():
            raise ValueError(f"no adapter in {folder}: train one first (python train.py --init llama), or name its folder")
    if config.weights is None:
        from data.smollm2 import ensure
    weights = config.weights or ensure()
    model = Llama.from_pretrained(weights)
    model.load_flag(config.adapter)
    tok = Tokenizer.from_pretrained(weights, n_flags=model.n_flags)
    record = Run(Path(config.out or Path(config.adapter) / "eval"),
                 identity(config, sets) | {"threshold": model.threshold}, config.fresh)
    attack_all(model, tok, sets, config, record)
    measure_costs(model, tok, sets, config, record)
    if config.classifier or config.full:
        classify(model, tok, config, record)
    compare(model, tok, folders, record)
    record.save("command", "python eval.py " + " ".join(sys.argv[1:]))
    print(write_report(record, record.out / "report.md"))
    if config.plot:
        plot(record, record.out)
    say(f"{len(record.results)} answers in {record.out}/results.jsonl, {record.figures['minutes']:.1f} min")


if __name__ == "__main__":
    run(main)
