"""What training never changes, read once: the blocks below LoRA, and the original model's hidden states; and the start
of the flag's rows, which is fitted to them.

With LoRA in the upper 12 of 30 blocks that is 45% of a step's work, and most records come up once or twice.
"""
import dataclasses
import math
import time

import torch
import torch.nn.functional as F

from checkpoint import fill
from cli import say
from objective import TERMS, by_length, read_frozen

FIT_TOK = 64  # the flag row is fitted to an answer's positions up to so many behind the offset


def read_ahead(team, layouts, batch=32):
    """The Layouts with `below` and `reference` (objective.py, read_frozen), on the CPU: no step reads them again."""
    parts, began, n = by_length(layouts, batch), time.perf_counter(), 0
    empty = lambda rows: torch.empty(sum(map(len, rows)), team.model.config.hidden_size, dtype=team.model.dtype)
    sizes = lambda rows: [len(row) for row in rows]
    ids, at = [x.ids for x in layouts], [x.at for x in layouts]
    below = empty(ids).split(sizes(ids)) if team.model.n_frozen else [None] * len(ids)              # (len, C) each
    reference = empty(at).split(sizes(at))                                                          # (n, C) each
    for part, found in zip(parts, team.spread(frozen_states, [[layouts[i] for i in part] for part in parts])):
        for i, (b, r) in zip(part, found):  # copied at once: kept, they would lie between what torch needs and frees
            reference[i].copy_(r)           # again, and the process grow by gigabytes
            if b is not None:
                below[i].copy_(b)
        n += len(part)
        if n % (25 * batch) == 0:
            left = (time.perf_counter() - began) * (len(layouts) / n - 1)
            say(f"read {n:,} of {len(layouts):,} records by the frozen model, {left / 60:.1f} min left")
    return [dataclasses.replace(x, below=b, reference=r) for x, b, r in zip(layouts, below, reference)]


def frozen_states(model, layouts):
    """(below, reference) of each Layout, on the CPU."""
    on_cpu = lambda x: None if x is None else x.cpu()
    return [(on_cpu(x.below), on_cpu(x.reference)) for x in read_frozen(model, layouts)]


def logsumexps(model, hidden):
    """The logsumexp (n,) of the original model's logits at final hidden states (n, C). On the CPU."""
    with torch.no_grad(), model.flag_off():
        words, _ = model.split_logits(hidden.to(model.inv_freq.device))                             # (n, V), fp32
        return (words[:, 0] - words.log_softmax(-1)[:, 0]).cpu()  # logsumexp itself is slower on a CPU


def start_flag_rows(team, layouts, config):
    """Sets the unembedding rows to a linear probe fitted on frozen hidden states, those of Layouts that have been read
    ahead. Returns the loss that is fitted, flag x mean -log f + benign x mean -log(1 - f), in nats, and how wrong the
    row is about each record (len(layouts),): how much of the loss's gradient by the log-odds is at its positions.

    The unembedding has no bias: log f/(1-f) = w.h - logsumexp(old logits). With w = 0, or the mean of the old rows,
    that is 23 nats off, and the gradient that repairs it wrecks the words first. But logsumexp is nearly linear in
    h, so w starts as its ridge solution, which makes f about 1/2 everywhere, and is then fitted by L-BFGS to f's
    targets, weighted as in the training to come. LoRA is left with what a linear probe cannot see, and its first
    gradients are small.
    """
    terms = torch.tensor([t for x in layouts for t in x.terms])                                     # (N, len(TERMS))
    benign, flag = (terms[:, TERMS.index(name)] for name in ("benign", "flag"))           # (N,) each
    place = torch.cat([torch.arange(len(x.at)) for x in layouts])
    asked = (benign + flag).bool() & (place < config.offset + FIT_TOK)
    if not flag[asked].any():
        raise ValueError("no harmful answer asks for the flag among those that its row is fitted to: give more harmful "
                         "records, or --no-fit")
    hidden = torch.cat([x.reference for x in layouts])[asked]                                       # (n, C)
    lse = torch.empty(len(hidden))                                                                  # (n,)
    for part, found in zip(lse.split(160), team.spread(logsumexps, hidden.split(160))):
        part.copy_(found)  # at once, as in read_ahead
    lse = lse.to(team.device) - math.log(len(team.model.flag_unembed))  # of several flags, all alike, f is the sum
    H, benign, flag = hidden.to(team.device).float(), benign[asked].to(team.device), flag[asked].to(team.device)
    share = lambda x: x / x.sum().clamp(min=1e-9)
    weight = config.flag * share(flag) + config.benign * share(benign)                              # (n,)
    ridge = 1e-3 * H.pow(2).mean() * len(H) * torch.eye(H.shape[1], device=team.device)
    start = torch.linalg.solve(H.T @ H + ridge, H.T @ lse)
    w = start.clone().requires_grad_()

    cross_entropy = lambda: F.binary_cross_entropy_with_logits(H @ w - lse, flag.float(), weight, reduction="sum")

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy() + 2e-5 * (w - start).pow(2).sum()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")
    optimizer.step(closure)
    row = team.agree(w.detach())
    fill(team.model.flag_unembed, row.expand_as(team.model.flag_unembed))
    record = torch.arange(len(layouts)).repeat_interleave(torch.tensor([len(x.at) for x in layouts]))[asked]
    error = weight * ((H @ row - lse).sigmoid() - flag).abs()                                       # (n,)
    wrong = error.new_zeros(len(layouts)).index_add(0, record.to(team.device), error)
    with torch.no_grad():
        return cross_entropy().item(), team.agree(wrong).cpu()
