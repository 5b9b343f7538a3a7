"""A tokenizer of whole words, for small text towers such as the tiny world's, whose table of tokens must stay small."""
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

PADDING, START, UNKNOWN = 0, 1, 2  # token numbers; words follow, the end token comes last
REPORTED = set()  # unknown words that were named already, by any tokenizer


class WordTokenizer:
    """Like open_clip's tokenizers: captions [B] -> (B, context_length) int64. CLIP pools at the largest number, the end's."""

    def __init__(self, words, context_length):
        self.context_length = context_length
        self.ids = {word: i + UNKNOWN + 1 for i, word in enumerate(words)}
        self.end = len(words) + UNKNOWN + 1
        self.vocab_size = self.end + 1
        self.known_words = f"; it knows: {' '.join(words)}"

    def encode(self, caption):
        """Token numbers of the caption's words, without start and end."""
        words = caption.lower().replace(",", " ").replace(".", " ").split()
        unknown = [w for w in words if w not in self.ids and w not in REPORTED]
        if unknown:
            REPORTED.update(unknown)
            tqdm.write(f"words this model does not know: {', '.join(unknown)}{self.known_words}", file=sys.stderr)
            self.known_words = ""  # said once
        return [self.ids.get(w, UNKNOWN) for w in words]

    def __call__(self, captions):
        out = torch.full((len(captions), self.context_length), PADDING)
        for row, caption in zip(out, captions):
            tokens = [START, *self.encode(caption)[:self.context_length - 2], self.end]
            row[:len(tokens)] = torch.tensor(tokens)
        return out                                                                        # (B, context_length)


def read_words(path, sizes=None):
    """The WordTokenizer of a words.txt: a context length, then words. sizes: what the text tower beside it can read, by name."""
    length, *words = Path(path).read_text(encoding="utf-8").split() or [""]
    if not re.fullmatch("[1-9][0-9]{0,4}", length) or not words:
        raise ValueError(f"{path}: expected a context length, then words, found {length[:20]!r}")
    tokenizer = WordTokenizer(words, int(length))
    if sizes and (int(length) != sizes["context_length"] or tokenizer.vocab_size > sizes["vocab_size"]):
        raise ValueError(f"{path}: makes {length} tokens from 0 to {tokenizer.end}, the weights beside it read "
                         f"{sizes['context_length']} from 0 to {sizes['vocab_size'] - 1}")
    return tokenizer
