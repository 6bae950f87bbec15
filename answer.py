"""One answer in the making, as the host knows it: where the flag is raised, what is taken back, what a reader sees.

    Row.step(token, f, state)      takes in what the device has done at one position, and gives the Events of it

Where the row is to go on elsewhere than where the device is (a reflection begins, or is taken back), it sets `moved`,
and the device starts anew from the row's ids.
"""
import itertools
from collections import deque
from dataclasses import dataclass

import torch

from measures import sustained

NOTICE = "[stopped here: the model raised its red flag]"
WINDOW = 40  # tokens behind the opening within which a reflection may call its flag a false alarm
BUFFER = 16  # tokens held back in mode backtrack: twice the longest way from flag to onset in the README's evaluation
MODES = ("off", "shadow", "stop", "reflect", "backtrack")
BRANCHING = MODES[3:]
STATES = ("normal", "forced", "flagged", "done")
NORMAL, FORCED, FLAGGED, DONE = range(4)


@dataclass(frozen=True)
class Answer:
    """One answer, and what the flag said of it.

    flag_prob[t] is f at the position where answer token t is chosen; a prefill's tokens are the answer's first. An
    answer that ended by itself or was stopped has one f more than tokens: that of the token not written.
    In modes reflect and backtrack text, tokens and flag_prob are what was not taken back; the flag's own place, which
    is no token of the answer, has no f there.
    """
    prompt: str | list
    text: str             # what a reader saw
    flagged: bool
    flag_at: int | None   # where the flag was first raised: f > threshold, there and at the debounce - 1 before, if any
    score: float | None   # the highest f that lasted `debounce` positions, of what was taken back too; None in mode off
    flag_prob: list
    tokens: list          # ids
    stop_reason: str      # eos, length, flag, stop (one of the stop strings), cancelled; transcript where it was read


@dataclass(frozen=True)
class Event:
    """Something that happened to one answer.

    Read in order they give the answer: `text` of those with `released`, joined, is its text and was never more than
    the beginning of it; the tokens of kind "token", each "takeback" dropping all from `at` on, are its tokens.
    """
    i: int                        # the prompt's place
    kind: str                     # token, release (of text held back), flag, takeback, end
    at: int                       # place in the answer: of the token, the flag, the first token taken back
    token: int | None = None
    text: str = ""
    f: float | None = None        # None in mode off
    state: str = "normal"         # normal, forced, reflecting, flagged, done
    released: bool = False        # may be shown; what is held back comes with a release later, or never
    spent: int = 0                # tokens taken back: by this takeback; in the whole answer at its end
    answer: Answer | None = None  # at its end


def flag_place(f, threshold, debounce):
    """(the first position with f > threshold there and at the debounce - 1 before it, or None; how many positions
    above it the list ends with). What would lie before an answer's first position counts as above."""
    run = debounce - 1
    for t, x in enumerate(f):
        run = 0 if x <= threshold else run + 1  # NaN is above
        if run == debounce:
            return t, run
    return None, run


def onset(f, t, low, debounce, first):
    """Where the run of f above low that leads to position t begins, but `first` at the earliest. Fewer than `debounce`
    positions in a row that are not above it do not break the run."""
    begin, gap = t, 0
    for j in range(t - 1, first - 1, -1):
        gap = 0 if f[j] > low else gap + 1
        if gap == debounce:
            break
        begin = begin if gap else j
    return begin


class Row:
    """An answer in the making, as the host knows it. Its methods give the Events of what happens to it; a reader has
    seen the text of no token but the first n_shown."""

    def __init__(self, i, prompt, start, prefill, mode, s, tok, demos, shown, context):
        """start: ids of the prompt; prefill: of the answer's beginning; shown: of the prompt with the demonstrations
        in it, for reflections; context: how many ids the model can read."""
        self.i, self.prompt, self.mode, self.s, self.tok, self.demos = i, prompt, mode, s, tok, demos
        self.ids, self.n_prompt, self.start, self.shown = list(start), len(start), start, shown
        self.prefill, self.ahead, self.context = prefill, prefill, context  # ahead: to be read together with ids
        self.unread = True                                       # the cache holds another prompt, or none
        self.threshold = s.threshold or 0.0                      # there is none in mode off
        self.low = self.threshold / 2 if s.low is None else s.low
        self.buffer = s.buffer if s.buffer is not None else BUFFER if mode == "backtrack" else 0
        self.n_max = min(len(prefill) + s.max_new_tokens, context - len(start))
        generator = torch.Generator().manual_seed((s.seed * 1_000_003 + i) % (2 ** 32 - 5))
        # the first number is for the first token behind the prefill, the last ones for a reflection that begins in it
        self.draws = torch.rand(self.n_max, generator=generator).roll(len(prefill))
        self.tokens, self.probs, self.pieces, self.piece = [], [], [], tok.stream()  # an entry a token of the answer
        self.flags = []                                          # places of the answer before which ids holds a flag
        self.text, self.n_shown = "", 0
        self.branch = self.said = None                           # where an undecided reflection begins; its own words
        self.first = 0                                           # where the last one that stayed was decided
        self.flag_at, self.score, self.n_raised, self.spent, self.stop_reason = None, None, 0, 0, None
        self.latest = deque(maxlen=s.debounce)                   # f, as it was read
        self.go(run=s.debounce - 1)

    def go(self, queue=(), quiet=0, wait=False, run=0):
        """How the device is to go on behind ids: ids to force, positions without a decision, waiting for a low f."""
        self.queue, self.quiet, self.wait, self.run, self.moved = list(queue), quiet, wait, run, True

    def place(self):
        return len(self.tokens) - sum(i in self.tok.flag_ids for i in self.queue)  # a flag takes no place in the answer

    def end_at(self):
        n_flags = len(self.flags) + sum(i in self.tok.flag_ids for i in self.queue)
        return min(self.n_max, self.context - self.n_prompt - n_flags)

    def most_ids(self):
        n_more = self.s.max_flags if self.mode in BRANCHING else 0
        return min(self.context, max(len(self.start), len(self.shown)) + self.n_max + n_more)

    def most_forced(self):
        opening = len(self.tok.encode("\n\n" + self.demos.opening)) if self.mode in BRANCHING else 0
        return max(1 + opening, len(self.prefill))

    def begin(self, f):
        """The prompt and the prefill have been read, f (a list) at each token of the latter."""
        at, run, self.ahead = None, 0, []
        if self.mode not in ("off", "shadow"):
            at, run = flag_place(f, self.threshold, self.s.debounce)
        for token, x in zip(self.prefill[:at], f):
            if not self.stop_reason:
                yield from self.step(token, x, DONE if token in self.tok.stop_ids else FORCED)
        if at is not None and not self.stop_reason:
            yield from self.step(None, f[at], FLAGGED)
        elif at is None:
            self.go(run=run)

    def step(self, token, f, state):
        """What a step of the device did."""
        self.latest.append(f)
        self.score = max(sustained(self.latest, self.s.debounce)[-1], self.score or 0.0)
        if state == FLAGGED:
            yield from self.raise_flag(f)
        elif state == DONE and token in self.tok.stop_ids:
            self.probs.append(f)
            yield from self.end("eos")
        else:
            yield from self.take(token, f, STATES[state] if state == FORCED else "normal")
            if state == DONE and not self.stop_reason and not self.moved:
                yield from self.end("length")

    def take(self, token, f, state):
        """A token has been written."""
        self.ids.append(token)
        if token in self.tok.flag_ids:
            self.flags.append(len(self.tokens))
            return
        self.tokens.append(token)
        self.probs.append(f)
        self.pieces.append(self.piece(token))
        cut = self.find_stop()
        at_once = cut is None and self.n_free() == len(self.tokens) == self.n_shown + 1
        yield from self.tell(len(self.tokens) - 1, "token", "reflecting" if self.branch is not None else state, at_once)
        if self.branch is not None and (yield from self.reflected()):
            return
        if cut is not None:
            yield from self.cut(cut)
        else:
            yield from self.show(self.n_free())

    def tell(self, at, kind, state="normal", released=True):
        """The event of a token; where it is released, a reader has its text from now on."""
        if released:
            self.text, self.n_shown = self.text + self.pieces[at], at + 1
        yield Event(self.i, kind, at, self.tokens[at], self.pieces[at], self.f(self.probs[at]), state, released)

    def f(self, f):
        return None if self.mode == "off" else f

    # ------------------------------------------------------------------------------- what the reader sees

    def n_free(self):
        """How many tokens a reader may see: not the newest `buffer`, no reflection that is undecided, and nothing that
        ends with what may be the beginning of a stop string."""
        n = min(len(self.tokens) - self.buffer, len(self.tokens) if self.branch is None else self.branch)
        beginnings = tuple(x[:k] for x in self.s.stop for k in range(1, len(x)))
        while n > self.n_shown and beginnings and "".join(self.pieces[:n]).endswith(beginnings):
            n -= 1
        return max(n, self.n_shown)

    def show(self, n):
        """Releases what was held back, up to n tokens."""
        while self.n_shown < n:
            yield from self.tell(self.n_shown, "release")

    def find_stop(self):
        """Before which character of the text the answer ends, as a stop string begins there that does not lie within
        the prefill; else None."""
        if not self.s.stop:
            return None
        text, known = "".join(self.pieces), len(self.tok.decode(self.prefill))
        found = [text.find(x, max(known - len(x) + 1, 0)) for x in self.s.stop]
        return min((at for at in found if at >= 0), default=None)

    def cut(self, at):
        """Ends the answer before character `at` of the text."""
        starts = [0, *itertools.accumulate(map(len, self.pieces))]
        n = max(sum(start < at for start in starts[:-1]), self.n_shown)
        yield from self.take_back(n)
        if n > self.n_shown:
            self.pieces[-1] = self.pieces[-1][:at - starts[n - 1]]
        self.piece = self.tok.stream()  # half a character behind it is no part of the answer
        yield from self.end("stop")

    def end(self, reason):
        """Ends the answer: all that was held back is released."""
        rest, self.branch = self.piece(None), None
        if rest and self.n_shown < len(self.tokens):
            self.pieces[-1] += rest
            rest = ""
        yield from self.show(len(self.tokens))
        rest += (" " if self.text or rest else "") + NOTICE if reason == "flag" else ""
        if rest:
            self.text += rest
            yield Event(self.i, "release", len(self.tokens), None, rest, self.f(self.probs[-1]), "done", True)
        yield self.ended(reason)

    def cancel(self):
        """Ends the answer where the reader is."""
        if self.n_shown < len(self.tokens):
            yield from self.take_back(self.n_shown)
        yield self.ended("cancelled")

    def ended(self, reason):
        self.stop_reason = reason
        if self.mode == "shadow":
            self.flag_at = flag_place(self.probs, self.threshold, self.s.debounce)[0]
        off = self.mode == "off"
        answer = Answer(self.prompt, self.text, self.flag_at is not None, self.flag_at, None if off else self.score,
                        [] if off else self.probs, self.tokens, reason)
        return Event(self.i, "end", len(self.tokens), state="done", spent=self.spent, answer=answer)

    # ----------------------------------------------------------------------------------------- turning back

    def raise_flag(self, f):
        """The flag has been raised at the answer's next place: stop, or turn off into a reflection."""
        t = len(self.tokens)
        self.flag_at = t if self.flag_at is None else self.flag_at
        self.n_raised += 1
        yield Event(self.i, "flag", t, f=f, state="flagged")
        if self.mode == "backtrack":
            t = onset(self.probs, t, self.low, self.s.debounce, max(self.first, self.n_shown))
            f = f if t == len(self.tokens) else self.probs[t]
            yield from self.take_back(t)
        self.moved = True  # whatever the device has written further on is void
        queue = []
        if self.mode in BRANCHING:
            queue = [self.tok.flag_id, *self.tok.encode(("\n\n" if self.tokens else "") + self.demos.opening)]
        room = min(self.n_max, self.context - len(self.shown) - len(self.flags) - 1) - t
        if not queue or self.n_raised > self.s.max_flags or room < len(queue):  # a word behind the opening must fit
            self.probs.append(f)
            yield from self.end("flag")
        else:
            self.latest.clear()  # what follows does not stand beside what came before
            self.branch, self.said = t, t + len(queue) - 1
            self.put_behind(self.shown)
            self.go(queue, len(queue) + WINDOW)

    def reflected(self):
        """Decides about a reflection as soon as it can be; true where it was taken back, as a false alarm."""
        if self.demos.false_alarm in self.tok.decode(self.tokens[self.said:]).lower():
            yield from self.take_back(self.branch)
            self.latest.clear()
            self.branch = None
            self.put_behind(self.shown if self.flags else self.start)
            self.go(self.prefill[len(self.tokens):], wait=True)
            return True
        if len(self.tokens) == self.said + WINDOW:
            self.branch, self.first = None, len(self.tokens)
        return False

    def put_behind(self, start):
        """Gives the answer another prompt: the demonstrations are there for a reflection, and for what follows one that
        stays, but not before the first flag. They would move f away from what the threshold was calibrated on, and
        make every prompt longer."""
        self.ids, self.n_prompt, self.unread = start + self.ids[self.n_prompt:], len(start), True

    def take_back(self, n):
        """Drops the answer's tokens from place n on, none of which a reader has seen."""
        assert n >= self.n_shown
        self.flags = [t for t in self.flags if t < n]
        n_ids = self.n_prompt + n + len(self.flags)
        spent = len(self.ids) - n_ids
        del self.tokens[n:], self.probs[n:], self.pieces[n:], self.ids[n_ids:]
        self.spent += spent
        self.piece = self.tok.stream()  # with half a character in it, where one has been cut
        for token in self.tokens:
            self.piece(token)
        if spent:
            yield Event(self.i, "takeback", n, state="flagged", spent=spent)


def told(row, events, cancel):
    """The row's events, unless it is cancelled before or between them; then its end."""
    events = iter(events)
    while row.i not in cancel:
        e = next(events, None)
        if e is None:
            return
        yield e
    if not row.stop_reason:
        yield from row.cancel()
