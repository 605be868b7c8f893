"""Train z-image-nano's tokenizer, a byte-level BPE of the captions, and write it to a folder for transformers.

    python examples/train_from_scratch/make_tokenizer.py

Writes `data/tokenizer/`. It has Qwen3's chat template, which Z-Image's pipeline uses.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
PHRASES = ("user\n", "assistant\n", "\n", "a picture of an", "please draw the", "emoji of", "show me", "icon", "image")
"""Texts besides the captions that should take few tokens."""


def main() -> None:
    """Train and save the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=Path("data/emoji/metadata.csv"))
    parser.add_argument("--output", type=Path, default=Path("data/tokenizer"))
    parser.add_argument("--size", type=int, default=1024)
    arguments = parser.parse_args()

    with arguments.manifest.open(encoding="utf-8", newline="") as file:
        captions = [row["prompt"] for row in csv.DictReader(file)]
    texts = [*captions, *PHRASES * 8]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    # Without spaces a word is the same tokens wherever it stands, first or later.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], additional_special_tokens=[SPECIAL[1]]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(arguments.output)
    lengths = [len(fast.encode(caption)) for caption in captions]
    print(f"{len(fast)} tokens; captions take {sum(lengths) / len(lengths):.1f} tokens, at most {max(lengths)}")


if __name__ == "__main__":
    main()
