"""What is loaded is complete and what its files say, or refused with the cause: weights, adapters, shards, quantisation."""
import contextlib, itertools, json, types

import pytest, safetensors.torch, torch
from conftest import SMALL, TRAIN, command, one_line, save_tiny, tiny_model, tiny_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from test_tokens import sentencepiece
from transformers import (AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GptOssConfig, GptOssForCausalLM, LlavaConfig, PreTrainedTokenizerFast, Qwen3_5Config, Qwen3Config,
                          Qwen3ForCausalLM, YoutuConfig, YoutuForCausalLM)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import train
from bases import auto_class, load_base, load_tokenizer
from bases.files import check_values, dequantised, fingerprint, quantisation
from bases.load import Source, four_bits, reading
from runtime.files import BadInput


def change_weights(folder, change, name="model.safetensors"):
    safetensors.torch.save_file(change(safetensors.torch.load_file(folder / name)), folder / name, {"format": "pt"})


def change_config(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def without(*words):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(word in name for word in words)}


def renamed(prefix):
    return lambda tensors: {prefix + name: t for name, t in tensors.items()}


def beside(**more):
    return lambda tensors: {**tensors, **{name.replace("__", "."): torch.ones(shape) for name, shape in more.items()}}


@pytest.mark.parametrize("change, words", [
    (without("lm_head"), "lack lm_head.weight \\(1 in all"), (without("layers.1."), "lack model.layers.1.*11 in all"),
    (without("layers.2.mlp.up_proj"), "lack model.layers.2.mlp.up_proj.weight"), (without("norm"), "lack .*norm.weight"),
    (renamed("_orig_mod."), "lack .*they have instead _orig_mod.lm_head.weight"), (renamed("module."), "instead module."),
    (beside(model__layers__3__mlp__up_proj__weight=(40, 24)), "does not know model.layers.3.mlp.up_proj.weight"),
    (beside(model__layers__0__self_attn__q_proj__bias=(32,)), "does not know model.layers.0.self_attn.q_proj.bias"),
    (beside(model__layers__0__self_attn__sinks=(4,)), "does not know model.layers.0.self_attn.sinks"),
    (beside(lm_head__bias=(64,)), "does not know lm_head.bias"),
    (lambda tensors: {**tensors, "model.norm.weight": torch.ones(25)}, "model.norm.weight|mismatch|size"),
])
def test_weights_that_transformers_would_draw_or_drop_are_named(tmp_path, change, words):
    folder = save_tiny(tmp_path / "base")
    change_weights(folder, change)
    with pytest.raises(BadInput, match=f"base.*{words}"):
        load_base(str(folder))


def test_parts_that_the_model_does_not_have_may_be_in_its_files(tmp_path, capsys):
    folder = save_tiny(tmp_path / "base")
    want = load_base(str(folder)).model.state_dict()
    assert not "".join(capsys.readouterr())                                          # nothing to say of a whole base
    change_weights(folder, beside(mtp__layers__0__q_proj__weight=(4, 4), vision_tower__layers__0__mlp__bias=(4,), model__mtp__head=(2,),
                                  model__layers_of_another__0__weight=(3,)))
    got = load_base(str(folder)).model.state_dict()
    assert "not used of its files: model.layers_of_another.0.weight, model.mtp.head, mtp.layers.0.q_proj.weight ... (4 in all)" in capsys.readouterr().out
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("kept", ["lm_head", "model.embed_tokens", "both"])
def test_a_tied_head_may_be_left_out_and_two_different_ones_are_both_used(tmp_path, kept):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base"), tiny_tokenizer().save_pretrained(tmp_path / "base")
    table, head = model.get_input_embeddings().weight.detach(), torch.randn(64, 24)
    change_weights(tmp_path / "base", lambda tensors: {
        **without("lm_head", "embed_tokens")(tensors),
        **({"lm_head.weight": head, "model.embed_tokens.weight": table} if kept == "both" else {f"{kept}.weight": table})})
    base = load_base(str(tmp_path / "base"))
    assert torch.equal(base.model.get_input_embeddings().weight, table)
    assert torch.equal(base.model.get_output_embeddings().weight, head if kept == "both" else table)


def test_a_command_refuses_in_one_line_and_saves_nothing(world, capsys):
    change_weights(world / "base-b", without("layers.1."))
    capsys.readouterr()
    assert command(train, *TRAIN) == 2
    one_line(capsys, ["base-b", "lack", "model.layers.1.input_layernorm.weight"])
    assert not (world / "out" / "base-a+base-b").exists()


def shards(folder):
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return sorted(folder.glob("*-of-*.safetensors"))


def test_files_that_are_a_part_of_something_are_refused_with_the_cause(tmp_path):
    parts = shards(tmp_path / "base")
    assert len(parts) > 2
    whole = load_base(str(tmp_path / "base"))
    assert torch.equal(whole.model.lm_head.weight, tiny_model().lm_head.weight)
    with pytest.raises(BadInput, match="a file; name its folder"):
        load_base(str(parts[0]))
    parts[1].rename(tmp_path / parts[1].name)
    with pytest.raises(BadInput, match=rf"index.json lists {parts[1].name}, not in the folder \(1 of {len(parts)} shards\)"):
        load_base(str(tmp_path / "base"))
    index = tmp_path / "base" / "model.safetensors.index.json"
    for text in ('{"weight_map": {}}', "{}"):
        index.write_text(text)
        with pytest.raises(BadInput, match="index.json lists no files"):
            load_base(str(tmp_path / "base"))
    for text in ("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(BadInput, match="index.json: not an index of shards; it needs a weight_map"):
            load_base(str(tmp_path / "base"))
    index.unlink()
    with pytest.raises(BadInput, match=f"no model.safetensors .*but {parts[0].name}.*shards need their index"):
        load_base(str(tmp_path / "base"))
    (tmp_path / "split-00001-of-00002.gguf").touch()
    with pytest.raises(BadInput, match="one part of a split file; llama-gguf-split --merge"):
        load_base(str(tmp_path / "split-00001-of-00002.gguf"))


def test_the_file_that_config_json_names_is_the_one(tmp_path):
    folder = save_tiny(tmp_path / "base")
    change_config(folder, transformers_weights="own.safetensors")
    with pytest.raises(BadInput, match="base .*base has no own.safetensors but model.safetensors; weights"):
        load_base(str(folder))
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(folder / "own.safetensors")
    base, other = load_base(str(folder)), fingerprint(folder, [folder / "own.safetensors"])
    assert torch.equal(base.model.lm_head.weight, tiny_model(seed=1).lm_head.weight) and base.provenance["fingerprint"] == other


def test_two_sets_of_weights_in_a_folder_are_refused(tmp_path):
    """transformers would take the single file, which may be what an earlier model left behind."""
    shards(tmp_path / "base")
    safetensors.torch.save_file({name: t.clone() for name, t in tiny_model(seed=1).state_dict().items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(BadInput, match="two sets of weights, model.safetensors and model.safetensors.index.json"):
        load_base(str(tmp_path / "base"))


def test_what_is_no_language_model_is_refused(tmp_path, capsys):
    """A classifier's file lacks nothing where the head for words is tied."""
    folder = save_tiny(tmp_path / "base")
    change_config(folder, architectures=["Qwen3ForSequenceClassification"])
    with pytest.raises(BadInput, match="base 'base' is no language model: its config.json says Qwen3ForSequenceClassification"):
        load_base(str(folder))
    change_config(folder, architectures=["Qwen3ForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert load_base(str(folder)) and "its own code (auto_map in config.json) is not run" in capsys.readouterr().out


@pytest.mark.parametrize("bad, words", [(float("nan"), "model.norm.weight is not finite in model.safetensors"),
                                        (float("-inf"), "model.norm.weight is not finite in model.safetensors"),
                                        (3e38, "its logits are not finite in float32; try another --dtype")])
def test_weights_that_are_not_finite_are_named_as_such(tmp_path, bad, words):
    folder = save_tiny(tmp_path / "base")
    change_weights(folder, lambda tensors: {**tensors, "model.norm.weight": torch.full((24,), bad)})
    with pytest.raises(BadInput, match=words):
        load_base(str(folder)).packs


def test_other_shapes_than_the_configs_are_named(tmp_path):
    folder = save_tiny(tmp_path / "base")
    change_config(folder, vocab_size=70)
    with pytest.raises(BadInput, match="its config.json gives another shape to lm_head.weight, model.embed_tokens.weight .2 in all"):
        load_base(str(folder))


def test_a_float64_file_is_no_packed_one(tmp_path):
    folder = save_tiny(tmp_path / "base")
    change_weights(folder, lambda tensors: {name: t.double() for name, t in tensors.items()})
    assert torch.equal(load_base(str(folder)).model.lm_head.weight, tiny_model().lm_head.weight)


# ------------------------------------------------------------------------------------------------ the tokenizer
def test_the_eos_of_generation_config_serves_a_tokenizer_without_one(tmp_path):
    folder = save_tiny(tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(folder, eos_token_id=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert load_tokenizer(str(folder)).eos_token == "<eos>"
    before = fingerprint(folder, [])
    (folder / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 2.0}')
    assert load_tokenizer(str(folder)).eos_token == "<eos>" and fingerprint(folder, [])["tokenizer"] != before["tokenizer"]
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(BadInput, match="base 'base': generation_config.json is not readable"):
        load_tokenizer(str(folder))
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(str(folder)).eos_token is None and fingerprint(folder, [])["tokenizer"] != before["tokenizer"]


def test_a_base_without_its_tokenizer_is_refused(tmp_path):
    """transformers makes one of no words, to which every text is unknown."""
    folder = save_tiny(tmp_path / "base", "gemma3")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadInput, match="base 'base' has no tokenizer: .*has none of .*tokenizer.json"):
        load_base(str(folder))


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_split_of_words_is_that_of_tokenizer_json(tmp_path, tokenizer_class, architecture):
    """Single digits here, which these classes would split in their own way."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}| ?[^\s\p{N}]+|\s+"), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    own.decoder = decoders.ByteLevel()
    text = "in 1234 12 34 don't can't " * 20
    own.train_from_iterator([text], trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    own.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    folder = save_tiny(tmp_path / "base", architecture)
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class=tokenizer_class, eos_token="<eos>")))
    change_config(folder, vocab_size=512)
    tokenizer = load_tokenizer(str(folder))
    for text in ("in 1234 don't", "12 34", " can't"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text, add_special_tokens=False).ids
    added = {"330": dict(content="naïve", special=False)}
    settings = dict(tokenizer_class=tokenizer_class, added_tokens_decoder=added)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))              # a word that tokenizer.json lacks
    with pytest.raises(BadInput, match="base 'base': transformers does not read its tokenizer.json as the file says"):
        load_tokenizer(str(folder))


def test_a_tokenizer_may_have_no_tokenizer_json(tmp_path):
    """Words and merges in two files of their own, or bytes, which need no file."""
    folder = save_tiny(tmp_path / "base", "llama")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    words = {word: k for k, word in enumerate(["a", "b", "c", "ab", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words)), (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert load_tokenizer(str(folder))("abcab", add_special_tokens=False).input_ids == [3, 2, 3]
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    change_config(folder, vocab_size=512)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(str(folder))("ab", add_special_tokens=False).input_ids == [ord("a") + 3, ord("b") + 3]


def test_a_sentencepiece_tokenizer_keeps_its_class(tmp_path):
    """Its file alone would mark the start of a text that begins with a space twice."""
    folder = save_tiny(tmp_path / "base", "llama")
    sentencepiece().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                                                  legacy=False)))
    change_config(folder, vocab_size=4096)
    want = AutoTokenizer.from_pretrained(folder)
    got, file = load_tokenizer(str(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert type(got) is type(want) is not PreTrainedTokenizerFast and got(" who 日").input_ids == want(" who 日").input_ids
    assert got(" who 日", add_special_tokens=False).input_ids != file.encode(" who 日", add_special_tokens=False).ids


def test_an_adapter_in_the_folder_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "base")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BadInput, match="base 'base' holds an adapter, too .*adapter_config.json"):
        load_base(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match="no config.json; it holds an adapter"):
        load_base(str(folder))


# ------------------------------------------------------------------------------------------------ quantised files
def test_how_files_are_quantised_is_read_from_the_config():
    def config(own=None, text=None):
        inner, outer = (types.SimpleNamespace(**({"quantization_config": each} if each else {}))
                        for each in (text, own))
        outer.get_text_config = lambda: inner
        return outer
    four, eight = dict(quant_method="bitsandbytes", load_in_4bit=True), dict(quant_method="bitsandbytes", load_in_8bit=True)
    fp8 = types.SimpleNamespace(to_dict=lambda: dict(quant_method="fp8"))
    for given, want in ((config(), None), (config(four), "4bit"), (config(eight), "8bit"), (config(None, fp8), "fp8"), (config(fp8), "fp8")):
        assert quantisation("base", given) == want
    assert dequantised(config(None, fp8)).get_text_config().quantization_config == dict(quant_method="fp8", dequantize=True)
    assert dequantised(config(fp8)).quantization_config == dict(quant_method="fp8", dequantize=True)
    source = Source("base", "/base", None, None, "/base")
    cpu = {"": torch.device("cpu")}
    for own, asked, how, options in ((None, None, None, {}), (fp8, None, "fp8", {}), (fp8, "fp8", "fp8", {}), (four, "4bit", "4bit", {"device_map": cpu}),
                                     (eight, None, "8bit", {"device_map": cpu})):
        found, given = reading(source, config(own), "cpu", torch.float16, asked, None)
        assert found == how and {k: v for k, v in given.items() if k != "config"} == {
            "dtype": torch.float16, "use_safetensors": True, "ignore_mismatched_sizes": True, "device_map": None, **options}
        assert ("config" in given) == (how == "fp8")
    assert reading(source, config(four), "cpu", torch.float16, None, "auto")[1]["device_map"] == "auto"
    assert reading(source._replace(gguf="x.gguf"), config(four), "cpu", torch.float16, None, None) == (None, dict(dtype=torch.float32, device_map=None))
    for own, asked in ((None, "fp8"), (four, "8bit"), (fp8, "4bit")):
        with pytest.raises(BadInput, match=f"--quantize {asked} does not go with its weights, which are (not quantised|4bit|fp8)"):
            reading(source, config(own), "cpu", torch.float16, asked, None)


def test_four_bits_are_asked_for_as_normal_floats(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {"bitsandbytes": "is installed"}.get)
    monkeypatch.setattr("bases.load.BitsAndBytesConfig", dict)
    want = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    assert four_bits("cuda:1", torch.bfloat16) == want
    config = types.SimpleNamespace(quantization_config=None, get_text_config=lambda: None)
    plain = Source("base", "/base", None, None, "/base"), config
    found, options = reading(*plain, "cuda", torch.bfloat16, "4bit", "auto")
    assert found == "4bit" and options["quantization_config"] == want and options["device_map"] == "auto"
    monkeypatch.setattr("bases.load.four_bits", lambda device, dtype: (device, dtype))    # meta in place of a GPU
    _, options = reading(*plain, "meta", torch.bfloat16, "4bit", None)
    assert options["quantization_config"] == ("meta", torch.bfloat16)
    assert options["device_map"] == {"": torch.device("meta")}


def test_the_class_is_the_one_that_config_json_names():
    """Where a type has a class of text alone and one of images, too, as Qwen3.5 has, modules have other paths in each."""
    for names, want in (([], AutoModelForCausalLM), (None, AutoModelForCausalLM), (["Qwen3_5ForCausalLM"], AutoModelForCausalLM),
                        (["Qwen3_5ForConditionalGeneration"], AutoModelForImageTextToText)):
        assert auto_class(Qwen3_5Config(architectures=names)) is want
    assert auto_class(Qwen3Config(architectures=["Qwen3ForCausalLM"])) is AutoModelForCausalLM
    for names in (["LlavaForConditionalGeneration"], None):                          # there is no class of text alone
        assert auto_class(LlavaConfig(architectures=names)) is AutoModelForImageTextToText


def fp8(folder, keep=lambda name: False):
    """Turns a folder's projections into block-wise FP8 with scales beside them. Returns {name: the weight they stand for}."""
    plain = {}
    def change(tensors):
        out = dict(tensors)
        for name, w in tensors.items():
            if name.endswith("_proj.weight"):
                blocks = w.float().view(w.shape[0] // 8, 8, w.shape[1] // 8, 8)
                scale = blocks.abs().amax((1, 3)) / 448
                packed = (blocks / scale[:, None, :, None]).view(w.shape).to(torch.float8_e4m3fn)
                out[name], out[name + "_scale_inv"] = packed, scale.contiguous()
                plain[name] = (packed.float().view(blocks.shape) * scale[:, None, :, None]).view(w.shape)
        return {name: t for name, t in out.items() if not keep(name)}
    change_weights(folder, change)
    change_config(folder, quantization_config=dict(quant_method="fp8", activation_scheme="dynamic", fmt="e4m3", weight_block_size=[8, 8]))
    return plain


@pytest.mark.parametrize("machine", ["keeps the FP8 layers", "has none"])
def test_fp8_weights_are_multiplied_by_their_scales(tmp_path, monkeypatch, machine):
    """Also on a machine whose transformers would keep the packed layers, which have no backward pass."""
    folder = save_tiny(tmp_path / "base")
    plain = fp8(folder)
    if machine != "has none":
        monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **options: None)
    base = load_base(str(folder))
    assert base.provenance["quantize"] == "fp8" and len(plain) == 21
    for (m, layer), site in base.sites.items():
        assert type(site.linear) is torch.nn.Linear and site.linear.weight.dtype == torch.float32
        torch.testing.assert_close(base.weight(m, layer), plain[f"{site.path}.weight"], rtol=1e-2, atol=1e-6)


def test_mxfp4_experts_are_read_as_the_numbers_that_they_stand_for(tmp_path):
    """Blocks of 32: 16 bytes of two E2M1 numbers each, the lower half first, times 2 ** (scale - 127)."""
    torch.manual_seed(0)
    config = GptOssConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                          head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"], pad_token_id=0)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "base"), tiny_tokenizer().save_pretrained(tmp_path / "base")
    name, values, want = "model.layers.0.mlp.experts.gate_up_proj", [0, .5, 1, 1.5, 2, 3, 4, 6], torch.zeros(2, 32, 64)
    blocks, scales = torch.randint(0, 256, (2, 64, 1, 16), dtype=torch.uint8), torch.randint(120, 130, (2, 64, 1), dtype=torch.uint8)
    for e, o, k in itertools.product(range(2), range(64), range(32)):
        code = int(blocks[e, o, 0, k // 2]) >> 4 * (k % 2) & 15
        want[e, k, o] = (-1 if code & 8 else 1) * values[code & 7] * 2.0 ** (int(scales[e, o, 0]) - 127)
    change_weights(tmp_path / "base", lambda tensors: {**{n: t for n, t in tensors.items() if n != name}, f"{name}_blocks": blocks, f"{name}_scales": scales})
    change_config(tmp_path / "base", quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]))
    base = load_base(str(tmp_path / "base"))
    assert base.provenance["quantize"] == "mxfp4" and torch.equal(base.model.get_parameter(name), want)


def test_packed_weights_that_no_config_explains_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "base")
    fp8(folder)
    change_config(folder, quantization_config=None)
    with pytest.raises(BadInput, match="base"):
        load_base(str(folder))
    change_config(folder, quantization_config=dict(quant_method="gptq", bits=4))
    with pytest.raises(BadInput, match="base 'base': its weights are quantised by gptq; accepted are unquantised"):
        load_base(str(folder))
    change_config(folder, quantization_config=dict(quant_method="fp8"))
    with pytest.raises(BadInput, match="--quantize 4bit does not go with its weights, which are fp8"):
        load_base(str(folder), quantize="4bit")


def test_integers_in_place_of_weights_are_refused(tmp_path):
    """transformers casts them, without their scales and without a word."""
    folder = save_tiny(tmp_path / "base")
    change_weights(folder, lambda tensors: {name: (t * 100).to(torch.int8) if name.endswith("q_proj.weight") else t for name, t in tensors.items()})
    with pytest.raises(BadInput, match="base 'base': model.layers.0.self_attn.q_proj.weight is I8 in model.safetensors"):
        load_base(str(folder))


@pytest.mark.parametrize("name, dtype, wrong", [("norm.weight", torch.uint8, True), ("norm.weight", torch.float8_e4m3fn, True), ("other.weight", torch.int8, True),
                                                ("bias", torch.int8, True), ("attn.mask", torch.uint8, False), ("attn.mask", torch.bool, False)])
def test_only_weights_have_to_be_floating_point_numbers(tmp_path, name, dtype, wrong):
    """GPT-2's old files hold its mask."""
    model = torch.nn.Module()
    model.norm, model.bias = torch.nn.LayerNorm(3), torch.nn.Parameter(torch.ones(3))
    safetensors.torch.save_file({"norm.bias": torch.zeros(3), "bias": torch.ones(3), name: torch.ones(3).to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match=f"{name} is .* in x.safetensors") if wrong else contextlib.nullcontext():
        check_values("base", model, [tmp_path / "x.safetensors"])


def test_a_weight_that_is_converted_on_loading_is_not_compared_under_its_name(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, tmp_path / "x.safetensors")
    model = torch.nn.Linear(3, 2)                                                    # its weight is [2, 3]
    model.bias.data.fill_(1)
    check_values("base", model, [tmp_path / "x.safetensors"])
    model.bias.data.fill_(2)
    with pytest.raises(BadInput, match="bias is not as in x.safetensors"):
        check_values("base", model, [tmp_path / "x.safetensors"])


def test_a_weight_that_the_library_writes_over_is_noticed(tmp_path):
    """Youtu's class zeroes the padding token's row of the embedding, also of a loaded one, and so of the tied head."""
    torch.manual_seed(0)
    YoutuForCausalLM(YoutuConfig(vocab_size=64, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8,
                                 kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, intermediate_size=40,
                                 pad_token_id=0)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    change_weights(tmp_path / "base", lambda tensors: {**tensors, "model.embed_tokens.weight": torch.randn(64, 24)})
    with pytest.raises(BadInput, match="base 'base': model.embed_tokens.weight is not as in model.safetensors; transformers .* changes it"):
        load_base(str(tmp_path / "base"))


def test_a_folder_in_four_bits_is_recognised(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig
    save_tiny(tmp_path / "plain")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    packed.save_pretrained(tmp_path / "base"), tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    assert base.provenance["quantize"] == "4bit" and load_base(str(tmp_path / "base"), quantize="4bit")
    ids = torch.tensor([[4, 5, 6, 7]])
    torch.testing.assert_close(base.model(input_ids=ids).logits, packed(input_ids=ids).logits, rtol=1e-2, atol=1e-2)
