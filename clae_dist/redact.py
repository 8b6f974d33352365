"""The one place that takes secrets out of what is printed or written: logins, tokens and signatures in URLs, and commands.

- `redact`, `redact_list`: an entry of `data.shards` as logs and errors show it.
- `without_secrets`, `uri_without_secrets`: a setting as a run's files hold it; what is left still works where it can.
- `redact_text`: any text, such as another program's message. Everything that is printed passes through it last.
- `redact_word`: a word of the command line that was not understood, and may be any of these.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from urllib.parse import unquote

PIPE = "pipe:"
HIDDEN = "?…"  # what stands for the query of a URL, which may be a signature
_SCHEME = re.compile(r"([a-zA-Z][\w+.-]*)://")
_URL = re.compile(r"[a-zA-Z][\w+.-]*://(?:\[[\da-fA-F:.]+\]|(?!::)[^\s'\"<>])+")
_SECRET = re.compile("pass|pwd|secret|token|key|cred|sig|auth", re.IGNORECASE)
# me:password@host without a scheme, or after one with a slash too few
_LOGIN = re.compile(r"(?:(?<=//)|(?<![\w.@/-]))(\w[\w.+-]*:/?)?[^\s/:@'\"=,;(){}\[\]]+:(?!/)[^\s@'\"]+@(?=[\w\[])")
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(?<![\w-])([\w-]*(?:token|passw(?:or)?d|pwd|secret|api_?key|access_?key|signature|credentials?))=(?!…)[^\s&'\",;)]+",
    re.IGNORECASE,
)
_KNOWN = re.compile(
    r"\b(dapi[0-9a-f]{16,}(-\d)?|hf_\w{20,}|gh[pousr]_\w{20,}|glpat-[\w-]{16,}|AKIA[0-9A-Z]{12,}|ya29\.[\w.-]{20,}|xox[bp]-[\w-]{10,})"
)
_SHELL = re.compile(r"[|;&$`<>()\n]")
_UNPACKERS = frozenset("cat gzip gunzip zcat bzip2 bzcat xz xzcat zstd zstdcat lz4 pigz".split())
_DATABASES = frozenset("postgresql postgres mysql mariadb mssql oracle sqlite".split())


def scheme(entry: str) -> str:
    """ "https", "s3", "pipe", …; "" for a path of this machine (file:// is one, too)."""
    if entry.startswith(PIPE):
        return "pipe"
    found = _SCHEME.match(entry)
    name = found[1].lower() if found else ""
    return "" if name == "file" else name


def redact(entry: str) -> str:
    """An entry as logs and errors may show it: no user, no password, nothing after "?", of a pipe only the program's name."""
    kind = scheme(entry)
    if kind == "pipe":
        return f"{PIPE}{_program(entry)} …"
    return _url(entry) if kind else _LOGIN.sub(_hide_login, entry)


def redact_list(text: str) -> str:
    """`data.shards` as logs may show it, braces as they were written."""
    return "::".join(redact(part) for part in text.split("::"))


def without_secrets(text: str) -> str:
    """`data.shards` as a run's files may hold it: as it was written, but without logins and what follows "?" in URLs.

    Of a command, which may hold a token anywhere, no more than the program's name, unless it does no more than unpack a file.
    """
    return "::".join(_command_without_secrets(part) if scheme(part) == "pipe" else redact(part) for part in text.split("::"))


def uri_without_secrets(uri: str) -> str:
    """The address of a store without its login; a database's user stays (libpq finds the password in ~/.pgpass by it)."""
    return _url(uri) if "://" in uri else _LOGIN.sub(_hide_login, uri)


def redact_text(text: str) -> str:
    """A text with every URL in it redacted, and logins, tokens and passwords that stand in it otherwise."""
    text = _URL.sub(lambda url: _url(url[0]), text)
    text = _LOGIN.sub(_hide_login, text)
    text = _KNOWN.sub("…", _BEARER.sub(lambda found: f"{found[1]} …", text))
    return _ASSIGNED.sub(lambda found: f"{found[1]}=…", text)


def redact_word(word: object) -> str:
    """A word of the command line, or a value of a recipe, as an error may show it."""
    text = str(word)
    if PIPE in text:
        before, _, command = text.partition(PIPE)
        return redact_text(before) + redact(PIPE + command)
    return redact_text(text)


def _url(url: str) -> str:
    """A URL without login, query and fragment; a database's keeps its user and the options that are no secrets."""
    kind, _, rest = url.partition("://")
    login, host, tail = _parts(rest)
    if kind.lower().partition("+")[0] not in _DATABASES:
        path = re.split(r"[?#;]", tail, maxsplit=1)[0]
        query = tail[len(path) :].partition("#")[0]
        return _KNOWN.sub("…", f"{kind}://{host}{path}{HIDDEN if len(query) > 1 else ''}")
    user = login.partition(":")[0]
    path, question, query = tail.partition("#")[0].partition("?")
    options = "&".join(option for option in query.split("&") if not _SECRET.search(unquote(unquote(option))))
    return f"{kind}://{user}{'@' if login else ''}{host}{path}{question if options else ''}{options}"


def _parts(rest: str) -> tuple[str, str, str]:
    """Login, host and what follows. A password may hold what ends a host elsewhere: "/", "?", "#", "@"."""
    end = next((place for place, letter in enumerate(rest) if letter in "/?#"), len(rest))
    authority = rest[:end]
    port = authority.rpartition("@")[2].rpartition("]")[2].rpartition(":")[2] if ":" in authority else ""
    no_port = ":" in authority.rpartition("@")[2].rpartition("]")[2] and not re.fullmatch(r"\d*|[{\d.}]+", port)
    if "@" in rest[end:] and ("@" in authority or no_port):
        login, _, rest = rest.rpartition("@")
        end = next((place for place, letter in enumerate(rest) if letter in "/?#"), len(rest))
        return login, rest[:end], rest[end:]
    login, _, host = authority.rpartition("@")
    return login, host, rest[end:]


def _hide_login(found: re.Match[str]) -> str:
    return f"{found[1] or ''}…@"


def _command_without_secrets(entry: str) -> str:
    words = entry[len(PIPE) :].split()
    if words and words[0] in _UNPACKERS and not _SHELL.search(entry) and "://" not in entry:
        return entry
    return f"{PIPE}{_program(entry)} {HIDDEN}"


def _program(entry: str) -> str:
    """The program that a pipe starts, without what is assigned before it; "" where that is not a plain word."""
    try:
        words = shlex.split(entry[len(PIPE) :])
    except ValueError:  # a quotation that does not end
        return ""
    word = next((word for word in words if "=" not in word), "")
    return word if re.fullmatch(r"[\w./+-]*", word) else ""


if __name__ == "__main__":  # for launch/show.sh: words that end with a zero byte, from stdin to stdout
    for _word in sys.stdin.buffer.read().split(b"\0")[:-1]:
        sys.stdout.buffer.write(os.fsencode(redact_word(os.fsdecode(_word))) + b"\0")
