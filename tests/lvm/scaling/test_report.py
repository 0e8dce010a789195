"""An analysis, its fit.json and its page."""

import dataclasses
import html.parser
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from lvm.common import files
from lvm.common.errors import UserError
from lvm.scaling import plots, report
from lvm.scaling.analysis import Settings, analyze
from lvm.scaling.laws import ChinchillaLaw
from lvm.scaling.parametric import FitSettings
from tests.lvm.sweeps import ASYMMETRIC, isoflop_rows

LAW = ChinchillaLaw(1.7, 400.0, 2000.0, 0.34, 0.36)
SETTINGS = Settings(FitSettings(inits=10), drop_highest=2, bootstrap=12, budgets=(1e21, 1e23))


def rows_with_metrics():
    rows = isoflop_rows(LAW, sizes=6, noise=0.003)
    score = np.where(np.arange(len(rows)) % 2, 1 / rows.loss, np.nan)
    return dataclasses.replace(rows, metrics={"score/iou": score, "perplexity/depth": np.exp(rows.loss)})


@pytest.fixture(scope="module")
def analysis():
    return analyze(
        rows_with_metrics(), SETTINGS, isoflop_rows(LAW, sizes=6, noise=0.003, seed=1), ["a budget is empty"]
    )


class Text(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def test_fit_json_says_what_was_fitted(analysis, tmp_path):
    files.write_json(tmp_path / "fit.json", report.to_json(analysis, "runs.csv"))
    text = (tmp_path / "fit.json").read_text()
    fit = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (fit["method"], fit["rows"], fit["source"]) == ("huber", 28, "runs.csv")
    assert fit["mask"]["drop_highest"] == 2
    assert fit["mask"]["max_flops"] is None
    assert list(fit["mask"]["excluded"].values()) == ["one of the 2 highest losses"] * 2
    parametric = fit["parametric"]
    assert {"E", "A", "B", "alpha", "beta", "objective", "share_of_inits", "interval"} <= parametric.keys()
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = parametric["interval"][name]
        assert low <= high
    assert [p["is_extrapolated"] for p in fit["predictions"]["parametric"]] == [False, True]
    law = ChinchillaLaw(*(parametric[name] for name in ("E", "A", "B", "alpha", "beta")))
    for prediction in fit["predictions"]["parametric"]:
        assert prediction["values"]["params"] == pytest.approx(law.optimum(prediction["flops"]).params, rel=1e-6)
    assert len(fit["observations"]) == 28
    row = fit["observations"][3]
    assert row["predicted"] == pytest.approx(law.loss(np.array([row["params"]]), np.array([row["tokens"]]))[0])
    assert fit["leave_largest_out"] == fit["roll_out"][-1]
    assert fit["speedup"][0]["speedup"] == pytest.approx(1, abs=0.3)
    assert fit["warnings"][0] == "a budget is empty"


def test_page_shows_rows_masks_and_figures(analysis, tmp_path):
    report.write_results(tmp_path, analysis, "runs <1>.csv")
    page = Text((tmp_path / "index.html").read_text())
    headings = " ".join(page.words)
    for words in (
        "Scaling law of runs <1>.csv", "Loss against compute", "IsoFLOP parabolas", "Optimal parameters and tokens",
        "Loss over parameters and tokens", "Residuals", "Roll-out over budgets", "Downstream scores",
        "Perplexity by task", "one of the 2 highest losses", "(extrapolated)", "Warning: a budget is empty",
    ):  # fmt: skip
        assert words in headings
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link"} & {tag for tag, _ in page.tags}


def test_plots_differ_where_the_analysis_does(analysis):
    other = dataclasses.replace(analysis, fit=dataclasses.replace(analysis.fit, law=ASYMMETRIC))
    before, after = (np.asarray(Image.open(io.BytesIO(plots.plot_residuals(a)))) for a in (analysis, other))
    assert (before != after).any()


def test_plot_downstream_needs_metrics(analysis):
    assert plots.plot_downstream(analysis, "score/")
    without = dataclasses.replace(analysis, observations=dataclasses.replace(analysis.observations, metrics={}))
    assert plots.plot_downstream(without, "score/") is None


def test_analysis_warns_of_biased_parabolas():
    settings = Settings(FitSettings("variable_projection", inits=4), bootstrap=0)
    centered = analyze(isoflop_rows(LAW, width=2.0), settings)
    assert centered.warnings == []
    off = analyze(isoflop_rows(ASYMMETRIC, width=3.0, centers=2.0 ** -np.linspace(0, 1, 5)), settings)
    (warning,) = off.warnings
    assert "IsoFLOP minima are biased on this grid" in warning
    assert max(map(abs, off.bias)) > 0.05
    outside = analyze(isoflop_rows(LAW, centers=30.0), settings)
    assert "outside of the sizes" in outside.warnings[0]
    assert "isoflop" not in outside.exponents


def test_analysis_warns_of_flops_beyond_six_nd():
    rows = isoflop_rows(LAW, sizes=5)
    rows = dataclasses.replace(rows, flops=rows.flops * np.where(rows.params < np.median(rows.params), 1.5, 1))
    result = analyze(rows, Settings(FitSettings("variable_projection", inits=4), bootstrap=0))
    assert any("C / (N·D) is 6 to 9" in warning for warning in result.warnings)


def test_outliers_are_left_out_before_the_fit():
    rows = isoflop_rows(LAW, sizes=6, noise=0.001)
    rows.loss[7] *= 1.3
    settings = Settings(FitSettings("variable_projection", inits=4), max_residual=6, bootstrap=0)
    result = analyze(rows, settings)
    assert "7" in result.observations.excluded
    assert "robust deviations" in result.observations.excluded["7"]
    assert pytest.approx(LAW.E, rel=0.02) == result.fit.law.E


@pytest.mark.parametrize(
    ("values", "words"),
    [({"budgets": (1e20, -1.0)}, "--budgets=-1"), ({"min_flops": 1e20, "max_flops": 1e19}, "--min_flops=1e\\+20")],
)
def test_settings_reject_nonsense(values, words):
    with pytest.raises(UserError, match=words):
        Settings(**values)


def test_kaplan_has_its_own_coefficients():
    rows = isoflop_rows(LAW, sizes=6)
    result = analyze(rows, Settings(FitSettings("kaplan", inits=12), bootstrap=3))
    parametric = report.to_json(result, "x")["parametric"]
    assert {"N_c", "D_c", "alpha_n", "alpha_d"} <= parametric.keys()
    assert math.isfinite(parametric["objective"])
