"""The tokenizer that is learned from captions."""

import subprocess
import sys

from transformers import CLIPTokenizer

from tests.tiny import CAPTIONS
from vlmdiff.core.params import TextEncoder
from vlmdiff.training.text_encoder import train_tokenizer

PARAMS = TextEncoder(vocabulary=400, max_tokens=16)


def test_the_most_frequent_pair_is_merged_first_and_of_equals_the_first_by_its_letters():
    # By hand: a-b stands there three times, c-d and x-y twice each; a word's last letter is a symbol of its own.
    tokenizer = train_tokenizer(["ab xy ab cd ab cd xy"], TextEncoder(vocabulary=300))
    places = tokenizer.get_vocab()
    assert places["ab</w>"] < places["cd</w>"] < places["xy</w>"] == len(tokenizer) - 1
    assert tokenizer.tokenize("cd ab") == ["cd</w>", "ab</w>"]


def test_texts_come_back_and_the_empty_one_is_two_tokens():
    tokenizer = train_tokenizer(CAPTIONS, PARAMS)
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer(caption).input_ids, skip_special_tokens=True) == caption.lower()
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(tokenizer) <= PARAMS.vocabulary


def test_a_saved_tokenizer_reads_the_same(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, PARAMS)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert [loaded(text).input_ids for text in CAPTIONS] == [tokenizer(text).input_ids for text in CAPTIONS]


def test_another_process_learns_the_same():
    code = (
        "from tests.tiny import CAPTIONS; from vlmdiff.core.params import TextEncoder\n"
        "from vlmdiff.training.text_encoder import train_tokenizer\n"
        "tokenizer = train_tokenizer(CAPTIONS * 3, TextEncoder(vocabulary=400))\n"
        "print(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""
