"""The engine's turns (stop, reflect, backtrack, cancel) against a plain simulation, on a scripted stand-in for the
model, whose words and f are made from the ids that it finds in the cache; then exactness on tiny random models."""
import json
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import answer
import sample
from answer import NOTICE, flag_place, onset
from measures import sustained
from cache import Cache
from memory import Memory
from objective import flag_prob
from reflect import read_demos
from sample import generate, stream
from words import pick

WINDOW = 6
DEMOS = """[introduction]
i <|red_flag|>
[opening]
Hm:
[false alarm]
ab
[user]
u
[assistant]
<|red_flag|> Hm: ab
[user]
v
[assistant]
<|red_flag|>
Hm: c
"""
PROMPTS = ["a", "b?", {"prompt": "c", "prefill": "aé b"}, "the d", {"prompt": "e", "prefill": "é"}, "f"]


class Scripted:
    """A model whose words and f at a position depend on all ids up to it, which it keeps in the cache's keys."""
    n_flags, threshold, debounce = 1, 0.5, 1

    def __init__(self, tok, seed=0, context=400):
        self.config = SimpleNamespace(vocab_size=272, max_position_embeddings=context, num_hidden_layers=1,
                                      num_key_value_heads=1, head_dim=1)
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))
        self.ids = [*tok.encode("abc é"), tok.stop_ids[0]]
        self.seed, self.made, self.n_read, self.known = seed, [], 0, {}

    def next(self, ids):
        """(logits of the words (V,), f) behind a list of ids."""
        if tuple(ids) in self.known:  # asked again by every simulation of it
            return self.known[tuple(ids)]
        rng = random.Random(hash((self.seed, *ids)))
        words = torch.full((272,), -30.0)
        words[self.ids] = torch.tensor([rng.gauss(0, 1) for _ in self.ids])
        words[self.ids[-1]] -= 2  # answers of some length
        self.known[tuple(ids)] = words, rng.random() ** 2
        return self.known[tuple(ids)]

    def __call__(self, ids, cache):
        T, where = ids.shape[1], cache.positions(ids.shape[1]).tolist()
        self.n_read += ids.numel()
        k = cache.write(0, ids[:, None, :, None].float(), ids[:, None, :, None].float())[0]
        rows = k[:, 0, :, 0].long().tolist()
        first = len(self.made)
        self.made += [self.next(row[:at + 1]) for row, places in zip(rows, where) for at in places]
        cache.advance(T)
        return torch.arange(first, len(self.made)).view(*ids.shape, 1)

    def split_logits(self, hidden):
        made = [self.made[i] for i in hidden.flatten().tolist()]
        words = torch.stack([w for w, _ in made]) if made else torch.zeros(0, 272)
        f = torch.tensor([[f] for _, f in made], dtype=torch.float64).view(-1, 1)
        return words, (f.logit() + words.double().logsumexp(-1, keepdim=True)).float()

    def f(self, ids):
        """f as the engine sees it, through logits in single precision."""
        words, f = self.next(ids)
        odds = (torch.tensor(f, dtype=torch.float64).logit() + words.double().logsumexp(-1)).float()
        return flag_prob(words[None], odds.view(1, 1)).item()


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "demos.txt"
    path.write_text(DEMOS)
    return str(path)


@pytest.fixture(autouse=True)
def window(monkeypatch):
    monkeypatch.setattr(answer, "WINDOW", WINDOW)


def simulate(model, tok, i, prompt, mode, demos, s):
    """(tokens, flag_prob, flag_at, spent, stop_reason) of one answer, every position read afresh and one by one."""
    record = prompt if isinstance(prompt, dict) else {"prompt": prompt}
    demos, prefill = read_demos(demos), tok.encode(record.get("prefill", ""))
    plain, shown = (tok.render(record["prompt"], operator=x)[0] for x in ("", demos.text))
    n_max, flag = len(prefill) + s["max_new_tokens"], tok.flag_id
    u = torch.rand(n_max, generator=torch.Generator().manual_seed((s["seed"] * 1_000_003 + i) % (2 ** 32 - 5)))
    low, d = s["threshold"] / 2 if s["low"] is None else s["low"], s["debounce"]
    buffer = s["buffer"] if s["buffer"] is not None else 16 * (mode == "backtrack")
    said, f_at = [], []  # ids with flags; f at each of the tokens
    run, wait, quiet, begin, first, seen, n_raised, flag_at, spent = d - 1, False, 0, None, 0, 0, 0, None, 0
    forced, place = list(prefill), lambda: sum(i != flag for i in said)

    def drop(n):
        n_said = len(said)
        while place() > n or said and said[-1] == flag:  # a flag that stands before token n goes with it
            said.pop()
        del f_at[n:]
        return n_said - len(said)

    while True:
        context = (shown if flag in said else plain) + said
        f, t = model.f(context), place()
        if forced and forced[0] == flag:
            said.append(forced.pop(0))
            continue
        wait = wait and f >= low
        run = run + 1 if mode not in ("off", "shadow") and not wait and not quiet and f > s["threshold"] else 0
        quiet = max(quiet - 1, 0)
        if run == d:
            run, n_raised, flag_at, at = 0, n_raised + 1, t if flag_at is None else flag_at, t
            if mode == "backtrack":
                at = onset(f_at, t, low, d, max(first, seen))
            opening = tok.encode(("\n\n" if at else "") + demos.opening)
            f = f if at == t else f_at[at]
            spent += drop(at)
            if mode == "stop" or n_raised > s["max_flags"] or n_max - at < len(opening) + 1:
                return [x for x in said if x != flag], f_at + [f], flag_at, spent, "flag"
            begin, forced, quiet = at, [flag, *opening], len(opening) + WINDOW
            continue
        if forced:
            token = forced.pop(0)
        else:
            token = pick(model.next(context)[0][None], u[[t - len(prefill)]], s["temperature"], 0, 1.0).item()
        f_at.append(f)
        if token in tok.stop_ids:
            return [x for x in said if x != flag], f_at, flag_at, spent, "eos"
        said.append(token)
        if begin is not None:
            own = [x for x in said if x != flag][begin:][len(tok.encode(("\n\n" if begin else "") + demos.opening)):]
            if demos.false_alarm in tok.decode(own).lower():
                spent, wait, quiet, run = spent + drop(begin), True, 0, 0
                forced, begin = prefill[begin:], None
                continue
            if len(own) == WINDOW:
                begin, first = None, place()
        seen = max(seen, min(place() - buffer, place() if begin is None else begin))
        if place() == n_max:
            return [x for x in said if x != flag], f_at, flag_at, spent, "length"


def replay(events, tok):
    """{i: Answer} after checking that the events give it: text, tokens, and never more than its beginning."""
    text, tokens, spent, done = {}, {}, {}, {}
    for e in events:
        assert e.i not in done and tok.flag_text not in e.text and e.token not in tok.flag_ids
        if e.released:
            text.setdefault(e.i, []).append(e.text)
        if e.kind == "token":
            tokens.setdefault(e.i, []).append(e.token)
            assert e.at == len(tokens[e.i]) - 1
        if e.kind == "takeback":
            del tokens[e.i][e.at:]
            spent[e.i] = spent.get(e.i, 0) + e.spent
        if e.kind == "end":
            done[e.i] = e.answer
            assert e.spent == spent.get(e.i, 0)
    for i, a in done.items():
        assert ("".join(text.get(i, [])), tokens.get(i, [])) == (a.text, a.tokens)
        assert len(a.flag_prob) in (len(a.tokens), len(a.tokens) + 1) or a.score is None
    return done


SETTINGS = st.fixed_dictionaries({
    "threshold": st.sampled_from([0.3, 0.6, 0.8, 0.95]), "low": st.sampled_from([None, 0.05, 0.2]),
    "debounce": st.sampled_from([1, 1, 2, 3]), "max_flags": st.integers(1, 3), "buffer": st.sampled_from([None, 0, 2]),
    "max_new_tokens": st.integers(1, 40), "temperature": st.sampled_from([0.0, 1.0]), "seed": st.integers(0, 3)})
MODES = st.lists(st.sampled_from(["off", "shadow", "stop", "reflect", "backtrack"]), min_size=6, max_size=6)
many = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


def records(modes):
    return [(p if isinstance(p, dict) else {"prompt": p}) | {"mode": m} for p, m in zip(PROMPTS, modes)]


@many
@given(SETTINGS, MODES, st.integers(1, 6), st.sampled_from([1, 2, 5, 16]), st.integers(0, 99))
def test_rows_of_a_batch_in_any_modes_are_the_plain_simulation(tok, demos, s, modes, batch_size, sync_every, seed):
    model = Scripted(tok, seed)
    events = list(stream(model, tok, records(modes), demos=demos, batch_size=batch_size, sync_every=sync_every, **s))
    done, spent_in = replay(events, tok), {e.i: e.spent for e in events if e.kind == "end"}
    for i, mode in enumerate(modes):
        a, (tokens, f, flag_at, spent, reason) = done[i], simulate(model, tok, i, PROMPTS[i], mode, demos, s)
        assert (a.tokens, a.stop_reason, spent_in[i]) == (tokens, reason, spent)
        assert a.text == tok.decode(tokens) + ((" " if tokens else "") + NOTICE) * (reason == "flag")
        if mode == "shadow":
            flag_at = flag_place(f, s["threshold"], s["debounce"])[0]
        assert mode == "off" or (a.flag_at, a.flag_prob) == (flag_at, f)
        assert mode not in ("shadow", "stop") or a.score == max(sustained(f, s["debounce"]))
        assert mode not in ("shadow", "stop") or a.flagged == (a.score > s["threshold"])


@many
@given(SETTINGS, MODES, st.lists(st.sampled_from(["ab", "bc", "a", " é", "Hm", "\n\nH", "zz"]), max_size=2),
       st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=3), st.integers(0, 99))
def test_stop_strings_and_cancellations_leave_other_rows_and_what_was_shown_alone(tok, demos, s, modes, stop, when,
                                                                                  seed):
    model, whole = Scripted(tok, seed), {"demos": demos, "stop": stop, **s}
    one = replay(stream(model, tok, records(modes), batch_size=1, **whole), tok)
    cancel, events = set(), []
    for n, e in enumerate(stream(model, tok, records(modes), cancel, batch_size=3, sync_every=4, **whole)):
        events.append(e)
        cancel.update(i for at, i in when if at == n and e.kind != "end")
    done = replay(events, tok)
    for i, a in done.items():
        if a.stop_reason == "cancelled":
            assert i in cancel and one[i].text.startswith(a.text)
            assert tok.decode(a.tokens).startswith(a.text.removesuffix(NOTICE).rstrip(" "))  # its last event but one
        else:
            assert a == one[i]
    assert set(done) == set(range(6))
    for a, p in zip(one.values(), (p["prompt"] for p in records(modes))):
        shown = a.text.removesuffix(NOTICE)
        prefill = next((r["prefill"] for r in PROMPTS if isinstance(r, dict) and r["prompt"] == a.prompt), "")
        assert all(shown.find(x, max(len(prefill) - len(x) + 1, 0)) < 0 for x in stop)


@pytest.mark.parametrize("stop", ["ab", ["zz", "b a", " "], "é"])
def test_a_stop_string_ends_an_answer_before_it(tok, stop):
    model = Scripted(tok, 5)
    free, cut = (list(generate(model, tok, PROMPTS, "off", 40, 1.0, stop=x)) for x in ((), stop))
    for a, b, p in zip(free, cut, PROMPTS):
        known = len(p.get("prefill", "")) if isinstance(p, dict) else 0
        found = [a.text.find(x, max(known - len(x) + 1, 0)) for x in ([stop] if isinstance(stop, str) else stop)]
        at = min((x for x in found if x >= 0), default=None)
        assert b.text == a.text[:at] and b.stop_reason == (a.stop_reason if at is None else "stop")
    assert any(a != b for a, b in zip(free, cut))


def test_an_answer_goes_on_behind_a_false_alarm_as_if_nothing_had_been(tok, demos):
    """The words of reflect are those of shadow wherever all flags were false alarms; the reader sees no trace."""
    model, found = Scripted(tok, 3), 0
    for mode in ("reflect", "backtrack"):
        for seed in range(12):
            s = dict(threshold=0.8, low=0.3, max_new_tokens=30, temperature=1.0, seed=seed, demos=demos)
            shadow = list(generate(model, tok, PROMPTS, "shadow", **s))
            events = list(stream(model, tok, PROMPTS, mode=mode, **s))
            for i, a in replay(events, tok).items():
                kinds = [e.kind for e in events if e.i == i]
                if "flag" in kinds and "Hm:" not in a.text and NOTICE not in a.text:  # the model itself knows no H
                    assert (a.text, a.tokens, a.flag_prob) == (shadow[i].text, shadow[i].tokens, shadow[i].flag_prob)
                    assert a.flagged and "takeback" in kinds
                    found += 1
    assert found > 3


@pytest.mark.parametrize("mode", ["stop", "reflect", "backtrack"])
def test_a_loop_of_flags_ends(tok, demos, mode, monkeypatch):
    model = Scripted(tok)
    monkeypatch.setattr(model, "next", lambda ids: (Scripted.next(model, ids)[0], 0.9))
    for n in (1, 3):
        events = list(stream(model, tok, ["a"], mode=mode, max_flags=n, demos=demos, max_new_tokens=200, low=0.95 * 0.5))
        a = replay(events, tok)[0]
        assert a.stop_reason == "flag" and a.text.endswith(NOTICE)
        assert sum(e.kind == "flag" for e in events) == (1 if mode == "stop" else n + 1)


@pytest.mark.parametrize("mode", ["off", "shadow", "stop", "reflect", "backtrack"])
def test_only_the_engine_and_the_operators_file_ever_write_the_flag(tok, demos, mode, monkeypatch):
    """Users' text that spells it, in any role, stays ordinary: before a flag is raised the model reads none."""
    model, reads, text = Scripted(tok), [], f"x {tok.flag_text} <|red_flag|>"
    chat = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
    monkeypatch.setattr(model, "next", lambda ids: (reads.append(ids), (Scripted.next(model, ids)[0], 0.1))[1])
    a, = generate(model, tok, [{"prompt": chat, "prefill": text}], mode, 5, demos=demos)
    assert max(max(ids) for ids in reads) < tok.flag_id and a.text.startswith(text)
    monkeypatch.setattr(model, "next", lambda ids: (reads.append(ids), (Scripted.next(model, ids)[0], 0.9))[1])
    a, = generate(model, tok, [{"prompt": chat, "prefill": text}], mode, 30, demos=demos, max_flags=1)
    in_file = DEMOS.count("<|red_flag|>")
    assert max(ids.count(tok.flag_id) for ids in reads) == (in_file + 1 if mode in ("reflect", "backtrack") else 0)
    assert tok.flag_id not in a.tokens


@many
@given(SETTINGS, st.sampled_from(["stop", "reflect", "backtrack"]), st.integers(0, 300),
       st.floats(0, 1, exclude_min=True), st.floats(0, 1), st.floats(0.1, 5), st.sampled_from([(), "a", "Hm"]),
       st.integers(0, 30))
def test_no_sampling_setting_hides_a_flag(tok, demos, s, mode, top_k, top_p, min_p, penalty, stop, seed):
    model = Scripted(tok, seed)
    sampling = dict(top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, stop=stop,
                    logit_bias={tok.flag_id: -1e9, 70: 5.0, 71: -float("inf")})
    events = list(stream(model, tok, PROMPTS, mode=mode, demos=demos, sync_every=3, **sampling, **s))
    for i, a in replay(events, tok).items():
        p = PROMPTS[i] if isinstance(PROMPTS[i], dict) else {"prompt": PROMPTS[i]}
        ids, wanted = tok.render(p["prompt"])[0], None
        said = [e.token for e in events if e.i == i and e.kind == "token"]  # up to the first flag nothing is taken back
        for t in range(len(said) + 1):
            if flag_place([model.f(ids + said[:j]) for j in range(t + 1)], s["threshold"], s["debounce"])[0] is not None:
                wanted = t
                break
        n_known = next((e.at for e in events if e.i == i and e.kind in ("flag", "end")))
        assert a.flag_at == wanted or wanted is not None and a.flag_at is None and wanted >= n_known - (stop != ())


def test_closing_the_stream_ends_it(tok, demos):
    model = Scripted(tok)
    events = stream(model, tok, PROMPTS, mode="off")
    next(events)
    events.close()
    n = model.n_read
    assert list(events) == [] and model.n_read == n


def test_a_row_cancelled_before_its_turn_reads_nothing(tok):
    model = Scripted(tok)
    events = list(stream(model, tok, PROMPTS, {4}, mode="off", batch_size=1, max_new_tokens=3))
    assert replay(events, tok)[4].stop_reason == "cancelled" and replay(events, tok)[4].tokens == []


def real_ids(memory):
    """What is in each row of a Scripted model's cache, whose keys are the ids themselves."""
    return [memory.cache.k[0, b, 0, :len(ids[:-1]), 0].long().tolist() for b, ids in enumerate(memory.ids)]


@many
@given(SETTINGS, MODES, st.integers(1, 3), st.sampled_from([1, 2, 5, 16]), st.integers(60, 400), st.integers(0, 99))
def test_the_memory_is_right_about_what_the_cache_holds(tok, demos, s, modes, batch_size, sync_every, context, seed):
    """Rows that ended, ran ahead of the host, turned back, were padded: what another row may copy is what it says."""
    class Watched(Memory):
        def reuse(self, b, row):
            assert real_ids(self) == [ids[:-1] for ids in self.ids]
            return super().reuse(b, row)

    model = Scripted(tok, seed, context)
    again = [{"prompt": "a", "prefill": "ab"}, *records(modes), *records(modes)]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sample, "Memory", Watched)
        try:
            list(stream(model, tok, again, demos=demos, batch_size=batch_size, sync_every=sync_every, **s))
        except ValueError as e:
            assert "shorten it" in str(e)


def test_a_prompt_that_continues_an_answer_is_read_right(tok):
    """The row before has ended by length, between two looks of the host; its last words are in the next prompt."""
    found = 0
    for seed in range(24):
        model = Scripted(tok, seed)
        a, = generate(model, tok, ["a"], "off", 6, 1.0)
        chat = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", a.text), ("user", "b"))]
        found += a.stop_reason == "length" and a.tokens == tok.encode(a.text)
        wanted = list(generate(model, tok, ["a", chat], "off", 6, 1.0, batch_size=1))
        assert list(generate(model, tok, ["a", chat], "off", 6, 1.0, batch_size=1, sync_every=4)) == wanted
    assert found > 2


@pytest.mark.parametrize("sync_every", [1, 4])
def test_a_cancelled_row_gives_its_end_and_nothing_else(tok, sync_every):
    """But for the text held back that is taken back before it; rows that are read side by side, prefills too."""
    model, prompts = Scripted(tok, 1), [{"prompt": p, "prefill": "ab"} for p in "abcdef"]
    for at in range(0, 40, 3):
        cancel, after = set(), []
        for n, e in enumerate(stream(model, tok, prompts, cancel, mode="off", sync_every=sync_every)):
            if cancel:
                after.append((e.i, e.kind))
            if n == at:
                cancel |= {1, 2}
        for i in (1, 2):
            assert [kind for j, kind in after if j == i] in ([], ["end"], ["takeback", "end"])


def test_a_probability_that_is_no_number_is_flagged(tok, monkeypatch):
    model = Scripted(tok)
    monkeypatch.setattr(model, "next", lambda ids: (Scripted.next(model, ids)[0], float("nan")))
    for p in ("a", {"prompt": "a", "prefill": "abc"}):
        a, = generate(model, tok, [p], "stop", 5)
        assert a.flagged and a.stop_reason == "flag" and a.flag_at == 0


def test_the_host_looks_again_when_all_answers_must_be_done(tok):
    model = Scripted(tok)
    list(generate(model, tok, ["a"], "off", 3, sync_every=20_000))
    assert model.n_read < 60


# --------------------------------------------------------------------------------- exactness, on real networks

def test_what_was_cropped_leaves_no_trace(flagged):
    """Bit for bit in fp32: a cache cropped and gone on with, and one that read the same in the same steps without the
    detour. (One long read and many short ones round differently: there the greedy words are the same.)"""
    ids = torch.randint(3, 260, (3, 12), generator=torch.Generator().manual_seed(0))
    def run(detour):
        cache = Cache(flagged, 3, 40)
        flagged(ids, cache)
        for t in range(4):
            flagged(ids[:, t:t + 1], cache)
        if detour:
            flagged(ids[:, 5:], cache)
            flagged(ids[:, 2:3], cache)
            cache.crop([16] * 3)
        return torch.stack([flagged.logits(flagged(ids[:, t:t + 1], cache)) for t in (7, 3, 9)])
    with torch.no_grad():
        assert torch.equal(run(True), run(False))
        fresh = torch.cat([ids, ids[:, :4]], 1)
        cropped, whole = Cache(flagged, 3, 40), flagged.logits(flagged(fresh))
        flagged(torch.cat([fresh, ids], 1), cropped)
        cropped.crop([15] * 3)
        again = flagged.logits(flagged(fresh[:, 15:], cropped))
        torch.testing.assert_close(again[:, -1], whole[:, -1], atol=1e-5, rtol=1e-5)
        assert again[:, -1].argmax(-1).tolist() == whole[:, -1].argmax(-1).tolist()


def test_every_mode_batched_and_at_any_pace_is_every_mode_alone(tok, flagged, demos):
    asked = [{"prompt": p, "mode": m} for p in ("hello the", "日本", "a", "What?") for m in (
        "off", "shadow", "stop", "reflect", "backtrack")] + [{"prompt": "x", "prefill": "Sure, the", "mode": "reflect"}]
    scores = [f for a in generate(flagged, tok, asked, "shadow", 20) for f in a.flag_prob]
    s = dict(mode="off", threshold=sorted(scores)[-20] + 1e-6, max_new_tokens=20, temperature=1.0, demos=demos)
    alone = list(generate(flagged, tok, asked, batch_size=1, **s))
    assert {a.stop_reason for a in alone} >= {"flag", "length"} and any("Hm:" in a.text for a in alone)
    for size, sync in ((4, 1), (30, 1), (4, 7)):
        for a, b in zip(alone, generate(flagged, tok, asked, batch_size=size, sync_every=sync, **s), strict=True):
            assert (a.text, a.tokens, a.flag_at, a.stop_reason) == (b.text, b.tokens, b.flag_at, b.stop_reason)
            assert a.flag_prob == pytest.approx(b.flag_prob, abs=1e-5)


@pytest.mark.real
def test_off_is_the_greedy_generate_of_transformers_on_the_real_model_for_50_prompts(real):
    from transformers import LlamaForCausalLM

    from model import Llama
    from tokenizer import Tokenizer
    hf = LlamaForCausalLM.from_pretrained(real, dtype=torch.float32).eval()
    ours, tok = Llama.from_pretrained(real, dtype=torch.float32, device="cpu"), Tokenizer.from_pretrained(real)
    dev = [json.loads(line)["prompt"] for line in open(answer.__file__.replace("answer.py", "data/mini/dev.jsonl"))]
    prompts = list(dict.fromkeys(p for p in dev if isinstance(p, str)))[:50]
    for part in (prompts[i:i + 10] for i in range(0, 50, 10)):
        ids = [tok.render(p)[0] for p in part]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(x)) + x for x in ids])
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids])
        wanted = hf.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=tok.stop_ids,
                             pad_token_id=tok.stop_ids[0])[:, width:].tolist()
        for w, a in zip(wanted, generate(ours, tok, part, "off", 16)):
            end = next((n for n, i in enumerate(w) if i in tok.stop_ids), 16)
            assert a.tokens == w[:end]
