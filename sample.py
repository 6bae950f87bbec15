"""Answers with the red flag read at every token.

    python sample.py --prompt "What is the capital of France?"
    python sample.py --prompts prompts.jsonl --mode shadow --json > answers.jsonl
    python sample.py --prompt "..." --mode shadow --html page.html
    python sample.py --transcript chats.jsonl --html page.html       # reads any model's answers, and writes none

f is the flag's probability at a position: what the model would put there next, read from the raw softmax over all
V + F tokens, before temperature, top-k or top-p. No setting of a caller can lower it. Words are always drawn from the
distribution without the flag, so the flag itself never reaches a reader. Modes:

    off      answer as if there were no flag; f is not reported
    shadow   the same words as off, and f for every token
    stop     at the first position with f > threshold stop, and give a fixed notice in place of the rest
"""
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from calibrate import flag_probs
from cli import option, parse, read_jsonl, run
from measures import first_above
from model import Cache, Llama
from objective import Example, flag_prob
from page import write_page
from tokenizer import Tokenizer, check_messages

MODES = ("off", "shadow", "stop")
NOTICE = "[stopped here: the model raised its red flag]"


@dataclass(frozen=True)
class Answer:
    """One answer, and what the flag said of it.

    flag_prob[t] is f at the position where answer token t is chosen; a prefill's tokens are the answer's first. An
    answer that ended by itself or was stopped has one f more than tokens: that of the token not written.
    """
    prompt: str | list
    text: str
    flagged: bool
    flag_at: int | None   # the first position with f > threshold
    score: float | None   # max of flag_prob; None in mode off
    flag_prob: list
    tokens: list          # ids
    stop_reason: str      # eos, length or flag; transcript where it was read, not written


@dataclass
class Row:
    """An answer in the making: a small state machine, "normal" or "done"; further modes add further states."""
    prompt: str | list
    ids: list             # what the model reads before it writes: the prompt, then the prefill
    n_prompt: int
    n_left: int           # tokens it may still write
    draws: torch.Tensor   # a uniform number for each of these, so that the words do not depend on the batch
    stops: list           # ids that end an answer
    mode: str
    threshold: float
    piece: object         # id -> text that is complete by now
    show: object          # called with each piece of text and its f
    state: str = "normal"
    stop_reason: str | None = None
    text: str = ""
    tokens: list = field(default_factory=list)
    probs: list = field(default_factory=list)
    flag_at: int | None = None

    def step(self, f, token):
        """Take in f of the next position; then, unless it stops the answer, the token chosen there."""
        self.probs.append(f)
        if self.mode != "off" and self.flag_at is None and f > self.threshold:
            self.flag_at = len(self.tokens)
            if self.mode == "stop":
                return self.end("flag")
        if token in self.stops:
            return self.end("eos")
        self.tokens.append(token)
        self.say(self.piece(token), f)
        if len(self.tokens) > len(self.ids) - self.n_prompt:  # beyond the prefill
            self.n_left -= 1
        if self.n_left == 0:
            self.end("length")

    def end(self, reason):
        self.state, self.stop_reason = "done", reason
        self.say(self.piece(None), self.probs[-1])
        if reason == "flag":
            self.say((" " if self.text else "") + NOTICE, self.probs[-1])

    def say(self, text, f):
        self.text += text
        if text and self.show:
            self.show(text, f)

    def answer(self):
        scores = [] if self.mode == "off" else self.probs
        return Answer(prompt=self.prompt, text=self.text, flagged=self.flag_at is not None, flag_at=self.flag_at,
                      score=max(scores, default=None), flag_prob=scores, tokens=self.tokens,
                      stop_reason=self.stop_reason)


@torch.no_grad()
def generate(model, tok, prompts, mode="stop", max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0,
             logit_bias=None, threshold=None, batch_size=16, on_token=None):
    """Yields an Answer for each prompt, in order.

    A prompt is a string, a list of chat messages, or a record {"prompt": either, "prefill": text}. temperature 0 is
    greedy; top_k 0 and top_p 1 are off; logit_bias (id -> number) is added to the words' logits, once f has been read;
    -inf bans a word. An answer's words depend on `seed` and its place in `prompts`, not on its batch (in fp32; bf16
    sums round differently for other shapes, which may tip a near tie). threshold None takes the adapter's.
    on_token(i, text, f) is called as text of prompt i appears.
    Raises ValueError, before any work, for a bad setting, an empty prompt, or one longer than the model's context.
    """
    threshold = model.threshold if threshold is None and mode != "off" else threshold
    problems = setting_problems(mode, max_new_tokens, temperature, top_k, top_p, threshold, batch_size)
    known = model.config.vocab_size + model.n_flags
    problems += [f"logit_bias has {token}: {value}, wanted an id below {known} and a number or -inf"
                 for token, value in (logit_bias or {}).items() if not 0 <= token < known or not value < math.inf]
    if mode != "off" and not model.n_flags:
        problems.append(f"mode {mode} needs a flag: load an adapter first (model.load_flag), or take mode off")
    if problems:
        raise ValueError("; ".join(problems))
    bias = torch.zeros(known, device=model.embed_tokens.weight.device)
    for token, value in (logit_bias or {}).items():
        bias[token] = value
    bias = bias[:model.config.vocab_size]  # a flag's logit is out of reach: it is never drawn, and f is read by then
    rows = [start_row(model, tok, p, i, mode, threshold, max_new_tokens, seed, on_token) for i, p in enumerate(prompts)]
    for start in range(0, len(rows), batch_size):
        batch = rows[start:start + batch_size]
        write(model, batch, lambda words, u: pick(words + bias if logit_bias else words, u, temperature, top_k, top_p))
        for row in batch:
            yield row.answer()


def setting_problems(mode, max_new_tokens, temperature, top_k, top_p, threshold, batch_size):
    problems = []
    if mode not in MODES:
        problems.append(f"mode is {mode!r}, wanted one of {', '.join(MODES)}")
    elif mode != "off" and (threshold is None or not 0 <= threshold <= 1):  # NaN fails this too
        problems.append(f"threshold is {threshold}, wanted a probability from 0 to 1")
    if max_new_tokens < 1 or batch_size < 1:
        problems.append(f"max_new_tokens is {max_new_tokens} and batch_size {batch_size}, wanted 1 or more")
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature is {temperature}, wanted 0 (greedy) or more")
    if top_k < 0 or not 0 < top_p <= 1:
        problems.append(f"top_k is {top_k} and top_p {top_p}, wanted top_k 0 (off) or more and top_p above 0, at most 1")
    return problems


def check_prompt(prompt, where):
    """(record's prompt, chat, prefill) of a prompt as `generate` takes it. Raises ValueError naming `where`."""
    record = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    if set(record) - {"prompt", "prefill"} or "prompt" not in record:
        raise ValueError(f"{where}: a record has a prompt and optionally a prefill; this has {sorted(record)}")
    try:
        messages = check_messages(record["prompt"])
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    prefill = record.get("prefill") or ""
    if not isinstance(prefill, str):
        raise ValueError(f"{where}: the prefill is {prefill!r}, wanted text")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"{where} is empty: wanted a question, or a chat that ends with the user's message")
    return record["prompt"], messages, prefill


def start_row(model, tok, prompt, i, mode, threshold, max_new_tokens, seed, on_token):
    prompt, messages, prefill = check_prompt(prompt, f"prompt {i + 1}")
    start = tok.render(messages)[0]
    ids = start + tok.encode(prefill)
    limit = model.config.max_position_embeddings
    if len(ids) >= limit:
        raise ValueError(f"prompt {i + 1} has {len(ids)} tokens with its template and prefill, and the model's context "
                         f"holds {limit}: shorten it")
    n_left = min(max_new_tokens, limit - len(ids))
    draws = torch.rand(n_left, generator=torch.Generator().manual_seed((seed * 1_000_003 + i) % (2 ** 32 - 5)))
    show = on_token and (lambda text, f: on_token(i, text, f))
    return Row(prompt, ids, len(start), n_left, draws, tok.stop_ids, mode, threshold, tok.stream(), show)


def write(model, rows, pick):
    """Writes the answers of one batch into its rows."""
    width = max(len(r.ids) for r in rows)
    cache = Cache(model, len(rows), max(len(r.ids) + r.n_left for r in rows))
    padded = torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in rows], device=cache.k.device)
    hidden = model(padded, cache)                                                   # (B, T, C)
    cache.crop([len(r.ids) for r in rows])
    for row, h in zip(rows, hidden):  # prefilled tokens are judged like any other
        for f, token in zip(read(model, h[row.n_prompt - 1:len(row.ids) - 1])[1], row.ids[row.n_prompt:]):
            if row.state == "normal":
                row.step(f, token)
    last = torch.stack([h[len(row.ids) - 1] for row, h in zip(rows, hidden)])       # (B, C)
    tokens = None  # what the rows wrote last; nothing yet
    while alive := [b for b, row in enumerate(rows) if row.state == "normal"]:
        if len(alive) < len(rows):
            rows, last = [rows[b] for b in alive], last[alive]
            tokens = tokens if tokens is None else tokens[alive]
            cache.keep(alive)
        if tokens is not None:
            last = model(tokens[:, None], cache)[:, -1]
        words, f = read(model, last)                                                # (B, V)
        tokens = pick(words, torch.stack([r.draws[-r.n_left] for r in rows]))       # (B,)
        for row, f_row, token in zip(rows, f, tokens.tolist()):                     # the step's one sync
            row.step(f_row, token)


def read(model, hidden):
    """Logits of the words (N, V) and f, a list of N floats, of hidden states (N, C); with no flag loaded f is 0."""
    words, flags = model.split_logits(hidden)
    return words, flag_prob(words, flags).tolist()


def pick(words, u, temperature, top_k, top_p):
    """A token for each row (B,), of its word logits (B, V) and its uniform number u (B,): the inverse of the
    cumulative distribution at u, after temperature, top-k and top-p."""
    if temperature == 0:
        return words.argmax(-1)
    order, V = None, words.shape[-1]
    words = (words - words.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # fp32 would divide by 0
    if top_k:
        words, order = words.topk(min(top_k, V), dim=-1)                            # sorted, (B, k)
    logp = torch.log_softmax(words, -1)
    if top_p < 1 and not top_k:  # the likeliest 512 words nearly always hold top_p; sorting all of them is slow
        logp_512, order_512 = logp.topk(min(512, V), dim=-1)
        enough = logp_512.exp().sum(-1) > top_p
        if enough.any() and not enough.all():  # apart, as ties come out in another order: a row must not see its batch
            tokens = torch.empty(len(words), dtype=torch.long, device=words.device)
            for part in (enough, ~enough):
                tokens[part] = pick(words[part], u.to(words.device)[part], 1.0, 0, top_p)
            return tokens
        logp, order = (logp_512, order_512) if enough.all() else logp.sort(dim=-1, descending=True)
    probs = logp.exp()
    if top_p < 1:  # keep the words before which less than top_p has been seen, so at least the first
        probs = probs * (probs.cumsum(-1) - probs < top_p)
    cdf = probs.cumsum(-1)
    at = torch.searchsorted(cdf, u.to(cdf.device)[:, None] * cdf[:, -1:], right=True)
    at = at.clamp(max=cdf.shape[-1] - 1)                                            # (B, 1)
    return (at if order is None else order.gather(-1, at))[:, 0]


def read_transcripts(model, tok, records, threshold=None):
    """An Answer for each record {"prompt": as for `generate`, "response": text by whatever model}: f at every token of
    the response, and at its end, by one forward pass. Raises ValueError for what does not fit the model's context."""
    threshold = model.threshold if threshold is None else threshold
    if threshold is None or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, wanted a probability from 0 to 1")
    limit, examples = model.config.max_position_embeddings, []
    for i, record in enumerate(records):
        _, messages, _ = check_prompt(record["prompt"], f"transcript {i + 1}")
        ids = tok.render(messages)[0]
        example = Example(ids + tok.encode(record["response"]) + tok.stop_ids[:1], len(ids), "")
        if len(example.ids) > limit:
            raise ValueError(f"transcript {i + 1} has {len(example.ids)} tokens with its template, and the model's "
                             f"context holds {limit}: shorten it")
        examples.append(example)
    answers = []
    for record, e, f in zip(records, examples, flag_probs(model, examples)):
        flag_at = first_above(f, threshold)
        answers.append(Answer(record["prompt"], record["response"], flag_at is not None, flag_at, max(f), f,
                              e.ids[e.n_prompt:-1], "transcript"))
    return answers


# ------------------------------------------------------------------------------------------------- command line

@dataclass(frozen=True)
class SampleConfig:
    prompt: str | None = option(None, "the user's message")
    prompts: str | None = option(None, "a JSON Lines file of records with prompt and, optionally, prefill")
    transcript: str | None = option(None, "a JSON Lines file of records with prompt and response, to be read alone")
    prefill: str = option("", "the beginning of the answer, put into the model's mouth")
    system: str | None = option(None, "system message (default: what the model's chat template has)")
    mode: str = option("stop", "off, shadow or stop")
    threshold: float | None = option(None, "flag where f is above it (default: the one stored with the adapter)")
    max_new_tokens: int = option(256, "length of an answer at most, prefill not counted")
    temperature: float = option(0.0, "0 is greedy")
    top_k: int = option(0, "draw among the k likeliest words; 0: all")
    top_p: float = option(1.0, "draw among the likeliest words that make up this much probability")
    seed: int = option(0, "of the draws")
    batch_size: int = option(16, "answers written side by side")
    adapter: str = option("out", "folder that train.py wrote")
    weights: str | None = option(None, "model folder (default: SmolLM2-135M-Instruct, fetched once)")
    force: bool = option(False, "load the adapter although it was trained on other base weights")
    json: bool = option(False, "one JSON object a line on stdout")
    html: str | None = option(None, "write a page to this file: every token shaded by f, the threshold adjustable")

    def problems(self):
        problems = setting_problems(self.mode, self.max_new_tokens, self.temperature, self.top_k, self.top_p,
                                    0.5 if self.threshold is None else self.threshold, self.batch_size)
        if sum(x is not None for x in (self.prompt, self.prompts, self.transcript)) != 1:
            problems.append("wanted one of --prompt TEXT, --prompts FILE.jsonl and --transcript FILE.jsonl")
        if self.prompt is None and self.prefill:
            problems.append("--prefill goes with --prompt; in a file each record has its own")
        if self.mode == "off" and (self.html or self.transcript):
            problems.append("--html and --transcript show f, which mode off does not read")
        return problems


def read_prompts(config):
    """The prompts as `generate` takes them, or transcripts, and the prompts as the user gave them."""
    path, records = config.prompts or config.transcript, []
    if path is None:
        records = [{"prompt": config.prompt, "prefill": config.prefill}]
    else:
        for line, record in read_jsonl(path):
            if "prompt" not in record:
                raise ValueError(f"{path}:{line}: the record has no prompt, only {sorted(record)}")
            records.append({k: record[k] for k in ("prompt", "prefill") if k in record})
            check_prompt(records[-1], f"{path}:{line}")
            if config.transcript:
                said = record.get("response")
                if not isinstance(said, str) or not said:
                    raise ValueError(f"{path}:{line}: the response is {said!r}, wanted text")
                records[-1] = {"prompt": record["prompt"], "response": said}
    given = [r["prompt"] for r in records]
    if config.system is not None:
        system, chats = {"role": "system", "content": config.system}, [check_messages(r["prompt"]) for r in records]
        for chat in chats:
            if chat[0]["role"] == "system":
                raise ValueError(f"--system, and a chat with a system message of its own: {chat[0]['content']:.60}")
        records = [r | {"prompt": [system, *chat]} for r, chat in zip(records, chats)]
    return records, given


def shade(text, f):
    """The text on a red ground that deepens with f (ANSI, 256 colours); plain below 2%."""
    level = sum(f > limit for limit in (0.02, 0.1, 0.3, 0.6, 0.9))
    return f"\x1b[48;5;{(0, 52, 88, 124, 160, 196)[level]}m{text}\x1b[0m" if level else text


def main():
    config = parse(SampleConfig, sys.argv[1:], __doc__)
    records, given = read_prompts(config)
    if config.mode != "off" and not (Path(config.adapter) / "flag.json").is_file():
        raise ValueError(f"no adapter in {config.adapter}: train one first (python train.py --init llama), name its "
                         "folder with --adapter, or take --mode off for the original model")
    if config.weights is None:
        from data.smollm2 import ensure
    weights = config.weights or ensure()
    model = Llama.from_pretrained(weights)
    if config.mode != "off" or (Path(config.adapter) / "flag.json").is_file():
        model.load_flag(config.adapter, force=config.force)
    tok = Tokenizer.from_pretrained(weights, n_flags=model.n_flags or 1)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and config.mode != "off"

    def on_token(i, text, f):
        print(shade(text, f) if colour else text, end="", flush=True)

    live = not config.json and len(records) == 1 and not config.transcript
    start, n_tokens, shown = time.perf_counter(), 0, []
    if config.transcript:
        answers = read_transcripts(model, tok, records, config.threshold)
    else:
        answers = generate(model, tok, records, config.mode, config.max_new_tokens, config.temperature, config.top_k,
                           config.top_p, config.seed, threshold=config.threshold, batch_size=config.batch_size,
                           on_token=on_token if live else None)
    for prompt, answer in zip(given, answers):
        n_tokens += len(answer.tokens)
        shown.append(dataclasses.replace(answer, prompt=prompt))
        if config.json:
            print(json.dumps(dataclasses.asdict(shown[-1]), ensure_ascii=False), flush=True)
        else:
            print("" if live else f"> {prompt}\n{answer.text}\n", flush=True)
            print(summary(answer), file=sys.stderr)
    seconds = time.perf_counter() - start
    if config.html:
        write_page(config.html, shown, tok, model.threshold if config.threshold is None else config.threshold)
    print(f"{len(records)} answers, {n_tokens} tokens, {n_tokens / seconds:.1f} tokens/s", file=sys.stderr)


def summary(answer):
    if answer.score is None:
        return f"ended by {answer.stop_reason}"
    raised = f"flag raised at token {answer.flag_at}" if answer.flagged else "no flag"
    return f"{raised}, highest f {answer.score:.4f}, ended by {answer.stop_reason}"


if __name__ == "__main__":
    run(main)
