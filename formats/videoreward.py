"""
The files of VideoReward (VideoAlign, arXiv:2501.13918; hub repository KlingTeam/VideoReward), for rewards/videoreward.py.
model.pth holds a whole Qwen2-VL-2B as transformers 4.45 and peft named its tensors, its LoRA beside the weights. The text that
asks for the scores belongs to the weights, which were trained on its very bytes; it is the authors', so it is read from a file.
"""
import re

from formats.known_rewards import hub_file
from formats.tensors import read_config
from support.files import first_line, read_text

REPO, CHECKPOINT = "KlingTeam/VideoReward", "checkpoint-11352"
SCORES = {"VQ": "<|VQ_reward|>", "MQ": "<|MQ_reward|>", "TA": "<|TA_reward|>"}  # after each token, a score is read off
TEMPLATE = "prompt_template.txt"
LORA_SCALE = 2.  # alpha 128, rank 64
SHORT = "Rate this video. <|VQ_reward|> <|MQ_reward|> Its caption: {text_prompt} <|TA_reward|>"  # ours, for untrained weights


def find_file(folder, name):
    """A file of the hub folder, as it lies there or from the hub."""
    return hub_file("videoreward", REPO, name, f"put it into {folder}", folder)


def read_template(folder):
    """The authors' text, byte for byte; ValueError without one, and for another text."""
    path = folder / TEMPLATE
    if not path.is_file():
        raise ValueError(f"reward videoreward: {path}: no such file; it is the text that the weights were trained with, and "
                         "docs/rewards.md says how to make it")
    text = read_text(path, newline="")
    parts = [SCORES["VQ"], SCORES["MQ"], "{text_prompt}", SCORES["TA"]]
    if re.findall("|".join(map(re.escape, parts)), text) != parts:
        raise ValueError(f"{path}: must have {', '.join(parts)}, in this order and each once")
    return text


def read_scales(folder):
    """{score: (mean, standard deviation)} over the authors' data, by which scores are standardised."""
    def from_json(content):
        found = content["inference_config"]
        return {score: (float(found[f"{score}_mean"]), float(found[f"{score}_std"])) for score in SCORES}
    return read_config(find_file(folder, "model_config.json"), from_json)


def read_tokenizer(folder, vocabulary):
    """The tokenizer with the tokens of the scores; ValueError if it has more than `vocabulary` tokens."""
    from tokenizers import Tokenizer
    path = find_file(folder, f"{CHECKPOINT}/tokenizer/tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # whatever the library raises
        raise ValueError(f"{path}: not a tokenizer ({first_line(error)})") from None
    tokenizer.add_special_tokens(list(SCORES.values()))  # those it has stay as they are
    if tokenizer.get_vocab_size() > vocabulary:
        raise ValueError(f"{path}: has {tokenizer.get_vocab_size()} tokens, expected {vocabulary}")
    return tokenizer


def byte_tokenizer():
    """A tokenizer for untrained weights, without files: a token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SCORES.values()))
    return tokenizer


def merge_lora(tensors):
    """Published tensors {name: t} under the names of transformers since 4.52, whose they may be already, the LoRA added to the
    weights it is of. What belongs to none keeps its name, so that loading refuses it."""
    tensors = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    merged = {}
    for name in sorted(tensors):  # base_layer comes before lora_A and lora_B
        stem = name.removesuffix(".base_layer.weight")
        up, down = f"{stem}.lora_B.default.weight", f"{stem}.lora_A.default.weight"
        if name not in tensors or name == "lm_head.weight":  # added already; answers in words
            continue
        t = tensors[name]
        if stem != name and up in tensors and down in tensors:
            t = t.float() + LORA_SCALE * tensors.pop(up).float() @ tensors.pop(down).float()
        new = re.sub(r"^visual\.", "model.visual.", name.replace(".base_layer.", "."))
        merged[re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", new)] = t
    return merged
