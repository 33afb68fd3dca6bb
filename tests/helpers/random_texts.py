"""Random texts that are hard on tokenizers."""

import random
import unicodedata


def random_texts(seed: int, count: int) -> list[str]:
    """Seeded NFC texts of letters, blanks, marks and signs from all over Unicode, with runs."""
    rng = random.Random(seed)
    blocks = ((32, 126), (9, 13), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x52F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
    blocks += ((1, 0xD7FF), (0xE000, 0x10FFFF), (32, 32), (32, 32), (0x2580, 0x2582))
    texts = []
    for _ in range(count):
        text = "".join(
            chr(rng.randint(*block)) * rng.choice((1, 1, 1, 4)) for block in rng.choices(blocks, k=rng.randint(1, 60))
        )
        texts.append(unicodedata.normalize("NFC", text))
    return texts
