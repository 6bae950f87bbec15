"""What goes into `sample.stream` and `generate`, checked; and transcripts, which are only read."""
from answer import Answer
from calibrate import flag_probs
from cli import read_jsonl
from measures import first_above
from objective import Example
from tokenizer import check_messages


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
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ValueError(f"{where} is empty: wanted a question, or a chat that ends with the user's message")
    return record["prompt"], messages, prefill, record.get("mode")


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


def read_transcripts(model, tok, records, threshold=None):
    """An Answer for each record {"prompt": as for `generate`, "response": text by whatever model}: f at every token of
    the response, and at its end, by one forward pass. Raises ValueError for what does not fit the model's context."""
    threshold = model.threshold if threshold is None else threshold
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
        flag_at = first_above(f, threshold)
        answers.append(Answer(record["prompt"], record["response"], flag_at is not None, flag_at, max(f), f,
                              e.ids[e.n_prompt:-1], "transcript"))
    return answers
