// Questions to the translated model: predictions, intervals, what was measured, the policy, where speculation pays.

const AT = Object.fromEntries(DATA.outputs.map((name, index) => [name, index]));
const FITTED = Float64Array.from(Object.values(DATA.parameters), (entry) => entry.value);
const DRAWN = (DATA.draws ? DATA.draws.parameters : []).map((row) => Float64Array.from(row));
const STAGES = ["overhead", "prefill", "draft", "verify", "waiting"];
const LONGEST_DRAFT = DATA.sliders.draft_length.max;

// moments of the tokens per step at draft length k: the deployment's own curves, or one acceptance rate
function moments(q, k) {
  return q.own ? momentsMeasured(k) : momentsConstant(k, q.acceptance);
}

// the outputs of one prediction of question q at this load, draft length and pair of moments
function predict(q, load, k, pair = moments(q, k), parameters = FITTED) {
  const model = q.loop === "arrival_rate" ? predictOpen : predictClosed;
  return model(parameters, load, k, pair[0], pair[1], q.prompt, q.output, q.cap);
}

// a metric of a prediction; not a number where it saturates and no latency is finite
function metric(answer, name) {
  const rate = name === "throughput" || name === "capacity" || name === "utilization" || name === "tokens_per_step";
  return answer[AT.saturated] && !rate ? NaN : answer[AT[name]];
}

// e2e latency without speculation over that with draft length k; infinite where only speculation serves the load
function speedup(q, load, k, pair = moments(q, k)) {
  const fast = metric(predict(q, load, k, pair), "e2e_latency"), slow = metric(predict(q, load, 0), "e2e_latency");
  return Number.isNaN(slow) && !Number.isNaN(fast) ? Infinity : slow / fast;
}

// [low, high] of the central level of what a long benchmark would measure: draws, scattered by what the fit misses
function interval(answers, name) {
  const { misfit, points, level } = DATA.draws;
  let scale = misfit[name];
  if (scale === null && name === "e2e_latency" && misfit.ttft !== null && misfit.itl !== null) {
    const shares = answers.map((a) => a[AT.ttft] / a[AT.e2e_latency]).sort((a, b) => a - b), half = shares.length / 2;
    const share = (shares[Math.ceil(half) - 1] + shares[Math.floor(half)]) / 2;
    scale = Math.hypot(share * misfit.ttft, (1 - share) * misfit.itl);
  }
  if (scale === null) return null;
  const values = [];
  for (const answer of answers) {
    const value = answer[AT.saturated] ? Infinity : answer[AT[name]];
    for (const point of points) values.push(value * Math.exp(scale * point));
  }
  values.sort((a, b) => a - b);
  return [(1 - level) / 2, (1 + level) / 2].map((share) => values[Math.round(share * (values.length - 1))]);
}

// the same of one operating point; null where the model does not tell how sure it is
function intervalsAt(q, names) {
  if (!DATA.draws) return names.map(() => null);
  const pair = moments(q, q.k), answers = DRAWN.map((parameters) => predict(q, q.load, q.k, pair, parameters));
  return names.map((name) => interval(answers, name));
}

// what of a question was not measured, in words, as diffspec.fitting.hull tells it
function outside(q) {
  const found = [], known = DATA.measured.draft_lengths, by = DATA.measured.by_draft_length || {};
  const names = { prompt_length: "prompt length", output_length: "output length", arrival_rate: "arrival rate" };
  const alike = known.filter((k) => k > 0 === q.k > 0);
  const within = alike.length && Math.min(...alike) <= q.k && q.k <= Math.max(...alike);
  if (!within) {
    if (q.k > 0 && !alike.length) found.push("no speculative row was fitted: drafting cost is a guess (its prior), not knowledge");
    else if (q.k === 0) found.push("no row without speculation (draft length 0) was fitted");
    else found.push(`draft length ${q.k} was not measured (${alike.join(", ")} were)`);
  }
  const around = !within ? [] : [Math.max(...alike.filter((k) => k <= q.k)), Math.min(...alike.filter((k) => k >= q.k))];
  const asked = { [q.loop]: q.load, prompt_length: q.prompt, output_length: q.output };
  const holds = (span, value) => span && span[0] * (1 - 1e-9) <= value && value <= span[1] * (1 + 1e-9);
  for (const [name, value] of Object.entries(asked)) {
    const word = names[name] || name, span = DATA.measured[name];
    const there = (text, s) => found.push(s ? `${word} ${significant(value, 4)} is outside the measured range${text}, ${significant(s[0], 4)} to ${significant(s[1], 4)}` : `no row${text} has ${word}`);
    if (!holds(span, value)) there("", span);
    else for (const k of new Set(around)) if (!holds((by[k] || DATA.measured)[name], value)) there(` at draft length ${k}`, (by[k] || DATA.measured)[name]);
  }
  return found;
}

// loads that a curve is drawn at: up to what the server with or without speculation can bear, and the load asked for
function loadsOf(q, count) {
  let most = DATA.sliders.concurrency.max;
  if (q.loop === "arrival_rate") {
    const capacities = [q.k, 0].map((k) => predict(q, q.load, k)[AT.capacity]);
    most = Math.max(Math.min(Math.max(...capacities) * 1.02, 4 * DATA.sliders.arrival_rate.max), q.load * 1.1);
  }
  const least = q.loop === "arrival_rate" ? most / 400 : 1;
  return Array.from({ length: count }, (_, index) => least + ((most - least) * index) / (count - 1));
}

// draft length with the smallest e2e latency at a load, its speedup; k is null where every one saturates
function best(q, load) {
  let found = { k: null, latency: Infinity }, plain = NaN;
  for (let k = 0; k <= LONGEST_DRAFT; k++) {
    const latency = metric(predict(q, load, k), "e2e_latency");
    if (k === 0) plain = latency;
    if (latency < found.latency) found = { k, latency };
  }
  const gain = found.k === null ? NaN : Number.isNaN(plain) ? Infinity : plain / found.latency;
  return { load, k: found.k, speedup: gain };
}

// the load between two ranges at which the draft length of the first stops being the best
function switchLoad(q, last, point) {
  let low = last.to, high = point.load;
  for (let n = 0; n < 12; n++) {
    const middle = 0.5 * (low + high);
    if (best(q, middle).k === last.k) low = middle;
    else high = middle;
  }
  return 0.5 * (low + high);
}

// [{from, to, k, low, high}]: ranges of loads with one best draft length, and the speedups in them
function ranges(q, points) {
  const found = [];
  for (const point of points) {
    const last = found[found.length - 1];
    if (last && last.k === point.k) {
      last.to = point.load;
      last.low = Math.min(last.low, point.speedup);
      last.high = Math.max(last.high, point.speedup);
    } else {
      const from = last ? switchLoad(q, last, point) : 0;
      if (last) last.to = from;
      found.push({ from, to: point.load, k: point.k, low: point.speedup, high: point.speedup });
    }
  }
  return found;
}

// acceptance at which draft length k is as fast as no speculation at a load: more acceptance is always faster, so there
// is one at most; NaN where speculation wins or loses whatever the acceptance, or plain decoding saturates
function breakEvenAcceptance(q, load, k) {
  const plain = metric(predict(q, load, 0), "e2e_latency");
  if (Number.isNaN(plain)) return NaN;
  const gain = (a) => {
    const latency = metric(predict(q, load, k, momentsConstant(k, a)), "e2e_latency");
    return Number.isNaN(latency) ? -1 : Math.log(plain / latency);
  };
  let low = 0, high = 1;
  if (gain(low) >= 0 || gain(high) <= 0) return NaN;
  for (let n = 0; n < 30; n++) {
    const middle = 0.5 * (low + high);
    if (gain(middle) > 0) high = middle;
    else low = middle;
  }
  return 0.5 * (low + high);
}
