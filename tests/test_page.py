"""The page of shaded answers: made, and opened in a real browser where there is one."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import sample
from answer import Answer, flag_place
from measures import sustained
from page import log_odds, make_page, token_spans
from prompts import read_transcripts
from sample import generate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def answer(tok, text, probs, prompt="hello"):
    return Answer(prompt, text, False, None, max(probs), probs, tok.encode(text), "eos")


def test_every_token_is_there_with_its_f_and_the_end_with_its_own(tok):
    ids = tok.encode("hello the he")
    spans = token_spans(answer(tok, "hello the he", [0.1 * (i + 1) for i in range(len(ids) + 1)]), tok)
    found = re.findall(r'title="f = ([0-9.]+)"[^>]*>([^<]*)</span>', spans)
    assert "".join(text for _, text in found) == "hello the he\u25a0"
    assert [float(f) for f, _ in found] == pytest.approx([0.1 * (i + 1) for i in range(len(ids) + 1)])


def test_half_a_character_waits_for_its_other_half(tok):
    text = "h\u00e9 \U0001f600"
    assert "".join(re.findall(r">([^<]*)</span>", token_spans(answer(tok, text, [0.5] * len(tok.encode(text))), tok))) == text


def test_text_of_a_user_or_a_model_never_becomes_markup(tok):
    nasty = '</script><script>alert(1)</script><img src=x onerror="x">'
    page = make_page([answer(tok, nasty, [0.5] * len(tok.encode(nasty)), prompt=nasty)], tok, 0.5)
    assert page.count("<script>") == 1 and "<img" not in page
    assert "http" not in page.replace("<!doctype", "")  # nothing is fetched from elsewhere


def test_log_odds():
    assert log_odds(0.5) == 0 and log_odds(0.0) < -35 and log_odds(1.0) > 35
    assert log_odds(0.9) == pytest.approx(2.1972, abs=1e-4)


def dom(path):
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
                          capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_what_is_flagged_and_the_slider_changes_it(tok, tmp_path):
    answers = [answer(tok, "hello the he", [0.1, 0.6, 0.2]), answer(tok, "hello the he", [0.1, 0.2, 0.1])]
    page = make_page(answers, tok, 0.5)
    (tmp_path / "page.html").write_text(page)
    slide = '<script>slider.value = Math.log(0.15 / 0.85); slider.dispatchEvent(new Event("input"));</script></body>'
    (tmp_path / "slid.html").write_text(page.replace("</body>", slide))
    before, after = dom(tmp_path / "page.html"), dom(tmp_path / "slid.html")
    assert "1 of 2 answers flagged" in before and "2 of 2 answers flagged" in after
    assert "flag raised at token 1, score 0.600000" in before and before.count('class="above first"') == 1
    assert "no flag, score 0.200000" in before and "no flag" not in re.sub("<script>.*?</script>", "", after, flags=re.S)
    twice = [answers[0], answer(tok, "hello the he", [0.6, 0.1, 0.1])]
    (tmp_path / "twice.html").write_text(make_page(twice, tok, 0.5, 2))
    assert "1 of 2 answers flagged" in (twice := dom(tmp_path / "twice.html")) and "flag raised at token 0" in twice
    assert ">0.5000</output>" in before and ">0.1500</output>" in after


@pytest.mark.parametrize("debounce", [1, 2])
def test_a_transcript_is_judged_as_an_answer_in_the_making_is(flagged, tok, debounce):
    flagged.debounce, flagged.threshold = debounce, 0.05
    made, = generate(flagged, tok, [{"prompt": "hello", "prefill": "the hello he"}], "shadow", max_new_tokens=1)
    found, = read_transcripts(flagged, tok, [{"prompt": "hello", "response": "the hello he"}])
    n = len(tok.encode("the hello he"))
    assert found.flag_prob == pytest.approx(made.flag_prob[:n + 1], rel=1e-3) and len(found.flag_prob) == n + 1
    assert found.flag_at == flag_place(found.flag_prob, 0.05, debounce)[0]
    assert found.score == max(sustained(found.flag_prob, debounce))
    assert found.text == "the hello he" and found.tokens == made.tokens[:n] and found.stop_reason == "transcript"


def test_a_transcripts_f_is_that_of_a_plain_forward(flagged, tok):
    prompt, words = tok.render("the he")[0], tok.encode("hello hello")
    found, = read_transcripts(flagged, tok, [{"prompt": "the he", "response": "hello hello"}], threshold=0.0)
    with torch.no_grad():
        pi = flagged.logits(flagged(torch.tensor([prompt + words])))[0].double().softmax(-1)
    assert found.flag_prob == pytest.approx(pi[len(prompt) - 1:, -1].tolist(), rel=1e-3)
    assert found.flagged and found.flag_at == 0 and found.score == max(found.flag_prob)
    with pytest.raises(ValueError, match="transcript 1 has .* tokens"):
        read_transcripts(flagged, tok, [{"prompt": "a", "response": "hello " * 300}])


def test_the_command_writes_a_page_of_a_transcript(monkeypatch, tiny, flagged, tok, tmp_path, capsys):
    flagged.save_flag(tmp_path / "out")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"prompt": "the he", "response": "hello <b>"}))
    argv = ["--weights", tiny, "--adapter", tmp_path / "out", "--transcript", tmp_path / "chats.jsonl", "--html",
            tmp_path / "page.html", "--json"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    sample.main()
    line = json.loads(capsys.readouterr().out)
    assert line["text"] == "hello <b>" and line["stop_reason"] == "transcript"
    page = (tmp_path / "page.html").read_text()
    assert f'{line["score"]:.6f}' in page and "&lt;" in page and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("argv, message", [(["--transcript", "x.jsonl", "--prompt", "a"], "wanted one of"),
                                           (["--transcript", "x.jsonl", "--mode", "off"], "mode off"),
                                           (["--prompt", "a", "--html", "p.html", "--mode", "off"], "mode off"),
                                           (["--transcript", "empty.jsonl"], "the response is ''")])
def test_bad_calls_say_so(monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "response": ""}')
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    with pytest.raises(ValueError, match=message):
        sample.main()
