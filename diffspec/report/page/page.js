// The page: what the sliders say, and what is drawn of it. Curves at once, what takes longer in slices between frames.

const byId = (id) => document.getElementById(id);
const METRIC_LABELS = { e2e_latency: "end-to-end latency", ttft: "time to first token", tpot: "time per output token", itl: "gap between stream events", throughput: "throughput" };
const LOAD_LABELS = { arrival_rate: "arrival rate [req/s]", concurrency: "requests in flight" };
const LATENCIES = ["e2e_latency", "ttft", "tpot"];
const POINTS = 40, BAND_POINTS = 16, MAP = { loads: 30, rates: 20 };

// the question that the controls ask
function question() {
  const loop = document.querySelector("input[name=loop]:checked").value, own = byId("own");
  const value = (id) => Number(byId(id).value);
  return {
    loop, load: value(loop), k: value("draft_length"), own: own !== null && own.checked, acceptance: value("acceptance_rate"),
    prompt: value("prompt_length"), output: value("output_length"), cap: byId("max_batch_size") ? value("max_batch_size") : undefined,
  };
}

// a unit of a metric's values on an axis: milliseconds where all are short
function unitOf(name, most) {
  if (name === "throughput") return { label: `${METRIC_LABELS[name]} [req/s]`, factor: 1 };
  const short = most < 1;
  return { label: `${METRIC_LABELS[name]} [${short ? "ms" : "s"}]`, factor: short ? 1000 : 1 };
}

function largest(points) {
  return Math.max(...points.map(([, y]) => y).filter(Number.isFinite), 0);
}

function fillTable(id, rows) {
  byId(id).replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  }));
}

// --- what is drawn at once --------------------------------------------------------------------------------------------

function drawAnswer(q) {
  const answer = predict(q, q.load, q.k), saturated = answer[AT.saturated];
  const gain = DATA.plain_measured && q.k > 0 ? speedup(q, q.load, q.k) : null;
  const cells = {
    e2e_latency: duration(metric(answer, "e2e_latency")), ttft: duration(metric(answer, "ttft")),
    tpot: duration(metric(answer, "tpot")), throughput: `${significant(answer[AT.throughput])} req/s`,
    effective_batch_size: significant(metric(answer, "effective_batch_size")), capacity: answer[AT.capacity] < 1e12 ? `${significant(answer[AT.capacity])} req/s` : "unbounded",
    utilization: percent(answer[AT.utilization]), tokens_per_step: significant(answer[AT.tokens_per_step]),
    speedup: gain === null ? (q.k === 0 ? "–" : "not known") : gain === Infinity ? "only speculation serves" : `${significant(gain)}×`,
  };
  for (const [name, text] of Object.entries(cells)) byId(`answer-${name}`).textContent = text;
  intervalsAt(q, LATENCIES).forEach((edges, index) => {
    const known = edges && !saturated;
    byId(`interval-${LATENCIES[index]}`).textContent = known ? `${duration(edges[0])} to ${duration(edges[1])}` : "";
  });
  const words = saturated
    ? `Saturated: ${significant(q.load)} req/s is beyond the capacity of ${significant(answer[AT.capacity])} req/s.`
    : `${q.k === 0 ? "Without speculation" : `Draft length ${q.k}`} at ${significant(q.load)} ${q.loop === "arrival_rate" ? "req/s" : "requests in flight"}: a request takes ${cells.e2e_latency}` +
      (gain === null ? "." : gain === Infinity ? "; without speculation this load saturates." : gain >= 1 ? `, ${significant(gain)} times as fast as without.` : `, slower than without (${significant(gain)}×).`);
  byId("answer-words").textContent = words;
  const beyond = outside(q);
  byId("hull").replaceChildren(...beyond.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  byId("hull-head").textContent = beyond.length ? "Outside what was measured, an extrapolation:" : "Inside the measured ranges.";
  byId("hull-box").dataset.inside = String(!beyond.length);
}

function measuredRows(q, name) {
  const near = (value, wanted) => Math.abs(value / wanted - 1) < 0.05;
  const kept = DATA.rows.filter((row) => row[q.loop] !== null && near(row.prompt_length, q.prompt) && near(row.output_length, q.output) && (row.draft_length === q.k || row.draft_length === 0));
  const column = name === "throughput" ? "throughput" : name === "e2e_latency" ? "e2e_mean" : `${name}_mean`;
  return kept.filter((row) => row.metrics[column]).map((row) => [row[q.loop], row.metrics[column].measured, row.draft_length, row]);
}

// curves of one metric with and without speculation, the band of draws where it is there, and rows measured alike
function drawCurves(q, curves, band) {
  const name = byId("metric").value, { loads } = curves;
  const line = (answers) => loads.map((load, index) => [load, metric(answers[index], name)]);
  const spec = line(curves.spec), plain = line(curves.plain), rows = measuredRows(q, name);
  const knee = name === "throughput" ? Infinity : 6 * Math.max(spec[0][1], plain[0][1]);
  const shown = [spec, plain].map((points) => points.filter(([x, y]) => y <= knee || x <= q.load));
  const most = 1.08 * Math.max(largest(shown[0]), largest(shown[1]), largest(rows), 1e-9);
  const { label, factor } = unitOf(name, most);
  const scaled = { low: 0, high: most, label, show: (value) => significant(factor * value), ticks: ticks(0, factor * most, 5).map((t) => t / factor) };
  const chart = new Chart(byId("curves"), { low: 0, high: loads[loads.length - 1], label: LOAD_LABELS[q.loop] }, scaled);
  if (band) {
    const edge = (side) => band.map(({ load, edges }) => [load, edges ? Math.min(edges[side], 10 * most) : NaN]);
    chart.area(edge(0), edge(1), q.k ? "spec" : "plain");
  }
  chart.line(plain, "plain").id = "curve-plain";
  if (q.k > 0) chart.line(spec, "spec").id = "curve-speculative";
  for (const [x, y, k, row] of rows) chart.dot(x, y, `${k ? "spec" : "plain"} ${row.part === "held out" ? "held" : ""}`, `measured: ${significant(x)}, ${significant(y)}`);
  chart.upright(q.load, "asked", "asked");
  byId("curves").setAttribute("aria-label", `${label} over ${LOAD_LABELS[q.loop]}: ${byId("answer-words").textContent}`);
  fillTable("curve-values", loads.map((load, index) => [significant(load, 4), significant(factor * spec[index][1], 4), significant(factor * plain[index][1], 4)]));
  byId("curve-unit").textContent = label;
}

function drawStages(q, curves) {
  const { loads } = curves, answers = q.k ? curves.spec : curves.plain;
  const parts = ["independent", "dependent"].flatMap((part) => STAGES.map((stage) => ({ stage, part, at: AT[`${stage}_${part}`] })));
  let lower = loads.map((load) => [load, 0]);
  const layers = [];
  for (const { stage, part, at } of parts) {
    const upper = loads.map((load, index) => [load, answers[index][AT.saturated] ? NaN : lower[index][1] + Math.max(answers[index][at], 0)]);
    layers.push({ lower, upper, kind: `${stage} ${part}` });
    lower = upper;
  }
  const kept = lower.filter(([x, y]) => y <= 6 * lower[0][1] || x <= q.load);
  const most = 1.05 * Math.max(largest(kept), 1e-9), { factor } = unitOf("e2e_latency", most);
  const y = { low: 0, high: most, label: `end-to-end latency [${factor === 1 ? "s" : "ms"}]`, show: (value) => significant(factor * value), ticks: ticks(0, factor * most, 5).map((t) => t / factor) };
  const chart = new Chart(byId("stages"), { low: 0, high: loads[loads.length - 1], label: LOAD_LABELS[q.loop] }, y);
  for (const { lower: low, upper, kind } of layers) chart.area(low, upper, `stage ${kind}`);
  chart.upright(q.load, "asked", "");
  const now = predict(q, q.load, q.k), total = now[AT.e2e_latency];
  const shares = STAGES.map((stage) => [stage, now[AT[`${stage}_independent`]], now[AT[`${stage}_dependent`]]]);
  fillTable("stage-values", shares.map(([stage, alone, added]) => [stage, duration(alone), duration(added), percent((alone + added) / total)]));
  const [most_stage] = shares.map(([stage, alone, added]) => [stage, alone + added]).sort((a, b) => b[1] - a[1]);
  const loaded = shares.reduce((sum, [, , added]) => sum + added, 0) / total;
  const words = now[AT.saturated] ? "Saturated: no latency is finite." : `${percent(most_stage[1] / total)} of the latency is ${most_stage[0]}; ${percent(loaded)} of all of it is there only because of the load.`;
  byId("stage-words").textContent = words;
  byId("stages").setAttribute("aria-label", `Latency by stage over load. ${words}`);
}

// --- what takes longer ------------------------------------------------------------------------------------------------

function* bandOf(q, loads) {
  if (!DATA.draws || byId("metric").value === "throughput") return null;
  const pair = moments(q, q.k), every = loads.filter((_, index) => index % Math.ceil(loads.length / BAND_POINTS) === 0 || index === loads.length - 1);
  const band = [];
  for (const load of every) {
    const answers = [];
    for (const parameters of DRAWN) answers.push(predict(q, load, q.k, pair, parameters));
    band.push({ load, edges: interval(answers, byId("metric").value) });
    yield;
  }
  return band;
}

function* drawPolicy(q, loads) {
  const points = [];
  for (const load of loads) {
    points.push(best(q, load));
    yield;
  }
  const chart = new Chart(byId("policy"), { low: 0, high: loads[loads.length - 1], label: LOAD_LABELS[q.loop] }, { low: 0, high: LONGEST_DRAFT + 0.5, label: "best draft length", ticks: Array.from({ length: LONGEST_DRAFT + 1 }, (_, k) => k) }, 0.36);
  const steps = [];
  points.forEach((point, index) => {
    const y = point.k === null ? NaN : point.k, next = points[index + 1];
    steps.push([point.load, y]);
    if (next) steps.push([0.5 * (point.load + next.load), y], [0.5 * (point.load + next.load), next.k === null ? NaN : next.k]);
  });
  chart.line(steps, "spec").id = "curve-policy";
  chart.upright(q.load, "asked", "");
  const gain = ({ k, low, high }) => (!DATA.plain_measured ? "not known" : k === 0 || k === null ? "–" : low === Infinity ? "only speculation serves" : high === Infinity ? `${significant(low)}× and more` : `${significant(low)} to ${significant(high)}×`);
  const known = DATA.measured.draft_lengths, within = (k) => Math.min(...known) <= k && k <= Math.max(...known);
  const told = (k) => (k === null ? "every one saturates" : within(k) ? String(k) : `${k} (longer than measured)`);
  fillTable("policy-values", ranges(q, points).map((range) => [`${significant(range.from)} to ${significant(range.to)}`, told(range.k), gain(range)]));
  byId("policy").setAttribute("aria-label", "Best draft length over load; the ranges are in the table below.");
}

function* drawMap(q) {
  if (!DATA.plain_measured) return;
  const k = Math.max(q.k, 1), most = Math.min(1.15 * predict(q, q.load, 0)[AT.capacity], 4 * DATA.sliders.arrival_rate.max);
  const high = q.loop === "arrival_rate" ? most : DATA.sliders.concurrency.max, low = q.loop === "arrival_rate" ? 0 : 1;
  const columns = Array.from({ length: MAP.loads }, (_, index) => low + ((high - low) * (index + 0.5)) / MAP.loads);
  const half = (high - low) / MAP.loads / 2, cells = [];
  for (const load of columns) {
    const plain = metric(predict(q, load, 0), "e2e_latency");
    for (let row = 0; row < MAP.rates; row++) {
      const a = (row + 0.5) / MAP.rates, latency = metric(predict(q, load, k, momentsConstant(k, a)), "e2e_latency");
      cells.push([load, a, Number.isNaN(latency) ? (Number.isNaN(plain) ? NaN : 0) : Number.isNaN(plain) ? Infinity : plain / latency]);
    }
    yield;
  }
  const contour = [];
  for (const load of columns) {
    contour.push([load, breakEvenAcceptance(q, load, k)]);
    yield;
  }
  const chart = new Chart(byId("map"), { low: low, high, label: LOAD_LABELS[q.loop] }, { low: 0, high: 1, label: "acceptance rate" });
  for (const [load, a, gain] of cells) {
    const text = Number.isNaN(gain) ? "both saturate" : gain === 0 ? "saturated with speculation" : gain === Infinity ? "saturated without speculation" : `${significant(gain)}×`;
    chart.cell(load - half, load + half, a - 0.5 / MAP.rates, a + 0.5 / MAP.rates, zone(gain), `load ${significant(load)}, acceptance ${significant(a, 2)}: ${text}`);
  }
  chart.line(contour, "contour").id = "curve-breakeven";
  chart.upright(q.load, "asked", "");
  const unit = q.loop === "arrival_rate" ? "req/s" : "in flight";
  const known = contour.filter(([, a]) => Number.isFinite(a)), first = known[0], last = known[known.length - 1];
  const words = !known.length ? `Draft length ${k}: speculation wins or loses whatever the acceptance, at every load shown.` : `Draft length ${k} breaks even at an acceptance of ${significant(first[1], 2)} at ${significant(first[0])} ${unit} and of ${significant(last[1], 2)} at ${significant(last[0])} ${unit}.`;
  byId("map-words").textContent = words;
  byId("map").setAttribute("aria-label", `Speedup over load and acceptance. ${words}`);
}

// style class of a speedup
function zone(gain) {
  if (Number.isNaN(gain)) return "zone none";
  const edges = [0.67, 0.85, 0.97, 1.03, 1.3, 1.8, 2.5];
  return `zone z${edges.filter((edge) => gain >= edge).length}`;
}

function drawParity() {
  const svg = byId("parity");
  if (!svg) return;
  const name = byId("parity-metric").value;
  const found = DATA.rows.filter((row) => row.metrics[name] && row.metrics[name].predicted !== null).map((row) => ({ ...row.metrics[name], row }));
  const { factor } = name === "throughput" ? { factor: 1 } : unitOf("ttft", Math.max(...found.map((m) => m.measured)));
  const unit = name === "throughput" ? "req/s" : factor === 1 ? "s" : "ms";
  const most = factor * 1.06 * Math.max(...found.flatMap((m) => [m.measured, m.high === null ? m.predicted : Math.min(m.high, 1.5 * m.predicted)]));
  const chart = new Chart(svg, { low: 0, high: most, label: `measured [${unit}]` }, { low: 0, high: most, label: `predicted [${unit}]` }, 0.7);
  chart.line([[0, 0], [most, most]], "diagonal");
  for (const { measured, predicted, low, high, row } of found) {
    const kind = `${row.draft_length ? "spec" : "plain"} ${row.part === "held out" ? "held" : ""}`;
    if (low !== null) chart.bar(factor * measured, factor * low, factor * high, kind);
    chart.dot(factor * measured, factor * predicted, kind, `draft length ${row.draft_length}, ${row.part}: measured ${significant(factor * measured)}, predicted ${significant(factor * predicted)} ${unit}`);
  }
  const inside = found.filter((m) => m.low !== null && m.low <= m.measured && m.measured <= m.high).length, told = found.filter((m) => m.low !== null).length;
  svg.setAttribute("aria-label", `Predicted against measured, ${found.length} rows; ${inside} of ${told} measured values lie inside their 90 % intervals.`);
  byId("parity-words").textContent = told ? `${inside} of ${told} measured values lie inside their 90 % intervals.` : "No intervals: the model does not tell how sure it is.";
}

// --- the loop ---------------------------------------------------------------------------------------------------------

let turn = 0;

// run a generator in slices of a few milliseconds, unless the sliders move on
async function slices(work, mine) {
  for (;;) {
    const start = performance.now();
    while (performance.now() - start < 12) {
      const { done, value } = work.next();
      if (done) return value;
    }
    await new Promise((next) => setTimeout(next));
    if (mine !== turn) throw null;
  }
}

async function redraw() {
  const mine = ++turn, q = question();
  document.body.dataset.busy = "true";
  for (const output of document.querySelectorAll("output[data-of]")) output.textContent = `${significant(Number(byId(output.dataset.of).value), 4)} ${output.dataset.unit}`.trim();
  for (const loop of Object.keys(LOAD_LABELS)) byId(`${loop}-row`).hidden = loop !== q.loop;
  byId("acceptance_rate").disabled = q.own;
  drawAnswer(q);
  const loads = loadsOf(q, POINTS), pair = moments(q, q.k);
  const curves = { loads, spec: loads.map((load) => predict(q, load, q.k, pair)), plain: loads.map((load) => predict(q, load, 0)) };
  drawCurves(q, curves, null);
  drawStages(q, curves);
  try {
    await slices(drawPolicy(q, loads), mine);
    await slices(drawMap(q), mine);
    const band = await slices(bandOf(q, loads), mine);
    if (band) drawCurves(q, curves, band);
    document.body.dataset.busy = "false";
  } catch (stopped) {
    if (stopped !== null) throw stopped;
  }
}

let asked = 0;
function soon() {
  document.body.dataset.busy = "true";
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(redraw);
}

byId("controls").addEventListener("input", soon);
byId("metric").addEventListener("change", soon);
if (byId("parity")) byId("parity-metric").addEventListener("change", drawParity);
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  soon();
  drawParity();
});
drawParity();
soon();
