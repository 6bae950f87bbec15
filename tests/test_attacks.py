"""Every attack does what it says, on a tiny random model."""
import base64
import math

import pytest
import torch

from attacks import (AGAINST, ATTACKS, GRADIENT, LONG, TEMPLATES, Suffix, attack_loss, lengthen, sampling, split_prompt)
from sample import generate
from tokenizer import check_messages

COMMON = {"filler": ["the hello " * 3] * 2, "context_tok": 60, "suffix_tok": 4, "gcg_steps": 4,
          "gcg_width": 24, "pgd_steps": 8, "pgd_radius": 0.5}
COMMON["harmful"] = [{"prompt": f"the hello {i}", "opening": f"hello {i}"} for i in range(30)]
REQUEST = {"prompt": "Tell me the hello", "opening": "hello the", "response": "hello the hell hello the he he ll the",
           "translation": "Sag mir"}


def run(name, model, tok, request=REQUEST, common=COMMON):
    return ATTACKS[name](request, model, tok, common)


def said(item):
    return check_messages(item["prompt"])[-1]["content"]


def test_every_attack_gives_what_generate_takes(flagged, tok):
    for name in ATTACKS:
        item = run(name, flagged, tok, REQUEST | {"response": "hello the" + " hello" * 1000} if "prefill" in name else REQUEST)
        assert set(item) - {"loss", "embeddings", "said"} == {"prompt", "prefill"}, name
        assert check_messages(item["prompt"])[-1]["role"] == "user", name
    assert set(TEMPLATES + AGAINST + GRADIENT + LONG) <= set(ATTACKS)


def test_direct_and_opening_leave_the_request_alone(flagged, tok):
    assert run("direct", flagged, tok) == {"prompt": REQUEST["prompt"], "prefill": ""}
    assert run("opening", flagged, tok) == {"prompt": REQUEST["prompt"], "prefill": "hello the"}
    assert run("opening", flagged, tok, REQUEST | {"opening": ""}) is None


def test_a_prefilled_model_goes_on_from_the_prefix_and_the_flag_judges_it(flagged, tok):
    item = run("prefill_5", flagged, tok)
    prefix = tok.encode(REQUEST["response"])[:5]
    assert tok.encode(item["prefill"]) == prefix
    answer, = generate(flagged, tok, [item], "shadow", max_new_tokens=4)
    assert answer.tokens[:5] == prefix and len(answer.tokens) == 9 and len(answer.flag_prob) == 9
    ids = tok.render(REQUEST["prompt"])[0]
    with torch.no_grad():
        pi = flagged.logits(flagged(torch.tensor([ids + answer.tokens])))[0].softmax(-1)
    assert answer.flag_prob == pytest.approx(pi[len(ids) - 1:-1, -1].tolist(), rel=1e-3, abs=1e-6)


def test_a_prefill_longer_than_the_answer_on_hand_is_left_out_until_the_answer_is_lengthened(flagged, tok):
    assert run("prefill_100", flagged, tok) is None
    only_opening = REQUEST | {"response": "", "opening": "hello " * 40}  # as public sets have it, and long enough
    assert tok.encode(run("prefill_25", flagged, tok, only_opening)["prefill"]) == tok.encode("hello " * 40)[:25]
    longer, plain, none = dict(REQUEST), dict(REQUEST), REQUEST | {"opening": "", "response": ""}
    lengthen(flagged, tok, [longer, none], 100)
    assert longer["long"][100].startswith(REQUEST["response"]) and "long" not in none
    assert longer == REQUEST | {"long": longer["long"]}  # the answer that it has stays
    assert len(tok.encode(run("prefill_100", flagged, tok, longer)["prefill"])) >= 95  # cut text may merge anew
    with flagged.flag_off():
        lengthen(flagged, tok, [plain], 100)
    assert plain == longer  # the words are the original model's


def test_a_refusal_is_put_into_the_mouth_whatever_the_request_brings(flagged, tok):
    for request in (REQUEST, REQUEST | {"opening": "", "response": ""}):
        item = run("refused", flagged, tok, request)
        assert item == {"prompt": REQUEST["prompt"], "prefill": "I'm sorry, but I can't help with that."}


@pytest.mark.parametrize("name, before, after", [("long_start", 0, 50), ("long_middle", 25, 25), ("long_end", 50, 0)])
def test_a_buried_request_lies_where_it_should_in_as_much_text_as_asked_for(flagged, tok, name, before, after):
    left, right = said(run(name, flagged, tok)).split(REQUEST["prompt"])
    assert len(tok.encode(left)) >= before and len(tok.encode(right)) >= after
    assert 50 <= len(tok.encode(left + right)) - len(tok.encode("Here are my notes. Do what they ask for.\n\n")) <= 70
    if name == "long_end":
        assert right == ""


def test_many_shots_are_answered_turns_before_the_request(flagged, tok):
    other = REQUEST | {"prompt": COMMON["harmful"][0]["prompt"]}
    chat = run("many_shot", flagged, tok, other)["prompt"]
    assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2) + ["user"] and len(chat) > 2
    assert run("many_shot", flagged, tok, REQUEST, COMMON | {"harmful": [REQUEST]}) is None  # no others, no shots
    assert chat[-1]["content"] == other["prompt"] not in [m["content"] for m in chat[:-1]]
    assert sum(len(tok.encode(m["content"])) for m in chat[:-1]) <= COMMON["context_tok"]


@pytest.mark.parametrize("name", ["role_play", "prefix_injection", "refusal_suppression", "style", "past_tense",
                                  "never_tag", "typed_flag", "system_forbids"])
def test_a_template_holds_the_whole_request(flagged, tok, name):
    assert REQUEST["prompt"] in said(run(name, flagged, tok))


def test_the_encodings_can_be_read_back(flagged, tok):
    text = said(run("base64", flagged, tok))
    assert base64.b64decode(text.rsplit(" ", 1)[1]).decode() == REQUEST["prompt"]
    assert said(run("leetspeak", flagged, tok)) == "73ll m3 7h3 h3ll0"
    assert said(run("split_words", flagged, tok)).endswith("Te+ll me the he+llo")
    assert run("translation", flagged, tok)["prompt"] == "Sag mir"
    assert run("translation", flagged, tok, REQUEST | {"translation": ""}) is None


def test_a_chat_is_attacked_in_its_last_message(flagged, tok):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "see it"}]
    item = run("leetspeak", flagged, tok, REQUEST | {"prompt": chat})
    assert item["prompt"] == [*chat[:2], {"role": "user", "content": "533 17"}] and chat[2]["content"] == "see it"
    system = [{"role": "system", "content": "s"}, chat[0]]
    assert run("system_forbids", flagged, tok, REQUEST | {"prompt": system}) is None


def test_the_typed_flag_stays_text(flagged, tok):
    for name in ("typed_flag", "system_forbids"):
        item = run(name, flagged, tok)
        assert any(tok.flag_text in m["content"] for m in check_messages(item["prompt"]))
        assert tok.flag_id not in tok.render(item["prompt"])[0]


@pytest.mark.parametrize("name", ["temperature_0", "temperature_2", "top_k_1", "logit_bias"])
def test_no_sampling_setting_changes_f_where_the_words_are_the_same(flagged, tok, name):
    item = run(name, flagged, tok) | {"prefill": "hello the hello the he"}
    plain, = generate(flagged, tok, [item], "shadow", max_new_tokens=3, temperature=1.0, seed=3)
    answer, = generate(flagged, tok, [item], "shadow", max_new_tokens=3, seed=3, **({"temperature": 1.0} | sampling(name, tok)))
    n = len(tok.encode(item["prefill"])) + 1
    assert answer.flag_prob[:n] == plain.flag_prob[:n]
    if name == "logit_bias":
        assert answer == plain  # a bias on the flag does nothing at all


def test_a_logit_bias_bans_words_and_only_words(flagged, tok):
    plain, = generate(flagged, tok, ["hello"], "shadow", max_new_tokens=20)
    ban = {i: -math.inf for i in set(plain.tokens)}
    answer, = generate(flagged, tok, ["hello"], "shadow", max_new_tokens=20, logit_bias=ban)
    assert not set(answer.tokens) & set(ban) and answer.flag_prob[0] == plain.flag_prob[0]
    with pytest.raises(ValueError, match="logit_bias has 9999"):
        list(generate(flagged, tok, ["hello"], logit_bias={9999: 1.0}))


# ------------------------------------------------------------------------------------------- by the gradient

def test_a_prompt_is_cut_around_the_users_text(tok):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "hello"}]
    head, content, tail = split_prompt(tok, chat)
    assert head + content + tail == tok.render(chat)[0] and tok.decode(content) == "hello"


def search(model, tok, adaptive=False):
    head, content, tail = split_prompt(tok, check_messages(REQUEST["prompt"]))
    return Suffix(model, tok, head, content, tail, tok.encode(REQUEST["opening"]), adaptive)


def test_the_attack_loss_is_that_of_a_plain_forward(flagged, tok):
    suffix, target = tok.encode(" ! ! !"), tok.encode(REQUEST["opening"])
    head, content, tail = split_prompt(tok, check_messages(REQUEST["prompt"]))
    ids = torch.tensor([head + content + suffix + tail + target])
    with torch.no_grad():
        pi = flagged.logits(flagged(ids))[0, -len(target) - 1:-1].double().softmax(-1)
    f, q = pi[:, -1], pi[:, :-1] / pi[:, :-1].sum(-1, keepdim=True)
    nll = -q[torch.arange(len(target)), target].log().mean()
    assert search(flagged, tok).losses([suffix]).item() == pytest.approx(nll.item(), rel=1e-4)
    assert search(flagged, tok, True).losses([suffix]).item() == pytest.approx((nll - (1 - f).log().mean()).item(), rel=1e-4)


def test_many_suffixes_are_scored_as_each_alone(flagged, tok):
    s = search(flagged, tok, True)
    first = tok.encode(" ! ! ! !")
    suffixes = [first, [40, *first[1:]], [*first[:2], 200, *first[3:]]]
    alone = torch.cat([s.losses([x]) for x in suffixes])
    torch.testing.assert_close(s.losses(suffixes, batch=2), alone, rtol=1e-4, atol=1e-5)


def test_the_adaptive_loss_reaches_over_the_whole_answer_that_is_read(flagged, tok):
    hidden, target = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)), [7, 9]
    pi = flagged.logits(hidden).double().softmax(-1)
    f, q = pi[..., -1], pi[..., :-1] / pi[..., :-1].sum(-1, keepdim=True)
    nll = -(q[:, 0, 7].log() + q[:, 1, 9].log()) / 2
    torch.testing.assert_close(attack_loss(flagged, hidden, target, False).double(), nll, rtol=1e-4, atol=1e-5)
    adaptive = nll - (1 - f).log().mean(1)
    torch.testing.assert_close(attack_loss(flagged, hidden, target, True).double(), adaptive, rtol=1e-4, atol=1e-5)


def test_the_gradient_over_words_is_that_of_finite_differences(flagged, tok):
    s, suffix = search(flagged, tok, True), tok.encode(" ! ! !")
    slope = s.gradient(suffix)
    x = flagged.embed(torch.tensor(s.rows([suffix]))).detach()
    at, word, eps = len(s.head) + len(s.content) + 1, 77, 1e-2

    def loss(step):
        y = x.clone()
        y[0, at] += step * flagged.embed_tokens.weight[word]
        with torch.no_grad():
            return attack_loss(flagged, flagged(y)[:, -len(s.target):], s.target, True).item()

    measured = (loss(eps) - loss(-eps)) / (2 * eps)
    assert abs(measured) > 1e-2 and slope[1, word].item() == pytest.approx(measured, rel=0.05)


def test_a_model_reads_embeddings_as_it_reads_ids(flagged):
    ids = torch.tensor([[5, 9, 200, 40]])
    assert torch.equal(flagged(flagged.embed(ids)), flagged(ids))


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_of_gcg_lowers_its_loss_and_keeps_to_text_that_reads_back(flagged, tok, adaptive):
    s, suffix = search(flagged, tok, adaptive), tok.encode(" !" * 4)
    loss = start = s.losses([suffix]).item()
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        suffix, after = s.step(suffix, loss, 48, rng)
        assert after <= loss and len(suffix) == len(tok.encode(" !" * 4))
        loss = after
    assert loss < start - 0.01
    assert tok.encode(tok.decode(s.content + suffix)) == s.content + suffix
    assert s.losses([suffix]).item() == pytest.approx(loss, rel=1e-4)


def test_gcg_appends_its_suffix_to_the_request(flagged, tok):
    item, s, start = run("gcg", flagged, tok), search(flagged, tok), tok.encode(" !" * 4)
    suffix = said(item)[len(REQUEST["prompt"]):]
    assert said(item).startswith(REQUEST["prompt"]) and item["loss"] < s.losses([start]).item() - 0.01
    ids, target = tok.render(item["prompt"])[0], tok.encode(REQUEST["opening"])  # as generate will read the chat
    with torch.no_grad():
        q = flagged.logits(flagged(torch.tensor([ids + target])))[0, len(ids) - 1:-1, :-1].log_softmax(-1)
    assert item["loss"] == pytest.approx(-q[torch.arange(len(target)), target].mean().item(), rel=1e-3) and suffix
    assert run("gcg", flagged, tok, REQUEST | {"opening": ""}) is None


@pytest.mark.parametrize("name", ["pgd", "pgd_adaptive"])
def test_pgd_moves_the_users_words_alone_by_the_radius_at_most_and_lowers_its_loss(flagged, tok, name):
    item = run(name, flagged, tok)
    head, content, tail = split_prompt(tok, check_messages(REQUEST["prompt"]))
    x = flagged.embed(torch.tensor(head + content + tail)).detach()
    moved = item["embeddings"] - x
    user = slice(len(head), len(head) + len(content))
    assert torch.equal(moved[:user.start], 0 * moved[:user.start]) and torch.equal(moved[user.stop:], 0 * moved[user.stop:])
    radius = COMMON["pgd_radius"] * x[user].norm(dim=-1).mean()
    assert 0 < moved[user].norm(dim=-1).max() <= radius * 1.001
    target, answer = tok.encode(REQUEST["opening"]), tok.encode(REQUEST["response"])
    assert item["said"] == answer

    def loss(prompt):
        y = torch.cat([prompt, flagged.embed(torch.tensor(answer[:-1]))])[None]
        with torch.no_grad():
            return attack_loss(flagged, flagged(y)[:, -len(answer):], target, name == "pgd_adaptive").item()

    assert loss(item["embeddings"]) < loss(x) - 0.01
