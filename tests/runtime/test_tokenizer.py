"""FolderTokenizer equals transformers' tokenizer of the same folder, and hands over to it what it does not do."""

from __future__ import annotations

import copy
import json
import pickle
import random
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diffsynth.runtime.role import Tokenizer, load_processor
from diffsynth.runtime.tokenizer import FolderTokenizer
from diffsynth.testing.tiny_processors import byte_tokenizer

ROLE = Tokenizer(source="owner/model:tokenizer/")
OPTIONS = [
    {},
    {"add_special_tokens": False},
    {"padding": "longest", "return_tensors": "pt"},
    {"padding": True, "padding_side": "left", "return_tensors": "pt", "return_offsets_mapping": True},
    {"padding": "max_length", "max_length": 9, "truncation": True, "return_tensors": "pt"},
    {"padding": "max_length", "max_length": 200, "truncation": True, "return_offsets_mapping": True},
    {"max_length": 4, "truncation": True},
    {"max_length": 4, "truncation": True, "return_overflowing_tokens": True},
    {"return_length": True},
]
LETTERS = [
    *"aZ 9.,!\n\t\u00e9\u4e2d\U0001f34e\u200b\u0301",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "<|endoftext|>",
    "x" * 40,
]


@pytest.fixture(scope="module", params=["nano", "byte"])
def folder(request, tmp_path_factory) -> Path:
    if request.param == "nano":
        return Path(str(files("diffsynth_zimage"))) / "nano" / "tokenizer"
    path = tmp_path_factory.mktemp("byte")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def oracle(folder) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def texts() -> list[str]:
    draw = random.Random(3)
    return ["", "a red apple", *("".join(draw.choices(LETTERS, k=draw.randrange(1, 30))) for _ in range(40))]


def plain(tokens) -> dict[str, object]:
    values = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in tokens.items()}
    return json.loads(json.dumps(values))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_transformers(folder, oracle, options):
    ours = load_processor("tokenizer", ROLE, folder)
    assert type(ours) is FolderTokenizer
    got, truth = ours(texts(), **options), oracle(texts(), **options)
    assert plain(got) == plain(truth)
    assert {key: type(value) for key, value in got.items()} == {key: type(value) for key, value in truth.items()}
    for text in texts()[1:5]:
        assert plain(ours(text, **options)) == plain(oracle(text, **options))


def test_decodes_as_transformers(folder, oracle):
    ours = FolderTokenizer.from_pretrained(folder, trust_remote_code=False)
    for text in texts():
        ids = oracle(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)
        assert ours.decode(torch.tensor(ids, dtype=torch.long)) == oracle.decode(ids)
    assert ours.decode(5) == oracle.decode(5)
    assert ours.decode([[5, 6], [7]]) == oracle.decode([[5, 6], [7]])
    assert (len(ours), ours.pad_token_id, ours.is_fast) == (len(oracle), oracle.pad_token_id, oracle.is_fast)


def test_attributes_are_those_of_transformers(folder, oracle):
    ours = FolderTokenizer.from_pretrained(folder, trust_remote_code=False)
    message = [{"role": "user", "content": "an apple"}]
    assert ours.eos_token_id == oracle.eos_token_id
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(message, **options) == oracle.apply_chat_template(message, **options)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ours.nonsense


def test_what_is_set_is_used_from_then_on(folder):
    ours = FolderTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert ours(["a red apple", "a"], padding=True)["attention_mask"][1][0] == 1
    ours.padding_side = "left"
    assert ours(["a red apple", "a"], padding=True)["attention_mask"][1][0] == 0
    before = len(ours)
    ours.add_tokens(["qqq"])
    assert ours("qqq")["input_ids"] == [before]
    assert len(ours) == before + 1


def test_tokens_are_attributes_and_move():
    nano = Path(str(files("diffsynth_zimage"))) / "nano" / "tokenizer"
    tokens = FolderTokenizer.from_pretrained(nano, trust_remote_code=False)(["a", "b"], return_tensors="pt")
    assert tokens.input_ids is tokens["input_ids"]
    assert tokens.to("meta").attention_mask.is_meta
    with pytest.raises(AttributeError, match="returned input_ids, attention_mask, and no 'offsets'"):
        _ = tokens.offsets


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(folder, copied):
    ours = FolderTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert copied(ours)(texts()) == ours(texts())


def change(folder: Path, name: str, **fields: object) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def ends_with_a_token(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    end = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(folder)


CHANGES = {
    "a class of its own": lambda folder: change(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer"),
    "an option of transformers": lambda folder: change(folder, "tokenizer_config.json", add_bos_token=False),
    "a special token more": lambda folder: change(folder, "tokenizer_config.json", extra_special_tokens=["qqq"]),
    "padding": lambda folder: change(
        folder,
        "tokenizer.json",
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 257,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    ),
    "older files": lambda folder: (folder / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}'),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_folders_are_read_by_transformers(tmp_path, changed):
    byte_tokenizer().save_pretrained(tmp_path)
    CHANGES[changed](tmp_path)
    assert isinstance(load_processor("tokenizer", ROLE, tmp_path), PreTrainedTokenizerFast)


def test_texts_that_end_with_a_token_are_cut_before_it(tmp_path):
    ends_with_a_token(tmp_path)
    ours = FolderTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(ours) is FolderTokenizer
    oracle = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=False)
    for options in OPTIONS:
        assert plain(FolderTokenizer.from_pretrained(tmp_path, trust_remote_code=False)(texts(), **options)) == plain(
            oracle(texts(), **options)
        )
