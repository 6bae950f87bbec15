"""The chat: what is read again between turns, its commands, and how it ends."""
import io
import json
import sys

import pytest

import answer
import chat
import sample
from answer import NOTICE, flag_place
from chat import Conversation
from prompts import Settings
from test_engine import DEMOS, Scripted


def ask(talk, text):
    """(the answer, how many ids the model was given for it)."""
    before = talk.model.n_read
    *_, end = talk.ask(text)
    return end.answer, talk.model.n_read - before


@pytest.fixture
def demos(tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "WINDOW", 6)
    (tmp_path / "d.txt").write_text(DEMOS)
    return str(tmp_path / "d.txt")


@pytest.mark.parametrize("mode", ["off", "shadow", "stop"])
def test_a_turn_reads_only_what_is_new(tok, mode):
    talk, n = Conversation(Scripted(tok, 2), tok, Settings(mode=mode, max_new_tokens=9)), 0
    for text in ("hello", "b", "日本"):
        ids = talk.ids(text, "")
        a, n_read = ask(talk, text)
        steps = len(a.tokens) + (a.stop_reason != "length")  # each reads one id: the prompt's last, then the answer's
        assert n_read == len(ids) - 1 - n + steps
        n = len(ids) + len(a.tokens) - 1  # all but the last, which an answer ended by its length has not read


def test_a_chat_flags_as_the_adapter_says(tok):
    model = Scripted(tok, 2)
    model.debounce = 2
    talk, alone = Conversation(model, tok, Settings(mode="shadow", max_new_tokens=9)), Settings(mode="shadow", debounce=1)
    assert talk.settings.debounce == 2 and Conversation(model, tok, alone).settings.debounce == 1
    for text in ("hello", "b", "the"):
        a, _ = ask(talk, text)
        assert a.flag_at == flag_place(a.flag_prob, 0.5, 2)[0]


@pytest.mark.parametrize("mode", ["off", "stop", "reflect", "backtrack"])
def test_with_the_kept_cache_answers_are_those_without(tok, flagged, demos, mode):
    for model in (Scripted(tok, 4), flagged):
        talk = Conversation(model, tok, Settings(mode=mode, max_new_tokens=7, threshold=0.7, demos=demos))
        for text in ("a", "hello", "the", "b"):
            fresh = Conversation(model, tok, talk.settings)
            fresh.turns = list(talk.turns)
            (*_, end), (*_, again) = talk.ask(text), fresh.ask(text)
            assert (end.answer.tokens, end.answer.text) == (again.answer.tokens, again.answer.text)
        assert len(talk.turns) == 4


def test_the_conversation_is_rendered_as_a_chat_of_messages_is(tok):
    talk = Conversation(Scripted(tok), tok, Settings(mode="off"), system="Be brief")
    talk.turns = [("a", tok.encode("hello")), ("b", tok.encode("the 🙂"))]
    said = [("system", "Be brief"), ("user", "a"), ("assistant", "hello"), ("user", "b"), ("assistant", "the 🙂"),
            ("user", "c")]
    assert talk.ids("c", "") == tok.render([{"role": r, "content": t} for r, t in said])[0]


def test_an_interrupted_answer_leaves_what_was_seen_and_a_cache_that_holds(tok, monkeypatch):
    for after in range(1, 12):  # calls of the model; the first reads the prompt
        model = Scripted(tok, 6)
        talk = Conversation(model, tok, Settings(mode="off", max_new_tokens=8))
        list(talk.ask("a"))
        calls, seen, next_ = [], "", model.next

        def interrupted(ids):
            calls.append(1)
            if len(calls) == 5 * after:
                raise KeyboardInterrupt
            return next_(ids)
        model.next, events = interrupted, talk.ask("bb")
        with pytest.raises(KeyboardInterrupt):
            for e in events:
                seen += e.text if e.released else ""
            raise KeyboardInterrupt
        model.next = next_
        assert talk.turns[1][0] == "bb" and tok.decode(talk.turns[1][1]).startswith(seen)
        fresh = Conversation(model, tok, talk.settings)
        fresh.turns = list(talk.turns)
        assert [e.answer for e in talk.ask("c")][-1] == [e.answer for e in fresh.ask("c")][-1]


def test_a_full_context_and_an_empty_line_are_errors_that_end_nothing(tok):
    talk = Conversation(Scripted(tok, context=60), tok, Settings(mode="off", max_new_tokens=4))
    with pytest.raises(ValueError, match="nothing was asked"):
        list(talk.ask("  "))
    with pytest.raises(ValueError, match="room for 60.*reset"):
        list(talk.ask("x" * 60))
    assert talk.turns == [] and ask(talk, "a")[0].text


@pytest.fixture
def lines(script, tiny, adapter, monkeypatch):
    def call(*said, more=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in said)))
        return script("sample.py", "--weights", tiny, "--adapter", adapter, "--max-new-tokens", 5, "--chat", *more)
    return call


def test_a_chat_through_a_pipe_is_answers_on_stdout_and_notes_on_stderr(lines, tok, flagged):
    code, out, err = lines("hello", "/mode off", "hello", "/threshold 0", "/mode stop", "the", "/reset", "hello")
    assert code == 0 and "\x1b" not in out and "> " not in out and "mode off" in err and "a new chat" in err
    assert out.count(NOTICE) == 2 and out.endswith(NOTICE + "\n")


@pytest.mark.parametrize("line, wanted", [
    ("", "nothing was asked"), ("/mode loud", "'loud', wanted one of"), ("/threshold 2", "0 to 1"),
    ("/threshold x", "'x'"), ("/threshold nan", "0 to 1"), ("/wat", "/wat: wanted one of"), ("/mode", "wanted one of"),
    ("/ mode", "wanted one of"),
    ("x" * 300, "room for 256")])
def test_a_bad_line_is_one_line_on_stderr_and_the_chat_goes_on(lines, line, wanted):
    code, out, err = lines(line, "/threshold 1", "hello", "/quit", "never read")
    errors = [x for x in err.splitlines() if x.startswith("error")]
    assert code == 0 and len(errors) == 1 and wanted in errors[0] and out.count("\n") >= 1


@pytest.mark.parametrize("argv, wanted", [
    (["--prompt", "a"], "wanted one of --prompt"), (["--json"], "--chat"),
    (["--demos", "nowhere", "--mode", "reflect"], "nowhere"), (["--max-flags", 0], "max_flags is 0")])
def test_settings_of_a_chat_that_will_not_do_end_it_at_once(lines, argv, wanted):
    code, out, err = lines("hello", more=argv)
    assert (code, out) == (2, "") and err.startswith("error") and wanted in err and err.count("\n") == 1


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(tok, monkeypatch, capsys):
    model, said = Scripted(tok, 6), iter(["hello", "again"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, None) or (_ for _ in ()).throw(EOFError))
    real, n = sample.write, []

    def write(*args, **kwargs):
        for e in real(*args, **kwargs):
            yield e
            n.append(e)
            if len(n) == 2:
                raise KeyboardInterrupt
    monkeypatch.setattr(chat, "write", write)
    chat.chat(sample.SampleConfig(chat=True, mode="off", max_new_tokens=6), model, tok)
    out, err = capsys.readouterr()
    assert "cancelled" in err and out.count("\n") == 2


def test_events_on_the_command_line_give_the_answer(script, tiny, adapter):
    argv = ["sample.py", "--weights", tiny, "--adapter", adapter, "--max-new-tokens", 5, "--prompt", "hello", "--mode",
            "shadow"]
    answer_, events = (script(*argv, flag)[1] for flag in ("--json", "--events"))
    events = [json.loads(line) for line in events.splitlines()]
    assert events[-1]["answer"] == json.loads(answer_)
    assert "".join(e["text"] for e in events if e["released"]) == events[-1]["answer"]["text"]
