"""PEFT folders are read as what PEFT makes of them: beside our own export, and beside PEFT's own model."""
import peft, pytest, torch
from conftest import one_line, tiny_base, tiny_model
from helpers import random_adapters
from test_export import BASES

from bases import Item
from data import collate
from exports.peft import load_peft, save_peft
from runtime.files import BadInput, read_json, write_json
from runtime.saved import load_tensors, save_tensors
from tasks.rows import Row

BATCH = collate([Item(t, [5, 6, 7, 8, 9], [[10, 11, 12]], Row("t", "", [], 0)) for t in (1, 0, 1)])


@pytest.mark.parametrize("name, modules", [("experts", "q gate down"), ("fused", "o v q k"), ("convolutions", "q gate"), ("conv1d", "up down q k v"),
                                           ("tiny", "q k v o gate up down")])
@torch.no_grad()
def test_what_was_exported_is_read_again(tmp_path, name, modules):
    base = BASES[name]() if name in BASES else tiny_base("gemma3-multimodal")
    base.provenance["id"] = base.name
    adapters = random_adapters(base, tasks=2, modules=modules.split())
    for t, task in enumerate(("one", "two")):
        save_peft(tmp_path / task, base, dict(id="org/base", revision=None), adapters, t)
    read = load_peft(tmp_path, base, ["two", "one"])
    want = base.logits(BATCH, adapters.map(lambda a: a.flip(0)))                     # the order of the tasks asked for
    torch.testing.assert_close(base.logits(BATCH, read), want, rtol=1e-4, atol=1e-4)
    assert (want - base.logits(BATCH)).abs().max() > 0.01 and all(a.dtype == torch.float32 for a in read.tensors())


@torch.no_grad()
def peft_folder(folder, model, seed, **config):
    """Saves a random LoRA as PEFT does -> PEFT's logits of BATCH's first row."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return model(input_ids=BATCH.ids[:1]).logits[0, 4:]


@pytest.mark.parametrize("make", [tiny_base, BASES["fused"]])
@torch.no_grad()
def test_ranks_scales_and_targets_that_differ(tmp_path, make):
    """Also a LoRA on the whole of a fused matrix."""
    q, up = ("q_proj", "up_proj") if make is tiny_base else ("qkv_proj", "gate_up_proj")
    want = {1: peft_folder(tmp_path / "one", make().unpatch(), 1, r=3, lora_alpha=5, target_modules=[q, "down_proj"],
                           rank_pattern={f"layers.1.self_attn.{q}": 6}, alpha_pattern={"down_proj": 7, f"layers.[12].self_attn.{q}": 9}),
            0: peft_folder(tmp_path / "two", make().unpatch(), 2, r=4, lora_alpha=3, target_modules=rf".*\.0\.(self_attn\.o_proj|mlp\.{up})", use_rslora=True)}
    base = make()
    got = base.logits(BATCH, load_peft(tmp_path, base, ["two", "one"])).view(3, 3, -1)    # three rows of tasks 1, 0, 1
    for row, t in zip(got, (1, 0, 1), strict=True):
        torch.testing.assert_close(row, want[t], rtol=1e-4, atol=1e-4)
    assert all((row - bare).abs().max() > 0.1 for row, bare in zip(got, base.logits(BATCH).view(3, 3, -1)))


def test_what_is_no_plain_lora_of_the_base_is_refused(tmp_path, capsys):
    peft_folder(tmp_path / "one", tiny_model(), 1, r=3, target_modules=["q_proj"])
    config, tensors = read_json(tmp_path / "one" / "adapter_config.json"), load_tensors(tmp_path / "one" / "adapter_model.safetensors")
    base, name = tiny_base(), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    def refused(words, changed={}, more={}):
        write_json(tmp_path / "one" / "adapter_config.json", {**config, **changed})
        save_tensors(tmp_path / "one" / "adapter_model.safetensors", {k: v for k, v in {**tensors, **more}.items() if v is not None})
        with pytest.raises(BadInput, match=words):
            load_peft(tmp_path, base, ["one"])
    refused("use_dora True; only plain", dict(use_dora=True))
    refused("bias 'all'", dict(bias="all"))
    refused(r"modules_to_save \['lm_head'\]", dict(modules_to_save=["lm_head"]))
    refused("init_lora_weights 'pissa'", dict(init_lora_weights="pissa"))            # changes the base's weights, too
    refused("peft_type 'IA3'", dict(peft_type="IA3"))
    refused("lora_alpha None", dict(lora_alpha=None))
    refused("r need", dict(r=4))
    refused("r need", more={name: torch.zeros(3, 23)})                               # of a narrower base
    refused("r need", more={name: None})
    refused("lora_magnitude_vector", more={name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)})
    refused("lm_head is no projection", more={"base_model.model.lm_head.lora_A.weight": torch.ones(3, 24)})
    refused("holds no LoRA", more=dict.fromkeys(tensors))
    with pytest.raises(BadInput, match="two: no PEFT adapter; a folder for each task"):
        load_peft(tmp_path, base, ["two"])
    write_json(tmp_path / "one" / "adapter_config.json", {**config, "base_model_name_or_path": "org/other"})
    save_tensors(tmp_path / "one" / "adapter_model.safetensors", tensors)
    capsys.readouterr()
    load_peft(tmp_path, base, ["one"])
    one_line(capsys, ["warning", "org/other", "tiny"])
