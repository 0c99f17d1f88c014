"""How text was routed, as `scripts/inspect_routing.py` tells it, against a loop over tokens; and its page."""

import html.parser
import json
import math
import re
import shutil
from collections import Counter
from itertools import combinations

import pytest
import torch
from helpers import load_script

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM, ModernAlbertForSequenceClassification
from modernalbert.routing_modernalbert import ROUTERS
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.packing import PackedCollator
from modernalbert.training.reports.routing import (
    COVERAGES,
    MIN_COUNT,
    SMOOTHING,
    TYPICAL,
    describe_routing,
    read_batches,
    show_token,
)


TEXTS = [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(40)]
CLS, PAD, DEPTHS = 1, 0, 3
VARIANTS = [
    *({"router_type": name} for name in ROUTERS),
    {"ffn_modulation": "moa"},
    {"ffn_modulation": "moa", "router_type": "sequence"},
    {"norm_topk_prob": False, "num_experts_per_tok": 1},
]


def build_rows(seed=0):
    """Rows of one to three texts, of different lengths, over few tokens, so that these occur often."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for lengths in ([9], [4, 7], [5, 3, 6], [12], [2, 8]):
        texts = ([CLS, *torch.randint(3, 10, (n - 1,), generator=generator).tolist()] for n in lengths)
        rows.append({"input_ids": [token for text in texts for token in text]})
    return rows


def split_texts(row):
    starts = [position for position, token in enumerate(row) if token == CLS]
    return [row[start:end] for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]


def build(make_model, **overrides):
    shape = {"num_hidden_layers": 2 * DEPTHS, "mol_groups": [0, 1], "router_top_p": 0.5, "num_experts": 5}
    return make_model(ModernAlbertForMaskedLM, dtype=torch.float64, **{**shape, **overrides})


@torch.no_grad()
def route_one_by_one(model):
    """Token, number of its text, weights by group and depth, entropies alike: texts run alone and without padding."""
    seen, texts = [], [text for row in build_rows() for text in split_texts(row["input_ids"])]
    for number, text in enumerate(texts):
        weights, entropies, outputs = {}, {}, []
        handles = [
            layer.mlp.router.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[2]))
            for layer in model.model.layers
        ]
        model.model(torch.tensor([text]))
        for handle in handles:
            handle.remove()
        for index, (logits, values, experts) in enumerate(outputs):
            for position in range(len(text)):
                row = [0.0] * model.config.num_experts
                for value, expert in zip(values[position].tolist(), experts[position].tolist(), strict=True):
                    row[expert] += value
                weights[index, position] = row
                p = logits[position].softmax(-1).tolist()
                entropies[index, position] = -sum(x * math.log(x) for x in p) / math.log(len(p))
        for position, token in enumerate(text):
            layers = range(len(outputs))
            seen.append(
                (token, number, [weights[i, position] for i in layers], [entropies[i, position] for i in layers])
            )
    return seen


def choose(weights, soft):
    even = 1 / len(weights)
    return frozenset(expert for expert, weight in enumerate(weights) if (weight >= even if soft else weight > 0))


def jaccard(a, b):
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: "-".join(map(str, overrides.values())))
def test_figures_are_those_of_a_loop_over_tokens(make_model, overrides, monkeypatch):
    model = build(make_model, **overrides)
    rows = build_rows()
    collate = PackedCollator(SimpleTokens)
    report = describe_routing(model, [collate(rows[:3]), collate(rows[3:])])
    seen = route_one_by_one(model)
    experts, total = range(5), len(seen)
    soft = overrides.get("router_type") == "soft"
    assert (report["tokens"], report["sequences"]) == (total, 9) == (sum(len(row["input_ids"]) for row in rows), 9)
    counts = Counter(token for token, *_ in seen)
    sets = [[choose(weights[layer], soft) for _, _, weights, _ in seen] for layer in range(2 * DEPTHS)]
    assert list(report["groups"]) == ["0", "1"]
    for layer in range(2 * DEPTHS):
        facts = report["groups"][str(layer // DEPTHS)]["depths"][layer % DEPTHS]
        own = sets[layer]
        choices = sum(map(len, own))
        served = [sum(expert in chosen for chosen in own) for expert in experts]
        usage = [count / choices for count in served]
        assert facts["usage"] == pytest.approx(usage)
        means = [sum(weights[layer][expert] for _, _, weights, _ in seen) / total for expert in experts]
        assert facts["mean_weight"] == pytest.approx(means)
        assert facts["experts_per_token"] == pytest.approx(choices / total)
        assert facts["router_entropy"] == pytest.approx(sum(entropy[layer] for *_, entropy in seen) / total)
        assert facts["usage_entropy"] == pytest.approx(-sum(u * math.log(u) for u in usage if u) / math.log(5))
        pairs = {(a, b): sum(a in chosen and b in chosen for chosen in own) / total for a in experts for b in experts}
        assert [facts["coactivation"][a][b] for a, b in pairs] == pytest.approx(list(pairs.values()))
        scale = sum(pairs[a, b] for a in experts for b in experts if a != b)
        scale /= sum(usage[a] * usage[b] for a in experts for b in experts if a != b)
        for (a, b), found in pairs.items():
            expected = 0 if a == b else scale * usage[a] * usage[b]
            assert facts["coactivation_lift"][a][b] == (pytest.approx(found / expected) if expected else None)

        for coverage, covering in zip(COVERAGES, facts["covering_sets"], strict=True):
            sizes = [
                size
                for size in range(1, 6)
                for members in combinations(experts, size)
                if sum(served[expert] for expert in members) >= coverage * choices
            ]
            members = set(covering["experts"])
            assert covering["coverage"] == coverage and covering["even"] == {0.5: 3, 0.8: 4, 0.9: 5}[coverage]
            assert len(members) == min(sizes) and sum(served[expert] for expert in members) >= coverage * choices
            assert covering["tokens"] == pytest.approx(sum(bool(members & chosen) for chosen in own) / total)
            numbers = {number for (_, number, *_), chosen in zip(seen, own, strict=True) if members & chosen}
            assert covering["sequences"] == pytest.approx(len(numbers) / 9)
            led = 0
            for text in range(9):
                parts = [weights[layer] for _, number, weights, _ in seen if number == text]
                led += max(experts, key=lambda expert: sum(part[expert] for part in parts)) in members  # noqa: B023
            assert covering["leading"] == pytest.approx(led / 9)

        for expert in experts:
            share, lifts = served[expert] / total, {}
            for token, count in counts.items():
                of_token = zip(seen, own, strict=True)
                hits = sum(expert in chosen for (found, *_), chosen in of_token if found == token)
                if share and count >= MIN_COUNT:
                    lifts[token] = (hits + SMOOTHING * share) / (count + SMOOTHING) / share
            best = sorted((lift for lift in lifts.values() if lift > 1), reverse=True)[:TYPICAL]
            assert [entry["lift"] for entry in facts["typical"][expert]] == pytest.approx(best)
            for entry in facts["typical"][expert]:
                assert entry["lift"] == pytest.approx(lifts[int(entry["token"])])
                assert entry["count"] == counts[int(entry["token"])]

    for group in range(2):
        changes = report["groups"][str(group)]["changes"]
        assert len(changes) == DEPTHS - 1
        for depth, change in enumerate(changes):
            here, there = sets[group * DEPTHS + depth], sets[group * DEPTHS + depth + 1]
            every = [(a, b) for a in here for b in there]
            pairs = list(zip(here, there, strict=True))
            assert change["same_set"] == pytest.approx(sum(a == b for a, b in pairs) / total)
            assert change["jaccard"] == pytest.approx(sum(jaccard(a, b) for a, b in pairs) / total)
            assert change["same_set_chance"] == pytest.approx(sum(a == b for a, b in every) / total**2)
            assert change["jaccard_chance"] == pytest.approx(sum(jaccard(a, b) for a, b in every) / total**2)


class SimpleTokens:
    cls_token_id, pad_token_id = CLS, PAD


@pytest.mark.parametrize("router_type", ["top_k", "sequence"])
def test_padding_and_the_cut_into_batches_change_nothing(make_model, router_type):
    model = build(make_model, router_type=router_type)
    rows = build_rows()
    plain = describe_routing(model, [PackedCollator(SimpleTokens)([row]) for row in rows])
    padded = describe_routing(model, [PackedCollator(SimpleTokens, 30)(rows)])
    assert json.loads(json.dumps(plain), parse_float=lambda x: round(float(x), 9)) == json.loads(
        json.dumps(padded), parse_float=lambda x: round(float(x), 9)
    )
    assert not any(layer.mlp.router._forward_hooks for layer in model.model.layers)


def test_even_soft_routing_prefers_nobody(make_model):
    model = build(make_model, router_type="soft")
    for layer in model.model.layers:
        layer.mlp.router.weight.data.zero_()
    facts = describe_routing(model, [PackedCollator(SimpleTokens)(build_rows())])["groups"]["0"]
    depth = facts["depths"][0]
    assert depth["usage"] == pytest.approx([0.2] * 5) and depth["router_entropy"] == pytest.approx(1)
    assert [len(covering["experts"]) for covering in depth["covering_sets"]] == [3, 4, 5]
    assert facts["changes"][0] == pytest.approx(dict.fromkeys(facts["changes"][0], 1.0))


def test_a_router_that_takes_one_expert_for_all(make_model):
    model = build(make_model, num_experts_per_tok=1, norm_topk_prob=False)
    for layer in model.model.layers:
        layer.mlp.router.weight.data.zero_()
    report = describe_routing(model, [PackedCollator(SimpleTokens)(build_rows())])
    json.dumps(report, allow_nan=False)
    facts = report["groups"]["1"]["depths"][0]
    assert sorted(facts["usage"]) == [0, 0, 0, 0, 1] and facts["usage_entropy"] == 0
    assert facts["coactivation_lift"] == [[None] * 5] * 5 and facts["typical"] == [[]] * 5
    covering = [(covering["experts"], covering["sequences"]) for covering in facts["covering_sets"]]
    assert covering == [([facts["usage"].index(1)], 1)] * 3


def test_no_token_is_refused(make_model):
    with pytest.raises(ValueError, match="the texts are empty"):
        describe_routing(build(make_model), [])


# ---- The script


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=320, model_max_length=64)


@pytest.fixture(scope="module")
def root(make_model, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("inspection")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
    ids |= {"vocab_size": padded_vocab_size(tokenizer), "num_hidden_layers": 6}
    for name, model_class, fields in (
        ("masked-lm", ModernAlbertForMaskedLM, {}),
        ("classifier", ModernAlbertForSequenceClassification, {"router_type": "depth", "ffn_modulation": "moa"}),
    ):
        make_model(model_class, **ids, **fields).save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name)
    return root


def inspect(root, name, output, *arguments):
    command = [str(root / name), "--text", str(root / "texts.jsonl"), "--max_length", "32", "--output", str(output)]
    return load_script("inspect_routing").main([*command, *map(str, arguments)])


def test_padding_of_kept_rows_is_not_counted(root, tmp_path):
    expected = inspect(root, "masked-lm", tmp_path / "unpadded.html")
    shutil.copytree(root / "masked-lm", tmp_path / "rows")
    config = json.loads((tmp_path / "rows" / "config.json").read_text())
    (tmp_path / "rows" / "config.json").write_text(json.dumps({**config, "unpad_inputs": False}))
    found = inspect(root, tmp_path / "rows", tmp_path / "rows.html")
    assert found["tokens"] == expected["tokens"]
    for one, other in zip(*(each["groups"]["1"]["depths"] for each in (found, expected)), strict=True):
        assert one["mean_weight"] == pytest.approx(other["mean_weight"], abs=1e-5)


class Nesting(html.parser.HTMLParser):
    """Checks that every element is closed where it should be, and keeps all texts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.texts.append(data.strip())


@pytest.mark.parametrize("name", ["masked-lm", "classifier"])
def test_the_script_writes_a_page_and_its_figures(root, tokenizer, tmp_path, name):
    report = inspect(root, name, tmp_path / "new" / "page.html")
    assert json.loads((tmp_path / "new" / "page.json").read_text()) == report
    assert report["model"] == name and report["text"] == ["texts.jsonl"]
    assert report["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert list(report["groups"]) == ["1"] and len(report["groups"]["1"]["depths"]) == 3
    page = (tmp_path / "new" / "page.html").read_text()
    texts = Nesting(page).texts
    assert {
        f"Routing of {name}",
        "Group 1",
        "share of choices",
        "expert 3",
        "co-activation, over chance, depth 2",
    } <= set(texts)
    assert max(map(len, texts)) < 1000 and str(tmp_path) not in page
    assert re.sub(r'xmlns(:\w+)?="[^"]*"', "", page).count("http") == 0
    assert not re.search(r"<(script|link|img|image)\b|@import|base64|\bsrc=", page)
    with pytest.raises(FileExistsError, match=r"page\.html' exists; choose another `output`"):
        inspect(root, name, tmp_path / "new" / "page.html")
    (tmp_path / "other.json").write_text("")
    with pytest.raises(FileExistsError, match=r"other\.json' exists"):
        inspect(root, name, tmp_path / "other.html")


def test_as_many_tokens_as_asked_for(root, tokenizer):
    batches = list(read_batches([str(root / "texts.jsonl")], tokenizer, 32, 100))
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == 100
    assert batches[0]["input_ids"].shape == (4, 32)


def test_what_cannot_be_inspected_is_refused(root, make_model, tokenizer, tmp_path):
    for count in (0, 1):
        make_model(ModernAlbertForMaskedLM, num_experts=count).save_pretrained(tmp_path / f"merged-{count}")
        with pytest.raises(ValueError, match=f"'.*merged-{count}' has no router: .* with {count} experts in 1 groups"):
            inspect(tmp_path, f"merged-{count}", tmp_path / "page.html")
    make_model(ModernAlbertForMaskedLM, ffn_modulation="depth_lora").save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="has no router: `ffn_modulation` is 'depth_lora'"):
        inspect(tmp_path, "lora", tmp_path / "page.html")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert; only ModernALBERT has a router"):
        inspect(tmp_path, "bert", tmp_path / "page.html")
    diverged = make_model(ModernAlbertForMaskedLM)
    diverged.model.layers[1].mlp.router.weight.data.fill_(math.nan)
    diverged.save_pretrained(tmp_path / "diverged")
    save_tokenizer(tokenizer, tmp_path / "diverged")
    with pytest.raises(ValueError, match="is not finite: training diverged"):
        inspect(tmp_path, "diverged", tmp_path / "page.html", "--text", root / "texts.jsonl")
    with pytest.raises(ValueError, match=r"must end in \.html"):
        inspect(root, "masked-lm", tmp_path / "page.json")
    with pytest.raises(ValueError, match=r"`max_length` \(65\) must be at most the 64 tokens"):
        inspect(root, "masked-lm", tmp_path / "page.html", "--max_length", 65)
    with pytest.raises(ValueError, match=r"`max_tokens` \(0\) must be at least 1"):
        inspect(root, "masked-lm", tmp_path / "page.html", "--max_tokens", 0)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        inspect(root, "masked-lm", tmp_path / "page.html", "--text", tmp_path / "missing.jsonl")
    for name, content, message in (("empty", "", "empty.txt.* has no rows"), ("blank", " \n\n", "texts are empty")):
        (tmp_path / f"{name}.txt").write_text(content)
        with pytest.raises(ValueError, match=message):
            inspect(root, "masked-lm", tmp_path / "page.html", "--text", tmp_path / f"{name}.txt")
    assert not list(tmp_path.glob("page.*"))


def test_a_token_is_shown_as_it_reads(tokenizer):
    shown = {show_token(tokenizer, token) for token in tokenizer(TEXTS[3])["input_ids"]}
    assert {"[CLS]", "␣number", "Sentence", "."} & shown and not any(" " in token or "Ġ" in token for token in shown)
    ids = range(len(tokenizer))
    assert all(show_token(tokenizer, token).isprintable() and show_token(tokenizer, token) for token in ids)


def test_the_smallest_model_has_no_change_with_depth(make_model):
    model = build(make_model, num_hidden_layers=2)
    report = describe_routing(model, [PackedCollator(SimpleTokens)(build_rows())])
    assert report["groups"]["1"]["changes"] == [] and isinstance(model.config, ModernAlbertConfig)
