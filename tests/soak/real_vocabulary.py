"""The prompt template in the real vocabulary: the length of its beginning, and whole prompts.

    python tests/soak/real_vocabulary.py qwen.tiktoken --out tests/soak/results/real_vocabulary.json

`qwen.tiktoken` is Qwen's vocabulary as it is published for tiktoken: bytes in base64, and a rank.
Qwen2.5-VL's tokenizer has the same entries. The file becomes vocabulary and merges, which are read
as those of a checkpoint are; every prompt is then tokenized a second time straight by the ranks.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import json
import platform
import re
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path

from sl_jax.inference.prompts import (
    DEFAULT_PROMPT,
    PROMPT_TEMPLATE,
    load_tokenizer,
    prefix_length,
)

PROMPTS = (
    *(DEFAULT_PROMPT, "", " ", "\n\nstarts with newlines", "a poster, 2026: 10,000 % off!"),
    "Größe und Übermaß, a café in Tōkyō",
)
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # their ids follow the ranks
SPECIAL = re.compile(r"(<\|im_start\|>|<\|im_end\|>)")
# As the published tokenizer cuts text before merging; letters and digits are plain enough here.
WORDS = re.compile(
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\w]?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.IGNORECASE,
)


def read_ranks(path):
    """Bytes → rank."""
    lines = path.read_bytes().split(b"\n")
    return {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)}


def merged(piece, ranks, limit=None):
    """The parts of a piece, after all merges of a rank below `limit`."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1:
        rank, place = min(
            (ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))
        )
        if rank >= (len(ranks) if limit is None else limit):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def byte_letters():
    """Byte → the letter that stands for it in vocabularies of byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def write_tokenizer(folder, ranks):
    """vocab.json, merges.txt, and the settings that name the tokens of chats."""
    letters = byte_letters()

    def spelled(token):
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    pairs = [merged(t, ranks, r) for t, r in sorted(ranks.items(), key=lambda i: i[1]) if t[1:]]
    assert all(len(pair) == 2 for pair in pairs)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = (" ".join(map(spelled, pair)) for pair in pairs)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    added = {
        str(len(ranks) + i): {"content": name, "special": True} for i, name in enumerate(ADDED)
    }
    settings = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def by_ranks(text, ranks):
    """Tokens of a text, without any library."""
    special = {name: len(ranks) + i for i, name in enumerate(ADDED)}
    tokens = []
    for part in SPECIAL.split(text):
        if part in special:
            tokens.append(special[part])
        else:
            for word in WORDS.findall(part):
                tokens += [ranks[piece] for piece in merged(word.encode(), ranks)]
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    ranks = read_ranks(flags.vocabulary)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # of another length than 34
        write_tokenizer(Path(folder), ranks)
        tokenizer = load_tokenizer(folder)
        prefix = prefix_length(tokenizer)
        texts = [PROMPT_TEMPLATE.format(prompt) for prompt in PROMPTS]
        rows = tokenizer(texts)["input_ids"]
    expected = [by_ranks(text, ranks) for text in texts]
    assert len(by_ranks(PROMPT_TEMPLATE.partition("{}")[0], ranks)) == prefix
    result = {
        "command": "python tests/soak/real_vocabulary.py qwen.tiktoken",
        "python": platform.python_version(),
        "versions": {n: importlib.metadata.version(n) for n in ("tokenizers", "transformers")},
        "vocabulary_sha256": hashlib.sha256(flags.vocabulary.read_bytes()).hexdigest(),
        "entries": len(ranks),
        "vocab_size": tokenizer.vocab_size,
        "prefix_tokens": prefix,
        "prompt_tokens": {p: len(row) - prefix for p, row in zip(PROMPTS, rows, strict=True)},
        "equal_to_ranks": rows == expected,
        "seconds": round(time.perf_counter() - start, 1),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    print(text)
    if flags.out:
        flags.out.write_text(text, "utf-8")
    assert prefix == 34 and result["equal_to_ranks"]


if __name__ == "__main__":
    main()
