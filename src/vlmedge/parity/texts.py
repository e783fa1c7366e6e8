"""Texts of many kinds, on which tokenizers part: scripts, blanks, numbers, code, joined characters, special tokens."""

from __future__ import annotations

_BASES = (
    "What colour is the cat?", "how many people are there", "Describe this image.", "a red circle", " leading blank",
    "trailing blank ", "two  blanks", "tabs\tand\nnew lines\r\n", "", "0123456789", "3.14159, 1e-5; 50%",
    "don't we'll I'm", "snake_case camelCase UPPER", "for (int i = 0; i < n; ++i) { x[i] += 1; }",
    "https://example.org/a?b=c&d=e#f", "naïve café Ünïcödé", "Ελληνικά", "русский текст", "العربية", "עברית",
    "हिन्दी", "中文字符测试", "日本語のテキスト", "한국어", "emoji 😀👍🏽🇩🇪", "e\u0301 combining", "\u200bzero width",
    "<|endoftext|>", "<b>bold</b>", "a" * 40,
)  # fmt: skip
_ENDS = ("?", "\n\n", " 42", "🙂", "'s", ":", "  x", "。", ")")

# The bases, in pairs, and with endings.
TEXTS = (
    *_BASES,
    *(f"{a} {b}" for a, b in zip(_BASES, _BASES[7:] + _BASES[:7], strict=True)),
    *(f"{text}{end}" for text in _BASES for end in _ENDS),
)
