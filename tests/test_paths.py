import pytest
from support.special import special

from cgo.paths import inside, is_plain, lies_beside, open_plain, read_plain, replacing


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "a..b/c", ".a/b", "é"])
def test_names_inside(name, tmp_path):
    assert lies_beside(name)
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../../b", "/a", "//a", "C:a", "C:/a", "C:\\a", "\\a", "a\\..\\..\\b",
     "a\0b", "a\nb", "\\\\host\\share\\a"],
)  # fmt: skip
def test_names_outside(name, tmp_path):
    assert not lies_beside(name)
    with pytest.raises(ValueError, match="does not lie inside"):
        inside(tmp_path, name)


def test_links_are_followed(tmp_path):
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / "here").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    (folder / "good").symlink_to("here")
    (folder / "bad").symlink_to(tmp_path / "elsewhere")
    (folder / "round").symlink_to("round")
    assert read_plain(inside(folder, "good"), 1) == b"1"
    with pytest.raises(ValueError, match=r"'bad/x' leads out of its folder, to .*elsewhere"):
        inside(folder, "bad/x")
    with pytest.raises(ValueError, match=r"leads out|cannot be found"):
        inside(folder, "bad")
    with pytest.raises((ValueError, OSError)):
        open_plain(inside(folder, "round"))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket", "missing"])
def test_what_is_no_plain_file_is_not_opened(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = special(kind, tmp_path.relative_to(tmp_path) / "x")
    assert not is_plain(path)
    with pytest.raises(OSError, match=r"x"):
        open_plain(path)


def test_content_is_bounded(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert is_plain(path)
    assert not is_plain(tmp_path / "a\0b")
    assert read_plain(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_plain(path, 4)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "graph.json"
    with replacing(path) as stream:
        stream.write(b"first")

    def interrupted():
        with replacing(path) as stream:
            stream.write(b"sec")
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        interrupted()
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]
