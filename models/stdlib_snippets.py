"""Snippets of the Python standard library's source, as token ids with the package as label.

The data set of models/text_encoder; models/recurrent and models/decoder take its split by file,
the latter its vocabulary, too. Everything comes from the interpreter that runs this, so
another Python version gives other data. Needs numpy only.
"""

from __future__ import annotations

import math
import random
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

MAX_TOKENS = 64
MIN_TOKENS = 12
LINES = (4, 6)
PAD, UNKNOWN = 0, 1
SPECIAL = ["[PAD]", "[UNK]"]
WORD_START = "\u2581"
LINE_END, INDENT = "\u23ce", "\u21e5"

# Label -> where its source lies, under the standard library's folder. A package's own tests
# count as its source; some Python versions keep them under test/, some in the package.
SOURCES: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio/**/*.py", "test/test_asyncio/*.py"),
    "ctypes": ("ctypes/**/*.py", "test/test_ctypes/*.py"),
    "email": ("email/**/*.py", "test/test_email/*.py"),
    "http": ("http/*.py", "urllib/*.py", "test/test_http*.py", "test/test_urllib*.py"),
    "idlelib": ("idlelib/**/*.py",),
    "importlib": ("importlib/**/*.py", "test/test_importlib/**/*.py"),
    "multiprocessing": ("multiprocessing/**/*.py", "test/_test_multiprocessing.py"),
    "tkinter": ("tkinter/**/*.py", "test/test_tkinter/*.py", "test/test_ttk*.py"),
    "unittest": ("unittest/**/*.py", "test/test_unittest/**/*.py"),
    "xml": ("xml/**/*.py", "test/test_xml_*.py", "test/test_sax.py", "test/test_minidom.py"),
}
LABELS = sorted(SOURCES)


@dataclass(frozen=True)
class Snippet:
    """A few lines of source and the number of the package they are from."""

    text: str
    label: int


@dataclass(frozen=True)
class Rows:
    """Padded token ids, their mask (1 where there is a token) and the labels."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


def split_files(seed: int, parts: Sequence[float]) -> list[list[tuple[Path, int]]]:
    """Deal each package's files into `parts` (shares that sum to 1), by shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    shares = np.cumsum(parts)
    split: list[list[tuple[Path, int]]] = [[] for _ in parts]
    for label, name in enumerate(LABELS):
        files = sorted({path for pattern in SOURCES[name] for path in root.glob(pattern)})
        files = [path for path in files if path.stat().st_size > 200]
        if len(files) < 10:
            raise FileNotFoundError(f"this Python has too little of {name}'s source")
        random.Random(f"{seed} {name}").shuffle(files)
        for place, path in enumerate(files):
            part = int(np.searchsorted(shares, (place + 0.5) / len(files)))
            split[part].append((path, label))
    return split


def cut_snippets(files: Iterable[tuple[Path, int]], step: int, seed: int) -> list[Snippet]:
    """Cut runs of consecutive non-blank lines out of each file, one starting every `step` lines."""
    length = random.Random(seed)
    snippets = []
    for path, label in files:
        text = path.read_text(encoding="utf-8", errors="replace").lower()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for start in range(0, len(lines) - LINES[0] + 1, step):
            end = start + length.randint(*LINES)
            snippets.append(Snippet("\n".join(lines[start:end]), label))
    return snippets


def take_balanced(rows: Rows, per_label: int, seed: int, apart_from: Sequence[Rows] = ()) -> Rows:
    """Keep at most `per_label` distinct rows of each label, none of which is in `apart_from`."""
    seen = {ids.tobytes() for others in apart_from for ids in others.input_ids}
    order = np.random.default_rng(seed).permutation(len(rows.labels))
    counts: Counter[int] = Counter()
    kept = []
    for row in order:
        key, label = rows.input_ids[row].tobytes(), int(rows.labels[row])
        if key not in seen and counts[label] < per_label:
            seen.add(key)
            counts[label] += 1
            kept.append(row)
    return Rows(rows.input_ids[kept], rows.attention_mask[kept], rows.labels[kept])


def build_vocabulary(snippets: Iterable[Snippet], size: int) -> list[str]:
    """Grow a vocabulary by byte-pair merges over whitespace-separated chunks."""
    words = Counter(WORD_START + word for snippet in snippets for word in snippet.text.split()).most_common(30_000)
    pieces = [list(word) for word, _ in words]
    letters = {letter for word, _ in words for letter in word if letter.isascii()}
    vocabulary = [*SPECIAL, *sorted(letters), WORD_START]
    pairs: Counter[tuple[str, str]] = Counter()
    holders: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, word in enumerate(pieces):
        for pair in pairwise(word):
            pairs[pair] += words[index][1]
            holders[pair].add(index)
    while len(vocabulary) < size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if "".join(best) not in vocabulary:  # two merges may spell the same piece
            vocabulary.append("".join(best))
        for index in sorted(holders[best]):
            count, old = words[index][1], pieces[index]
            pieces[index] = new = merge(old, best)
            for pair in pairwise(old):
                pairs[pair] -= count
            for pair in pairwise(new):
                pairs[pair] += count
                holders[pair].add(index)
        del pairs[best], holders[best]
    return vocabulary


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each neighbouring `pair` in `pieces`."""
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def encode(text: str, ids: dict[str, int], longest: int, limit: float = MAX_TOKENS) -> list[int]:
    """Tokenize by the longest piece that matches, and cut at `limit` tokens."""
    tokens: list[int] = []
    for word in text.split():
        rest = WORD_START + word
        while rest and len(tokens) < limit:
            size = next((n for n in range(min(longest, len(rest)), 0, -1) if rest[:n] in ids), 0)
            tokens.append(ids[rest[:size]] if size else UNKNOWN)
            rest = rest[max(size, 1) :]
    return tokens


def to_rows(snippets: Sequence[Snippet], vocabulary: Sequence[str]) -> Rows:
    """Tokenize and pad the snippets; those of fewer than MIN_TOKENS are left out."""
    ids = {token: number for number, token in enumerate(vocabulary)}
    longest = max(map(len, vocabulary))
    coded = [(encode(snippet.text, ids, longest), snippet.label) for snippet in snippets]
    coded = [(tokens, label) for tokens, label in coded if len(tokens) >= MIN_TOKENS]
    input_ids = np.full((len(coded), MAX_TOKENS), PAD, dtype=np.int64)
    for row, (tokens, _) in enumerate(coded):
        input_ids[row, : len(tokens)] = tokens
    labels = np.array([label for _, label in coded], dtype=np.int64)
    return Rows(input_ids, (input_ids != PAD).astype(np.int64), labels)


def read_marked(path: Path) -> str:
    """Read a file with marks for what splitting at white space would lose: line ends and indents of four."""
    marked = []
    for line in path.read_text(encoding="utf-8", errors="replace").expandtabs(4).splitlines():
        if line.strip():
            indents = (len(line) - len(line.lstrip())) // 4
            marked.append(f"{INDENT} " * indents + f"{line.strip()} {LINE_END}")
    return "\n".join(marked)


def cut_rows(texts: Iterable[str], vocabulary: Sequence[str], length: int) -> np.ndarray:
    """Cut each text's tokens into rows of `length` + 1; a row's last token is the next row's first.

    What is left of a text at its end is dropped.
    """
    ids = {token: number for number, token in enumerate(vocabulary)}
    longest = max(map(len, vocabulary))
    known: dict[str, list[int]] = {}
    rows = []
    for text in texts:
        tokens: list[int] = []
        for word in text.split():
            if word not in known:
                known[word] = encode(word, ids, longest, limit=math.inf)
            tokens += known[word]
        rows += [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    return np.array(rows, dtype=np.int64)


def take_distinct(rows: np.ndarray, count: int, seed: int, apart_from: Sequence[np.ndarray]) -> np.ndarray:
    """Keep `count` distinct rows, chosen at random, none of which is in `apart_from`."""
    seen = {row.tobytes() for others in apart_from for row in others}
    rows = np.unique([row for row in rows if row.tobytes() not in seen], axis=0)
    return rows[np.random.default_rng(seed).permutation(len(rows))[:count]]
