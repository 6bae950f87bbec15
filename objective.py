"""The objective: which positions of which answers are supervised, and by what.

At each position of an answer f is the probability of the flag and q the distribution over the words without it, so
the model's distribution is pi = (f, (1 - f) q): a coin for "flag or not" times an ordinary language model. pi_0 is the
original model, the same network with the adapter switched off. For every pi_0 that knows no flag

    KL(pi_0 || pi) = KL(pi_0 || q) - log(1 - f)

so all terms are weighted sums of three numbers a position: KL(pi_0 || q), -log(1 - f) and -log f.

    L_benign   benign answers, every position:                 KL(pi_0 || q) - log(1 - f)
    L_flag     harmful answers, where the flag should come:    -log f
    L_after    harmful answers, behind an inserted flag:       KL(pi_0 || q) - log(1 - f), pi_0 not seeing the flag
    L_words    benign answers, and harmful up to the flag:     KL(pi_0 || q), so that only the flag says it

What a harmful answer y_0 .. y_n-1 looks like, its flag inserted before y_3 (offset k = 1, positions "all"):

    read         x_last  y_0    y_1    y_2    <rf>   y_3    y_4
    should say   y_0     <rf>   <rf>   <rf>   y_3    y_4    y_5
    supervised   words   flag   flag   flag   after  after  after
                         words  words  words
"""
import os
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

TERMS = ("benign", "flag", "after", "words")


@dataclass(frozen=True)
class Example:
    """ids = prompt, then answer; answer token j is predicted where ids[n_prompt - 1 + j] is read."""
    ids: list
    n_prompt: int
    label: str
    opening: bool = False  # the answer's first words were put into the model's mouth

    @property
    def n_answer(self):
        return len(self.ids) - self.n_prompt

    def cut(self, n_answer):
        """The example with at most n_answer tokens of its answer."""
        return replace(self, ids=self.ids[:self.n_prompt + n_answer])


def make_example(tok, record, max_answer, context):
    """An Example of a record {"prompt", "response", "opening", "label", "category"}; answers are cut to max_answer
    tokens. Raises ValueError where the prompt leaves no room in the model's context."""
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids, mask = tok.render(messages + [{"role": "assistant", "content": record["response"]}])
    end = len(mask) - mask[::-1].index(True)        # behind the last answer's end-of-turn token
    n_prompt = len(mask) - mask[:end][::-1].index(False) - (len(mask) - end)
    if n_prompt >= context:
        raise ValueError(f"a prompt has {n_prompt} tokens, and the model's context holds {context}: {str(prompt):.60}")
    end = min(end, n_prompt + max_answer, context - 1)
    return Example(ids[:end], n_prompt, record["label"], bool(record["opening"]))


@dataclass
class Layout:
    """One example as the two models read it, and its supervised positions, a list entry each."""
    ids: list           # with the inserted flag, where there is one
    reference_ids: list
    at: list            # index into ids
    reference_at: list  # index into reference_ids of the position that predicts the same word
    terms: list         # a 0 or 1 for each of TERMS
    target: list        # the next token (for after="ce")


def lay_out(example, insert_at, flag_id, offset, positions):
    """Layout of an example; a harmful one gets the flag before answer token `insert_at`."""
    p, n, ids = example.n_prompt, example.n_answer, example.ids
    reference_at = [p - 1 + j for j in range(n)]
    if example.label != "harmful":
        return Layout(ids, ids, reference_at, reference_at, [wanted("benign", "words")] * n, ids[p:])
    first = insert_at if positions == "one" else min(offset, insert_at)
    before = [wanted("words")] * first + [wanted("flag", "words")] * (insert_at + 1 - first)
    behind = [wanted("after")] * (n - insert_at)
    return Layout(
        ids[:p + insert_at] + [flag_id] + ids[p + insert_at:], ids,
        at=reference_at[:insert_at + 1] + [p + j for j in range(insert_at, n)],  # behind the flag all is one further on
        reference_at=reference_at[:insert_at + 1] + reference_at[insert_at:],    # both predict token insert_at
        terms=before + behind, target=ids[p:p + insert_at + 1] + ids[p + insert_at:])


def wanted(*terms):
    return [int(t in terms) for t in TERMS]


def decompose(words, flags, reference_words):
    """(KL(pi_0 || q), log f, log(1 - f)), each (N,), in nats, of fp32 logits (N, V), (N, F) and pi_0's (N, V)."""
    log_q = torch.log_softmax(words, -1)
    lse = words[..., 0] - log_q[..., 0]                                 # logsumexp(words), for the price of one word
    odds = torch.logsumexp(flags, -1) - lse                             # log f / (1 - f)
    p0 = torch.softmax(reference_words, -1)
    kl = -torch.linalg.vecdot(p0, log_q) - torch.special.entr(p0).sum(-1)
    return kl, F.logsigmoid(odds), F.logsigmoid(-odds)


def flag_prob(words, flags):
    """f (N,), of fp32 logits (N, V) and (N, F). In double precision, so that scores near 1 keep their order: fp32 would
    call everything above 1 - 6e-8 the same. On the logits' device, or on the CPU where that knows no doubles."""
    first = words[:, 0]
    total = first - torch.log_softmax(words, -1)[:, 0]  # logsumexp, at twice its speed on a CPU
    odds = torch.logsumexp(flags, -1) - total
    return torch.sigmoid((odds.cpu() if odds.device.type == "mps" else odds).double())


def pad(rows, device):
    """(B, T) of ragged lists, padded on the right: behind what counts, so a causal model never sees it."""
    width = max(map(len, rows))
    return torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device)


def by_length(examples, batch):
    """Lists of at most `batch` indices of examples, the shortest first: rows of like length need little padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    return [order[i:i + batch] for i in range(0, len(order), batch)]


class Prefix:
    """A cache for training: the beginning that all rows share, read once, by one row; then the rows go on from it.

    Keys and values keep their graph, so gradients are those of reading it in every row. With a chat template's
    system text at the head of every prompt this saves a third of the work.
    """

    def __init__(self, device):
        self.k, self.v, self.longest, self.device = {}, {}, 0, device

    def positions(self, n_new):
        return self.longest + torch.arange(n_new, device=self.device)[None]         # (1, T)

    def write(self, layer, k, v):
        if layer not in self.k:
            self.k[layer], self.v[layer] = k, v
            return k, v
        shared = lambda x: x[layer].expand(len(k), -1, -1, -1)
        return torch.cat([shared(self.k), k], dim=2), torch.cat([shared(self.v), v], dim=2)

    def advance(self, n_new):
        self.longest = self.longest or n_new


def read(model, rows, first=0, last=None):
    """Hidden states behind the blocks first .. last - 1 (all of them: the final ones), a (len, C) for each of the rows.

    rows are lists of ids, or with first > 0 pairs of (ids, the (len, C) that the blocks below gave). Their common
    beginning is read once.
    """
    ids, below = zip(*rows) if first else (rows, None)
    n = len(os.path.commonprefix(ids)) if len(ids) > 1 else 0
    n = min(n, min(map(len, ids)) - 1)  # each row goes on by one token at least
    device, prefix = model.inv_freq.device, Prefix(model.inv_freq.device)
    if first:
        head, rest = below[0][None, :n], nn.utils.rnn.pad_sequence([x[n:] for x in below], batch_first=True)
    else:
        head, rest = torch.tensor([ids[0][:n]], device=device), pad([r[n:] for r in ids], device)
    head = model(head, prefix, first, last)[0] if n else None                                       # (n, C)
    rest = model(rest, prefix if n else None, first, last)                                          # (B, T, C)
    ends = [h[:len(r) - n] for r, h in zip(ids, rest)]
    return [torch.cat([head, h]) for h in ends] if n else ends


def read_both(model, rows, reference_rows):
    """(final hidden states of the rows, of the reference rows by the original model), lists as of `read`. The blocks
    below LoRA give both models the same, so they read but once what both see."""
    k = model.n_frozen
    if k:
        both = {tuple(r): r for r in rows + reference_rows}
        with torch.no_grad():
            below = dict(zip(both, read(model, list(both.values()), 0, k)))
        rows, reference_rows = ([(r, below[tuple(r)]) for r in rs] for rs in (rows, reference_rows))
    with torch.no_grad(), model.flag_off():
        reference = read(model, reference_rows, k)
    return read(model, rows, k), reference


def backward(model, layouts, weights, after="kl", chunk=256):
    """Adds the gradient of one micro-batch of Layouts to the parameters; returns the sum of each term (len(TERMS),).

    weights[t] is term t's weight over the number of its positions in the whole optimizer step: so micro-batches add
    up to the step's loss, sum of weight x mean. The head runs over `chunk` positions at a time, and its graph is
    gone before the next: no (B, T, V) tensor is ever made. `after` "ce" puts cross-entropy of the harmful
    continuation in place of KL.
    """
    device = model.embed_tokens.weight.device
    gather = lambda hidden, ats: torch.cat([h[at] for h, at in zip(hidden, ats)])                   # (N, C)
    hidden, reference = read_both(model, [x.ids for x in layouts], [x.reference_ids for x in layouts])
    hidden, reference = gather(hidden, [x.at for x in layouts]), gather(reference, [x.reference_at for x in layouts])
    terms = torch.tensor([t for x in layouts for t in x.terms], device=device)                      # (N, len(TERMS))
    target = torch.tensor([t for x in layouts for t in x.target], device=device)
    sums, leaf = torch.zeros(len(TERMS), device=device), hidden.detach().requires_grad_()
    for part in torch.arange(len(terms), device=device).split(chunk):
        losses = (position_losses(model, leaf[part], reference[part], target[part], after) * terms[part]).sum(0)
        (losses * weights).sum().backward()  # into leaf.grad, and into the flag's unembedding row
        sums += losses.detach()
    if hidden.requires_grad:  # not so for rank 0, where nothing below the head trains
        hidden.backward(leaf.grad)
    return sums


def position_losses(model, hidden, reference, target, after):
    """(N, len(TERMS)): what each position would cost by each term, in nats, of hidden states (N, C) of the model and
    of the reference."""
    with torch.no_grad(), model.flag_off():
        reference_words = model.logits(reference)                                                   # (N, V)
    words, flags = model.split_logits(hidden)
    kl, log_f, log_not_f = decompose(words, flags, reference_words)
    behind = F.cross_entropy(words, target, reduction="none") if after == "ce" else kl
    return torch.stack([kl - log_not_f, -log_f, behind - log_not_f, kl], -1)
