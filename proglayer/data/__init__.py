"""Text to windows: where a corpus comes from, how it is cut into words, and its token streams.

A corpus is prepared once, memory-mapped from then on, and known by its fingerprint.
"""

from proglayer.data.corpus import Corpus, open_corpus

__all__ = ["Corpus", "open_corpus"]
