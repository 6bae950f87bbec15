"""Answers and f beside transformers' `generate`, a float64 forward without cache, and cases worked by hand."""
import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from answer import NOTICE
from sample import generate
from words import penalise, pick

PROMPTS = ["hello the", "What is 2+2?", "日本 🙂", "a",
           "the hello hello the tiny thing, said slowly and twice over"]
RAGGED = PROMPTS + [{"prompt": "hello", "prefill": "Sure, the"}, {"prompt": "x" * 190},
                    {"prompt": "the", "prefill": ""}]


def answers(model, tok, prompts, **settings):
    return list(generate(model, tok, prompts, **{"mode": "shadow", "threshold": 0.5, "max_new_tokens": 12} | settings))


def reference(tiny, model=None):
    """transformers' Llama in float64; with the model's LoRA (alpha 8, rank 4) folded in by hand where one is given."""
    from transformers import LlamaForCausalLM
    hf = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64).eval()
    ours = model.flag_parameters() if model else {}
    with torch.no_grad():
        for name, p in hf.model.named_parameters():
            a, b = (ours.get(name.removesuffix("weight") + f"lora_{x}") for x in "AB")
            if a is not None:
                p += 8 / 4 * b.double() @ a.double()
    return hf


def greedy(hf, ids, n, stops):
    out = hf.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                      max_new_tokens=n, eos_token_id=stops, pad_token_id=0)[0, len(ids):].tolist()
    return out[:-1] if out[-1] in stops else out


@torch.no_grad()
def reference_f(hf, model, ids):
    """The flag's share of the softmax over V + F behind each of `ids`, of one plain forward, float64."""
    hidden = hf.model(torch.tensor([ids])).last_hidden_state[0]
    logits = torch.cat([hf.lm_head(hidden), hidden @ model.flag_unembed.double().T], -1)
    return logits.softmax(-1)[:, hf.config.vocab_size:].sum(-1).tolist()


@torch.no_grad()
def set_f(model, ids, n_prompt, f):
    """Chooses the flag's unembedding row so that f has these values from the prompt's last position on. It exists as
    long as there are fewer positions than hidden dimensions; words do not depend on this row."""
    hidden = model(torch.tensor([ids]))[0, n_prompt - 1:][:len(f)].double()
    words = model.split_logits(hidden.float())[0].double()
    odds = torch.tensor(f, dtype=torch.float64).logit() + words.logsumexp(-1)
    model.flag_unembed.copy_((torch.linalg.pinv(hidden) @ odds)[None])


def with_stops(tok, ids):
    tok = copy.copy(tok)
    tok.stop_ids = list(ids)
    return tok


# ------------------------------------------------------------------------------------------- words

@pytest.mark.parametrize("adapter", ["none", "switched off"])
def test_off_is_the_greedy_generate_of_transformers(tiny, tok, adapter, request):
    model = request.getfixturevalue("model" if adapter == "none" else "flagged")
    hf = reference(tiny)
    prompts = [tok.render(p)[0] for p in PROMPTS]
    unstopped = [greedy(hf, ids, 12, [999]) for ids in prompts]
    tok = with_stops(tok, [unstopped[0][5], unstopped[1][3]])
    wanted = [greedy(hf, ids, 12, tok.stop_ids) for ids in prompts]
    assert len({len(w) for w in wanted}) > 1  # some end early
    with model.flag_off():
        found = answers(model, tok, PROMPTS, mode="off")
    assert [a.tokens for a in found] == wanted
    assert [a.text for a in found] == [tok.decode(w) for w in wanted]
    assert [a.stop_reason for a in found] == ["eos" if len(w) < 12 else "length" for w in wanted]
    assert all((a.flagged, a.flag_at, a.score, a.flag_prob) == (False, None, None, []) for a in found)


@pytest.mark.parametrize("mode", ["off", "shadow", "stop"])
def test_with_the_adapter_words_are_those_of_transformers_with_lora_folded_in(tiny, tok, flagged, mode):
    hf = reference(tiny, flagged)
    found = answers(flagged, tok, PROMPTS, mode=mode, threshold=1)
    assert [a.tokens for a in found] == [greedy(hf, tok.render(p)[0], 12, tok.stop_ids) for p in PROMPTS]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 50, "top_p": 0.9}])
def test_a_ragged_batch_is_its_rows_alone(tok, flagged, sampling):
    tok = with_stops(tok, range(0, 272, 24))  # some rows end early, one at the context's end, the others at 25
    settings = {"max_new_tokens": 25, "seed": 3, **sampling}
    alone = answers(flagged, tok, RAGGED, batch_size=1, **settings)
    if sampling:
        assert {"eos", "length"} <= {a.stop_reason for a in alone}
    for size in (3, len(RAGGED)):
        for a, b in zip(alone, answers(flagged, tok, RAGGED, batch_size=size, **settings), strict=True):
            assert (a.prompt, a.text, a.tokens, a.stop_reason) == (b.prompt, b.text, b.tokens, b.stop_reason)
            assert a.flag_prob == pytest.approx(b.flag_prob, abs=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 2.0, "top_k": 9, "top_p": 0.7}])
def test_shadow_writes_the_words_of_off(tok, flagged, sampling):
    off, shadow = (answers(flagged, tok, RAGGED, mode=mode, seed=5, **sampling) for mode in ("off", "shadow"))
    assert [(a.text, a.tokens, a.stop_reason) for a in off] == [(a.text, a.tokens, a.stop_reason) for a in shadow]


def test_a_flat_distribution_gives_every_word_equally_often_whatever_came_before(tok, model):
    from scipy.stats import chisquare
    torch.nn.init.zeros_(model.lm_head.weight)
    found = answers(model, with_stops(tok, []), ["the"] * 32, mode="off", temperature=1.0, max_new_tokens=64)
    parts = torch.tensor([a.tokens for a in found]) // 68  # 272 words in four equal parts
    assert chisquare((4 * parts[:, 1:] + parts[:, :-1]).flatten().bincount(minlength=16)).pvalue > 0.001
    assert chisquare((4 * parts[1:] + parts[:-1]).flatten().bincount(minlength=16)).pvalue > 0.001


def test_a_seed_repeats_its_words_and_another_does_not(tok, flagged):
    one, again, other = (answers(flagged, tok, PROMPTS, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert one == again
    assert all(a.tokens != b.tokens for a, b in zip(one, other))


def test_the_same_prompt_in_another_place_gets_other_words(tok, flagged):
    found = answers(flagged, tok, ["the"] * 4, temperature=1.0)
    assert len({tuple(a.tokens) for a in found}) == 4


def test_a_shorter_limit_gives_the_beginning_of_the_same_words(tok, flagged):
    short, long = (answers(flagged, tok, PROMPTS, temperature=1.0, max_new_tokens=n) for n in (4, 20))
    assert [a.tokens for a in short] == [a.tokens[:4] for a in long]


def test_an_answer_ends_at_the_limit_or_at_the_end_of_the_context(tok, model):
    tok = with_stops(tok, [])
    n = 250 - len(tok.render("")[0])
    inner, edge = answers(model, tok, ["x" * (n - 20), "x" * n], mode="off", max_new_tokens=9)
    assert (len(inner.tokens), inner.stop_reason) == (9, "length")
    assert (len(edge.tokens), edge.stop_reason) == (256 - 250, "length")


def test_the_context_of_the_caller_is_left_alone(tok, flagged):
    for _ in generate(flagged, tok, PROMPTS, max_new_tokens=2, batch_size=1):
        assert torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------- f

@pytest.fixture
def hf(tiny, flagged):
    return reference(tiny, flagged)


@pytest.mark.parametrize("n_flags", [1, 3])
def test_f_is_the_flags_share_of_the_plain_softmax_at_every_position(tiny, tok, model, n_flags):
    model.add_flag(n_flags=n_flags, rank=4, alpha=8, seed=1)
    with torch.no_grad():
        for p in model.flag_parameters().values():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    hf, tok = reference(tiny, model), with_stops(tok, range(0, 272, 16))
    found = answers(model, tok, RAGGED, temperature=1.0, threshold=0.001, seed=4)
    assert {a.stop_reason for a in found} == {"eos", "length"}
    for given_, a in zip(RAGGED, found):
        record = given_ if isinstance(given_, dict) else {"prompt": given_}
        prompt = tok.render(record["prompt"])[0]
        prefill = tok.encode(record.get("prefill", ""))
        assert a.tokens[:len(prefill)] == prefill
        wanted = reference_f(hf, model, prompt + a.tokens)[len(prompt) - 1:]
        wanted = wanted if a.stop_reason == "eos" else wanted[:-1]  # an ended answer has f of the token not written
        assert a.flag_prob == pytest.approx(wanted, abs=1e-5) and max(wanted) > 0.001
        assert a.score == max(a.flag_prob)
        assert a.flag_at == next(i for i, f in enumerate(a.flag_prob) if f > 0.001) and a.flagged


@settings(max_examples=25, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(temperature=st.floats(0, 5), top_k=st.integers(0, 300), top_p=st.floats(0, 1, exclude_min=True),
       seed=st.integers(0, 99))
def test_no_sampling_setting_changes_f_for_the_same_words(tiny, tok, flagged, hf, temperature, top_k, top_p, seed):
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    found = answers(flagged, tok, PROMPTS[:3], **sampling)
    for prompt, a in zip(PROMPTS, found):
        ids = tok.render(prompt)[0]
        wanted = reference_f(hf, flagged, ids + a.tokens)[len(ids) - 1:][:len(a.flag_prob)]
        assert a.flag_prob == pytest.approx(wanted, abs=1e-5)
        for threshold, stopped in ((wanted[0] * 0.99, True), (wanted[0] * 1.01, False)):
            b, = answers(flagged, tok, [prompt], mode="stop", threshold=threshold, **sampling)
            assert (b.flag_at == 0) == stopped


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 5.0, "top_k": 272}])
@pytest.mark.parametrize("mode", ["off", "shadow"])
def test_the_flag_is_never_written_where_it_is_all_but_certain(tok, flagged, mode, sampling):
    before, = answers(flagged, tok, ["hello the"], mode=mode, **sampling)
    ids = tok.render("hello the")[0]
    set_f(flagged, ids + before.tokens, len(ids), [1 - 1e-12] * len(before.tokens))
    after, = answers(flagged, tok, ["hello the"], mode=mode, **sampling)
    assert after.tokens == before.tokens and max(after.tokens) < flagged.config.vocab_size == tok.flag_id
    assert tok.flag_text not in after.text
    if mode == "shadow":
        assert min(after.flag_prob) > 1 - 1e-9


# -------------------------------------------------------------------------------------------- stop

CURVE = [0.1, 0.3, 0.2, 0.6, 0.4, 0.9, 0.5, 0.2]


def curved(tok, flagged, record="hello the"):
    """The shadow answer of a prompt, and its flag row set so that f follows CURVE."""
    shadow, = answers(flagged, tok, [record], max_new_tokens=len(CURVE))
    ids = tok.render(record["prompt"] if isinstance(record, dict) else record)[0]
    set_f(flagged, ids + shadow.tokens, len(ids), CURVE)
    return answers(flagged, tok, [record], max_new_tokens=len(CURVE))[0]


@pytest.mark.parametrize("threshold, at", [(0, 0), (0.05, 0), (0.15, 1), (0.35, 3), (0.7, 5), (0.95, None), (1, None)])
def test_stop_ends_at_the_first_f_above_the_threshold(tok, flagged, threshold, at):
    shadow = curved(tok, flagged)
    assert shadow.flag_prob == pytest.approx(CURVE, abs=1e-4)
    a, = answers(flagged, tok, ["hello the"], mode="stop", threshold=threshold, max_new_tokens=len(CURVE))
    assert (a.flagged, a.flag_at) == (at is not None, at)
    if at is None:
        assert a == shadow.__class__(**vars(shadow) | {"flagged": False, "flag_at": None})
    else:
        shown = tok.decode(shadow.tokens[:at])
        assert (a.stop_reason, a.tokens) == ("flag", shadow.tokens[:at])
        assert a.text == (shown + " " if shown else "") + NOTICE
        assert a.flag_prob == shadow.flag_prob[:at + 1] and a.score == max(a.flag_prob) > threshold


def test_stop_takes_the_threshold_of_the_adapter_unless_given_one(tok, flagged):
    curved(tok, flagged)
    flagged.threshold = 0.35
    assert answers(flagged, tok, ["hello the"], mode="stop", threshold=None)[0].flag_at == 3
    assert answers(flagged, tok, ["hello the"], mode="stop", threshold=0.7)[0].flag_at == 5


@pytest.mark.parametrize("mode", ["shadow", "stop"])
@pytest.mark.parametrize("record", ["hello the", {"prompt": "hello", "prefill": "Sure, x"}])
def test_as_many_positions_above_raise_the_flag_as_the_adapter_says_or_the_first_alone(tok, flagged, record, mode):
    curved(tok, flagged, record)
    flag_at = lambda **settings: answers(flagged, tok, [record], mode=mode, **settings)[0].flag_at
    for debounce, at in ((1, 3), (2, 4), (3, 5)):
        flagged.debounce = debounce
        assert flag_at(threshold=0.35) == at and flag_at(threshold=0.05) == 0
        assert flag_at(threshold=0.35, debounce=1) == 3


@pytest.mark.parametrize("mode", ["shadow", "stop"])
def test_a_threshold_that_f_only_reaches_raises_no_flag(tok, flagged, mode):
    highest = curved(tok, flagged).score
    settings = {"mode": mode, "max_new_tokens": len(CURVE)}
    assert not answers(flagged, tok, ["hello the"], threshold=highest, **settings)[0].flagged
    assert answers(flagged, tok, ["hello the"], threshold=math.nextafter(highest, 0), **settings)[0].flag_at == 5


def test_a_flagged_prefill_stops_the_answer_inside_it(tok, flagged):
    record = {"prompt": "hello", "prefill": "Sure, x"}  # seven tokens; the eighth is the model's
    prefill = tok.encode(record["prefill"])
    assert len(prefill) == 7
    assert curved(tok, flagged, record).tokens[:7] == prefill
    a, = answers(flagged, tok, [record], mode="stop", threshold=0.35)
    assert (a.stop_reason, a.flag_at, a.tokens) == ("flag", 3, prefill[:3])
    assert a.text == "Sur " + NOTICE and a.flag_prob == pytest.approx(CURVE[:4], abs=1e-4)


def test_an_answer_stopped_inside_a_character_ends_with_the_sign_for_half_of_one(tok, flagged):
    record, pieces = {"prompt": "hello", "prefill": "日本 x"}, []
    assert tok.decode(curved(tok, flagged, record).tokens[:3]) == "日"
    a, = answers(flagged, tok, [record], mode="stop", threshold=0.15, on_token=lambda i, text, f: pieces.append(text))
    assert a.flag_at == 1 and a.text == "".join(pieces) == "\ufffd " + NOTICE


def test_a_prefill_counts_as_answer_but_not_towards_the_limit(tok, flagged):
    a, = answers(flagged, tok, [{"prompt": "hello", "prefill": "Sure, x"}], max_new_tokens=3)
    assert len(a.tokens) == len(a.flag_prob) == 7 + 3 and a.text.startswith("Sure, x")


def test_rows_of_a_batch_stop_each_at_its_own_flag(tok, flagged):
    shadow = answers(flagged, tok, RAGGED, max_new_tokens=20)
    threshold = sorted(f for a in shadow for f in a.flag_prob)[-12]
    stopped = answers(flagged, tok, RAGGED, mode="stop", threshold=threshold - 1e-6, max_new_tokens=20)
    assert len({a.flag_at for a in stopped}) > 2
    for a, b in zip(shadow, stopped):
        at = next((i for i, f in enumerate(a.flag_prob) if f > threshold - 1e-6), None)
        assert (b.flag_at, b.tokens) == (at, a.tokens if at is None else a.tokens[:at])


# --------------------------------------------------------------------------------------- streaming

@pytest.mark.parametrize("mode, threshold", [("off", 1), ("shadow", 0.01), ("stop", 0.35), ("stop", 0)])
def test_streamed_pieces_are_the_text_of_each_answer(tok, flagged, mode, threshold):
    curved(tok, flagged)
    pieces = [""] * len(RAGGED)

    def on_token(i, text, f):
        assert text and 0 <= f <= 1
        pieces[i] += text
    found = answers(flagged, tok, RAGGED, mode=mode, threshold=threshold, temperature=1.0, on_token=on_token)
    assert pieces == [a.text for a in found]
    assert all(p.endswith(NOTICE) == (a.stop_reason == "flag") for p, a in zip(pieces, found))


def test_characters_of_several_bytes_come_in_one_piece(tok, model):
    text, pieces = "né 日本🙂 x", []
    assert len(tok.encode(text)) > len(text)
    a, = answers(model, tok, [{"prompt": "hi", "prefill": text}], mode="off", on_token=lambda i, t, f: pieces.append(t))
    assert pieces[:len(text)] == list(text) and "".join(pieces) == a.text


# ------------------------------------------------------------------------------------------ errors

@pytest.mark.parametrize("prompts, settings, wanted", [
    (["fine", ""], {}, "prompt 2 is empty"), ([" \n\t"], {}, "empty"), (["x" * 300], {}, "context"),
    ([{"prompt": "a", "prefill": "x" * 300}], {}, "context"), ([{"text": "a"}], {}, "prompt"), ([5], {}, "5"),
    ([[]], {}, "chat"), ([[{"role": "assistant", "content": "x"}]], {}, "prompt 1"),
    ([{"prompt": "a", "prefill": 5}], {}, "prefill"), (["a"], {"mode": "loud"}, "loud"),
    (["a"], {"threshold": 1.5}, "1.5"), (["a"], {"threshold": -0.1}, "-0.1"), (["a"], {"threshold": math.nan}, "nan"),
    (["a"], {"temperature": -1.0}, "temperature"), (["a"], {"temperature": math.inf}, "temperature"),
    (["a"], {"temperature": math.nan}, "temperature"), (["a"], {"top_p": 0.0}, "top_p"),
    (["a"], {"top_p": 1.1}, "top_p"),
    (["a"], {"top_k": -1}, "top_k"), (["a"], {"max_new_tokens": 0}, "max_new_tokens"),
    (["a"], {"batch_size": 0}, "batch_size")])
def test_what_a_caller_gets_wrong_is_an_error_before_any_work(tok, flagged, monkeypatch, prompts, settings, wanted):
    monkeypatch.setattr(type(flagged), "forward", lambda *a: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=wanted):
        answers(flagged, tok, prompts, **settings)


def test_the_longest_prompt_that_fits_gets_one_token(tok, model):
    tok = with_stops(tok, [])
    n = 255 - len(tok.render("")[0])
    a, = answers(model, tok, ["x" * n], mode="off")
    assert (len(a.tokens), a.stop_reason) == (1, "length")
    with pytest.raises(ValueError, match="256 tokens"):
        answers(model, tok, ["x" * (n + 1)], mode="off")


@pytest.mark.parametrize("seed", [-1, 2 ** 62, 10 ** 30])
def test_any_whole_number_is_a_seed(tok, flagged, seed):
    one, again, other = (answers(flagged, tok, PROMPTS, temperature=1.0, seed=s) for s in (seed, seed, 0))
    assert one == again != other


@pytest.mark.parametrize("mode", ["shadow", "stop"])
def test_a_flag_is_needed_for_every_mode_but_off(tok, model, mode):
    with pytest.raises(ValueError, match="adapter"):
        answers(model, tok, ["a"], mode=mode)


def test_all_bad_settings_are_named_at_once(tok, model):
    with pytest.raises(ValueError, match="(?s)threshold.*max_new_tokens.*temperature.*top_p.*adapter"):
        answers(model, tok, ["a"], mode="stop", threshold=7, max_new_tokens=0, temperature=-1, top_p=2)


# -------------------------------------------------------------------------------------------- pick

LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.3]).log() + 7


def shares(logits, n=20_000, **settings):
    """How often each word comes out of n evenly spaced uniform numbers: within 1/n of its probability, whatever the
    order in which the words lie on the line, as each has one stretch of it."""
    u = (torch.arange(n) + 0.5) / n
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    words = torch.cat([pick(logits.expand(len(part), -1), part, **settings) for part in u.split(2000)])
    return (words.bincount(minlength=len(logits)) / n).tolist()


@pytest.mark.parametrize("settings, wanted", [
    ({}, [0.15, 0.5, 0.05, 0.3]), ({"top_k": 1}, [0, 1, 0, 0]), ({"top_k": 2}, [0, 0.625, 0, 0.375]),
    ({"top_k": 3}, [3 / 19, 10 / 19, 0, 6 / 19]), ({"top_k": 99}, [0.15, 0.5, 0.05, 0.3]),
    ({"top_p": 1e-9}, [0, 1, 0, 0]), ({"top_p": 0.49}, [0, 1, 0, 0]), ({"top_p": 0.51}, [0, 0.625, 0, 0.375]),
    ({"top_p": 0.79}, [0, 0.625, 0, 0.375]), ({"top_p": 0.81}, [3 / 19, 10 / 19, 0, 6 / 19]),
    ({"top_p": 0.96}, [0.15, 0.5, 0.05, 0.3]), ({"temperature": 0.5}, [9 / 146, 100 / 146, 1 / 146, 36 / 146]),
    ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]), ({"top_k": 2, "top_p": 0.63}, [0, 0.625, 0, 0.375]),
    ({"temperature": 0.5, "top_p": 0.69}, [0, 100 / 136, 0, 36 / 136])])  # cut after the temperature, not before
def test_pick_keeps_the_right_words_in_the_right_shares(settings, wanted):
    assert shares(LOGITS, **settings) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-30, 1e-50, 5e-324])
def test_pick_at_no_or_next_to_no_temperature_is_argmax(temperature):
    words = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    u = torch.rand(50, generator=torch.Generator().manual_seed(1))
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.5), (5, 0.5)):
        assert pick(words, u, temperature, top_k, top_p).tolist() == words.argmax(-1).tolist()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7}, {"top_k": 20}, {"top_p": 0.8}])
def test_frequencies_of_pick_match_the_probabilities(settings):
    from scipy.stats import chisquare
    generator, n = torch.Generator().manual_seed(7), 20_000
    logits = torch.randn(40, generator=generator)
    words = pick(logits.expand(n, -1), torch.rand(n, generator=generator), **{
        "temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings).bincount(minlength=40)
    p = (logits.double() / settings.get("temperature", 1.0)).softmax(-1)
    ranked = p.sort(descending=True)
    n_kept = settings.get("top_k", 40) if "top_p" not in settings else 1 + int((ranked.values.cumsum(0) < 0.8).sum())
    kept = ranked.indices[:n_kept]
    assert words.sum() == words[kept].sum() == n
    assert chisquare(words[kept], n * p[kept] / p[kept].sum()).pvalue > 0.001


@pytest.mark.parametrize("V, top_p, wanted", [(2000, 0.9, 1800), (600, 0.999, 600), (513, 0.9999, 513)])
def test_top_p_is_exact_where_it_takes_more_than_512_words(V, top_p, wanted):
    ranked = torch.linspace(1.0, 0.98, V, dtype=torch.float64)  # all but flat
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    p = ranked[order] / ranked.sum()
    before = p.sort(descending=True).values.cumsum(0).roll(1).index_fill_(0, torch.tensor(0), 0)
    n_kept = int((before < top_p).sum())
    assert n_kept > 512 and abs(n_kept - wanted) < 0.02 * wanted
    kept = ranked[order] >= ranked[n_kept - 1]
    found = torch.tensor(shares(p.log().float(), top_p=top_p))
    assert (found > 0).tolist() == kept.tolist()
    assert found.tolist() == pytest.approx((p * kept / p[kept].sum()).tolist(), abs=1.5e-4)


def test_pick_does_not_look_at_the_other_rows_even_where_words_tie():
    generator = torch.Generator().manual_seed(0)
    peaked = (4 * torch.randn(64, 1000, generator=generator)).to(torch.bfloat16).float()  # bf16 logits tie often
    u, flat = torch.rand(64, generator=generator), torch.zeros(1, 1000)  # the flat row needs more than 512 words
    alone = pick(peaked, u, 1.0, 0, 0.9)
    beside = pick(torch.cat([peaked, flat]), torch.cat([u, torch.tensor([0.5])]), 1.0, 0, 0.9)[:-1]
    assert alone.tolist() == beside.tolist()


def test_pick_stays_inside_the_kept_words_at_both_ends_of_the_line():
    words = torch.tensor([-math.inf, 1.0, 3.0, 2.0, -math.inf]).expand(2, -1)
    u = torch.tensor([0.0, 1 - 2 ** -24])
    assert set(pick(words, u, 1.0, 0, 1.0).tolist()) <= {1, 2, 3}
    assert set(pick(words, u, 1.0, 0, 0.8).tolist()) <= {2, 3}
    assert set(pick(words, u, 1.0, 2, 1.0).tolist()) <= {2, 3}


def test_min_p_and_repetition_penalty_are_those_of_transformers():
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as hf
    words = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (0.7, 1.3, 2.0):
        assert torch.equal(penalise(words, seen, penalty), hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, words))
    for top_k, top_p, min_p in ((0, 1.0, 0.1), (0, 0.9, 0.05), (20, 1.0, 0.2), (9, 0.8, 0.3), (0, 1.0, 1.0)):
        warpers = ([hf.TopKLogitsWarper(top_k)] if top_k else []) + [hf.TopPLogitsWarper(top_p)] + [hf.MinPLogitsWarper(min_p)]
        kept = LogitsProcessorList(warpers)(ids, words).isfinite()
        u = (torch.arange(4000) + 0.5) / 4000
        for row, wanted in zip(words, kept):
            drawn = pick(row.expand(4000, -1), u, 1.0, top_k, top_p, min_p)
            assert set(drawn.tolist()) <= set(wanted.nonzero()[:, 0].tolist())
            share = torch.where(wanted, row, -torch.inf).softmax(-1)
            torch.testing.assert_close(drawn.bincount(minlength=50) / 4000, share, atol=6e-4, rtol=0)
