"""Tokenizers of folders: by the library `tokenizers` alone where the files say everything, else by transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

_LARGEST = 100_000
"""Number of tokens above which transformers compares a tokenizer with published ones, to mend their files."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WITHOUT_EFFECT = {
    *("backend", "chat_template", "is_local", "local_files_only", "model_max_length", "padding_side", "tokenizer_class")
}
"""Settings that change no token, or that are read here."""


class Tokens(dict[str, Any]):
    """Token ids, mask and offsets that a tokenizer returns: a dict whose values are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"a tokenizer returned {', '.join(self)}, and no {name!r}")
        return self[name]

    def to(self, device: torch.device | str) -> Tokens:
        """Return `Tokens` with all tensors on `device`."""
        return Tokens({key: value.to(device) if hasattr(value, "to") else value for key, value in self.items()})


class FolderTokenizer:
    """A tokenizer that is called like those of transformers, without importing transformers: that takes longer than to
    import torch.

    Arguments and attributes that it does not have are those of transformers' tokenizer of the folder, which is loaded
    when one of them is first used or set, and is used from then on.

    Args:
        folder: with `tokenizer.json` and `tokenizer_config.json`.
        backend: of `tokenizer.json`.
        config: of `tokenizer_config.json`.
    """

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self.__dict__.update(_folder=folder, _backend=backend, _config=config, _other=None)

    @staticmethod
    def from_pretrained(folder: Path | str, *, local_files_only: bool = True, trust_remote_code: bool = False) -> Any:
        """Return the tokenizer of a folder: a `FolderTokenizer` if the folder's files say everything, else what
        `transformers.AutoTokenizer` returns.

        Args:
            folder: the folder.
            local_files_only, trust_remote_code: as for `load_processor`; nothing is downloaded, and no code is run.

        Raises:
            Exception: of transformers or `tokenizers`, for a damaged file.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            complete = _is_complete(folder, config, written)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            complete = False  # transformers reads other files, and says what is wrong with these
        if not complete:
            return _of_transformers(folder)
        return FolderTokenizer(folder, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config)

    @property
    def is_fast(self) -> bool:
        """Whether it knows the characters of each token: always."""
        return True

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that pads texts; None if there is none."""
        if self._other is not None or self._config.get("pad_token") is None:
            return self._loaded().pad_token_id
        return self._backend.token_to_id(self._config["pad_token"])

    def __len__(self) -> int:
        return len(self._other) if self._other is not None else self._backend.get_vocab_size()

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        padding_side: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        **others: Any,
    ) -> Any:
        """Return `Tokens`: `input_ids` and `attention_mask` (1 for text, 0 for padding), and on request
        `offset_mapping`, (first, last + 1) character of each token. They are int64 tensors `b s` (offsets `b s 2`) with
        `return_tensors="pt"`, else lists: of one text, or of several.

        Args:
            text: one or more.
            add_special_tokens: whether tokens that begin and end a text are added, if the tokenizer has such.
            padding: False, True or "longest" (of the texts), or "max_length".
            padding_side: "left" or "right"; by default that of the folder.
            max_length: number of tokens to cut and pad to.
            truncation: whether longer texts are cut.
            return_tensors: "pt" for tensors, None for lists.
            return_offsets_mapping: whether offsets are returned.
            others: arguments of transformers' tokenizers.

        Raises:
            ValueError: tensors of texts of different lengths without padding.
        """
        one = isinstance(text, str)
        texts = [text] if one else list(text)
        pads = padding is not False
        known = (
            self._other is None
            and not others
            and bool(texts)
            and all(isinstance(each, str) for each in texts)
            and padding in (False, True, "longest", "max_length")
            and (padding != "max_length" or max_length is not None)
            and truncation in (False, True)
            and (not truncation or (max_length is not None and not self._backend.num_special_tokens_to_add(False)))
            and return_tensors in (None, "pt")
            and (not pads or self.pad_token_id is not None)
        )
        if not known:
            given = {"add_special_tokens": add_special_tokens, "padding": padding, "padding_side": padding_side}
            given |= {"max_length": max_length, "truncation": truncation, "return_tensors": return_tensors}
            return self._loaded()(text, **given, return_offsets_mapping=return_offsets_mapping, **others)
        encodings = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        most = max_length if truncation else None
        ids = [each.ids[:most] for each in encodings]
        made = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        if return_offsets_mapping:
            made["offset_mapping"] = [each.offsets[:most] for each in encodings]
        if pads:
            length = max_length if padding == "max_length" else max(map(len, ids))
            left = (padding_side or self._config.get("padding_side", "right")) == "left"
            fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "offset_mapping": (0, 0)}
            made = {key: [_padded(row, fills[key], length, left=left) for row in rows] for key, rows in made.items()}
        if return_tensors == "pt":
            return Tokens({key: torch.tensor(rows) for key, rows in made.items()})
        return Tokens({key: rows[0] for key, rows in made.items()} if one else made)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **others: Any) -> Any:
        """Return the text of token ids, a str; for arguments see transformers' tokenizers."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        if self._other is not None or others or not all(isinstance(each, int) for each in ids):
            return self._loaded().decode(token_ids, skip_special_tokens=skip_special_tokens, **others)
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        # Names of copy and pickle, and the config, which no tokenizer has and a pipeline asks all its components for.
        if name.startswith("_") or name == "config":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._loaded(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loaded(), name, value)

    def _loaded(self) -> Any:
        if self._other is None:
            self.__dict__["_other"] = _of_transformers(self._folder)
        return self._other


def _of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer  # takes a second or two

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _is_complete(folder: Path, config: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether transformers would change nothing in the tokenizer of `tokenizer.json`.

    Args:
        folder: the folder.
        config: content of `tokenizer_config.json`.
        written: content of `tokenizer.json`.
    """
    named = [config[key] for key in _NAMED if config.get(key) is not None]
    special = [*named, *config.get("extra_special_tokens", ())]
    declared = {token["content"] for token in written["added_tokens"] if token["special"]}
    return (
        config["tokenizer_class"] in ("TokenizersBackend", "PreTrainedTokenizerFast")
        and set(config) <= {*_NAMED, *_WITHOUT_EFFECT, "extra_special_tokens"}
        and all(isinstance(token, str) for token in special)
        and set(special) <= declared
        and written["truncation"] is None
        and written["padding"] is None
        and len(written["model"]["vocab"]) + len(written["added_tokens"]) < _LARGEST
        and not any((folder / name).exists() for name in ("special_tokens_map.json", "added_tokens.json"))
    )


def _padded(row: Sequence[Any], fill: Any, length: int, *, left: bool) -> list[Any]:
    missing = [fill] * (length - len(row))
    return [*missing, *row] if left else [*row, *missing]
