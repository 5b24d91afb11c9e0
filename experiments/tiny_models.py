"""Tiny random models of every causal language model that the installed transformers has, made without a list of them.

Each is built from its class's default configuration, with the settings of sizes replaced by small ones, found by their
names. What these names do not say, a few HINTS do; VARIANTS are structures that a type has only with other settings.
"""
import dataclasses, itertools, re

import torch
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto import modeling_auto

from runtime.files import first_line

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - CAUSAL  # the types that it alone knows
L, VOCABULARY = 4, 96
SIZES = {  # {what the whole name of a setting matches: its value}; the first match counts
    r"\w*vocab(_size)?(_\w+)?": VOCABULARY,
    r"\w*max_position_embeddings|max_seq_len|n_positions|n_ctx|context_length": 256,
    r"num_nextn_predict_layers|num_dense_layers|first_k_dense_replace|num_mem_blocks|cross_layer_interval": 1,
    r"num_layers_per_stack": 2,
    r"(num_|n_)?((hidden|encoder|decoder)_)?(layers?|blocks)|depth|(encoder|decoder)_num_layers|\w*_depth": L,
    r"(linear_num|swa_num|num)_key(_value)?_heads|num_kv_heads|kv_n_heads|num_query_groups|n_mamba_heads": 2,
    "index_n_heads": 16,                                     # few of them often give several tokens the same score, 0
    r"(\w+_)?(n|num)_(\w+_)?heads?|\w*attention_heads|resampler_heads": 4,
    r"qk_rope_head_dim|rotary_dim": 8, "v_head_dim": 12, "qk_head_dim": 24,
    r"\w*head_dim|dim_head|mamba_(d_head|headdim)|d_head|d_kv|kv_channels|attention_head_size|\w+_rank|hc_lowrank": 16,
    r"attention_hidden_size|mamba_d_ssm": 64, "codebook_size": 8,
    r"\w*hidden_size\w*|d_model|n_embd|(\w+_)?embed(ding)?_(dim|size)|(emb|word_embed_proj|adapter_in|adapter_out)_dim|"
    r"(projection|projector_\w+|vision_output|output|codebook)_dim|lru_width|\w*proj_size|adapter_input_size": 32,
    r"moe_\w*size|\w*shared\w*_size|share_expert_dim|expert_\w*size": 24,
    r"\w*intermediate\w*_size(_mlp)?|\w*ffn(_hidden)?_(dim|size)|feed_forward_size": 48,
    r"d_ff|dff|dim_ff|[nd]_inner|mlp_dim": 48,
    r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts": 2, r"n_group|num_expert_group|topk_group": 1,
    r"\w*sliding_window(_size)?|local_attention|(attention_)?window_size|attention_chunk_size|index_topk\w*": 6,
    r"index_block_size": 6, r"\w*chunk_size|block_size|\w*d_state|(ssm_)?state_size": 8, r"(mamba_)?n_?groups": 1}
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
PLACEHOLDER = re.compile(r"\w*(token_ids?|token_index|_index|im_\w+_id|patch_id)")   # of an image, a sound, a mask ...
TYPES = re.compile(r"\w*layers?(_block)?_types?|indexer_types|att(entio)?n_layers")  # a list with an entry a layer
ABSENT = dict(head_dim=16, num_experts_per_tok=2, n_shared_experts=1, n_routed_experts=4)  # where the default is None
WINDOWS = ["full_attention", "sliding_attention"] * 2
HYBRID = ["linear_attention", "full_attention"] * 2
HINTS = {  # {model type: what its names do not say}
    "bamba": dict(attn_layer_indices=[1, 3]),
    "cohere_compass_text": dict(rope_parameters={"full_attention": dict(rope_type="default", rope_theta=1e4,
                                                                        mrope_section=[2, 2, 4])}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)),
    "dory": dict(n_input_layers=1, n_recurrent_layers=2, n_output_layers=1, n_recurrent_loops=2),
    "dots3_note_text": dict(swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_q_lora_rank=16,
                            swa_kv_lora_rank=16, swa_head_dim=16, swa_qk_nope_head_dim=8, swa_qk_rope_head_dim=8,
                            swa_v_head_dim=12),
    "falcon_h1": dict(mamba_d_head=16), "gemma3n_text": dict(num_kv_shared_layers=2),
    "gemma4_text": dict(num_kv_shared_layers=2, global_head_dim=24), "gemma4_unified_text": dict(global_head_dim=24),
    "clip_vision_model": dict(hidden_size=64), "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=HYBRID), "helium": dict(head_dim=8),
    "muse_spark_audio": dict(hidden_sizes=[8, 8, 16, 16]),
    "hrm_text": dict(num_hidden_layers=4, num_layers_per_stack=2, H_cycles=1, L_cycles=1),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "laguna": dict(layer_types=WINDOWS, num_attention_heads_per_layer=[4, 2, 4, 2]),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2), "longcat_flash": dict(head_dim=8),
    "mellum": dict(layer_types=WINDOWS),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 2, index_block_size=2,
                               index_topk_blocks=2),
    "qwen2_5_omni_thinker": dict(vision_start_token_id=61), "qwen3_omni_moe_thinker": dict(vision_start_token_id=61),
    "nemotron": dict(num_key_value_heads=2),
    "qwen4_exp_text": dict(indexer_n_heads=16, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
                           indexer_compress_ratio=4),
    "step3p5": dict(sliding_window=6), "zamba": dict(mamba_dt_rank=4)}
VARIANTS = {  # {name: (model type, other settings)}
    "deepseek_v2 (lite)": ("deepseek_v2", dict(q_lora_rank=None)),
    "falcon (40b)": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon (rw)": ("falcon", dict(multi_query=False, num_kv_heads=4, alibi=True, bias=True, parallel_attn=False)),
    "gemma4_text (k = v)": ("gemma4_text", dict(attention_k_eq_v=True, num_global_key_value_heads=1)),
    "gpt_bigcode (multi-head)": ("gpt_bigcode", dict(multi_query=False)),
    "llama4_text (every second layer dense)": ("llama4_text", dict(moe_layers=[1, 3])),
    "qwen2 (windows)": ("qwen2", dict(use_sliding_window=True, layer_types=WINDOWS))}


def tiny_value(name, value, free):
    """Returns the small value of one setting of a configuration. free: an iterator of token ids."""
    if name in TOKENS:
        return TOKENS[name]
    if PLACEHOLDER.fullmatch(name):
        if isinstance(value, (list, tuple)):
            return [next(free) for _ in value]
        return next(free) if value and value > 8 else value                          # others are columns or layers
    if TYPES.fullmatch(name) and isinstance(value, (list, tuple)):
        kinds = list(dict.fromkeys(value))                                           # in order of their first layers
        return (kinds * L)[:max(L, len(kinds))]
    tiny = next((tiny for pattern, tiny in SIZES.items() if re.fullmatch(pattern, name)), value)
    if type(value) is not int or not value:
        return value
    return tiny if tiny == L else min(value, tiny)


def shrink(config, nested=False, free=None, **changes):
    """Returns a small configuration of the same class, with `changes`. nested: it is a part of another one."""
    free, old, new = free or itertools.cycle(range(61, VOCABULARY)), vars(config), {}
    for field in dataclasses.fields(config):
        name, value = field.name, old.get(field.name)
        if isinstance(value, PreTrainedConfig):
            new[name] = shrink(value, True, free)
        elif value is None and name in ABSENT:
            new[name] = ABSENT[name]
        elif field.init and name not in ("transformers_version", "id2label", "label2id"):
            tiny = tiny_value(name, value, free)
            if tiny != value or isinstance(tiny, (bool, int, float, str)) and tiny != field.default:
                new[name] = tiny
    rope = old.get("rope_parameters")
    if nested and isinstance(rope, dict) and "rope_type" in rope and "vocab_size" in new:  # of text beside an image
        width = new.get("head_dim") or (16 if old.get("head_dim") else 8)
        pairs = new.get("qk_rope_head_dim", int(rope.get("partial_rotary_factor", 1) * width)) // 2
        new["rope_parameters"] = rope | {"mrope_section": [pairs // 3, pairs // 3, pairs - 2 * (pairs // 3)]}
    if len(new.get("layer_types") or ()) > L:
        new["num_hidden_layers"] = len(new["layer_types"])
    if "num_key_value_heads" in new and old["num_key_value_heads"] == old.get("num_attention_heads"):
        new["num_key_value_heads"] = new["num_attention_heads"]
    return type(config)(**new | HINTS.get(config.model_type, {}) | changes)


def tiny_model(name):
    """Returns a tiny model of a model type or of a variant, with random weights that are large enough to matter."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    auto = AutoModelForCausalLM if model_type in CAUSAL else AutoModelForImageTextToText
    config = shrink(CONFIG_MAPPING[model_type](), **changes)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in auto.from_config(config).parameters())
    if parameters > 2e8:                                                             # before they are allocated
        raise ValueError(f"{parameters:.0e} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p) if p.dim() < 2 else 0.2 * torch.randn_like(p)
    return model


class Exact(TorchFunctionMode):
    """A context in which models compute in float64 what they otherwise do in float32: norms, softmax, positions."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)

    def __torch_function__(self, f, types, args=(), kwargs=None):
        f = torch.Tensor.double if f is torch.Tensor.float else f
        def wide(x):
            return torch.float64 if x is torch.float32 else x
        return f(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})


def tokens(n, seed):
    """Returns n ids of tokens that are not special ones."""
    return torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model, ids):
    """Returns the logits [S, vocabulary] of a plain forward pass over one row of token ids."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def not_counted(model):
    """Returns why a model is no decoder of text with attention, or None."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    ids = tokens(12, 0)
    try:
        logits = logits_of(model, ids)
    except Exception as error:                                                       # whatever it needs beside text
        return f"does not run on text alone: {first_line(error)}"
    if not logits.isfinite().all():
        raise ValueError("the tiny model's logits are not finite")
    if not torch.allclose(logits[:-1], logits_of(model, ids[:-1] + [ids[-1] % 50 + 5])[:-1], atol=1e-4):
        return "its logits depend on later tokens: an encoder, or a prefix that sees itself"
    configs, heads = [model.config.get_text_config(), *vars(model.config).values()], "num_attention_heads"
    attends = any({heads, config.attribute_map.get(heads)} & vars(config).keys()
                  for config in configs if isinstance(config, PreTrainedConfig))
    return None if attends else "purely recurrent"
