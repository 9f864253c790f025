"""What is not ours stays: the one way by which files go, and that there is no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from proglayer import files

# --- what the module does -------------------------------------------------------------------------

OURS = files.begins_with(b'{"ours":')


def test_only_a_file_that_is_ours_goes(tmp_path: Path) -> None:
    ours, theirs, link = (tmp_path / name for name in ("ours", "theirs", "link"))
    ours.write_text('{\n "ours": 1}')
    theirs.write_text("a letter")
    link.symlink_to(ours)
    (tmp_path / "folder").mkdir()
    for path in (theirs, link, tmp_path / "folder", tmp_path / "none"):
        assert not files.delete(path, OURS)
    for path in (theirs, link, tmp_path / "folder"):
        with pytest.raises(files.NotOursError, match=r"left as it is.*some\.setting"):
            files.write_atomically(path, b"x", "some.setting", OURS)
        with pytest.raises(files.NotOursError):
            files.write_over(path, b"x", OURS, "some.setting")
        with pytest.raises(files.NotOursError):
            files.link_or_copy(ours, path, "some.setting", OURS)
        with pytest.raises(OSError, match="no file of ours"):
            files.move(path, tmp_path / "moved", OURS)
    assert theirs.read_text() == "a letter"
    assert link.is_symlink()
    with pytest.raises(OSError, match="there is another"):
        files.move(ours, theirs, OURS)
    files.write_atomically(ours, b'{"ours": 2}', "some.setting", OURS)
    assert ours.read_bytes() == b'{"ours": 2}'
    assert files.delete(ours, OURS)
    assert not ours.exists()


def test_a_folder_goes_without_what_is_not_ours(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "1.ours").write_text("beyond a link")
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "1.ours").write_text("")
    (folder / "a" / "b" / "2.ours").write_text("")
    assert files.delete_folder(folder, files.named(r".*\.ours"))
    assert not folder.exists()
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "1.ours").write_text("")
    (folder / "a" / "b" / "letter").write_text("")
    (folder / "link").symlink_to(kept)
    (folder / "2.ours").symlink_to(kept / "1.ours")
    assert not files.delete_folder(folder, files.named(r".*\.ours"))
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert left == {"a", "a/b", "a/b/letter", "link", "2.ours"}
    assert (kept / "1.ours").read_text() == "beyond a link"
    assert not files.delete_folder(folder / "link", files.everything)
    assert (kept / "1.ours").exists()


def test_what_a_killed_process_left_goes_and_no_other_file(tmp_path: Path) -> None:
    left_over = tmp_path / f"{files.TEMPORARY}123-0123abcd"
    mine = [tmp_path / name for name in (".tmp-mine", ".tmp-1-0123abcd.txt", "tmp")]
    for path in (left_over, *mine):
        path.touch()
    files.delete_left_over(tmp_path, older_than_s=60)
    assert left_over.exists()
    files.delete_left_over(tmp_path)
    files.delete_left_over(tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_a_new_folder_is_gone_unless_it_was_put_in_place(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "in", "name") as made:
        (made / "file").write_text("")
        raise RuntimeError
    assert not list((tmp_path / "in").iterdir())
    with files.new_folder(tmp_path, "name") as made:
        (made / "file").write_text("")
        files.put_in_place(made, tmp_path / "final")
    assert (tmp_path / "final" / "file").exists()
    with files.new_folder(tmp_path, "name") as made:
        (made / "other").write_text("")
        with pytest.raises(OSError, match="not empty"):
            files.put_in_place(made, tmp_path / "final")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["file"]


def test_what_is_put_in_place_is_as_open_as_other_files(tmp_path: Path) -> None:
    with files.new_folder(tmp_path, "name") as made:
        (made / "file").touch(mode=0o600)
        files.put_in_place(made, tmp_path / "final")
    (tmp_path / "other").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("final/file", "other")}
    assert len(modes) == 1


def test_a_link_that_is_there_already_stays_one_file(tmp_path: Path) -> None:
    source, final = tmp_path / "source", tmp_path / "final"
    source.write_text('{"ours": 1}')
    for _ in range(2):
        files.link_or_copy(source, final, "some.setting", OURS)
        assert final.samefile(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "source"]


def test_without_links_there_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "source").write_text('{"ours": 1}')
    files.link_or_copy(tmp_path / "source", tmp_path / "final", "some.setting", OURS)
    assert (tmp_path / "final").read_text() == '{"ours": 1}'
    assert not (tmp_path / "final").samefile(tmp_path / "source")
