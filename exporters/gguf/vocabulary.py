"""tokenizer.json to llama.cpp's vocabulary: tokens, types, merges, and the pre-tokenizer recognised by content."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from vlmedge.errors import CheckpointError, UnsupportedError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # enum llama_token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What llama.cpp splits by under each name, as the tokenizer.json files of the world write it (src/llama-vocab.cpp).
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (_GPT2 + r"|\s+",): "gpt-2",
    (_LEAD + r"\p{N}{1,3}" + _TAIL,): "llama-bpe",
    (_LEAD + r"\p{N}" + _TAIL,): "qwen2",
    (r"\p{N}", _GPT2): "starcoder",
    (r"\p{N}", _GPT2 + r"|\s+"): "starcoder",
    (r"\p{N}+", r"(?=(\d{3})+(?!\d))"): "superbpe",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE vocabulary of exactly as many tokens as the embedding has rows.

    `tokens[i]` is spelled in the byte-level alphabet where `types[i]` is NORMAL, plainly elsewhere. `notes`: in
    what stock llama.cpp's tokenization may differ from the checkpoint's.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    notes: tuple[str, ...]

    def text(self, ids: tuple[int, ...]) -> str:
        """The text of token ids."""
        table = _bytes_of()
        out = bytearray()
        for i in ids:
            if self.types[i] == NORMAL:
                out += bytes(table[c] for c in self.tokens[i] if c in table)
            else:
                out += self.tokens[i].encode()
        return out.decode(errors="replace")


def read_vocabulary(tokenizer: bytes, size: int) -> Vocabulary:
    """Read tokenizer.json for an embedding of `size` rows; rows without a token become unused [PADi].

    Raises CheckpointError for a file that is not a tokenizer, UnsupportedError for one that is not byte-level BPE.
    """
    try:
        data = json.loads(tokenizer)
        model = data["model"]
        kind, vocab, merges = model.get("type"), model.get("vocab"), model.get("merges")
        added = {int(a["id"]): (str(a["content"]), bool(a.get("special"))) for a in data.get("added_tokens") or []}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"tokenizer.json is damaged: {type(error).__name__}: {error}") from None
    if kind != "BPE" or model.get("byte_fallback") or not isinstance(vocab, dict) or not merges:
        raise UnsupportedError(f"tokenizer.json is of type {kind}; GGUF export knows byte-level BPE")
    names = {int(i): str(token) for token, i in vocab.items()}
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for i, token in names.items():
        if i < size:
            tokens[i], types[i] = token, NORMAL
    for i, (token, special) in added.items():
        if i < size:
            tokens[i], types[i] = token, CONTROL if special else USER_DEFINED
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]
    beyond = sum(i >= size for i in names.keys() | added.keys())
    if beyond:
        kept = set(tokens)
        pairs = [p for p in pairs if "".join(p) in kept]
    pre, notes = _pre_tokenizer(data)
    if beyond:
        notes = (*notes, f"{beyond} tokens have ids beyond the embedding's {size} rows and are left out")
    # A blank inside a half (no byte-level tokenizer has one) is spelled as llama.cpp's converter does.
    return Vocabulary(tokens, types, [" ".join(half.replace(" ", "Ġ") for half in p) for p in pairs], pre, notes)


def _pre_tokenizer(data: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name for the way text is split before BPE, and notes on what it does not do."""
    notes: list[str] = []
    if data.get("normalizer"):
        notes.append(f"stock llama.cpp does not apply the tokenizer's normalizer {data['normalizer'].get('type')}")
    steps = data.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    patterns: list[str] = []
    for step in steps:
        if step.get("type") == "Split":
            pattern = step.get("pattern") or {}
            patterns.append(str(pattern.get("Regex") or pattern.get("String") or ""))
        elif step.get("type") == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step.get("type") == "ByteLevel":
            if step.get("use_regex", True):
                patterns.append(_GPT2)
            if step.get("add_prefix_space"):
                notes.append("stock llama.cpp does not put the tokenizer's blank before a text")
    found = PRE_TOKENIZERS.get(tuple(patterns))
    if found is not None:
        return found, tuple(notes)
    # Without a split, words join over blanks (superword BPE); superbpe is llama.cpp's nearest: it splits digits only.
    joined = {"\n".join(key): name for key, name in PRE_TOKENIZERS.items()}
    close = difflib.get_close_matches("\n".join(patterns), joined, n=1, cutoff=0.0) if patterns else []
    pre = joined[close[0]] if close else "superbpe"
    own = " then ".join(patterns) or "none: superword BPE"
    notes.append(
        f"stock llama.cpp has no pre-tokenizer like this checkpoint's ({own}); the nearest, {pre}, is written, "
        "and a stock app may cut a prompt into other tokens"
    )
    return pre, tuple(notes)


def _bytes_of() -> dict[str, int]:
    """The byte-level alphabet: character -> byte (GPT-2's bytes_to_unicode, inverted)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in plain]
    return table | {chr(256 + n): b for n, b in enumerate(others)}
