"""A word out of a distribution: logit bias, repetition penalty, temperature, top-k, top-p, min-p, by hand.

f has been read by the time any of this happens, and none of it sees the flag. The order is that of transformers'
`generate`. Shapes: B rows, V words.
"""
import torch


def choose(words, seen, u, bias, s):
    """A token for each row (B,), of its word logits (B, V) by the settings s; seen (B, V): where it is true the word
    stands in the row's text already; u (B,): a uniform number for each row; bias (V,) or None."""
    if bias is not None:
        words = words + bias
    if s.repetition_penalty != 1:
        words = penalise(words, seen, s.repetition_penalty)
    return pick(words, u, s.temperature, s.top_k, s.top_p, s.min_p)


def penalise(words, seen, penalty):
    """The logits, made less likely where the word has been seen: divided by the penalty, or multiplied if negative.
    Source: CTRL (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(words > 0, words / penalty, words * penalty), words)


def pick(words, u, temperature, top_k, top_p, min_p=0.0):
    """A token for each row (B,), of its word logits (B, V) and its uniform number u (B,): the inverse of the
    cumulative distribution at u, after temperature, top-k, top-p and min-p."""
    if temperature == 0:
        return words.argmax(-1)
    order, V = None, words.shape[-1]
    words = (words - words.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # fp32 would divide by 0
    if top_k:
        words, order = words.topk(min(top_k, V), dim=-1)                            # sorted, (B, k)
    logp = torch.log_softmax(words, -1)
    if top_p < 1 and not top_k and words.is_cuda:  # there sorting is cheap, and to ask how many suffice is a sync
        logp, order = logp.sort(dim=-1, descending=True)
    elif top_p < 1 and not top_k:  # the likeliest 512 words nearly always hold top_p; sorting all of them is slow
        logp_512, order_512 = logp.topk(min(512, V), dim=-1)
        enough = logp_512.exp().sum(-1) > top_p
        if enough.any() and not enough.all():  # apart, as ties come out in another order: a row must not see its batch
            tokens = torch.empty(len(words), dtype=torch.long, device=words.device)
            for part in (enough, ~enough):
                tokens[part] = pick(words[part], u.to(words.device)[part], 1.0, 0, top_p, min_p)
            return tokens
        logp, order = (logp_512, order_512) if enough.all() else logp.sort(dim=-1, descending=True)
    probs = logp.exp()
    if top_p < 1:  # keep the words before which less than top_p has been seen, so at least the first
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    if min_p:
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    cdf = probs.cumsum(-1)
    at = torch.searchsorted(cdf, u.to(cdf.device)[:, None] * cdf[:, -1:], right=True)
    at = at.clamp(max=cdf.shape[-1] - 1)                                            # (B, 1)
    return (at if order is None else order.gather(-1, at))[:, 0]
