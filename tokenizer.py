"""Text to ids and back, for real vocabularies, by tiktoken; and the chat formats.

    tok = Tokenizer.from_pretrained(folder)     # tokenizer.json (byte-level BPE) or Llama 3's tokenizer.model
    ids, mask = tok.render([{"role": "user", "content": "Hi"}])
    tok.flag_id                                 # the red flag: the first id after the model's embedding rows

Text never becomes a control token here, whatever it spells: `encode` knows ordinary tokens only, and the chat
formats are put together from ids. `decode` is for a reader and shows neither control tokens nor the flag.
"""
import base64
import codecs
import json
import re
import unicodedata
from pathlib import Path

import regex
import tiktoken

from checkpoint import read_json

FLAG_TEXT = "<|red_flag|>"
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# Llama 3's rule for cutting text, which its tokenizer.model does not carry (meta-llama/llama3: llama/tokenizer.py)
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")


class Tokenizer:
    def __init__(self, ranks, pattern, special, n_rows, ids=None, nfc=False, default_system=None, n_flags=1):
        """ranks: bytes -> merge order; ids: rank -> id of the vocabulary (None: the same); special: text -> id;
        n_rows: the model's embedding rows; default_system: system text that the chat format puts in by itself."""
        self.special, self.nfc, self.default_system = special, nfc, default_system
        self.flag_ids = list(range(n_rows, n_rows + n_flags))
        self.flag_id, self.flag_text = n_rows, FLAG_TEXT
        self.pattern = regex.compile(pattern)
        # tiktoken wants all 256 bytes; those that a vocabulary lacks get ranks that no merge reaches, and no id
        self.missing = {bytes([b]) for b in range(256)} - set(ranks)
        spare = max(ranks.values()) + 1
        self.first_missing = spare
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, special_tokens={},
                                     mergeable_ranks=ranks | {b: spare + i for i, b in enumerate(sorted(self.missing))})
        self.ids = ids
        self.bytes_of = {ids[r] if ids else r: token for token, r in ranks.items()}
        if "<|start_header_id|>" in special:
            self.style, stops = "llama3", ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
        elif "<|im_start|>" in special:
            self.style, stops = "chatml", ("<|im_end|>", "<|endoftext|>")
        else:
            raise ValueError("the vocabulary has the control tokens of neither chat format: <|im_start|> (ChatML) nor "
                             f"<|start_header_id|> (Llama 3); it has {sorted(special)[:8]}")
        self.stop_ids = [special[s] for s in stops if s in special]

    @classmethod
    def from_pretrained(cls, path, n_flags=1):
        """The tokenizer of a model folder, or of one tokenizer file. Raises ValueError for rules not supported.

        The flag's id is the number of embedding rows in config.json, which may be more than the tokens (padding).
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        file = next((f for f in (path, path / "tokenizer.json", path / "tokenizer.model") if f.is_file()), None)
        if file is None:
            raise ValueError(f"no tokenizer.json or tokenizer.model in {path}")
        parts = read_tiktoken(file) if file.suffix == ".model" else read_tokenizer_json(file)
        n_tokens = 1 + max([*parts["special"].values(), *(parts.get("ids") or parts["ranks"].values())])
        config = folder / "config.json"
        n_rows = read_json(config).get("vocab_size", n_tokens) if config.is_file() else n_tokens
        if n_rows < n_tokens:
            raise ValueError(f"{file} has {n_tokens} tokens, but {config} only {n_rows} rows: they do not belong together")
        return cls(n_rows=n_rows, n_flags=n_flags, default_system=read_default_system(folder), **parts)

    # ------------------------------------------------------------------------------------- text <-> ids

    def encode(self, text):
        """Ids of ordinary text; never a control id, and never the flag's. Lone surrogates become U+FFFD."""
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        # tiktoken's regex engine panics at a million whitespace characters in a row, so long texts are cut here
        ranks = self.bpe.encode_ordinary(text) if len(text) < 500_000 else None
        if ranks is None or self.missing and ranks and max(ranks) >= self.first_missing:
            ranks = self.encode_without_missing(text)
        return [self.ids[r] for r in ranks] if self.ids else ranks

    def encode_without_missing(self, text):
        """Ranks where bytes without a token are dropped after cutting and before merging, as `tokenizers` does."""
        # what lies beyond Unicode 15's last letter is cut as a symbol, whatever newer tables say of it
        known = "".join(c if c < "\U000323b0" else "\uffff" for c in text)
        pieces = (text[m.start():m.end()].encode() for m in self.pattern.finditer(known))
        kept = (bytes(b for b in piece if bytes([b]) not in self.missing) for piece in pieces)
        return [r for piece in kept if piece for r in self.bpe._encode_single_piece(piece)]

    def encode_operator(self, text):
        """Ids of text by whoever runs the model, where the spelled flag is the flag. Never for what a user wrote."""
        first, *rest = [self.encode(part) for part in text.split(self.flag_text)]
        return first + [i for part in rest for i in (self.flag_id, *part)]

    def decode(self, ids):
        """Text for a reader: no control tokens, no flag; bytes that are no UTF-8 show as U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode("utf-8", "replace")

    def stream(self):
        """A function id -> text for tokens that come one by one; None ends the text. It never gives half a
        character, and all pieces joined are `decode` of all ids."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda i: decoder.decode(b"" if i is None else self.bytes_of.get(i, b""), final=i is None)

    # --------------------------------------------------------------------------------------------- chat

    def render(self, messages, prefill=None, operator=""):
        """(ids, mask) of a chat: mask is True where an answer is written, the end-of-turn token included.

        messages: a string (one user message) or a list of {"role", "content"}. Unless the last one is the
        assistant's, the ids end where its answer begins; `prefill` is the beginning of that answer, left open.
        `operator` is text put at the end of the system message, the one place where the flag may stand in a prompt.
        """
        messages = check_messages(messages)
        ids, mask = [], []

        def add(new, answer=False):
            ids.extend(new)
            mask.extend([answer] * len(new))

        if self.style == "llama3":
            add([self.special["<|begin_of_text|>"]])
        elif self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        if operator and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        open_turn = [{"role": "assistant", "content": prefill or ""}] if messages[-1]["role"] != "assistant" else []
        if prefill and not open_turn:
            raise ValueError("a prefill needs a chat that does not already end with the assistant's message")
        for n, message in enumerate(messages + open_turn):
            header, content, end, gap = self.turn(message)
            answer = message["role"] == "assistant"
            add(header)
            add(content, answer)
            if n == 0:
                add(self.encode_operator(operator))
            if not open_turn or message is not open_turn[0]:  # not by value: it may have been said before
                add(end, answer)
                add(gap)
        return ids, mask

    def turn(self, message):
        """A message as (header, content, end of turn, gap to the next) ids, each encoded by itself."""
        role, content, token = message["role"], message["content"], self.special
        if self.style == "chatml":
            return ([token["<|im_start|>"], *self.encode(role + "\n")], self.encode(content),
                    [token["<|im_end|>"]], self.encode("\n"))
        header = [token["<|start_header_id|>"], *self.encode(role), token["<|end_header_id|>"], *self.encode("\n\n")]
        return header, self.encode(content), [token["<|eot_id|>"]], []


def check_messages(messages):
    """The chat as a list of {"role", "content"}; ValueError for anything else."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a chat is a string or a list of messages with at least one; found {messages!r:.80}")
    for m in messages:
        if not (isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
                and isinstance(m.get("content"), str)):
            raise ValueError(f'a message is {{"role": "system"|"user"|"assistant", "content": text}}; found {m!r:.80}')
    return messages


# --------------------------------------------------------------------------------------- reading the files

def read_tiktoken(path):
    """ranks, pattern and special tokens of a Llama 3 tokenizer.model: lines of base64 token and rank."""
    try:
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if not ranks:
            raise ValueError
    except ValueError:
        raise ValueError(f"{path} is not in tiktoken's format (base64 token and rank on each line); SentencePiece "
                         "models (Llama 2, Mistral) are not supported") from None
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
             "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id",
             "python_tag"]  # as in Llama 3.1 to 3.3; Llama 3.0 knows fewer of them, at the same ids
    names += [f"reserved_special_token_{i}" for i in range(3, 256 - len(names) + 3)]
    return {"ranks": ranks, "pattern": LLAMA3_PATTERN,
            "special": {f"<|{name}|>": len(ranks) + i for i, name in enumerate(names)}}


def read_tokenizer_json(path):
    """ranks, ids, pattern, special tokens of a byte-level BPE tokenizer.json. ValueError names what is not supported."""
    d = read_json(path)
    model = d.get("model") or {}
    plain = {"dropout": (None, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
             "byte_fallback": (None, False)}  # unk_token is not asked for: a byte without a token is dropped
    if model.get("type") != "BPE":
        raise ValueError(f"{path}: model type {model.get('type')!r} (supported: byte-level BPE)")
    for name, supported in plain.items():
        if model.get(name) not in supported:
            raise ValueError(f"{path}: BPE with {name} = {model[name]!r} is not supported")
    normalizer = (d.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"{path}: normalizer {normalizer!r} is not supported (only NFC)")
    to_byte = {c: b for b, c in byte_alphabet().items()}
    to_bytes = lambda token: bytes(to_byte[c] for c in token)
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{path}: a BPE model without vocab or merges")
    # ranks count single bytes first and then the merges in their order, which is what decides between merges
    ranks, ids = {}, []
    tokens = [c for c in to_byte if c in vocab]
    tokens += ["".join(m.split(" ") if isinstance(m, str) else m) for m in merges]
    for token in tokens:
        if token not in vocab or not set(token) <= set(to_byte):
            raise ValueError(f"{path}: a merge makes {token!r}, which is not in the vocab or not byte-level")
        if to_bytes(token) not in ranks:
            ranks[to_bytes(token)] = len(ranks)
            ids.append(vocab[token])
    special = {t["content"]: t["id"] for t in d.get("added_tokens", [])}
    unmade = set(vocab) - set(tokens) - set(special)
    if unmade:
        raise ValueError(f"{path}: tokens that no merge makes are not supported: {sorted(unmade)[:5]}")
    return {"ranks": ranks, "ids": ids, "pattern": read_pattern(d.get("pre_tokenizer"), path), "special": special,
            "nfc": normalizer == "NFC"}


def read_pattern(pre_tokenizer, path):
    """One regular expression for the splitting rules of a tokenizer.json."""
    rules = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    *first, last = rules
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"{path}: pre-tokenizer {last} (supported: ByteLevel without a prefix space, at the end)")
    by_regex = last.get("use_regex", True)
    if not first and by_regex:
        return GPT2_PATTERN
    if len(first) == 1 and first[0].get("type") == "Digits" and by_regex:
        # The text is first cut around digits, so for what follows a piece *ends* before a digit: no digit takes a
        # space with it, and whitespace there is one piece, where GPT-2's rule would split off its last character
        digit = r"\p{N}" if first[0].get("individual_digits") else r"\p{N}+"
        rest = GPT2_PATTERN.replace(r"| ?\p{N}+", "").replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
        return digit + "|" + rest
    if len(first) == 1 and first[0].get("type") == "Split" and not by_regex:
        split = first[0]
        if "Regex" in split.get("pattern", {}) and split.get("behavior") == "Isolated" and not split.get("invert"):
            return split["pattern"]["Regex"]
    raise ValueError(f"{path}: pre-tokenizer rules {json.dumps(rules)} are not supported (supported: Digits or one "
                     "isolated Split by regex, then ByteLevel)")


def byte_alphabet():
    """Byte -> the printable character that stands for it in byte-level vocabularies (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_default_system(folder):
    """The system text that a ChatML template puts in where a chat has none (SmolLM2, Qwen2.5), else None."""
    config, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"  # transformers 5 writes the latter
    template = read_json(config).get("chat_template") if config.is_file() else None
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else template
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<>{}']+)<\|im_end\|>", str(template))
    return found.group(1) if found else None
