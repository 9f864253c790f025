"""Texts and settings for the tests of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proglayer.config import ConfigError, DataConfig
from proglayer.data.corpus import Corpus

from ..helpers import ROOT, config

TRAIN = "".join(f" = Title {n} = \n\nThe {n % 7} cats\tof {n} sat , on Mats .\n" for n in range(40))


VALIDATION = "".join(f"A {n % 5} dog of {n} ran .\n" for n in range(40))


TEST = "".join(f"A {n % 3} dog and {n} unheard-of birds .\n" for n in range(30))


def changed(data: DataConfig, **changes: Any) -> DataConfig:
    return data.model_copy(update=changes)


def data_config(source: str, **changes: Any) -> DataConfig:
    """The settings of conf/data/<source>.yaml, small and without windows cut off."""
    settings = {"samples": None, "max_vocab": None, "seq_len": 4, **changes}
    named = {"text": ["data.files=[unused]"], "hub": ["data.repository=x/y"]}
    return changed(config(f"data={source}", *named.get(source, [])).data, **settings)


def write_release(folder: Path, train: str = TRAIN, validation: str = VALIDATION) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wiki.train.raw").write_bytes(train.encode())
    (folder / "wiki.valid.raw").write_bytes(validation.encode())
    return folder


def release(folder: Path, **changes: Any) -> DataConfig:
    """A release in `folder`, cached beside it."""
    cache = str(folder.with_name(f"{folder.name}-cache"))
    return data_config("wikitext2", **{"path": str(folder), "cache_dir": cache, **changes})


def text(*files: Path | str, **changes: Any) -> DataConfig:
    settings = {"held_out": 0.25, **changes}
    return data_config("text", files=tuple(map(str, files)), **settings)


def entry_folder(data: DataConfig) -> Path:
    """The only entry in the cache of `data`."""
    assert data.cache_dir is not None
    (folder,) = [path for path in (Path(data.cache_dir) / "corpora").iterdir() if path.is_dir()]
    return folder


def words_of(corpus: Corpus) -> list[str]:
    """The vocabulary; an entry's place is its id."""
    if corpus.tokenizer_file is not None:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_file))
        return [tokenizer.id_to_token(i) or "" for i in range(corpus.vocab_size)]
    content = (corpus.folder / "vocabulary.txt").read_bytes()
    return content.decode("utf-8", "surrogatepass").split("\n")


def stream(corpus: Corpus, name: str = "validation") -> np.ndarray:
    return np.fromfile(corpus.folder / f"{name}.bin", "<i4")


def held_words(corpus: Corpus) -> tuple[list[str], list[str]]:
    words = words_of(corpus)
    first, second = (
        [words[i] for i in windows.reshape(-1)] for windows in (corpus.train, corpus.validation)
    )
    return first, second


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def twin_words(text: str, lowercase: bool) -> list[str]:
    """The rule word for word, as slowly as it reads."""
    words = []
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            continue
        if lowercase:
            line = line.lower()
        words.extend(line.split())
    return words


SCRIPT = """
import json, sys, time
from pathlib import Path
from proglayer.config import ConfigError, DataConfig
from proglayer.data.corpus import open_corpus
for settings in json.loads(Path(sys.argv[1]).read_text()):
    notes, started = [], time.monotonic()
    try:
        corpus = open_corpus(DataConfig(**settings), notes.append)
        answer = {"fingerprint": corpus.fingerprint, "shape": corpus.train.shape}
        answer["test"] = corpus.test_fingerprint
        answer["revision"] = corpus.tokenizer_revision
    except ConfigError as error:
        answer = {"error": str(error)}
    answer["seconds"] = time.monotonic() - started
    print(json.dumps(answer | {"notes": notes}))
"""


def start(
    tmp_path: Path, settings: list[DataConfig], script: str = SCRIPT, **environment: str
) -> subprocess.Popen[str]:
    """A fresh process that opens these corpora and prints one line of JSON for each."""
    arguments = tmp_path / "settings.json"
    arguments.write_text(json.dumps([data.model_dump(mode="json") for data in settings]))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answers(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def same_tokens(first: Corpus, second: Corpus) -> bool:
    return (
        np.array_equal(first.train, second.train)
        and np.array_equal(first.validation, second.validation)
        and words_of(first) == words_of(second)
    )
