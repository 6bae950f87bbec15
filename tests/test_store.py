"""The store of tokenised records: what make_example gives, whatever the records; bad ones by their line; memory."""
import json
import os
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.store
from data.store import open_store
from objective import make_example

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
RECORD = st.builds(
    lambda prompt, opening, response, label, category: dict(
        prompt="p" + prompt, opening=opening, response=opening + "r" + response, label=label, category=category),
    TEXT, TEXT, TEXT, st.sampled_from(["harmful", "borderline", "benign"]), st.sampled_from(["theft", "cooking", ""]))
GOOD = json.dumps(dict(prompt="hello", response="the answer", opening="", label="benign", category="x"))


def opened(path, tiny, tok, max_answer=12, context=255, **settings):
    return open_store(path, path.parent / "tokens", tiny, tok, max_answer, context, **settings)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORD, min_size=1, max_size=5), st.integers(1, 40), st.booleans())
def test_a_store_gives_what_make_example_gives(tiny, tok, tmp_path, records, max_answer, ascii_only):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records), encoding="utf-8")
    store = opened(path, tiny, tok, max_answer)
    kinds = list(dict.fromkeys((r["label"], r["category"]) for r in records))  # in the order of their first records
    assert store.kinds == kinds and len(store) == len(records)
    assert list(store) == [replace(make_example(tok, r, max_answer, 255), kind=kinds.index((r["label"], r["category"])))
                           for r in records]
    assert store[-1] == store[len(store) - 1] and store.labels() == {r["label"] for r in records}


@pytest.mark.parametrize("n_rows, dtype", [(2**16 - 1, "<u2"), (2**16, "<u4")])
def test_the_largest_id_fits(tiny, tok, tmp_path, monkeypatch, n_rows, dtype):
    ids = [n_rows - 1, 0, n_rows - 1]
    monkeypatch.setattr(tok, "render", lambda messages: (ids, [False, True, True]))
    monkeypatch.setattr(tok, "flag_ids", [n_rows])
    path = tmp_path / "r.jsonl"
    path.write_text(GOOD)
    store = opened(path, tiny, tok)
    assert store[0].ids == ids and store.info["dtype"] == dtype


BAD = {"no JSON": b'{"prompt": ', "wanted a JSON object": b"[1]", "nested too deep": b"[" * 100_000,
       "0xff": b'{"prompt": "\xff"}', "half a character": b'{"prompt": "\\ud800"}', "fields": b'{"prompt": "x"}',
       "without a response": GOOD.replace("the answer", "").encode(), "context": GOOD.replace("hello", "x" * 300).encode()}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_record_is_named_with_its_line_and_left_out_only_if_asked(tiny, tok, tmp_path, capsys, message):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), b"", BAD[message], GOOD.encode(), BAD[message]]))
    for _ in range(2):  # the failed one leaves nothing that the next would take for a store
        with pytest.raises(ValueError, match=f"r.jsonl:3: .*{message}.*--skip-bad"):
            opened(path, tiny, tok)
    capsys.readouterr()
    store = opened(path, tiny, tok, skip_bad=True)
    assert list(store) == [replace(make_example(tok, json.loads(GOOD), 12, 255), kind=0)] * 2 and store.skipped == 2
    first, second, total = capsys.readouterr().err.splitlines()
    assert "r.jsonl:3: " in first and "r.jsonl:5: " in second and message in first and "2 bad records of 4" in total


def test_files_without_one_good_record_are_errors(tiny, tok, tmp_path):
    path = tmp_path / "r.jsonl"
    for content, message in (("\n\n", "empty"), ("[]\n{}\n", "all of its 2 records are bad"), (None, "cannot read")):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(ValueError, match=message):
            opened(path, tiny, tok, skip_bad=True)


def test_a_store_is_used_again_until_what_it_depends_on_changes(tiny, tok, tmp_path, monkeypatch):
    path, calls = tmp_path / "r.jsonl", []
    path.write_text(GOOD)
    real = data.store.write
    monkeypatch.setattr(data.store, "write", lambda *a: calls.append(1) or real(*a))
    for n_calls, arguments in ((1, {}), (1, {}), (2, {"max_answer": 2}), (3, {"context": 100}), (3, {})):
        opened(path, tiny, tok, **arguments)
        assert len(calls) == n_calls
    path.write_text(GOOD.replace("hello", "HELLO"))
    assert opened(path, tiny, tok)[0] == replace(make_example(tok, json.loads(path.read_text()), 12, 255), kind=0)


def test_a_half_written_store_is_never_used(tiny, tok, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([GOOD] * 20))
    real, calls = data.store.make_example, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            os._exit(9)  # as by a signal: nothing is cleaned up
        return real(*args)

    child = os.fork()
    if child == 0:
        data.store.make_example = killed
        opened(path, tiny, tok)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [p for p in (tmp_path / "tokens").iterdir() if p.suffix == ".unfinished"]
    assert len(opened(path, tiny, tok)) == 20
    folder, = (p for p in (tmp_path / "tokens").iterdir() if p.is_dir())  # and what the killed one left is gone
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(7)
    with pytest.raises(ValueError, match="damaged.*delete"):
        opened(path, tiny, tok)


def test_memory_does_not_grow_with_the_file(tiny, tok, tmp_path):
    peaks = []
    for n in (20, 300):
        path = tmp_path / f"{n}.jsonl"
        path.write_text("\n".join([GOOD.replace("hello", "x" * 200).replace("answer", "answer " * 500)] * n))
        tracemalloc.start()
        store = opened(path, tiny, tok)
        assert sum(len(store[i].ids) > 200 for i in range(len(store))) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # the text alone is a million bytes more, lists of the ids half a million
