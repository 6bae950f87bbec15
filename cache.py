"""Keys and values of what has been read, for going on from there: what model(ids, cache) takes."""
import copy

import torch

from model import attend


class Cache:
    """Keys and values of the tokens read so far, preallocated; each row has its own length.

    A batch of ragged prompts is padded on the *right*, and cropped to its true lengths afterwards: what the padding
    wrote lies beyond a row's length, is never looked at, and is overwritten as the row goes on. So cropping leaves a
    row bit for bit as if it had never read what was cut off. (To read the same tokens in one go, or one by one, sums
    them up in another order: equal but for rounding.)
    """

    def __init__(self, model, n_rows, max_len):
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, n_rows, c.num_key_value_heads, max_len, c.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in "kv")
        self.max_len, self.rows = max_len, slice(None)
        self.crop([0] * n_rows)

    def crop(self, lengths):
        """Forget all but the first lengths[b] tokens of each row (a list of ints)."""
        self.lengths = torch.tensor(lengths, device=self.k.device)                  # (B,)
        self.longest = max(lengths)  # the host's own copy: slicing by it needs no sync

    def keep(self, rows):
        """Drop all rows but these (a list of ints)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.crop(self.lengths[rows].tolist())

    def copy(self, row, to, n):
        """The first n tokens of one row (an int) become those of another."""
        for x in (self.k, self.v):
            x[:, to, :, :n] = x[:, row, :, :n]

    def part(self, rows, lengths):
        """These rows alone (lists of ints), the first `lengths` tokens of each; what is read into them lands here. The
        other rows stay as they are; crop this cache to its new lengths afterwards."""
        part = copy.copy(self)
        part.rows = rows
        part.crop(lengths)
        return part

    def positions(self, n_new):
        if self.longest + n_new > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens; {self.longest} are in it and {n_new} more came")
        return self.lengths[:, None] + torch.arange(n_new, device=self.k.device)    # (B, T)

    def attend(self, layer, q, k, v, mask):
        """Attention of q (B, H, T, D) to what a row holds, and to its new k, v (B, K, T, D), which are written."""
        return attend(q, *self.write(layer, k, v), mask)

    def write(self, layer, k, v):
        T, where = k.shape[2], self.positions(k.shape[2])
        rows = torch.arange(self.k.shape[1], device=k.device)[self.rows, None]      # (B, 1)
        self.k[layer][rows, :, where] = k.transpose(1, 2)
        self.v[layer][rows, :, where] = v.transpose(1, 2)
        return self.read(layer, T)

    def read(self, layer, n_new):
        return tuple(x[layer, self.rows, :, :self.longest + n_new] for x in (self.k, self.v))

    def advance(self, n_new):
        self.lengths, self.longest = self.lengths + n_new, self.longest + n_new

    def back(self, rows):
        """Forget the last token of the rows where `rows` (B,), on the device, is true: without a sync, so `longest` may
        be too long afterwards, but not so that a row with room left for a token finds the cache full."""
        self.lengths, self.longest = self.lengths - rows.long(), min(self.longest, self.max_len - 1)
