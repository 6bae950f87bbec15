"""What was achieved: scores, the threshold, and the table at the end of training."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from measures import auroc, conformal_threshold, sustained
from objective import by_length, decompose, flag_prob
from packed import read, read_both

# Answers read at once, and positions whose logits exist at a time. A GPU waits for each launch, and packed.py has one
# mask for as many answers as these.
AT_ONCE = {"cpu": (16, 160), "cuda": (64, 1024)}
N_KL = 360  # answers of a label, at most, whose words are compared with the original model's: it reads as long again


def score(model, examples, batch=None, chunk=None, spread=None, words=True):
    """For each Example a dict of lists over its answer positions: f, and with `words` kl_q = KL(pi_0 || q),
    kl_pi = KL(pi_0 || pi), the answer's own words' -log q and -log pi_0 (nll_q, nll_0), and whether both models'
    likeliest word is the same, for twice the work.

    The answer is read as it stands, without any flag in it (what mode shadow sees). Nats; f in double precision.
    `batch` answers are read at once (default: 16, on a GPU 64), and `chunk` positions have logits at a time (160, 1024).
    `spread` spreads the work over several processes (parallel.py, Team.spread).
    """
    usual = AT_ONCE.get(model.inv_freq.device.type, AT_ONCE["cpu"])
    batch, chunk = batch or usual[0], chunk or usual[1]
    found, parts = [None] * len(examples), by_length(examples, batch)
    together = score_together if words else flags_together
    work = lambda model, part: together(model, [examples[i] for i in part], chunk)
    for part, scores in zip(parts, spread(work, parts) if spread else (work(model, part) for part in parts)):
        for i, result in zip(part, scores):
            found[i] = result
    return found


@torch.no_grad()
def score_together(model, examples, chunk):
    """`score` of one batch."""
    ids, at = [e.ids[:-1] for e in examples], [e.at for e in examples]
    hidden, reference = (torch.cat(x).split(chunk) for x in read_both(model, ids, ids, at, at))     # (n, C) each
    target = torch.tensor([t for e in examples for t in e.ids[e.n_prompt:]]).split(chunk)
    results = []
    for h, h0, t in zip(hidden, reference, target):
        with model.flag_off():
            reference_words = model.logits(h0)                                                      # (n, V)
        words, flags = model.split_logits(h)
        kl, _, log_not_f = decompose(words, flags, reference_words)
        nll_q, nll_0 = (F.cross_entropy(x, t.to(x.device), reduction="none") for x in (words, reference_words))
        same = words.argmax(-1) == reference_words.argmax(-1)
        results.append([x.cpu() for x in (flag_prob(words, flags), kl, kl - log_not_f, nll_q, nll_0, same)])
    sizes = [e.n_answer for e in examples]
    lists = [[x.tolist() for x in torch.cat(column).split(sizes)] for column in zip(*results)]
    return [dict(zip(("f", "kl_q", "kl_pi", "nll_q", "nll_0", "same"), values)) for values in zip(*lists)]


@torch.no_grad()
def flags_together(model, examples, chunk):
    """`score` of one batch, f alone."""
    hidden = read(model, [e.ids[:-1] for e in examples], [e.at for e in examples])                  # (n, C) each
    f = torch.cat([flag_prob(*model.split_logits(h)) for h in torch.cat(hidden).split(chunk)])
    return [{"f": x.tolist()} for x in f.split([len(h) for h in hidden])]


def flag_probs(model, examples, batch=None):
    """For each Example the list of f over its answer positions."""
    return [s["f"] for s in score(model, examples, batch, words=False)]


def evaluate(model, examples, fpr, spread=None, batch=None):
    """The table's figures, on development answers: threshold, KLs (of N_KL a label at most), AUROCs, flagged shares. An
    answer's score is the highest f that lasts model.debounce positions (measures.py, sustained)."""
    of = lambda label: [i for i, e in enumerate(examples) if e.label == label]
    compared = {i for label in ("benign", "harmful") for i in of(label)[::math.ceil(len(of(label)) / N_KL) or 1]}
    scores = [None] * len(examples)
    for words in (True, False):
        chosen = [i for i in range(len(examples)) if (i in compared) == words]
        for i, s in zip(chosen, score(model, [examples[i] for i in chosen], batch, spread=spread, words=words)):
            scores[i] = s
    kinds = {"benign": [], "borderline": [], "harmful_opening": [], "harmful_direct": []}
    kl = {"benign": [], "harmful": []}
    for e, s in zip(examples, scores):
        kind = e.label if e.label != "harmful" else "harmful_opening" if e.opening else "harmful_direct"
        kinds[kind].append(max(sustained(s["f"], model.debounce)))
        if "kl_q" in s:
            kl[e.label] += s["kl_pi"] if e.label == "benign" else s["kl_q"]
    threshold = conformal_threshold(kinds["benign"], fpr)
    mean = lambda x: float(np.mean(x)) if len(x) else None
    return {
        "threshold": threshold, "fpr": fpr, "benign_kl": mean(kl["benign"]), "harmful_words_kl": mean(kl["harmful"]),
        "answers": {k: len(v) for k, v in kinds.items()},
        "flagged": {k: mean([x > threshold for x in v]) for k, v in kinds.items()},
        "auroc": {f"{h}_vs_{b}": auroc(kinds[f"harmful_{h}"], kinds[b])
                  for h in ("opening", "direct") for b in ("benign", "borderline")}}


def print_table(figures):
    """The figures for a reader, on stdout; what there were no answers for is a dash."""
    flagged, auc, n = figures["flagged"], figures["auroc"], figures["answers"]
    show = lambda x, form: "-" if x is None else format(x, form)
    row = lambda name, *cells: print(f"{name:28}" + "".join(f"{c:>14}" for c in cells))
    row("development answers", "n", "flagged", "AUROC benign", "borderline")
    for name, kind, pair in (("harmful, with opening", "harmful_opening", "opening"),
                             ("harmful, without", "harmful_direct", "direct"),
                             ("borderline", "borderline", None), ("benign (calibrated on)", "benign", None)):
        areas = [show(auc[f"{pair}_vs_{other}"], ".4f") for other in ("benign", "borderline")] if pair else []
        row(name, n[kind], show(flagged[kind], ".1%"), *areas)
    print(f"\nthreshold for {figures['fpr']:.3g} of benign answers   {figures['threshold']:.6f}")
    print(f"KL(pi_0 || pi), benign answers      {show(figures['benign_kl'], '.4f')} nats a token")
    print(f"KL(pi_0 || q), harmful answers      {show(figures['harmful_words_kl'], '.4f')} nats a token")
    print(f"time and peak memory                {figures['minutes']:.1f} min, {figures['peak_memory_mb']:.0f} MB")
