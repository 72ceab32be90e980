// What translated functions call that JavaScript does not have. Only those that are called are included.

// round half to even
function roundEven(x) {
  const floor = Math.floor(x), rest = x - floor;
  return rest < 0.5 ? floor : rest > 0.5 ? floor + 1 : floor % 2 === 0 ? floor : floor + 1;
}

// erf(x) = 2/sqrt(pi)*exp(-x^2)*sum of 2^n x^(2n+1)/(1*3*...*(2n+1)) for small |x|, else 1 - erfc
function erf(x) {
  if (Math.abs(x) > 2) return x > 0 ? 1 - erfc(x) : erfc(-x) - 1;
  let term = x, sum = x;
  for (let n = 1; n < 80; n++) {
    term *= 2 * x * x / (2 * n + 1);
    sum += term;
    if (Math.abs(term) <= 1e-17 * Math.abs(sum)) break;
  }
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

// erfc(x) = exp(-x^2)/sqrt(pi)/(x + (1/2)/(x + 1/(x + (3/2)/(x + ...)))), the continued fraction of Laplace; what n terms
// leave out falls as exp(-c*x*sqrt(n)), so 1/x^2 as many do
function erfc(x) {
  if (Number.isNaN(x)) return x;
  if (x < 1) return x < -2 ? 2 - erfc(-x) : 1 - erf(x);
  if (x > 27.3) return 0;
  let fraction = x;
  for (let n = Math.ceil(10 + 160 / (x * x)); n > 0; n--) fraction = x + n / 2 / fraction;
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / fraction;
}

// elements of x (of shape xs) from the corners that rows of starts give, as lax.gather: offsets and batch tell, for each
// dimension of the result, which dimension of the slice or of the rows of starts (of shape rows, then k numbers) it is
function gather(x, xs, starts, rows, k, map, sizes, kept, offsets, batch, shape, fill) {
  const out = new Float64Array(shape.reduce((a, b) => a * b, 1)), at = new Array(shape.length).fill(0);
  for (let o = 0; o < out.length; o++) {
    let row = 0;
    batch.forEach((dim, d) => { row = row * rows[d] + at[dim]; });
    const place = new Array(xs.length).fill(0);
    let inside = true;
    map.forEach((dim, j) => {
      const start = typeof starts === "number" ? starts : starts[row * k + j];
      if (start < 0 || start > xs[dim] - sizes[dim]) inside = false;
      place[dim] = Math.min(Math.max(start, 0), xs[dim] - sizes[dim]);
    });
    kept.forEach((dim, d) => { place[dim] += at[offsets[d]]; });
    let flat = 0;
    for (let d = 0; d < xs.length; d++) flat = flat * xs[d] + place[d];
    out[o] = inside || !fill ? x[flat] : NaN;
    for (let d = shape.length - 1; d >= 0 && ++at[d] === shape[d]; d--) at[d] = 0;
  }
  return out;
}

// a block of sizes of x (of shape xs) from a corner that is moved inside, as lax.dynamic_slice; with an update it is put
// there instead, as lax.dynamic_update_slice
function dynamicSlice(x, xs, corner, sizes, update) {
  const start = corner.map((c, d) => Math.min(Math.max(c, 0), xs[d] - sizes[d]));
  const count = sizes.reduce((a, b) => a * b, 1), at = new Array(xs.length).fill(0);
  const out = update === undefined ? new Float64Array(count) : Float64Array.from(x);
  for (let o = 0; o < count; o++) {
    let flat = 0;
    for (let d = 0; d < xs.length; d++) flat = flat * xs[d] + start[d] + at[d];
    if (update === undefined) out[o] = x[flat];
    else out[flat] = typeof update === "number" ? update : update[o];
    for (let d = xs.length - 1; d >= 0 && ++at[d] === sizes[d]; d--) at[d] = 0;
  }
  return out;
}
