"""Sites: bases whose layers differ, lack projections or fuse them, against plain loops, PEFT and plain forward passes."""
import pytest, torch, transformers
from conftest import SMALL, command, one_line, tiny_base, tiny_tokenizer
from helpers import items, make_portal, random_adapters

import eval as evaluation, export, port, train
from baselines.cross_lora import copy, transfer
from bases import Base, Item, load_base, same_depths
from data import collate
from experiments.tiny_models import tiny_model
from portal import Converter, group_sites
from runtime.files import BadInput
from runtime.saved import load_config, load_converter, load_tensors, save_converter
from score import score
from starts.align import layer_inputs
from tasks.rows import Row


def base_of(cls, name="tiny", **config):
    """A Base of a tiny random model of a transformers class, whose config class has its name."""
    torch.manual_seed(0)
    config_class = getattr(transformers, config.pop("config", cls.replace("ForCausalLM", "Config")))
    return Base(getattr(transformers, cls)(config_class(**{**SMALL, **config})), tiny_tokenizer(), name)


def hybrid(name="tiny"):
    """Qwen3.5: q and v in every second layer, q twice as wide as o's input."""
    return base_of("Qwen3_5ForCausalLM", name, config="Qwen3_5TextConfig", num_hidden_layers=4,
                   layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2,
                   linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)


def unlike(name="tiny"):
    """Gemma 4: two head sizes; the last two of four layers have no keys and values of their own."""
    return base_of("Gemma4ForCausalLM", name, config="Gemma4TextConfig", num_hidden_layers=4, global_head_dim=16,
                   sliding_window=5, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
                   hidden_size_per_layer_input=8, vocab_size_per_layer_input=64)


# ---------------------------------------------------------------------------------------------- groups and converters
def test_groups_of_unlike_layers():
    assert hybrid().groups_of("qv") == {"q": ("q", (1, 3), 24, 64), "v": ("v", (1, 3), 24, 16)}
    assert unlike().groups_of("qv") == {
        "q_24x32": ("q", (0, 2), 24, 32), "q_24x64": ("q", (1, 3), 24, 64),
        "v_24x16": ("v", (0,), 24, 16), "v_24x32": ("v", (1,), 24, 32)}
    assert unlike().sites_of("q") == [(0, "q_24x32", 0), (1, "q_24x64", 0), (2, "q_24x32", 1), (3, "q_24x64", 1)]


@pytest.mark.parametrize("make", [hybrid, unlike])
def test_a_converter_is_the_plain_loop(make):
    """A = Head_A_m(h(z_t, e_l)) P_in_g and B = P_out_g Head_B_m(h), for each task and each layer that has the site."""
    base = make()
    portal = make_portal(base)
    converter, core, adapters = portal.converters["tiny"], portal.core, portal.adapters("tiny")
    layers = sorted({layer for group in base.groups_of("qv").values() for layer in group.layers})
    assert len(converter.e) == len(layers)
    for g, (m, own, d_in, d_out) in base.groups_of("qv").items():
        for index, layer in enumerate(own):
            for t, z in enumerate(portal.z):
                e = converter.e[layers.index(layer)]
                gamma, beta = core.film(z).chunk(2)
                h = torch.nn.functional.gelu(core.norm1(core.W1(torch.cat([z, e]))))
                h = torch.nn.functional.gelu(core.norm2(core.W2((1 + gamma) * h + beta)))
                A = core.head_A[m](h).view(4, 12) @ converter.P_in[g]                # rank 4, d_c 12
                B = converter.P_out[g] @ core.head_B[m](h).view(12, 4)
                assert A.shape == (4, d_in) and B.shape == (d_out, 4) and A.abs().max() > 0.1
                torch.testing.assert_close(adapters.A[g][t, index], A)
                torch.testing.assert_close(adapters.B[g][t, index], B)


@pytest.mark.parametrize("make,numbered", [(hybrid, {"layers.q", "layers.v"}), (tiny_base, set()),
                                           (unlike, {"layers.q_24x32", "layers.q_24x64", "layers.v_24x16", "layers.v_24x32"})])
def test_a_converter_is_read_as_it_was_written(tmp_path, make, numbered):
    base = make()
    portal = make_portal(base)
    (tmp_path / "converters").mkdir()
    save_converter(tmp_path, portal, "tiny", "tiny")
    path = tmp_path / "converters" / "tiny.safetensors"
    assert {name for name in load_tensors(path) if name.startswith("layers")} == numbered
    read, made = load_converter(portal.cfg, path), portal.converters["tiny"]
    assert read.groups == made.groups == base.groups_of("qv")
    assert all(torch.equal(a, b) for a, b in zip(read(portal.core, portal.z)[1].values(), portal.adapters("tiny").B.values()))


def test_a_port_starts_at_the_embeddings_of_the_same_relative_depth():
    cfg = make_portal(tiny_base()).cfg
    source = Converter(cfg, group_sites({("q", layer): (4, 4) for layer in range(5)}))
    port = Converter(cfg, hybrid().groups_of("qv"), like=source, port=True)
    assert torch.equal(port.e, source.e[[0, 4]]) and not any(P.any() for P in port.P_out.values())


def test_sites_pair_by_kind_and_relative_depth():
    assert [(a[:2], b[:2]) for a, b in same_depths(unlike(), tiny_base(), "q")] == [
        ((0, "q_24x32"), (0, "q")), ((1, "q_24x64"), (1, "q")), ((2, "q_24x32"), (1, "q")), ((3, "q_24x64"), (2, "q"))]
    assert [(a, b) for a, b in same_depths(hybrid(), unlike(), "v")] == [
        ((1, "v", 0), (0, "v_24x16", 0)), ((3, "v", 1), (1, "v_24x32", 0))]
    source, target = tiny_base(), unlike()
    adapters = random_adapters(source)
    carried = transfer(copy, adapters, source, target)
    assert carried.A.keys() == target.groups.keys()
    q = carried.B["q_24x64"]                                                         # layers 1 and 3 of 4 take 1 and 2 of 3
    assert torch.equal(q[:, :, :32], adapters.B["q"][:, [1, 2]]) and not q[:, :, 32:].any()


def test_the_weight_of_a_site_is_its_rows_of_the_fused_matrix():
    """By a plain loop over heads: 4 of q and 2 of k and v of width 8 in Phi-3; q, k, v of each head in turn in GPT-NeoX;
    GPT-2's matrix is transposed."""
    phi, neox = base_of("Phi3ForCausalLM", pad_token_id=0), base_of("GPTNeoXForCausalLM", head_dim=6)
    gpt2 = base_of("GPT2LMHeadModel", config="GPT2Config", n_embd=24, n_layer=2, n_head=4, head_dim=6)
    W = phi.model.model.layers[1].self_attn.qkv_proj.linear.weight                   # [64, 24]
    assert torch.equal(phi.weight("q", 1), W[:32]) and torch.equal(phi.weight("k", 1), W[32:48])
    assert torch.equal(phi.weight("v", 1), W[48:])
    W = neox.model.gpt_neox.layers[2].attention.query_key_value.linear.weight        # [3 * 24, 24], 4 heads of 6
    for start, m in enumerate("qkv"):
        assert torch.equal(neox.weight(m, 2), torch.cat([W[18 * h + 6 * start:18 * h + 6 * start + 6] for h in range(4)]))
    W = gpt2.model.transformer.h[1].attn.c_attn.linear.weight                        # [24, 3 * 24]
    assert torch.equal(gpt2.weight("k", 1), W.T[24:48])


# ---------------------------------------------------------------------------------------------- continuations
@pytest.mark.parametrize("make,packs", [(hybrid, False), (unlike, True), (
    lambda: base_of("FalconH1ForCausalLM", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1), False), (
    lambda: base_of("BloomForCausalLM", hidden_size=32, n_layer=2, n_head=4), False), (
    lambda: base_of("OPTForCausalLM", word_embed_proj_dim=24, ffn_dim=40), True), (
    lambda: base_of("XGLMForCausalLM", d_model=24, num_layers=2, attention_heads=4), False)])
@torch.no_grad()
def test_continuations_are_scored_as_alone(make, packs):
    """Continuations of several tokens in a layer that has no masks, or positions that are not given, would see each other."""
    base = make()
    assert base.packs is packs
    rows = [*items(3), Item(0, [5, 6, 7], [[8], [9], [10, 11]], Row("t", "", [], 0))]
    scored = [*zip(rows, score(base, None, rows, 60), strict=True), *zip(items(), score(base, None, items(), 60), strict=True)]
    for item, got in scored:
        for tokens, log_p in zip(item.continuations, got, strict=True):
            logits = base.model(input_ids=torch.tensor([item.prompt + tokens]), use_cache=False).logits[0].log_softmax(-1)
            want = sum(logits[len(item.prompt) - 1 + i, token].item() for i, token in enumerate(tokens))
            assert log_p == pytest.approx(want, abs=2e-4)


def test_a_leak_between_continuations_is_found():
    """What masks do not reach: a layer that adds the previous column's input, and positions that are columns."""
    for change in ("shift", "columns"):
        base = tiny_base("llama")
        if change == "shift":
            norm, plain = base.blocks[1].input_layernorm, base.blocks[1].input_layernorm.forward
            norm.forward = lambda x: plain(x) + torch.nn.functional.pad(x, (0, 0, 1, -1))
        else:
            plain = base.model.model.forward
            base.model.model.forward = lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)
        assert not base.packs
    assert tiny_base("llama").packs


def test_logits_that_depend_on_later_tokens_are_refused():
    """A decoder whose attention sees the whole row would read the answers it is asked for."""
    base = tiny_base("llama")
    for block in base.blocks:
        plain = block.self_attn.forward
        block.self_attn.forward = lambda *args, attention_mask=None, plain=plain, **kwargs: plain(
            *args, attention_mask=torch.zeros(1, 1, 1, 1), **kwargs)
    with pytest.raises(BadInput, match="tiny: the logits of LlamaForCausalLM depend on later tokens; it is no causal"):
        base.packs


def test_in_half_precision_the_same_is_found():
    """Rounding is as large as some leaks there; they are told apart by a pass that is known to be wrong."""
    for name, packs, pads in (("qwen3", True, True), ("opt", True, True), ("falcon_h1", False, True),
                              ("blenderbot-small", False, False), ("moshi", False, True)):
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model(name).to(dtype)
            if name == "moshi":                                                      # it declares a window, has none
                model.config.sliding_window = 64
            base = Base(model, tiny_tokenizer(), name)
            assert (base.packs, base.pads) == (packs, pads), (name, dtype)


def test_what_does_not_run_on_text_alone_is_refused():
    base = tiny_base("llama")
    def forward(*args, **kwargs):
        raise ValueError("You have to specify pixel_values")
    base.model.forward = forward
    with pytest.raises(BadInput, match="tiny: LlamaForCausalLM does not run on text alone: You have to specify pixel_values"):
        base.packs


def test_half_precision_is_transformers_own(tmp_path):
    """Routers stay in float32 there, in newer releases: in bf16 they would choose other experts."""
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    base = load_base(str(tmp_path / "moe"), dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.bfloat16).eval()
    dtypes = [p.dtype for p in model.parameters()]
    assert [p.dtype for p in base.model.parameters()] == dtypes
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(base.model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name,kinds,ends", [("deepseek_v3", "qv", {"q": "q_b_proj", "v": "kv_b_proj"}),
                                             ("qwen2_moe", ["up"], {"up": "up_proj"}), ("opt", ["up"], {"up": "fc1"})])
@torch.no_grad()
def test_what_a_site_reads(name, kinds, ends):
    """For port.py --align: of a plain model's hooks, though modules read it in other shapes."""
    base, plain, read = Base(tiny_model(name), tiny_tokenizer(), name), tiny_model(name), {}
    for path, module in plain.named_modules():
        if path.split(".")[-1] in ends.values():
            module.register_forward_hook(lambda _, args, y, path=path: read.update({path: args[0]}))
    plain(input_ids=torch.tensor([base.tokenizer("w1 w2 w3 w4").input_ids]), use_cache=False)
    found, at = layer_inputs(base, "w1 w2 w3 w4", kinds)
    assert at == {2: 0, 5: 1, 8: 2, 11: 3} and len(found) == sum(len(base.sites_of(m)) for m in kinds)
    for (m, layer), x in found.items():
        want = read[base.sites[m, layer].path]
        assert x.shape == (4, want.shape[-1]) and torch.equal(x.flatten(), want.flatten())


@torch.no_grad()
def test_prompts_of_unequal_length_where_padding_is_seen():
    """A model that counts positions by columns is decoded a row at a time."""
    def make():
        return base_of("GPT2LMHeadModel", config="GPT2Config", n_embd=24, n_layer=2, n_head=4)
    base = make()
    plain = base.model.transformer.forward
    base.model.transformer.forward = lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)
    assert not base.pads and make().pads
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    alone = [base.generate([p], max_new_tokens=4)[0] for p in prompts]
    assert base.generate(prompts, max_new_tokens=4) == alone


# ---------------------------------------------------------------------------------------------- refusals
def test_what_a_base_lacks_is_named():
    base = base_of("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3)
    assert base.kinds == list("qkvo")
    with pytest.raises(BadInput, match=r"tiny: GptOssForCausalLM has no up to adapt: layer 0 has none among "
                                        r"self_attn.q_proj, .*; mlp.experts.gate_up_proj \[4, 24, 80\] \(experts in one tensor\)"):
        base.groups_of(["q", "up"])


# ---------------------------------------------------------------------------------------------- the commands
def save(folder, base):
    base.unpatch().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture
def unlike_world(world):
    """Tasks, and as bases a plain one, two whose layers differ and one with fused projections."""
    save(world / "hybrid", hybrid())
    save(world / "unlike", unlike())
    save(world / "fused", base_of("Phi3ForCausalLM", pad_token_id=0))
    return world


def test_train_port_and_evaluate_between_unlike_bases(unlike_world):
    """All methods on each; PEFT loads what is exported and gives our scores; a merged model, too."""
    from peft import PeftModel
    quick = "--epochs 1 --batch-size 2".split()
    assert command(train, "--bases", "./base-a,./hybrid", "--data", "data", "--n", "8", *quick, "--run", "R", "--lr", "3e-2") == 0
    assert command(port, "--run", "R", "--to", "./unlike,./fused", "--n", "8", *quick, "--lr", "3e-2") == 0
    assert command(port, "--run", "R", "--to", "./unlike", "--n", "8", "--align", "--overwrite", *quick, "--lr", "3e-2") == 0
    assert command(evaluation, "--run", "R", *quick, "--lr", "3e-2") == 0
    t = load_config(unlike_world / "R")[1].tasks.index("two")
    for name in ("hybrid", "unlike", "fused"):
        base = load_base(str(unlike_world / name))
        for method in ("portal", "lora", "cross_lora"):
            adapters = evaluation.adapters_of(unlike_world / "R", method, name, base)
            assert command(export, "--run", "R", "--to", name, "--task", "two", "--method", method, "--out", f"{method}-{name}") == 0
            model = transformers.AutoModelForCausalLM.from_pretrained(unlike_world / name)
            batch = collate([Item(t, [5, 6, 7, 8, 9], [[10, 11, 12]], Row("two", "", [], 0))])
            with torch.no_grad():
                want = PeftModel.from_pretrained(model, unlike_world / f"{method}-{name}")(input_ids=batch.ids).logits
                torch.testing.assert_close(base.logits(batch, adapters), want[batch.at], rtol=1e-4, atol=1e-5)
                assert not torch.allclose(base.logits(batch), want[batch.at], rtol=1e-3, atol=1e-3)
        assert command(export, "--run", "R", "--to", name, "--task", "two", "--merge", "--method", "lora", "--out", f"merged-{name}") == 0
        merged = transformers.AutoModelForCausalLM.from_pretrained(unlike_world / f"merged-{name}")
        adapters = evaluation.adapters_of(unlike_world / "R", "lora", name, base)
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=batch.ids).logits[batch.at], base.logits(batch, adapters), rtol=1e-4, atol=1e-5)


def test_a_wrapper_that_reads_images_has_its_text_decoder_adapted(world):
    """A class that AutoModelForCausalLM does not know; the vision tower has projections of the same names."""
    from peft import PeftModel
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**vision), image_token_index=60,
                                      text_config=transformers.LlamaConfig(**SMALL))
    torch.manual_seed(0)
    save(world / "llava", Base(transformers.LlavaForConditionalGeneration(config), tiny_tokenizer()))
    flags = "--data data --n 8 --epochs 1 --batch-size 2 --lr 3e-2 --run R".split()
    assert command(train, "--bases", "./llava", *flags) == 0
    base = load_base(str(world / "llava"))
    assert all(site.path.startswith("model.language_model.layers") for site in base.sites.values())
    assert command(export, "--run", "R", "--to", "llava", "--task", "two", "--out", "two") == 0
    assert "AutoModelForImageTextToText.from_pretrained" in (world / "two" / "README.md").read_text()
    model = transformers.AutoModelForImageTextToText.from_pretrained(world / "llava")
    adapters, t = evaluation.adapters_of(world / "R", "portal", "llava", base), load_config(world / "R")[1].tasks.index("two")
    batch = collate([Item(t, [5, 6, 7, 8, 9], [[10, 11, 12]], Row("two", "", [], 0))])
    with torch.no_grad():
        want = PeftModel.from_pretrained(model, world / "two")(input_ids=batch.ids).logits[batch.at]
    torch.testing.assert_close(base.logits(batch, adapters), want, rtol=1e-4, atol=1e-5)


def test_a_converter_of_other_layers_is_refused(unlike_world, capsys):
    quick = "--epochs 1 --batch-size 2".split()
    assert command(train, "--bases", "./hybrid", "--data", "data", "--n", "8", *quick, "--run", "R") == 0
    other = base_of("Qwen3_5ForCausalLM", config="Qwen3_5TextConfig", num_hidden_layers=4, linear_num_key_heads=2,
                    layer_types=["full_attention", "linear_attention"] * 2, linear_num_value_heads=4,
                    linear_key_head_dim=8, linear_value_head_dim=8)
    save(unlike_world / "hybrid", other)
    capsys.readouterr()
    assert command(evaluation, "--run", "R", "--methods", "base,portal", "--allow-changed-base") == 2
    one_line(capsys, ["the portal adapters of hybrid do not fit", "other layers or widths"])


def test_what_all_cannot_adapt_is_named(world, capsys):
    save(world / "experts", base_of("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2,
                                    layer_types=["full_attention"] * 3))
    flags = "--bases ./experts --data data --n 8 --epochs 1 --batch-size 2 --run R".split()
    assert command(train, *flags, "--modules", "all") == 2
    one_line(capsys, ["experts: GptOssForCausalLM has no gate to adapt: layer 0", "experts in one tensor"])
    assert command(train, *flags) == 0
    assert command(evaluation, "--run", "R", "--methods", "base,lora,portal", "--epochs", "1", "--batch-size", "2") == 0
    assert "lora experts: adapts q, k, v, o; the base has no gate, up, down" in capsys.readouterr().out
