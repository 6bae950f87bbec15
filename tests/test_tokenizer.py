"""The tokenizer against `tokenizers` and tiktoken, the chat formats against literal ids and transformers."""
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CHATML_SPECIAL, SYSTEM
from tokenizer import LLAMA3_PATTERN, Tokenizer, byte_alphabet

ROOT = Path(__file__).resolve().parent.parent
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # Qwen/Qwen2.5-0.5B-Instruct: tokenizer.json
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "1 2", "12 3", "' s", "Ã ©", "s t"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(regex, **changes):
    """The splitting rules of Llama 3's and Qwen's tokenizer.json."""
    rule = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [rule, BYTE_LEVEL | {"use_regex": False}]}


def digits(individual):
    return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": individual}, BYTE_LEVEL]}


def write_json(folder, special=CHATML_SPECIAL, merges=MERGES, without=(), more=(), model=(), **top):
    """A tokenizer.json of the 256 bytes, merges, then control tokens: 270 and these."""
    vocab = [c for b, c in byte_alphabet().items() if b not in without] + [m.replace(" ", "") for m in merges] + list(more)
    added = [{"id": len(vocab) + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, t in enumerate(special)]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
           "vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "added_tokens": added, "model": bpe | dict(model)} | top))
    return folder


def reference_of(folder):
    from tokenizers import Tokenizer as Reference
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True  # what spells a control token is ordinary text there too
    return reference


def assert_equal_ids(tok, reference, texts):
    wanted = reference.encode_batch(texts, add_special_tokens=False)
    wrong = [(t, tok.encode(t), w.ids) for t, w in zip(texts, wanted) if tok.encode(t) != w.ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first {wrong[0]}"


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A tiny tokenizer after Llama 3's tokenizer.json; a byte's id is its place in the byte alphabet."""
    return write_json(tmp_path_factory.mktemp("llama3"), LLAMA3_SPECIAL, pre_tokenizer=split(LLAMA3_PATTERN),
                      model={"ignore_merges": True})


@pytest.fixture(scope="module")
def real_tok(real):
    return Tokenizer.from_pretrained(real)


@pytest.fixture(scope="session")
def real_llama3(alone):
    """Llama 3's own tokenizer.model, from the PyPI package llama-models; fetched once, 7 MB."""
    folder = ROOT / "data" / "weights" / "llama-models-0.3.0"
    with alone():
        if not folder.exists():
            fetch_llama3(folder)
    return folder / "tokenizer.model"


def fetch_llama3(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                        "--disable-pip-version-check", "--dest", tmp, "llama-models==0.3.0"], check=True)
        made = Path(tmp) / "made"
        made.mkdir()
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as z:
            (made / "tokenizer.model").write_bytes(z.read("llama_models/llama3/tokenizer.model"))
        os.rename(made, folder)


# --------------------------------------------------------------------------------------------- the texts

ALL = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
ASSIGNED = [c for c in ALL if unicodedata.category(c) not in ("Cn", "Co")]
POOLS = [
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 1️⃣ ☠️ 🫠".split() + ["\u200d", "\ufe0f"],
    "中文 漢字 日本語 ひらがな カタカナ 한국어 。 「引用」 ㊙ 々".split() + ["\u3000"],
    "שלום עולם مرحبا بالعالم فارسی ۱۲۳ اُردُو".split() + ["\u200f", "\u202b", "\u202c", "،"],
    ["e\u0301", "n\u0303", "Z\u0351\u036b\u0343", "\u0301", "क्षि", "ที่", "Å", "A\u030a", "\u1112\u1161\u11ab", "ﬁ", "ſ"],
    [chr(c) for c in [*range(32), *range(0x7F, 0xA1), 0xAD, 0x200B, 0x2028, 0x2029, 0xFEFF, 0xFFFD, 0xFFFF, 0x10FFFF]],
    [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\u00a0", "\u2003", "\u3000", "\x85", "\x1c", "\v"],
    [c for c in ALL if unicodedata.category(c) in ("Nd", "Nl", "No")] + ["12", "2024", "3.14", "1,000", " 7", "①②"],
    ["def f(x):\n    return x", "if (a != b) {\n\t++i;\n}", "<p class='x'>", "0xFF", "a_b", "camelCase", "::", "//", "\\n"],
    "the hello Hello I'm you're they'LL it's 'S 'sea don't O'Neil ’s a b c éé naïve Straße ΑΒΓ привет".split(),
    "<|im_start|> <|im_end|> <|endoftext|> <|red_flag|> <| |> im_ <|eot_id|> <|start_header_id|> <file_sep>".split(),
    [bytes(b).decode("utf-8", "replace") for b in (b"\xff\xfe", b"a\xc3", b"\xe4\xb8", b"\xf0\x9f\x98", b"\xc0\x80")],
    ASSIGNED,
]


def generated(n, seed):
    """Texts of one to eight pieces, of one pool or of several, with and without spaces between."""
    r = random.Random(seed)
    for _ in range(n):
        pools = r.choices(POOLS, k=r.choice([1, 1, 2, 4]))
        yield r.choice(["", "", " ", "\n"]).join(r.choice(r.choice(pools)) for _ in range(r.randint(1, 8)))


def written():
    """Lines of this repository: code, prose, and the bundled set's many languages."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("data/mini/*.jsonl")]
    text = "".join(f.read_text(encoding="utf-8") for f in files)
    lines = text.splitlines(keepends=True)
    return [*dict.fromkeys(lines), *("".join(lines[i:i + 9]) for i in range(0, 900, 9))]


def texts_for(n, seed):
    """Texts made and written, and every assigned character, in runs of its neighbours and in a word."""
    runs = ["".join(ASSIGNED[i:i + 24]) for i in range(0, len(ASSIGNED), 24)]
    words = [f"a{x}b {y}1{z}\n" for x, y, z in zip(*(random.Random(seed).sample(ASSIGNED, 2000) for _ in "xyz"))]
    return [*generated(n, seed), *written(), *runs, *words]


PIECES = st.lists(st.one_of(st.text(), *(st.sampled_from(pool) for pool in POOLS[:-1])), max_size=8).map("".join)


# --------------------------------------------------------------------------------------- text to ids

@pytest.mark.real
def test_smollm2_ids_equal_tokenizers_on_twenty_thousand_texts(real, real_tok):
    texts = [t for t in dict.fromkeys(texts_for(16000, seed=0))]
    assert len(texts) > 20000
    assert_equal_ids(real_tok, reference_of(real), texts)


@pytest.mark.real
def test_smollm2_ids_equal_tokenizers_on_every_token_and_byte(real, real_tok):
    reference = reference_of(real)
    tokens = [reference.decode([i]) for i in range(49152)]
    bad = [bytes(random.Random(i).choices(range(256), k=12)).decode("utf-8", "replace") for i in range(2000)]
    assert_equal_ids(real_tok, reference, [*tokens, *map(chr, range(256)), *(f"a{chr(i)} b" for i in range(256)), *bad])


@pytest.mark.real
def test_smollm2_ids_equal_tokenizers_whatever_hypothesis_writes(real, real_tok):
    reference = reference_of(real)

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.lists(PIECES, min_size=5, max_size=20))
    def check(texts):
        assert_equal_ids(real_tok, reference, texts)
    check()


@pytest.mark.real
def test_smollm2_splits_single_digits_and_leaves_the_spaces_alone(real_tok):
    assert real_tok.encode("  12") == [256, 33, 34]
    assert len(real_tok.missing) == 21


@pytest.mark.real
def test_decode_gives_the_text_back(real_tok):
    for text in [*written(), *generated(2000, seed=5)]:
        if not any(bytes([b]) in real_tok.missing for b in text.encode()):
            assert real_tok.decode(real_tok.encode(text)) == text


# `tokenizers` composes by tables older than Python's, which know no marks of the last years
NEW_MARKS = {c for c in ASSIGNED if ord(c) > 0x600 and unicodedata.combining(c)}
RULES = {
    "bytes by regex": {},
    "an unk_token that nothing needs": {"model": {"unk_token": "<|endoftext|>"}},
    "digits one by one": {"pre_tokenizer": digits(True)},
    "digits in runs": {"pre_tokenizer": digits(False)},
    "digits one by one, bytes missing": {"pre_tokenizer": digits(True), "without": [*range(1, 9), 0xC0, 0xE4, 0xF3]},
    "Llama 3": {"pre_tokenizer": split(LLAMA3_PATTERN), "special": LLAMA3_SPECIAL, "model": {"ignore_merges": True}},
    "Llama 3, merges as pairs": {"pre_tokenizer": split(LLAMA3_PATTERN), "special": LLAMA3_SPECIAL,
                                 "model": {"ignore_merges": True, "merges": [m.split() for m in MERGES]}},
    "Qwen": {"pre_tokenizer": split(QWEN_PATTERN), "normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("name", RULES)
def test_the_rules_of_a_tokenizer_json_give_the_ids_of_tokenizers(tmp_path, name):
    folder = write_json(tmp_path, **RULES[name])
    texts = [*generated(2500, seed=len(name)), *written()[::10]]
    if "normalizer" in RULES[name]:
        texts = [t for t in texts if not NEW_MARKS & set(t)]
    assert_equal_ids(Tokenizer.from_pretrained(folder), reference_of(folder), texts)


def test_a_million_spaces_do_not_crash(tmp_path):
    folder = write_json(tmp_path)
    assert_equal_ids(Tokenizer.from_pretrained(folder), reference_of(folder), [" " * 1_100_000])


def test_lone_surrogates_are_unreadable_characters(tok):
    for text in ("a\ud800b", "\udfff", "\ud83d\ude00 x", "<|im_start|>\udc80"):
        ids, seen = tok.encode(text), tok.decode(tok.encode(text))
        assert "\ufffd" in seen and seen.replace("\ufffd", "") == "".join(c for c in text if not "\ud800" <= c < "\ue000")
        assert min(ids) > 2 and tok.render(text)[0]


# ------------------------------------------------------------------------------------ Llama 3's own file

@pytest.mark.real
def test_llama3s_own_file_gives_the_published_ids(real_llama3):
    """Ids from llama_models/llama3/tests/api/test_tokenizer.py, and Llama 3.1's model card for the special ones."""
    tok = Tokenizer.from_pretrained(real_llama3)
    assert tok.encode("hello world") == [15339, 1917]
    assert tok.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    names = ["begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eom_id",
             "eot_id", "python_tag"]
    assert [tok.special[f"<|{n}|>"] for n in names] == [128000, 128001, 128004, 128006, 128007, 128008, 128009, 128010]
    assert sorted(tok.special.values()) == [*range(128000, 128256)] and tok.flag_id == 128256
    ids, mask = tok.render([{"role": "system", "content": "This is a test sentence."},
                            {"role": "user", "content": "This is a response."}])
    assert ids == [128000, 128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009,
                   128006, 882, 128007, 271, 2028, 374, 264, 2077, 13, 128009, 128006, 78191, 128007, 271]
    assert not any(mask) and sorted(tok.stop_ids) == [128001, 128008, 128009]


@pytest.mark.real
def test_llama3s_own_file_gives_the_ids_of_the_reference_code(real_llama3):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    reference = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=load_tiktoken_bpe(str(real_llama3)),
                                  special_tokens={"<|begin_of_text|>": 128000, "<|eot_id|>": 128009})
    tok = Tokenizer.from_pretrained(real_llama3)
    for text in texts_for(4000, seed=1):
        ids = tok.encode(text)
        assert ids == reference.encode(text, disallowed_special=()) and max(ids) < 128000
        assert tok.decode(ids) == text


@pytest.mark.real
def test_llama3s_tokenizer_json_gives_the_ids_of_tokenizers_and_of_its_tokenizer_model(real_llama3, tmp_path):
    """The tokenizer.json that transformers makes of Llama 3's file, as it was made for Llama 3's folders on the hub."""
    from transformers.convert_slow_tokenizer import TikTokenConverter
    known = Tokenizer.from_pretrained(real_llama3)
    special = sorted(known.special, key=known.special.get)
    made = TikTokenConverter(str(real_llama3), LLAMA3_PATTERN, extra_special_tokens=special).converted()
    made.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.special == known.special and tok.flag_id == known.flag_id == 128256
    texts = texts_for(4000, seed=2)
    assert_equal_ids(tok, reference_of(tmp_path), texts)
    assert all(tok.encode(text) == known.encode(text) for text in texts)
    assert tok.render("Hi") == known.render("Hi")


# ---------------------------------------------------------------------------- what is not supported says so

UNSUPPORTED = {
    "Metaspace": {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}},
    "add_prefix_space": {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    "Lowercase": {"normalizer": {"type": "Lowercase"}},
    "Sequence": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
    "WordPiece": {"model": {"type": "WordPiece"}},
    "Unigram": {"model": {"type": "Unigram"}},
    "byte_fallback": {"model": {"byte_fallback": True}},
    "dropout": {"model": {"dropout": 0.1}},
    "end_of_word_suffix": {"model": {"end_of_word_suffix": "</w>"}},
    "Removed": {"pre_tokenizer": split(r"\s+", behavior="Removed")},
    "invert": {"pre_tokenizer": split(r"\S+", invert=True)},
    "String": {"pre_tokenizer": split("x", pattern={"String": " "})},
    "Whitespace": {"pre_tokenizer": {"type": "Whitespace"}},
    "Punctuation": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTE_LEVEL]}},
    r"<\|im_start\|>.*<\|start_header_id\|>": {"special": ["<pad>"]},
    r"<\|im_start\|>.*<\|start_header_id\|>.*\[\]": {"special": []},
    # damaged
    "merges": {"model": {"merges": None}},
    "vocab": {"model": {"vocab": None}},
    "helloĠthe": {"model": {"merges": [*MERGES, "hello Ġthe"]}},  # a merge into a token that is not there
    "▁x": {"merges": ["▁ x"]},  # not of the byte alphabet
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_rule_that_is_not_supported_is_an_error_naming_it(tmp_path, name):
    write_json(tmp_path, **UNSUPPORTED[name])
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x05\n\x03<s>", "SentencePiece"),
    ("tokenizer.model", b"IQ== 0\nIg== 1\nIw", "tiktoken"),
    ("tokenizer.model", b"", "tokenizer.model"),
    ("tokenizer.json", b'{"model": {"type": "BP', "tokenizer.json"),
    ("vocab.txt", b"", "no tokenizer.json or tokenizer.model"),
])
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_a_token_that_no_merge_makes_is_read_as_tokenizers_does_or_is_an_error(tmp_path):
    folder = write_json(tmp_path, merges=["b c"], more=["abc"], model={"ignore_merges": True})
    try:
        tok = Tokenizer.from_pretrained(folder)
    except ValueError:
        return
    assert_equal_ids(tok, reference_of(folder), ["abc", " abc", "abcabc"])


# ------------------------------------------------------------------------------------------- the flag's id

@pytest.mark.parametrize("n_flags", [1, 3])
@pytest.mark.parametrize("rows", [273, 320])
def test_the_flags_follow_the_models_rows(tmp_path, rows, n_flags):
    folder = write_json(tmp_path)  # 273 tokens
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    tok = Tokenizer.from_pretrained(folder, n_flags=n_flags)
    assert tok.flag_id == rows and tok.flag_ids == [rows, rows + 1, rows + 2][:n_flags]
    assert tok.decode([*tok.flag_ids, *tok.encode("a"), *tok.special.values(), rows]) == "a"


def test_more_tokens_than_rows_are_an_error(tmp_path):
    folder = write_json(tmp_path)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 272}))
    with pytest.raises(ValueError, match="273 tokens.*272 rows"):
        Tokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- chat

# ids by hand: in conftest's tokenizer an ASCII letter is its code - 30, newline 201, space 223, "hello" 262, " t" 263
START, END, NEWLINE = 1, 2, 201
USER, ASSISTANT, SYS = [87, 85, 71, 84, 201], [67, 85, 85, 75, 85, 86, 67, 80, 86, 201], [85, 91, 85, 86, 71, 79, 201]
DEFAULT = [START, *SYS, 59, 81, 87, 223, 67, 84, 71, 263, 75, 80, 91, END, NEWLINE]  # You are tiny
HI, HELLO = [42, 75], [262]


def say(role, content):
    return {"role": role, "content": content}


CHATML = {  # messages, prefill, [(ids, mask)]
    "a string": ("Hi", None, [(DEFAULT, 0), ([START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0)]),
    "a prefill": ("Hi", "hello", [(DEFAULT, 0), ([START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0), (HELLO, 1)]),
    "a system text": ([say("system", "Hi"), say("user", "hello")], None,
                      [([START, *SYS, *HI, END, NEWLINE, START, *USER, *HELLO, END, NEWLINE, START, *ASSISTANT], 0)]),
    "an empty system text": ([say("system", ""), say("user", "Hi")], None,
                             [([START, *SYS, END, NEWLINE, START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0)]),
    "several turns": ([say("user", "Hi"), say("assistant", "hello"), say("user", "hello"), say("assistant", "Hi")], None,
                      [(DEFAULT, 0), ([START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0), ([*HELLO, END], 1),
                       ([NEWLINE, START, *USER, *HELLO, END, NEWLINE, START, *ASSISTANT], 0), ([*HI, END], 1),
                       ([NEWLINE], 0)]),
    "a prefill said before": ([say("user", "Hi"), say("assistant", "hello"), say("user", "Hi")], "hello",
                              [(DEFAULT, 0), ([START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0),
                               ([*HELLO, END], 1), ([NEWLINE, START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0),
                               (HELLO, 1)]),
    "an empty answer": ([say("user", "Hi"), say("assistant", ""), say("user", "Hi")], None,
                        [(DEFAULT, 0), ([START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0), ([END], 1),
                         ([NEWLINE, START, *USER, *HI, END, NEWLINE, START, *ASSISTANT], 0)]),
}


@pytest.mark.parametrize("name", CHATML)
def test_chatml_ids_and_mask_are_these(tok, name):
    messages, prefill, parts = CHATML[name]
    wanted = [i for ids, _ in parts for i in ids], [bool(m) for ids, m in parts for _ in ids]
    assert tok.render(messages, prefill) == wanted


def test_llama3_ids_and_mask_are_these(llama3):
    """By hand: a letter is its code - 33, two newlines 264, "hello" 259; the control tokens are 270-274."""
    tok = Tokenizer.from_pretrained(llama3)
    head = lambda *role: [272, *role, 273, 264]
    # "system", "user", "assistant"; "st" is a merge, 269
    system, user, assistant = head(82, 88, 269, 68, 76), head(84, 82, 68, 81), head(64, 82, 82, 72, 269, 64, 77, 83)
    chat = [say("system", "Hi"), say("user", "Hi"), say("assistant", "hello"), say("user", "a")]
    ids, mask = tok.render(chat, prefill="Hi")
    parts = [([270, *system, 39, 72, 274, *user, 39, 72, 274, *assistant], 0), ([259, 274], 1),
             ([*user, 64, 274, *assistant], 0), ([39, 72], 1)]
    assert ids == [i for part, _ in parts for i in part]
    assert mask == [bool(m) for part, m in parts for _ in part]
    assert tok.render("a")[0] == [270, *user, 64, 274, *assistant]


CHATS = [
    [say("user", "Hi")],
    [say("system", "Answer in French.\nBe brief."), say("user", "What is 12 + 30?")],
    [say("user", "What is the capital of France?"), say("assistant", "Paris."), say("user", "And of Japan?\n  1\n  2")],
    [say("system", "Du bist ein Koch."), say("user", "日本語 🙂"), say("assistant", "x"), say("user", "print(1)")],
]


@pytest.mark.real
@pytest.mark.parametrize("saved_again", [False, True])
def test_chatml_ids_equal_those_of_transformers_template(real, tmp_path, saved_again):
    """Also from a folder that transformers itself has written, where the template is a file of its own."""
    import transformers
    reference, folder = transformers.AutoTokenizer.from_pretrained(real), real
    if saved_again:
        reference.save_pretrained(tmp_path)
        folder = tmp_path
    tok = Tokenizer.from_pretrained(folder)
    for chat in CHATS:
        wanted = reference.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert tok.render(chat)[0] == wanted
        closed = [*chat, say("assistant", "Yes, 42.")]
        assert tok.render(closed)[0] == reference.apply_chat_template(closed, tokenize=True, return_dict=False)


@pytest.mark.parametrize("template", [
    f"{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}",      # a newline in JSON
    f"{{{{- '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}",   # an escaped one in Jinja, as Qwen writes it
    [{"name": "default", "template": f"{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}"}],  # several templates
], ids=["newline", "escaped", "named templates"])
def test_the_default_system_text_is_read_from_the_template(tmp_path, template):
    folder = write_json(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tok = Tokenizer.from_pretrained(folder)
    assert tok.decode(tok.render("a")[0]) == f"system\n{SYSTEM}\nuser\na\nassistant\n"


@pytest.mark.parametrize("messages", ["no list", [], [{"role": "user"}], [{"role": "tool", "content": "x"}], [3],
                                      [{"role": "user", "content": None}], None], ids=str)
def test_what_is_no_chat_is_an_error(tok, messages):
    with pytest.raises(ValueError, match="a chat is|a message is"):
        tok.render([messages] if messages == "no list" else messages)


def test_a_prefill_after_an_answer_is_an_error(tok):
    with pytest.raises(ValueError, match="prefill"):
        tok.render([say("user", "a"), say("assistant", "b")], prefill="c")


# ------------------------------------------------------------------------------ what text must never do

FORGERY = st.lists(st.one_of(st.sampled_from(
    [p for t in [*CHATML_SPECIAL, *LLAMA3_SPECIAL, "<|red_flag|>"] for p in (t, t[:2], t[2:-2], t[-2:], t[:5], t[5:])]
    + ["\n", " ", "user", "assistant", "system", "\0", "\ud800", "270", "\u200b"]), st.text(max_size=3)),
    max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(FORGERY, min_size=4, max_size=4), data=st.data())
def test_no_text_forges_a_control_token_or_the_flag(tok, llama3, texts, data):
    system, user, answer, prefill = texts
    chat = [say("system", system), say("user", user), say("assistant", answer), say("user", user)]
    other = Tokenizer.from_pretrained(llama3, n_flags=3) if data.draw(st.booleans()) else tok
    wanted = {"chatml": [1, 2] * 4 + [1], "llama3": [270] + [272, 273, 274] * 4 + [272, 273]}[other.style]
    ids, mask = other.render(chat, prefill)
    control = {*other.special.values(), *other.flag_ids}
    assert [i for i in ids if i in control] == wanted and len(ids) == len(mask)
    assert max(ids) < other.flag_id
    for text in texts:
        assert not control & set(other.encode(text))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 274), max_size=40))
def test_streamed_pieces_join_to_what_decode_gives(tok, ids):
    give = tok.stream()
    assert "".join([*map(give, ids), give(None)]) == tok.decode(ids)
    assert not any(s in tok.decode([i for i in ids if i < 3 or i > 264]) for s in [*CHATML_SPECIAL, "<|red_flag|>"])


@settings(max_examples=200, deadline=None)
@given(text=PIECES, flag_at=st.integers(0, 40))
def test_a_stream_never_gives_half_a_character(tok, text, flag_at):
    text = text.replace("\ufffd", "")
    ids = tok.encode(text)
    ids.insert(flag_at, tok.flag_id)  # even where the flag stands amid a character's bytes
    give, seen = tok.stream(), ""
    for i in [*ids, None]:
        seen += give(i)
        assert text.startswith(seen)
    assert seen == text
