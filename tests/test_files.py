"""Files that are there whole or not at all, and folders that are ours to write in."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from proglayer import files
from proglayer.errors import ConfigError, StoreError
from proglayer.files import FolderKind


def test_a_file_is_new_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link, copy = (tmp_path / name for name in ("file", "link", "copy"))
    files.write_atomically(path, b"one")
    link.symlink_to(path)
    os.link(path, copy)
    files.write_atomically(path, b"two")
    files.write_atomically(link, b"three")
    assert [each.read_bytes() for each in (path, link, copy)] == [b"two", b"three", b"one"]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        files.write_atomically(path, b"four")
    assert path.read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kind", list(FolderKind))
def test_a_folder_is_ours_if_it_is_new_or_empty_or_marked(tmp_path: Path, kind: FolderKind) -> None:
    for _ in range(2):
        files.claim_folder(tmp_path / "a" / "new", kind)
    # As a process left it that was killed before it wrote the mark.
    for name in (files.LOCK, f"{files.TEMPORARY}12-34"):
        (tmp_path / "a" / "new" / name).touch()
    files.claim_folder(tmp_path / "a" / "new", kind)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "letter").touch()
    for folder in (theirs, theirs / "letter", theirs / "letter" / "below"):
        with pytest.raises(ConfigError, match=rf"^{kind.setting}={folder}: "):
            files.claim_folder(folder, kind)
    assert [path.name for path in theirs.iterdir()] == ["letter"]
    if kind is not FolderKind.store:  # others call a file so, too
        for content in (b"", b"{", b"[1]", b'{"name": "tool"}'):
            (theirs / kind.mark).write_bytes(content)
            with pytest.raises(ConfigError, match=f"no {kind.mark} of ours"):
                files.claim_folder(theirs, kind)
    (theirs / kind.mark).write_bytes(b'{\n "format": 5}')
    files.claim_folder(theirs, kind)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    folder, run = tmp_path / "folder", FolderKind.run
    lock = files.lock_folder(folder)
    assert lock is not None
    assert files.lock_folder(folder) is None
    with pytest.raises(ConfigError, match="at work"), files.sole_writer(folder, run):
        pass
    lock.release()
    left_over = folder / f"{files.TEMPORARY}12-34"
    left_over.touch()
    with files.sole_writer(folder, run):
        assert not left_over.exists()
        assert files.lock_folder(folder) is None
    assert files.lock_folder(folder) is not None


def test_a_new_folder_is_gone_unless_it_was_put_in_place(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "in", "name") as made:
        (made / "file").write_text("")
        raise RuntimeError
    assert not list((tmp_path / "in").iterdir())
    with files.new_folder(tmp_path, "name") as made:
        (made / "file").touch(mode=0o600)
        files.put_in_place(made, tmp_path / "final")
    (tmp_path / "other").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("final/file", "other")}
    assert len(modes) == 1, "as open as other files"
    with files.new_folder(tmp_path, "name") as made:
        (made / "other").write_text("")
        with pytest.raises(OSError, match="not empty"):
            files.put_in_place(made, tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["file"]


def test_two_places_hold_one_file_or_a_copy_where_links_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, final = tmp_path / "source", tmp_path / "final"
    source.write_text("content")
    for _ in range(2):  # also where it is there already
        files.link_or_copy(source, final)
        assert final.samefile(source)

    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    files.link_or_copy(source, final)
    assert final.read_text() == "content"
    assert not final.samefile(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "source"]
