"""A chat of several turns in a terminal: `python sample.py --chat`.

The cache is kept, so that a turn reads only what is new. Ctrl-C ends the answer being written, Ctrl-D the chat.
"""
import dataclasses
import sys

from answer import BRANCHING, MODES, Row
from cli import say
from memory import Memory
from prompts import Settings
from reflect import read_demos
from sample import show, write

CONTEXT = 16_384  # tokens of a chat at most: the cache is as long from the start
COMMANDS = "/mode NAME, /threshold X, /reset, /quit"


class Conversation:
    """Turns with one model: `ask` gives the Events of an answer, which then belongs to the turns so far."""

    def __init__(self, model, tok, settings, system=None):
        self.model, self.tok, self.system, self.settings = model, tok, system, settings.of(model)
        self.turns = []  # (the user's text, ids of the answer, with the flags in it)
        self.limit = min(model.config.max_position_embeddings, CONTEXT)
        self.memory = Memory(model, 1, self.limit)
        self.set()

    def set(self, **change):
        """Changes settings from the next turn on. Raises ValueError, and changes nothing, for one that will not do."""
        settings = dataclasses.replace(self.settings, **change)
        problems = settings.problems([settings.mode], self.model.threshold)
        if settings.mode != "off" and not self.model.n_flags:
            problems.append(f"mode {settings.mode} needs an adapter, and none is loaded")
        if problems:
            raise ValueError("; ".join(problems))
        self.demos = read_demos(settings.demos) if settings.mode in BRANCHING else None
        self.settings = settings

    def ids(self, text, operator):
        """The conversation as ids, answers as they were written, to where the answer to `text` begins."""
        tok, system = self.tok, [] if self.system is None else [{"role": "system", "content": self.system}]
        message = lambda text, role="user": {"role": role, "content": text}
        asked = [question for question, _ in self.turns] + [text]
        ids = tok.render(system + [message(asked[0])], operator=operator)[0]
        header, _, end, gap = tok.turn(message("", "assistant"))
        for (_, answer), text in zip(self.turns, asked[1:]):
            ids = ids + answer + end + gap + sum(tok.turn(message(text)), []) + header
        return ids

    def ask(self, text):
        """Events of the answer. Raises ValueError for an empty text, and where the context is full."""
        if not text.strip():
            raise ValueError("nothing was asked: wanted a question, or a command: " + COMMANDS)
        s, limit = self.settings, self.limit
        ids, shown = self.ids(text, ""), self.ids(text, self.demos.text) if self.demos else []
        if len(ids) >= limit:
            raise ValueError(f"the chat has {len(ids)} tokens, and there is room for {limit}: /reset it")
        return self.answer(Row(len(self.turns), text, ids, [], s.mode, s, self.tok, self.demos, shown, limit))

    def answer(self, row):
        try:
            yield from write(self.model, self.tok, [row], self.settings, memory=self.memory)
        finally:  # closed, or interrupted, before its end: what the reader has seen remains
            if not row.stop_reason:
                list(row.cancel())
            self.turns.append((row.prompt, row.ids[row.n_prompt:]))

    def reset(self):
        self.turns = []


def chat(config, model, tok):
    """Reads lines from stdin and answers them on stdout; notes and errors go to stderr."""
    talk = Conversation(model, tok, Settings(**config.settings()), config.system)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say(f"mode {config.mode}; {COMMANDS}; Ctrl-C ends an answer, Ctrl-D the chat")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return print() if terminal else None
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        try:
            if line.startswith("/"):
                if line.split()[0] == "/quit":
                    return
                say(command(talk, *line.split()))
            else:
                print_answer(talk.ask(line))
        except ValueError as e:
            say(f"error: {e}")


def command(talk, name, *values):
    """What a line that begins with / has done, in words."""
    if name == "/reset" and not values:
        talk.reset()
        return "a new chat"
    if name == "/mode" and len(values) == 1:
        talk.set(mode=values[0])
        return f"mode {values[0]}"
    if name == "/threshold" and len(values) == 1:
        try:
            talk.set(threshold=float(values[0]))
        except ValueError as e:
            raise ValueError(f"threshold {values[0]}: wanted a probability from 0 to 1 ({e})") from None
        return f"threshold {values[0]}"
    raise ValueError(f"{' '.join((name, *values))}: wanted one of {COMMANDS}; modes are {', '.join(MODES)}")


def print_answer(events):
    try:
        for e in events:
            if e.released:
                show(e.i, e.text, e.f or 0.0)
    except KeyboardInterrupt:
        events.close()
        print(flush=True)
        say("cancelled")
    else:
        print(flush=True)
