"""Taking secrets out of text that people will read: log lines, errors, shown settings. The text stays useful."""

from __future__ import annotations

import re

MASK = "********"

#: A URL up to the first character that cannot be part of one; signed URLs are long, so nothing here may backtrack far.
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}://[^\s\"'<>`|\\]+")
_TELLING_WORDS = (
    r"authorization|proxy-authorization|cookie|set-cookie|x-api-key|api[-_]?key|access[-_]?key(?:[-_]id)?|secret(?:[-_]\w{1,40})?"
    r"|x-amz-security-token|(?:x-[a-z]{1,10}-)?signature|password|passwd|pgpassword|sslpassword|token|session[-_]?token"
)
#: ``Authorization: Bearer abc``, ``password=abc``, ``'api_key': 'abc'``, ``"secret_access_key": "abc"``.
_PAIR = re.compile(
    rf"(?i)(?<![a-z0-9])((?:{_TELLING_WORDS})[\"']?\s{{0,5}}[:=]\s{{0,5}})"
    r"(?:b?\"[^\"\n]*\"|b?'[^'\n]*'|(?:(?:bearer|basic|digest|token|aws4-hmac-sha256)\s+)?[^\s,;&\"'}\])]+)"
)
_SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}")
#: The shapes of well-known keys, wherever they stand.
_KEYS = re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")
_SECRET_NAME = re.compile(rf"(?i)(?:.*[-_.])?(?:{_TELLING_WORDS})\Z")
#: Ours, and no secret: the fence of an attempt, and counts of things.
_HARMLESS_NAMES = frozenset({"token_count", "max_tokens"})


def redact(text: str) -> str:
    """*text* with passwords, keys, authorization values and the queries of URLs masked."""
    text = _URL.sub(lambda found: mask_url(found[0], keep_query=False), text)
    text = _PAIR.sub(rf"\g<1>{MASK}", text)
    text = _SCHEME.sub(rf"\g<1> {MASK}", text)
    return _KEYS.sub(MASK, text)


def is_secret_name(name: str) -> bool:
    """Whether a field of that name holds a secret, whatever its value looks like."""
    return name.lower() not in _HARMLESS_NAMES and _SECRET_NAME.match(name) is not None


def mask_url(url: str, *, keep_query: bool = True) -> str:
    """
    *url* without its password.

    Args:
        url: with a scheme.
        keep_query: False masks the whole query, where signatures stand; True masks only what is named like a password.
    """
    scheme, _, rest = url.partition("://")
    if not rest:
        return MASK
    rest, has_fragment, _ = rest.partition("#")
    # Up to the last "@": a password with an unescaped "@", "/" or "?" must not show its tail.
    login, has_login, rest = rest.rpartition("@") if "@" in rest else ("", "", rest)
    if has_login and not re.search(r"[/?]", login.partition(":")[0]):
        user, has_password, _ = login.partition(":")
        login = f"{user}:{MASK}" if has_password else user
    elif has_login:  # the "@" stands in the path or the query
        login, has_login, rest = "", "", f"{login}@{rest}"
    address, has_query, query = rest.partition("?")
    if has_query:
        query = re.sub(r"(?i)((?:^|&)(?:\w*password|passfile|sslkey)=)[^&]*", rf"\1{MASK}", query) if keep_query else MASK
    return f"{scheme}://{login}{has_login}{address}{has_query}{query}" + (f"#{MASK}" if has_fragment else "")
