"""A tiny Llama with random weights as a GGUF file, each byte a token; no network.

``PYTHON -P loadtest/llama_cpp_model.py FILE``, with the Python of an environment that has `gguf`. Two and a half
million parameters, the same ones each time.
"""

from __future__ import annotations

import sys
from typing import Final

import gguf
import numpy as np

HIDDEN: Final = 256
LAYERS: Final = 4
HEADS: Final = 4
KEY_HEADS: Final = 2
INNER: Final = 512
CONTEXT: Final = 4096
SCALE: Final = 0.05
TEMPLATE: Final = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
MARKS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def byte_tokens() -> list[str]:
    """The 256 bytes as GPT-2's vocabulary writes them: what cannot be printed is moved behind what can."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    named = dict(zip(printed, map(chr, printed), strict=True)) | {b: chr(256 + n) for n, b in enumerate(others)}
    return [named[byte] for byte in range(256)]


def main(path: str) -> None:
    """Write the model."""
    tokens = [*MARKS, *byte_tokens()]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KEY_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_vocab_size(len(tokens))
    out.add_file_type(0)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL] * len(MARKS) + [gguf.TokenType.NORMAL] * 256)
    out.add_token_merges(["a b"])  # there has to be one
    out.add_bos_token_id(0)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_add_bos_token(False)
    out.add_uint32("tokenizer.ggml.fim_pre_token_id", 3)
    out.add_uint32("tokenizer.ggml.fim_suf_token_id", 4)
    out.add_uint32("tokenizer.ggml.fim_mid_token_id", 5)
    out.add_chat_template(TEMPLATE)
    drawn = np.random.default_rng(0)

    def weights(name: str, *shape: int) -> None:
        out.add_tensor(f"{name}.weight", (drawn.standard_normal(shape) * SCALE).astype(np.float32))

    def norm(name: str) -> None:
        out.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))

    weights("token_embd", len(tokens), HIDDEN)
    norm("output_norm")
    weights("output", len(tokens), HIDDEN)
    for number in range(LAYERS):
        block, keys = f"blk.{number}", HIDDEN // HEADS * KEY_HEADS
        norm(f"{block}.attn_norm")
        weights(f"{block}.attn_q", HIDDEN, HIDDEN)
        weights(f"{block}.attn_k", keys, HIDDEN)
        weights(f"{block}.attn_v", keys, HIDDEN)
        weights(f"{block}.attn_output", HIDDEN, HIDDEN)
        norm(f"{block}.ffn_norm")
        weights(f"{block}.ffn_gate", INNER, HIDDEN)
        weights(f"{block}.ffn_up", INNER, HIDDEN)
        weights(f"{block}.ffn_down", HIDDEN, INNER)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
