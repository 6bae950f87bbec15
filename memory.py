"""What has been read: a cache of keys and values that knows whose they are, so that nothing is read twice."""
import os

from answer import told
from cache import Cache
from objective import flag_prob, pad


class Memory:
    """A cache, and which ids are in each of its rows, so that nothing is read twice: a row that turns back is cropped,
    the next turn of a chat reads only what is new, and what two rows begin with is copied."""

    def __init__(self, model, n, max_len):
        self.cache = Cache(model, n, max_len)
        self.ids = [[] for _ in range(n)]  # ids[b][:-1] are in row b of the cache; the last one is read by the next step

    def reuse(self, b, row):
        """How many of the row's ids, not counting the last, are in row b of the cache, once it has what any other row
        of the cache has of them; the rest of row b is forgotten."""
        shared = [len(os.path.commonprefix([ids[:-1], row.ids[:-1]])) for ids in self.ids]
        n = max(shared)
        if shared[b] < n:
            self.cache.copy(shared.index(n), b, n)
        self.ids[b] = row.ids[:n + 1]
        return n

    def keep(self, rows):
        """Drop all rows but these (a list of ints)."""
        self.ids = [self.ids[b] for b in rows]
        self.cache.keep(rows)


def read_rows(reader, memory, slots, cancel):
    """Reads what the rows with a prompt not yet read have to read, but for the last id: that one is read by the next
    step. Gives the events of the prefills, where f is read at every token.

    The shortest is read first, so that the others can copy what they have in common with it (a system message), and
    then rows of about the same length side by side, so that there is little padding."""
    unread = [(b, row) for b, row in enumerate(slots) if row and row.unread and not row.stop_reason]
    length = lambda b_row: len(b_row[1].ids + b_row[1].ahead)
    unread.sort(key=length)
    groups = [unread[:1]] if unread else []
    for b_row in unread[1:]:
        shortest = length(groups[-1][0])
        if len(groups) == 1 or length(b_row) > shortest + 8 + shortest // 8:
            groups.append([])
        groups[-1].append(b_row)
    for group in groups:
        yield from read_together(reader, memory, [b_row for b_row in group if b_row[1].i not in cancel], cancel)


def read_together(reader, memory, unread, cancel):
    known = [memory.reuse(b, row) for b, row in unread]
    todo = [(b, row, n) for (b, row), n in zip(unread, known) if n < len(row.ids + row.ahead) - 1]
    ids, hidden, first = [], [], min((n for *_, n in todo), default=0)  # one beginning, so that they fit side by side
    if todo:
        ids = [(row.ids + row.ahead)[first:-1] for _, row, _ in todo]
        part = memory.cache.part([b for b, *_ in todo], [first] * len(todo))
        hidden = reader(pad(ids, memory.cache.k.device), part)                                      # (B, T, C)
    for b, row in unread:
        memory.ids[b], row.unread = row.ids, False  # the same list, which grows and shrinks with the row
    for (_, row, _), x, h in zip(todo, ids, hidden):
        if row.ahead:
            words, flags = reader.split_logits(h[row.n_prompt - 1 - first:len(x)])
            yield from told(row, row.begin(flag_prob(words, flags).tolist()), cancel)
