"""What is not ours stays: the one way by which files go, and that there is no other."""

from __future__ import annotations

import ast
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from proglayer import files

from .helpers import ROOT

# --- nothing else writes over, moves or deletes ---------------------------------------------------

# Of any object. `replace` and `rename` with one argument are those of a path: texts, data classes
# and data frames take others.
METHODS = {
    "unlink", "rmdir", "rmtree", "removedirs", "renames", "write_text", "write_bytes", "truncate",
    "hardlink_to", "symlink_to", "touch", "copytree", "copyfile", "copy2", "save_file", "tofile",
}  # fmt: skip
OF_A_PATH = {"replace", "rename"}
# Of a data frame, unless it is given no path. The frames of results write by way of `files`.
OF_A_FRAME = {"to_csv", "to_parquet"}
OF_MODULES = {
    "os": {"remove", "unlink", "rename", "replace", "rmdir", "link", "symlink", "truncate"},
    "shutil": {"move", "copy", "rmtree", "copyfile", "copytree"},
    "OmegaConf": {"save"},
    "np": {"save", "savez"},
}
# What changes a file without this module, and why it is no other's.
ALLOWED = {
    # The kernel's switch that starts counting peak memory from zero.
    ("proglayer/run/machine.py", "write_text"),
}


def changes_files(source: str) -> set[str]:
    """The calls in a source that write over, move or delete files."""
    return {found for node in ast.walk(ast.parse(source)) for found in _found(node)}


def _found(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            if alias.name in OF_MODULES.get(node.module or "", ()):
                yield f"{node.module}.{alias.name}"
    if not isinstance(node, ast.Call):
        return
    function = node.func
    if isinstance(function, ast.Attribute):
        name = function.attr
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        if owner in OF_MODULES:
            if name in OF_MODULES[owner]:
                yield f"{owner}.{name}"
        elif owner != "files" and (
            name in METHODS or (name in OF_A_PATH and len(node.args) == 1 and not node.keywords)
        ):
            yield name
        elif name in OF_A_FRAME:
            to_memory = node.args and ast.unparse(node.args[0]) == "None"
            if not to_memory and not ast.unparse(function.value).endswith("results"):
                yield name
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called == "open":
        # The second argument of the function, the first of a path's.
        texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
        texts += [
            k.value.value
            for k in node.keywords
            if k.arg == "mode" and isinstance(k.value, ast.Constant)
        ]
        for mode in texts:
            if isinstance(mode, str) and set(mode) <= set("rwabt+") and set(mode) & set("wa+"):
                yield f"open {mode}"  # one with an x makes a new file, or fails


SOURCES = [
    path
    for folder in ("proglayer", "hydra_plugins")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "proglayer" / "files.py"
]


def test_no_other_module_writes_over_moves_or_deletes_files() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), call)
        for path in [*SOURCES, ROOT / "train.py"]
        for call in changes_files(path.read_text())
    }
    assert found == ALLOWED
    assert len(SOURCES) > 40


@pytest.mark.parametrize(
    "source",
    [
        "os.remove(p)", "os.unlink(p)", "p.unlink()", "(a / b).unlink(missing_ok=True)",
        "os.rename(a, b)", "os.replace(a, b)", "p.rename(q)", "p.replace(q)", "p.rmdir()",
        "shutil.rmtree(p)", "shutil.move(a, b)", "from shutil import rmtree", "open(p, 'w')",
        "from os import unlink as gone", "open(p, mode='ab')", "p.open('r+')", "p.write_text('')",
        "OmegaConf.save(c, p)", "os.symlink(a, b)", "frame.to_csv(p)",
    ],
)  # fmt: skip
def test_a_call_that_changes_files_is_seen(source: str) -> None:
    assert changes_files(source)


@pytest.mark.parametrize(
    "source",
    [
        "text.replace('a', 'b')", "replace(config, seed=1)", "frame.rename(columns={})",
        "files.delete(p, ours)", "open(p)", "open(p, 'rb')", "open(p, 'xb')", "items.remove(x)",
        "frame.to_csv(None)",
    ],
)  # fmt: skip
def test_others_are_not(source: str) -> None:
    assert not changes_files(source)


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
