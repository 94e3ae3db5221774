"""
Images that come as base64 within a JSON answer, taken out of it as it arrives.

Five images of 5 MB are an answer of 33 MB; read as a whole it is in memory four times over (bytes, text, strings, images), and
several calls answer at once. Here long strings are decoded block by block into spools, and what is left of the answer is short.
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Callable

from jobdaemon.errors import AnswerLostError, ProviderUnavailableError
from jobdaemon.providers.wire import inline_image, media_type_of
from jobdaemon.spool import Spool

#: A longer string is an image; a shorter one stays in the answer.
_LONG_BYTES = 1 << 16
#: What an answer may hold beside its images.
_MAX_FRAME_BYTES = 1 << 20
#: The rest of a string that has begun, up to its closing quote or a backslash whose other half has not come yet.
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_ESCAPE = re.compile(rb"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)
_HALF_ESCAPE = re.compile(rb"\\u?[0-9A-Fa-f]{0,3}\Z")
_DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_NO_DIGITS = bytes(set(range(256)) - set(_DIGITS) - {ord("=")})


class InlineImages:
    """
    A sink for one answer (:class:`jobdaemon.http.Sink`).

    What is no JSON passes through unchanged, but for strings that no error's text is as long as.
    """

    def __init__(self, spool: Callable[[], Spool], *, most: int, max_bytes: int, provider: str) -> None:
        """
        Args:
            spool: makes an empty one.
            most: how many images; further ones are dropped.
            max_bytes: of one image.
            provider: for errors.
        """
        self._new_spool = spool
        self._most = most
        self._max_bytes = max_bytes
        self._provider = provider
        self._mark = f"data:{secrets.token_hex(8)}/"
        self._rest = bytearray()
        self._half = b""
        #: The string that has begun, as long as it is short; None outside of strings.
        self._string: bytearray | None = None
        self._image: _Image | None = None
        self._images: list[_Image] = []

    def write(self, block: bytes) -> None:
        """
        Take the next bytes of the answer.

        Raises:
            AnswerLostError: it holds too much beside its images.
            StoreUnavailableError: there is no room for them. Retryable.
        """
        block, at = self._half + block, 0
        self._half = b""
        while at < len(block):
            if self._string is None:
                quote = block.find(b'"', at)
                end = len(block) if quote < 0 else quote + 1
                self._keep(block[at:end])
                if quote >= 0:
                    self._string = bytearray()
            else:
                end = _end_of_string(block, at)
                self._take(block[at:end])
                if end < len(block):
                    if block[end:] == b"\\":
                        self._half = b"\\"
                        return
                    self._end_string()
                    end += 1
            at = end

    @property
    def max_answer_bytes(self) -> int:
        """More than any good answer has: so many images, and what stands beside them."""
        return self._most * (self._max_bytes * 4 // 3 + 4) + _MAX_FRAME_BYTES

    def rest(self) -> bytes:
        """The answer without the long strings, each replaced by what :meth:`decoded` knows it by; to be asked for at the end."""
        return bytes(self._rest) + bytes(self._string or b"") + self._half

    def decoded(self, text: str) -> tuple[bytes | Spool, str]:
        """
        The image, and its media type, that *text* is: a string of the rest.

        Raises:
            ProviderUnavailableError: it is none, or too large.
        """
        if not text.startswith(self._mark):
            return inline_image(text, max_bytes=self._max_bytes, provider=self._provider)
        number = int(text[len(self._mark) :])
        if number >= len(self._images):
            raise ProviderUnavailableError(f"{self._provider} sent more images than were asked for")
        image = self._images[number]
        if image.problem is not None:
            raise ProviderUnavailableError(f"{self._provider} sent {image.problem}")
        media_type = media_type_of(image.spool.head(16))
        if media_type is None:
            raise ProviderUnavailableError(f"{self._provider} sent something that is neither PNG, JPEG nor WebP")
        return image.spool, media_type

    def _keep(self, piece: bytes | bytearray) -> None:
        self._rest += piece
        if len(self._rest) > _MAX_FRAME_BYTES + self._most * _LONG_BYTES:
            raise AnswerLostError(f"{self._provider} answered with too much beside the images")

    def _take(self, piece: bytes) -> None:
        """The next bytes within a string."""
        assert self._string is not None
        if self._image is not None:
            self._image.write(piece)
            return
        self._string += piece
        if len(self._string) > _LONG_BYTES:
            self._image = _Image(self._new_spool() if len(self._images) < self._most else None, self._max_bytes)
            self._image.write(bytes(self._string))
            self._string = bytearray()

    def _end_string(self) -> None:
        assert self._string is not None
        if self._image is None:
            self._keep(self._string)
        else:
            self._keep(f"{self._mark}{len(self._images)}".encode())
            self._image.end()
            if self._image.has_room:
                self._images.append(self._image)
        self._keep(b'"')
        self._string = self._image = None


def _end_of_string(block: bytes, at: int) -> int:
    """Where the rest of a string that goes on at *at* ends in *block*: at its quote, at half an escape, or with the block."""
    quote = block.find(b'"', at)
    end = len(block) if quote < 0 else quote
    if block.find(b"\\", at, end) < 0:
        return end  # as almost always: searching for two bytes is ten times as fast as matching
    matched = _STRING.match(block, at)
    assert matched is not None  # it matches nothing, too
    return matched.end()


class _Image:
    """Base64, bare or as a ``data:`` URL, with JSON's escapes in it, on its way into a spool."""

    def __init__(self, spool: Spool | None, max_bytes: int) -> None:
        self._spool = spool
        self._max_bytes = max_bytes
        self._begun = False
        self._is_over = False
        self._half = b""
        self._digits = b""
        #: What is wrong with it.
        self.problem: str | None = None

    @property
    def has_room(self) -> bool:
        return self._spool is not None

    @property
    def spool(self) -> Spool:
        assert self._spool is not None
        return self._spool

    def write(self, piece: bytes) -> None:
        """Decode the next bytes; the first ones hold all that stands before the base64."""
        if self._spool is None or self.problem is not None or self._is_over:
            return
        piece = self._half + piece
        self._half = b""
        if b"\\" in piece:
            if (half := _HALF_ESCAPE.search(piece)) is not None:
                piece, self._half = piece[: half.start()], half[0]
            piece = _ESCAPE.sub(_unescaped, piece)
        if not self._begun:
            self._begun = True
            if piece.startswith(b"data:"):
                piece = piece.partition(b",")[2]
        digits, padding, _ = (self._digits + piece.translate(None, _NO_DIGITS)).partition(b"=")
        whole = len(digits) // 4 * 4
        self._digits = digits[whole:]
        if padding:
            # Nothing comes after it; how much of it there is does not matter.
            self._is_over = True
            self._digits, digits = b"", digits + b"=" * (-len(digits) % 4)
            whole = len(digits)
        self._decode(digits[:whole])

    def end(self) -> None:
        """Nothing more comes."""
        if self._digits:
            self.problem = self.problem or "an image that is no base64"

    def _decode(self, digits: bytes) -> None:
        try:
            content = binascii.a2b_base64(digits)
        except binascii.Error:
            self.problem = "an image that is no base64"
            return
        if self.spool.size_bytes + len(content) > self._max_bytes:
            self.problem = f"an image of more than {self._max_bytes} bytes"
            return
        self.spool.write(content)


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """What an escape of JSON's stands for, if base64 has it: some write its slash and its plus in that way."""
    character = escape[1]
    if len(character) == 1:
        return b"/" if character == b"/" else b""
    code = int(character[1:], 16)
    return bytes([code]) if code < 128 else b""
