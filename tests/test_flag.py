"""The flag: its rows, LoRA, switching it off, merging, and the adapter on disk."""
import json
import shutil

import pytest
import torch

from conftest import write_checkpoint
from test_model import V, assert_near, cut, edit_json, load, logits_of, shake, some_ids, write


# ---------------------------------------------------------------------------------------------- the flag

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_flags", [1, 3])
def test_at_its_start_the_flag_adds_columns_and_changes_no_bit(tmp_path, n_flags, tied, rank, dtype):
    write_checkpoint(tmp_path, tie_word_embeddings=tied)
    model, ids = load(tmp_path, dtype), some_ids()
    before = logits_of(model, ids)
    assert before.shape == (2, 64, V)
    model.add_flag(n_flags, rank=rank, alpha=8)
    after = logits_of(model, ids)
    assert after.shape == (2, 64, V + n_flags) and torch.equal(after[..., :V], before)
    assert torch.equal(model.embed(ids), torch.nn.functional.embedding(ids, model.embed_tokens.weight))
    assert logits_of(model, torch.tensor([[5, *range(V, V + n_flags)]])).isfinite().all()


def test_each_flag_row_feeds_its_own_id_alone(model):
    model.add_flag(3, rank=2, alpha=2)
    ids = torch.tensor([[7, V, 271, V + 1, 0, V + 2, V + 1]])
    embedded, hidden = model.embed(ids), model(ids)
    logits = model.logits(hidden)
    with torch.no_grad():
        model.flag_embed[1] += 1
        model.flag_unembed[1] += 1
    assert (model.embed(ids) != embedded).any(-1).tolist() == [[False, False, False, True, False, False, True]]
    assert (model.logits(hidden) != logits).any(1)[0].nonzero().flatten().tolist() == [V + 1]
    assert_near(model.logits(hidden)[..., V + 1] - logits[..., V + 1], hidden.sum(-1))


LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_exactly_the_adapter_gets_gradients(tmp_path, tied, rank):
    write_checkpoint(tmp_path, tie_word_embeddings=tied)
    model = load(tmp_path)
    model.add_flag(2, rank=rank, alpha=8)
    shake(model)
    ids = some_ids(2, 12, below=V + 2)
    ids[:, 3], ids[:, 5] = V, V + 1
    model.logits(model(ids)).log_softmax(-1)[:, :, [3, V, V + 1]].sum().backward()
    adapter = {"flag_unembed"}
    if rank:
        adapter |= {"flag_embed"} | {f"layers.{i}.{n}.lora_{x}" for i in (0, 1) for n in LINEARS for x in "AB"}
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == adapter
    assert {n for n, p in parameters.items() if p.grad is not None} == adapter
    assert all(parameters[n].grad.abs().max() > 0 and parameters[n].dtype == torch.float32 for n in adapter)


def test_lora_in_the_upper_blocks_alone(tiny, tmp_path):
    model, ids = load(tiny), some_ids(2, 12, below=V + 1)
    model.add_flag(rank=4, alpha=8, layers=1)
    shake(model)
    assert model.n_frozen == 1
    model.logits(model(ids)).log_softmax(-1)[:, :, [3, V]].sum().backward()
    adapter = {"flag_unembed"} | {f"layers.1.{n}.lora_{x}" for n in LINEARS for x in "AB"}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == adapter
    model.save_flag(tmp_path)
    again = load(tiny)
    assert again.load_flag(tmp_path)["layers"] == 1 and again.n_frozen == 1
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    model.add_flag(rank=4, alpha=8, layers=99)  # as many as there are
    assert model.n_frozen == 0 and model.layers[0].self_attn.q_proj.lora_on


def test_the_blocks_can_be_run_in_two_goes(flagged):
    ids = some_ids(2, 9, below=V + 1)
    whole = flagged(ids)
    for k in (0, 1, 2):
        below = flagged(ids, last=k) if k else flagged.embed(ids)
        assert torch.equal(flagged(below, first=k), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flag_off_is_the_original_bit_for_bit_nests_and_comes_back(tiny, dtype):
    original, model, ids = load(tiny, dtype), load(tiny, dtype), some_ids()
    model.add_flag(2, rank=4, alpha=8)
    shake(model)
    wanted, flagged = logits_of(original, ids), logits_of(model, ids)
    assert (flagged[..., :V] - wanted).abs().max() > 0.1
    with pytest.raises(KeyError):
        with model.flag_off():
            with model.flag_off():
                assert torch.equal(logits_of(model, ids), wanted)
            assert torch.equal(logits_of(model, ids), wanted)
            raise KeyError
    assert torch.equal(logits_of(model, ids), flagged)


def test_merged_equals_unmerged(flagged):
    ids = some_ids(below=V + 1)
    unmerged = logits_of(flagged, ids)
    flagged.merge_flag()
    assert_near(logits_of(flagged, ids), unmerged, 1e-4)
    assert set(flagged.flag_parameters()) == {"flag_embed", "flag_unembed"}


def test_merging_into_bf16_rounds_the_fp32_sum_once(tiny):
    model = load(tiny, torch.bfloat16)
    model.add_flag(rank=4, alpha=8)  # scale 2 is exact
    shake(model)
    layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
    wanted = {n: (m.weight.float() + 2 * (m.lora_B @ m.lora_A)).bfloat16() for n, m in layers.items()}
    model.merge_flag()
    assert len(layers) == 14 and all(torch.equal(layers[n].weight, wanted[n]) for n in layers)


def test_an_adapter_that_is_switched_off_cannot_be_merged(flagged):
    with flagged.flag_off(), pytest.raises(ValueError, match="switched off"):
        flagged.merge_flag()


@pytest.mark.parametrize("call", ["flag_off", "add_flag", "save_flag"])
def test_after_merging_the_original_is_gone_and_says_so(flagged, call, tmp_path):
    flagged.merge_flag()
    with pytest.raises(ValueError, match="merged"):
        if call == "flag_off":
            with flagged.flag_off():
                pass
        elif call == "add_flag":
            flagged.add_flag()
        else:  # it would write flag rows without the LoRA they were trained with
            flagged.save_flag(tmp_path)


# --------------------------------------------------------------------------------------- saving the adapter

@pytest.mark.parametrize("tied, n_flags, rank", [(True, 1, 4), (False, 3, 4), (False, 1, 0), (True, 3, 0)])
def test_a_saved_adapter_comes_back_the_same(tmp_path, tied, n_flags, rank):
    write_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    model, again, ids = load(tmp_path / "base"), load(tmp_path / "base"), some_ids(below=V + n_flags)
    model.add_flag(n_flags, rank=rank, alpha=12)
    shake(model)
    model.threshold, model.debounce = 0.125, 3
    model.save_flag(tmp_path / "out", note="kept")
    info = again.load_flag(tmp_path / "out")
    assert again.threshold == info["threshold"] == 0.125 and again.debounce == info["debounce"] == 3
    assert info["note"] == "kept" and again.n_flags == n_flags
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["flag.json", "flag.safetensors"]


def test_an_adapter_from_before_debounce_flags_at_one_position(flagged, tmp_path):
    flagged.debounce = 3
    flagged.save_flag(tmp_path / "new")
    flagged.save_flag(tmp_path / "old")
    info = json.loads((tmp_path / "old" / "flag.json").read_text())
    del info["debounce"]
    (tmp_path / "old" / "flag.json").write_text(json.dumps(info))
    for folder, debounce in (("new", 3), ("old", 1), ("new", 3)):
        flagged.load_flag(tmp_path / folder)
        assert flagged.debounce == debounce


def test_other_base_weights_are_an_error_unless_forced(flagged, tmp_path):
    flagged.save_flag(tmp_path / "out")
    write_checkpoint(tmp_path / "other", seed=7)
    other = load(tmp_path / "other")
    with pytest.raises(ValueError, match="other base weights.*force"):
        other.load_flag(tmp_path / "out")
    other.load_flag(tmp_path / "out", force=True)
    for name, p in flagged.flag_parameters().items():
        assert torch.equal(other.flag_parameters()[name], p)


def change_flag(**changes):
    return lambda folder: edit_json(folder / "flag.json", **changes)


ADAPTER_ERRORS = {
    "no folder": (shutil.rmtree, "no adapter"),
    "no flag.json": (lambda folder: (folder / "flag.json").unlink(), "flag.json is missing"),
    "flag.json cut": (cut("flag.json", -20), "flag.json"),
    "flag.json a list": (write("flag.json", "[]"), "flag.json.*list"),
    "flag.json lacks rank": (change_flag(rank=None), "flag.json.*rank"),
    "another rank": (change_flag(rank=3), r"flag.safetensors.*lora_A is \[4, 32\], wanted \[3, 32\]"),
    "another n_flags": (change_flag(n_flags=2), r"flag.safetensors.*flag_embed is \[1, 32\], wanted \[2, 32\]"),
    "n_flags 0": (change_flag(n_flags=0), "flag.json.*n_flags"),
    "n_flags a word": (change_flag(n_flags="one"), "flag.json.*n_flags"),
    "layers a word": (change_flag(layers="two"), "flag.json.*layers is 'two'"),
    "fewer layers": (change_flag(layers=1), "flag.safetensors.*layers.0"),
    "rank below 0": (change_flag(rank=-4), "flag.json.*rank"),
    "alpha a word": (change_flag(alpha="much"), "flag.json.*alpha"),
    "threshold a word": (change_flag(threshold="high"), "flag.json.*threshold"),
    "debounce 0": (change_flag(debounce=0), "flag.json.*debounce"),
    "no weights": (lambda folder: (folder / "flag.safetensors").unlink(), "flag.safetensors"),
    "weights cut": (cut("flag.safetensors"), "flag.safetensors"),
    "weights cut in the header": (cut("flag.safetensors", 30), "flag.safetensors"),
}


@pytest.mark.parametrize("name", ADAPTER_ERRORS)
def test_a_damaged_adapter_is_an_error(flagged, tiny, tmp_path, name):
    spoil, message = ADAPTER_ERRORS[name]
    flagged.save_flag(tmp_path / "out")
    spoil(tmp_path / "out")
    model = load(tiny)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.load_flag(tmp_path / "out")
    assert model.n_flags == 0 and not model.flag_parameters()
