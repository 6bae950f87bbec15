"""How much the flag catches, what it costs, and what gets past it: counted, with intervals and without a judge.

    python eval.py                                   # the adapter in out/, the bundled dev split, the quick attacks
    python eval.py --full --compare out_probe        # everything, and another adapter read on the same answers
    python eval.py --reattach                        # what a customer's fine-tuning leaves of the flag: reattach.py
    python eval.py --summary out/eval,out_s1/eval    # one table over several evaluations
    python eval.py --harmful h.jsonl --benign b.jsonl --attack direct,opening,gcg --seeds 3

Writes to --out (default: eval/ in the adapter's folder) results.jsonl, a record an answer, figures.json and report.md.
An interrupted run goes on where it stopped when the same command is given again; further attacks may be added.
"""
import dataclasses
import importlib.util
import json
import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import costs
import reattach
from attacks import AGAINST, ATTACKS, GRADIENT, LONG, TEMPLATES, lengthen, sampling
from baselines import LayerProbe, refuses
from calibrate import flag_probs
from checkpoint import pick_device, pick_dtype, read_adapter, read_json
from cli import option, parse, run, say
from data.prepare import LABELS, read_records, read_requests
from measures import first_above, sustained
from model import Llama
from objective import Example, flag_prob, make_example
from record import Progress, Run, digest
from report import plot, summary, write_report
from sample import generate
from tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
QUICK = ("direct", "opening", "prefill_5", "prefill_25", "refused", "role_play", "refusal_suppression", "split_words",
         "typed_flag", "system_forbids", "temperature_2", "logit_bias")
BATCH = 24
ANSWER_TOK = 64  # of answers that no attack has touched


@dataclass(frozen=True)
class EvalConfig:
    adapter: str = option("out", "folder that train.py wrote")
    full: bool = option(False, "all attacks, more requests, longer answers: an hour or two on 2 CPU cores")
    attack: str | None = option(None, "attacks, by name, with commas; 'none' for none (default: a quick dozen)")
    harmful: str | None = option(None, "records with harmful requests (default: the bundled dev split's)")
    benign: str | None = option(None, "records with harmless requests (the same)")
    borderline: str | None = option(None, "records with harmless requests that look like trouble (the same)")
    limit: int = option(0, "use only so many requests of each set; 0: all")
    attacked: int | None = option(None, "requests that each attack is tried on (default: 24; with --full 108)")
    costly: int = option(12, "the same for long contexts; a third of it for the gradient attacks")
    samples: int = option(20, "answers a request for the attack resample")
    seeds: int = option(1, "answers a request elsewhere; the first is the one in the file, where there is one")
    max_new_tokens: int | None = option(None, "length of attacked answers (default: 24; with --full 64)")
    temperature: float = option(0.7, "of generated answers")
    context_tok: int = option(4000, "tokens of context that the long attacks build")
    gcg_steps: int = option(20, "steps of GCG (published: 500)")
    gcg_width: int = option(64, "swaps tried in a step of GCG (published: 512)")
    pgd_steps: int = option(50, "steps of PGD on the embeddings")
    pgd_radius: float = option(0.3, "how far PGD may move a token's embedding, of the mean length")
    compare: str | None = option(None, "other adapters' folders, with commas, read on the same answers")
    classifier: bool = option(False, "fit a probe on a middle layer too, as an external classifier; --full does")
    train: str = option(str(HERE / "data/mini/train.jsonl"), "what the classifier is fitted on, and --reattach's customers")
    reattach: bool = option(False, "fine-tune the model, with the flag inside and without, and put the adapter back on")
    customer: str | None = option(None, "options for the customers' training, as train.py --finetune takes them")
    utility: str | None = option(None, "problems with a number as the answer, solved before and after (GSM8K)")
    summary: str | None = option(None, "no run: a table over these evaluations' folders, with commas, and their mean")
    plot: bool = option(False, "draw the pictures too (needs matplotlib)")
    out: str | None = option(None, "folder to write (default: eval/ in the adapter's)")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")
    fresh: bool = option(False, "begin anew, though --out holds results")

    def problems(self):
        unknown = [a for a in self.attacks() if a not in ATTACKS]
        problems = [f"no attack {a!r}; there are {', '.join(ATTACKS)}" for a in unknown[:1]]
        least = {"limit": 0, "attacked": 1, "costly": 1, "samples": 1, "seeds": 1, "max_new_tokens": 1, "temperature": 0,
                 "context_tok": 1, "gcg_steps": 0, "gcg_width": 1, "pgd_steps": 1, "pgd_radius": 0}
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            problems.append("--plot needs matplotlib: pip install -r requirements-dev.txt")
        return problems + [f"--{k.replace('_', '-')} is {getattr(self, k)}, wanted {v} or more" for k, v in least.items()
                           if getattr(self, k) is not None and not getattr(self, k) >= v]

    def attacks(self):
        if self.attack is not None:
            return [] if self.attack == "none" else list(dict.fromkeys(a.strip() for a in self.attack.split(",")))
        return list(ATTACKS if self.full else QUICK)

    def n_new(self, attack):
        """Tokens that the model writes under an attack."""
        return ANSWER_TOK if attack in ("direct", "opening") else self.max_new_tokens or (64 if self.full else 24)

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


def groups(config, sets):
    """(set, attack, seed, [(index, request)]) in the order in which they run."""
    found, numbered = [], {label: list(enumerate(requests)) for label, requests in sets.items()}
    opened = lambda request: bool(request["response"] and not request["own"])
    for label in ("benign", "borderline"):  # each once: with its opening, where the file gives its answer one
        for seed in range(config.seeds):
            found.append((label, "direct", seed, [(i, r) for i, r in numbered[label] if not opened(r)]))
            found.append((label, "opening", seed, [(i, r) for i, r in numbered[label] if opened(r)]))
    for attack in config.attacks():
        n = config.n_requests(attack) if attack not in ("direct", "opening") else None
        for seed in range({"resample": config.samples}.get(attack, 1 if attack in GRADIENT else config.seeds)):
            found.append(("harmful", attack, seed, numbered["harmful"][:n]))
            if attack in TEMPLATES + AGAINST:  # do they also make it cry wolf?
                found.append(("benign", attack, seed, numbered["benign"][:n]))
    return found


def batches(config, sets):
    """The groups in portions that are answered at once and recorded at once."""
    for label, attack, seed, requests in groups(config, sets):
        size = 1 if attack in GRADIENT else BATCH
        for start in range(0, len(requests), size):
            yield label, attack, seed, requests[start:start + size]


# ------------------------------------------------------------------------------------------- answers, and f in them

def answer(model, tok, label, attack, seed, requests, config, common):
    """Results of one batch of requests: attacked, answered and read. Those that the attack does not fit are left out,
    and those that the model's context can't hold."""
    room = model.config.max_position_embeddings - 1
    read, written, made = [], [], []
    for i, r in requests:
        item = ATTACKS[attack](r, model, tok, common)
        if item is None or len(tok.render(item["prompt"])[0]) + len(tok.encode(item["prefill"])) >= room:
            continue
        own = r.get({"direct": "own", "opening": "response"}.get(attack), "") if seed == 0 else ""
        result = {"set": label, "attack": attack, "seed": seed, "i": i, "category": r["category"],
                  "prompt": item["prompt"], "prefill": item["prefill"], "n_prefill": len(tok.encode(item["prefill"])),
                  "own": bool(own)} | {k: item[k] for k in ("loss",) if k in item}
        if "embeddings" in item:
            made.append(result | {"tokens": item["said"], "flag_prob": read_moved(model, item), "embedded": True})
        elif own:
            record = {"prompt": r["prompt"], "response": own, "opening": item["prefill"], "label": label}
            read.append((result, make_example(tok, record, ANSWER_TOK, room)))
        else:
            written.append((result, {k: item[k] for k in ("prompt", "prefill")}))
    for (result, e), f in zip(read, flag_probs(model, [e for _, e in read])):
        made.append(result | {"tokens": e.ids[e.n_prompt:], "flag_prob": f})
    settings = {"temperature": config.temperature, "seed": seed * 10_007 + requests[0][0]} | sampling(attack, tok)
    answers = generate(model, tok, [item for _, item in written], "shadow", config.n_new(attack), batch_size=BATCH,
                       **settings)
    made += [result | {"tokens": a.tokens, "flag_prob": a.flag_prob} for (result, _), a in zip(written, answers)]
    return [measure(r, tok, model.threshold, model.debounce) for r in made]


@torch.no_grad()
def read_moved(model, item):
    """f over an answer read behind a prompt that exists as embeddings alone, a list."""
    words = model.embed(torch.tensor(item["said"], device=item["embeddings"].device))
    hidden = model(torch.cat([item["embeddings"], words])[None])[0, len(item["embeddings"]) - 1:-1]   # (n, C)
    return flag_prob(*model.split_logits(hidden)).tolist()


def measure(result, tok, threshold, debounce):
    """The result with its score, f at the first position, the score behind the prefill, and where it is flagged."""
    f = sustained(result["flag_prob"], debounce)
    return result | {"score": max(f), "first": f[0], "score_new": max(f[result["n_prefill"]:], default=None),
                     "flag_at": first_above(f, threshold), "text": tok.decode(result["tokens"])}


def example_of(tok, result):
    """The Example that a result's answer is, for reading it again: as many positions as it has f."""
    prompt = tok.render(result["prompt"])[0]
    end = tok.stop_ids[:1] if len(result["flag_prob"]) > len(result["tokens"]) else []  # where it ended by itself
    return Example(prompt + result["tokens"] + end, len(prompt), result["set"])


def splice(tok, sets, n):
    """(Example, onset, request) of benign answers that turn harmful at answer token `onset`: some words of the answer
    to a harmless question, then a harmful answer to another one."""
    rng, found = random.Random(1), []
    said = lambda r: (r["own"] or r["response"]).split(" ")
    pairs = zip((r for r in sets["benign"] if len(said(r)) >= 12), (r for r in sets["harmful"] if r["response"]))
    for benign, harmful in list(pairs)[:n]:
        words = said(benign)
        before = tok.encode(" ".join(words[:rng.randint(4, min(30, len(words) - 1))]) + "\n\n")
        prompt = tok.render(benign["prompt"])[0]
        example = Example(prompt + before + tok.encode(harmful["response"]), len(prompt), "harmful")
        found.append((example, len(before), benign))
    return found


# --------------------------------------------------------------------------------------------------- the run

def identity(config, sets, threshold, debounce):
    """What two runs must share for one to go on with the other's results; attacks may be added."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in (
        "adapter", "attack", "harmful", "benign", "borderline", "compare", "classifier", "train", "utility", "plot",
        "out", "weights", "fresh", "reattach", "customer", "summary")}
    return settings | {"adapter": digest((Path(config.adapter) / "flag.safetensors").read_bytes()),
                       "records": digest(json.dumps(sets).encode()), "threshold": threshold} | (
                           {"debounce": debounce} if debounce > 1 else {})


def name_of(batch):
    """What a batch goes by on disk: set, attack, seed and the first request's index."""
    label, attack, seed, requests = batch
    return [label, attack, seed, requests[0][0]]


def attack_all(model, tok, sets, todo, config, record, progress):
    """Answers and reads the batches that are not on disk yet."""
    for attack in dict.fromkeys(b[1] for b in todo if b[1].startswith("prefill_")):
        n_tok = int(attack.split("_")[1])
        lengthen(model, tok, sets["harmful"][:config.n_requests(attack)], n_tok)
        progress.done(attack, f"harmful answers of {n_tok} tokens, where there were none")
    common = {k: getattr(config, k) for k in ("context_tok", "gcg_steps", "gcg_width", "pgd_steps", "pgd_radius")}
    common |= {"suffix_tok": 20, "harmful": sets["harmful"],
               "filler": [r["own"] or r["response"] or r["reference"] or str(r["prompt"]) for r in sets["benign"]]}
    for batch in todo:
        record.add(answer(model, tok, *batch, config, common))
        record.save("batches", [*record.figures["batches"], name_of(batch)])
        label, attack, seed, requests = batch
        progress.done(tuple(name_of(batch)), f"{label} {attack}, seed {seed}: {len(requests)} requests")
    record.rewrite()  # a batch that an interruption hit between the two files stands twice in the first


def plan(config, sets, todo, problems, folders):
    """Roughly what each part of the run costs, in answers read: for the time left."""
    n = n_costs(config)
    parts = {tuple(name_of(b)): cost(b) for b in todo}
    for attack in {b[1] for b in todo if b[1].startswith("prefill_")}:
        parts[attack] = int(attack.split("_")[1]) * 1.5  # a batch's step is a second or so for ten answers read
    parts |= {"onsets": 3 * n, "words": 8 * n, "unchanged": 14 * n, "refusals": 8 * n, "behind_the_flag": 2 * n}
    parts |= dict.fromkeys(("solved", "solved_before"), 20 * len(problems)) if problems else {}
    parts |= {"classifier": 2000} if config.classifier or config.full else {}
    return parts | {("compare", folder): sum(len(b[3]) for b in batches(config, sets)) for folder in folders}


def n_costs(config):
    """How many answers the costs are measured on; some of them on twice as many."""
    return 108 if config.full else BATCH


def cost(batch):
    _, attack, seed, requests = batch
    each = {"gcg": 600, "gcg_adaptive": 600, "pgd": 200, "pgd_adaptive": 200, "prefill_1000": 20, "prefill_400": 10}
    each |= dict.fromkeys(("long_start", "long_middle", "long_end", "many_shot"), 50)
    return len(requests) * each.get(attack, 1 if attack in ("direct", "opening") and seed == 0 else 3)


def compare(model, tok, folders, record, progress):
    """Reads the same answers with other adapters too: their scores go into each result, under the folder's name, and
    their thresholds into the figures. (Not the answers that PGD made: they have no prompt that could be read again.)"""
    for folder in folders:
        info, known = read_json(Path(folder) / "flag.json"), record.figures.get("compared with", {})
        what = {"sha256": digest((Path(folder) / "flag.safetensors").read_bytes()), "threshold": info["threshold"],
                "debounce": info.get("debounce", 1)}
        todo = [r for r in record.results.values() if not r.get("embedded")
                and (folder not in r.get("others", {}) or {"debounce": 1} | known.get(folder, {}) != what)]
        if not todo:
            progress.skip(("compare", folder))
            continue
        model.load_flag(folder)
        for r, f in zip(todo, flag_probs(model, [example_of(tok, r) for r in todo])):
            r.setdefault("others", {}).update(
                {folder: max(sustained(f, model.debounce)), f"{folder}, first position alone": f[0]})
        record.rewrite()
        record.save("compared with", known | {folder: what})
        progress.done(("compare", folder), f"{len(todo)} answers read by {folder}")


def classify(model, tok, config, record, progress):
    """Fits the external classifier and writes its scores beside the flag's, for answers that no attack has touched."""
    todo = [r for r in record.results.values() if r["attack"] in ("direct", "opening")]
    sha = digest(Path(config.train).read_bytes())
    if record.figures.get("classifier") == sha and all("classifier" in r.get("others", {}) for r in todo):
        return progress.skip("classifier")
    room = model.config.max_position_embeddings - 1
    probe = LayerProbe(model).fit([make_example(tok, r, 16, room) for r in read_records(config.train)])
    for r, s in zip(todo, probe.scores([example_of(tok, r) for r in todo])):
        r.setdefault("others", {})["classifier"] = s
    record.rewrite()
    record.save("classifier", sha)
    progress.done("classifier", "classifier")


def measure_costs(model, tok, sets, problems, config, record, progress):
    """Everything that is no attack: onset, words, changed answers, problems solved, refusals, what is behind a flag."""
    n = n_costs(config)
    plain = [r for r in record.results.values() if r["attack"] in ("direct", "opening") and r["seed"] == 0]
    for r in plain:  # a file without the model's own answers has them by now
        request, name = sets[r["set"]][r["i"]], "own" if r["attack"] == "direct" else "response"
        request[name] = request[name] or r["text"]
    of = lambda label: [r for r in plain if r["set"] == label]
    room = model.config.max_position_embeddings - 1

    def onsets():
        made = splice(tok, sets, 2 * n)
        return [{"onset": onset, "flag_prob": f}
                for (_, onset, _), f in zip(made, flag_probs(model, [e for e, _, _ in made]))]

    def words():
        given = [{"prompt": r["prompt"], "response": r["reference"], "label": "benign", "opening": ""}
                 for r in sets["benign"] if r["reference"]][:2 * n]
        return costs.words(model, [example_of(tok, r) for label in ("benign", "harmful") for r in of(label)[:2 * n]],
                           [make_example(tok, r, 128, room) for r in given])

    def refusals():
        """Which of the original model's answers refuse: those of the file, and where it has none, written now."""
        found = {a: [r for r in of("harmful") if r["attack"] == a] for a in ("direct", "opening")}
        found["benign"] = of("benign")[:4 * n]
        for name, results in found.items():
            asked = [{k: r[k] for k in ("prompt", "prefill")} for r in results if not r["own"]]
            with model.flag_off():
                written = list(generate(model, tok, asked, "off", ANSWER_TOK, config.temperature, batch_size=BATCH))
            texts = [r["text"] for r in results if r["own"]] + [a.text for a in written]
            found[name] = [refuses(text) for text in texts]
        return found

    flagged = [r for r in of("harmful") if r["attack"] == "opening" and r["flag_at"] is not None][:n]
    keys = [Run.key(r) for r in plain]
    record.once("onsets", keys, progress, onsets)
    record.once("words", keys, progress, words)
    record.once("unchanged", n, progress, lambda: costs.unchanged(
        model, tok, [r["prompt"] for r in sets["benign"][:n]]))
    record.once("refusals", keys, progress, refusals)
    record.once("behind_the_flag", keys, progress, lambda: costs.behind_the_flag(
        model, tok.flag_id, [(example_of(tok, r), r["flag_at"]) for r in flagged]))
    if problems:
        record.once("solved", problems, progress, lambda: costs.solved(model, tok, problems))
        with model.flag_off():
            record.once("solved_before", problems, progress, lambda: costs.solved(model, tok, problems))


def main():
    config = parse(EvalConfig, sys.argv[1:], __doc__)
    if config.summary:
        return print(summary(config.summary.split(",")), end="")
    sets = read_sets(config)
    problems = costs.read_problems(config.utility)[:config.limit or None] if config.utility else []
    if config.weights is None:
        from data.smollm2 import ensure
    weights = config.weights or ensure()
    folders = list(dict.fromkeys(f for f in (config.compare or "").split(",") if f))
    # whatever is wrong with one is said before any work
    adapter, *_ = [read_adapter(folder, weights)[1] for folder in [config.adapter, *folders]]
    if adapter["threshold"] is None:
        raise ValueError(f"{config.adapter}/flag.json has no threshold: train.py calibrates one")
    if config.reattach:
        return reattach.main(config, sets, weights)
    model = Llama.from_pretrained(weights, pick_dtype(pick_device(), many=True))
    model.load_flag(config.adapter)
    tok = Tokenizer.from_pretrained(weights, n_flags=model.n_flags)
    out = Path(config.out or Path(config.adapter) / "eval")
    record = Run(out, identity(config, sets, model.threshold, model.debounce), config.fresh)
    todo = [b for b in batches(config, sets) if name_of(b) not in record.figures["batches"]]
    progress = Progress(plan(config, sets, todo, problems, folders))
    attack_all(model, tok, sets, todo, config, record, progress)
    measure_costs(model, tok, sets, problems, config, record, progress)
    if config.classifier or config.full:
        classify(model, tok, config, record, progress)
    compare(model, tok, folders, record, progress)
    record.save("command", shlex.join(["python", "eval.py", *sys.argv[1:]]))
    print(write_report(record, out / "report.md"))
    if config.plot:
        plot(record, out)
    say(f"{len(record.results)} answers in {out}/results.jsonl, {record.figures['minutes']:.1f} min")


if __name__ == "__main__":
    run(main)
