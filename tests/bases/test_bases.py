"""A patched base: the same model when nothing is adapted, PEFT's logits when something is, in six architectures."""
import gguf, numpy as np, peft, pytest, torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import ARCHITECTURES, exact_norms, peft_projections, save_tiny, tiny_base, tiny_model, tiny_tokenizer
from helpers import NeverWaits, hooked, items, of_task, random_adapters
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig,
                          MambaForCausalLM)

from bases import Base, load_base, masks, reload_base, resolve
from bases.load import cpu_dtype
from data import collate
from portal import MODULES, Adapters
from runtime.files import BadInput
from train import task_gradients


def plain_log_p(model, item, tokens):
    """log p of each token after the item's prompt, by one unpadded forward pass of an unpatched model."""
    ids = torch.tensor([item.prompt + tokens])
    log_p = model(input_ids=ids).logits.float().log_softmax(-1)[0]
    return torch.stack([log_p[len(item.prompt) + i - 1, t] for i, t in enumerate(tokens)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("n_choices", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_mixed_padded_rows_equal_one_row_at_a_time(architecture, n_choices, attention):
    """Padding, several tasks in a batch, several continuations behind one prompt, sliding windows: none may matter."""
    base, model = tiny_base(architecture), tiny_model(architecture)
    for each in (base.model, model):
        each.set_attn_implementation(attention)
    adapters, rows = random_adapters(base), items(n_choices)
    batch = collate(rows)
    assert base.packs and base.pads                                                   # asked once, before
    with NeverWaits():
        logits = base.logits(batch, adapters)
    got = logits.log_softmax(-1)[batch.source, batch.target]
    want = []
    for item in rows:
        with hooked(model, adapters, item.task):
            want += [plain_log_p(model, item, tokens) for tokens in item.continuations]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
    different = tiny_base(architecture).logits(batch)
    assert (different.log_softmax(-1)[batch.source, batch.target] - got).abs().max() > 0.05  # the adapters do something


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_masks_leave_the_logits_bit_identical(architecture, attention):
    """The masks that transformers makes itself, below and above the window of 5."""
    base = tiny_base(architecture)
    base.model.set_attn_implementation(attention)
    assert base.config._attn_implementation == attention and base.packs
    for length in (2, 4, 5, 6, 20):
        rows = [item._replace(prompt=(20 * item.prompt)[:n], continuations=[[5]])
                for item, n in zip(items(), (length, 1, 2, length))]
        batch = collate(rows)
        want = base.model(input_ids=batch.ids).logits                                # its own masks
        with NeverWaits():
            got = base.model(input_ids=batch.ids, **masks.of(base, batch)).logits
        assert batch.ids.shape[1] == length and torch.equal(got, want)


@torch.no_grad()
def test_masks_that_only_transformers_can_make_are_left_to_it():
    one, several = collate(items()), collate(items(3))
    def changed(architecture, **settings):
        base = tiny_base(architecture)
        vars(base.config).update(settings)
        return base
    plain, stray = tiny_base("llama"), changed("llama", sliding_window=3)            # a Llama has no window
    assert stray.packs and all(torch.equal(plain.logits(batch), stray.logits(batch)) for batch in (one, several))
    for base in (changed("llama", layer_types=["full_attention", "chunked_attention", "full_attention"]),
                 changed("llama", attention_window_size=3), changed("gemma3", _attn_implementation_internal="flash_attention_2")):
        assert not base.packs and masks.of(base, one) == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_zero_adapters_leave_the_logits_bit_identical(architecture):
    base = tiny_base(architecture)
    adapters = random_adapters(base)
    zero = Adapters(adapters.A, {m: torch.zeros_like(b) for m, b in adapters.B.items()}, 2.0)
    for n_choices in (1, 3):
        batch = collate(items(n_choices))
        bare = base.logits(batch)
        assert torch.equal(base.logits(batch, zero), bare)
    ids = torch.tensor([items()[0].prompt])
    assert torch.equal(base.model(input_ids=ids).logits, tiny_model(architecture)(input_ids=ids).logits)


@torch.no_grad()
def test_peft_gives_the_same_logits():
    base, adapters, rows = tiny_base(), random_adapters(tiny_base()), items()
    batch = collate(rows)
    got = base.logits(batch, adapters).log_softmax(-1)[batch.source, batch.target]
    want = []
    for item in rows:
        A, B, scale = of_task(adapters, item.task)
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(
            r=4, lora_alpha=4 * scale, target_modules=[f"{m}_proj" for m in MODULES]))
        for m, layer, module in peft_projections(model):
            module.lora_A["default"].weight.copy_(A[m][layer]), module.lora_B["default"].weight.copy_(B[m][layer])
        want.append(plain_log_p(model.eval(), item, item.continuations[0]))
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_equals_one_row_at_a_time_without_a_cache(architecture):
    """Left padding, tasks mixed in a batch, a KV cache, windows of 5 that the text outgrows, rows that end at EOS early."""
    base, model, n = tiny_base(architecture), tiny_model(architecture), 12
    tokenizer, adapters, rows = base.tokenizer, random_adapters(base), items() + items(seed=1)
    tokenizer.add_tokens([f"x{i}" for i in range(8)])                                # a word for each of the 64 logits
    prompts, tasks = [item.prompt for item in rows], [item.task for item in rows]
    tokenizer.eos_token = None                                                       # the limit alone ends a row
    def generated(adapters):
        """New tokens, each the plain model's most probable one after those before it, one row at a time."""
        texts = base.generate(prompts, adapters, tasks if adapters else None, n)
        new = [tokenizer.convert_tokens_to_ids(text.split()) for text in texts]
        for prompt, task, tokens in zip(prompts, tasks, new):
            with hooked(model, adapters, task), torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1]  # [n, 64]
            assert len(tokens) == n and logits.argmax(-1).tolist() == tokens
        return new
    adapted = generated(adapters)
    assert generated(None) != adapted
    eos = next(t for new in adapted for t in new[1:-1] if 0 < sum(t in other for other in adapted) < len(rows))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)                       # some rows end there, others do not
    want = tokenizer.batch_decode([new[:new.index(eos)] if eos in new else new for new in adapted])
    assert base.generate(tokenizer.batch_decode(prompts), adapters, tasks, n) == want  # texts, too, are prompts


def test_generate_heeds_no_sampling_habits_of_a_folder(tmp_path):
    folder, prompts = save_tiny(tmp_path / "base"), [item.prompt for item in items()]
    want = load_base(str(folder)).generate(prompts)
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 2.0, "repetition_penalty": 5.0, "eos_token_id": [3, 14, 15, 16]}')
    assert load_base(str(folder)).generate(prompts) == want


def test_shapes_are_read_from_the_layers():
    base = tiny_base("qwen3")
    dims = {"q": (24, 32), "k": (24, 16), "v": (24, 16), "o": (32, 24), "gate": (24, 40), "up": (24, 40), "down": (40, 24)}
    assert base.groups == {m: (m, (0, 1, 2), *shape) for m, shape in dims.items()} and not base.lacks
    assert base.weight("down", 2).shape == (24, 40)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_an_unsupported_model_says_what_was_looked_for_and_found():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(BadInput, match="tiny: MambaForCausalLM is not supported: no layer.*known name.*are dt_proj, .*lm_head"):
        Base(model, tiny_tokenizer(), "tiny")


# ------------------------------------------------------------------------------------------------ finding and loading
def test_resolve(tmp_path):
    assert resolve("qwen3-1.7b")[:3] == ("qwen3-1.7b", "Qwen/Qwen3-1.7B", None)
    assert resolve("Some-Org/My.Model-7B@v1.0")[:3] == ("my.model-7b", "Some-Org/My.Model-7B", "v1.0")
    assert resolve("toy-gemma")[0] == "toy-gemma"
    with pytest.raises(BadInput, match="unknown base 'qwen9'.*accepted are.*toy-qwen-s.*qwen3-1.7b"):
        resolve("qwen9")
    with pytest.raises(BadInput, match="no such .gguf"):
        resolve("nothing.gguf")
    with pytest.raises(BadInput, match="not a model: it has no config.json"):
        resolve(str(tmp_path))
    (tmp_path / "a@2").mkdir()
    (tmp_path / "a@2" / "config.json").touch()
    with pytest.raises(BadInput, match="'a@2': the name of a folder or .gguf file may have no @"):
        resolve(str(tmp_path / "a@2"))


def test_a_folder_loads_and_a_broken_one_is_named(tmp_path):
    folder = save_tiny(tmp_path / "My-Base")
    base = load_base(str(folder))
    assert base.name == "my-base" and base.provenance["id"] == str(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match="could not be loaded"):
        load_base(str(folder))
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(BadInput, match="no model.safetensors .*but pytorch_model.bin; weights are read from safetensors only"):
        load_base(str(folder))


def test_a_half_precision_load_is_transformers_own(tmp_path):
    """Weights in bfloat16, rotary frequencies in float32: casting the latter would turn every later position."""
    folder = save_tiny(tmp_path / "base", "gemma3")
    base = load_base(str(folder), dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert {n: b.dtype for n, b in base.model.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}
    ids = torch.tensor([list(range(4, 50)) * 2])
    assert torch.equal(base.model(input_ids=ids).logits, model(input_ids=ids).logits)


# ------------------------------------------------------------------------------------------------ bigger than one device
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_a_base_that_accelerate_places_is_the_same(tmp_path, device_map):
    """Without a GPU "auto" puts all on the CPU."""
    folder = save_tiny(tmp_path / "base", "gemma3")
    plain, placed = load_base(str(folder)), load_base(str(folder), device_map=device_map)
    batch, adapters = collate(items(3), placed.device), random_adapters(plain)
    torch.testing.assert_close(placed.logits(batch, adapters.map(lambda a: a.to(placed.device))).cpu(),
                               plain.logits(collate(items(3)), adapters))


def test_a_base_is_moved_to_its_device_unless_accelerate_places_it(tmp_path):
    folder = str(save_tiny(tmp_path / "base"))
    for options, want in (({}, "cpu"), (dict(device="meta"), "meta"),
                          (dict(device="meta", device_map={"": "cpu"}), "cpu")):
        assert {p.device.type for p in load_base(folder, **options).model.parameters()} == {want}


def test_a_base_that_fits_nowhere_is_refused(tmp_path):
    """accelerate leaves on the meta device what it would fetch from the disk, layer by layer."""
    folder = save_tiny(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              **{f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(3)}}
    with pytest.raises(BadInput, match="base.*(too big|could not be loaded)"):
        load_base(str(folder), device_map=places)


class Packed(torch.nn.Linear):
    """Stands in for a quantised layer: int8 weights, laid out in its own way; only its forward can read them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.bias, self.scale = linear.bias, linear.weight.detach().abs().amax(1, keepdim=True) / 127  # [d_out, 1]
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8).flatten(), requires_grad=False)

    def unpacked(self):
        return self.weight.view(self.out_features, self.in_features) * self.scale

    def forward(self, x):
        return torch.nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


def packed_and_unpacked(architecture="qwen2"):
    """Two models of the same numbers: with Packed projections, and with plain ones. Qwen2's have biases."""
    packed, plain = tiny_model(architecture), tiny_model(architecture)
    for path, linear in [(path, module) for path, module in plain.named_modules() if path.endswith("_proj")]:
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
        packed.set_submodule(path, Packed(linear))
        linear.weight.data = packed.get_submodule(path).unpacked()
    return packed, plain


def test_a_layer_that_keeps_its_weight_to_itself_is_adapted_all_the_same():
    """Logits, losses, gradients on A and B and the weights as Cross-LoRA reads them: those of the plain model."""
    packed, plain = (Base(exact_norms(model.double()), tiny_tokenizer()) for model in packed_and_unpacked())
    adapters, rows = random_adapters(plain, dtype=torch.float64), items()
    assert packed.groups == plain.groups and type(packed.sites["q", 0].linear) is Packed and packed.sites["q", 0].linear.bias is not None
    batch = collate(items(3))
    torch.testing.assert_close(packed.logits(batch), plain.logits(batch))
    torch.testing.assert_close(packed.logits(batch, adapters), plain.logits(batch, adapters))
    assert not torch.allclose(plain.logits(batch, adapters), plain.logits(batch), atol=0.1)
    (losses, gradients), (want_losses, want) = (task_gradients(base, adapters, rows, 1000) for base in (packed, plain))
    torch.testing.assert_close(losses, want_losses)
    for got, expected in zip(gradients, want, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    packed.recompute_layers()
    assert all(torch.equal(a, b) for a, b in zip(gradients, task_gradients(packed, adapters, rows, 1000)[1]))
    for m in MODULES:
        assert torch.equal(packed.weight(m, 1), plain.weight(m, 1))
    assert packed.sites["q", 0].linear.bias is not None


def test_weights_stay_as_transformers_loaded_them(tmp_path, monkeypatch):
    folder, (packed, _) = save_tiny(tmp_path / "base"), packed_and_unpacked()
    whole = packed.model.layers[0].mlp.up_proj.weight.clone()
    packed.config.quantization_config = dict(load_in_8bit=True)                      # else int8 weights are refused
    info = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ())
    monkeypatch.setattr("bases.load.pretrained", lambda cls, spec, **options: {
        AutoModelForCausalLM: (packed, info), AutoConfig: packed.config, AutoTokenizer: tiny_tokenizer()}[cls])
    base = load_base(str(folder), dtype=torch.bfloat16)
    assert torch.equal(base.sites["up", 0].linear.weight, whole) and base.model.model.norm.weight.dtype == torch.float32
    assert torch.isfinite(base.logits(collate(items()), random_adapters(base))).all()


def test_four_bits_need_cuda_and_bitsandbytes(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "base")
    with pytest.raises(BadInput, match="--quantize 4bit needs a CUDA device; this is --device cpu"):
        load_base(str(folder), quantize="4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs bitsandbytes, which is not installed: pip install bitsandbytes"):
        load_base(str(folder), device="cuda", quantize="4bit")


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_four_bits_on_a_gpu_are_the_model_of_the_dequantised_weights(tmp_path, device_map):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path / "base", "qwen2")
    base = load_base(str(folder), "cuda", torch.float32, device_map=device_map, quantize="4bit")
    model = tiny_model("qwen2").cuda()
    for (m, layer), (own, path, _) in base.sites.items():
        W, linear = base.weight(m, layer), model.get_submodule(path)
        assert isinstance(own, bitsandbytes.nn.Linear4bit) and not torch.equal(W, linear.weight)
        assert float((W - linear.weight).norm() / linear.weight.norm()) < 0.15
        linear.weight.data = W
    plain = Base(model, tiny_tokenizer())
    adapters, batch = random_adapters(plain).map(lambda a: a.cuda()), collate(items(3), "cuda")
    torch.testing.assert_close(base.logits(batch, adapters), plain.logits(batch, adapters), rtol=1e-3, atol=1e-3)
    for got, want in zip(task_gradients(base, adapters, items(), 1000)[1], task_gradients(plain, adapters, items(), 1000)[1]):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
def test_layers_on_two_devices_are_the_same_model():
    """The middle layer on a GPU and all else on the CPU, with the hooks that accelerate moves activations by."""
    model = tiny_model()
    add_hook_to_module(model.model.layers[1].cuda(), AlignDevicesHook(execution_device="cuda", io_same_device=True))
    base, plain = Base(model, tiny_tokenizer()), tiny_base()
    adapters, batch = random_adapters(plain), collate(items(3))
    assert base.device.type == "cpu" and base.sites["q", 1].linear.weight.is_cuda
    torch.testing.assert_close(base.logits(batch, adapters), plain.logits(batch, adapters), rtol=1e-3, atol=1e-3)
    for got, want in zip(task_gradients(base, adapters, items(), 1000)[1], task_gradients(plain, adapters, items(), 1000)[1]):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)


def test_a_gguf_file_loads_with_the_same_logits(tmp_path):
    """A llama written tensor by tensor with the gguf library, float32."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    c, path = model.config, tmp_path / "Tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128), writer.add_embedding_length(24), writer.add_block_count(3), writer.add_feed_forward_length(40)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(c.rms_norm_eps), writer.add_rope_dimension_count(8)
    writer.add_vocab_size(64), writer.add_rope_freq_base(10000.0), writer.add_key_length(8), writer.add_value_length(8)
    tokens = ["t", "1", "t1"] + [f"word{i}" for i in range(61)]
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(tokens), writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_token_types([1] * 64)
    def permuted(w, heads):  # llama.cpp stores q and k with their rotary halves interleaved
        return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.add_tensor("output.weight", model.lm_head.weight.detach().numpy())
    for i, layer in enumerate(model.model.layers):
        for m in MODULES:
            w = getattr(layer.self_attn if m in "qkvo" else layer.mlp, f"{m}_proj").weight.detach().numpy()
            writer.add_tensor(f"blk.{i}.{names[m]}.weight", np.ascontiguousarray(permuted(w, {"q": 4, "k": 2}[m]) if m in "qk" else w))
        writer.add_tensor(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight.detach().numpy())
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight.detach().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    # In the hub's cache it is a link to blobs/<sha>, which has neither its name nor its suffix.
    blob, snapshot = tmp_path / "blobs" / ("e" * 64), tmp_path / "snapshots" / ("0" * 40)
    blob.parent.mkdir(), snapshot.mkdir(parents=True)
    path.rename(blob), (snapshot / path.name).symlink_to(blob)
    base = load_base(str(snapshot / path.name))
    assert base.name == "tiny" and len(base.blocks) == 3 and base.provenance["id"] == str(snapshot / path.name)
    assert base.tokenizer("t1word7", add_special_tokens=False).input_ids[0] == 2
    assert base.tokenizer.limits[:2] == (64, 128)
    half = reload_base(dict(base.provenance, base="tiny"), dtype=torch.bfloat16)
    assert half.provenance == base.provenance and {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    batch = collate(items())
    want = Base(model, tokenizer).logits(batch)
    torch.testing.assert_close(base.logits(batch), want, rtol=1e-4, atol=1e-4)
    base.unpatch().save_pretrained(tmp_path / "saved")                               # as a plain model, no longer a GGUF
    saved = Base(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tokenizer)
    torch.testing.assert_close(saved.logits(batch), want, rtol=1e-4, atol=1e-4)


def test_a_cpu_that_computes_bfloat16_has_bases_in_it_and_says_so_once(tmp_path, monkeypatch, capsys):
    """Where --dtype is not given: None. A narrow base, such as the toy's, stays in float32."""
    narrow, wide = str(save_tiny(tmp_path / "base")), str(tmp_path / "wide")
    LlamaForCausalLM(LlamaConfig(vocab_size=80, hidden_size=512, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8)).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    monkeypatch.setattr("bases.load.cpu_dtype", cpu_dtype)                           # conftest has replaced it
    for able in ({}, {"avx512_bf16": False}, {"avx512_bf16": True}, {"amx_bf16": True}):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able)
        cpu_dtype.cache_clear()
        assert {load_base(spec, dtype=None).model.dtype for spec in ("toy-qwen-s", narrow)} == {torch.float32}
        assert not capsys.readouterr().out
        want = torch.bfloat16 if any(able.values()) else torch.float32
        assert {load_base(wide, dtype=None).model.dtype for _ in range(2)} == {want}
        assert capsys.readouterr().out.count("loaded in bfloat16") == any(able.values())
        assert load_base(wide, dtype=torch.float32).model.dtype == torch.float32
    assert load_base(narrow, "meta", None).model.dtype == torch.bfloat16
    cpu_dtype.cache_clear()
