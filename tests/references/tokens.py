"""Texts that are hard to tokenize, and llama.cpp's tokens of them with both real vocabularies."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Vocabulary
from real import ALICE, CODE, MIXED
from weights import GEMMA3, SMOLLM2, gguf_file

RANDOM_TEXTS = 420

# fmt: off
BY_HAND = [
    "", " ", "  ", "   ", "    ", "     ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\n\n\n\n\n",
    "\r\n", "\r\n\r\n", "\r", " \n", "\n ", " \n \n ", "\t\n", "\n\t", "  \t  ", "\u00a0",
    "\u3000", "\u200b", "\u2028", "\v", "\f", "\x00", "\x01\x02", "\x7f", "\ufeff", "a", " a",
    "  a", "a ", "a  ", " a ", "a b", "a  b", "a   b", "a\nb", "a\n\nb", "a \n b", "\na", "a\n",
    "\n a", "Hello", " Hello", "hello world", "Hello, world!", "Hello  world", "Hello\tworld",
    "HELLO WORLD", "hElLo wOrLd", "hello_world", "helloWorld", "hello-world", "I'm", "I'll",
    "I've", "don't", "they're", "he'd", "it's", "we'RE", "I'M", "'s", "'S 's", "''", "'",
    "O'Neill's", "rock 'n' roll", "’s it’s", "0", "1", "12", "123", "1234", "12345",
    "1234567890", "3.14159", "1,000,000", "1e-10", "0x1F", "-5", "+5", "1/2", "50%", "$3.99",
    "€5", "№5", "2024-01-31T12:34:56Z", "192.168.0.1", "v1.2.3-rc4", "007", "١٢٣", "१२३",
    "一二三", "½", "²³", "Ⅷ", "①②", "1st 2nd", "a1b2c3", "x10y20", "12 345 678",
    "http://example.com/a?b=c&d=e#f", "user@example.com", "C:\\path\\to", "/usr/bin/env",
    "#hashtag @mention", "<html></html>", "<a href=\"x\">", "{\"key\": [1, 2.5, null, true]}",
    "a=b;c=d", "if(x==y){z();}", "x!=y && z||w", "->", "=>", ":=", "===", "!!", "??", "...",
    "…", "--", "—", "***", "____", "    indented", "\tindented", "def f(x):\n    return x\n",
    "        deep\n    less\nnone", "a;\n\n\n    b;", "//comment\n#comment",
    "```python\nx\n```", "| a | b |\n|---|---|", "é", "e\u0301", "ñ", "n\u0303", "ä ö ü ß",
    "Å A\u030a", "ﬁ", "ｆｕｌｌ", "Ǆ", "İi", "ſ", "naïve café", "a\u0300\u0301\u0302\u0303",
    "\u0301", " \u0301", "Z͑ͫa͑l͑g͑o", "你好", "你好，世界！", "東京は日本の首都です。",
    "カタカナ ひらがな", "안녕하세요 세계", "한글", "ᄒ\u1161ᆫ", "สวัสดีชาวโลก",
    "नमस्ते दुनिया", "မြန်မာ", "ភាសាខ្មែរ", "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם",
    "مرحبا بالعالم", "فارسی", "հայերեն", "ქართული", "አማርኛ", "Tiếng Việt", "ᚠᚢᚦ", "𒀀𒁀", "𝔘𝔫𝔦",
    "𠀀𠀁", "ⵜⴰ", "༄༅", "🙂", "🙂🙂", " 🙂", "a🙂b", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈",
    "🇩🇪🇫🇷", "❤️", "☃", "♥︎", "🧑🏿‍🚀 in space", "1️⃣", "©®™", "∑∫√∞≠", "←↑→↓", "█▓▒░",
    "\ue000", "\U0010fffd", "\ufffd", "\u202eabc", "a\u200db", "a\u00adb", "x\u2009y",
    "tab\tsep\tvalues", "mixed日本語and한국어text", "Ünïcödé", "ΑΒΓ123абв", "中文123English",
    "a中b文c", "antidisestablishmentarianism", "Donaudampfschifffahrtsgesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis", "a" * 100, "ab" * 60, "A" * 33, "0" * 50,
    "9" * 7, " " * 40, "\n" * 20, "\t" * 12, "-" * 80, "=" * 31, "." * 17, "!" * 9, "🙂" * 12,
    "ा" * 5, " a" * 30, "\n\n " * 6, "x\n" * 10,
    "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch", "▁", "▁▁", "a▁b", "▁Hello",
    "Ġ", "Ġhello", "Ċ", "<0x0A>", "<0x41>", "##ing", "</w>", "[UNK]", "[CLS]", "<pad>", "<unk>",
    "<s>", "</s>", "<mask>",
]
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>",
    "<empty_output>", "<jupyter_start>", "<gh_stars>", "<bos>", "<eos>", "<pad>", "<unk>",
    "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unused0>", "<unused99>",
    "<table>", "</h1>", "[toxicity]",
]
PIECES = [
    " ", " ", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "the", "The", "of",
    "tokens", "Serving", "JAX", "ing", "e\u0301", "ß", "naïve", "0", "7", "42", "2025", "3.14",
    "1,000", "'s", "'ll", "n't", "\"", "'", "(", ")", "{", "}", "[", "]", ";", ":", ",", ".",
    "!", "?", "...", "/", "\\", "_", "-", "--", "#", "@", "$", "%", "^", "&", "*", "=", "==",
    "<", ">", "|", "~", "`", "for", "return", "self.", "i++", "привет", "Мир", "λόγος", "שלום",
    "سلام", "हिन्दी", "ไทย", "你", "世界", "、", "。", "です", "カ", "한국", "어", "🙂", "👍🏽",
    "👨‍👩‍👧", "🇯🇵", "é", "Ω", "ﷺ", "½", "²", "١", "\u0301", "\u200d", "\u200b", "\ufe0f",
    "▁", "Ġ", "𝒳", "𠮷", "x" * 9,
]
# fmt: on


def texts() -> list[str]:
    """The texts, the same in every run."""
    rng = np.random.default_rng(0)
    found = list(BY_HAND)
    for token in SPECIAL:
        found += [token, f" {token} ", f"a{token}b", f"{token}{token}", f"{token}\n\nx {token}"]
    found += [
        ALICE,
        CODE,
        MIXED,
        CODE * 3,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ]
    found += [
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<|im_start",
        "|im_end|>",
    ]
    for _ in range(RANDOM_TEXTS - 100):
        chosen = rng.integers(len(PIECES), size=rng.integers(2, 24))
        found.append("".join(PIECES[i] for i in chosen))
    for _ in range(60):  # any assigned or unassigned character, by plane
        top = [0x250, 0x3000, 0xD7FF, 0x1FFFF][rng.integers(4)]
        codes = rng.integers(0x20, top, size=rng.integers(1, 16))
        found.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
    for _ in range(40):  # special tokens among other pieces
        pool = SPECIAL + PIECES[:60]
        found.append("".join(pool[i] for i in rng.integers(len(pool), size=8)))
    return list(dict.fromkeys(found))


def make(folder: Path) -> None:
    """Writes texts.json.gz and, for each model, the token ids of every text."""
    all_texts = texts()
    _write(folder / "texts.json.gz", all_texts)
    for weights in (SMOLLM2, GEMMA3):
        with gguf_file(weights) as path:
            vocabulary = Vocabulary(path)
            ids = {
                name: [vocabulary.tokenize(text, parse_special=special) for text in all_texts]
                for name, special in (("special", True), ("plain", False))
            }
            for text, token_ids in zip(all_texts, ids["plain"], strict=True):
                # SentencePiece vocabularies use ▁ for the space, so it does not come back
                if vocabulary.detokenize(token_ids) != text and "▁" not in text:
                    raise AssertionError(f"{weights.name} does not give back {text[:60]!r}")
            _write(folder / f"{weights.name}.json.gz", ids)


def _write(path: Path, value: Any) -> None:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, mtime=0))
