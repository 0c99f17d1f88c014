"""What a scan before an upload finds in the files of a model, and what it lets pass. Every secret is made up here."""

import base64
import json
import random
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import modernalbert
from modernalbert.tokenization import save_tokenizer, train_tokenizer
from modernalbert.training.export.folder import check_public
from modernalbert.training.export.redaction import find_private, hub_id, read_text, redact


ALNUM, HEX, UPPER = string.ascii_letters + string.digits, "0123456789abcdef", string.ascii_uppercase + string.digits


def draw(count, alphabet=ALNUM):
    """Random characters with at least a digit among them."""
    return "".join(random.Random(count).choices(alphabet, k=count - 1)) + "7"


def encode(text):
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


SECRETS = {
    "Hugging Face": lambda: "hf_" + draw(34, string.ascii_letters),
    "Hugging Face, organisation": lambda: "api_org_" + draw(34),
    "OpenAI": lambda: "sk-proj-" + draw(48),
    "OpenAI, of old": lambda: "sk-" + draw(20) + "T3Blbk" + "FJ" + draw(20),
    "Anthropic": lambda: "sk-ant-api03-" + draw(60),
    "AWS": lambda: "AK" + "IA" + draw(16, UPPER),
    "Google": lambda: "AI" + "za" + draw(35),
    "GitHub": lambda: "gh" + "p_" + draw(36),
    "GitHub, fine-grained": lambda: "github_" + "pat_" + draw(22) + "_" + draw(59),
    "GitLab": lambda: "gl" + "pat-" + draw(20),
    "Slack": lambda: "xo" + "xb-" + draw(12, string.digits) + "-" + draw(12, string.digits) + "-" + draw(24),
    "Stripe": lambda: "sk_" + "live_" + draw(24),
    "SendGrid": lambda: "SG" + "." + draw(22) + "." + draw(43),
    "Twilio": lambda: "A" + "C" + draw(32, HEX),
    "Telegram": lambda: draw(10, string.digits) + ":" + draw(35),
    "Discord": lambda: "M" + draw(24) + "." + draw(6) + "." + draw(27),
    "npm": lambda: "np" + "m_" + draw(36),
    "PyPI": lambda: "py" + "pi-AgEIcHlwaS5vcmc" + draw(80),
    "Databricks": lambda: "da" + "pi" + draw(32, HEX),
    "Groq": lambda: "gs" + "k_" + draw(52),
    "Replicate": lambda: "r" + "8_" + draw(37),
    "NVIDIA": lambda: "nv" + "api-" + draw(64),
    "Azure": lambda: "AccountKey=" + draw(86) + "==",
    "JWT": lambda: ".".join(encode(part) for part in ('{"alg":"HS256"}', '{"sub":"1"}')) + "." + draw(40),
    "private key": lambda: "-----BEGIN " + "PRIVATE KEY-----",
    "password of a URL": lambda: "postgres://jane:" + draw(12) + "@db.example.org/x",
    "bearer": lambda: "Authorization: Bearer " + draw(40),
}
NAMED = {
    "wandb_api_key": HEX,
    "aws_secret_access_key": ALNUM,
    "password": ALNUM,
    "client_secret": HEX,
    "hub_token": ALNUM,
}
HOME = "/home"  # in a text, a folder below it is a path of one machine
PATHS = [
    "/data/corpora/c4",
    "/mnt/nfs/jane",
    "/scratch",
    "/data",
    f"{HOME}/jane",
    "/Users/jane/models",
    "/gpfs/project/run-1",
    "/odd/place/file.txt",
    "~jane/models",
    "C:\\Users\\jane\\model",
    "C:/Users/jane",
    "D:\\models",
    "\\\\server\\share\\model",
    "file:///data/x",
    "file:/data/x",
    f"{HOME}/jörg/modelle",
]


def write(folder, name, text):
    """A file of a model's folder that says the text somewhere."""
    path = folder / name
    if name.endswith(".safetensors"):
        save_file({"weight": torch.ones(1)}, path, metadata={"note": text})
    elif name.endswith(".json"):
        path.write_text(json.dumps({"model_type": "modernalbert", "parts": [{"note": text}]}))  # escapes all but ASCII
    else:
        path.write_text(f"# A model\n\nMade with '{text}' on a Monday.\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("provider", SECRETS)
def test_a_secret_is_found_in_every_kind_of_file(tmp_path, provider):
    secret = SECRETS[provider]()
    for name in ("config.json", "README.md", "modeling.py", "page.html", "model.safetensors"):
        write(tmp_path, name, secret)
        with pytest.raises(
            ValueError, match=f"'{name}' holds what looks like a secret.*nothing was uploaded"
        ) as error:
            check_public(tmp_path)
        assert secret not in str(error.value)
        (tmp_path / name).unlink()
    assert secret not in str(redact({"note": f"see {secret} there"}))


@pytest.mark.parametrize("name", NAMED)
def test_a_secret_is_found_by_its_name(tmp_path, name):
    value = draw(32, NAMED[name])
    (tmp_path / "config.json").write_text(json.dumps({"a": {name: value}}))
    with pytest.raises(ValueError, match="secret .named as one"):
        check_public(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"```yaml\n{name}: {value}\n```\n")
    with pytest.raises(ValueError, match="secret .named as one"):
        check_public(tmp_path)
    assert redact({name: value, "seed": 1}) == {"seed": 1}


@pytest.mark.parametrize("path", PATHS)
def test_a_local_path_is_found_in_every_kind_of_file(tmp_path, path):
    for name in ("config.json", "README.md", "modeling.py", "page.html", "model.safetensors"):
        write(tmp_path, name, path)
        with pytest.raises(ValueError, match=f"'{name}' names a local path"):
            check_public(tmp_path)
        (tmp_path / name).unlink()
    assert not {"jane", "data", "home", "Users"} & set(
        str(redact(f"from {path}/last")).replace("\\", "/").split("/")[:-1]
    )


def test_a_home_of_odd_characters_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/Jörg (neu)")
    write(tmp_path, "config.json", "/Jörg (neu)/model")
    with pytest.raises(ValueError, match="names a local path"):
        check_public(tmp_path)


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes('{"a": "b"}'.encode("utf-16"))
    with pytest.raises(ValueError, match="'config.json' is no text"):
        check_public(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"a": "\0"}')
    with pytest.raises(ValueError, match="it holds a NUL character"):
        check_public(tmp_path)


def test_an_ordinary_folder_passes(make_model, tmp_path):
    """Its code, its tokenizer, whose vocabulary looks like anything, and a card with hashes and links."""
    tokenizer = train_tokenizer([f"{HOME}/jane/x password secret /data/a " * 3], vocab_size=330)
    tokenizer.add_tokens(["[unused1]"])
    save_tokenizer(tokenizer, tmp_path)
    make_model(modernalbert.ModernAlbertForMaskedLM).save_pretrained(tmp_path)
    odd = [f"{HOME}/jane", "/data", "password", "sk-" + draw(40), draw(64, HEX), "C:\\Users"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(odd)}))
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["vocab"] |= {piece: 400 + number for number, piece in enumerate(odd)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "README.md").write_text(
        f"See [this](/org/model) and https://example.org/home/jane/a, commit {draw(40, HEX)}.\n"
        "| train | 10 rows | and/or | 3/4 | tokens/s |\n`cache_dir=/path/to/cache`, `#!/usr/bin/env python`\n"
        "mask_token: [MASK]\npassword: your-password-1\nhub_token = '<HUB_TOKEN>'\nAnswer:\\nno\n"
    )
    (tmp_path / "code.py").write_text('import os\napi_key = os.environ["API_KEY_1"]\nsecret = None\nx = "A:\\nb"\n')
    (tmp_path / "page.html").write_text("<table><tr><td>1/2</td></tr></table><style>font: 15px/1.4</style>")
    assert {path.name for path in check_public(tmp_path)} == {path.name for path in tmp_path.iterdir()}


def test_settings_of_a_tokenizer_are_scanned(tmp_path):
    settings = {"model": {"vocab": {}, "note": "/data/x"}, "added_tokens": [{"content": "/scratch/jane"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    text = read_text(tmp_path / "tokenizer.json")
    assert "/data/x" in text and find_private(text) == "names a local path ('/data/x')"
    (tmp_path / "broken.json").write_text('{"a": "/data/x"')
    assert find_private(read_text(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/srv/jane/data/", "data"),
        ("/srv/jane doe/data", "data"),
        ("~/data/a.jsonl", "a.jsonl"),
        ("../data/*.jsonl", "*.jsonl"),
        ("data/part/*.jsonl", "*.jsonl"),
        ("C:\\Users\\jane\\data", "data"),
        ("file:///srv/jane/data", "data"),
        ("cp /srv/jane/a.txt --to=/mnt/b c:/srv/jane", "cp a.txt --to=b jane"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("see https://jane:secret@example.org/a", "see https://example.org/a"),
        ("token hf_abcdefghijklmnop", "token "),
        ("org/name:config", "org/name:config"),
        ("8 x GPU, 9 tokens/s", "8 x GPU, 9 tokens/s"),
        (Path("/srv/jane/data"), "data"),
        ({"a": ("/b/c", 1, None, True), "hub_token": "x"}, {"a": ["c", 1, None, True]}),
    ],
)
def test_names_for_the_public(given, expected):
    assert redact(given) == expected


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    assert hub_id("org/name") == hub_id("org/name:config") == "org/name"
    local = ("runs/tiny", "name", "data/a.jsonl", "data/*", "/a/b", "a/b/c", "~/a", "./a", "")
    assert [hub_id(source) for source in local] == [None] * len(local)
