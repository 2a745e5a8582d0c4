"""Text of users: a byte-order mark and the other line ends make no difference, and a broken byte is named."""

import pytest

from mlra_jax.textfiles import TextError, decode_text, read_text


def test_a_byte_order_mark_and_line_ends_of_windows_make_no_difference(tmp_path):
    file = tmp_path / "windows.txt"
    file.write_bytes("one\ntwo €\n\n".encode("utf-8-sig").replace(b"\n", b"\r\n"))
    assert read_text(file) == "one\ntwo €\n\n"
    assert decode_text("\ufeffa\ufeff\rb".encode(), "x") == "a\ufeff\rb"  # inside the text both are text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ab\xff", r"prompts, line 5, byte 3 is not UTF-8 text \(invalid start byte\): save it"),
        (b"\xef\xbb\xbfa\r\n\r\n\xe9t\xe9\n", r"prompts, line 7, byte 1 is not UTF-8"),
        ("é".encode("utf-16"), r"line 5, byte 1 .*: it looks like UTF-16; save it as UTF-8"),
    ],
)
def test_a_broken_byte_is_named_by_its_line_and_its_place_there(data, words):
    with pytest.raises(TextError, match=words):
        decode_text(data, "prompts", 5)
