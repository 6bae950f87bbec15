"""What goes into `sample.stream` and `generate`, checked: settings and prompts; and transcripts, only to be read."""
import math
from dataclasses import dataclass, replace

from answer import MODES, Answer, flag_place
from calibrate import flag_probs
from cli import read_jsonl
from measures import sustained
from objective import Example
from reflect import DEMOS
from tokenizer import check_messages


@dataclass(frozen=True)
class Settings:
    """Of `stream` and `generate`."""
    mode: str = "stop"               # for prompts that bring none of their own
    max_new_tokens: int = 256        # the prefill not counted, a reflection that stays counted
    temperature: float = 0.0         # 0 is greedy
    top_k: int = 0                   # 0 is off
    top_p: float = 1.0               # 1 is off
    min_p: float = 0.0               # least share of the likeliest word's probability; 0 is off
    repetition_penalty: float = 1.0  # of words in prompt and answer; 1 is off
    logit_bias: dict | None = None   # id -> number added to a word's logit; -inf bans it
    stop: tuple | str = ()           # strings that end an answer, which stops short of them
    seed: int = 0
    threshold: float | None = None   # None: the adapter's
    low: float | None = None         # of the onset, and of the end of a false alarm; None: half the threshold
    debounce: int | None = None      # positions in a row above the threshold, the first alone; None: the adapter's
    max_flags: int = 3               # reflections an answer; at the next flag it stops as in mode stop
    buffer: int | None = None        # newest tokens held back from the reader; None: BUFFER in mode backtrack, else 0
    demos: str = DEMOS
    batch_size: int = 16
    sync_every: int | None = None    # steps between two looks of the host; None: 16 on a GPU, else 1

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    def of(self, model):
        """These settings, with the adapter's threshold and debounce where there are none."""
        usual = {name: getattr(model, name) for name in ("threshold", "debounce") if getattr(self, name) is None}
        return replace(self, **usual)

    def problems(self, modes, threshold):
        """What is wrong, a list; modes: of all prompts; threshold: the adapter's."""
        threshold, problems = threshold if self.threshold is None else self.threshold, []
        for mode in [self.mode, *modes]:
            if mode not in MODES and not problems:
                problems.append(f"mode is {mode!r}, wanted one of {', '.join(MODES)}")
        if set(modes) - {"off"} and not problems and (threshold is None or not 0 <= threshold <= 1):  # NaN fails too
            problems.append(f"threshold is {threshold}, wanted a probability from 0 to 1")
        elif self.low is not None and not 0 <= self.low <= (threshold or 0):
            problems.append(f"low is {self.low}, wanted a probability of at most the threshold")
        least = {"max_new_tokens": 1, "batch_size": 1, "debounce": 1, "max_flags": 1, "buffer": 0, "sync_every": 1}
        problems += [f"{name} is {getattr(self, name)}, wanted {low} or more" for name, low in least.items()
                     if getattr(self, name) is not None and not getattr(self, name) >= low]
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature is {self.temperature}, wanted 0 (greedy) or more")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            problems.append(f"top_k is {self.top_k} and top_p {self.top_p}, wanted top_k 0 (off) or more and top_p "
                            "above 0, at most 1")
        if not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty < math.inf:
            problems.append(f"min_p is {self.min_p} and repetition_penalty {self.repetition_penalty}, wanted min_p "
                            "from 0 (off) to 1 and repetition_penalty above 0 (1 is off)")
        if not all(isinstance(x, str) and x for x in self.stop):
            problems.append(f"stop is {self.stop}, wanted strings that are not empty")
        return problems


def check_prompt(prompt, where):
    """(record's prompt, chat, prefill, mode or None) of a prompt as `generate` takes it. ValueError names `where`."""
    record = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    if set(record) - {"prompt", "prefill", "mode"} or "prompt" not in record:
        raise ValueError(f"{where}: a record has a prompt and optionally prefill and mode; this has {sorted(record)}")
    try:
        messages = check_messages(record["prompt"])
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None
    prefill = record.get("prefill") or ""
    if not isinstance(prefill, str):
        raise ValueError(f"{where}: the prefill is {prefill!r}, wanted text")
    mode = record.get("mode")
    if mode is not None and mode not in MODES:
        raise ValueError(f"{where}: mode is {mode!r}, wanted one of {', '.join(MODES)}")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"{where} is empty: wanted a question, or a chat that ends with the user's message")
    return record["prompt"], messages, prefill, mode


def read_prompts(config):
    """The prompts as `generate` takes them, or transcripts, and the prompts as the user gave them."""
    path, records = config.prompts or config.transcript, []
    if path is None:
        records = [{"prompt": config.prompt, "prefill": config.prefill}]
    else:
        for line, record in read_jsonl(path):
            if "prompt" not in record:
                raise ValueError(f"{path}:{line}: the record has no prompt, only {sorted(record)}")
            records.append({k: record[k] for k in ("prompt", "prefill", "mode") if k in record})
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


def read_transcripts(model, tok, records, threshold=None, debounce=None):
    """An Answer for each record {"prompt": as for `generate`, "response": text by whatever model}: f at every token of
    the response, and at its end, by one forward pass. Raises ValueError for what does not fit the model's context."""
    threshold = model.threshold if threshold is None else threshold
    debounce = model.debounce if debounce is None else debounce
    if threshold is None or not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, wanted a probability from 0 to 1")
    limit, examples = model.config.max_position_embeddings, []
    for i, record in enumerate(records):
        messages = check_prompt(record["prompt"], f"transcript {i + 1}")[1]
        ids = tok.render(messages)[0]
        example = Example(ids + tok.encode(record["response"]) + tok.stop_ids[:1], len(ids), "")
        if len(example.ids) > limit:
            raise ValueError(f"transcript {i + 1} has {len(example.ids)} tokens with its template, and the model's "
                             f"context holds {limit}: shorten it")
        examples.append(example)
    answers = []
    for record, e, f in zip(records, examples, flag_probs(model, examples)):
        flag_at = flag_place(f, threshold, debounce)[0]
        answers.append(Answer(record["prompt"], record["response"], flag_at is not None, flag_at,
                              max(sustained(f, debounce)), f, e.ids[e.n_prompt:-1], "transcript"))
    return answers
