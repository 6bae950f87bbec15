"""The benchmark's bookkeeping; how fast anything is, no test asks."""
import json
import sys
from functools import partial

import pytest

import bench
from objective import Layout

ARGS = ("decode", "--new", 3, "--rounds", 1, "--batch", "1,3", "--long", 150)


def test_a_steps_bytes_and_operations_by_hand(tiny, flagged):
    """2 blocks: q 32x32, k and v 16x32, o 32x32, gate and up 48x32, down 32x48; head 272x32; cache of 2 heads of 8."""
    weights = 2 * (1024 + 2 * 512 + 1024 + 3 * 1536) + 272 * 32
    places = (10 + 2) + (20 + 2)  # half of the answer's 4 tokens on average
    assert bench.step_costs(flagged, [10, 20], 4) == (4 * (weights + places * 2 * 2 * 2 * 8), 2 * 2 * weights)


def test_it_runs_beside_transformers(tiny, script):
    code, out, err = script("bench.py", *ARGS, "--weights", tiny, "--dtype", "float32", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["batch"]) == {"1", "3"} and found["long"]["tokens"] == pytest.approx(150, abs=5)
    for B, part in found["batch"].items():
        assert list(part["by"]) == ["transformers", "off, no adapter", "off", "shadow", "stop"]
        for x in part["by"].values():
            assert len(x["seconds"]) == len(x["tokens_per_s"]) == 1
            assert x["tokens_per_s"][0] == pytest.approx(int(B) * 3 / x["seconds"][0])
            assert x["of_bandwidth"] == pytest.approx(part["step_bytes"] / x["step"] / part["bandwidth"])
    assert "round 1 of 1" in err


def test_without_a_peer_it_says_so_and_prints_the_rest(tiny, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = script("bench.py", *ARGS, "--weights", tiny)
    assert code == 0 and "transformers is not installed" in err and "| 3 | stop |" in out
    assert "| transformers" not in out


def test_random_weights_of_a_shape_are_the_peers_too(tiny, script, monkeypatch):
    """The real shapes are too large here: a small one in their place."""
    import torch
    small = dict(vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
    monkeypatch.setitem(bench.SHAPES, "small", small)
    for tied in (False, True):
        small["tie_word_embeddings"] = tied
        model, peer, tok = bench.build(bench.BenchConfig(shape="small", weights=tiny, dtype="float32"))
        ids = torch.tensor([tok.render("hello")[0]])
        with torch.no_grad(), model.flag_off():
            torch.testing.assert_close(model.logits(model(ids)), peer(ids).logits, atol=1e-4, rtol=1e-4)


def records(tmp_path):
    rows = [dict(prompt=f"question {i}", response="an answer " * (i + 1), opening="", category="x",
                 label=("harmful", "benign")[i % 2]) for i in range(6)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(tmp_path / "r.jsonl")


def test_training_is_compared_on_the_same_losses(tiny, tmp_path, monkeypatch):
    """Both begin as the original model, so the peer's plain objective must give the terms that ours gives."""
    import bench_train
    monkeypatch.setattr(bench_train, "TrainConfig", partial(bench_train.TrainConfig, train=records(tmp_path)))
    found = bench_train.train_bench(bench_train.BenchTrainConfig(
        rounds=1, batch=6, micro_batch=4, layers=1, rank=2, weights=str(tiny), dtype="float32"))
    ours, theirs = found["terms"]["nanoflag"], found["terms"]["transformers + peft"]
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4) and ours[1] > 1
    assert ours == pytest.approx(found["terms"][bench_train.AHEAD], rel=1e-4, abs=1e-5)
    assert found["needed"]["nanoflag"][0] > found["needed"][bench_train.AHEAD][0] > 0 and all(m is None or m > 0 for m in found["memory_mb"].values())
    table = "\n".join(bench_train.train_table(found))
    assert "| nanoflag |" in table and "| transformers + peft |" in table


def test_what_a_training_step_needs_by_hand(flagged):
    """2 blocks of 7680 weights, 4 heads of 8, all with LoRA of rank 4; a prefix of 2 tokens is there once."""
    import bench_train
    benign = Layout([5, 6, 7], [5, 6, 7], [1, 2], [1, 2], [], [])
    other = Layout([5, 6, 8, 9], [5, 6, 8, 9], [1], [1], [], [])
    block, pairs, lora = 7680, 4 * 4 * 8, 4 * 2 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48) + 2 * 32 - 2 * 32)
    assert lora == sum(p.numel() for n, p in flagged.flag_parameters().items() if "lora_" in n)
    n, seen = 5, 1 + 2 + 3 + 3 + 4
    needed = 2 * (2 * 2 * block * n + 3 * pairs * seen) + 3 * 2 * lora * n + 2 * (2 * block * n + pairs * seen)
    assert bench_train.step_flops(flagged, [benign, other], 2) == needed + 6 * 3 * 272 * 32
    ahead = bench_train.step_flops(flagged, [benign, other], 2, ahead=True)
    assert ahead == needed - 2 * (2 * block * n + pairs * seen) + 6 * 3 * 272 * 32


@pytest.mark.parametrize("args, message", [
    (["write"], "wanted decode or train"), (["train", "--rank", "0"], "1 or more"), (["train", "--length", "3"], "16"), (["decode", "--batch", "1,x"], "numbers with commas"),
    (["decode", "--new", "1"], "2 or more"), (["decode", "--shape", "gpt"], "llama-3.2-1b"),
    (["decode", "--dtype", "int4"], "bfloat16 or float32")])
def test_what_a_user_can_get_wrong(script, args, message):
    code, out, err = script("bench.py", *args)
    assert code == 2 and message in err and err.startswith("error: ") and not out
