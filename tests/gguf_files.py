"""The embedded model as llama.cpp would store it: its names, its order of the rows of query and key, its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import load_file
from torch import Tensor

TINY = Path("assets/tiny-llama")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_gguf(
    path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.F32, architecture: str = "llama", without: str = ""
) -> Path:
    """Matrices are stored as ``kind``, vectors in float32, and tensors of one name not at all."""
    config = json.loads((TINY / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, config)
    for name, tensor in load_file(TINY / "model.safetensors").items():
        if name == without:
            continue
        values = _as_stored(name, tensor.float(), config["num_attention_heads"]).numpy()
        stored = quantize(values, kind) if values.ndim == 2 else values
        writer.add_tensor(_name(name), stored, raw_dtype=kind if values.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, config: dict[str, int]) -> None:
    model = json.loads((TINY / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i == config["eos_token_id"] else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])


def _name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _as_stored(name: str, tensor: Tensor, num_heads: int) -> Tensor:
    """llama.cpp keeps the two halves of a head's rotation side by side."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    rows, columns = tensor.shape
    return tensor.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
