"""`diffspec report`: what the page holds, its functions against `predict`, and the page in a headless browser."""

import dataclasses
import json
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from test_browser import needs_node, run_node
from test_cli_main import TRACE, files_in, run, toy_deployment, toy_model

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.answers import predict_answer
from diffspec.browser.serving import FIELDS, OUTPUTS, browser_functions, parameter_values
from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.hull import in_words
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.parameters import get_parameters
from diffspec.prediction import STAGES
from diffspec.report.curves import draw_curves
from diffspec.report.page_data import nice, page_data
from diffspec.report.page_html import page_html
from diffspec.workload import Workload

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
SCALES = Scales(0.02, 0.08, 96.0, 64.0)


def known_deployment():
    """A toy deployment that tells how sure it is: normal draws of all its parameters, by hand."""
    toy = toy_deployment("vllm-cpu/llama-29m")
    paths = build_form("affine", SCALES).paths
    spread = np.full(len(paths), 0.1)
    uncertainty = Uncertainty(
        *("laplace", paths, np.diag(spread**2), 10 * spread),
        misfit={"ttft_mean": 0.05, "itl_mean": 0.03},
        request_spread={"ttft_mean": 0.2, "itl_mean": 0.1},
        degrees_of_freedom=6.0,
        inflation={"ttft_mean": 1.5, "itl_mean": 1.0},
    )
    quality = toy.quality | {
        "untold": [{"parameters": {}, "width": 0.9, "words": "the trace does not tell <kv_read> & more"}],
        "holdout": {"expression": "arrival_rate==3", "rows": 3, "metrics": {}},
    }
    return dataclasses.replace(toy, uncertainty=uncertainty, quality=quality, warnings=["a warning of the fit"])


@pytest.fixture(scope="module")
def deployment():
    return known_deployment()


@pytest.fixture(scope="module")
def page(tmp_path_factory, deployment):
    """The page and the answer of the command line."""
    folder = tmp_path_factory.mktemp("page")
    model = toy_model(folder / "model.json", deployment)
    ran = run("report", model, TRACE, "--out", folder / "report.html", "--json")
    assert ran.code == 0, ran.err
    return folder / "report.html", json.loads(ran.out)


# --- the functions ----------------------------------------------------------------------------------------------------


def forms():
    """Deployments of every form: affine, roofline, roofline of experts; with a memory cap, a thinned drafter, none."""
    toy = toy_deployment()
    dense, sparse = (build_form("roofline", SCALES, experts).template for experts in (None, (8.0, 64.0)))
    yield "affine", toy, 128.0
    yield "roofline", dataclasses.replace(toy, form="roofline", serving=dense), 128.0
    defaults = toy.defaults | {"kv_capacity_tokens": 5000.0, "draft_probability": 0.6}
    yield "experts", dataclasses.replace(toy, form="roofline", serving=sparse, defaults=defaults), 128.0
    defaults = {name: value for name, value in toy.defaults.items() if name != "max_batch_size"}
    yield "uncapped", dataclasses.replace(toy, defaults=defaults), None


@needs_node
@pytest.mark.parametrize(
    ("name", "deployment", "largest"), list(forms()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_predictions_in_javascript_are_those_of_predict(name, deployment, largest):
    """To 1e-9 relative, every field and stage, in open and closed loops, with own and with constant acceptance."""
    text, parameters = browser_functions(deployment, largest), parameter_values(deployment.serving)
    rng, calls, wanted = np.random.default_rng(3), [], []
    for place in range(12):
        load, k, alpha = rng.uniform(0.2, 8.0), rng.choice([0.0, 1.0, 2.0, 3.5, 5.0]), rng.uniform(0.05, 0.98)
        prompt, output, cap = rng.uniform(10, 300), rng.uniform(1.5, 200), float(rng.integers(2, 100))
        cap = cap if largest else None
        loop = "arrival_rate" if place % 3 else "concurrency"
        own = place % 2 == 1
        config = deployment.configuration(
            k, acceptance=deployment.acceptance if own else ConstantAcceptance(alpha), max_batch_size=cap
        )
        wanted.append(
            predict_answer(deployment, Workload(prompt, output, **{loop: load + 1}), config, with_intervals=False)
        )
        moments = f"momentsMeasured({k!r})" if own else f"momentsConstant({k!r},{alpha!r})"
        model = "predictOpen" if loop == "arrival_rate" else "predictClosed"
        ask = f"function ask{place}(p,l,k,a,b,c){{return {model}(p,l,k,...{moments},a,b,c);}}"
        values = [parameters, load + 1, float(k), prompt, output] + ([cap] if largest else [])
        calls.append((("" if place else text + "\n") + ask, f"ask{place}", values))
    for answer, leaves in zip(wanted, run_node(calls), strict=True):
        got = dict(zip(OUTPUTS, (leaf[0] for leaf in leaves), strict=True))
        assert bool(got["saturated"]) == (answer["outcome"] == "saturated")
        pairs = [(got[field], answer[field]) for field in FIELDS]
        for stage in STAGES:
            for part in ("independent", "dependent"):
                pairs.append((got[f"{stage}_{part}"], answer["decomposition"][stage][f"load_{part}"]))
        for mine, theirs in pairs:
            if theirs is not None:
                np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_parameters_are_an_argument(deployment):
    values = parameter_values(deployment.serving)
    assert values.tolist() == [float(v) for v in get_parameters(deployment.serving).values()]
    text = browser_functions(deployment, 128.0)
    assert len(text) < 60_000 and "function predictOpen(a0,a1,a2,a3,a4,a5,a6,a7)" in text


# --- what the page holds ----------------------------------------------------------------------------------------------


def test_the_answer_is_plain_data_and_the_page_small_and_alone(page, deployment):
    path, answer = page
    keys = "deployment facts form measured plain_measured acceptance parameters quality untold warnings rows sliders"
    assert [*keys.split(), "outputs", "draws", "provenance", "page"] == list(answer)
    text = path.read_text(encoding="utf-8")
    assert answer["page"] == {"path": str(path), "bytes": len(text.encode())} and len(text) < 300_000
    for outside in ("http:", "https:", "src=", "@import", "url("):
        assert outside not in text.replace("http://www.w3.org/2000/svg", ""), outside
    assert "default-src 'none'" in text and "the trace does not tell &lt;kv_read&gt; &amp; more" in text
    assert text.count("</script>") == 1, "data must not end the script"
    for told in ("a warning of the fit", answer["provenance"]["model_sha256"], "0" * 64, "diffspec report", "jax "):
        assert told in text
    assert {row["part"] for row in answer["rows"]} == {"fitted", "held out"} and len(answer["rows"]) == 27
    assert files_in(path.parent) == {"model.json", "report.html"}


def test_without_rows_draws_or_plain_rows_the_page_says_so():
    toy = toy_deployment(draft_lengths=[2, 4])
    model = FittedModel({"toy": toy}, "0" * 64, {})
    text = page_html(page_data(model, toy), toy)
    assert "No measured rows were given" in text and "no intervals: the model has none" in text
    assert "what speculation gains is not known" in text


def test_bad_questions(tmp_path):
    model = toy_model(tmp_path / "m.json", toy_deployment("a"), toy_deployment("b"))
    for arguments, named in (
        ((model,), "--out is missing"),
        ((model, "--out", tmp_path / "none" / "x.html"), "does not exist"),
        ((model, "--out", model), "would be overwritten"),
        ((model, "--out", tmp_path / "x.html"), "deployment: none given; allowed: 'a', 'b'"),
        ((model, "--out", tmp_path / "x.html", "--max-draft-length", 0), "--max-draft-length: got 0; allowed: [1, 32]"),
    ):
        ran = run("report", *arguments)
        assert ran.code == 2 and named in ran.err and ran.out == "", ran
    assert files_in(tmp_path) == {"m.json"}


@pytest.mark.parametrize(("value", "wanted"), [(1.0, 1.0), (1.01, 2.0), (3.2, 5.0), (70.0, 100.0), (0.0021, 0.005)])
def test_nice(value, wanted):
    assert nice(value) == wanted


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium of the distribution's; Selenium is told where it and its driver are, and downloads nothing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install '.[test]')")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver), which are absent")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage")
    flags += ("disable-background-networking", "disable-component-update", "disable-sync", "window-size=1280,900")
    for flag in (*flags, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


@pytest.fixture(scope="module")
def opened(browser, page):
    """The browser with the page, drawn."""
    browser.get(page[0].as_uri())
    settled(browser)
    return browser


def settled(browser):
    deadline = time.monotonic() + 20
    while browser.execute_script("return document.body.dataset.busy") != "false":
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)


def ask(browser, **values):
    """Move sliders as a hand would, and wait until all is drawn."""
    browser.execute_script(
        """for (const [id, value] of Object.entries(arguments[0])) {
             const input = document.getElementById(id) || document.querySelector(`input[value=${value}]`);
             if (input.type === "range" || input.tagName === "SELECT") input.value = value; else input.checked = value;
             input.dispatchEvent(new Event("input", {bubbles: true}));
             input.dispatchEvent(new Event("change", {bubbles: true}));
           }""",
        values,
    )
    settled(browser)


def curve(browser, name):
    return json.loads(browser.execute_script(f"return document.getElementById('curve-{name}').dataset.points"))


def test_it_loads_without_errors_and_without_the_network(opened):
    wanted = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in wanted if m["method"] == "Network.requestWillBeSent"]
    assert requests and all(url.startswith(("file:", "data:")) for url in requests), requests
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(opened.find_elements("css selector", "#curves path")) >= 3  # two curves and a band
    assert len(opened.find_elements("css selector", "#parity circle")) == 27


QUESTIONS = [
    {"arrival_rate": 2.0, "draft_length": 4, "own": True, "prompt_length": 64, "output_length": 64, "max_batch_size": 64},
    {"arrival_rate": 5.0, "draft_length": 2, "own": False, "acceptance_rate": 0.6, "prompt_length": 200, "max_batch_size": 8},
    {"arrival_rate": 1.0, "draft_length": 0, "own": False, "output_length": 200, "max_batch_size": 100},
]  # fmt: skip


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda q: f"k{q['draft_length']}")
def test_sliders_change_the_curves_to_what_predict_says(opened, deployment, asked):
    ask(opened, arrival_rate=asked["arrival_rate"])
    ask(opened, **asked)
    q = opened.execute_script("return question()")
    config = deployment.configuration(
        float(q["k"]),
        acceptance=deployment.acceptance if q["own"] else ConstantAcceptance(float(q["acceptance"])),
        max_batch_size=float(q["cap"]),
    )

    def answer(load, **more):
        workload = Workload(float(q["prompt"]), float(q["output"]), arrival_rate=float(load))
        return predict_answer(deployment, workload, config, **more)

    fast, plain = curve(opened, "speculative" if q["k"] else "plain"), curve(opened, "plain")
    for index in (0, 7, 20, 33):
        told = answer(fast[index][0], with_intervals=False)
        for value, wanted in ((fast[index][1], told["e2e_latency"]), (plain[index][1], told["plain"]["e2e_latency"])):
            assert value == (wanted if wanted is None else pytest.approx(wanted, rel=1e-6))
    told = answer(q["load"])
    edges = opened.execute_script("return intervalsAt(question(), ['e2e_latency', 'ttft', 'tpot'])")
    for name, (low, high) in zip(("e2e_latency", "ttft", "tpot"), edges, strict=True):
        wanted = told["intervals"]["metrics"][name]
        assert (low, high) == pytest.approx((wanted["low"], wanted["high"]), rel=1e-6)
    beyond = opened.execute_script("return outside(question())")
    assert len(beyond) == len(told["outside_measured"]), (beyond, told["outside_measured"])
    shown = opened.execute_script("return document.getElementById('hull-box').dataset.inside")
    assert (shown == "true") == told["inside_measured"]
    stages = opened.execute_script("return [...document.querySelectorAll('#stage-values tr')].map(r => r.textContent)")
    assert len(stages) == len(STAGES)


def test_policy_and_break_even_are_the_models_own(opened, deployment):
    """The best draft length against all of them by the JAX model; break-even points have a speedup of one there."""
    ask(opened, arrival_rate=2.0, draft_length=3, own=False, acceptance_rate=0.7, prompt_length=64, output_length=64)
    ask(opened, max_batch_size=64)
    points = opened.execute_script("return loadsOf(question(), 9).map(load => best(question(), load))")
    rates = np.asarray([point["load"] for point in points])
    curves = draw_curves(
        deployment,
        range(9),
        prompt_length=64.0,
        output_length=64.0,
        arrival_rates=rates,
        acceptance=ConstantAcceptance(jnp.asarray(0.7)),
    )["arrival_rate"]
    latency = curves.values["e2e_latency"]
    for column, point in enumerate(points):
        alive = np.isfinite(latency[:, column])
        assert point["k"] == (int(np.nanargmin(latency[:, column])) if alive.any() else None)
    contour = [(load, a) for load, a in curve(opened, "breakeven") if a is not None]
    assert len(contour) > 10
    for load, a in contour[:: len(contour) // 4]:
        config = deployment.configuration(3.0, acceptance=ConstantAcceptance(a))
        told = predict_answer(deployment, Workload(64.0, 64.0, arrival_rate=load), config, with_intervals=False)
        assert told["speedup"] == pytest.approx(1.0, abs=1e-6)


def test_a_closed_loop_is_asked_by_its_own_slider(opened, deployment):
    opened.find_element("css selector", "input[value=concurrency]").click()
    ask(opened, concurrency=12, draft_length=4, own=True, max_batch_size=64)
    assert opened.find_element("id", "concurrency").is_displayed()
    assert not opened.find_element("id", "arrival_rate").is_displayed()
    points, config = curve(opened, "speculative"), deployment.configuration(4.0)
    for load, value in points[::13]:
        told = predict_answer(deployment, Workload(64.0, 64.0, concurrency=load), config, with_intervals=False)
        assert value == pytest.approx(told["e2e_latency"], rel=1e-6)
    opened.find_element("css selector", "input[value=arrival_rate]").click()
    settled(opened)


def test_the_keyboard_is_enough(opened):
    from selenium.webdriver.common.keys import Keys

    opened.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    body = opened.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    reached = []
    for _ in range(14):
        reached.append(opened.execute_script("return document.activeElement.id || document.activeElement.className"))
        opened.switch_to.active_element.send_keys(Keys.TAB)
    assert reached[0] == "skip" and {"arrival_rate", "draft_length", "own", "prompt_length", "metric"} <= set(reached)
    slider = opened.find_element("id", "draft_length")
    before, words = slider.get_attribute("value"), opened.find_element("id", "answer-words").text
    opened.execute_script("arguments[0].focus()", slider)
    slider.send_keys(Keys.ARROW_LEFT)
    settled(opened)
    assert int(slider.get_attribute("value")) == int(before) - 1
    assert opened.find_element("id", "answer-words").text != words
    assert opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_labels_roles_and_live_values(opened):
    nameless = "return [...document.querySelectorAll('input,select')].filter(e => !e.labels.length).map(e => e.id)"
    assert opened.execute_script(nameless) == []
    silent = "return [...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).map(e => e.id)"
    assert opened.execute_script(silent) == []
    assert opened.execute_script("return document.getElementById('answer-words').getAttribute('aria-live')") == "polite"
    twice = "const n=[...document.querySelectorAll('[id]')].map(e=>e.id);return n.filter((x,i)=>n.indexOf(x)!==i)"
    assert opened.execute_script(twice) == []


def emulate(browser, *, width=1280, scheme="light", media="screen"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    time.sleep(0.3)
    settled(browser)


TEXTS = """
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.textContent.trim() || !element.checkVisibility() || element.closest("script,style,title,:disabled")) continue;
  if (element.tagName === "OPTION" || element.closest(".skip")) continue;
  const style = getComputedStyle(element), drawn = element.closest("svg") !== null;
  let ground = element;
  while (ground && ["rgba(0, 0, 0, 0)", "transparent"].includes(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
  found.push([node.textContent.trim().slice(0, 30), drawn ? style.fill : style.color,
              ground ? getComputedStyle(ground).backgroundColor : "rgb(255, 255, 255)", parseFloat(style.fontSize)]);
}
return found;"""


def contrast(one, other):
    """The contrast ratio of WCAG 2: (L1 + 0.05)/(L2 + 0.05) of relative luminances."""

    def luminance(text):
        parts = [float(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_by_the_formula():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21.0)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_is_readable_on_phones_and_desks_in_light_and_dark(opened, width, scheme):
    """No sideways scrolling, letters of 12 px or more, contrast of WCAG AA (4.5) everywhere, curves inside the page."""
    emulate(opened, width=width, scheme=scheme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    texts = opened.execute_script(TEXTS)
    assert len(texts) > 150
    assert [entry for entry in texts if entry[3] < 12] == []
    poor = [(text, color, ground) for text, color, ground, _ in texts if contrast(color, ground) < 4.5]
    assert poor == []
    graphics = "const s=getComputedStyle(document.getElementById(arguments[0]));return s.stroke"
    ground = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    for name in ("curve-speculative", "curve-plain"):
        assert contrast(opened.execute_script(graphics, name), ground) >= 3.0
    spans = "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().right)"
    assert max(opened.execute_script(spans)) <= width


def test_in_print_controls_go_and_their_values_stay(opened):
    emulate(opened, scheme="dark", media="print")
    try:
        shown = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
        assert opened.execute_script(shown, "input, select") == 0
        assert opened.execute_script(shown, "output") >= 5
        assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert [entry for entry in opened.execute_script(TEXTS) if contrast(entry[1], entry[2]) < 4.5] == []
        assert len(opened.print_page()) > 10_000
    finally:
        emulate(opened)


def test_a_prediction_takes_under_30_ms_and_nothing_went_wrong(opened):
    took = opened.execute_script(
        "const q=question(), t=performance.now(); for (let n=0;n<200;n++) predict(q, q.load, q.k); "
        "return (performance.now()-t)/200"
    )
    assert took < 30.0  # measured: 0.1 ms
    assert opened.get_log("browser") == []
