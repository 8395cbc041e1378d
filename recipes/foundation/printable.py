"""Escape untrusted text for a terminal or a page."""

import unicodedata


def escape_controls(text: object) -> str:
    """Replace control, bidi and line-separator characters by visible escapes such as ⟨U+202E⟩.

    Untrusted text can then not affect a terminal or a page. Newlines and tabs are kept.
    """
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
