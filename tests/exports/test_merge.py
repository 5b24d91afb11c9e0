"""Merging an adapter replaces weights and nothing else: file by file, tensor by tensor, beside W + scale B A."""
import json, os, types

import numpy as np
import pytest
import torch
from conftest import SMALL, command, fingerprint, one_line, save_tiny, tiny_model, tiny_tokenizer
from helpers import random_adapters
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import make_run
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, conversion_mapping)
from transformers.core_model_loading import Chunk, Concatenate, WeightConverter, WeightRenaming

import export
from bases import Base, load_base, resolve
from eval import adapters_of
from exports.merge import changes_of, copy_rest, loaded_as, merged, save_converted, save_merged
from runtime.files import BadInput


def merge(folder, model, dtype=torch.float32, change=lambda tensors: tensors, modules="q k v o gate up down".split(), **options):
    """A model is saved in `folder`/base, its tensors changed, and merged into `folder`/out -> (tensors before, after, what
    task 1 of the adapters adds to each layer {path: [d_out, d_in]})."""
    model.save_pretrained(folder / "base", **options)
    tiny_tokenizer().save_pretrained(folder / "base")
    for path in (folder / "base").glob("*.safetensors"):
        save_file(change(load_file(path)), path, {"format": "pt", "made": "here"})
    base = load_base(str(folder / "base"), dtype=dtype)
    adapters = random_adapters(base, modules=[m for m in modules if m in base.kinds])
    added = {path: 2.0 * B[1].numpy() @ A[1].numpy() for path, (A, B) in base.factors(adapters).items()}
    base.unpatch()
    (folder / "out").mkdir()
    save_merged(folder / "out", folder / "base", base, adapters, 1, dtype)
    before, after = ({k: v for path in (folder / which).glob("*.safetensors") for k, v in load_file(path).items()}
                     for which in ("base", "out"))
    assert before.keys() == after.keys()
    return before, after, added


def assert_merged(before, after, added, names=None):
    """Adapted weights are W + scale B A, and all others the same. names: {path: its name in the files}."""
    wanted = {f"{(names or {}).get(path, path)}.weight": delta for path, delta in added.items()}
    for key, W in before.items():
        if key in wanted:
            assert after[key].dtype == torch.float32
            np.testing.assert_allclose(after[key].numpy(), W.double().numpy() + wanted.pop(key), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(after[key], W.float()), key
    assert not wanted


EXTRAS = {"chat_template.jinja": "{{ messages }}", "LICENSE": "free", "preprocessor_config.json": "{}", "modeling_x.py": "1",
          "assets/a/notes.md": "n", "README.md": "the base's own", ".gitattributes": "*", "tokenizer.model": "\0"}
LEFT = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "x-Q8_0.gguf", "onnx/model.onnx",
        "tf_model.h5", "flax_model.msgpack", "original/consolidated.00.pth", ".git/HEAD", ".cache/huggingface/lock"]


def test_every_other_file_arrives_byte_for_byte(tmp_path, capsys):
    base = save_tiny(tmp_path / "tiny")
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]                              # as transformers 4 wrote it
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "torch_dtype": "bfloat16"}))
    (base / "generation_config.json").write_text('{"eos_token_id":[3, 2],"top_k" :  7, "do_sample": true}')
    for name, text in {**EXTRAS, **dict.fromkeys(LEFT, "{}")}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    (base / "linked").symlink_to(tmp_path / "tiny" / "assets")
    (base / "assets" / "circle").symlink_to(base)
    run, where = make_run(tmp_path, base)
    argv = ["--run", run, "--to", "tiny", "--task", "two", "--merge"]
    assert command(export, *argv, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "not merged and left out: consolidated.safetensors, flax_model.msgpack, onnx/model.onnx" in printed
    old, new = fingerprint(base), fingerprint(tmp_path / "out")
    assert set(new) == set(old) - set(LEFT) | {"linked/a/notes.md"}
    assert {name for name in new if new[name] != old.get(name, new[name])} == {"model.safetensors", "README.md"}
    assert export.MARK in (tmp_path / "out" / "README.md").read_text()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.rope_parameters["rope_theta"] == theta
    assert model.generation_config.eos_token_id == [3, 2] and model.generation_config.top_k == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2").input_ids == [5, 6]
    capsys.readouterr()
    (tmp_path / "README.md").write_text(export.LIST.format('["README.md"]'))
    (base / "README.md").write_text(export.LIST.format('["README.md"]'))  # itself a merged model
    for out in (base, base / "new", tmp_path):                                       # the base would be overwritten
        assert command(export, *argv, "--out", out, "--overwrite") == 2
        one_line(capsys, ["the base", "--out"])
    assert {**fingerprint(base), "README.md": old["README.md"]} == old


def test_shards_index_and_metadata_stay(tmp_path):
    before, after, added = merge(tmp_path, tiny_model("llama", dtype=torch.bfloat16), max_shard_size="12KB")
    assert_merged(before, after, added)
    names = [path.name for path in (tmp_path / "base").glob("model*")]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").glob("model*")) and len(names) > 3
    for name in names:
        if name.endswith(".safetensors"):
            old, new = (safe_open(tmp_path / which / name, "pt") for which in ("base", "out"))
            assert list(old.keys()) == list(new.keys()) and old.metadata() == new.metadata() == {"format": "pt", "made": "here"}
    old, new = (json.loads((tmp_path / which / "model.safetensors.index.json").read_text()) for which in ("base", "out"))
    assert old["weight_map"] == new["weight_map"]
    assert new["metadata"]["total_size"] == 2 * old["metadata"]["total_size"]        # bfloat16 -> float32


def test_tensors_that_the_model_does_not_use_arrive_in_dtype(tmp_path):
    extra = {"mtp.layers.0.q_proj.weight": torch.randn(4, 4).half(), "mtp.ids": torch.arange(3)}
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True))         # its files hold no head
    before, after, added = merge(tmp_path, model, torch.bfloat16, lambda tensors: {**tensors, **extra}, ["q", "v"])
    assert "lm_head.weight" not in after and torch.equal(after["mtp.ids"], extra["mtp.ids"])
    for key, W in before.items():
        want = W.float() + torch.from_numpy(added[path]) if (path := key.removesuffix(".weight")) in added else W
        assert torch.equal(after[key], want if key == "mtp.ids" else want.to(torch.bfloat16)), key   # rounded once


def test_conv1d_under_the_names_of_an_old_checkpoint(tmp_path):
    """GPT-2's files lack the prefix of the model's class; its layers hold q, k and v in one weight, transposed."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=64, vocab_size=64))
    before, after, added = merge(tmp_path, model, change=lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()})
    assert "h.1.attn.c_attn.weight" in before and len(added) == 8
    assert_merged(before, after, {path: delta.T for path, delta in added.items()},
                  {path: path.removeprefix("transformer.") for path in added})


def test_weights_that_transformers_fuses_or_splits(tmp_path, monkeypatch):
    """The files of a made-up qwen3 hold q, k and v in one tensor, as gate and up; those of a phi3 the latter in two."""
    conversion_mapping.get_checkpoint_conversion_mapping("qwen3")                    # builds the cache
    known = conversion_mapping._checkpoint_conversion_mapping_cache
    def split_from(name):
        parts = [f"self_attn.{m}_proj.weight" for m in "qkv"]
        return WeightConverter([f"self_attn.{name}.weight"], parts, operations=[Chunk(dim=0)])
    fuse = WeightConverter(["mlp.gate_proj.weight", "mlp.up_proj.weight"], ["mlp.gate_up_proj.weight"], operations=[Concatenate(dim=0)])
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    both = WeightConverter(["mlp.both.weight"], parts, operations=[Chunk(dim=0)])
    monkeypatch.setitem(known, "qwen3", [split_from("qkv"), both]), monkeypatch.setitem(known, "phi3", [fuse])
    sizes = {**SMALL, "num_key_value_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    before, after, added = merge(tmp_path / "a", model, modules=["q", "v", "up", "down"])
    for layer in (f"model.layers.{k}" for k in range(3)):
        q, v, up = (added.pop(f"{layer}.{m}_proj") for m in ("self_attn.q", "self_attn.v", "mlp.up"))
        added[f"{layer}.self_attn.qkv"] = np.concatenate([q, 0 * q, v])
        added[f"{layer}.mlp.both"] = np.concatenate([0 * up, up])
    assert_merged(before, after, added)
    phi = Phi3ForCausalLM(Phi3Config(**{k: v for k, v in sizes.items() if k != "head_dim"}, pad_token_id=0))
    before, after, added = merge(tmp_path / "b", phi)
    for layer in (f"model.layers.{k}.mlp" for k in range(3)):
        added[f"{layer}.gate_proj"], added[f"{layer}.up_proj"] = np.split(added.pop(f"{layer}.gate_up_proj"), 2)
    assert_merged(before, after, added)
    # Where layers have one weight under two names, the reverse of loading gives one name for both.
    def two_names(tensors):
        monkeypatch.setitem(known, "qwen3", [split_from("qkv"), split_from("other")])
        return {name.replace("layers.1.self_attn.qkv", "layers.1.self_attn.other"): t for name, t in tensors.items()}
    monkeypatch.setitem(known, "qwen3", [split_from("qkv")])
    with pytest.raises(BadInput, match="--merge: the files of .*/c/base have no .*self_attn.(qkv|other).weight, which"):
        merge(tmp_path / "c", Qwen3ForCausalLM(Qwen3Config(**sizes)), change=two_names)


def test_the_weights_that_config_json_names_are_merged(tmp_path, capsys):
    """Shards in a folder of their own; model.safetensors is an earlier model's. The index stays while the size does."""
    base, own = save_tiny(tmp_path / "base"), tmp_path / "base" / "own" / "parts"
    own.mkdir(parents=True)
    parts = [dict(list(load_file(base / "model.safetensors").items())[k::2]) for k in range(2)]
    files = [f"own/parts/{k}.safetensors" for k in range(2)]
    weight_map = {name: file for file, part in zip(files, parts) for name in part}
    index = dict(metadata=dict(total_size=1), weight_map=weight_map)
    for file, part in zip(files, parts):
        save_file(part, base / file)
    (base / "own" / "x.safetensors.index.json").write_text(json.dumps(index, indent=5))
    tiny_model(seed=1).save_pretrained(base)                                         # overwrites config.json
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": "own/x.safetensors.index.json"}))
    loaded = load_base(str(base))
    adapters = random_adapters(loaded, modules=["q"])
    added = {path: 2.0 * B[1].numpy() @ A[1].numpy() for path, (A, B) in loaded.factors(adapters).items()}
    loaded.unpatch()
    save_merged(tmp_path / "out", base, loaded, adapters, 1, torch.float32)
    before, after = ({name: t for file in files for name, t in load_file(tmp_path / which / file).items()}
                     for which in ("base", "out"))
    assert_merged(before, after, added)
    old, new = fingerprint(base), fingerprint(tmp_path / "out")
    assert new.keys() == old.keys() - {"model.safetensors"}
    assert [name for name in new if new[name] != old[name]] == files
    assert "left out: model.safetensors" in capsys.readouterr().out


def test_weights_that_transformers_keeps_wide_stay_wide(tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen3ForCausalLM, "_keep_in_fp32_modules_strict", {"up_proj", "input_layernorm"})
    before, after, added = merge(tmp_path, tiny_model(), torch.bfloat16, modules=["q", "up"])
    for key, W in before.items():
        want = W + torch.from_numpy(added[path]) if (path := key.removesuffix(".weight")) in added else W
        wide = "up_proj" in key or "input_layernorm" in key
        torch.testing.assert_close(after[key], want if wide else want.bfloat16())


def test_what_cannot_be_merged_is_refused(tmp_path, capsys, monkeypatch):
    def large(tensors):
        return {k: 1e5 * v if "layers.1.mlp.up" in k else v for k, v in tensors.items()}
    model = tiny_model()
    merge(tmp_path / "32", model, change=large)
    with pytest.raises(BadInput, match="layers.1.mlp.up_proj.weight is not finite as float16; try --dtype float32"):
        merge(tmp_path / "16", model, torch.float16, large)
    base = load_base(str(tmp_path / "32" / "base"))
    adapters = random_adapters(base)
    base.unpatch()
    weights = tmp_path / "32" / "base" / "model.safetensors"
    save_file({k: -v for k, v in load_file(weights).items()}, weights)               # while it is loaded
    with pytest.raises(BadInput, match="weight in the base's files is not the weight that transformers loads"):
        save_merged(tmp_path / "32" / "out", tmp_path / "32" / "base", base, adapters, 0, torch.float32)
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny"))
    load = export.reload_base
    def quantised(*args, **options):
        base = load(*args, **options)
        base.provenance["quantize"] = "fp8"
        return base
    monkeypatch.setattr(export, "reload_base", quantised)
    argv = ["--run", run, "--to", "tiny", "--task", "two", "--out", tmp_path / "out"]
    assert command(export, *argv, "--merge") == 2 and not (tmp_path / "out").exists()
    one_line(capsys, ["--merge needs weights that are not quantised", "tiny", "fp8"])
    assert command(export, *argv) == 0


def test_a_base_without_safetensors_is_saved_by_transformers(tmp_path):
    """As that of a .gguf file: its class writes weights, config and tokenizer, and where generation stops."""
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny", "llama"), ("q", "down"))
    base = load_base(str(where))
    base.model.config.eos_token_id = 3
    adapters = adapters_of(run, "portal", "tiny", base)
    added = {path: 2.0 * B[1].numpy() @ A[1].numpy() for path, (A, B) in base.factors(adapters).items()}
    base.unpatch()
    save_converted(tmp_path / "out", resolve(str(where)), base, adapters, 1)
    assert_merged(load_file(where / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"), added)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 3
    assert "tokenizer.json" in os.listdir(tmp_path / "out")


def test_what_a_tensor_is_stored_as():
    """Numbers that are not finite in the base already, such as a mask's, stay; new ones are refused."""
    one, big, low = torch.ones(2, 2), torch.full((2, 2), 7e4), torch.full((2, 2), -torch.inf)
    assert torch.equal(merged("k", torch.ones(2, dtype=torch.int64), None, torch.float16), torch.ones(2, dtype=torch.int64))
    assert merged("k", one, None, torch.float16).dtype == torch.float16 and torch.equal(merged("k", low, None, torch.float16), low.half())
    half = one.bfloat16()                                                            # rounded once, after the sum
    assert torch.equal(merged("k", half, lambda: (one, one / 512), torch.bfloat16), half + 0) and torch.equal(
        merged("k", half, lambda: (one, one / 512), torch.float32), one + one / 512)
    for tensor, change in ((big, None), (big, lambda: (big, one)), (one, lambda: (one, big)), (low, lambda: (low, one)), (one, lambda: (one, low))):
        with pytest.raises(BadInput, match="--merge: k is not finite as float16; try --dtype float32 or bfloat16"):
            merged("k", tensor, change, torch.float16)
    for W in (one + 1, torch.ones(4), torch.ones(2)):                                # another number, another shape
        with pytest.raises(BadInput, match="k in the base's files is not the weight that transformers loads"):
            merged("k", one, lambda W=W: (W, one), torch.float32)


@pytest.mark.parametrize("metadata", [{"total_size": 8}, {"other": 1}, None])
@pytest.mark.parametrize("after", [8, 16])
def test_the_index_of_the_merged_shards_is_copied_with_their_size(tmp_path, capsys, metadata, after):
    base, out, files = tmp_path / "base", tmp_path / "out", {"a.safetensors", "b.safetensors"}
    base.mkdir(), out.mkdir()
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}, **({"metadata": metadata} if metadata else {})}
    others = {"weight_map": {"x": "c.safetensors"}}                                  # of weights that are not merged
    for name, value in {"model.safetensors.index.json": index, "other.safetensors.INDEX.JSON": others,
                        "pytorch_model.bin.index.json": others}.items():
        (base / name).write_text(json.dumps(value, indent=5))
    for name in (*files, "MODEL.BIN", "README.md", "notes.md", "notes.index.json"):
        (base / name).write_text(name)
    copy_rest(base, out, files, 8, after)
    assert {p.name for p in out.iterdir()} == {"model.safetensors.index.json", "notes.md", "notes.index.json"}
    text = (out / "model.safetensors.index.json").read_text()
    if metadata and "total_size" in metadata and after != 8:
        assert json.loads(text) == {**index, "metadata": {"total_size": 16}}
    else:
        assert text == (base / "model.safetensors.index.json").read_text()
    assert "left out: MODEL.BIN, other.safetensors.INDEX.JSON, pytorch_model.bin.index.json\n" in capsys.readouterr().out
    for name in ("MODEL.BIN", "other.safetensors.INDEX.JSON", "pytorch_model.bin.index.json"):
        (base / name).unlink()
    copy_rest(base, tmp_path / "again", files, 8, 8)
    assert not capsys.readouterr().out


def test_files_outside_of_the_base_are_not_written(tmp_path):
    base = load_base(str(save_tiny(tmp_path / "base")))
    adapters = random_adapters(base)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "base" / "inside.safetensors").touch()
    for name in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        index = {"weight_map": {"x": name, "y": "inside.safetensors"}}
        (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match="base: its weights are in files outside of it"):
            save_merged(tmp_path / "out", tmp_path / "base", base, adapters, 0, torch.float32)


def test_weights_without_the_models_prefix_keep_their_names(tmp_path):
    """As a checkpoint of the inner model has them, beside the head's."""
    strip = lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()}
    before, after, added = merge(tmp_path, tiny_model(), change=strip)
    assert "layers.0.self_attn.q_proj.weight" in before
    assert_merged(before, after, added, {path: path.removeprefix("model.") for path in added})


def test_layers_that_share_a_module_have_one_weight_under_either_name():
    model = tiny_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    base = Base(model, tiny_tokenizer())
    adapters = random_adapters(base, modules=["gate"])
    paths = [f"model.layers.{k}.mlp.gate_proj" for k in range(3)]
    want = {path: 2.0 * B[1] @ A[1] for path, (A, B) in base.factors(adapters).items()}
    assert list(want) == [paths[0], paths[2]]
    base.unpatch()
    for held in (paths[0], paths[1]):
        names = {f"{path}.weight": (f"{path}.weight", None) for path in (held, paths[2])}
        changes = changes_of(base, adapters, 1, names, "x")
        assert changes.keys() == names.keys()
        for key, path in ((f"{held}.weight", paths[0]), (f"{paths[2]}.weight", paths[2])):
            W, delta = changes[key]()
            assert W is base.linears[path].weight
            torch.testing.assert_close(delta, want[path])


def test_a_name_that_the_model_has_is_not_renamed_to_one_that_it_lacks(tmp_path):
    state = {name: torch.ones(1) for name in ("a.old.weight", "b.new.weight", "c.new.weight", "c.old.weight")}
    model = types.SimpleNamespace(_weight_conversions=[WeightRenaming("old.", "new.")], base_model_prefix="model",
                                  state_dict=lambda: state)
    want = {"a.old.weight": "a.old.weight", "b.old.weight": "b.new.weight", "c.old.weight": "c.new.weight",
            "d.old.weight": "d.new.weight"}
    save_file({name: torch.ones(1) for name in want}, tmp_path / "x.safetensors")
    assert loaded_as(model, [tmp_path / "x.safetensors"]) == {key: (name, None) for key, name in want.items()}
