"""Local paths and secrets: found before an upload, and removed from model cards and reports."""

import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
from detect_secrets.plugins.base import RegexBasedDetector
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data import ENDINGS


# Absolute paths: `file:/x`, `C:\x`, `\\server\share`, `/x/y`, `~jane/x`, and top-level folders of common systems.
BEFORE = r"(?:(?<=[\s\"'`=:(\[{,;|>!@])|^)"
PART = r"[^\s\"'`<>|,;)\]\\/]"
PATH = re.compile(
    rf"""file:/+{PART}+(?:[\\/]+{PART}*)*
    | (?<!\w)[A-Za-z]:[\\/]{{1,2}}{PART}{{2,}}(?:[\\/]{{1,2}}{PART}+)+
    | (?<!\w)[A-Za-z]:(?:/|\\\\|\\(?![abfnrtvx0])){PART}{{2,}}  # `A:\n` is the end of a line in code
    | {BEFORE}(?:\\\\[\w.-]{{2,}}(?:\\[\w$.-]{{2,}})+|\\{{4}}[\w.-]{{2,}}(?:\\\\[\w$.-]{{2,}})+)
    | {BEFORE}~[A-Za-z_][\w.-]*(?:/{PART}*)+
    | {BEFORE}/[\w.@+~-]+(?:/{PART}*)+
    | {BEFORE}/(?:data|etc|gpfs|home|lustre|media|mnt|nfs|opt|private|root|scratch|srv|storage|tmp|Users|usr|var|Volumes
        |work|workspace)(?![\w/-])
    """,
    re.VERBOSE | re.MULTILINE,
)
RELATIVE_PATH = re.compile(rf"(?<![\w/])(?:~|\.{{1,2}}){PART}*(?:/{PART}*)+")
# Paths that are the same on every machine or placeholders; and links within a site.
COMMON_PATH = re.compile(r"/usr/bin/env\b|/bin/(?:ba)?sh\b|/path/to\b|/your/|/html/|/proc/cpuinfo\b")
LINK = re.compile(r"\]\(/[^\s)]*\)|\b(?:href|src)=[\"']/[^\"']*")

# Formats that detect-secrets lacks: the Hub, services that train and serve models, and newer formats of others.
SERVICE_SECRET = re.compile(
    r"""\b(?:
    (?:hf|api_org)_[A-Za-z0-9]{16,}
    | sk-(?:proj|svcacct|admin|ant|or|lf)-[\w-]{16,} | sk-[A-Za-z0-9]{32,} | (?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}
    | AIza[\w-]{35} | ya29\.[\w-]{20,} | GOCSPX-[\w-]{20,} | EAA[A-Z][A-Za-z0-9]{30,}
    | github_pat_\w{22,} | npm_[A-Za-z0-9]{36} | dapi[a-f0-9]{32} | age-secret-key-1\w{50,}
    | (?:gsk|r8|fw|csk|tgp_v1|wandb_v1|dop_v1|lsv2_[ps][tk]|sbp|shpat|glsa|ntn|phc|phx|rpa|pcsk|lin_api|pul)_(?=\w*\d)[A-Za-z0-9_]{24,}
    | (?:xai|nvapi|pplx|dckr_pat|whsec|sntrys|PMAK|xapp-\d)[-_](?=[\w-]*\d)[\w-]{20,} | hv[sb]\.[\w-]{24,}
    )
    | \bBearer\ +(?=[\w.~+/-]*\d)[\w.~+/-]{20,}=*
    | BEGIN\ ENCRYPTED\ PRIVATE\ KEY
    | (?<=://)[^/\s@:]+:[^/\s@]+@
    """,
    re.VERBOSE,
)
SECRET_NAME = (
    r"(?:[\w-]*(?:api|auth|access|account|client|private|secret|service|signing|subscription|db)[_-]?key(?:[_-]?id)?"
    r"|[\w-]*(?:password|passwd|passphrase|secret|credentials?)"
    r"|(?:[\w-]+[_-])?(?:access|api|auth|bearer|bot|hub|hf|id|refresh|session|upload|wandb|github|user)[_-]?token)"
)
PLACEHOLDER = r"(?!\[|<|\$|\*|x{3}|none\b|null\b|true\b|false\b|your|example|placeholder|redacted)"
NAMED_SECRET = re.compile(
    # Without quotes, as in YAML, a secret must have a digit and no brackets, or lines of code would match.
    rf"""(?<![\w-]){SECRET_NAME}["']?\s*[:=]\s*["']{PLACEHOLDER}(?P<quoted>[^"'\s{{}}]{{6,}})["']
    | ^[\s#>-]*{SECRET_NAME}\s*[:=]\s*{PLACEHOLDER}(?=\S*\d)(?P<plain>[^"'\s(){{}}\[\]]{{8,}})\s*$
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)

VOCABULARIES = {"vocab.txt", "vocab.json", "merges.txt"}  # word pieces can look like secrets


def read_text(path: Path) -> str:
    """Text of a file to scan: all of it, or the header of a safetensors file. JSON is decoded.

    Each JSON string is on a line of its own, and again as `"name": "value"`, without escapes. Word pieces of a vocabulary
    are left out.

    Raises:
        ValueError: The file is not UTF-8 text.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else file.seek(0) - 1
        text = file.read(length).decode("utf-8")
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    if path.name in VOCABULARIES:
        return ""
    if path.suffix not in (".json", ".safetensors"):
        return html.unescape(text)
    try:
        content = json.loads(text)
    except ValueError:  # no JSON, whatever its name says
        return text
    if path.name == "tokenizer.json" and isinstance(content, dict) and isinstance(content.get("model"), dict):
        content["model"] = {name: part for name, part in content["model"].items() if name not in ("vocab", "merges")}
    return "\n".join(walk(content))


def walk(value: Any, name: str = "") -> Iterator[str]:
    """Lines of [`read_text`] for a JSON value."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from walk(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from walk(part, name)
    elif isinstance(value, str):
        yield f'{value}\n"{name}": "{value}"'


def find_private(text: str) -> str | None:
    """Why a text must not be made public, as the end of a sentence; None if nothing was found."""
    for kind, secret in find_secrets(text):
        return f"holds what looks like a secret ({kind}, '{secret[:4]}…')"
    for match in PATH.finditer(LINK.sub(" ", text)):
        if not COMMON_PATH.match(match[0]):
            return f"names a local path ('{match[0]}')"
    for folder in (Path.home(), Path.cwd()):  # `PATH` does not know all characters
        if len(folder.parts) > 1 and f"{folder}{os.sep}" in text:
            return f"names a local path ('{folder}')"
    return None


def find_secrets(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each secret, by the rules of detect-secrets for known formats, and by ours."""
    for match in SERVICE_SECRET.finditer(text):
        yield "token of a service", match[0]
    for match in NAMED_SECRET.finditer(text):
        yield "named as one", match["quoted"] or match["plain"]
    for kind, detector in get_mapping_from_secret_type_to_class().items():
        # Entropy rules would match word pieces and hashes; an IP address is not a secret.
        if issubclass(detector, RegexBasedDetector) and detector.__name__ != "IPPublicDetector":
            for secret in detector().analyze_string(text):
                yield kind, secret


def redact(value: Any) -> Any:
    """Values for a public text: local paths reduced to their last name, no secrets, strings on one line."""
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if not re.fullmatch(SECRET_NAME, str(name), re.IGNORECASE)}
        return {redact(name): redact(part) for name, part in kept.items()}
    if isinstance(value, list | tuple):
        return [redact(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = " ".join(str(value).split())
    for _, secret in list(find_secrets(text)):
        text = text.replace(secret, "")
    is_path = "/" in text and " " not in text and "://" not in text and hub_id(text) is None
    if is_path or PATH.match(text) or RELATIVE_PATH.match(text):
        return last_name(text)
    for pattern in (PATH, RELATIVE_PATH):
        text = pattern.sub(lambda match: last_name(match[0]), text)
    return text


def last_name(path: str) -> str:
    """`c` of `/a/b/c/`, with slashes or backslashes."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def hub_id(source: str) -> str | None:
    """`namespace/name` of a Hub source `namespace/name` or `namespace/name:config`; None for a local source."""
    name = source.partition(":")[0]
    if "/" not in name or Path(name).suffix.lower() in ENDINGS or os.path.exists(source):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
