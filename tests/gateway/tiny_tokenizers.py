"""Small tokenizers of the two kinds that models use, trained on a few sentences."""

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Once upon a time there was a little girl. She liked to play in the park.",
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "Schöne Grüße aus München, viele Grüße aus Köln.",
    "你好世界,你好,谢谢",
    "def main():\n    return 1\n",
] * 3
BOS, EOS, END_OF_TURN = "<s>", "</s>", "<|im_end|>"


@cache
def byte_level_json() -> str:
    """GPT-2's kind: SmolLM2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[BOS, EOS, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think 思>", special=False)])
    return tokenizer.to_str()


@cache
def sentencepiece_json(*, strips: bool = True, adds_bos: bool = True) -> str:
    """Llama 2's kind, and with `strips` off Gemma's: text pieces and byte fallback."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=["<unk>", BOS, EOS, END_OF_TURN, *byte_tokens],
        limit_alphabet=50,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    raw = json.loads(tokenizer.to_str())
    # The byte tokens are in the vocabulary, but are not added tokens.
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    prepend = [normalizers.Prepend("▁")] if strips else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 1)]
        )
    return tokenizer.to_str()
