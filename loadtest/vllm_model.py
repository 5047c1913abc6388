"""A tiny Qwen2 model with random weights, and a tokenizer trained on this Python's own sources; no network.

``PYTHON -P loadtest/vllm_model.py FOLDER``, with the Python of an environment that has vLLM. Ten seconds, 3.4 million
parameters, the same ones each time.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TOKENS: Final = 2048
SOURCES: Final = 150
TEMPLATE: Final = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, with the marks of a chat."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:SOURCES]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(path) for path in sources], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = TEMPLATE
    return made


def model(words: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Random weights, drawn from a fixed seed."""
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(shape).to(torch.bfloat16)


def main(folder: str) -> None:
    """Write both to a folder, which is made."""
    words = tokenizer()
    weights = model(words)
    words.save_pretrained(folder)
    weights.save_pretrained(folder)
    print(f"{sum(p.numel() for p in weights.parameters()) / 1e6:.1f} M parameters in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
