"""What was read of a pile of runs, kept in one file so that the next reading is quick.

It is only ever a copy: a run whose files changed is read again, and a cache that is damaged,
foreign or of another version is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from proglayer.results.columns import (
    COLUMNS,
    NOT_THE_EXPERIMENT,
    PLACE_OF_TEXT,
    SCHEMAS,
    Piece,
    as_text,
    empty_piece,
    recoded,
)
from proglayer.results.scan import SEEN, Found
from proglayer.store.record import RECORD_FORMAT

CACHE = ".results-cache"
# Raise by hand when a cached table would be misread although its columns are the same.
CACHE_FORMAT = 2


def _cache_version() -> str:
    """Changes with everything that a cached table depends on besides the runs' files."""
    shape = [CACHE_FORMAT, RECORD_FORMAT, NOT_THE_EXPERIMENT, PLACE_OF_TEXT]
    shape += [{n: list(c) for n, c in columns.items()} for columns in COLUMNS.values()]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()


def read_cache(root: str, found: list[Found]) -> tuple[list[Found], Piece]:
    """The runs whose files are as the cache has seen them, and their tables: codes 0, 1, ...

    Nothing if there is no sound cache.
    """
    try:
        with zipfile.ZipFile(os.path.join(root, CACHE)) as archive:
            if archive.comment.decode() != _cache_version():
                return [], empty_piece()
            tables = {
                # Reading a member checks its CRC.
                name: pyarrow.parquet.read_table(io.BytesIO(archive.read(name)))
                for name in ("seen", *SCHEMAS)
            }
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return [], empty_piece()
    columns = tables.pop("seen").to_pydict()
    names = columns.pop("name")
    looks = zip(*(columns[name] for name in SEEN), strict=True)
    cached = {
        name: (code, look) for code, (name, look) in enumerate(zip(names, looks, strict=True))
    }
    new_codes = np.full(len(names), -1)
    kept: list[Found] = []
    for item in found:
        code, look = cached.get(item.name, (-1, None))
        if item.begun and item.seen.numbers == look:
            new_codes[code] = len(kept)
            kept.append(item)
    return kept, recoded(tables, new_codes)


def write_cache(root: str, found: list[Found], piece: Piece) -> None:
    """Keep what was read of these runs, whole or not at all; a folder that refuses has no cache."""
    new_codes = np.full(1 + max(piece["runs"]["code"].to_pylist(), default=-1), -1)
    new_codes[[item.code for item in found]] = np.arange(len(found))
    seen = [item.seen.numbers for item in found]
    looks = {name: [numbers[i] for numbers in seen] for i, name in enumerate(SEEN)}
    tables = {
        "seen": pa.table({"name": [as_text(item.name) for item in found], **looks}),
        **recoded(piece, new_codes),
    }
    temporary = os.path.join(root, f"{CACHE}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            archive.comment = _cache_version().encode()
            for name, table in tables.items():
                content = io.BytesIO()
                pyarrow.parquet.write_table(table, content, compression="zstd")
                archive.writestr(name, content.getvalue())
        os.replace(temporary, os.path.join(root, CACHE))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
