"""The folder of compiled parts: the user's own, bounded, and never believed when broken."""

import os
import stat

import pytest
import torch

from cgo.runtime.artifacts import ArtifactError, Artifacts
from cgo.runtime.structure import structure_of, whole
from cgo.runtime.tape import record

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no such owners")


def test_a_folder_is_made_for_its_user_alone(tmp_path):
    folder = Artifacts(tmp_path / "a" / "b").folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_others_may_write_nothing_is_read(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ArtifactError, match="others may write"):
        Artifacts(folder)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="symbolic link"):
        Artifacts(link)


def test_another_users_folder_and_files_are_not_read(tmp_path, monkeypatch):
    artifacts = Artifacts(tmp_path / "own")
    artifacts.path("key").write_bytes(b"anything")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ArtifactError, match="another user"):
        Artifacts(tmp_path / "own")
    with pytest.raises(ArtifactError, match="another user"):
        artifacts.load("key")


def test_a_file_that_is_broken_is_dropped_with_a_warning(tmp_path, caplog):
    artifacts = Artifacts(tmp_path / "own")
    artifacts.path("key").write_bytes(b"\x00" * 100)
    assert artifacts.has("key")
    with pytest.raises(ArtifactError):
        artifacts.load("key")
    assert "is dropped" in caplog.text
    assert not artifacts.has("key")
    with pytest.raises(ArtifactError, match="not there"):
        artifacts.load("key")


def test_what_was_used_longest_ago_makes_room(tmp_path):
    artifacts = Artifacts(tmp_path / "own", most_bytes=250)
    for age, name in enumerate(("new", "old", "torch/older")):
        path = artifacts.path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    artifacts.prune()
    assert [artifacts.has(name) for name in ("new", "old", "torch/older")] == [True, True, False]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    class Broken:
        def save(self, path):
            with open(path, "wb") as stream:
                stream.write(b"half")
            raise OSError("the disk is full")

    artifacts = Artifacts(tmp_path / "own")
    with pytest.raises(OSError, match="full"):
        artifacts.save("key", Broken())
    assert list(artifacts.folder.iterdir()) == []


def test_inductors_own_files_are_kept_there_and_nowhere_else(tmp_path, monkeypatch):
    artifacts = Artifacts(tmp_path / "own")
    for before in (None, "/elsewhere"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        with artifacts.torchs_own():
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


def test_a_key_holds_for_one_setting_of_threads_and_of_inductor(tmp_path):
    artifacts = Artifacts(tmp_path / "own")
    x = torch.ones(2)
    structure = structure_of(whole(record(lambda x: [x.exp()], [x])[1]), [x])
    threads = torch.get_num_threads()
    known = artifacts.key(structure)
    assert artifacts.key(structure) == known
    try:
        torch.set_num_threads(threads + 1)
        assert artifacts.key(structure) != known
    finally:
        torch.set_num_threads(threads)
    with torch._inductor.config.patch(max_fusion_size=3):
        assert artifacts.key(structure) != known
