"""`diffspec report`: what the page holds, its functions against `predict`, and the page in a headless browser."""

import dataclasses
import json
import shutil
import time
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_browser import needs_node, run_node
from test_cli_main import TRACE, files_in, run, toy_deployment, toy_model

from diffspec.acceptance import ConstantAcceptance
from diffspec.analysis.answers import predict_answer
from diffspec.browser.serving import FIELDS, OUTPUTS, browser_functions, parameter_values
from diffspec.cli import report as cli_report
from diffspec.fitting.deployment import FittedModel
from diffspec.fitting.forms import Scales, build_form
from diffspec.fitting.uncertainty import Uncertainty
from diffspec.prediction import STAGES
from diffspec.programs import FAST_COMPILE
from diffspec.report.curves import draw_curves
from diffspec.report.page_data import nice, page_data
from diffspec.report.page_html import page_html
from diffspec.results import RESULTS
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


def made_up_rows():
    """Rows as a page shows them, of no measurement: what matters is where they are drawn."""
    rows = []
    for number in range(12):
        e2e = 1.0 + 0.2 * number
        told = {"measured": e2e, "predicted": 1.1 * e2e, "low": e2e * (1.05 if number == 4 else 0.9), "high": 1.3 * e2e}
        place = {"arrival_rate": 0.5 * (number + 1), "concurrency": None, "prompt_length": 64.0, "output_length": 64.0}
        part = "held out" if number == 7 else "fitted"
        rows.append(place | {"draft_length": float(2 * (number % 3)), "part": part, "metrics": {"e2e_mean": told}})
    return rows


@pytest.fixture(scope="module")
def page(tmp_path_factory, deployment):
    """The page in a file, and its data."""
    data = page_data(FittedModel({"toy": deployment}, "0" * 64, {"jax": "1"}), deployment, command="diffspec report")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_html(data | {"rows": made_up_rows()}, deployment), encoding="utf-8")
    return path, data


# --- the functions ----------------------------------------------------------------------------------------------------


def of_form(name):
    """A deployment and the largest batch cap that is asked of it: affine without a cap, roofline, roofline of experts
    with a memory cap and a drafter that abstains."""
    toy = toy_deployment()
    if name == "uncapped":
        rest = {key: value for key, value in toy.defaults.items() if key != "max_batch_size"}
        return dataclasses.replace(toy, defaults=rest), None
    sparse = name == "experts"
    serving = build_form("roofline", SCALES, (64.0, 8.0, 4.0) if sparse else None).template
    more = {"kv_capacity_tokens": 5000.0, "draft_probability": 0.6} if sparse else {}
    return dataclasses.replace(toy, form="roofline", serving=serving, defaults=toy.defaults | more), 128.0


def known_predictions(deployment, own, points):
    """What :meth:`ServingModel.predict` says at points (load, k, acceptance, prompt, output, cap), by output."""
    serving = dataclasses.replace(deployment.serving, waiting_states=128)

    def one(load, k, alpha, prompt, output, cap):
        acceptance = deployment.acceptance if own else ConstantAcceptance(alpha)
        capped = None if deployment.defaults.get("max_batch_size") is None else cap
        config = deployment.configuration(k, acceptance=acceptance, max_batch_size=capped)
        found = serving.predict(Workload(prompt, output, arrival_rate=load), config)
        parts = {stage: found.decomposition[stage] for stage in STAGES}
        split = {
            f"{s}_{p}": getattr(part, f"load_{p}") for s, part in parts.items() for p in ("independent", "dependent")
        }
        return (
            {name: getattr(found, name) for name in FIELDS} | split | {"saturated": found.result == RESULTS.saturated}
        )

    return jax.jit(jax.vmap(one), compiler_options=FAST_COMPILE)(*jnp.asarray(points).T)


@needs_node
@pytest.mark.parametrize(("name", "own"), [("roofline", True), ("experts", False)])
def test_predictions_in_javascript_are_those_of_the_model(name, own):
    """To 1e-9 relative, every output, at random loads (some saturate), draft lengths, lengths and caps."""
    deployment, largest = of_form(name)
    rng, count = np.random.default_rng(3), 40
    columns = (
        *(rng.uniform(0.2, 9.0, count), rng.choice([0.0, 1.0, 2.0, 3.5, 5.0], count), rng.uniform(0.05, 0.98, count)),
        *(rng.uniform(10, 300, count), rng.uniform(1.5, 200, count), rng.integers(2, 100, count).astype(float)),
    )
    points = np.stack(columns, axis=1)
    wanted = known_predictions(deployment, own, points)
    moments = "momentsMeasured(k)" if own else "momentsConstant(k,alpha)"
    ask = f"function ask(p,load,k,alpha,a,b,c){{return predictOpen(p,load,k,...{moments},a,b,c);}}"
    texts = [browser_functions(deployment, largest) + "\n" + ask] + [""] * (count - 1)
    parameters = parameter_values(deployment.serving)
    got = run_node([(text, "ask", [parameters, *point]) for text, point in zip(texts, points, strict=True)])
    assert 0 < np.asarray(wanted["saturated"]).sum() < count
    for place, output in enumerate(OUTPUTS):
        values = [leaves[place][0] for leaves in got]
        np.testing.assert_allclose(values, np.asarray(wanted[output], float), rtol=1e-9, atol=1e-12, err_msg=output)


# --- what the page holds ----------------------------------------------------------------------------------------------


def test_the_page_is_small_and_alone(page):
    path, data = page
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    for outside in ("http:", "https:", "src=", "@import", "url("):
        assert outside not in text.replace("http://www.w3.org/2000/svg", "").replace("url(#", ""), outside
    assert "default-src 'none'" in text and "the trace does not tell &lt;kv_read&gt; &amp; more" in text
    assert text.count("</script>") == 1, "data must not end the script"
    for told in ("a warning of the fit", data["provenance"]["model_sha256"], "0" * 64, "diffspec report", "jax 1"):
        assert told in text
    assert (
        "function predictOpen(a0,a1,a2,a3,a4,a5,a6,a7)" in text
    )  # parameters, load, draft length, moments, lengths, cap


def test_the_command_line_says_what_the_page_holds(tmp_path):
    model = toy_model(tmp_path / "model.json")
    ran = run("report", model, TRACE, "--out", tmp_path / "report.html", "--json")
    assert ran.code == 0, ran.err
    answer, text = json.loads(ran.out), (tmp_path / "report.html").read_text(encoding="utf-8")
    keys = "deployment facts form measured plain_measured acceptance parameters quality untold warnings rows sliders"
    assert [*keys.split(), "outputs", "draws", "provenance", "page"] == list(answer)
    assert answer["page"] == {"path": str(tmp_path / "report.html"), "bytes": len(text.encode())}
    assert {row["part"] for row in answer["rows"]} == {"fitted"} and len(answer["rows"]) == 27
    assert answer["draws"] is None and "no intervals: the model has none" in text
    assert f"diffspec report {model} {TRACE} --out" in text
    assert files_in(tmp_path) == {"model.json", "report.html"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A page of the least that a model can know: no cap, no rows, no draws, no row without speculation, no rates."""
    toy, _ = of_form("uncapped")
    toy = dataclasses.replace(toy, measured=toy.measured | {"draft_lengths": [2, 4], "arrival_rate": None})
    path = tmp_path_factory.mktemp("bare") / "report.html"
    path.write_text(page_html(page_data(FittedModel({"toy": toy}, "0" * 64, {}), toy), toy), encoding="utf-8")
    return path


def test_without_rows_a_cap_or_plain_rows_the_page_says_so(bare):
    text = bare.read_text(encoding="utf-8")
    assert "No measured rows were given" in text and "Batch cap" not in text
    assert "what speculation gains is not known" in text


def test_bad_questions(tmp_path):
    model = toy_model(tmp_path / "m.json", toy_deployment("a"), toy_deployment("b"))
    for arguments, named in (
        ((model,), "--out is missing"),
        ((model, "--out", tmp_path / "none" / "x.html"), "does not exist"),
        ((model, "--out", model), "would be overwritten"),
        ((model, "--out", tmp_path / "x.html", "--deployment", "c"), "deployment: got 'c'; allowed: 'a', 'b'"),
        ((model, "--out", tmp_path / "x.html", "--max-draft-length", 0), "--max-draft-length: got 0; allowed: [1, 32]"),
    ):
        ran = run("report", *arguments)
        assert ran.code == 2 and named in ran.err and ran.out == "", ran
    assert files_in(tmp_path) == {"m.json"}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A page of two deployments by the command line, and its answer; the second is named to be awkward."""
    folder = tmp_path_factory.mktemp("several")
    steps = dataclasses.replace(toy_deployment().serving.step_time, verify_base=0.06)
    slow = toy_deployment("b </script> & 50 %")
    slow = dataclasses.replace(slow, serving=dataclasses.replace(slow.serving, step_time=steps))
    model = toy_model(folder / "model.json", toy_deployment("a"), slow)
    ran = run("report", model, "--out", folder / "report.html", "--json")
    assert ran.code == 0, ran.err
    return folder / "report.html", json.loads(ran.out), model


def test_a_page_of_several_deployments(several):
    path, answer, model = several
    text = path.read_text(encoding="utf-8")
    assert [part["deployment"] for part in answer["deployments"]] == ["a", "b </script> & 50 %"]
    assert answer["page"] == {"path": str(path), "bytes": len(text.encode())}
    assert text.count("</script>") == 4  # two models, what they share, the chooser
    assert text.count("<template>") == 2 and len(text) < 600_000
    (said,) = cli_report._show(answer)
    assert said.startswith(f"2 deployments: a page of {len(text.encode()) / 1000:.0f} kB, no measured rows in it")
    one = run("report", model, TRACE, "--deployment", "a", "--json")
    assert one.code == 0 and json.loads(one.out)["deployment"] == "a"
    assert "no row of the trace is of deployment 'a'" in one.err


@pytest.mark.parametrize(("value", "wanted"), [(1.0, 1.0), (1.01, 2.0), (3.2, 5.0), (70.0, 100.0), (0.0021, 0.005)])
def test_nice(value, wanted):
    assert nice(value) == wanted


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium of the distribution's. Selenium is told where it and its driver are: it downloads nothing."""
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
    sent = [m["params"] for m in wanted if m["method"] == "Network.requestWillBeSent"]
    requests = {entry["request"]["url"] for entry in sent if entry["documentURL"] == opened.current_url}
    assert requests <= {opened.current_url, "data:,"} and opened.current_url in requests
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(opened.find_elements("css selector", "#curves path")) >= 3  # two curves and a band
    assert len(opened.find_elements("css selector", "#parity circle")) == 12
    assert opened.find_element("id", "parity-words").text == "11 of 12 measured values lie inside their 90 % intervals."


QUESTIONS = [
    dict(arrival_rate=2.0, draft_length=4, own=True, prompt_length=64, output_length=64, max_batch_size=64),
    dict(arrival_rate=5.0, draft_length=2, own=False, acceptance_rate=0.6, prompt_length=200, max_batch_size=8),
    dict(arrival_rate=1.0, draft_length=0, own=False, output_length=200, max_batch_size=100),
]


def by_the_model(deployment, q, loads, lengths, acceptance=None):
    """End-to-end latencies [s] of draft lengths (rows) at loads (columns) that :func:`draw_curves` has, for a question
    of the page; NaN where saturated."""
    defaults = deployment.defaults | {"max_batch_size": float(q["cap"])}
    found = draw_curves(
        dataclasses.replace(deployment, defaults=defaults),
        lengths,
        prompt_length=float(q["prompt"]),
        output_length=float(q["output"]),
        arrival_rates=np.asarray(loads),
        acceptance=acceptance or ConstantAcceptance(jnp.asarray(float(q["acceptance"]))),
    )
    return found["arrival_rate"].values["e2e_latency"]


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda q: f"k{q['draft_length']}")
def test_sliders_change_the_curves_to_what_the_model_says(opened, deployment, asked):
    ask(opened, **asked)
    q = opened.execute_script("return question()")
    assert q["load"] == asked["arrival_rate"] and q["k"] == asked["draft_length"]
    plain = curve(opened, "plain")
    fast = curve(opened, "speculative") if q["k"] else plain
    wanted = by_the_model(
        deployment, q, [load for load, _ in plain], [q["k"], 0], deployment.acceptance if q["own"] else None
    )[0]
    got = np.array([value for _, value in fast], dtype=float)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert np.isfinite(wanted).sum() > 20
    told = deployment.hull(
        q["k"], {"arrival_rate": q["load"], "prompt_length": q["prompt"], "output_length": q["output"]}
    )
    beyond = opened.execute_script("return [...document.querySelectorAll('#hull li')].map(e => e.textContent)")
    assert len(beyond) == len(told["outside_measured"]), (beyond, told)
    shown = opened.execute_script("return document.getElementById('hull-box').dataset.inside")
    assert (shown == "true") == told["inside_measured"]


def test_the_answer_and_its_intervals_are_those_of_predict(opened, deployment):
    ask(opened, **QUESTIONS[0])
    got = opened.execute_script("const q = question(); return predict(q, q.load, q.k)")
    edges = opened.execute_script("return intervalsAt(question(), ['e2e_latency', 'ttft', 'tpot'])")
    told = predict_answer(deployment, Workload(64.0, 64.0, arrival_rate=2.0), deployment.configuration(4.0))
    for name in FIELDS:
        assert got[OUTPUTS.index(name)] == pytest.approx(told[name], rel=1e-6, abs=1e-9)
    gain = opened.execute_script("const q = question(); return speedup(q, q.load, q.k)")
    assert gain == pytest.approx(told["speedup"], rel=1e-6)
    for name, (low, high) in zip(("e2e_latency", "ttft", "tpot"), edges, strict=True):
        wanted = told["intervals"]["metrics"][name]
        assert (low, high) == pytest.approx((wanted["low"], wanted["high"]), rel=1e-6)
    words = opened.find_element("id", "answer-words").text
    assert f"{told['speedup']:.3g} times as fast as without" in words or "slower than without" in words
    rows = opened.execute_script("return [...document.querySelectorAll('#stage-values tr')].map(r => r.textContent)")
    assert len(rows) == len(STAGES)


def test_policy_and_break_even_are_the_models_own(opened, deployment):
    """The best draft length against all of them by the JAX model; break-even points have a speedup of one there."""
    ask(opened, arrival_rate=2.0, draft_length=3, own=False, acceptance_rate=0.7, prompt_length=64, output_length=64)
    ask(opened, max_batch_size=64)
    points = opened.execute_script("return loadsOf(question(), 9).map(load => best(question(), load))")
    q = opened.execute_script("return question()")
    latency = by_the_model(deployment, q, [point["load"] for point in points], range(9))
    for column, point in enumerate(points):
        alive = np.isfinite(latency[:, column])
        assert point["k"] == (int(np.nanargmin(latency[:, column])) if alive.any() else None)
    contour = [(load, a) for load, a in curve(opened, "breakeven") if a is not None]
    assert len(contour) > 10
    for load, a in contour[:: len(contour) // 4]:
        fast, plain = by_the_model(deployment, q, [load], [3, 0], ConstantAcceptance(jnp.asarray(a)))[:, 0]
        assert plain / fast == pytest.approx(1.0, abs=1e-6)


def test_a_closed_loop_is_asked_by_its_own_slider(opened, deployment):
    opened.find_element("css selector", "input[value=concurrency]").click()
    ask(opened, concurrency=12, draft_length=4, own=True, max_batch_size=64)
    assert opened.find_element("id", "concurrency").is_displayed()
    assert not opened.find_element("id", "arrival_rate").is_displayed()
    points = curve(opened, "speculative")
    found = draw_curves(
        deployment, [4], prompt_length=64.0, output_length=64.0, concurrencies=np.array([load for load, _ in points])
    )["concurrency"]
    np.testing.assert_allclose([value for _, value in points], found.of("e2e_latency", 4), rtol=1e-6)
    opened.find_element("css selector", "input[value=arrival_rate]").click()
    settled(opened)


def test_the_keyboard_is_enough(opened):
    from selenium.webdriver.common.keys import Keys

    opened.refresh()
    settled(opened)
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
  if (!node.textContent.trim() || !element.checkVisibility()) continue;
  if (element.closest("script,style,title,:disabled")) continue;
  if (element.tagName === "OPTION" || element.closest(".skip")) continue;
  const style = getComputedStyle(element), drawn = element.closest("svg") !== null;
  const clear = (e) => getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)";
  let ground = element;
  while (ground && clear(ground)) ground = ground.parentElement;
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
        assert opened.execute_script(shown, ".choice") == opened.execute_script(shown, ".choice:has(:checked)") > 0
        assert opened.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert [entry for entry in opened.execute_script(TEXTS) if contrast(entry[1], entry[2]) < 4.5] == []
        assert len(opened.print_page()) > 10_000
    finally:
        emulate(opened)


def test_the_barest_page_works_too(browser, bare):
    browser.get(bare.as_uri())
    settled(browser)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return question().loop") == "concurrency"
    assert browser.find_element("id", "answer-speedup").text == "not known"
    ask(browser, concurrency=3, draft_length=0, own=False)
    assert browser.get_log("browser") == []
    assert "no row without speculation" in browser.find_element("id", "hull").text


def test_the_chooser_changes_the_model(browser, several):
    from selenium.webdriver.support.ui import Select

    path = several[0]
    browser.get(path.as_uri())
    settled(browser)
    seen = {}
    for name in ("a", "b </script> & 50 %", "a"):
        Select(browser.find_element("id", "deployment")).select_by_value(name)
        deadline = time.monotonic() + 20
        while browser.execute_script("return document.querySelector('h1')?.textContent") != name:
            assert time.monotonic() < deadline, browser.get_log("browser")
            time.sleep(0.05)
        settled(browser)
        assert name in browser.title and len(browser.find_elements("css selector", "main")) == 1
        seen[name] = curve(browser, "plain")
        assert browser.execute_script("return DATA.deployment") == name
    assert browser.get_log("browser") == []
    fast, slow = seen.values()
    assert slow[0][1] > 1.5 * fast[0][1]
    browser.get("about:blank")
    browser.get(path.as_uri() + "#deployment=" + quote("b </script> & 50 %"))
    settled(browser)
    assert browser.find_element("css selector", "h1").text == "b </script> & 50 %"


def test_a_prediction_takes_under_30_ms_and_nothing_went_wrong(opened, page):
    opened.get(page[0].as_uri())
    settled(opened)
    took = opened.execute_script(
        "const q=question(), t=performance.now(); for (let n=0;n<200;n++) predict(q, q.load, q.k); "
        "return (performance.now()-t)/200"
    )
    assert took < 30.0  # measured: 0.1 ms
    assert opened.get_log("browser") == []
