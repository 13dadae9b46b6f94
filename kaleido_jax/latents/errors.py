"""What can be wrong with a latent: one family of errors, and nothing else leaves the parsers."""

from __future__ import annotations

from kaleido_jax.errors import UserError

EXCERPT = 40


class LatentError(UserError, ValueError):
    """A latent string or value that its grammar does not hold.

    Attributes:
      message: one line: what is wrong and what would be right.
      kind: a stable word for counting (`type`, `size`, `character`, `syntax`, `range`, `document`).
      position: offset in characters into the string where it goes wrong; None for values.
      latent: name of the latent, None where it is not known.
    """

    kind = "latent"

    def __init__(self, message: str, position: int | None = None, latent: str | None = None):
        self.message, self.position, self.latent = message, position, latent
        prefix = f"{latent}: " if latent else ""
        suffix = "" if position is None else f" (at character {position})"
        super().__init__(f"{prefix}{message}{suffix}")

    def __reduce__(self):
        return type(self), (self.message, self.position, self.latent)

    def located(self, offset: int, latent: str | None = None) -> LatentError:
        """The same error seen from a longer string in which this one begins at `offset`."""
        return type(self)(self.message, (self.position or 0) + offset, latent or self.latent)


class LatentTypeError(LatentError):
    """Not a string, not an integer, not a segment."""

    kind = "type"


class LatentSizeError(LatentError):
    """Empty, too long, too many objects, not 32 ids."""

    kind = "size"


class LatentCharacterError(LatentError):
    """A control or invisible character, a lone surrogate, or spaces that are not single."""

    kind = "character"


class LatentSyntaxError(LatentError):
    """The string is not a sentence of the grammar."""

    kind = "syntax"


class LatentRangeError(LatentError):
    """A number outside its range, corners or radii in the wrong order."""

    kind = "range"


class DocumentError(LatentError):
    """A latent document, or the picture that should carry one, that cannot be read or made."""

    kind = "document"


def excerpt(value: object) -> str:
    """At most `EXCERPT` characters of a string, quoted, on one line, in ASCII; else the type."""
    if not isinstance(value, str):
        return type(value).__name__
    return ascii(value[:EXCERPT]) + ("..." if len(value) > EXCERPT else "")
