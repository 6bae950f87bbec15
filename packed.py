"""Reading many rows at once for training and scoring: no padding, and what rows have in common is read once.

A batch becomes one sequence of N tokens. Everything in a Llama but attention works token by token, so it does not ask
whose token it is; attention looks the rows' tokens up. With a chat template's system text at the head of every prompt,
and a harmful answer read twice, with the flag in it and without, this saves a third of the work (less where the blocks
below LoRA have been read before). The picture is drawn as if two shared tokens were worth it, see WORTH.

    row 0   s s s a b c         packed        s s s   a b c   d e   f
    row 1   s s s d e           paths of 2    0 1 2   6 7 8
    row 2   s s s d e f         segments      three at 0, (three and two) at 3, one at 5

On a GPU all of it is attended at once, under a mask that says who sees whom.
"""
import os

import torch
from torch import nn

from model import attend, visible


WORTH = 8  # tokens: less is not shared by two rows alone, for each start costs products of its own
SIDE_BY_SIDE = 8  # rows of like length attended together: more share their products, fewer waste less on padding
# Up to so many tokens attend to all the others under one mask, which holds the rows' borders: for a GPU that is less work
# than to start a product for each few rows. A CPU would spend most of its time on what the mask hides.
ONE_MASK = {"cpu": 0, "mps": 0}
ONE_MASK_ELSEWHERE = 8192
ROUND = 64  # N is a multiple: for each size that it meets oneDNN compiles products and keeps them, megabytes of code


class Packed:
    """Rows (lists of ids) as one sequence: `ids`, a list, and `paths`, for each row the places of its tokens in it. As
    model(ids, cache) takes it for a cache: it knows the tokens' positions, and how they attend to each other."""

    longest = 0  # nothing was read before

    def __init__(self, rows, device):
        self.ids, positions, self.paths, segments = [], [], [None] * len(rows), {}
        shared = os.path.commonprefix(rows)
        path, last = [], []
        for i, row in [(None, shared)] + sorted(enumerate(rows), key=lambda item: item[1]):  # neighbours share most
            start = len(os.path.commonprefix([last, row]))
            start = start if start >= len(shared) + WORTH else min(start, len(shared))
            new = range(len(self.ids), len(self.ids) + len(row) - start)
            path, last = path[:start] + list(new), row
            self.ids += row[start:]
            positions += range(start, len(row))
            if i is not None:
                self.paths[i] = path
            if new:
                segments.setdefault(start, []).append((new, path))
        spare = -len(self.ids) % ROUND
        self.ids, positions = self.ids + [0] * spare, positions + [0] * spare
        self.at = torch.tensor(positions, device=device)[None]                                      # (1, N)
        self.sees = self.groups = self.back = None
        if len(self.ids) <= ONE_MASK.get(torch.device(device).type, ONE_MASK_ELSEWHERE):
            self.sees = one_mask(segments, len(self.ids)).to(device)                                # (1, 1, N, N)
            return
        self.groups = [Group(start, members[i:i + SIDE_BY_SIDE], device) for start, members in segments.items()
                       for members in [sorted(members, key=lambda m: len(m[0]))]
                       for i in range(0, len(members), SIDE_BY_SIDE)]
        self.back = torch.cat([g.own for g in self.groups]).argsort()
        self.back = nn.functional.pad(self.back, (0, spare))                                        # (N,)

    def positions(self, n_new):
        assert n_new == len(self.ids)
        return self.at

    def advance(self, n_new):
        pass

    def attend(self, layer, q, k, v, mask):
        """Attention (1, H, N, D) of q to k, v (1, K, N, D), each token to those before it in its row."""
        if self.sees is not None:  # k and v repeated for the query heads that share them: so the fused kernel takes a mask
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            if self.sees.dtype == torch.bool:  # once, and not in each block anew
                self.sees = torch.zeros_like(self.sees, dtype=q.dtype).masked_fill_(~self.sees, float("-inf"))
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.sees)
        D = q.shape[3]
        q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (q, k, v))                              # (N, H D), (N, K D)
        pick = lambda x, where: nn.functional.embedding(where, x)  # its backward is quicker than that of x[where]
        take = lambda x, where: pick(x, where).unflatten(-1, (-1, D)).transpose(1, 2)
        found = []
        for g in self.groups:
            y = attend(take(q, g.queries), take(k, g.keys), take(v, g.keys), g.mask)                # (B, H, T, D)
            found.append(pick(y.transpose(1, 2).flatten(0, 1).flatten(1), g.real))                  # (n, H D)
        return pick(torch.cat(found), self.back).unflatten(-1, (-1, D)).transpose(0, 1)[None]       # (1, H, N, D)


def one_mask(segments, n):
    """Which of n places each of them sees, (1, 1, n, n): those of its row, up to itself."""
    sees = torch.eye(n, dtype=torch.bool)  # the spare ones themselves: to see nothing would be 0 / 0
    for start, members in segments.items():
        for new, path in members:
            sees[new.start:new.stop, path] = visible(torch.arange(start, start + len(new))[None], start)[0, 0]
    return sees[None, None]


class Group:
    """Segments that begin at the same position, attended side by side: B of them, T the longest, S what is before."""

    def __init__(self, start, members, device):
        T = max(len(new) for new, _ in members)
        fill = lambda places, n: [*places, *[0] * (n - len(places))]  # with any token: nobody looks at it
        tensor = lambda x: torch.tensor(x, device=device)
        self.queries = tensor([fill(new, T) for new, _ in members])                                 # (B, T)
        self.keys = tensor([fill(path, start + T) for _, path in members])                          # (B, S+T)
        self.mask = visible(start + torch.arange(T, device=device)[None], start) if start else None  # (1, 1, T, S+T)
        self.own = tensor([place for new, _ in members for place in new])                           # (n,)
        self.real = tensor([b * T + t for b, (new, _) in enumerate(members) for t in range(len(new))])


def read(model, rows, at):
    """Final hidden states of rows (lists of ids) at positions at[i] of row i, a list of (len(at[i]), C)."""
    packed = Packed(rows, model.inv_freq.device)
    return final_states(model, torch.tensor([packed.ids], device=packed.at.device), packed, at)


def final_states(model, x, packed, at, first=0):
    """`read`, from what goes into block `first` at all places of a Packed: x, (1, N, C), or ids."""
    places = [path[j] for path, positions in zip(packed.paths, at) for j in positions]
    keep = torch.tensor(places + [0] * (-len(places) % ROUND), dtype=torch.long, device=packed.at.device)
    hidden = model(x, packed, first=first, keep=keep)[0]                                            # (n, C)
    return hidden[:len(places)].split([len(positions) for positions in at])


def read_below(model, rows):
    """What the blocks below LoRA make of rows (lists of ids): a list of (len, C), the same with the adapter switched on
    or off. None for each row where there are no such blocks."""
    if not model.n_frozen:
        return [None] * len(rows)
    packed = Packed(rows, model.inv_freq.device)
    below = model(torch.tensor([packed.ids], device=packed.at.device), packed, last=model.n_frozen)[0]  # (N, C)
    return [below[path] for path in packed.paths]


def go_on(model, rows, below, at):
    """`read` of rows of which `read_below` has been read."""
    if below[0] is None:
        return read(model, rows, at)
    packed = Packed(rows, model.inv_freq.device)
    states = torch.zeros(len(packed.ids), below[0].shape[1], dtype=below[0].dtype, device=below[0].device)
    for path, row in zip(packed.paths, below):
        states[path] = row
    return final_states(model, states.to(packed.at.device)[None], packed, at, model.n_frozen)


def read_both(model, rows, reference_rows, at, reference_at):
    """(`read` of the rows, `read` of the reference rows by the original model). The blocks below LoRA give both models
    the same, so they read what both see but once."""
    with torch.no_grad():
        below = read_below(model, rows + reference_rows)
        with model.flag_off():
            reference = go_on(model, reference_rows, below[len(rows):], reference_at)
    return go_on(model, rows, below[:len(rows)], at), reference
