"""Damage to bytes: the same for the same random numbers, so that a mutant is named by them.

What happens to files and what people do to them by hand: bits flipped, cut off, parts missing, doubled or out of place,
numbers that say lengths replaced by ones that lie, words of the format in the wrong place, two files in one. Most
mutants are hurt once or twice: much of a file must stay whole for a decoder to get as far as where it can be wrong.
"""

from collections.abc import Callable, Sequence
from random import Random

MOST_BYTES = 1 << 16
"""Of a mutant: speed; what large files do has tests of its own."""
LYING = (
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
)
"""Values at which counts and lengths turn over."""


def mutate(data: bytes, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> bytes:
    """Return `data` hurt in one to eight places, most often in one.

    Args:
        data: a sound file.
        others: files of the same kind, to splice with.
        words: of the format: markers, names, numbers in text.
        random: decides everything.
    """
    hurt = bytearray(data)
    for _ in range(1 + min(7, int(random.expovariate(1.0)))):
        random.choice(DAMAGE)(hurt, others, words, random)
    return bytes(hurt[:MOST_BYTES])


Damage = Callable[[bytearray, Sequence[bytes], Sequence[bytes], Random], None]


def _flip(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        if hurt:
            hurt[random.randrange(len(hurt))] ^= 1 << random.randrange(8)


def _byte(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    if hurt:
        hurt[random.randrange(len(hurt))] = random.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, random.randrange(256)))


def _length(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    """Replace 1, 2, 4 or 8 bytes by a number that lies, or by what stands there and a little more or less."""
    size = random.choice((1, 2, 4, 8))
    order = random.choice(("little", "big"))
    if len(hurt) < size:
        return
    at = random.randrange(len(hurt) - size + 1)
    stands = int.from_bytes(hurt[at : at + size], order)
    value = random.choice(LYING) if random.random() < 0.7 else stands + random.choice((-2, -1, 1, 2, 16, 256, stands))
    hurt[at : at + size] = (value % 256**size).to_bytes(size, order)


def _cut(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    del hurt[random.randrange(len(hurt) + 1) :]


def _drop(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    begin, end = _span(hurt, random)
    del hurt[begin:end]


def _double(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    begin, end = _span(hurt, random)
    hurt[begin:begin] = hurt[begin:end] * random.choice((1, 1, 2, 16))


def _move(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    begin, end = _span(hurt, random)
    part = hurt[begin:end]
    del hurt[begin:end]
    at = random.randrange(len(hurt) + 1)
    hurt[at:at] = part


def _noise(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    at, noise = random.randrange(len(hurt) + 1), random.randbytes(random.choice((1, 2, 8, 64)))
    hurt[at : at + random.choice((0, len(noise)))] = noise


def _splice(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    """Go on with another file from some place."""
    other = random.choice(others)
    at = random.randrange(len(hurt) + 1)
    hurt[at:] = other[random.randrange(len(other) + 1) if random.random() < 0.5 else min(at, len(other)) :]


def _word(hurt: bytearray, others: Sequence[bytes], words: Sequence[bytes], random: Random) -> None:
    """Put a word of the format somewhere, or in the place of another one."""
    word = random.choice(words)
    there = hurt.find(random.choice(words)) if random.random() < 0.5 else -1
    at = there if there >= 0 else random.randrange(len(hurt) + 1)
    hurt[at : at + random.choice((0, len(word)))] = word


def _span(hurt: bytearray, random: Random) -> tuple[int, int]:
    begin = random.randrange(len(hurt) + 1)
    return begin, min(len(hurt), begin + random.choice((1, 2, 4, 16, 64, 1024)))


DAMAGE: tuple[Damage, ...] = (
    _flip, _flip, _byte, _length, _length, _cut, _drop, _double, _move, _noise, _splice, _word, _word,
)  # fmt: skip
"""Kinds of damage, the more telling ones twice."""
