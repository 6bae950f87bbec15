"""The file of demonstrations, settings that will not do, and the small decisions, worked by hand."""
import pytest

from answer import flag_place, onset
from reflect import DEMOS as FILE
from reflect import read_demos
from sample import stream
from test_engine import DEMOS, Scripted


def test_the_demonstrations_at_hand_show_both_endings_and_hold_the_real_flag(tok):
    d = read_demos(FILE)
    ids = tok.render("hello", operator=d.text)[0]
    assert ids.count(tok.flag_id) == d.text.count(tok.flag_text) >= 4 and d.false_alarm in d.text.lower()
    plain = tok.render("hello")[0]
    assert ids[:15] == plain[:15] and ids[-10:] == plain[-10:]


@pytest.mark.parametrize("old, new, wanted", [
    ("[opening]\nHm:\n", "", r"\[opening\] is missing"), ("[user]\nv", "[user]\n", r":11: section \[user\] is empty"),
    ("[user]\nv", "[usr]\nv", r":11: section \[usr\], wanted"), ("[user]\nu\n", "", r":7: \[assistant\] does not belong"),
    ("<|red_flag|> Hm: ab", "Hm: ab", r":9: the answer spells .* 0 times"), ("Hm: c", "c", r":13: behind .* comes 'c'"),
    ("Hm: c", "Hm: ab", "both kinds"), ("Hm:\n[false", "<|red_flag|>\n[false", "neither"),
    (DEMOS[DEMOS.index("[user]"):], "", "missing")])
def test_a_malformed_file_of_demonstrations_is_an_error_with_its_line(tmp_path, tok, old, new, wanted):
    assert old in DEMOS
    (tmp_path / "d.txt").write_text(DEMOS.replace(old, new, 1))
    with pytest.raises(ValueError, match=wanted):
        list(stream(Scripted(tok), tok, ["a"], mode="reflect", demos=str(tmp_path / "d.txt")))


@pytest.mark.parametrize("bad, wanted", [
    ({"max_flags": 0}, "max_flags is 0"), ({"debounce": 0}, "debounce"), ({"buffer": -1}, "buffer"),
    ({"low": 0.9}, "low is 0.9"), ({"min_p": 1.5}, "min_p"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"stop": ["a", ""]}, "stop"), ({"sync_every": 0}, "sync_every"), ({"demos": "nowhere.txt"}, "nowhere.txt"),
    ({"mode": "loud"}, "loud")])
def test_settings_that_will_not_do(tok, bad, wanted):
    with pytest.raises(ValueError, match=wanted):
        list(stream(Scripted(tok), tok, ["a"], **{"mode": "reflect"} | bad))
    with pytest.raises(ValueError, match="mode is 5"):
        list(stream(Scripted(tok), tok, [{"prompt": "a", "mode": 5}]))


@pytest.mark.parametrize("f, t, low, d, first, wanted", [
    ([.1, .6, .6, .9], 3, .5, 1, 0, 1), ([.6, .1, .6, .9], 3, .5, 1, 0, 2), ([.6, .1, .6, .9], 3, .5, 2, 0, 0),
    ([.6, .1, .1, .9], 3, .5, 2, 0, 3), ([.6, .6, .6, .9], 3, .5, 1, 2, 2), ([.9], 0, .5, 1, 0, 0)])
def test_the_onset_is_where_the_run_above_low_begins(f, t, low, d, first, wanted):
    assert onset(f, t, low, d, first) == wanted


@pytest.mark.parametrize("f, d, wanted", [
    ([.1, .6, .9], 1, (1, 1)), ([.1, .6, .4, .9, .9], 2, (4, 2)), ([.1, .6, .9], 3, (None, 2)), ([.5, .5], 1, (None, 0)),
    ([], 1, (None, 0)), ([], 3, (None, 2)), ([.6, .1], 3, (0, 3)), ([.1, .6, .6], 2, (2, 2)),
    ([.5, .6, .1, .6], 2, (None, 1))])
def test_a_flag_takes_debounce_positions_above_the_threshold(f, d, wanted):
    assert flag_place(f, 0.5, d) == wanted
