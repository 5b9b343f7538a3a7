"""
T5's encoder as a text tower, by transformers, and the cleaning that captions had in the training of Open-Sora.

The cleaning is DeepFloyd IF's: what it takes out is what texts of web pictures have besides a description. Captions go through it
twice, as in the published code, where BeautifulSoup reads the HTML; here Python's own parser does, on which that is built.

Letters: B captions, N tokens of each, E their width.
"""
import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy
import torch
from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from bases import modelscope
from bases.diffusers_base import read_part, read_tokenizer

SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE_TYPES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
LINKS = [("<person>", "person")] + [(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "") for scheme in ("https?", "www")]
SIGNS = [  # (pattern, what takes its place), in this order
    (r"@\w+\b", ""), ("[\u31c0-\u9fff]+", ""),                                           # nicknames; Chinese characters
    ("[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
     "-"),
    ("[`´«»“”¨]", '"'), ("[‘’]", "'"), ("&quot;?", ""), ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "), (r"\d:\d\d\s+$", ""), (r"\\n", " "),   # addresses; numbers of articles
    (r"#\d{1,3}\b", ""), (r"#\d{5,}\b", ""), (r"\b\d{6,}\b", ""), (rf"\S+\.{FILE_TYPES}", ""),
    ("[\"']{2,}", '"'), (r"\.{2,}", " "), (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "), (r"\s+\.\s+", " ")]
WORDS = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""), (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""), (r"\b\d+[a-zA-Z]+\d+\b", ""),  # jc6640, 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""), (r"(free\s)?download(\sfree)?", ""), (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{FILE_TYPES}(\simages?)?", ""), (r"\bpage\s+\d+\b", ""), (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),                                                # 640x480; the second x is Cyrillic
    (r"\b\s+:\s+", ": "), (r"(\D[,./])\b", r"\1 "), (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"), (r"^['_,\-:;]", ""), (r"['_,\-:+]$", ""), (r"^\.\S+$", "")]


def clean_caption(caption):
    """A caption as T5 read it in Open-Sora's training, with the score that its authors ask for where there is none."""
    if "aesthetic score:" not in caption:
        caption = f"{caption} aesthetic score: 6.5."
    return clean_once(clean_once(caption))


def clean_once(caption):
    caption = replace_all(unquote_plus(caption).strip().lower(), LINKS)
    caption = replace_all(text_of_html(caption), SIGNS)
    if len(re.findall("[-_]", caption)) > 3:  # this-is-my-cute-cat.jpg
        caption = re.sub("[-_]", " ", caption)
    caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
    return replace_all(caption, WORDS).strip()


def replace_all(text, rules):
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def text_of_html(text):
    """A text without tags and comments, its entities replaced by what they stand for."""
    found = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.feed(text)
    parser.close()
    return "".join(found)


class T5Tower(nn.Module):
    """Captions [B] -> {"text": (B, N, E), "mask": (B, N), which tokens are real}, padded to `max_tokens`."""

    def __init__(self, tokenizer, encoder, max_tokens):
        super().__init__()
        self.tokenizer, self.encoder, self.max_tokens = tokenizer, encoder, max_tokens

    @torch.no_grad()
    def forward(self, captions):
        """Each is encoded alone, so that the result does not depend on the batch."""
        features, masks = [], []
        for caption in captions:
            tokens = self.tokenizer([clean_caption(caption)], padding="max_length", max_length=self.max_tokens, truncation=True,
                                    return_tensors="pt").to(self.encoder.device)
            features.append(self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state)
            masks.append(tokens.attention_mask.bool())
        return {"text": torch.cat(features), "mask": torch.cat(masks)}

    def is_cut(self, caption):
        """Whether a caption has more tokens than are read."""
        return len(self.tokenizer(clean_caption(caption)).input_ids) > self.max_tokens


class ReadsT5:
    """What a base does with captions: its `text_encoder` is a T5Tower or None, `texts` are the features that it keeps."""

    def check_text_encoder(self):
        """ValueError where there is no text tower."""
        if self.text_encoder is None:
            raise ValueError(f"{self.name} has no text encoder: it needs text_encoder/ and tokenizer/, or --text-encoder")

    def encode_captions(self, captions):
        """As T5Tower, not kept."""
        self.check_text_encoder()
        return self.text_encoder(captions)

    encode_text = modelscope.Base.encode_text

    def is_cut(self, caption):
        """Whether a caption is longer than the text encoder reads."""
        return self.text_encoder is not None and self.text_encoder.is_cut(caption)


def load_tower(folder, max_tokens, width, dtype):
    """Of a folder with T5's weights; the tokenizer lies in it, as on the hub, or in tokenizer/ beside it."""
    beside = folder.parent / "tokenizer"
    place = beside if beside.is_dir() else folder
    if not {"tokenizer_config.json", "tokenizer.json", "spiece.model"} & {file.name for file in place.iterdir()}:
        raise ValueError(f"{folder}: no tokenizer in it, nor in tokenizer/ beside it; expected tokenizer.json or spiece.model")
    tokenizer = read_tokenizer(place)
    encoder = read_part(T5EncoderModel, folder, "cpu", dtype=dtype)
    if encoder.config.d_model != width:
        raise ValueError(f"{folder}: its features are {encoder.config.d_model} wide, the network reads {width}")
    return T5Tower(tokenizer, encoder, max_tokens)


def random_tower(max_tokens, width):
    """Small, with random weights; its tokens are bytes."""
    sizes = dict(vocab_size=384, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=4)
    return T5Tower(ByT5Tokenizer(), T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")), max_tokens)
