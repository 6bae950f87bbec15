"""The command lines: flags out of a dataclass, and the scripts as a user runs them."""
import io
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from answer import NOTICE
from cli import option, parse, read_jsonl, run
from sample import SampleConfig, shade

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train.py", "sample.py", "bench.py", "data/prepare.py", "data/smollm2.py"]
KEYS = ["prompt", "text", "flagged", "flag_at", "score", "flag_prob", "tokens", "stop_reason"]


@dataclass(frozen=True)
class Config:
    text: str | None = option(None, "words, 100% of them")
    max_new_tokens: int = option(256, "whole number")
    rate: float = option(0.5, "number")
    limit: float | None = option(None, "number or nothing")
    json: bool = option(False, "off at first")
    colour: bool = option(True, "on at first")

    def problems(self):
        return [f"{name} is too big" for name in ("max_new_tokens", "rate") if getattr(self, name) > 1000]


# ------------------------------------------------------------------------------------------- parse

@pytest.mark.parametrize("argv, wanted", [
    ([], {}), (["--text", "a b"], {"text": "a b"}), (["--text", ""], {"text": ""}), (["--text="], {"text": ""}),
    (["--text", "a=b"], {"text": "a=b"}), (["--text=a=b --c"], {"text": "a=b --c"}), (["--text=--x"], {"text": "--x"}),
    (["--text", "5"], {"text": "5"}), (["--text", "None"], {"text": "None"}),
    (["--text", "- a list"], {"text": "- a list"}),
    (["--max-new-tokens", "7"], {"max_new_tokens": 7}), (["--max-new-tokens", "-7"], {"max_new_tokens": -7}),
    (["--rate", "3"], {"rate": 3.0}), (["--rate", "-0.25"], {"rate": -0.25}), (["--rate=-1e-3"], {"rate": -0.001}),
    (["--limit", "1e-3"], {"limit": 0.001}), (["--json"], {"json": True}), (["--no-json"], {"json": False}),
    (["--no-colour", "--json"], {"colour": False, "json": True}), (["--rate", "1", "--rate", "2"], {"rate": 2.0})])
def test_flags_fill_the_config_each_in_its_type(argv, wanted):
    found = parse(Config, argv)
    assert found == Config(**wanted)
    for name, value in wanted.items():
        assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize("argv, wanted", [
    (["--max-new-tokens", "2.5"], ["--max-new-tokens is '2.5'", "whole number"]),
    (["--rate", "fast"], ["--rate is 'fast'"]),
    (["--nonsense"], ["'--nonsense'"]), (["--tex", "a"], ["'--tex'"]), (["stray"], ["'stray'"]),
    (["--max_new_tokens", "3"], ["'--max_new_tokens'"]), (["--rate", "2000"], ["rate is too big"]),
    (["--max-new-tokens", "x", "--limit", "y", "--other", "--rate", "z"],
     ["--max-new-tokens is 'x'", "--limit is 'y'", "'--other'", "--rate is 'z'"]),
    (["--max-new-tokens", "2000", "--rate", "3000"], ["max_new_tokens is too big", "rate is too big"])])
def test_all_problems_are_one_value_error(argv, wanted):
    with pytest.raises(ValueError) as e:
        parse(Config, argv)
    assert all(w in str(e.value) for w in wanted), e.value


@pytest.mark.parametrize("argv", [["--text"], ["--rate"], ["--limit"], ["--text", "--json"], ["--json", "--rate"]])
def test_a_flag_without_its_value_is_a_problem_and_not_the_default(argv):
    with pytest.raises(ValueError, match="needs a value"):
        parse(Config, argv)


def test_a_missing_value_is_reported_together_with_the_other_problems():
    with pytest.raises(ValueError) as e:
        parse(Config, ["--rate", "--max-new-tokens", "x"])
    assert "--rate needs a value" in str(e.value) and "--max-new-tokens is 'x'" in str(e.value)


def test_help_documents_every_flag_and_exits_0(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Config, ["--help"], "what it is for: 50%")
    out = capsys.readouterr().out
    assert e.value.code == 0 and "what it is for: 50%" in out and "words, 100% of them" in out
    for f in fields(Config):
        assert "--" + f.name.replace("_", "-") in out and f.metadata["help"] in out
    assert "--no-colour" in out and "256" in out and "0.5" in out


# ------------------------------------------------------------------------------ read_jsonl and run

def test_json_lines_come_with_their_numbers(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n  \n{"a": "\u2028 b"}\r\n{"a": 3}', encoding="utf-8")
    assert read_jsonl(file) == [(1, {"a": 1}), (4, {"a": "\u2028 b"}), (5, {"a": 3})]


@pytest.mark.parametrize("content, wanted", [
    (b'{"a": 1}\n{"a": 2}\n{"a": \n', ":3: "), (b'{"a": 1}\n[1]\n', ":2: "), (b"\n\n", "empty"), (b"", "empty"),
    (b'{"a": "\xff"}', "a.jsonl"), (None, "a.jsonl")])
def test_bad_json_lines_are_named(tmp_path, content, wanted):
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=wanted) as e:
        read_jsonl(file)
    assert "a.jsonl" in str(e.value)


@pytest.mark.parametrize("error, code", [(ValueError("two\nlines"), 2), (FileNotFoundError(2, "none", "x.txt"), 2),
                                         (KeyboardInterrupt(), 130)])
def test_run_turns_what_a_user_causes_into_one_line_and_a_code(capsys, error, code):
    def main():
        raise error
    with pytest.raises(SystemExit) as e:
        run(main)
    out, err = capsys.readouterr()
    assert (e.value.code, out, len(err.strip().splitlines())) == (code, "", 1) and "Traceback" not in err


def test_run_does_not_hide_our_own_bugs():
    def main():
        assert False
    with pytest.raises(AssertionError):
        run(main)


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    code = "from cli import run\nrun(lambda: [print('x' * 99, flush=True) for _ in range(9999)])"
    p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.readline()
    p.stdout.close()
    assert (p.wait(), p.stderr.read()) == (141, b"")


# -------------------------------------------------------------------------------------- the scripts

@pytest.fixture
def sample(script, tiny, adapter):
    return lambda *argv: script("sample.py", "--weights", tiny, "--adapter", adapter, "--max-new-tokens", 6, *argv)


@pytest.mark.parametrize("file", SCRIPTS)
def test_help_of_every_script(script, file):
    code, out, err = script(file, "--help")
    assert (code, err) == (0, "") and out.startswith("usage:") and len(out.splitlines()) > 5


@pytest.mark.parametrize("file, config", [("train.py", "TrainConfig"), ("sample.py", "SampleConfig"),
                                          ("data/prepare.py", "PrepareConfig")])
def test_help_of_a_script_documents_every_field_of_its_config(script, file, config):
    out = " ".join(script(file, "--help")[1].split())
    config = runpy.run_path(str(ROOT / file))[config]
    for f in fields(config):
        assert f.metadata["help"] and " ".join(f.metadata["help"].split()) in out, f.name
        assert "--" + f.name.replace("_", "-") in out


def test_importing_the_scripts_has_no_side_effects(tmp_path):
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(ROOT)!r})
state = lambda: (torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
                 torch.random.initial_seed(), torch.is_grad_enabled(), torch.backends.cuda.matmul.allow_tf32,
                 dict(os.environ), sys.argv, os.getcwd())
before = state()
import answer, attacks, baselines, bench, calibrate, chat, checkpoint, cli, costs, decode, eval, measures, memory
import model, objective, page, prompts, record, reflect, report, sample, tokenizer, train, words, data.prepare, data.smollm2
assert state() == before
unneeded = {{"transformers", "tokenizers", "peft", "trl", "accelerate", "gguf", "matplotlib", "scipy"}}
assert not unneeded & set(sys.modules), "a package that run time does not need"
"""
    p = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (p.returncode, p.stdout, p.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_whole_process_is_exit_code_2_and_one_line(tiny):
    p = subprocess.run([sys.executable, "sample.py", "--weights", tiny, "--mode", "off", "--prompt", "  ",
                        "--adapter", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert (p.returncode, p.stdout) == (2, "") and re.fullmatch("error: .*empty.*\n", p.stderr)


@pytest.mark.parametrize("argv, wanted", [
    (["--prompt", ""], "empty"), (["--prompt", "x" * 300], "context holds 256"), ([], "--prompt TEXT, --prompts"),
    (["--prompt", "a", "--threshold", "1.5"], "threshold is 1.5"),
    (["--prompt", "a", "--threshold", "nan"], "threshold"),
    (["--prompt", "a", "--threshold", "high"], "--threshold is 'high'"),
    (["--prompt", "a", "--threshold"], "--threshold"),
    (["--prompt", "a", "--adapter", "nowhere"], "no adapter in nowhere"),
    (["--prompt", "a", "--mode", "loud"], "'loud'"),
    (["--prompt", "a", "--weights", "nowhere"], "nowhere"),
    (["--prompts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    (["--prompt", "a", "--prompts", "b"], "wanted one of"), (["--prompts", "b", "--prefill", "a"], "--prefill"),
    (["--prompt", "a", "--wat", "--also"], "'--wat'.*'--also'"), (["--prompt", "a", "--top-p", "0", "--max-new-tokens",
     "0", "--temperature", "-1"], "max_new_tokens is 0.*temperature is -1.0.*top_p 0.0")])
def test_what_a_user_gets_wrong_is_exit_code_2_and_one_line(sample, argv, wanted):
    code, out, err = sample(*argv)
    assert (code, out) == (2, "") and re.fullmatch(f"error: .*{wanted}.*\n", err), err


@pytest.mark.parametrize("line", ['{"prompt": "a"', '["a"]', '{"text": "a"}', '{"prompt": 5}', '{"prompt": ""}',
                                  '{"prompt": "a", "prefill": 5}', '{"prompt": [{"role": "me", "content": "a"}]}',
                                  '{"prompt": "cut \\ud83d"}'])  # half a character, which no output could show
def test_a_malformed_line_of_prompts_is_named_by_file_and_line(sample, tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    code, out, err = sample("--prompts", file, "--json")
    assert (code, out) == (2, "") and re.fullmatch("error: .*prompts.jsonl:3[: ].*\n", err), err


def test_an_adapter_of_other_weights_is_refused_unless_forced(sample, adapter, tmp_path):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    info = json.loads((tmp_path / "flag.json").read_text()) | {"base_sha256": "0" * 64}
    (tmp_path / "flag.json").write_text(json.dumps(info))
    code, out, err = sample("--prompt", "a", "--adapter", tmp_path)
    assert (code, out) == (2, "") and "other base weights" in err
    assert sample("--prompt", "a", "--adapter", tmp_path, "--force")[0] == 0


def test_a_second_system_message_is_refused(sample, tmp_path):
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "Be long"}, {"role": "user", "content": "a"}]
    file.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": chat}) + "\n")
    code, out, err = sample("--prompts", file, "--system", "Be brief")
    assert (code, out) == (2, "") and "--system" in err and "Be long" in err and err.count("\n") == 1
    assert sample("--prompts", file)[0] == 0


@pytest.mark.parametrize("mode", ["off", "shadow", "stop"])
def test_json_is_one_line_a_prompt_with_exactly_the_documented_keys(sample, tmp_path, tok, mode):
    prompts = [{"prompt": "hello"}, {"prompt": "日本 \u2028", "prefill": "né, the"}, {"prompt": "x", "prefill": ""},
               {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                           {"role": "user", "content": "c"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(p | {"label": "benign"}) + "\n" for p in prompts))
    code, out, err = sample("--prompts", file, "--json", "--mode", mode, "--system", "Be brief", "--threshold", 0.02)
    found = [json.loads(line) for line in out.split("\n")[:-1]]
    assert code == 0 and out.endswith("\n") and err and "Traceback" not in err
    assert [list(a) for a in found] == [KEYS] * 4 and [a["prompt"] for a in found] == [p["prompt"] for p in prompts]
    for given, a in zip(prompts, found):
        prefill = tok.encode(given.get("prefill", ""))
        stopped = a["stop_reason"] == "flag"
        assert a["stop_reason"] in ("eos", "length", "flag") and stopped == (mode == "stop" and a["flagged"])
        assert a["tokens"][:len(prefill)] == prefill[:len(a["tokens"])]
        text = tok.decode(a["tokens"])
        assert a["text"] == (text + " " * bool(text) + NOTICE if stopped else text)
        assert len(a["tokens"]) == 6 + len(prefill) or a["stop_reason"] != "length"
        above = [i for i, f in enumerate(a["flag_prob"]) if f > 0.02]
        assert (a["flagged"], a["flag_at"]) == (bool(above), above[0] if above else None)
        assert a["score"] == (max(a["flag_prob"]) if mode != "off" else None)
        assert len(a["flag_prob"]) == (0 if mode == "off" else len(a["tokens"]) + (a["stop_reason"] != "length"))


def test_a_prefill_on_the_command_line_is_that_of_a_file(sample, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "hello", "prefill": "Sure, the"}) + "\n")
    given = sample("--prompt", "hello", "--prefill", "Sure, the", "--mode", "shadow", "--json")
    assert given[0] == 0 and given[1] == sample("--prompts", file, "--mode", "shadow", "--json")[1]
    assert json.loads(given[1])["text"].startswith("Sure, the")
    code, out, _ = sample("--prompt", "hello", "--prefill", "Sure, the", "--mode", "shadow")
    assert (code, out) == (0, json.loads(given[1])["text"] + "\n")


def test_one_prompt_streams_its_text_to_stdout_and_statistics_to_stderr(sample):
    answer = json.loads(sample("--prompt", "hello", "--mode", "shadow", "--json")[1])
    code, out, err = sample("--prompt", "hello", "--mode", "shadow")
    assert (code, out) == (0, answer["text"] + "\n") and "tokens/s" in err and f"{answer['score']:.4f}" in err


@pytest.mark.parametrize("terminal, no_color, mode, coloured", [
    (True, "", "stop", True), (True, "1", "stop", False), (False, "", "stop", False), (True, "", "off", False)])
def test_colour_is_for_terminals_that_want_it(sample, monkeypatch, terminal, no_color, mode, coloured):
    class Out(io.StringIO):
        isatty = lambda self: terminal
    monkeypatch.setattr(sys, "stdout", Out())
    monkeypatch.setenv("NO_COLOR", no_color)
    with monkeypatch.context() as m:
        m.setattr("objective.flag_prob", lambda words, flags: torch.full((len(words),), 0.95))
        assert sample("--prompt", "hello", "--mode", mode, "--threshold", "0.5")[0] == 0
    out = sys.stdout.getvalue()
    assert ("\x1b" in out) == coloured and (mode == "off" or NOTICE in out)


@pytest.mark.parametrize("f, colour", [
    (0.0, None), (0.02, None), (0.021, 52), (0.1, 52), (0.11, 88), (0.3, 88), (0.31, 124), (0.6, 124), (0.61, 160),
    (0.9, 160), (0.91, 196), (1.0, 196)])
def test_the_ground_deepens_with_f(f, colour):
    assert shade("a b", f) == ("a b" if colour is None else f"\x1b[48;5;{colour}ma b\x1b[0m")


def test_the_defaults_of_sample_are_documented_settings_that_hold_together():
    assert SampleConfig(prompt="a").problems() == []
    assert os.path.basename(SampleConfig().adapter) == "out"


@pytest.mark.parametrize("line, more, wanted", [
    ('{"prompt": "a", "mode": ["x"]}', (), "prompts.jsonl:1: mode is \\['x'\\]"), ('{"prompt": "a", "mode": "off"}',
     ("--html", "x.html"), "--html shows f"), ('{"prompt": "a"}', ("--events", "--json"), "--events goes with none of"),
    ('{"prompt": "a"}', ("--mode", "reflect", "--demos", "nowhere"), "nowhere")])
def test_modes_of_records_and_settings_that_do_not_go_together(sample, tmp_path, line, more, wanted):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    code, out, err = sample("--prompts", tmp_path / "prompts.jsonl", *more)
    assert (code, out) == (2, "") and re.fullmatch(f"error: .*{wanted}.*\n", err), err


@pytest.mark.parametrize("error, code", [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 2), (MemoryError("too much"), 2)])
def test_too_small_a_machine_is_one_line(error, code, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as e:
        run(main)
    assert e.value.code == code and capsys.readouterr().err.count("\n") == 1


def test_a_bug_of_ours_keeps_its_traceback():
    def main():
        raise RuntimeError("shape '[2]' is invalid")
    with pytest.raises(RuntimeError):
        run(main)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives large tensors back at once")
def test_memory_that_is_freed_is_used_again():
    program = """
import ctypes, resource, cli
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes, library.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def pages():  # that the system has to hand out for eight blocks of 20 MB, all held and then freed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    places = [library.malloc(20_000_000) for _ in range(8)]
    for place in places:
        library.memset(place, 1, 20_000_000)
    for place in places:
        library.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

KEEP
pages()
print(pages())
"""
    kept, given_back = (int(subprocess.run([sys.executable, "-c", program.replace("KEEP", keep)], capture_output=True,
                                           text=True, cwd=ROOT, check=True).stdout)
                        for keep in ("cli.keep_memory()", ""))
    assert kept < 100 < given_back  # 39,000 pages of 4 kB in all
