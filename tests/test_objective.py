"""The objective against its definition: float64, finite differences, hand-worked layouts."""
import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from objective import CHUNK, TERMS, Example, VocabularyLoss, decompose, flag_prob, lay_out, make_example, objective, pad
from packed import ROUND, Packed, read, read_both
from train import trained

BENIGN, FLAG, AFTER, WORDS, KIND = range(5)
WEIGHTS = torch.tensor([0.3, 0.7, 0.2, 0.5, 0.4])
RF = 272  # the tiny model's flag


@pytest.fixture
def flagged(flagged):
    """With rows for three kinds too."""
    rows = torch.randn(3, flagged.config.hidden_size, generator=torch.Generator().manual_seed(6))
    flagged.kind_rows = torch.nn.Parameter(0.2 * rows)
    return flagged


def example(label="harmful", n_prompt=3, n_answer=5, seed=0):
    ids = torch.randint(3, 260, (n_prompt + n_answer,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, n_prompt, label, kind=seed % 3)


def named(layout):
    """The terms of each position."""
    return [tuple(i for i, t in enumerate(terms) if t) for terms in layout.terms]


def test_a_benign_answer_is_supervised_everywhere_and_read_without_a_flag():
    e = Example([10, 11, 20, 21, 22], 2, "benign")
    x = lay_out(e, 1, RF, 0, "all")
    assert x.ids == x.reference_ids == [10, 11, 20, 21]  # behind 22 nothing is asked for
    assert x.at == x.reference_at == [1, 2, 3] and x.target == [20, 21, 22]
    assert named(x) == [(BENIGN, WORDS)] * 3


def test_a_harmful_answer_gets_its_flag_and_its_positions():
    """Prompt 10 11, answer 20 21 22 23, the flag before 22, asked for from answer token 1 on."""
    x = lay_out(Example([10, 11, 20, 21, 22, 23], 2, "harmful"), 2, RF, 1, "all")
    assert x.ids == [10, 11, 20, 21, RF, 22] and x.reference_ids == [10, 11, 20, 21, 22]
    rows = list(zip(named(x), x.at, x.reference_at, x.target))
    assert rows == [((WORDS,), 1, 1, 20),
                    ((FLAG, WORDS), 2, 2, 21), ((FLAG, WORDS), 3, 3, 22),   # read 20 and 21
                    ((AFTER,), 4, 3, 22), ((AFTER,), 5, 4, 23)]             # read <rf> and 22; pi_0 read 21 and 22


def test_positions_one_asks_for_the_flag_at_the_insertion_alone():
    x = lay_out(Example([10, 11, 20, 21, 22, 23], 2, "harmful"), 2, RF, 0, "one")
    assert [a for a, t in zip(x.at, named(x)) if FLAG in t] == [3]


def test_an_answer_shorter_than_the_offset_still_gets_a_flag():
    x = lay_out(Example([10, 11, 20], 2, "harmful"), 0, RF, 4, "all")
    assert x.ids == [10, 11, RF] and named(x) == [(FLAG, WORDS), (AFTER,)]


def test_a_prompt_that_leaves_no_room_for_a_word_is_an_error(tok):
    record = dict(prompt="p" * 20, response="answer", opening="", label="benign")
    n = make_example(tok, record, 64, 255).n_prompt
    assert make_example(tok, record, 64, n + 2).n_answer == 1
    for context in (n, n + 1):
        with pytest.raises(ValueError, match=f"{n} tokens.*holds {context}"):
            make_example(tok, record, 64, context)


@pytest.mark.parametrize("label", ["harmful", "benign"])
def test_the_kind_is_asked_for_once_at_the_first_position_and_counts_the_same_for_all(label):
    e = Example([10, 11, 20, 21, 22], 2, label, kind=7)
    x, plain = (lay_out(e, 1, RF, 0, "all") for e in (e, replace(e, kind=None)))
    assert x.kind == 7 and plain.kind is None and not any(KIND in t for t in named(plain))
    assert [KIND in t for t in named(x)] == [True] + [False] * (len(x.at) - 1) and x.at[0] == 1
    assert [[*t[:-1], 0] for t in x.terms] == plain.terms
    assert x.weighed(0.25).terms == [[*(0.25 * t for t in at[:-1]), at[-1]] for at in x.terms]


def test_the_example_is_cut_at_the_last_answer(tok):
    record = {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                         {"role": "user", "content": "c"}], "response": "de", "opening": "d", "label": "benign"}
    e = make_example(tok, record, 99, 256)
    assert [tok.bytes_of.get(i, i) for i in e.ids[e.n_prompt:]] == [b"d", b"e", tok.special["<|im_end|>"]]
    assert e.ids[:e.n_prompt] == tok.render(record["prompt"])[0] and e.opening
    assert make_example(tok, record, 1, 256).n_answer == 1
    with pytest.raises(ValueError, match="context"):
        make_example(tok, record, 9, 10)


def random_logits(n=7, v=11, n_flags=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return [3 * torch.randn(n, k, generator=g, dtype=dtype) for k in (v, n_flags, v)]


@pytest.mark.parametrize("n_flags", [1, 3])
def test_kl_to_pi_is_kl_to_q_minus_log_of_no_flag(n_flags):
    words, flags, reference = random_logits(n_flags=n_flags)
    kl, log_f, log_not_f = decompose(words, flags, reference)
    pi = torch.softmax(torch.cat([words, flags], -1), -1)
    p0, f = torch.softmax(reference, -1), pi[:, 11:].sum(-1)
    q = pi[:, :11] / (1 - f)[:, None]
    torch.testing.assert_close(kl, (p0 * (p0 / q).log()).sum(-1))
    torch.testing.assert_close(log_f.exp(), f)
    torch.testing.assert_close(log_not_f.exp(), 1 - f)
    torch.testing.assert_close((p0 * (p0 / pi[:, :11]).log()).sum(-1), kl - log_not_f)
    torch.testing.assert_close(flag_prob(words, flags), f)


def random_positions(n=7, c=6, v=9, n_flags=2, dtype=torch.float64):
    """hidden, the flags' rows, reference, head, terms, weights, target, as VocabularyLoss takes them."""
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    terms = torch.randint(2, (n, KIND), generator=g)  # all terms but the last
    return (draw(n, c).requires_grad_(), draw(n_flags, c).requires_grad_(), draw(n, c), draw(v, c), terms,
            torch.rand(KIND, generator=g, dtype=dtype), torch.randint(v, (n,), generator=g))


def plain_terms(hidden, rows, reference, head, terms, target, after):
    """Each term's sum, of pi and pi_0 written out whole."""
    v = len(head)
    log_pi = torch.cat([hidden @ head.T, hidden @ rows.T], -1).log_softmax(-1)
    log_f, log_not_f = (log_pi[:, part].logsumexp(-1) for part in (slice(v, None), slice(v)))
    log_p0 = (reference @ head.T).log_softmax(-1)
    kl_pi = F.kl_div(log_pi[:, :v], log_p0, log_target=True, reduction="none").sum(-1)
    said = F.nll_loss(log_pi[:, :v], target, reduction="none")
    losses = torch.stack([kl_pi, -log_f, said if after == "ce" else kl_pi, kl_pi + log_not_f], -1)
    return (losses * terms).sum(0)


@pytest.mark.parametrize("after", ["kl", "ce"])
@pytest.mark.parametrize("chunk", [2, 64])
def test_the_vocabulary_loss_is_the_plain_one_in_float64(monkeypatch, after, chunk):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    hidden, rows, reference, head, terms, weights, target = random_positions()
    loss, sums = VocabularyLoss.apply(hidden, rows, reference, head, terms, weights, target, after)
    plain = plain_terms(hidden, rows, reference, head, terms, target, after)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    close(sums, plain)
    close(loss, plain @ weights)
    for found, wanted in zip(torch.autograd.grad(3 * loss, (hidden, rows)),
                             torch.autograd.grad(3 * plain @ weights, (hidden, rows))):
        close(found, wanted)


@pytest.mark.parametrize("after", ["kl", "ce"])
@pytest.mark.parametrize("term", range(KIND))
def test_each_term_has_the_gradient_of_finite_differences(term, after):
    hidden, rows, reference, head, terms, _, target = random_positions()
    weights = F.one_hot(torch.tensor(term), KIND).double()
    assert torch.autograd.gradcheck(lambda hidden, rows: VocabularyLoss.apply(
        hidden, rows, reference, head, terms, weights, target, after)[0], (hidden, rows))


def test_a_probe_needs_no_gradient_of_the_hidden_states():
    hidden, rows, *rest = random_positions()
    whole = torch.autograd.grad(VocabularyLoss.apply(hidden, rows, *rest, "kl")[0], rows)[0]
    alone = torch.autograd.grad(VocabularyLoss.apply(hidden.detach(), rows, *rest, "kl")[0], rows)[0]
    assert torch.equal(whole, alone)


def test_no_tensor_is_as_large_as_vocabulary_times_positions():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    inputs = random_positions(n=600, c=4, v=5000, dtype=torch.float32)
    with Largest() as largest:
        VocabularyLoss.apply(*inputs, "kl")[0].backward()
    assert largest.numel == 2 * CHUNK["cpu"] * 5000  # both models' logits


def layouts():
    harmful = [lay_out(example(seed=s, n_prompt=2 + s, n_answer=4 + s), s, RF, 1, "all") for s in range(3)]
    benign = [lay_out(example("benign", seed=9 + s, n_answer=2 + 3 * s), 0, RF, 0, "all") for s in range(2)]
    return harmful + benign


def gradients(model, groups, weights, **settings):
    model.zero_grad()
    sums = 0
    for group in groups:
        loss, part = objective(model, group, weights, **settings)
        loss.backward()
        torch.testing.assert_close(loss.detach(), (part * weights).sum())
        sums = sums + part
    return sums, {n: p.grad.clone() for n, p in trained(model).items() if p.requires_grad}


def plain_loss(model, batch, weights, after):
    """The objective as method and signs say it, one position at a time, with full logits and no chunk."""
    total = 0
    for x in batch:
        hidden = model(torch.tensor([x.ids]))
        logits = model.logits(hidden)[0]
        with torch.no_grad(), model.flag_off():
            p0 = model.logits(model(torch.tensor([x.reference_ids])))[0].softmax(-1)
        for at, ref, terms, target in zip(x.at, x.reference_at, named(x), x.target):
            log_pi, v = logits[at].log_softmax(-1), p0.shape[-1]
            kl_pi = (p0[ref] * (p0[ref].log() - log_pi[:v])).sum()
            kl_q = (p0[ref] * (p0[ref].log() - logits[at][:v].log_softmax(-1))).sum()
            loss = {BENIGN: kl_pi, FLAG: -log_pi[v], WORDS: kl_q, AFTER: kl_pi if after == "kl" else -log_pi[target]}
            if KIND in terms and model.kind_rows is not None:
                scores = model.kind_rows @ hidden[0, at]
                total = total + weights[KIND] * (scores.exp().sum() / scores[x.kind].exp()).log()
            total = total + sum(weights[term] * loss[term] for term in terms if term != KIND)
    return total


@pytest.mark.parametrize("after", ["kl", "ce"])
def test_it_has_the_gradient_of_the_plain_objective(flagged, after):
    sums, found = gradients(flagged, [layouts()], WEIGHTS, after=after)
    flagged.zero_grad()
    loss = plain_loss(flagged, layouts(), WEIGHTS, after)
    loss.backward()
    torch.testing.assert_close((sums * WEIGHTS).sum(), loss.detach(), rtol=1e-4, atol=1e-5)
    for name, p in trained(flagged).items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layers, rank", [(1, 4), (2, 0)])
def test_blocks_without_lora_are_read_once_for_both_models(model, layers, rank):
    model.add_flag(rank=rank, alpha=8, layers=layers)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.flag_parameters().values():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    batch = layouts()
    rows, references = [x.ids for x in batch], [x.reference_ids for x in batch]
    with torch.no_grad():
        plain = [model(torch.tensor([x.ids]))[0, x.at] for x in batch]
        with model.flag_off():
            plain += [model(torch.tensor([x.reference_ids]))[0, x.reference_at] for x in batch]
        both = read_both(model, rows, references, [x.at for x in batch], [x.reference_at for x in batch])
        for found, wanted in zip([*both[0], *both[1]], plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    _, found = gradients(model, [batch], WEIGHTS)
    model.zero_grad()
    plain_loss(model, batch, WEIGHTS, "kl").backward()
    wanted = {n: p.grad for n, p in model.flag_parameters().items() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_micro_batches_and_chunks_add_up_to_one_batch(flagged, monkeypatch):
    sums, whole = gradients(flagged, [layouts()], WEIGHTS)
    monkeypatch.setitem(CHUNK, "cpu", 3)
    parts_sums, parts = gradients(flagged, [[x] for x in layouts()], WEIGHTS)
    torch.testing.assert_close(sums, parts_sums, rtol=1e-4, atol=1e-5)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5, msg=name)


def test_recomputing_the_blocks_changes_no_gradient(flagged):
    kept = gradients(flagged, [layouts()], WEIGHTS)
    calls, block = [], flagged.layers[0].forward
    flagged.layers[0].forward = lambda *args: calls.append(torch.is_grad_enabled()) or block(*args)
    flagged.recompute = True
    again = gradients(flagged, [layouts()], WEIGHTS)
    assert calls == [False, True, True]  # the reference, there, and on the way back
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


def test_only_the_adapter_and_the_rows_for_kinds_get_gradients(flagged):
    objective(flagged, layouts(), torch.ones(len(TERMS)))[0].backward()
    assert {n for n, p in flagged.named_parameters() if p.grad is not None} == {*flagged.flag_parameters(), "kind_rows"}


@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(1, 3))
def test_packed_rows_hold_what_they_have_in_common_once(rows, worth):
    with patch("packed.WORTH", worth):
        x = Packed(rows, "cpu")
    assert len(x.ids) == x.at.shape[1] == len(x.back) and len(x.ids) % ROUND == 0
    assert [[x.ids[i] for i in path] for path in x.paths] == rows
    assert [x.at[0, path].tolist() for path in x.paths] == [list(range(len(r))) for r in rows]
    nodes = len({tuple(r[:n]) for r in rows for n in range(1, len(r) + 1)})  # of the trie
    shared = len(os.path.commonprefix(rows))
    assert nodes <= 1 + max(map(max, x.paths)) <= shared + sum(len(r) - shared for r in rows)
    assert worth > 1 or 1 + max(map(max, x.paths)) == nodes


@pytest.mark.parametrize("rows", [
    [[5, 6, 7, 8, 9], [5, 6, 7, 20], [5, 6, 7, 8, 30, 31, 32]], [[5, 6], [7], [8, 9, 10, 11]], [[5, 6, 7]],
    [[5, 6, 7, RF, 8, 9], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [5, 6]]])
@pytest.mark.parametrize("side_by_side", [1, 2, 8, None])  # None: under one mask, as on a GPU
def test_a_common_beginning_is_read_once_with_the_same_states_and_gradients(flagged, rows, side_by_side, monkeypatch):
    monkeypatch.setattr("packed.SIDE_BY_SIDE", side_by_side)
    monkeypatch.setattr("packed.ONE_MASK", {"cpu": 0 if side_by_side else ROUND})
    assert (Packed(rows, "cpu").sees is None) == bool(side_by_side)
    grads = []
    whole = [range(len(row)) for row in rows]
    for states in (read(flagged, rows, whole), [flagged(torch.tensor([r]))[0] for r in rows]):
        flagged.zero_grad()
        loss = sum((h * torch.arange(1, h.numel() + 1).view_as(h).sin()).sum() for h in states)
        loss.backward()
        grads.append([loss.detach(), *states, *(p.grad.clone() for p in flagged.flag_parameters().values() if p.grad is not None)])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():  # rows that are equal, and a row alone
        torch.testing.assert_close(read(flagged, [rows[0]] * 2, whole[:1] * 2)[1], grads[0][1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(read(flagged, rows, [[1, 0]] + whole[1:])[0], grads[0][1][[1, 0]], rtol=1e-3, atol=1e-4)


def test_padding_is_on_the_right():
    assert pad([[1, 2, 3], [4]], "cpu").tolist() == [[1, 2, 3], [4, 0, 0]]
