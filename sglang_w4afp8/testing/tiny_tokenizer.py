"""A real byte-level BPE tokenizer, trained in milliseconds on the text below.

Text completions need one; checkpoints written for tests should not need a download. Any Unicode
text round-trips, since all 256 bytes are in the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

from sglang_w4afp8.errors import ConfigError

SPECIAL_TOKENS = ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
END = SPECIAL_TOKENS[0]
PAD = SPECIAL_TOKENS[1]
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CORPUS = """
A mixture of experts is a layer with many small networks, of which every token uses a few. The
router looks at the token and gives a score to each expert; the experts with the highest scores are
asked, and their answers are added with the scores as weights. Most of the weights of such a model
are in the experts, and most of the time spent on a single token is spent on reading them. When the
weights of the experts are stored with four bits each, twice as many fit into the same memory, and
reading them takes half the time. The numbers between are kept by a scale for each group of weights:
a weight is its code times the scale of the group to which it belongs. What must not happen is that
a weight meets the scale of another group. If the layer is divided between many devices, each device
holds a part of the rows or a part of the columns, and the scales must be divided in the same way,
even where a group begins on one device and ends on the next. The sum of what the devices compute is
then the same as what a single device would have computed, apart from the order of the additions.
The quick brown fox jumps over the lazy dog. Paris is the capital of France, Berlin is the capital
of Germany, Beijing is the capital of China, and Washington is the capital of the United States. Two
and two are four; three times three is nine; ten minus seven is three; one hundred is ten times ten.
Once upon a time there was a king who had three daughters, and the youngest of them asked questions
that nobody could answer. What is the meaning of the word? How long is the longest river, and where
does it begin? Why is the sky blue in the morning and red in the evening? The king did not know. He
sent for the wisest people of the country, who came with their books, and they read and counted and
wrote until the night was over. In the end the answer was shorter than anyone had expected.
def main(): return 0
for i in range(10): print(i, i * i)
"""


def write_tokenizer(folder: Path, *, vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        folder: an existing folder.
        vocab_size: exact number of tokens, specials and bytes included.
        max_length: ``model_max_length``, in tokens.

    Raises:
        ConfigError: vocab_size is below ``MIN_VOCAB`` or above what the text can give.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB:
        raise ConfigError(
            f"vocab_size = {vocab_size}",
            f"256 bytes and {len(SPECIAL_TOKENS)} special tokens need {MIN_VOCAB}",
            [f"vocab_size >= {MIN_VOCAB}"],
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"vocab_size = {vocab_size}",
            f"the training text gives at most {tokenizer.get_vocab_size()} tokens",
            [f"vocab_size <= {tokenizer.get_vocab_size()}"],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    special = {"eos_token": END, "pad_token": PAD}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
