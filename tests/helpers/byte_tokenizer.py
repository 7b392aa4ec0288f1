"""A tokenizer whose tokens are bytes, for tests of text alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n'"
    " }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259}


class ByteTokenizer:
    """Bytes as ids, four special tokens, and one merge, so that a token can straddle prompt and response."""

    n_vocab = 261
    has_tokenizer = True
    bos: int | None = 256
    eos: int | None = 257
    chat_template: str | None = CHATML

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = [256] if add_special else []
        pattern = "|".join(map(re.escape, SPECIAL)) if parse_special else "(?!)"
        for piece in re.split(f"({pattern})", text):
            ids += [SPECIAL[piece]] if parse_special and piece in SPECIAL else piece.encode()
        return self._merge(ids)

    def _merge(self, ids: list[int]) -> list[int]:
        merged: list[int] = []
        for token in ids:
            if token == 10 and merged and merged[-1] == 10:
                merged[-1] = 260
            else:
                merged.append(token)
        return merged

    def token_text(self, token: int) -> bytes:
        names = {number: name.encode() for name, number in SPECIAL.items()} | {260: b"\n\n"}
        return names.get(token) or bytes([token])


def text_of(tokens: Iterable[int], tokenizer: ByteTokenizer | None = None) -> str:
    return b"".join((tokenizer or ByteTokenizer()).token_text(int(token)) for token in tokens).decode()
