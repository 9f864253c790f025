"""What a user asks for, before anything is composed of it: names that `conf/` uses."""

from __future__ import annotations

import hashlib
import secrets

from omegaconf import OmegaConf


def register() -> None:
    """Give Hydra the resolvers that `conf/` uses. Safe to repeat."""
    # Cached, so that every job of a sweep sees the token that the sweep was given.
    OmegaConf.register_new_resolver(
        "unique_token", lambda: secrets.token_hex(3), replace=True, use_cache=True
    )
    OmegaConf.register_new_resolver("short_hash", short_hash, replace=True)


def short_hash(text: str) -> str:
    """Return six hexadecimal digits that stand for `text` in the name of a folder."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]
