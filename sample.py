"""Answers with the red flag read at every token: the engine, and its command line.

    python sample.py --prompt "What is the capital of France?"
    python sample.py --prompts prompts.jsonl --mode shadow --json > answers.jsonl
    python sample.py --prompt "..." --mode backtrack --events        # one JSON object for all that happens
    python sample.py --chat --mode reflect                           # several turns in a terminal
    python sample.py --prompt "..." --mode shadow --html page.html
    python sample.py --transcript chats.jsonl --html page.html       # reads any model's answers, and writes none

f is the flag's probability at a position: what the model would put there next, read from the raw softmax over all
V + F tokens, before anything that a caller may set. No setting can lower it. Words are always drawn from the
distribution without the flag, so the flag itself never reaches a reader. Modes:

    off        answer as if there were no flag; f is not reported
    shadow     the same words as off, and f for every token
    stop       where the flag is raised, give a fixed notice in place of the rest
    reflect    where it is raised, write the flag and the opening of a reflection for the model, and let it go on. Either
               it calls the flag a false alarm: the reflection is taken back unseen, and the answer goes on from there.
               Or a safe answer follows. Dialogues that show it both (reflect.txt) stand in the system message from the
               first flag on; until then words and f are those of shadow.
    backtrack  the same, but from the onset, where f began to rise; the newest tokens are held back so that nobody sees
               what is taken back

The flag is raised where f > threshold at `debounce` positions in a row, or at an answer's first. It is not raised within a
reflection as long as that is undecided, nor behind a false alarm until f has been below `low` once.

A step reads the last token of each row, reads f, and chooses the next token, all in tensors (Batch); every `sync_every`
steps the host looks at what has happened (Row), sends rows elsewhere, and puts the next prompt where a row has ended.
Between two looks rows run ahead of the host; what they wrote beyond a turning point is dropped. So a row's words depend
on nothing but its prompt, its place and the settings. What reads is the model, or on a CPU the faster decode.py; what
has been read is kept in memory.py. Shapes: B rows, C hidden, V words, Q ids to be forced.
"""
import dataclasses
import json
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from answer import BRANCHING, BUFFER, DONE, FLAGGED, FORCED, MODES, NORMAL, Row, told
from cli import option, parse, run
from decode import fast
from memory import Memory, read_rows
from model import Llama
from objective import flag_prob
from page import write_page
from prompts import Settings, check_prompt, read_prompts, read_transcripts
from reflect import DEMOS, read_demos
from tokenizer import Tokenizer
from words import choose


# ------------------------------------------------------------------------------------------- on the device

class Batch:
    """What a step needs to know of each row: tensors with an entry a row, so that no step waits for the host."""

    def __init__(self, n, n_queue, n_draws, n_words, device):
        tensor = lambda dtype, *shape: torch.zeros(n, *shape, dtype=dtype, device=device)
        self.state, self.token = tensor(torch.long), tensor(torch.long)  # token: the last id, which the next step reads
        self.at, self.end = tensor(torch.long), tensor(torch.long)       # the next token's place in the answer; its end
        self.queue, self.fed, self.n_queue = tensor(torch.long, n_queue), tensor(torch.long), tensor(torch.long)
        self.judged, self.wait = tensor(torch.bool), tensor(torch.bool)  # wait: until f is below low
        self.run, self.quiet = tensor(torch.long), tensor(torch.long)    # positions above; steps yet without a decision
        self.threshold, self.low = tensor(torch.float64), tensor(torch.float64)
        self.draws = tensor(torch.float32, n_draws)                      # a uniform number for each place
        self.seen = tensor(torch.bool, n_words)                          # ids in prompt and answer; (B, 0): not wanted

    def put(self, b, row):
        """Row b goes on as the host's Row says: a new one, or one that was sent elsewhere."""
        values = {"state": NORMAL, "token": row.ids[-1], "at": row.place(), "end": row.end_at(), "fed": 0,
                  "n_queue": len(row.queue), "judged": row.mode not in ("off", "shadow"), "wait": row.wait,
                  "run": row.run, "quiet": row.quiet, "threshold": row.threshold, "low": row.low}
        for name, value in values.items():
            getattr(self, name)[b] = value
        self.queue[b, :len(row.queue)] = torch.tensor(row.queue, dtype=torch.long)
        self.draws[b, :len(row.draws)] = row.draws
        if self.seen.shape[1]:
            self.seen[b] = False
            self.seen[b, row.ids] = True

    def keep(self, rows):
        """Drop all rows but these (a list of ints)."""
        for name, x in vars(self).items():
            setattr(self, name, x[rows])

    def step(self, f, pick, stops, debounce):
        """One position of every row: f (B,) is read there, pick(u) gives the words (B,) drawn by the numbers u, stops
        are the ids that end an answer. Returns (3, B), doubles: the token, f, and the state. Rows that are flagged or
        done stay as they are until the host has looked."""
        live = self.state < FLAGGED
        self.wait = self.wait & (f >= self.low)
        decides = live & self.judged & ~self.wait & (self.quiet == 0)
        self.run = torch.where(decides & ~(f <= self.threshold), self.run + 1, 0)  # NaN is above
        flagged = decides & (self.run >= debounce)
        writes, forced = live & ~flagged, self.fed < self.n_queue
        at = lambda x, index: x.gather(1, index.clamp(0, x.shape[1] - 1)[:, None])[:, 0]            # (B,) of (B, N)
        token = torch.where(forced, at(self.queue, self.fed), pick(at(self.draws, self.at)))
        self.at, self.fed = self.at + writes, self.fed + (writes & forced)
        self.quiet = (self.quiet - writes.long()).clamp(min=0)
        ended = writes & ((token[:, None] == stops).any(-1) | (self.at >= self.end))
        # a row that has ended reads its last token again, where it stands, until the host has looked
        self.token = torch.where(writes & ~ended, token, self.token)
        if self.seen.shape[1]:
            self.seen.scatter_(1, self.token[:, None], True)
        state = torch.where(flagged, FLAGGED, torch.where(ended, DONE, torch.where(forced, FORCED, NORMAL)))
        self.state = torch.where(live, state, self.state)
        return torch.stack([token.double(), f, self.state.double()])


# -------------------------------------------------------------------------------------------------- the loop

@torch.no_grad()
def stream(model, tok, prompts, cancel=(), **settings):
    """Yields the Events of the answers to all prompts, as they happen; settings: see Settings.

    A prompt is a string, a list of chat messages, or a record {"prompt": either, "prefill": text, "mode": its own}. An
    answer's words depend on `seed` and its place in `prompts`, not on its batch (in fp32; bf16 sums round differently
    for other shapes, which may tip a near tie). Put a prompt's place into the set `cancel`, between any two events, and
    its answer ends there; close the generator and all do.
    Raises ValueError, before any work, for a bad setting, an empty prompt, or one longer than the model's context.
    """
    s, prompts = Settings(**settings), list(prompts)
    checked = [check_prompt(p, f"prompt {i + 1}") for i, p in enumerate(prompts)]
    modes = {mode or s.mode for *_, mode in checked}
    problems = s.problems(modes, model.threshold)
    known = model.config.vocab_size + model.n_flags
    problems += [f"logit_bias has {token}: {value}, wanted an id below {known} and a number or -inf"
                 for token, value in (s.logit_bias or {}).items() if not 0 <= token < known or not value < math.inf]
    if modes - {"off"} and not model.n_flags:
        problems.append(f"mode {min(modes - {'off'}, key=str)} needs a flag: load an adapter first (model.load_flag), "
                        "or take mode off")
    if problems:
        raise ValueError("; ".join(problems))
    s = s.of(model)
    demos = read_demos(s.demos) if modes & set(BRANCHING) else None
    rows, limit = [], model.config.max_position_embeddings
    for i, (prompt, messages, prefill, mode) in enumerate(checked):
        start, prefill = tok.render(messages)[0], tok.encode(prefill)
        shown = tok.render(messages, operator=demos.text)[0] if (mode or s.mode) in BRANCHING else []
        if len(start) + len(prefill) >= limit:
            raise ValueError(f"prompt {i + 1} has {len(start) + len(prefill)} tokens with its template and prefill, "
                             f"and the model's context holds {limit}: shorten it")
        rows.append(Row(i, prompt, start, prefill, mode or s.mode, s, tok, demos, shown, limit))
    yield from write(model, tok, rows, s, cancel)


def generate(model, tok, prompts, mode="stop", max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0,
             logit_bias=None, threshold=None, batch_size=16, on_token=None, **more):
    """Yields an Answer for each prompt, in order; on_token(i, text, f) is called as text of prompt i may be shown.
    Prompts, settings and errors as for `stream`."""
    answers, turn = {}, 0
    for e in stream(model, tok, prompts, mode=mode, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                    top_p=top_p, seed=seed, logit_bias=logit_bias, threshold=threshold, batch_size=batch_size, **more):
        if e.released and e.text and on_token:
            on_token(e.i, e.text, e.f or 0.0)
        if e.kind == "end":
            answers[e.i] = e.answer
        while turn in answers:  # a later prompt's answer may be done before
            yield answers.pop(turn)
            turn += 1


def write(model, tok, rows, s, cancel=(), memory=None):
    """Events of the rows' answers, `batch_size` of them side by side: whoever is done makes room for the next."""
    if not rows:
        return
    waiting, slots = deque(rows), [None] * min(s.batch_size, len(rows))
    memory = memory or Memory(model, len(slots), max(row.most_ids() for row in rows))
    batch = make_batch(model, rows, len(slots), s)
    reader, sync_every = fast(model), s.sync_every or (16 if memory.cache.k.is_cuda else 1)
    advance = stepper(model, reader, tok, s, batch, {row.mode for row in rows})
    while True:
        slots = [waiting.popleft() if row is None and waiting else row for row in slots]
        for row in slots:
            if row and row.i in cancel and not row.stop_reason:
                yield from row.cancel()
        yield from read_rows(reader, memory, slots, cancel)
        slots = [row if row and not row.stop_reason else None for row in slots]
        alive = [b for b, row in enumerate(slots) if row]
        if len(alive) < len(slots) and waiting or any(slots[b].unread for b in alive):
            continue  # some have ended within their prefill, or turned off there
        if not alive:
            return
        if len(alive) < len(slots):
            slots = [slots[b] for b in alive]
            batch.keep(alive)
            memory.keep(alive)
        for b, row in enumerate(slots):
            if row.moved:
                batch.put(b, row)
                row.moved = False
        memory.cache.crop([len(row.ids) - 1 for row in slots])
        left = max(row.n_max - len(row.tokens) for row in slots) + 2  # a flag takes no place, and the end one f more
        steps = torch.stack([advance(memory.cache) for _ in range(min(sync_every, left))])   # (steps, 3, B)
        for step in steps.tolist():  # the one sync
            for row, token, f, state in zip(slots, *step):
                if not (row.stop_reason or row.moved):
                    yield from told(row, row.step(int(token), f, int(state)), cancel)


def make_batch(model, rows, n, s):
    device = model.embed_tokens.weight.device
    n_seen = model.config.vocab_size + model.n_flags if s.repetition_penalty != 1 else 0
    return Batch(n, max(row.most_forced() for row in rows), max(len(row.draws) for row in rows), n_seen,
                 "cpu" if device.type == "mps" else device)  # mps knows no doubles


def stepper(model, reader, tok, s, batch, modes):
    """A function cache -> what Batch.step gives: reads each row's last token and chooses the next one."""
    device, home, V = model.embed_tokens.weight.device, batch.state.device, model.config.vocab_size
    stops, bias = torch.tensor(tok.stop_ids, dtype=torch.long, device=home), None
    if s.logit_bias:
        bias = torch.zeros(V + model.n_flags)
        bias[list(s.logit_bias)] = torch.tensor(list(s.logit_bias.values()), dtype=torch.float32)
        bias = bias[:V].to(device)  # a flag's logit is out of reach: it is never drawn, and f is read by then

    f_off = torch.zeros(1, dtype=torch.float64, device=home)

    def advance(cache):
        hidden = reader(batch.token[:, None].to(device), cache)[:, -1]                              # (B, C)
        words, flags = reader.split_logits(hidden)                                                  # (B, V), (B, F)
        draw = lambda u: choose(words, batch.seen[:, :V].to(device), u.to(device), bias, s).to(home)
        f = flag_prob(words, flags) if modes != {"off"} else f_off.expand(len(words))               # (B,)
        done = batch.step(f, draw, stops, s.debounce)                                               # (3, B)
        cache.back((batch.state >= FLAGGED).to(device))
        return done
    return advance


# ------------------------------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class SampleConfig:
    prompt: str | None = option(None, "the user's message")
    prompts: str | None = option(None, "a JSON Lines file of records with prompt and, optionally, prefill and mode")
    transcript: str | None = option(None, "a JSON Lines file of records with prompt and response, to be read alone")
    chat: bool = option(False, "a chat of several turns; /mode NAME, /threshold X, /reset, /quit")
    prefill: str = option("", "the beginning of the answer, put into the model's mouth")
    system: str | None = option(None, "system message (default: what the model's chat template has)")
    mode: str = option(Settings.mode, ", ".join(MODES))
    threshold: float | None = option(None, "flag where f is above it (default: the one stored with the adapter)")
    low: float | None = option(None, "the onset is where f has risen above it (default: half the threshold)")
    debounce: int | None = option(None, "flag at so many positions in a row above the threshold, or at an answer's first "
                                        "(default: as stored with the adapter)")
    max_flags: int = option(Settings.max_flags, "reflections an answer at most; at the next flag it is stopped")
    buffer: int | None = option(None, f"newest tokens held back (default: {BUFFER} in mode backtrack, else 0)")
    demos: str = option(DEMOS, "what modes reflect and backtrack tell the model about its flag")
    max_new_tokens: int = option(Settings.max_new_tokens, "length of an answer at most, prefill not counted")
    temperature: float = option(Settings.temperature, "0 is greedy")
    top_k: int = option(Settings.top_k, "draw among the k likeliest words; 0: all")
    top_p: float = option(Settings.top_p, "draw among the likeliest words that make up this much probability")
    min_p: float = option(Settings.min_p, "draw among words at least this likely, as a share of the likeliest one's")
    repetition_penalty: float = option(Settings.repetition_penalty, "above 1: words that stand there already come less")
    stop: str | None = option(None, "end an answer before this text")
    seed: int = option(Settings.seed, "of the draws")
    batch_size: int = option(Settings.batch_size, "answers written side by side")
    sync_every: int | None = option(None, "steps between two looks of the host (default: 16 on a GPU, else 1)")
    adapter: str = option("out", "folder that train.py wrote")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")
    force: bool = option(False, "load the adapter although it was trained on other base weights")
    json: bool = option(False, "one JSON object an answer, one a line, on stdout")
    events: bool = option(False, "one JSON object for each event, one a line, on stdout")
    html: str | None = option(None, "write a page to this file: every token shaded by f, the threshold adjustable")

    def settings(self):
        names = [f.name for f in dataclasses.fields(Settings) if f.name != "logit_bias"]
        return {name: getattr(self, name) for name in names} | {"stop": () if self.stop is None else (self.stop,)}

    def problems(self):
        problems = Settings(**self.settings()).problems([self.mode], 0.5 if self.low is None else 1.0)
        if sum(x is not None for x in (self.prompt, self.prompts, self.transcript, self.chat or None)) != 1:
            problems.append("wanted one of --prompt TEXT, --prompts FILE.jsonl, --transcript FILE.jsonl and --chat")
        if self.prompt is None and self.prefill:
            problems.append("--prefill goes with --prompt; in a file each record has its own")
        if self.mode == "off" and (self.html or self.transcript):
            problems.append("--html and --transcript show f, which mode off does not read")
        if self.events and (self.json or self.html or self.transcript):
            problems.append("--events goes with none of --json, --html and --transcript")
        if self.chat and (self.events or self.json or self.html):
            problems.append("--chat goes with none of --events, --json and --html")
        return problems


def shade(text, f):
    """The text on a red ground that deepens with f (ANSI, 256 colours); plain below 2%."""
    level = sum(f > limit for limit in (0.02, 0.1, 0.3, 0.6, 0.9))
    return f"\x1b[48;5;{(0, 52, 88, 124, 160, 196)[level]}m{text}\x1b[0m" if level else text


def show(i, text, f):
    """Text of an answer as it appears; in a terminal that wants colours, shaded."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(shade(text, f) if colour else text, end="", flush=True)


def load(config, modes):
    """(model, tokenizer) of the command line's settings."""
    adapter = Path(config.adapter) / "flag.json"
    if set(modes) != {"off"} and not adapter.is_file():
        raise ValueError(f"no adapter in {config.adapter}: train one first (python train.py --init llama), name its "
                         "folder with --adapter, or take --mode off for the original model")
    if config.weights is None:
        from data.smollm2 import ensure
    weights = config.weights or ensure()
    model = Llama.from_pretrained(weights)
    if adapter.is_file():
        model.load_flag(config.adapter, force=config.force)
    return model, Tokenizer.from_pretrained(weights, n_flags=model.n_flags or 1)


def main():
    config = parse(SampleConfig, sys.argv[1:], __doc__)
    if config.chat:
        from chat import chat  # here, as it imports this file
        return chat(config, *load(config, [config.mode]))
    records, given = read_prompts(config)
    modes = {r.get("mode") or config.mode for r in records}
    if config.html and "off" in modes:
        raise ValueError("--html shows f, which mode off does not read, and a record has that mode")
    if config.html is not None and (Path(config.html).is_dir() or not Path(config.html).absolute().parent.is_dir()):
        raise ValueError(f"--html {config.html}: wanted a file in a folder that exists")
    model, tok = load(config, modes)
    start, answers, settings = time.perf_counter(), [], config.settings()
    if config.events:
        made = print_events(stream(model, tok, records, **settings))
    elif config.transcript:
        made = read_transcripts(model, tok, records, config.threshold, config.debounce)
    else:
        live = not config.json and len(records) == 1
        made = generate(model, tok, records, **settings, on_token=show if live else None)
    live = not config.json and len(records) == 1 and not config.transcript
    for prompt, answer in zip(given, made):
        answers.append(dataclasses.replace(answer, prompt=prompt))
        if config.json:
            print(json.dumps(dataclasses.asdict(answers[-1]), ensure_ascii=False), flush=True)
        elif not config.events:
            print("" if live else f"> {prompt}\n{answer.text}\n", flush=True)
        if not config.json:
            print(summary(answer), file=sys.stderr)
    seconds, n_tokens = time.perf_counter() - start, sum(len(a.tokens) for a in answers)
    if config.html is not None:
        write_page(config.html, answers, tok, model.threshold if config.threshold is None else config.threshold,
                   config.debounce or model.debounce)
    print(f"{len(answers)} answers, {n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def print_events(events):
    """Prints the events; the answers as they end."""
    for e in events:
        print(json.dumps(dataclasses.asdict(e), ensure_ascii=False), flush=True)
        if e.answer:
            yield e.answer


def summary(answer):
    if answer.score is None:
        return f"ended by {answer.stop_reason}"
    raised = f"flag raised at token {answer.flag_at}" if answer.flagged else "no flag"
    return f"{raised}, score {answer.score:.4f}, ended by {answer.stop_reason}"


if __name__ == "__main__":
    run(main)
