"""Tokenizers of the kinds that models come with, trained in the test."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXTS = [*SENTENCES * 4, "naïve café — 東京 🎬 ok", "你好 , Größe"]


def byte_level(
    directory: Path, *, bos: str | None = "<s>", appends_eos: bool = False, more: tuple[str, ...] = (), vocab: int = 512
) -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen and Llama 3: a character may be several tokens.

    Args:
        appends_eos: it ends every text with </s> (id 2) by itself.
        more: special tokens added behind the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    around = [(token, SPECIAL.index(token)) for token in (bos, "</s>" if appends_eos else None) if token]
    single = " ".join([*([bos] if bos else []), "$A", *(["</s>"] if appends_eos else [])])
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return _saved(tokenizer, directory, bos, more)


def byte_fallback(directory: Path) -> PreTrainedTokenizerFast:
    """As Llama 2: ▁ for spaces, one put in front, unknown characters as bytes; decoding drops the first space."""
    tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [word for text in SENTENCES * 4 for word in text.split()]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=512, special_tokens=[*SPECIAL, *tokens], show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _saved(tokenizer, directory, "<s>", ())


def sentencepiece_like(directory: Path) -> PreTrainedTokenizerFast:
    """As T5 and Gemma's kind: a unigram model over ▁-marked words."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return _saved(tokenizer, directory, "<s>", ())


def _saved(tokenizer: Tokenizer, directory: Path, bos: str | None, more: tuple[str, ...]) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if more:
        wrapped.add_special_tokens({"additional_special_tokens": list(more)})
    wrapped.save_pretrained(directory)
    return wrapped
