"""Pages: what is on them, that strangers' names stay words, and how they behave in a real browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap
from helpers.browser import Browser, browser
from helpers.paths import ROOT
from helpers.profiles import add_sums, large_profile, make_profile, random_sums, reference_document
from reap.errors import FormatError, MismatchError, OutputError, ReapWarning, UsageError
from reap.evaluation.sweep_table import Sweep, SweepRow, Verdict
from reap.reporting.plots import rise_ticks
from reap.reporting.sweep_points import points_of
from reap.scores.profile import Profile
from reap.scores.replicates import with_replicates

EXAMPLES = ROOT / "docs" / "examples"
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2">{{ 7*7 }}<!--\u2028\'"'
MODEL = next(Path(str(files("reap") / "data")).glob("*.gguf"))


class Page(HTMLParser):
    """What is written in a page: text outside of scripts, addresses, the data, the figures' names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.data: dict[str, Any] = {}
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "action", "srcset", "poster")
        ]
        assert not any(name.startswith("on") for name in values), f"{tag} has a handler"
        self.inside = "data" if values.get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "data":
            self.data = json.loads(data)
        elif self.inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def row(metric: str, keep: int, perplexity: float, **more: Any) -> SweepRow:
    loss = math.log(perplexity / 10)
    base: dict[str, Any] = dict(seed=None, bytes=100 * keep, domain=None, tokens=50, stderr=0.5, kl_mean=0.1, top1=0.9)
    return SweepRow(
        metric=metric, keep=keep, perplexity=perplexity, loss_increase=loss, loss_increase_stderr=0.01, **(base | more)
    )


def table(n_experts: int = 8, **more: Any) -> Sweep:
    half = n_experts // 2
    rows = (
        row("baseline", n_experts, 10.0),
        row("reap", half, 12.0),
        row("random", half, 20.0, seed=0),
        row("random", half, 24.0, seed=1),
        row("reap", half, 11.0, domain="code", stderr=math.nan, kl_mean=math.nan, top1=math.nan),
    )
    return Sweep(**({"rows": rows} | more))


# ---- what is on a page


def test_the_page_of_the_example(tmp_path: Path) -> None:
    output = tmp_path / "r.html"
    profile, plan = EXAMPLES / "expert_stats_reap.json", EXAMPLES / "plan-50.json"
    assert reap.report(profile, output, plan=plan, model=MODEL) == output
    page = Page(output)
    for words in (
        "The plan keeps 16 of 32 experts in each of 4 layers, by reap.", "Gini of the load",
        "0 of 128 experts were never routed to",
        "embeddings and output", "fits, 8.00 GiB left", "Of all domains the plan serves", "None was found here",
        "sample_calibration.jsonl", reap.inspect(MODEL).fingerprint,
    ):  # fmt: skip
        assert words in page.text, words
    figures = "sizes experts layer distribution inequality load mass criteria domains"
    assert list(page.data["figures"]) == figures.split()
    assert page.tags.count("table") == 10  # all figures but the map and the one layer, and three lists
    assert re.search(r"kept of Σ g·‖f‖", page.text)


def test_how_sure_the_choice_is(tmp_path: Path) -> None:
    whole = {"code": parts_of(1), "law": parts_of(2)}
    sums = {name: add_sums(list(parts.values())) for name, parts in whole.items()}
    model = {"n_experts": 8, "n_experts_used": 2}
    plain = Profile.from_sums(layers=[1, 3], **add_sums(list(sums.values())), model=model, domains=sums)
    profile = with_replicates(plain, whole)
    found = profile.stability(4)
    page = Page(reap.report(profile, tmp_path / "r.html"))
    assert "stability" in page.data["figures"]
    assert f"{found.overlap:.0%} of the kept experts another profile of as much text would keep too" in page.text
    (low, worst) = found.lowest
    assert f"{found.overlap:.1%} on average; the least in layer {worst}, {low:.1%}." in page.text
    for name in ("code", "law"):
        assert f"{name} {found.domains[name].overlap:.1%}" in page.text
        assert f"{found.domains[name].layers[3]:.1%}" in page.text
    without = Page(reap.report(plain, tmp_path / "without.html"))
    assert "stability" not in without.data["figures"]
    assert "another profile" not in without.text


def parts_of(seed: int) -> dict[int, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return {part: random_sums(rng, 2, 8, tokens=20) for part in range(16)}


def test_the_numbers_on_the_page_are_the_profile_s(tmp_path: Path) -> None:
    profile = make_profile(2, n_experts=8, domains=("a", "b"))
    plan = reap.plan(profile, keep=3)
    page = Page(reap.report(profile, tmp_path / "r.html", plan=plan))
    experts = page.data["experts"]
    decoded = {name: unpack(spec).reshape(2, 8) for name, spec in experts["metrics"].items()}
    assert set(decoded) == set(reap.METRICS) - {"random"}
    for name, values in decoded.items():
        np.testing.assert_allclose(values, profile.score(name), rtol=1e-6)
    assert (unpack(experts["counts"]).reshape(2, 8) == profile.counts).all()
    kept = unpack(experts["kept"]).reshape(2, 8)
    assert [tuple(np.flatnonzero(row)) for row in kept] == list(plan.layers.values())
    share = plan_share(profile, plan)
    assert f"{share:.0%} of Σ g·‖f‖ kept" in page.text


def unpack(spec: dict[str, str]) -> np.ndarray[Any, Any]:
    import base64

    return np.frombuffer(base64.b64decode(spec["bdata"]), dtype={"f4": "<f4", "i4": "<i4", "u1": "u1"}[spec["dtype"]])


def plan_share(profile: Profile, plan: reap.PrunePlan) -> float:
    shares = []
    for row, layer in enumerate(profile.layers.tolist()):
        total = sum(profile.gated_norm_sum[row])
        shares.append(sum(profile.gated_norm_sum[row, expert] for expert in plan.layers[layer]) / total)
    return float(np.mean(shares))


def test_without_a_plan_the_page_says_that_it_is_an_example(tmp_path: Path) -> None:
    page = Page(reap.report(make_profile(), tmp_path / "r.html"))
    assert "An example: what keeping 4 of 8 experts" in page.text
    assert "Give a plan with --plan" in page.text
    assert "sizes" not in page.data["figures"]


def test_where_nothing_can_be_removed(tmp_path: Path) -> None:
    page = Page(reap.report(make_profile(model={"n_experts_used": 8}), tmp_path / "r.html"))
    assert "the router leaves nothing to remove" in page.text
    assert "mass" not in page.data["figures"]


def test_a_file_of_the_reference_profiler_is_not_to_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(reference_document()))
    with pytest.warns(ReapWarning, match="not to be trusted"):
        page = Page(reap.report(path, tmp_path / "r.html"))
    assert "Warning This profile was written by llama-expert-profile" in page.text
    assert "reap_l2" not in page.data["experts"]["metrics"]


def test_super_experts_and_rare_ones_are_named(tmp_path: Path) -> None:
    page = Page(reap.report(large_profile(n_layers=4, n_experts=64), tmp_path / "r.html"))
    assert "layer 3, expert 7" in page.text
    assert re.search(r"\d+ experts were seen with fewer than 30 tokens", page.text) or "fewer than 30" not in page.text


# ---- the sweep


def sections_of(path: Path) -> list[tuple[str, list[str]]]:
    """Headings of the second level, each with those of the third within it."""
    found: list[tuple[str, list[str]]] = []
    for level, title in re.findall(r"<h([23]) id[^>]*>([^<]*)</h", path.read_text(encoding="utf-8")):
        if level == "2":
            found.append((title, []))
        else:
            found[-1][1].append(title)
    return found


def test_the_page_begins_with_what_it_costs(tmp_path: Path) -> None:
    best = Verdict(keep=4, domain=None, metric="reap", runner_up="random", margin=0.6, spread=0.1, clear=False)
    other = Verdict(keep=4, domain="code", metric="random", runner_up="reap", margin=0.1, spread=0.01, clear=True)
    path = table(verdicts=(best, other), warnings=("the texts overlap",)).save(tmp_path / "sweep.json")
    output = reap.report(make_profile(), tmp_path / "r.html", sweep=path)
    page = Page(output)
    assert next(iter(page.data["figures"])) == "quality"
    assert [name for name in page.data["figures"] if name.startswith("quality")] == ["quality"]  # one for all domains
    traces = page.data["figures"]["quality"]["data"]
    legend = [trace["name"] for trace in traces if trace.get("showlegend", True)]
    assert legend == ["reap", "random", "all experts"]
    ratios = {trace["name"]: trace["y"] for trace in traces if trace.get("showlegend", True)}
    assert ratios["all experts"] == [1.0]
    assert ratios["reap"] == pytest.approx([1.2, 1.0])  # to the model as it is
    (domain,) = [trace for trace in traces if not trace.get("showlegend", True)]
    assert domain["y"] == pytest.approx([1.1])
    assert "4 experts: no clear winner; reap comes first, but with random, the next, perplexity is 82.21% ± 18.22%" in (
        page.text
    )
    assert "4 experts on code: random is best" in page.text  # a domain with another winner
    assert "the texts overlap" in page.text
    assert "nats" not in page.text.replace("mean KL divergence", "")
    for cells in ("20 to 24", "+20.00% ± 1.20%", "+10.00% ± 1.10%", "all experts 8 800 B all 10 ± 0.5"):
        assert cells in page.text, cells


def test_the_first_numbers_are_the_answers(tmp_path: Path) -> None:
    profile = make_profile()
    plan = reap.plan(profile, keep=4)
    best = Verdict(keep=4, domain=None, metric="reap", runner_up="random", margin=0.6, spread=0.1, clear=True)
    output = reap.report(profile, tmp_path / "r.html", plan=plan, sweep=table(verdicts=(best,)))
    head = Page(output).text.split("What it costs")[0]
    assert "+20.0% ± 1.2% perplexity, with 4 of 8 experts by reap, on the sweep's text" in head
    assert "reap is clearly best with 4 experts: with random, the next, perplexity is 82.2% ± 18.2% higher" in head
    evaluation = tmp_path / "e.json"
    document = {"perplexity": 11.5, "stderr": 0.4, "perplexity_ratio": 1.15, "ratio_stderr": 0.02, "tokens": 900}
    evaluation.write_text(json.dumps(document))
    page = Page(reap.report(profile, tmp_path / "j.html", plan=plan, sweep=table(), evaluations=[evaluation]))
    assert "+15.0% ± 2.0% perplexity, with 4 of 8 experts, on text that had no part in the choice" in page.text
    assert "no part in the choice 11.5 ± 0.4" in page.text
    evaluation.write_text(json.dumps({**document, "perplexity_ratio": None}))
    with pytest.raises(FormatError, match="was compared with no other model"):
        reap.report(profile, tmp_path / "k.html", evaluations=[evaluation])


def test_sections_of_one_idea_are_one(tmp_path: Path) -> None:
    profile = make_profile(domains=("a", "b"))
    found = sections_of(reap.report(profile, tmp_path / "r.html", sweep=table()))
    assert found == [
        ("What it costs", []),
        ("Experts", ["One layer"]),
        ("Scores", ["Gini and gap"]),
        ("Load", []),
        ("Kept mass", []),
        ("Agreement", ["Domains"]),
        ("Experts to look at", ["Super experts"]),
        ("Provenance", []),
    ]


def test_nothing_is_shown_that_says_nothing(tmp_path: Path) -> None:
    """No row or column of dashes, and no legend of what has no data."""
    rows = (row("baseline", 8, 10.0), row("reap", 4, 12.0, kl_mean=math.nan, top1=math.nan))
    output = reap.report(make_profile(), tmp_path / "r.html", sweep=table(rows=rows))
    page = output.read_text(encoding="utf-8")
    for body in re.findall(r"<tbody>(.*?)</tbody>", page, re.DOTALL):
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", body)]
        assert all(any(cell not in ("–", "") for cell in line[1:]) for line in cells)
        assert all(any(line[index] not in ("–", "") for line in cells) for index in range(1, len(cells[0])))
    assert "over the seeds" not in page
    assert "mean KL divergence" not in page
    for figure in Page(output).data["figures"].values():
        for trace in figure["data"] if isinstance(figure, dict) else ():
            assert trace["type"] not in ("scatter", "bar") or trace.get("y") not in ([], None), trace["name"]


def test_ticks_in_per_cent() -> None:
    values, texts = rise_ticks(1.0, 2.2)
    assert (values[0], texts[0]) == (1.0, "0%")
    assert texts[-1] == "+100%"
    assert values == sorted(values)
    assert rise_ticks(1.0, 1.03)[1] == ["0%", "+1%", "+2%"]
    assert rise_ticks(0.95, 1.0)[1] == ["-5%", "-2%", "-1%", "0%"]
    assert rise_ticks(1.0, 1.0) == ([1.0], ["0%"])


def test_points_are_means_over_the_seeds() -> None:
    points = points_of(table(), None)
    (random,) = points["random"]
    assert (random.perplexity, random.spread, random.stderr) == (22.0, (20.0, 24.0), 0.5)
    assert points["reap"][0].spread is None
    assert points["reap"][0].rise == pytest.approx(0.2)
    (code,) = points_of(table(), "code")["reap"]
    assert code.perplexity == 11.0
    assert math.isnan(code.kl_mean)


# ---- what does not belong together, what cannot be written


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    profile, output = make_profile(), tmp_path / "r.html"
    other = make_profile(model={"fingerprint": "sha256:" + "1" * 64})
    with pytest.raises(MismatchError, match="the plan is of a model with fingerprint"):
        reap.report(profile, output, plan=reap.plan(other, keep=4))
    with pytest.raises(MismatchError, match="the profile is of a model with fingerprint"):
        reap.report(profile, output, model=MODEL)
    with pytest.raises(MismatchError, match="but the sweep of one with"):
        reap.report(profile, output, sweep=table(model={"fingerprint": "sha256:2"}))
    with pytest.raises(UsageError, match="cannot read the profile"):
        reap.report(tmp_path / "absent.json", output)
    with pytest.raises(UsageError, match="cannot read the sweep"):
        reap.report(profile, output, sweep=tmp_path / "absent.json")
    assert not output.exists()
    with pytest.raises(OutputError, match="cannot be written"):
        reap.report(profile, tmp_path / "absent" / "r.html")


# ---- strangers' texts


def hostile_profile() -> Profile:
    model = {"name": HOSTILE, "architecture": HOSTILE}
    calibration = {"files": [HOSTILE], "sha256": [HOSTILE], "samples": 1, "tokens": 200}
    return make_profile(domains=(HOSTILE, "b"), model=model, calibration=calibration)


def hostile_table() -> Sweep:
    rows = (row("baseline", 8, 10.0), row(HOSTILE, 4, 12.0, domain=HOSTILE), row("random", 4, 20.0, domain=HOSTILE))
    return table(rows=rows, warnings=(HOSTILE,))


def test_nothing_of_a_stranger_becomes_markup(tmp_path: Path) -> None:
    harmless = Page(reap.report(make_profile(domains=("a", "b")), tmp_path / "h.html", sweep=table()))
    path = reap.report(hostile_profile(), tmp_path / "r.html", sweep=hostile_table())
    page = Page(path)
    assert page.tags.count("script") == harmless.tags.count("script") == 3
    assert "img" not in page.tags
    assert "{{ 7*7 }}" in page.text
    assert HOSTILE in page.data["experts"]["domains"]
    compared = Page(reap.comparison_report(hostile_profile(), hostile_profile(), tmp_path / "c.html"))
    assert compared.tags.count("script") == 3
    assert "img" not in compared.tags


def test_pages_name_no_other_address(tmp_path: Path) -> None:
    pages = [
        reap.report(make_profile(domains=("a", "b")), tmp_path / "r.html"),
        reap.comparison_report(make_profile(1), make_profile(2), tmp_path / "c.html"),
    ]
    for path in pages:
        page = Page(path)
        assert all(address.startswith("#") or address == "data:," for address in page.addresses)
        policy = re.search(r'Content-Security-Policy" content="([^"]+)"', path.read_text(encoding="utf-8"))
        assert policy
        assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-eval" not in policy[1]


# ---- two profiles


def test_the_page_of_two_profiles(tmp_path: Path) -> None:
    a, b = make_profile(1), make_profile(2)
    result = reap.compare(a, b, keep=3)
    page = Page(reap.comparison_report(a, b, tmp_path / "c.html", keep=3))
    assert list(page.data["figures"]) == ["layers", "scatter", "ranks"]
    assert f"{result.overlap:.0%} of the 3 kept experts in common; by chance 38%" in page.text
    fates = unpack(page.data["scatter"]["fates"]).reshape(2, 8)
    for row, layer in enumerate(result.layers):
        assert (fates[row] == 0).sum() == round(layer.overlap * 3)
        assert (fates[row] == 1).sum() == (fates[row] == 2).sum() == 3 - round(layer.overlap * 3)
    with pytest.raises(MismatchError):
        reap.comparison_report(a, make_profile(3, n_experts=4), tmp_path / "c.html")


# ---- notebooks


def test_plots(tmp_path: Path) -> None:
    profile = make_profile(domains=("a", "b"))
    plan = reap.plan(profile, keep=4)
    heatmap = reap.plot(profile, plan=plan)
    assert type(heatmap).__module__.startswith("plotly")
    np.testing.assert_allclose(np.array(reap.plot(profile, scaling="value").data[0].z), profile.score())
    assert sorted(reap.plot(profile, scaling="rank").data[0].z[0]) == list(range(1, 9))
    assert len(heatmap.layout.shapes) == 2
    assert not reap.plot(profile).layout.shapes
    for kind in ("distribution", "inequality", "load", "mass", "metrics", "domains"):
        assert reap.plot(profile, kind, keep=0.5).data, kind
    mass = next(trace for trace in reap.plot(profile, "mass", plan=plan).data if trace.name == "kept of Σ g·‖f‖")
    assert np.mean(mass.y) == pytest.approx(plan_share(profile, plan))
    for wrong in (
        dict(kind="pie"),
        dict(scaling="cubic"),
        dict(kind="mass"),
        dict(plan=plan, keep=3),
        dict(metric="luck"),
    ):
        with pytest.raises(UsageError):
            reap.plot(profile, **wrong)
    with pytest.raises(UsageError, match="no domains"):
        reap.plot(make_profile(), "domains", keep=4)


# ---- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def opened(chromium: Browser, path: Path, **options: Any) -> None:
    """Open a page; it draws everything, fully offline, without a complaint."""
    chromium.requests()
    chromium.open(path, **options)
    n_figures = chromium.run(
        "return Object.keys(JSON.parse(document.getElementById('data').textContent).figures).length"
    )
    assert int(chromium.run("return document.documentElement.dataset.drawn")) == n_figures
    assert chromium.run("return document.querySelectorAll('.plot .main-svg').length") >= n_figures
    assert chromium.messages() == []
    assert [address for address in chromium.requests() if not address.startswith(("data:", "blob:"))] == [
        path.resolve().as_uri()
    ]
    assert (
        chromium.run(
            "return performance.getEntriesByType('resource').filter((one) => !one.name.startsWith('data:')).length"
        )
        == 0
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "r.html"
    return reap.report(
        EXAMPLES / "expert_stats_reap.json", output, plan=EXAMPLES / "plan-50.json", model=MODEL, sweep=table(32)
    )


def test_the_page_draws_and_is_quiet(chromium: Browser, example: Path) -> None:
    opened(chromium, example)


def cell(chromium: Browser, row: int, column: int) -> tuple[float, float]:
    """Where a cell of the map is in the window."""
    chromium.run("document.getElementById('plot-experts').scrollIntoView({block: 'center', behavior: 'instant'})")
    x, y = chromium.run(
        "const plot = document.getElementById('plot-experts'), {xaxis, yaxis} = plot._fullLayout, box ="
        " plot.getBoundingClientRect();return [box.left + xaxis._offset + xaxis.d2p(arguments[0]), box.top +"
        " yaxis._offset + yaxis.d2p(arguments[1])]",
        column,
        row,
    )
    return x, y


def test_the_map_answers_the_pointer(chromium: Browser, example: Path) -> None:
    profile, plan = Profile.load(EXAMPLES / "expert_stats_reap.json"), reap.PrunePlan.load(EXAMPLES / "plan-50.json")
    opened(chromium, example)
    for row, expert in ((2, 7), (0, 11), (3, 0)):
        chromium.point_at(*cell(chromium, row, expert))
        layer = int(profile.layers[row])
        fate = "kept" if expert in plan.layers[layer] else "removed"
        head = f"Layer {layer}, expert {expert}: {fate}"
        chromium.wait(f"return document.querySelector('#readout strong').textContent === {json.dumps(head)}")
        readout = chromium.run("return document.getElementById('readout').textContent")
        assert f"tokens routed to it{profile.counts[row, expert]:,}" in readout
        rank = 1 + int((profile.score()[row] > profile.score()[row, expert]).sum())
        assert f"reap{float(f'{profile.score()[row, expert]:.4g}'):g} ({rank}.)" in readout
        chromium.wait("return document.querySelector('#plot-experts .hovertext')")
        hover = chromium.run("return document.querySelector('#plot-experts .hovertext').textContent")
        assert f"layer {layer}, expert {expert}" in hover
        assert fate in hover


def choose(chromium: Browser, select: str, value: str) -> None:
    chromium.run(
        "const it = document.getElementById(arguments[0]); it.value = arguments[1]; it.dispatchEvent(new"
        " Event('change'))",
        select,
        value,
    )


def drawn(chromium: Browser) -> np.ndarray[Any, Any]:
    script = (
        "return document.getElementById('plot-experts').data[0].z.map((row) => Array.from(row, (one) =>"
        " Number.isFinite(one) ? one : null))"
    )
    return np.array(chromium.run(script), dtype=np.float64)


def test_the_map_shows_what_is_chosen(chromium: Browser, example: Path) -> None:
    profile = Profile.load(EXAMPLES / "expert_stats_reap.json")
    opened(chromium, example)
    for metric in ("reap", "frequency"):
        choose(chromium, "metric", metric)
        score = profile.score(metric)
        choose(chromium, "scaling", "value")
        np.testing.assert_allclose(drawn(chromium), score, rtol=1e-6)
        choose(chromium, "scaling", "relative")
        np.testing.assert_allclose(drawn(chromium), np.log2(score / np.median(score, axis=1, keepdims=True)), atol=1e-5)
        np.testing.assert_allclose(drawn(chromium), np.array(reap.plot(profile, metric=metric).data[0].z), atol=1e-5)
        choose(chromium, "scaling", "rank")
        np.testing.assert_array_equal(
            drawn(chromium), np.array(reap.plot(profile, metric=metric, scaling="rank").data[0].z)
        )
        choose(chromium, "scaling", "value")
        choose(chromium, "order", "score")
        np.testing.assert_allclose(drawn(chromium), -np.sort(-score, axis=1), rtol=1e-6)
        choose(chromium, "order", "id")
    choose(chromium, "at-layer", "1")
    choose(chromium, "at-expert", "5")
    assert chromium.run("return document.querySelector('#readout strong').textContent").startswith("Layer 1, expert 5")
    assert chromium.messages() == []


def test_the_removed_ones_are_struck_out(chromium: Browser, example: Path) -> None:
    plan = reap.PrunePlan.load(EXAMPLES / "plan-50.json")
    opened(chromium, example)
    path = chromium.run("return document.getElementById('plot-experts').layout.shapes[0].path")
    struck: dict[int, set[int]] = {}
    for start, row, end in re.findall(r"M([-\d.]+),(\d+)H([-\d.]+)", path):
        struck.setdefault(int(row), set()).update(range(round(float(start) + 0.42), round(float(end) - 0.42) + 1))
    assert {row: tuple(sorted(ids)) for row, ids in struck.items()} == {
        row: plan.removed(layer) for row, layer in enumerate(plan.layers)
    }


def test_light_and_dark(chromium: Browser, example: Path) -> None:
    colours = []
    for dark in (False, True):
        opened(chromium, example, dark=dark)
        colours.append(chromium.run(
            "return [getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.querySelector('#plot-load .xtick text')).fill]"
        ))  # fmt: skip
    brightness = [[sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in pair] for pair in colours]
    assert brightness[0][0] > 600 > 300 > brightness[0][1]
    assert brightness[1][0] < 150 < 600 < brightness[1][1]


def test_narrow_windows_do_not_scroll_sideways(chromium: Browser, example: Path) -> None:
    for width in (390, 400):
        opened(chromium, example, width=width, height=800)
        assert chromium.run("return document.documentElement.scrollWidth") <= width
    text = "return [...document.querySelectorAll('#plot-quality text')].map((it) => it.getBoundingClientRect())"
    inside = ".every((box) => box.left >= 0 && box.right <= 400)"
    assert chromium.run(text + inside)


def test_the_first_screen_shows_the_cost(chromium: Browser, example: Path) -> None:
    for dark in (False, True):
        opened(chromium, example, width=1280, height=900, dark=dark)
        bottom = "return document.querySelector('#plot-quality .xaxislayer-above').getBoundingClientRect().bottom"
        assert chromium.run(bottom) <= 900


def test_every_figure_has_a_name_and_every_field_a_label(chromium: Browser, example: Path) -> None:
    opened(chromium, example)
    assert chromium.run(
        "return [...document.querySelectorAll('[role=img]')].every((it) => it.getAttribute('aria-label').length > 15)"
    )
    assert chromium.run("return [...document.querySelectorAll('select, input')].every((it) => it.labels.length === 1)")
    ids = chromium.run(
        "return [...document.querySelectorAll('[id]')].map((it) => it.id).filter((id) => "
        "!/^(cb|clip|g|topdefs|modebar|legend|p\\d|defs)/.test(id))"
    )
    assert len(ids) == len(set(ids))


def test_paper(chromium: Browser, example: Path, tmp_path: Path) -> None:
    opened(chromium, example, dark=True)
    chromium.run(
        "addEventListener('beforeprint', () => { window.seen = [...document.querySelectorAll('.main-svg')].map((it) =>"
        " it.clientWidth) })"
    )
    chromium.print(tmp_path / "r.pdf")
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")
    assert max(chromium.run("return window.seen")) <= 700
    chromium.wait("return document.querySelector('#plot-load .main-svg').clientWidth > 700")
    assert chromium.messages() == []


def test_hostile_names_do_nothing(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, reap.report(hostile_profile(), tmp_path / "r.html", sweep=hostile_table()))
    chromium.point_at(*cell(chromium, 1, 3))
    chromium.wait("return document.querySelector('#readout').textContent.includes('expert 3')")
    assert chromium.run("return window.hacked") is None
    assert chromium.run("return document.querySelectorAll('img').length") == 0
    assert chromium.run("return document.title").startswith("</script><script>window.hacked=1")
    opened(chromium, reap.comparison_report(hostile_profile(), hostile_profile(), tmp_path / "c.html"))
    assert chromium.run("return window.hacked") is None


def test_a_script_that_slipped_in_would_not_run(chromium: Browser, example: Path, tmp_path: Path) -> None:
    attacked = tmp_path / "a.html"
    attacked.write_text(
        example.read_text(encoding="utf-8").replace("</header>", "<script>window.hacked = 1</script></header>"),
        encoding="utf-8",
    )
    chromium.open(attacked)
    assert chromium.run("return window.hacked") is None
    assert any("Content Security Policy" in message for message in chromium.messages())


def test_the_page_of_two_profiles_draws(chromium: Browser, tmp_path: Path) -> None:
    opened(chromium, reap.comparison_report(make_profile(1), make_profile(2), tmp_path / "c.html"))
    choose(chromium, "scatter-layer", "1")
    points = chromium.run(
        "return document.getElementById('plot-scatter').data.reduce((sum, trace) => sum + trace.x.length, 0)"
    )
    assert points == 8


def test_sixty_layers_of_512_experts(chromium: Browser, tmp_path: Path) -> None:
    path = reap.report(large_profile(), tmp_path / "r.html")
    assert path.stat().st_size < 10e6
    opened(chromium, path)
    best = min(
        chromium.open(path) for _ in range(3)
    )  # ms; what a page costs shows best where the machine has other work too
    assert best < 2_000
    chromium.point_at(*cell(chromium, 30, 400))
    chromium.wait("return document.querySelector('#readout strong').textContent.startsWith('Layer 31, ')")
