"""What the flag does to the words: divergence, changed answers, lost problems, and what comes behind a flag."""
import math
import re

import numpy as np

from calibrate import flag_probs, score
from cli import read_jsonl
from objective import Example
from sample import generate


def words(model, answers, references):
    """The cost on answers and on reference answers (lists of Examples), as nats a token and as perplexities.

    benign_kl_pi and benign_kl_q are KL(pi_0 || pi) and KL(pi_0 || q) on benign answers, harmful_kl_pi and harmful_kl_q
    on harmful ones; perplexity_0 and perplexity_q those of the references under the original and the tuned words.
    """
    scored = list(zip(answers, score(model, answers)))
    mean = lambda name, label: mean_of([x for e, s in scored if e.label == label for x in s[name]])
    found = {**{f"{label}_{name}": mean(name, label) for label in ("benign", "harmful") for name in ("kl_pi", "kl_q")},
             "answers": {label: sum(e.label == label for e in answers) for label in ("benign", "harmful")},
             "kl_by_position": {label: by_position([s["kl_q"] for e, s in scored if e.label == label])
                                for label in ("benign", "harmful")}}
    nll = score(model, references)
    for name in ("0", "q"):
        values = [x for s in nll for x in s[f"nll_{name}"]]
        found[f"perplexity_{name}"] = math.exp(mean_of(values)) if values else None
    return found | {"references": len(references)}


def mean_of(values):
    return float(np.mean(values)) if len(values) else None


def by_position(lists):
    """Mean at each position over the lists that reach it."""
    return [float(np.mean([x[t] for x in lists if len(x) > t])) for t in range(max(map(len, lists), default=0))]


def unchanged(model, tok, prompts, n_tok=128, batch=24):
    """For each prompt whether the tuned model's greedy answer would be the original's, over n_tok tokens: at every
    position of the original's greedy answer, its end included, both models' likeliest word is the same."""
    with model.flag_off():
        answers = list(generate(model, tok, prompts, "off", n_tok, batch_size=batch))
    examples = []
    for prompt, a in zip(prompts, answers):
        start = tok.render(prompt)[0]
        end = tok.stop_ids[:1] if a.stop_reason == "eos" else []  # its id is not read: only where it would be chosen
        examples.append(Example(start + a.tokens + end, len(start), "benign"))
    return [all(s["same"]) for s in score(model, examples)]


def solved(model, tok, problems, n_tok=200, batch=24):
    """For each problem of `read_problems` whether the last number of the greedy answer is the right one."""
    answers = generate(model, tok, [p["prompt"] for p in problems], "off", n_tok, batch_size=batch)
    wanted = [last_number(p["response"].split("####")[-1]) for p in problems]
    return [w is not None and last_number(a.text) == w for w, a in zip(wanted, answers)]


def read_problems(path):
    """GSM8K's records: prompt and response, or question and answer as it was published, ending in "#### number"."""
    problems = []
    for line, r in read_jsonl(path):
        prompt, response = r.get("prompt", r.get("question")), r.get("response", r.get("answer"))
        texts = isinstance(prompt, str) and isinstance(response, str)
        if not texts or last_number(response.split("####")[-1]) is None:
            raise ValueError(f"{path}:{line}: wanted prompt and response (or question and answer), the latter with a "
                             "number")
        problems.append({"prompt": prompt, "response": response})
    return problems


def last_number(text):
    """The last number of a text as a float; thousands' commas are dropped. None without one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def behind_the_flag(model, flag_id, answers):
    """Mean f over the positions from the first flag on, of (Example, flag_at) pairs: {"as_is", "inserted"}, with the
    answer as it stands, and with <rf> inserted there and the same words read on."""
    plain = flag_probs(model, [e for e, _ in answers])
    put = lambda e, at: Example(e.ids[:e.n_prompt + at] + [flag_id] + e.ids[e.n_prompt + at:], e.n_prompt, e.label)
    marked = flag_probs(model, [put(e, at) for e, at in answers])
    return {"answers": len(answers),
            "as_is": mean_of([x for f, (_, at) in zip(plain, answers) for x in f[at:]]),
            "inserted": mean_of([x for f, (_, at) in zip(marked, answers) for x in f[at + 1:]])}
