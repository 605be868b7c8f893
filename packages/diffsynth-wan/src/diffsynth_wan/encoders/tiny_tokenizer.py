"""A tokenizer that works like UMT5's and takes a few kilobytes, for tiny hubs."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "</s>", "<unk>")
"""Of the same numbers as UMT5's: 0, 1 and 2."""

VOCAB_SIZE = len(SPECIAL) + 256


def write_tiny_tokenizer(folder: Path) -> None:
    """`tiny_tokenizer` as the folder that `AutoTokenizer` reads."""
    tiny_tokenizer().save_pretrained(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the end of every text; padding on the right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = SPECIAL[1]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=end,
        unk_token=SPECIAL[2],
        padding_side="right",
        model_max_length=512,
    )
