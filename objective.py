"""The objective: which positions of which answers are supervised, and by what.

At each position of an answer f is the probability of the flag and q the distribution over the words without it, so
the model's distribution is pi = (f, (1 - f) q): a coin for "flag or not" times an ordinary language model. pi_0 is the
original model, the same network with the adapter switched off. For every pi_0 that knows no flag

    KL(pi_0 || pi) = KL(pi_0 || q) - log(1 - f)

so all terms but the last are weighted sums of three numbers a position: KL(pi_0 || q), -log(1 - f) and -log f.

    L_benign   benign and borderline answers, every position:  KL(pi_0 || q) - log(1 - f)
    L_flag     harmful answers, where the flag should come:    -log f
    L_after    harmful answers, behind an inserted flag:       KL(pi_0 || q) - log(1 - f), pi_0 not seeing the flag
    L_words    benign, borderline; harmful up to the flag:     KL(pi_0 || q), so that only the flag says it
    L_kind     every answer, its first position:               -log p(kind), see kind_loss

What a harmful answer y_0 .. y_n-1 looks like, its flag inserted before y_3 (offset k = 1, positions "all"; by train.py's
defaults it is inserted before y_0):

    read         x_last  y_0    y_1    y_2    <rf>   y_3    y_4
    should say   y_0     <rf>   <rf>   <rf>   y_3    y_4    y_5
    supervised   words   flag   flag   flag   after  after  after
                 kind    words  words  words
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from packed import go_on, read_below

TERMS = ("benign", "flag", "after", "words", "kind")  # the last is of an answer, not of a position
KIND = TERMS.index("kind")


@dataclass(frozen=True)
class Example:
    """ids = prompt, then answer; answer token j is predicted where ids[n_prompt - 1 + j] is read."""
    ids: list
    n_prompt: int
    label: str
    opening: bool = False  # the answer's first words were put into the model's mouth
    kind: int | None = None  # which of the training set's kinds, see kind_loss; None: not asked for

    @property
    def n_answer(self):
        return len(self.ids) - self.n_prompt

    @property
    def at(self):
        """The positions that predict the answer's tokens."""
        return range(self.n_prompt - 1, len(self.ids) - 1)

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
    if n_prompt >= context - 1:
        raise ValueError(f"a prompt has {n_prompt} tokens, and the model's context holds {context}: {str(prompt):.60}")
    end = min(end, n_prompt + max_answer, context - 1)
    return Example(ids[:end], n_prompt, record["label"], bool(record["opening"]))


@dataclass
class Layout:
    """One example as the two models read it, without the last token, behind which nothing is asked for; and its
    supervised positions, a list entry each."""
    ids: list           # with the inserted flag, where there is one
    reference_ids: list
    at: list            # index into ids
    reference_at: list  # index into reference_ids of the position that predicts the same word
    terms: list         # how much it counts for each of TERMS
    target: list        # the next token (for after="ce")
    kind: int | None = None  # as the Example's
    below: torch.Tensor | None = None      # (len(ids), C): what the blocks without LoRA make of ids, once it is read
    reference: torch.Tensor | None = None  # (len(at), C): the original model's final hidden states at reference_at

    def weighed(self, weight):
        """The Layout, its positions counting `weight` times; for L_kind, a help and nothing to be estimated, still once."""
        return replace(self, terms=[[t if i == KIND else t * weight for i, t in enumerate(at)] for at in self.terms])


def lay_out(example, insert_at, flag_id, offset, positions):
    """Layout of an example; a harmful one gets the flag before answer token `insert_at`."""
    p, n, ids, kind = example.n_prompt, example.n_answer, example.ids, example.kind
    reference_at = [p - 1 + j for j in range(n)]
    if example.label != "harmful":
        terms = ask_kind([wanted("benign", "words")] * n, kind)
        return Layout(ids[:-1], ids[:-1], reference_at, reference_at, terms, ids[p:], kind)
    first = insert_at if positions == "one" else min(offset, insert_at)
    before = [wanted("words")] * first + [wanted("flag", "words")] * (insert_at + 1 - first)
    behind = [wanted("after")] * (n - insert_at)
    return Layout(
        ids[:p + insert_at] + [flag_id] + ids[p + insert_at:-1], ids[:-1],
        at=reference_at[:insert_at + 1] + [p + j for j in range(insert_at, n)],  # behind the flag all is one further on
        reference_at=reference_at[:insert_at + 1] + reference_at[insert_at:],    # both predict token insert_at
        terms=ask_kind(before + behind, kind), target=ids[p:p + insert_at + 1] + ids[p + insert_at:], kind=kind)


def wanted(*terms):
    return [int(t in terms) for t in TERMS]


def ask_kind(terms, kind):
    """The positions' terms, with "kind" at the first one where there is a kind."""
    return terms if kind is None else [[*terms[0][:-1], 1], *terms[1:]]


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


@torch.no_grad()
def read_frozen(model, layouts):
    """The Layouts with `below` and `reference`: what training never changes, so that it need not be read twice."""
    rows, references = [x.ids for x in layouts], [x.reference_ids for x in layouts]
    below = read_below(model, rows + references)
    with model.flag_off():
        reference = go_on(model, references, below[len(rows):], [x.reference_at for x in layouts])
    return [replace(x, below=b, reference=r) for x, b, r in zip(layouts, below, reference)]


def objective(model, layouts, weights, after="kl"):
    """(loss, sums) of Layouts: the sum of each term over its positions (len(TERMS),), in nats, and the loss, their sum
    with these weights, whose gradient is that of one micro-batch.

    weights[t] is term t's weight over the number of its positions in the whole optimizer step: so micro-batches add
    up to the step's loss, sum of weight x mean. `after` "ce" puts cross-entropy of the harmful continuation in place
    of KL. Layouts that `read_frozen` has not read are read here.
    """
    device = model.embed_tokens.weight.device
    if layouts[0].reference is None:
        layouts = read_frozen(model, layouts)
    hidden = go_on(model, [x.ids for x in layouts], [x.below for x in layouts], [x.at for x in layouts])
    hidden = torch.cat(hidden)                                                                      # (N, C)
    reference = torch.cat([x.reference for x in layouts]).to(device)                                # (N, C)
    terms = torch.tensor([t for x in layouts for t in x.terms], device=device)                      # (N, len(TERMS))
    target = torch.tensor([t for x in layouts for t in x.target], device=device)                    # (N,)
    loss, sums = VocabularyLoss.apply(hidden, model.flag_unembed, reference, model.head_weight, terms[:, :-1],
                                      weights[:-1], target, after)
    if model.kind_rows is None:
        return loss, F.pad(sums, (0, 1))
    kind = kind_loss(hidden[terms[:, -1] > 0], model.kind_rows, [x.kind for x in layouts])
    return loss + weights[-1] * kind, torch.cat([sums, kind.detach()[None]])


def kind_loss(hidden, kind_rows, kinds):
    """The sum of -log p(kind), in nats, of answers' hidden states (B, C) at their first positions. p is the softmax of
    hidden kind_rows^T (n_kinds rows, which train along and are thrown away; the vocabulary has no part in it).

    Whether a record is harmful is one bit, and a small model can learn these bits by heart. To tell fraud from theft, from
    a story about a theft and from cooking it has to find out what is asked, and the flag is read off the same state
    (multi-task learning, Caruana, Machine Learning 28, 1997).
    """
    return F.cross_entropy(F.linear(hidden.to(kind_rows.dtype), kind_rows), torch.tensor(kinds, device=hidden.device),
                           reduction="sum")


# Positions whose logits exist at a time: on a CPU so few that both models' (31 MB for 49k words) lie in memory that is
# kept for the next chunk (cli.py, keep_memory)
CHUNK = {"cpu": 80}
CHUNK_ELSEWHERE = 1024


class VocabularyLoss(torch.autograd.Function):
    """(loss, sums) as of `objective`, L_kind left out, of hidden states (N, C), the flags' rows (F, C) and pi_0's hidden
    states (N, C).

    Logits of a whole batch and their gradient would be the largest tensors of training by far. But a position's
    gradient depends on nothing else, so it is taken on the way forward, and no more than a chunk's logits exist at a
    time (as in Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden, flag_rows, reference, head, terms, weights, target, after):
        n, chunk = len(hidden), CHUNK.get(hidden.device.type, CHUNK_ELSEWHERE)
        # on a CPU filled up with positions that count for nothing: a product of another size is compiled anew there
        spare = -n % chunk if hidden.device.type == "cpu" else 0
        chunks = lambda x: F.pad(x, (0, 0) * (x.ndim - 1) + (0, spare)).split(chunk)
        sums, d_hidden, d_rows = 0, [], torch.zeros_like(flag_rows)
        for h, r, t, said in zip(*map(chunks, (hidden, reference, terms, target))):
            part = chunk_terms(h, flag_rows, r, head, t, weights, said, after, ctx.needs_input_grad[0])
            sums, d_rows = sums + part[0], d_rows + part[1]
            d_hidden.append(part[2])
        ctx.save_for_backward(torch.cat(d_hidden)[:n] if ctx.needs_input_grad[0] else None, d_rows)
        ctx.mark_non_differentiable(sums)
        return (sums * weights).sum(), sums

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_rows = ctx.saved_tensors
        return None if d_hidden is None else d_hidden * d_loss, d_rows * d_loss, None, None, None, None, None, None


def chunk_terms(hidden, flag_rows, reference, head, terms, weights, target, after, hidden_too):
    """(sums of the terms, gradient of the flags' rows, and if `hidden_too` that of the hidden states) of n positions.

    With z the words' logits, u the flags', odds = logsumexp(u) - logsumexp(z), f = sigmoid(odds) and q = softmax(z):

        d KL(pi_0 || q) = (q - p_0) dz      d -log f = -(1 - f) d odds      d -log(1 - f) = f d odds
        d odds = softmax(u) du - q dz       d -log q[target] = (q - 1[target]) dz
    """
    n, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    z = F.linear(torch.cat([hidden, reference]), head).to(wide)         # (2n, V): both models', the head read but once
    log_q, log_p0 = z.log_softmax(-1).chunk(2)                                                      # (n, V) each
    flags = F.linear(hidden.to(wide), flag_rows.to(wide))                                           # (n, F)
    odds = flags.logsumexp(-1) - (z[:n, 0] - log_q[:, 0])                                           # (n,)
    del z
    p0 = log_p0.exp()
    kl = (p0[:, None] @ log_p0.sub_(log_q)[:, :, None]).flatten()       # (n,), as a product: no further (n, V)
    log_f, log_not_f = F.logsigmoid(odds), F.logsigmoid(-odds)
    behind = -log_q.gather(-1, target[:, None])[:, 0] if after == "ce" else kl
    sums = (torch.stack([kl - log_not_f, -log_f, behind - log_not_f, kl], -1) * terms).sum(0)

    by_benign, by_flag, by_after, by_words = (terms * weights.to(wide)).unbind(-1)                  # (n,) each
    by_kl = by_benign + by_words + (0 if after == "ce" else by_after)
    by_ce = by_after if after == "ce" else 0 * by_after
    d_odds = (by_benign + by_after) * log_f.exp() - by_flag * log_not_f.exp()                       # (n,)
    d_flags = d_odds[:, None] * flags.softmax(-1)                                                   # (n, F)
    d_rows = d_flags.T @ hidden.to(wide)
    if not hidden_too:
        return sums, d_rows, None
    dz = log_q.exp_().mul_((by_kl + by_ce - d_odds)[:, None]).addcmul_(p0, by_kl[:, None], value=-1)  # (n, V)
    dz[torch.arange(len(dz)), target] -= by_ce
    return sums, d_rows, dz.to(head.dtype) @ head + (d_flags @ flag_rows.to(wide)).to(head.dtype)
