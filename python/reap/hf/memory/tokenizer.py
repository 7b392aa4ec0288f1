"""transformers' tokenizers as `reap.text.windows` wants them."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HFTokenizer:
    """`reap.text.windows.Tokenizer` around a transformers tokenizer, or around none (then only token ids can be
    used)."""

    def __init__(self, tokenizer: Any, n_vocab: int) -> None:
        self._tokenizer = self.wrapped = tokenizer
        self.n_vocab = n_vocab
        self.has_tokenizer = tokenizer is not None
        self.bos: int | None = getattr(tokenizer, "bos_token_id", None)
        self.add_bos = bool(getattr(tokenizer, "add_bos_token", False))
        self.eos: int | None = getattr(tokenizer, "eos_token_id", None)
        template = getattr(tokenizer, "chat_template", None)
        self.chat_template: str | None = template.get("default") if isinstance(template, dict) else template
        self._added: dict[int, str] = {
            i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        }
        self._bytes = _bytes_of_characters() if _is_byte_level(tokenizer) else None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`."""
        named = {"add_special_tokens": add_special, "split_special_tokens": not parse_special, "verbose": False}
        ids: list[int] = self._tokenizer(text, return_attention_mask=False, **named)["input_ids"]
        return ids

    def token_text(self, token: int) -> bytes:
        """The bytes of a token, special tokens included."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if self._bytes is not None and all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece)
        if found := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return str(piece).replace("▁", " ").encode()  # as sentencepiece writes a space


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


def _bytes_of_characters() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as: printable ones of Latin-1 for themselves, the rest from
    U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
