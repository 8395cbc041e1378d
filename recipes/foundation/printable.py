"""Text of strangers as a terminal or a page may show it."""

import unicodedata


def visible(text: object) -> str:
    """Control, direction and line-end marks spelt out, as in ⟨U+202E⟩, so that none acts."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        f"⟨U+{ord(character):04X}⟩"
        if character not in "\n\t"
        and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else character
        for character in shown
    )
